"""Marks stand at the words that differ, and no text is lost or changed by them."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from makd_llm.report.contents import Run, Sample
from makd_llm.report.texts import compared, side_by_side

WORDS = st.lists(st.sampled_from(["the", "Cat,", "cat", "—", "sat.", "<b>", "\n"]), max_size=12)
TEXTS = st.one_of(WORDS.map(" ".join), st.text(max_size=40))


@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_the_pieces_are_the_text(text: str, reference: str, teacher: str, document: str) -> None:
    found = compared("x", text, [reference], teacher, document)
    assert "".join(piece.text for piece in found.pieces) == text
    assert all(a.differs != b.differs for a, b in zip(found.pieces, found.pieces[1:], strict=False))
    assert set(found.shared) == {"reference", "teacher", "document"}
    assert all(0 <= shared <= found.words for shared in found.shared.values())


@given(TEXTS)
def test_a_text_does_not_differ_from_itself(text: str) -> None:
    found = compared("x", text, [text], text, text)
    assert all(piece.differs == () for piece in found.pieces)
    assert set(found.shared.values()) == {found.words}


def test_words_that_differ_are_marked_whatever_their_case_and_punctuation() -> None:
    found = compared(
        "student",
        "The cat, sings — loudly today!",
        ["A dog barks.", "the CAT sleeps today"],
        "The cat sings",
        "A cat sings. Today it rains.",
    )
    assert [(p.text, p.differs) for p in found.pieces] == [
        ("The", ("document",)),
        (" cat, ", ()),
        ("sings — ", ("reference",)),
        ("loudly", ("reference", "teacher", "document")),
        (" today!", ("teacher",)),
    ]
    assert found.words == 5
    assert found.shared == {"reference": 3, "teacher": 3, "document": 3}


def run(name: str, samples: list[dict[str, object]]) -> Run:
    return Run(name, Path(name), samples=[Sample.model_validate(sample) for sample in samples])


def test_several_runs_stand_beside_each_other() -> None:
    document: dict[str, object]
    document = {"id": "a", "document": "It rains.", "references": ["Rain."]}
    one = run(
        "one", [{**document, "teacher": "It rains", "student": "Rain", "lead-3": "It rains."}]
    )
    two = run("two", [{**document, "teacher": "It rains", "student": "It snows"}])
    sides, count = side_by_side([one, two], 10)
    assert count == 1
    assert [(t.label, t.number) for t in sides[0].texts] == [
        ("teacher", None),
        ("one", 0),
        ("two", 1),
    ]
    other = run("other", [{**document, "teacher": "Snow", "student": "It"}])
    sides, _ = side_by_side([one, other], 10)
    assert [t.label for t in sides[0].texts] == ["one: teacher", "one", "other: teacher", "other"]
    alone, _ = side_by_side([one], 10)
    assert [t.label for t in alone[0].texts] == ["teacher", "student", "lead-3"]


def test_only_the_first_documents_are_shown() -> None:
    samples = [{"id": n, "document": f"{n}", "references": [], "student": "x"} for n in range(9)]
    sides, count = side_by_side([run("one", samples)], 4)
    assert (len(sides), count) == (4, 9)
    assert "reference" not in sides[0].texts[0].shared and "teacher" not in sides[0].texts[0].shared
