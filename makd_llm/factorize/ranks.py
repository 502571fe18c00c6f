"""One budget over all matrices of a model, and how it is spent.

A factor pair of rank r stores r(M + K) numbers where the dense matrix stores M K. `keep_ratio` is
the share of all factorized matrices' numbers that the student may store; ranks are multiples of
what kernels like, and a matrix whose pair would not be smaller stays dense at its M K. Three ways
to spend the budget:

- `uniform_ranks`: every matrix keeps the same share of its numbers;
- `greedy_ranks` over the whitened losses: always the component that takes away most loss for its
  numbers, which is optimal for the sum of the losses;
- `greedy_ranks` over the expected rise of the model's loss (`gradients.sensitivity`).
"""
# M rows (outputs), K columns (inputs) of a matrix

import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from makd_llm.errors import UserError

Rank = int | None
"""The rank of a factor pair; None: the matrix stays dense."""

Limits = Mapping[str, tuple[float, float]]
"""Role -> the least and the largest share of a matrix's numbers that may be kept."""


@dataclass(frozen=True)
class MatrixShape:
    """A matrix as the budget sees it."""

    name: str
    role: str
    rows: int
    columns: int

    @property
    def dense(self) -> int:
        """Numbers that it stores when dense."""
        return self.rows * self.columns

    @property
    def break_even(self) -> int:
        """With that many components, a factor pair is as large as the matrix."""
        return -(-self.dense // (self.rows + self.columns))

    def stored(self, rank: Rank) -> int:
        """Numbers that it stores at this rank."""
        return self.dense if rank is None else rank * (self.rows + self.columns)


def uniform_ranks(
    shapes: Sequence[MatrixShape],
    keep_ratio: float,
    *,
    multiple: int = 1,
    limits: Limits | None = None,
) -> list[Rank]:
    """Every matrix at keep_ratio of its numbers. What rounding to the multiple leaves over goes to
    the matrices that it took most from, one multiple each.

    Raises UserError where no choice of ranks meets the budget.
    """
    options = [_options(shape, multiple, limits) for shape in shapes]
    budget = _budget(shapes, options, keep_ratio, multiple)
    places = [
        max(0, bisect_right(o, keep_ratio * s.dense, key=s.stored) - 1)
        for s, o in zip(shapes, options, strict=True)
    ]

    def kept(i: int, place: int) -> float:
        return shapes[i].stored(options[i][place]) / shapes[i].dense

    used = sum(s.stored(o[p]) for s, o, p in zip(shapes, options, places, strict=True))
    while used > budget:  # the least rank of small matrices is more than their share
        lowerable = [i for i, place in enumerate(places) if place > 0]
        i = max(lowerable, key=lambda i: kept(i, places[i]))
        places[i] -= 1
        used -= shapes[i].stored(options[i][places[i] + 1]) - shapes[i].stored(
            options[i][places[i]]
        )
    for i in sorted(range(len(shapes)), key=lambda i: kept(i, places[i])):
        if kept(i, places[i]) >= keep_ratio or places[i] + 1 == len(options[i]):
            continue
        more = shapes[i].stored(options[i][places[i] + 1]) - shapes[i].stored(options[i][places[i]])
        if used + more <= budget:
            places[i] += 1
            used += more
    return [o[p] for o, p in zip(options, places, strict=True)]


def greedy_ranks(
    shapes: Sequence[MatrixShape],
    losses: Sequence[Sequence[float]],
    keep_ratio: float,
    *,
    multiple: int = 1,
    limits: Limits | None = None,
) -> list[Rank]:
    """The ranks at which the losses' sum is least, as far as whole multiples allow.

    losses: per matrix, the loss at rank 0, 1, 2, ... up to break-even at least; dense has none.
    The losses' lower convex hulls are descended together, steepest step first; what is left at the
    end goes to the single multiples that still fit. Source of the greedy rule: ours, as optimal for
    sums of convex losses.

    Raises UserError where no choice of ranks meets the budget.
    """
    options = [_options(shape, multiple, limits) for shape in shapes]
    budget = _budget(shapes, options, keep_ratio, multiple)
    points = [
        [(s.stored(rank), 0.0 if rank is None else float(loss[rank])) for rank in o]
        for s, loss, o in zip(shapes, losses, options, strict=True)
    ]
    hulls = [_lower_hull(p) for p in points]
    places = [0] * len(shapes)
    used = sum(p[0][0] for p in points)
    steps = [
        (_slope(p, hull[0], hull[1]), i, 1)
        for i, (p, hull) in enumerate(zip(points, hulls, strict=True))
        if len(hull) > 1
    ]
    heapq.heapify(steps)
    while steps and steps[0][0] < 0:  # what loses nothing, or more, is not bought
        _, i, step = heapq.heappop(steps)
        target = hulls[i][step]
        more = points[i][target][0] - points[i][places[i]][0]
        if used + more > budget:
            continue  # smaller steps of other matrices may still fit
        places[i], used = target, used + more
        if step + 1 < len(hulls[i]):
            heapq.heappush(steps, (_slope(points[i], target, hulls[i][step + 1]), i, step + 1))
    return _filled(options, points, places, budget - used)


def _filled(
    options: list[list[Rank]],
    points: list[list[tuple[int, float]]],
    places: list[int],
    left: int,
) -> list[Rank]:
    """Spends what the hulls' large steps left: single multiples, best first, while one fits."""
    steps = [
        (_slope(p, at, at + 1), i)
        for i, (p, at) in enumerate(zip(points, places, strict=True))
        if at + 1 < len(p)
    ]
    heapq.heapify(steps)
    while steps and steps[0][0] < 0:
        _, i = heapq.heappop(steps)
        at = places[i]
        more = points[i][at + 1][0] - points[i][at][0]
        if more <= left:
            places[i], left = at + 1, left - more
            if at + 2 < len(points[i]):
                heapq.heappush(steps, (_slope(points[i], at + 1, at + 2), i))
    return [o[p] for o, p in zip(options, places, strict=True)]


def _options(shape: MatrixShape, multiple: int, limits: Limits | None) -> list[Rank]:
    """What a matrix may become, cheapest first: the multiples below break-even, then dense."""
    ranks: list[Rank] = [*range(multiple, shape.break_even, multiple), None]
    low, high = (limits or {}).get(shape.role, (0.0, 1.0))
    allowed = [r for r in ranks if low * shape.dense <= shape.stored(r) <= high * shape.dense]
    if not allowed:
        raise UserError(
            f"student.limits.{shape.role}: no rank of a {shape.rows} x {shape.columns} matrix "
            f"that is a multiple of {multiple} keeps between {low:g} and {high:g} of it; widen them"
        )
    return allowed


def _budget(
    shapes: Sequence[MatrixShape], options: list[list[Rank]], keep_ratio: float, multiple: int
) -> int:
    if not 0.0 < keep_ratio <= 1.0:
        raise UserError(f"keep_ratio is {keep_ratio}, expected more than 0 and at most 1")
    dense = sum(s.dense for s in shapes)
    least = sum(s.stored(o[0]) for s, o in zip(shapes, options, strict=True))
    budget = int(keep_ratio * dense)
    if least > budget:
        raise UserError(
            f"keep_ratio {keep_ratio:g} cannot be met: the least ranks (multiples of {multiple}) "
            f"keep {least / dense:.4f} of the matrices; ask for more, or lower the multiple"
        )
    return budget


def _lower_hull(points: list[tuple[int, float]]) -> list[int]:
    """Indices of the lower convex hull of (numbers, loss), from the cheapest to no loss."""
    hull: list[int] = []
    for i in range(len(points)):
        while len(hull) >= 2 and _slope(points, hull[-2], hull[-1]) >= _slope(points, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(points: list[tuple[int, float]], a: int, b: int) -> float:
    """Loss per number from a to b: negative, and the more so the better."""
    return (points[b][1] - points[a][1]) / (points[b][0] - points[a][0])
