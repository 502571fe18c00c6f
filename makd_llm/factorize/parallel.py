"""Work on many matrices, spread over ranks so that all end at about the same time."""

from collections.abc import Sequence

from makd_llm import distributed


def decomposition_cost(rows: int, columns: int) -> float:
    """What decomposing a matrix takes, in multiplications: its eigenvalues and its products."""
    small = min(rows, columns)
    # An eigendecomposition runs at about a tenth of the rate of a matrix product.
    whitening = columns**3 if rows > columns else rows * columns**2
    return 10 * 9 * small**3 + 2 * whitening + 4 * rows * columns * small


def shares(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that does each job: the costliest first, each to whoever has least to do."""
    load = [0.0] * ranks
    owner = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        owner[job] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owner[job]] += costs[job]
    return owner


def mine(costs: Sequence[float]) -> list[int]:
    """The jobs of this rank, in order."""
    owner = shares(costs, distributed.world_size())
    return [job for job, rank in enumerate(owner) if rank == distributed.rank()]
