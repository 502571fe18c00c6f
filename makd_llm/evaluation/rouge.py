"""ROUGE-1/2/L/Lsum, as the summarization papers report it.

ROUGE (Lin 2004) counts what a summary shares with a reference: words (1), pairs of words (2), the
longest common subsequence of the whole text (L), or of each reference sentence with all of the
summary's (Lsum, which is what the original ROUGE-1.5.5 prints as ROUGE-L). Published numbers differ
by points with the scorer's settings, so they are fixed here and stated in `SETTINGS`: Google's
rouge-score with Porter stemming, sentences found by sentencex, whose rules need no download.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from statistics import fmean

import sentencex
from rouge_score.rouge_scorer import RougeScorer

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
LANGUAGE = "en"

SETTINGS: dict[str, str] = {
    "scorer": f"rouge-score {version('rouge-score')}",
    "value": "F1 x 100, mean over pairs",
    "words": "runs of a-z and 0-9 after lower-casing",
    "stemming": "Porter, words of four letters and more",
    "sentences": f"lines, then sentencex {version('sentencex')} ({LANGUAGE}); they matter to Lsum",
    "several references": "the best F1, for each metric by itself",
}


@dataclass(frozen=True)
class RougeScores:
    """F1 × 100 by metric: for each pair, in the order given, and the mean over all pairs."""

    pairs: Mapping[str, Sequence[float]]

    @property
    def mean(self) -> dict[str, float]:
        """The mean of each metric. Raises ValueError where there is no pair."""
        if not all(self.pairs.values()):
            raise ValueError("no pairs were scored, so there is no mean")
        return {metric: fmean(values) for metric, values in self.pairs.items()}


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    presplit: bool = False,
    stemming: bool = True,
) -> RougeScores:
    """Score each prediction against its references; an empty prediction scores 0.

    presplit: the texts have one sentence on each line already, and are not split any further.
    stemming: `SETTINGS` speak of True; False is for comparing with scores made without it.
    Raises ValueError where the numbers differ, or a prediction has no reference.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} reference lists")
    pairs: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for index, (prediction, own) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(own, str) or not own:
            raise ValueError(f"pair {index}: references must be a list of at least one text")
        texts = [prediction, *own]
        if not presplit:
            texts = ["\n".join(split_sentences(text)) for text in texts]
        best = _scorer(stemming).score_multi(texts[1:], texts[0])
        for metric in METRICS:
            pairs[metric].append(100.0 * float(best[metric].fmeasure))
    return RougeScores(pairs)


def split_sentences(text: str) -> list[str]:
    """The sentences of an English text, stripped, without empty ones. A line's end ends one too."""
    sentences = [
        sentence.strip()
        for line in text.splitlines()
        for sentence in sentencex.segment(LANGUAGE, line)
    ]
    return [sentence for sentence in sentences if sentence]


@cache
def _scorer(stemming: bool) -> RougeScorer:
    return RougeScorer(list(METRICS), use_stemmer=stemming)
