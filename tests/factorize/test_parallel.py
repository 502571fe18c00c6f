"""Work is spread so that ranks end together, and every job is done once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makd_llm.factorize.parallel import decomposition_cost, shares


@given(costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=60), ranks=st.integers(1, 8))
def test_no_rank_does_much_more_than_its_share(costs: list[float], ranks: int) -> None:
    owner = shares(costs, ranks)
    load = [sum(c for c, o in zip(costs, owner, strict=True) if o == r) for r in range(ranks)]
    # Graham's bound of what is handed to whoever has least: the mean, and a job more. (His 4/3 for
    # the longest first is of the best that there is, which is above both: six equal jobs of five.)
    assert max(load) <= (2 - 1 / ranks) * max(sum(costs) / ranks, max(costs)) + 1e-9


def test_the_longest_go_first() -> None:
    """In the order given, the last one would come on top of half of the others."""
    owner = list(shares([1.0, 1.0, 1.0, 1.0, 4.0], 2))
    assert owner.count(owner[4]) == 1


def test_a_model_splits_evenly_over_two_ranks() -> None:
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    costs = [decomposition_cost(*shape) for _ in range(30) for shape in shapes]
    owner = shares(costs, 2)
    load = sum(c for c, o in zip(costs, owner, strict=True) if o == 0)
    assert load / sum(costs) == pytest.approx(0.5, abs=0.01)
