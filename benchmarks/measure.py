"""Time, memory and error of a call, beside the machine's own ceilings, as rows of one table.

Every row says where it was measured, and its error against float64; ours is timed only after that
was held against eager's. On a CPU all providers of a case take turns, so that a machine that is now
fast and now slow is so for all of them; on a GPU each is timed by Triton's do_bench.
"""

import argparse
import csv
import functools
import math
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from makd_llm.memory import Peak

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, Any]]
Call = Callable[[], Sequence[Tensor]]


def measured(
    op: str,
    case: str,
    shape: str,
    dtype: torch.dtype,
    mode: str,
    calls: Mapping[str, Call],
    errors: Mapping[str, float],
    inputs: Sequence[Tensor],
    *,
    flops: float,
    traffic: float,
    device: str,
    repeats: int,
) -> Rows:
    """One row for each provider in `calls`, which all read `inputs`; the first is the plain way.

    `flops` are the floating-point operations that the case is worth, the same for every provider.
    `traffic` is the least that must be read and written, in bytes.
    """
    times = milliseconds(calls, device, repeats)
    plain = next(iter(times.values()))
    rows = []
    for name, turns in times.items():
        low, median, high = _quantiles(turns)
        ratio, ratio_low, ratio_high = ratio_to(plain, turns, in_turns=device == "cpu")
        peak, saved = megabytes(calls[name], inputs, device)
        registers, spills = triton_resources(calls[name], device)
        rate = flops / median / 1e9
        row: dict[str, object] = {
            "op": op,
            "case": case,
            "shape": shape,
            "dtype": dtype_name(dtype),
            "mode": mode,
            "provider": name,
            "ms_20": f"{low:.3g}",
            "ms_50": f"{median:.3g}",
            "ms_80": f"{high:.3g}",
            "of_plain": f"{ratio:.3f}",
            "of_plain_low": f"{ratio_low:.3f}",
            "of_plain_high": f"{ratio_high:.3f}",
            "useful_TFLOP/s": f"{rate:.3g}",
            "of_matmul_peak": f"{100 * rate / matmul_peak(device, dtype):.1f}%",
            "GB/s": f"{traffic / median / 1e6:.3g}",
            "peak_MB": "" if peak is None else f"{peak:.1f}",
            "saved_MB": "" if mode == "forward" else f"{saved:.1f}",
            "error_fp64": f"{errors[name]:.1e}",
            "registers": registers,
            "spills": spills,
        }
        rows.append(row | where(device))
        print(_line({key: row[key] for key in PRINTED}), flush=True)
    return rows


# column: its width in what is printed; the table has the others too
PRINTED = {
    "op": 17, "case": 25, "dtype": 8, "mode": 7, "provider": 31, "ms_20": 7, "ms_50": 7, "ms_80": 7,
    "of_plain": 8, "useful_TFLOP/s": 14, "of_matmul_peak": 14, "GB/s": 6, "peak_MB": 7,
    "saved_MB": 8, "error_fp64": 10,
}  # fmt: skip


def print_header() -> None:
    """The names of the columns, once, above the rows that `measured` prints."""
    print(_line({key: key for key in PRINTED}), flush=True)


def _line(values: Mapping[str, object]) -> str:
    return "  ".join(
        f"{value!s:<{PRINTED[key]}}" if key in ("op", "case", "provider") else
        f"{value!s:>{PRINTED[key]}}"
        for key, value in values.items()
    )  # fmt: skip


def write(rows: Sequence[Mapping[str, object]], target: Path) -> None:
    """All rows as CSV."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@functools.cache
def where(device: str) -> dict[str, object]:
    """The machine, the versions and the commit, for every row."""
    commit = "unknown"
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        commit = done.stdout.strip() or commit
    return {
        "device": machine(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version() if device != "cpu" else "",
        "commit": commit,
    }


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def machine(device: str) -> str:
    """The model name of the processor or accelerator, and nothing else about the machine."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


@functools.cache
def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matmul here: the ceiling of everything made of matmuls."""
    return matmul_rate(device, dtype, 10)


def matmul_rate(device: str, dtype: torch.dtype, repeats: int) -> float:
    """The same, measured now."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    turns = milliseconds({"matmul": lambda: [torch.mm(a, b, out=out)]}, device, repeats)
    return 2 * size**3 / statistics.median(turns["matmul"]) / 1e9


@functools.cache
def copy_rate(device: str) -> float:
    """GB/s of a large copy here, bytes read and written: the ceiling of what only moves memory."""
    source = torch.randn(2**24 if device == "cpu" else 2**29, device=device)
    target = torch.empty_like(source)
    turns = milliseconds({"copy": lambda: [target.copy_(source)]}, device, 10)
    return 2 * source.numel() * source.element_size() / statistics.median(turns["copy"]) / 1e6


FEWEST_REPEATS, LONGEST_S, QUICK_S = 3, 40.0, 0.1


