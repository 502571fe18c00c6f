"""How sure a mean over documents is, and a difference of two such means.

Over documents an interval is a percentile bootstrap (Efron and Tibshirani 1993): documents drawn
with replacement, 10,000 times. A difference is one of paired documents, both systems wrote for the
same ones, and its p is that of approximate randomization (Noreen 1989): under the null hypothesis a
document's two scores may change places, so the signs of the differences are drawn at random, 10,000
times. Draws are from a fixed seed; everything is two-sided.

Several seeds are asked twice: over documents, each with its mean over the seeds; and over seeds,
each with its mean over the documents, by Student's t. The interval holds both, and p is the larger
one: what is said holds for other documents and for other seeds (Clark 1973, F1 and F2). Drawing
seeds with replacement too would not do: of three whose differences have one sign, every draw has
it, and that is one case in four where nothing differs.

The draws are the same for all tests of a table, and made once: scipy's bootstrap and
permutation_test make them anew for each, which is minutes for a grid. The tests hold this against
scipy's.
"""
# S seeds, N documents, B draws

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

DRAWS = 10_000
CONFIDENCE = 0.95
_CHUNK = 500

Scores = NDArray[np.float64]

METHODS = {
    "intervals": f"{CONFIDENCE:.0%} percentile bootstrap over documents, {DRAWS} draws; of several "
    "seeds also Student's t over these, and both within the interval",
    "p": f"two-sided, approximate randomization over documents, {DRAWS} draws of signs (one seed "
    "says nothing of others); of several seeds also a paired t-test over these, and the larger p",
}


@dataclass(frozen=True)
class Interval:
    """A mean with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean difference with its interval, and the p of its being zero."""

    difference: float
    low: float
    high: float
    p: float


def mean_interval(scores_SN: Scores) -> Interval:
    """The mean over seeds and documents. scores_SN: (seeds, documents)."""
    return Interval(float(scores_SN.mean()), *_bounds(scores_SN))


def paired_difference(scores_SN: Scores, others_SN: Scores) -> Difference:
    """How far a system's mean is above another's. Both (seeds, documents), of the same documents in
    the same order, and of the same seeds.

    Raises ValueError where the shapes differ.
    """
    if scores_SN.shape != others_SN.shape:
        raise ValueError(f"pairs are of {scores_SN.shape} and {others_SN.shape} scores")
    found_SN = scores_SN - others_SN
    seeds, documents = found_SN.shape
    p = _randomized(found_SN.mean(axis=0)) if documents > 1 else 1.0
    if seeds > 1:
        p = max(p, _of_t(found_SN.mean(axis=1)))
    return Difference(float(found_SN.mean()), *_bounds(found_SN), p)


def adjusted(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family of tests by Benjamini and Hochberg (1995): of those below 0.05, one
    in twenty is expected to be a chance.
    """
    order = np.argsort(p_values)[::-1]
    ranks = np.arange(len(p_values), 0, -1)
    stepped = np.minimum.accumulate(np.asarray(p_values)[order] * len(p_values) / ranks)
    found = np.empty(len(p_values))
    found[order] = np.minimum(stepped, 1.0)
    return [float(p) for p in found]


def p_in_words(p: float) -> str:
    """A p-value as tables and sentences say it."""
    return "p <.001" if p < 0.001 else f"p {p:.3f}"


def _bounds(scores_SN: Scores) -> tuple[float, float]:
    """The least and the most that the mean may be, over documents and over seeds."""
    (seeds, documents), mean = scores_SN.shape, float(scores_SN.mean())
    low = high = mean
    outside = (1 - CONFIDENCE) / 2
    if documents > 1:
        low, high = np.quantile(_draws(scores_SN.mean(axis=0)), (outside, 1 - outside))
    if seeds > 1:
        reach = float(stdtrit(seeds - 1, 1 - outside)) * _standard_error(scores_SN.mean(axis=1))
        low, high = min(low, mean - reach), max(high, mean + reach)
    return float(low), float(high)


def _draws(scores_N: Scores) -> Scores:
    """(B,): means of resampled documents."""
    times_BN = _times_drawn(len(scores_N))
    draws_B: Scores = np.concatenate([times_BN[c] @ scores_N for c in _chunks()]) / len(scores_N)
    return draws_B


def _of_t(differences_S: Scores) -> float:
    """The p of a t-test of a mean against 0."""
    error, mean = _standard_error(differences_S), abs(float(differences_S.mean()))
    if error == 0.0:
        return 0.0 if mean else 1.0
    return float(2 * stdtr(len(differences_S) - 1, -mean / error))


def _standard_error(values: Scores) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _randomized(found_N: Scores) -> float:
    """The share of draws of signs whose mean is as far from zero; the signs that are there are one.
    Rounding is no difference.
    """
    signs_BN, asked = _signs(len(found_N)), abs(found_N.sum())
    sums_B = np.concatenate([signs_BN[chunk] @ found_N for chunk in _chunks()])
    as_far = int((np.abs(sums_B) >= asked * (1 - 1e-12)).sum())
    return (as_far + 1) / (DRAWS + 1)


@cache
def _times_drawn(size: int) -> NDArray[Any]:
    """(B, size): how often each is drawn, of so many drawings with replacement."""
    generator = np.random.default_rng([0, size])
    counts = generator.multinomial(size, np.full(size, 1 / size), size=DRAWS)
    return counts.astype(np.uint8 if counts.max() < 256 else np.uint16)


@cache
def _signs(size: int) -> NDArray[np.int8]:
    """(B, size): 1 or -1."""
    generator = np.random.default_rng([1, size])
    return generator.integers(0, 2, size=(DRAWS, size), dtype=np.int8) * np.int8(2) - np.int8(1)


def _chunks() -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, DRAWS, _CHUNK)]
