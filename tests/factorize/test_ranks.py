"""The budget is kept whatever is asked, and spent where it takes away most loss."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from makd_llm.errors import UserError
from makd_llm.factorize.ranks import MatrixShape, Rank, greedy_ranks, uniform_ranks

SMOL = [
    MatrixShape(f"{layer}.{role}", role, rows, columns)
    for layer in range(3)
    for role, rows, columns in (
        ("q", 576, 576),
        ("k", 192, 576),
        ("gate", 1536, 576),
        ("down", 576, 1536),
    )
]


def stored(shapes: list[MatrixShape], ranks: list[Rank]) -> int:
    return sum(shape.stored(rank) for shape, rank in zip(shapes, ranks, strict=True))


def falling(shape: MatrixShape, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    size = min(shape.rows, shape.columns)
    values = torch.rand(size, generator=generator, dtype=torch.float64).pow(4)
    tail = values.sort(descending=True).values.flip(0).cumsum(0).flip(0)
    return [*tail.tolist(), 0.0]


@given(
    keep=st.floats(0.1, 1.0),
    multiple=st.sampled_from([1, 8, 16]),
    seed=st.integers(0, 5),
    greedy=st.booleans(),
)
def test_the_budget_is_kept_and_nearly_spent(
    keep: float, multiple: int, seed: int, greedy: bool
) -> None:
    if greedy:
        losses = [falling(s, seed + i) for i, s in enumerate(SMOL)]
        ranks = greedy_ranks(SMOL, losses, keep, multiple=multiple)
    else:
        ranks = uniform_ranks(SMOL, keep, multiple=multiple)
    budget = keep * sum(s.dense for s in SMOL)
    least_step = multiple * min(s.rows + s.columns for s in SMOL)
    dense_steps = max(s.dense - s.stored(r) for s, r in zip(SMOL, ranks, strict=True))
    assert stored(SMOL, ranks) <= budget
    assert budget - stored(SMOL, ranks) < max(least_step, dense_steps) or None not in ranks
    for shape, rank in zip(SMOL, ranks, strict=True):
        if rank is not None:
            assert rank % multiple == 0 and shape.stored(rank) < shape.dense


def test_uniform_is_every_matrix_at_its_share() -> None:
    ranks = uniform_ranks(SMOL, 0.5)
    for shape, rank in zip(SMOL, ranks, strict=True):
        assert rank is not None
        exact = int(0.5 * shape.dense / (shape.rows + shape.columns))
        assert rank in (exact, exact + 1)
    rounded = uniform_ranks(SMOL, 0.5, multiple=16)
    assert stored(SMOL, rounded) > 0.98 * 0.5 * sum(s.dense for s in SMOL)


def test_everything_kept_is_dense() -> None:
    assert uniform_ranks(SMOL, 1.0) == [None] * len(SMOL)
    losses = [falling(s, i) for i, s in enumerate(SMOL)]
    assert greedy_ranks(SMOL, losses, 1.0) == [None] * len(SMOL)


def test_a_matrix_that_would_not_get_smaller_stays_dense_and_counts() -> None:
    shapes = [MatrixShape("a", "q", 8, 8), MatrixShape("b", "up", 64, 64)]
    # 8 x 8 has no multiple of 16 below its break-even rank of 4.
    ranks = uniform_ranks(shapes, 0.6, multiple=16)
    assert ranks[0] is None and ranks[1] == 16
    assert stored(shapes, ranks) == 64 + 16 * 128


def test_ranks_that_lose_more_are_not_bought() -> None:
    """A measured loss may rise again, and limits keep the dense end away."""
    losses = [[abs(rank - 5.0) for rank in range(51)]]
    shape = [MatrixShape("a", "q", 100, 100)]
    assert greedy_ranks(shape, losses, 0.9, limits={"q": (0.0, 0.2)}) == [5]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_greedy_is_the_best_there_is(seed: int, keep: float) -> None:
    shapes = [
        MatrixShape("a", "q", 6, 6),
        MatrixShape("b", "k", 4, 8),
        MatrixShape("c", "up", 10, 6),
    ]
    losses = [falling(s, seed * 10 + i) for i, s in enumerate(shapes)]

    def loss(ranks: tuple[Rank, ...]) -> float:
        return sum(0.0 if r is None else c[r] for r, c in zip(ranks, losses, strict=True))

    budget = keep * sum(s.dense for s in shapes)
    options: list[list[Rank]] = [
        [*(r for r in range(1, 12) if s.stored(r) < s.dense), None] for s in shapes
    ]
    fitting = [c for c in itertools.product(*options) if stored(shapes, list(c)) <= budget]
    best = min(loss(c) for c in fitting)
    found = greedy_ranks(shapes, losses, keep)
    whole = sum(curve[0] for curve in losses)
    # The hull rule is optimal up to what one step is worth, which in so small a case is a lot.
    assert loss(tuple(found)) <= best + 0.05 * whole
    assert loss(tuple(found)) <= loss(tuple(uniform_ranks(shapes, keep))) + 1e-12


def test_greedy_gives_more_to_what_loses_more() -> None:
    shapes = [MatrixShape("slow", "q", 64, 64), MatrixShape("steep", "q", 64, 64)]
    slow = [64 * 0.9**r for r in range(64)] + [0.0]
    steep = [64 * 0.5**r for r in range(64)] + [0.0]
    many, few = greedy_ranks(shapes, [slow, steep], 0.4)
    assert many is not None and few is not None
    assert few < 8 and many > 16


def test_limits_hold() -> None:
    losses = [falling(s, i) for i, s in enumerate(SMOL)]
    limits = {"k": (1.0, 1.0), "gate": (0.0, 0.3)}
    for ranks in (
        greedy_ranks(SMOL, losses, 0.5, multiple=16, limits=limits),
        uniform_ranks(SMOL, 0.5, multiple=16, limits=limits),
    ):
        for shape, rank in zip(SMOL, ranks, strict=True):
            if shape.role == "k":
                assert rank is None
            if shape.role == "gate":
                assert shape.stored(rank) <= 0.3 * shape.dense


@pytest.mark.parametrize(
    ("keep", "limits", "says"),
    [
        (0.01, None, "keep_ratio 0.01 cannot be met"),
        (1.2, None, "expected more than 0 and at most 1"),
        (0.5, {"q": (0.501, 0.505)}, "student.limits.q"),
    ],
)
def test_what_cannot_be_met_says_so(
    keep: float, limits: dict[str, tuple[float, float]] | None, says: str
) -> None:
    losses = [falling(s, i) for i, s in enumerate(SMOL)]
    with pytest.raises(UserError, match=says):
        uniform_ranks(SMOL, keep, multiple=16, limits=limits)
    with pytest.raises(UserError, match=says):
        greedy_ranks(SMOL, losses, keep, multiple=16, limits=limits)
