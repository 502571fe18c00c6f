"""Tile sizes of the Triton kernels, by architecture, kernel, head size and dtype.

A table, not an autotuner's finding: a choice that depends on timing may differ from one process to
the next, and with it the order of a sum. Not measured yet: the largest tiles that spill nothing
when they are compiled without a GPU (benchmarks/compiled.py); those for sm_80 also fit the 99 KiB
of shared memory of its smaller relatives.
"""

import torch

from makd_kernels.launching import INTERPRETED, Tiles

BySize = dict[int, Tiles]  # the padded head size, the larger of both sides, that the tiles serve

HOPPER: dict[str, BySize] = {
    "kl": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 64, 4, 2)},
    "values": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 4, 2)},
    "dq": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 32, 8, 2), 256: Tiles(64, 16, 8, 2)},
    "dq jsd": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 16, 8, 2), 256: Tiles(64, 16, 8, 2)},
    "dq values": {64: Tiles(128, 64, 8, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(64, 16, 8, 2)},
    "dk": {64: Tiles(64, 64, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(16, 64, 8, 2)},
    "dk jsd": {128: Tiles(32, 128, 8, 2), 256: Tiles(16, 64, 8, 2)},
}
_FORWARD = {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 32, 8, 1), 256: Tiles(16, 16, 8, 1)}
_BACKWARD = _FORWARD | {128: Tiles(16, 32, 4, 1)}
HOPPER_FP32: dict[str, BySize] = {
    "kl": _FORWARD,
    "values": _FORWARD,
    "dq": _BACKWARD,
    "dq values": _BACKWARD | {128: Tiles(32, 32, 4, 1)},
    "dk": _BACKWARD,
}
AMPERE: dict[str, BySize] = {
    "kl": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 4, 2)},
    "values": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 4, 2)},
    "dq": {64: Tiles(128, 32, 8, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(16, 32, 4, 1)},
    "dq logit_mse": {64: Tiles(128, 32, 8, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 32, 8, 1)},
    "dq values": {64: Tiles(128, 32, 8, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(16, 32, 4, 1)},
    "dk": {64: Tiles(64, 64, 8, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 32, 4, 1)},
}
AMPERE_FP32: dict[str, BySize] = {
    "kl": {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 32, 4, 1), 256: Tiles(16, 32, 4, 1)},
    "values": {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 32, 4, 1), 256: Tiles(16, 32, 4, 1)},
    "dq": {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 8, 1)},
    "dq values": {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 4, 1), 256: Tiles(16, 16, 4, 1)},
    "dk": {64: Tiles(16, 32, 4, 1), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 32, 4, 1)},
}
TABLES = {
    (90, False): HOPPER,
    (90, True): HOPPER_FP32,
    (80, False): AMPERE,
    (80, True): AMPERE_FP32,
}


def tiles(kernel: str, divergence: str, size: int, dtype: torch.dtype, arch: int) -> Tiles:
    """Tile sizes of a kernel for this divergence, padded head size, dtype and architecture."""
    if INTERPRETED:
        return Tiles(16, 16, 1, 1)
    table = TABLES[arch, dtype == torch.float32]
    by_size = table.get(f"{kernel} {divergence}", table[kernel])
    return next(found for limit, found in by_size.items() if size <= limit)
