"""How many ranks a matrix gets.

A factor pair of rank r stores r(K + N) numbers where the dense matrix stores K N, so keeping the
share rho of them means r = floor(rho K N / (K + N)); KN/(K + N) is the rank at which nothing is
gained.
"""


def uniform_rank(rows: int, columns: int, keep_ratio: float) -> int:
    """The rank at which a rows x columns matrix keeps `keep_ratio` of its parameters; at least 1.

    Raises ValueError where keep_ratio is not in (0, 1].
    """
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio is {keep_ratio}, expected more than 0 and at most 1")
    return max(1, int(keep_ratio * rows * columns / (rows + columns)))
