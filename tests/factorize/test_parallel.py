"""Work is spread so that ranks end together, and every job is done once."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makd_llm.factorize.parallel import decomposition_cost, shares


def largest(costs: list[float], owner: Sequence[int], ranks: int) -> float:
    """The load of the rank that has most to do."""
    return max(sum(c for c, o in zip(costs, owner, strict=True) if o == r) for r in range(ranks))


@given(costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=60), ranks=st.integers(1, 8))
def test_no_rank_does_much_more_than_its_share(costs: list[float], ranks: int) -> None:
    """A rank's load is a job and what all had done before it began, which is the mean at most."""
    share = sum(costs) / ranks + (1 - 1 / ranks) * max(costs)
    assert largest(costs, shares(costs, ranks), ranks) <= share + 1e-9


@given(costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=7), ranks=st.integers(1, 3))
def test_it_is_near_the_best_that_there_is(costs: list[float], ranks: int) -> None:
    """Graham's bound of the longest job first, against all ways of spreading the jobs. (It is of
    the best way, not of the mean: of six equal jobs one of five ranks has two.)
    """
    ways = itertools.product(range(ranks), repeat=len(costs))
    best = min(largest(costs, way, ranks) for way in ways)
    bound = 4 / 3 - 1 / (3 * ranks)
    assert largest(costs, shares(costs, ranks), ranks) <= bound * best + 1e-9


def test_a_model_splits_evenly_over_two_ranks() -> None:
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    costs = [decomposition_cost(*shape) for _ in range(30) for shape in shapes]
    owner = shares(costs, 2)
    load = sum(c for c, o in zip(costs, owner, strict=True) if o == 0)
    assert load / sum(costs) == pytest.approx(0.5, abs=0.01)
