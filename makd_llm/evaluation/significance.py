"""How sure a mean over documents is, and a difference of two such means.

An interval is a percentile bootstrap (Efron and Tibshirani 1993): documents drawn with replacement,
10,000 times; where there are several seeds, seeds are drawn as well. A difference is one of paired
documents: both systems wrote for the same ones. For one seed, its p is that of approximate
randomization (Noreen 1989): under the null hypothesis a document's two scores may change places, so
the signs of the differences are drawn at random, 10,000 times. For several seeds, it is that of the
paired bootstrap over documents and seeds: twice the share of draws beyond zero (Berg-Kirkpatrick et
al. 2012 discuss both). Everything is two-sided, and drawn from a fixed seed.

The draws are the same for all tests of a table, and made once: scipy's bootstrap and
permutation_test make them anew for each, which is minutes for a grid. The tests hold this against
scipy's.
"""
# S seeds, N documents, B draws

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
CONFIDENCE = 0.95
_CHUNK = 500

Scores = NDArray[np.float64]

METHODS = {
    "intervals": f"{CONFIDENCE:.0%} percentile bootstrap over documents (and seeds, where there "
    f"are several), {DRAWS} draws",
    "p": f"two-sided; one seed: approximate randomization over documents, {DRAWS} draws of signs; "
    "several: paired bootstrap over documents and seeds",
}


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean difference with its bootstrap interval, and the p of its being zero."""

    difference: float
    low: float
    high: float
    p: float


def mean_interval(scores_SN: Scores) -> Interval:
    """The mean over seeds and documents. scores_SN: (seeds, documents)."""
    value = float(scores_SN.mean())
    if scores_SN.shape[1] < 2:
        return Interval(value, value, value)
    low, high = np.quantile(_draws(scores_SN), _bounds())
    return Interval(value, float(low), float(high))


def paired_difference(scores_SN: Scores, others_SN: Scores) -> Difference:
    """How far a system's mean is above another's. Both (seeds, documents), of the same documents in
    the same order, and of the same seeds.

    Raises ValueError where the shapes differ.
    """
    if scores_SN.shape != others_SN.shape:
        raise ValueError(f"pairs are of {scores_SN.shape} and {others_SN.shape} scores")
    found_SN = scores_SN - others_SN
    mean = float(found_SN.mean())
    if found_SN.shape[1] < 2:
        return Difference(mean, mean, mean, 1.0)
    draws_B = _draws(found_SN)
    low, high = np.quantile(draws_B, _bounds())
    p = _randomized(found_SN[0]) if found_SN.shape[0] == 1 else _beyond_zero(draws_B)
    return Difference(mean, float(low), float(high), p)


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


def _draws(scores_SN: Scores) -> Scores:
    """(B,): means of resampled documents, and seeds."""
    seeds, documents = scores_SN.shape
    times_BN, times_BS = _times_drawn(documents), _times_drawn(seeds)
    sums = [((times_BN[c] @ scores_SN.T) * times_BS[c]).sum(axis=1) for c in _chunks()]
    draws_B: Scores = np.concatenate(sums) / (seeds * documents)
    return draws_B


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


def _beyond_zero(draws_B: Scores) -> float:
    """Twice the share of draws on the rarer side of zero; never 0, which draws cannot show."""
    rarer = min(int((draws_B <= 0).sum()), int((draws_B >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(draws_B) + 1))


def _bounds() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
