"""Intervals and p-values against exact ones, and against scipy's own."""

from dataclasses import astuple
from itertools import product

import numpy as np
import pytest
from scipy import stats

from makd_llm.evaluation.significance import adjusted, mean_interval, paired_difference

SCORES_N = np.random.default_rng(3).gamma(2.0, 10.0, size=60)
OTHERS_N = SCORES_N - 1.5 + np.random.default_rng(4).normal(0.0, 6.0, size=60)


def test_an_interval_is_scipys_percentile_bootstrap() -> None:
    found = mean_interval(SCORES_N[None])
    theirs = stats.bootstrap((SCORES_N,), np.mean, method="percentile", n_resamples=20_000, rng=5)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.value == pytest.approx(SCORES_N.mean())
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)


def test_the_p_of_one_seed_is_that_of_all_signs() -> None:
    differences = np.array([3.0, -1.0, 4.0, 2.0, -0.5, 5.0, 1.0, 2.5])
    sums = [abs(np.dot(signs, differences)) for signs in product((1, -1), repeat=8)]
    exact = np.mean([value >= differences.sum() - 1e-9 for value in sums])
    found = paired_difference(differences[None], np.zeros((1, 8)))
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.difference == differences.mean() and found.low < 2.0 < found.high


def test_the_p_of_one_seed_is_scipys() -> None:
    def mean_difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(x - y, axis=axis)

    theirs = stats.permutation_test(
        (SCORES_N, OTHERS_N),
        mean_difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=5000,
        rng=1,
    )
    found = paired_difference(SCORES_N[None], OTHERS_N[None])
    assert found.p == pytest.approx(theirs.pvalue, abs=0.015)
    turned = paired_difference(OTHERS_N[None], SCORES_N[None])
    assert turned.difference == -found.difference and turned.p == found.p


def test_what_is_the_same_does_not_differ_and_what_always_differs_does() -> None:
    same = paired_difference(SCORES_N[None], SCORES_N[None])
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    above = paired_difference(SCORES_N[None] + 1.0, SCORES_N[None])
    assert above.p == pytest.approx(1 / 10_001) and above.low == pytest.approx(1.0)


NOISE_SN = np.random.default_rng(6).normal(0.0, 0.1, size=(3, 200))


def test_seeds_that_disagree_make_a_difference_uncertain() -> None:
    """However many documents there are: the t-test of the seeds' means, which is scipy's."""
    found_SN = NOISE_SN + np.array([[4.0], [-2.0], [1.0]])
    found = paired_difference(found_SN, np.zeros_like(found_SN))
    theirs = stats.ttest_1samp(found_SN.mean(axis=1), 0.0)
    assert found.p == pytest.approx(theirs.pvalue) and found.p > 0.1
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    interval = mean_interval(found_SN)
    assert (interval.low, interval.high) == (found.low, found.high)


def test_documents_that_disagree_make_a_difference_uncertain() -> None:
    """However alike the seeds are: the test of one seed, on the documents' means."""
    found_SN = NOISE_SN / 100 + np.random.default_rng(7).normal(0.1, 2.0, size=200)
    found = paired_difference(found_SN, np.zeros_like(found_SN))
    alone = paired_difference(found_SN.mean(axis=0)[None], np.zeros((1, 200)))
    assert astuple(found) == pytest.approx(astuple(alone))
    assert found.p > stats.ttest_1samp(found_SN.mean(axis=1), 0.0).pvalue


def test_seeds_that_agree_show_a_difference() -> None:
    found = paired_difference(NOISE_SN + 1.0, np.zeros_like(NOISE_SN))
    assert found.p < 0.001 and found.low > 0.9


@pytest.mark.parametrize("by_seed", [0.0, 2.0, 10.0])
def test_where_nothing_differs_a_difference_is_seldom_found(by_seed: float) -> None:
    """by_seed: the deviation between seeds, over the standard error of the documents' mean."""
    generator, seeds, documents = np.random.default_rng(8), 3, 60
    found = []
    for _ in range(200):
        of_seed = generator.normal(0.0, by_seed / np.sqrt(documents), size=(seeds, 1))
        scores_SN = generator.normal(0.0, 1.0, size=(seeds, documents)) + of_seed
        found.append(paired_difference(scores_SN, np.zeros_like(scores_SN)).p)
    assert np.mean(np.array(found) < 0.05) < 0.09
    assert np.mean(np.array(found) < 0.005) < 0.02


def test_two_seeds_that_are_the_same_are_as_one_of_them() -> None:
    twice = np.stack([SCORES_N, SCORES_N])
    assert astuple(mean_interval(twice)) == pytest.approx(astuple(mean_interval(SCORES_N[None])))


def test_one_document_shows_nothing() -> None:
    found = paired_difference(np.array([[2.0]]), np.array([[1.0]]))
    assert (found.difference, found.p) == (1.0, 1.0)


def test_pairs_are_of_the_same_documents() -> None:
    with pytest.raises(ValueError, match=r"\(1, 60\) and \(1, 59\)"):
        paired_difference(SCORES_N[None], OTHERS_N[None, 1:])


def test_p_values_are_adjusted_as_scipy_does() -> None:
    p_values = [0.04, 0.001, 0.9, 0.02, 0.3, 0.02]
    assert adjusted(p_values) == pytest.approx(list(stats.false_discovery_control(p_values)))
    assert adjusted([0.03]) == [0.03] and adjusted([]) == []