def milliseconds(
    calls: Mapping[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, list[float]]:
    """Each call's time in every turn.

    On a CPU the calls take turns, `repeats` times each, in an order that changes from round to
    round; a quick one runs once more before it is timed, so that none has its inputs in the cache
    only because of the one before. Where all are quick they take four times as many turns. Once
    LONGEST_S have gone by, FEWEST_REPEATS are enough.
    """
    if device != "cpu":
        from triton.testing import do_bench

        return {name: do_bench(call, return_mode="all") for name, call in calls.items()}
    spent: dict[str, list[float]] = {name: [_seconds(call)] for name, call in calls.items()}
    order, shuffle = list(calls), random.Random(0).shuffle
    if max(times[0] for times in spent.values()) < QUICK_S:
        repeats *= 4
    began = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= FEWEST_REPEATS and time.perf_counter() - began > LONGEST_S:
            break
        shuffle(order)
        for name in order:
            if spent[name][-1] < QUICK_S:
                calls[name]()
            spent[name].append(_seconds(calls[name]))
    # the first warmed up
    return {name: [1e3 * each for each in times[1:]] for name, times in spent.items()}


def ratio_to(
    plain: Sequence[float], turns: Sequence[float], *, in_turns: bool
) -> tuple[float, float, float]:
    """How many times the plain way's time: the median over turns, and its 95 % interval.

    The two times of a turn were taken within moments of each other, so that a machine that is now
    fast and now slow cancels out. The interval is that of the sign test: the values at n/2 -+ 0.98
    sqrt(n) of the sorted ratios. Without turns, medians are divided and there is none (nan).
    """
    if not in_turns or len(turns) < 6:
        return statistics.median(turns) / statistics.median(plain), float("nan"), float("nan")
    ratios = sorted(a / b for a, b in zip(turns, plain, strict=True))
    half, spread = len(ratios) / 2, 0.98 * len(ratios) ** 0.5
    low = max(0, math.floor(half - spread))
    high = min(len(ratios) - 1, math.ceil(half + spread))
    return statistics.median(ratios), ratios[low], ratios[high]


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return times[0], times[0], times[0]
    low, _, _, high = statistics.quantiles(times, n=5, method="inclusive")
    return low, statistics.median(times), high


def megabytes(
    call: Callable[[], object], inputs: Iterable[Tensor], device: str
) -> tuple[float | None, float]:
    """(memory that `call` needed at once beyond what was held before, None where it is unknown;
    what autograd kept between forward and backward, beside the inputs)"""
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        peak, _ = peaks(call, device)
    return peak, sum(kept.values()) / 2**20


def peaks(call: Callable[[], object], device: str) -> tuple[float | None, float | None]:
    """MB that `call` needed at once: beyond what was held before, and in all. None: unknown."""
    peak = Peak(torch.device(device))
    call()
    most = peak.megabytes()
    return (None if most is None or peak.before is None else most - peak.before), most


def triton_resources(call: Callable[[], object], device: str) -> tuple[int | str, int | str]:
    """(most registers a thread, 32-bit words spilled) of the Triton kernels that `call` launches.

    Empty where there are none. torch.compile launches its kernels by a way of its own, unseen here.
    """
    if device == "cpu":
        return "", ""
    from triton.compiler import CompiledKernel

    launched: dict[int, CompiledKernel] = {}
    original = CompiledKernel.launch_metadata

    def recorded(kernel: CompiledKernel, *arguments: object) -> object:
        launched[id(kernel)] = kernel
        return original(kernel, *arguments)

    CompiledKernel.launch_metadata = recorded
    try:
        call()
    finally:
        CompiledKernel.launch_metadata = original
    if not launched:
        return "", ""
    kernels = launched.values()
    return max(kernel.n_regs for kernel in kernels), sum(kernel.n_spills for kernel in kernels)


def relative_error(found: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Largest error over all tensors, each relative to the largest entry of its truth."""
    errors = [
        (one.double() - other.double()).abs().max() / other.abs().max().clamp_min(1e-30)
        for one, other in zip(found, truth, strict=True)
    ]
    return float(torch.stack(errors).max())  # NaN where one is; Python's max would lose it


def checked(
    op: str,
    calls: Mapping[str, Call],
    truth: Sequence[Tensor],
    plain: str,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Each provider's error; ours is held against that of `plain`.

    A rival that fails is named and left out; where ours fails, everything stops.
    """
    errors = {}
    for name, call in calls.items():
        try:
            errors[name] = relative_error(call(), truth)
        except RuntimeError as failure:  # out of memory is one, too
            if name == plain or name.startswith("ours"):
                raise
            say(f"{op}: {name} fails here and is left out: {str(failure).splitlines()[0]}")
    for name, error in errors.items():
        if name.startswith("ours"):
            check(op, name, error, errors[plain], dtype)
    return errors


def check(op: str, provider: str, error: float, eager: float, dtype: torch.dtype) -> None:
    """No number without a right result: ours may err 1.3 times as much as eager, plus four eps."""
    if not error <= 1.3 * eager + 4 * torch.finfo(dtype).eps:
        raise SystemExit(f"{op}, {provider}: error {error:.2e}, eager's {eager:.2e}; nothing timed")


def modes(dtype: torch.dtype, device: str) -> tuple[str, ...]:
    """What is measured: forward alone, and with the backward; in fp32 on a CPU only the latter."""
    return ("full",) if device == "cpu" and dtype == torch.float32 else ("forward", "full")


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def command(
    doc: str | None, op: str, run: Callable[[str, int], Iterator[Rows]], *, repeats: int
) -> None:
    """What `python benchmarks/<op>.py` does: measure one operation and write its table."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", type=Path, help="a .csv; benchmarks/results/OP_DEVICE.csv if none")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    print_header()
    target = arguments.out or RESULTS / f"{op}_{arguments.device}.csv"
    collect([], run(arguments.device, arguments.repeats), target)
    say(f"written {target}")


def collect(rows: Rows, cases: Iterable[Rows], target: Path) -> None:
    """Add each case's rows, and write all: what is measured stays, whatever comes after."""
    for found in cases:
        rows += found
        write(rows, target)


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)
