"""Cores and what they multiply, threads against them, memory and disks."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from makd_llm.doctor.finding import Finding

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")

BF16_FLAGS = ("amx_bf16", "avx512_bf16")
SHOWN_FLAGS = (*BF16_FLAGS, "amx_tile", "avx512f", "avx2")
GB = 1e9
LEAST_MEMORY = 6 * GB
"""The demo's two ranks hold about 5 GB between them."""
LEAST_DISK = 5 * GB
"""The demo's run folder and cache take 4 GB."""
LEAST_SHM = 1 * GB
ELSEWHERE = "set MAKD_CACHE to a folder that you can write to"
PER_THREAD = 0.02e12
"""FLOP/s in fp32 that a core of the last ten years reaches when it is left alone."""


def counted(number: int, what: str) -> str:
    """`1 core`, `2 cores`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def cores() -> int:
    """Those that this process may use: its affinity, and a container's quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def instructions(gpus: int, cpuinfo: Path = CPUINFO) -> Iterator[Finding]:
    """What the CPU can multiply bf16 with."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        yield Finding("CPU", "check", f"{cpuinfo} cannot be read", "Linux is what is tested")
        return
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in reversed(lines))
    }
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    shown = [flag for flag in SHOWN_FLAGS if flag in flags]
    with_bf16 = " ".join(shown) or "no vector instructions that are of use"
    found = f"{fields.get('model name', 'unknown')}, {counted(cores(), 'core')}; {with_bf16}"
    if gpus or flags & set(BF16_FLAGS):
        yield Finding("CPU", "ok", found, values={"cores": cores(), "flags": shown})
    else:
        advice = "no instructions for bf16: where ranks are CPUs, --ds ds_configs/zero1_fp32.json"
        yield Finding("CPU", "slow", found, advice, values={"cores": cores(), "flags": shown})


def load(averages: tuple[float, float, float] | None = None) -> Finding:
    """Whether other programs want the same cores."""
    now = (averages or os.getloadavg())[0]
    found = f"{now:.1f} programs at work in the last minute, {counted(cores(), 'core')}"
    if now > 1.5 * cores():
        advice = "wait for them, or end them; rates and times below are too low"
        return Finding("load", "slow", found, advice, values={"load": now})
    return Finding("load", "ok", found, values={"load": now})


def rates(gpus: int) -> Iterator[Finding]:
    """Matrix products of the CPU in bf16 and fp32, with as many threads as a rank would have."""
    if find_spec("torch") is None:
        return
    import torch

    threads = torch.get_num_threads()
    measured = {name: multiplied(getattr(torch, name), "cpu") for name in ("bfloat16", "float32")}
    yield judge_rates(measured["bfloat16"], measured["float32"], threads, gpus)


def multiplied(dtype: object, device: str, size: int = 1024, seconds: float = 1.0) -> float:
    """The best FLOP/s of products of two (size, size) matrices within about so many seconds."""
    import torch

    assert isinstance(dtype, torch.dtype)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = left @ right
    best, ends = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ends or best == float("inf"):
        began = time.perf_counter()
        torch.mm(left, right, out=product)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def judge_rates(bf16: float, fp32: float, threads: int, gpus: int = 0) -> Finding:
    """bf16, fp32: FLOP/s with so many threads."""
    found = (
        f"bf16 {bf16 / 1e12:.3f}, fp32 {fp32 / 1e12:.3f} TFLOP/s with {counted(threads, 'thread')}"
    )
    values: dict[str, float | int | str | list[str]] = {
        "bf16_flops": bf16,
        "fp32_flops": fp32,
        "threads": threads,
    }
    if fp32 < PER_THREAD * threads:
        advice = "a core left alone does more: look for other programs, or fewer threads a rank"
        return Finding("CPU products", "slow", found, advice, values=values)
    if not gpus and bf16 < fp32:
        advice = "bf16 is slower than fp32 here: --ds ds_configs/zero1_fp32.json if memory allows"
        return Finding("CPU products", "slow", found, advice, values=values)
    return Finding("CPU products", "ok", found, values=values)


def threads(ranks: int, gpus: int, of_a_rank: int | None = None) -> Finding:
    """Threads of all ranks against the cores. of_a_rank: None: what torch would take here."""
    if of_a_rank is None:
        if find_spec("torch") is None:
            return Finding("threads", "check", "not known without torch", "install torch first")
        import torch

        of_a_rank = torch.get_num_threads()
    given = os.environ.get("OMP_NUM_THREADS")
    found = (
        f"{counted(ranks, 'rank')} of {counted(of_a_rank, 'thread')} on {counted(cores(), 'core')} "
        f"(OMP_NUM_THREADS {given or 'not set'})"
    )
    values: dict[str, float | int | str | list[str]] = {
        "ranks": ranks,
        "threads_of_a_rank": of_a_rank,
        "cores": cores(),
    }
    # Ranks whose work is on a GPU leave their threads idle most of the time.
    if not gpus and ranks * of_a_rank > cores():
        fewer = f"take fewer ranks: --num_accelerators {cores()}"
        fair = f"export OMP_NUM_THREADS={cores() // ranks}"
        advice = f"{fewer if ranks > cores() else fair}; threads wait for each other"
        return Finding("threads", "slow", found, advice, values=values)
    return Finding("threads", "ok", found, values=values)


def memory(available: float | None = None, total: float | None = None) -> Finding:
    """Free memory of the machine, or of the container. available, total: in bytes; None: look."""
    if available is None or total is None:
        available, total = _memory()
    found = f"{available / GB:.1f} of {total / GB:.1f} GB are free"
    values: dict[str, float | int | str | list[str]] = {
        "available_bytes": available,
        "total_bytes": total,
    }
    if available < LEAST_MEMORY:
        advice = "the demo takes about 5 GB; `makd plan` says what other runs take"
        return Finding("memory", "check", found, advice, values=values)
    return Finding("memory", "ok", found, values=values)


def _memory() -> tuple[float, float]:
    """Bytes that are free and in all, of the machine or of the container if that has less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = {
        key: int(rest.split()[0]) * 1024 for key, _, rest in (s.partition(":") for s in lines)
    }
    available, total = fields["MemAvailable"], fields["MemTotal"]
    try:
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available, total
    return min(available, limit - used), min(total, limit)


