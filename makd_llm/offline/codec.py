"""Token ids in few bytes: rows that ascend, as steps from one id to the next, seven bits to a byte.

A step is what lies between two neighbouring ids (their difference less 1; before the first id, the
id itself). It takes one byte below 2^7, two below 2^14, and so on, low bits first; the high bit of
a byte says that another one follows (LEB128). The steps of a row add up to less than the
vocabulary, so k = 64 ids out of V = 49152 take at most 130 bytes, where int32 takes 256.
"""
# N rows, K ids of a row

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Ids = NDArray[np.int64]

MOST_BYTES = 5
"""Of one step: enough for any id below 2^31."""


def encode_ids(ids_NK: NDArray[Any]) -> Bytes:
    """The rows as bytes, one after the other. ids_NK: (N, K) integers below 2^31.

    Raises ValueError where a row does not strictly ascend, or an id is negative or too large.
    """
    ids = np.asarray(ids_NK, dtype=np.int64)
    steps = (np.diff(ids, axis=1, prepend=-1) - 1).ravel()
    if (steps < 0).any() or (ids >= 2**31).any():
        raise ValueError("token ids have to ascend in every row, from 0 up to below 2^31")
    lengths = np.ones_like(steps)
    for more in range(1, MOST_BYTES):
        lengths += steps >= 1 << 7 * more
    ends = np.cumsum(lengths)
    starts = ends - lengths
    data = np.empty(int(lengths.sum()), np.uint8)
    for place in range(int(lengths.max(initial=0))):
        has = lengths > place
        follows = (lengths[has] > place + 1).astype(np.int64) << 7
        data[starts[has] + place] = (steps[has] >> 7 * place) & 127 | follows
    return data


def decode_ids(data: Bytes, k: int) -> Ids:
    """The rows of k ids that `encode_ids` made these bytes of, (N, K) int64.

    Raises ValueError where the bytes do not end with a row.
    """
    ends = np.flatnonzero(data < 128)
    if len(ends) % k or (len(data) and data[-1] >= 128):
        raise ValueError(f"{len(data)} bytes hold {len(ends)} ids, which are no rows of {k}")
    if not len(ends):
        return np.empty((0, k), np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(data)) - np.repeat(starts, ends - starts + 1)
    steps: Ids = np.add.reduceat((data & 127).astype(np.int64) << 7 * place, starts)
    ids: Ids = np.cumsum(steps.reshape(-1, k) + 1, axis=1) - 1
    return ids
