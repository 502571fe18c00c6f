"""A process's memory: its peak over a stretch of work, and what was freed given back.

On a GPU what torch's allocator held, on Linux without one the resident memory of the process (its
weights, and also its code and every library's buffers); elsewhere the peak is not known.
"""

import ctypes
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def return_freed_memory() -> None:
    """Let the operating system have what was freed. glibc keeps buffers below 32 MB for later, and
    between gathered weights of many sizes that grew to two thirds of a shard. No-op elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Peak:
    """The most memory held at once since this was made, in MB (2^20 bytes). One at a time."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.before = self._begin()
        """What was held already; None where that is not known."""

    def megabytes(self) -> float | None:
        """None where it is not known."""
        if self._cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 2**20
        return None if self.before is None else _resident("VmHWM")

    def _begin(self) -> float | None:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / 2**20
        if not _STATUS.exists() or not _RESET.exists():
            return None
        return_freed_memory()  # or what was freed before hides what is taken now
        try:
            _RESET.write_text("5", encoding="ascii")
        except OSError:  # a container may forbid it; the peak since the process began is another
            return None
        return _resident("VmRSS")


def _resident(key: str) -> float:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10
