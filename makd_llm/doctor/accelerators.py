"""GPUs: which, how much of each is free, what it multiplies, and how they talk to each other."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from makd_llm.cluster.machines import MACHINES
from makd_llm.doctor.finding import Finding
from makd_llm.doctor.machine import GB, multiplied

DRIVER = Path("/proc/driver/nvidia/version")
WITH_BF16 = (8, 0)
"""The first compute capability that multiplies bf16 (Ampere)."""
LEAST_SHARE = 0.4
"""Of the rate that the maker states; square matrices alone reach two thirds of it and more."""
MOSTLY_FREE = 0.9


def count() -> int:
    """GPUs that torch can use."""
    if find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpus() -> Iterator[Finding]:
    """A line for each GPU, and one for all of them together; one line where there is none."""
    number = count()
    if not number:
        if DRIVER.is_file():
            said = "a driver is there, but torch sees no device"
            advice = "`nvidia-smi` says whether it works; CUDA_VISIBLE_DEVICES may hide devices"
        else:
            said, advice = "none", "ranks are CPU processes: small models only"
        yield Finding("GPU", "slow", said, advice, values={"gpus": 0})
        return
    import torch

    for index in range(number):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = (properties.major, properties.minor)
        yield judge_gpu(index, properties.name, capability, free, total)
    rate = multiplied(torch.bfloat16, "cuda", size=8192)
    yield judge_rate(torch.cuda.get_device_name(0), rate)
    yield _together(torch, number)


def judge_gpu(
    index: int, name: str, capability: tuple[int, int], free: float, total: float
) -> Finding:
    """free, total: bytes of its memory."""
    line = f"GPU {index}"
    major, minor = capability
    found = (
        f"{name}, compute capability {major}.{minor}, {free / GB:.0f} of {total / GB:.0f} GB free"
    )
    values: dict[str, float | int | str | list[str]] = {
        "name": name,
        "capability": f"{major}.{minor}",
        "free_bytes": free,
        "total_bytes": total,
    }
    if capability < WITH_BF16:
        advice = "it does not multiply bf16: take bf16 out of the --ds JSON"
        return Finding(line, "slow", found, advice, values=values)
    if free < MOSTLY_FREE * total:
        advice = "another program holds some of it: `nvidia-smi` says which"
        return Finding(line, "check", found, advice, values=values)
    return Finding(line, "ok", found, values=values)


def judge_rate(name: str, rate: float) -> Finding:
    """rate: FLOP/s of bf16 products, against what the maker states, where it is in the table."""
    known = [m for m in MACHINES.values() if m.name.partition("-")[0].upper() in name.upper()]
    found = f"bf16 {rate / 1e12:.0f} TFLOP/s"
    values: dict[str, float | int | str | list[str]] = {"bf16_flops": rate}
    if not known:
        return Finding("GPU products", "ok", found, values=values)
    share = rate / known[0].flops
    found += f", {share:.0%} of what its maker states"
    if share < LEAST_SHARE:
        advice = "`nvidia-smi -q -d PERFORMANCE,CLOCK` says whether heat or power holds it back"
        return Finding("GPU products", "slow", found, advice, values=values)
    return Finding("GPU products", "ok", found, values=values)


def _together(torch: Any, number: int) -> Finding:
    """NCCL, the driver, and whether the GPUs reach each other's memory."""
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    driver = DRIVER.read_text(encoding="utf-8").splitlines()[0] if DRIVER.is_file() else "unknown"
    found = f"NCCL {nccl}; driver: {' '.join(driver.split())[:100]}"
    pairs = [(a, b) for a in range(number) for b in range(number) if a != b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        advice = "messages go through the host's memory: `nvidia-smi topo -m` shows the links"
        found += f"; {len(apart)} of {len(pairs)} pairs do not reach each other"
        return Finding("GPU links", "slow", found, advice)
    return Finding("GPU links", "ok", found)