def disks(runs: Path) -> Iterator[Finding]:
    """Free space where runs are written, and where fetched files are kept."""
    from makd_llm.data.builtin import cache_dir
    from makd_llm.files import nearest

    for name, folder, advice in (
        ("disk of runs", runs, "name a folder that you can write to"),
        ("disk of the cache", cache_dir(), ELSEWHERE),
    ):
        if refusal := refused(folder):
            yield Finding(name, "missing", f"{folder}: {refusal}", advice)
        else:
            yield judge_disk(name, folder, shutil.disk_usage(nearest(folder)).free)


def refused(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which need not exist yet; None: it can be."""
    from makd_llm.files import nearest

    there = nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return f"{there}: {error.strerror}" if there != folder.absolute() else error.strerror


def judge_disk(name: str, folder: Path, free: float) -> Finding:
    """free: bytes."""
    found = f"{free / GB:.0f} GB free for {folder}"
    if free < LEAST_DISK:
        advice = "the demo takes 4 GB, most of it checkpoints; make room, or name another folder"
        return Finding(name, "check", found, advice, values={"free_bytes": free})
    return Finding(name, "ok", found, values={"free_bytes": free})


def shared_memory(gpus: int, size: float | None = None) -> Finding:
    """/dev/shm, through which NCCL's ranks of one machine talk. size: in bytes; None: look."""
    if size is None:
        if not SHM.is_dir():
            advice = "mount a tmpfs there" if gpus > 1 else ""
            return Finding("/dev/shm", "missing" if gpus > 1 else "ok", "not there", advice)
        size = shutil.disk_usage(SHM).total
    found = f"{size / GB:.1f} GB"
    if gpus > 1 and size < LEAST_SHM:
        advice = "NCCL wants more for its ranks: start the container with --shm-size=1g or more"
        return Finding("/dev/shm", "check", found, advice, values={"bytes": size})
    return Finding("/dev/shm", "ok", found, values={"bytes": size})
