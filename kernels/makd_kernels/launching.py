"""What all launches of Triton kernels share: tiles, padding, small index tensors on the device."""

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Triton reads it when a kernel is defined
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tiles(NamedTuple):
    """Rows and columns of a tile, warps of a program, stages of the software pipeline."""

    m: int
    n: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """As the keywords of a launch."""
        return {
            "TILE_M": self.m,
            "TILE_N": self.n,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@functools.cache
def architecture(device: torch.device) -> int:
    """Whose tiles to take on this device: 90 for Hopper and the large Blackwells, 80 elsewhere.

    The small Blackwells (sm_120) have no more shared memory than sm_86.
    """
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return 80
    return 90 if torch.cuda.get_device_capability(device)[0] in (9, 10) else 80


def where_it_is(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU; inside this `with` that is the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def padded_size(size: int) -> int:
    """The power of two, at least 16, that holds `size`: what the matrix units multiply."""
    return max(16, 1 << (size - 1).bit_length())


@functools.lru_cache(maxsize=256)
def device_ints(values: tuple[int, ...], device: torch.device) -> Tensor:
    """`values` as int32 on `device`; kept, because the copy waits for the host."""
    return torch.tensor(values, dtype=torch.int32, device=device)
