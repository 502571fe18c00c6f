"""Time, peak memory and error of a call, and a CSV whose every row says where it was measured."""

import csv
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


def machine(device: str) -> str:
    """The model name of the processor or accelerator, and nothing else about the machine."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


def milliseconds(
    calls: Mapping[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """(20 %, median, 80 %) for each call; the calls take turns, so that they share the noise."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if repeat > 0:  # the first turn warms up
                spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: _quantiles(times) for name, times in spent.items()}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return times[0], times[0], times[0]
    low, _, _, high = statistics.quantiles(times, n=5, method="inclusive")
    return low, statistics.median(times), high


def peak_megabytes(call: Callable[[], object], device: str) -> float | None:
    """Memory that `call` needed at once beyond what was held before; None where it is unknown."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists() or not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier calls freed, or it hides this one's
    reset.write_text("5", encoding="ascii")
    held = _status_kilobytes(status, "VmRSS")
    call()
    return (_status_kilobytes(status, "VmHWM") - held) / 2**10


def _status_kilobytes(status: Path, key: str) -> int:
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def relative_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest error over all tensors, each relative to the largest entry of its truth."""
    return max(
        float((one.double() - other.double()).abs().max() / other.abs().max().clamp_min(1e-30))
        for one, other in zip(found, truth, strict=True)
    )


def check(op: str, error: float, allowed: float, dtype: torch.dtype) -> None:
    """No number without a right result: ours may err 1.3 times as much as eager, plus rounding."""
    if not error <= 1.3 * allowed + 4 * torch.finfo(dtype).eps:
        raise SystemExit(f"{op}: error {error:.2e} against eager's {allowed:.2e}; nothing is timed")


def publish(op: str, device: str, rows: Sequence[dict[str, object]]) -> None:
    """Print the last row, and write all rows to results/<op>_<device>.csv.

    Called after every row: the large cases take long, and what is measured stays.
    """
    where: dict[str, object] = {
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for cells in (list(rows[-1]), list(rows[-1].values()))[1 if len(rows) > 1 else 0 :]:
        print("  ".join(f"{cell!s:17}" for cell in cells), flush=True)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{op}_{device}.csv"
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
