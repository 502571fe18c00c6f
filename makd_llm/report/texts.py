"""Summaries side by side: which words of a model's text stand in the reference, in the teacher's
text, in the document.

The words that a text shares with a reference, or with the teacher's, are those of difflib's
matching blocks: the longest common run, then the longest before and after it, and so on, whatever
case and punctuation. Of the document it is asked only whether a word stands in it at all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from makd_llm.report.contents import Run, Sample

_PART = re.compile(r"\S+|\s+")
_PLAIN = re.compile(r"[^\w]+")
AGAINST = ("reference", "teacher", "document")


@dataclass(frozen=True)
class Piece:
    """Some words in a row that differ from the same things, of AGAINST."""

    text: str
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """What one model wrote. number: its run, where it is a run's; shared: how many of its words
    stand in each of AGAINST.
    """

    label: str
    pieces: list[Piece]
    words: int
    shared: dict[str, int]
    number: int | None = None


@dataclass(frozen=True)
class Side:
    """One document with what was written about it."""

    name: str
    document: str
    references: list[str]
    texts: list[Text]


def side_by_side(runs: Sequence[Run], most: int) -> tuple[list[Side], int]:
    """The first documents that the runs have in common or apart, at most `most` of them, and how
    many there are. Of several runs the teacher's text and each student's; of one all there is.
    """
    found: dict[tuple[str, str], list[tuple[int, Sample]]] = {}
    for number, run in enumerate(runs):
        for place, sample in enumerate(run.samples):
            name = str(place + 1 if sample.id is None else sample.id)
            found.setdefault((name, sample.document), []).append((number, sample))
    alone = len(runs) == 1
    sides = [
        _side(name, document, samples, [run.name for run in runs], alone)
        for (name, document), samples in list(found.items())[:most]
    ]
    return sides, len(found)


def _side(
    name: str,
    document: str,
    samples: Sequence[tuple[int, Sample]],
    names: Sequence[str],
    alone: bool,
) -> Side:
    references = samples[0][1].references
    teachers = dict.fromkeys(s.texts["teacher"] for _, s in samples if "teacher" in s.texts)
    same = next(iter(teachers)) if len(teachers) == 1 else None
    texts = []
    if same is not None:
        texts.append(compared("teacher", same, references, None, document))
    for number, sample in samples:
        teacher = sample.texts.get("teacher")
        if teacher is not None and same is None:
            label = f"{names[number]}: teacher"
            texts.append(compared(label, teacher, references, None, document, number))
        for model, text in sample.texts.items():
            if model == "teacher" or not (alone or model == "student"):
                continue
            label = model if alone else names[number]
            own = None if alone else number
            texts.append(compared(label, text, references, teacher, document, own))
    return Side(name, document, references, texts)


def compared(
    label: str,
    text: str,
    references: Sequence[str],
    teacher: str | None,
    document: str,
    number: int | None = None,
) -> Text:
    """A text with its differences from the nearest reference, the teacher's text and the document.
    Signs without a letter or digit differ from nothing.
    """
    words = [_plain(word) for word in text.split()]
    kept = [place for place, word in enumerate(words) if word]
    own = [words[place] for place in kept]
    stands: dict[str, set[int]] = {}
    if references:
        stands["reference"] = max((_common(own, _words(r)) for r in references), key=len)
    if teacher is not None:
        stands["teacher"] = _common(own, _words(teacher))
    known = set(_words(document))
    stands["document"] = {i for i, word in enumerate(own) if word in known}
    differs: list[tuple[str, ...] | None] = [None] * len(words)
    for index, place in enumerate(kept):
        differs[place] = tuple(name for name in stands if index not in stands[name])
    shared = {name: len(found) for name, found in stands.items()}
    return Text(label, _pieces(text, differs), len(own), shared, number)


def _pieces(text: str, differs: Sequence[tuple[str, ...] | None]) -> list[Piece]:
    """Neighbours that differ alike in one piece. None differs like the word before it; a space like
    the words on both its sides.
    """
    parts = _PART.findall(text)
    marks: list[tuple[str, ...]] = []
    of_words = iter(differs)
    for part in parts:
        here = next(of_words) if not part.isspace() else None
        marks.append(here if here is not None else marks[-1] if marks else ())
    for place in range(1, len(parts) - 1):
        if parts[place].isspace():
            around = set(marks[place - 1]) & set(marks[place + 1])
            marks[place] = tuple(name for name in AGAINST if name in around)
    pieces: list[Piece] = []
    for part, mark in zip(parts, marks, strict=True):
        if pieces and pieces[-1].differs == mark:
            pieces[-1] = Piece(pieces[-1].text + part, mark)
        else:
            pieces.append(Piece(part, mark))
    return pieces


def _common(own: Sequence[str], other: Sequence[str]) -> set[int]:
    """Places of the words that both have in the same order."""
    blocks = SequenceMatcher(None, own, other, autojunk=False).get_matching_blocks()
    return {block.a + i for block in blocks for i in range(block.size)}


def _words(text: str) -> list[str]:
    return [word for w in text.split() if (word := _plain(w))]


def _plain(word: str) -> str:
    return _PLAIN.sub("", word).casefold()
