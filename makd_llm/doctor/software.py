"""Python, packages against what was tested, compilers, and what DeepSpeed and Triton compile."""

import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from makd_llm.doctor.finding import Finding

OLDEST = (3, 11)
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
"""In a checkout; a wheel has none."""

INSTALL = "pip install -c constraints.txt -e . (or `make setup`)"

Installed = Callable[[str], str]
"""Name of a package -> its version. Raises PackageNotFoundError."""


def python() -> Finding:
    """The interpreter, and the headers that extensions are compiled with."""
    found = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info < OLDEST:
        advice = "install Python 3.11 or later, and name it: make PYTHON=/path/to/python"
        return Finding("Python", "missing", found, advice, needed=True)
    return Finding("Python", "ok", found)


def packages(installed: Installed = metadata.version) -> Iterator[Finding]:
    """Those that makd-llm requires, one line for all of them; those that are not there or too old,
    one line each.
    """
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in metadata.requires("makd-llm") or []]
    except metadata.PackageNotFoundError:
        advice = f"{INSTALL}; what it requires is not known otherwise"
        yield Finding("packages", "check", "makd-llm runs without being installed", advice)
        return
    asked = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    fine = 0
    for requirement in asked:
        try:
            version = installed(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "missing", "not installed", INSTALL, needed=True)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fine += 1
        else:
            found = f"{version}, but {requirement.specifier} is required"
            yield Finding(requirement.name, "missing", found, INSTALL, needed=True)
    yield Finding("packages", "ok", f"{fine} of the {len(asked)} required are there")


def against_constraints(
    constraints: Path = CONSTRAINTS, installed: Installed = metadata.version
) -> Finding:
    """What is installed against constraints.txt, where there is one."""
    if not constraints.is_file():
        return Finding("tested versions", "ok", "no constraints.txt beside an installed wheel")
    pinned = _pinned(constraints.read_text(encoding="utf-8"))
    others, same = [], 0
    for name, version in pinned.items():
        try:
            here = installed(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra, or another platform's
        # A build of torch for one kind of device says so after a plus sign.
        if here.partition("+")[0] == version:
            same += 1
        else:
            others.append(f"{name} {here} (tested: {version})")
    found = f"{same} packages as in constraints.txt"
    values: dict[str, float | int | str | list[str]] = {"same": same, "others": others}
    if not others:
        return Finding("tested versions", "ok", found, values=values)
    named = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
    advice = "pip install -c constraints.txt -e . brings the tested ones"
    return Finding("tested versions", "check", f"{found}; others: {named}", advice, values=values)


def _pinned(text: str) -> Mapping[str, str]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def compilers(which: Callable[[str], str | None] = shutil.which) -> Iterator[Finding]:
    """gcc, g++, ninja and Python's headers: operators of DeepSpeed are compiled at first use."""
    from_distribution = "install it (Debian, Ubuntu: build-essential)"
    for name in ("gcc", "g++"):
        path = which(name)
        if path:
            yield Finding(name, "ok", path)
        else:
            yield Finding(name, "missing", "not found", from_distribution, needed=True)
    beside = shutil.which("ninja", path=sysconfig.get_path("scripts"))
    ninja = beside or which("ninja")
    if ninja:
        yield Finding("ninja", "ok", ninja)
    else:
        yield Finding("ninja", "missing", "not found", "pip install ninja", needed=True)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.is_file():
        yield Finding("Python headers", "ok", str(header.parent))
    else:
        advice = "install them (Debian, Ubuntu: python3-dev)"
        yield Finding("Python headers", "missing", f"no {header}", advice, needed=True)


def torch_build(which: Callable[[str], str | None] = shutil.which) -> Iterator[Finding]:
    """torch, and whether it is the build that this machine's devices need."""
    torch, problem = _imported("torch")
    if torch is None:
        yield Finding("torch", "missing", problem, INSTALL, needed=True)
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    found = f"{torch.__version__}, built {built}"
    if torch.version.cuda is None and which("nvidia-smi"):
        advice = "install torch's build for CUDA: there is a driver here, which this one cannot use"
        yield Finding("torch", "slow", found, advice)
    else:
        yield Finding("torch", "ok", found)


OPERATORS = {
    "cpu": {
        "ShareMemCommBuilder": "messages between the CPU ranks of a machine",
        "CPUAdamBuilder": 'DeepSpeed\'s own Adam (without "torch_adam")',
        "AsyncIOBuilder": "ds_configs/zero3_nvme.json",
    },
    "cuda": {
        "FusedAdamBuilder": 'DeepSpeed\'s own Adam (without "torch_adam")',
        "CPUAdamBuilder": "an optimizer in host memory",
        "AsyncIOBuilder": "ds_configs/zero3_nvme.json",
    },
}
"""DeepSpeed's operators that runs may use, by accelerator, and what for."""

NEEDS = {
    "AsyncIOBuilder": "install libaio's headers (Debian, Ubuntu: libaio-dev)",
    "FusedAdamBuilder": "install the CUDA toolkit (nvcc) of torch's version, and set CUDA_HOME",
}


def operators() -> Iterator[Finding]:
    """DeepSpeed, and which of its operators are compiled, would compile, or would not."""
    deepspeed, problem = _imported("deepspeed.accelerator")
    if deepspeed is None:
        yield Finding("DeepSpeed", "missing", problem, INSTALL, needed=True)
        return
    accelerator = deepspeed.get_accelerator()
    kind = accelerator.device_name()
    yield Finding("DeepSpeed", "ok", f"{metadata.version('deepspeed')}, accelerator {kind}")
    folder = _extensions()
    for builder_name, use in OPERATORS.get(kind, {}).items():
        builder = accelerator.create_op_builder(builder_name)
        if builder is None:
            continue
        name = f"operator {builder.name}"
        compiled = folder is not None and any(folder.glob(f"**/{builder.name}/*.so"))
        if compiled:
            yield Finding(name, "ok", f"compiled, for {use}")
        elif _compatible(builder):
            yield Finding(name, "ok", f"will be compiled when it is first asked for: {use}")
        else:
            advice = NEEDS.get(builder_name, "`ds_report` says more")
            yield Finding(name, "missing", f"would not compile; only for {use}", advice)


def _compatible(builder: Any) -> bool:
    """Whether an operator would compile. Where a toolkit is missing some builders raise."""
    try:
        return bool(builder.is_compatible(verbose=False))
    except Exception:  # noqa: BLE001 - each builder has its own exceptions for "no"
        return False


def _extensions() -> Path | None:
    """Where compiled operators are kept, if any are."""
    from makd_llm.operators import compiler_environment  # torch, which may be missing

    surroundings = {**os.environ, **compiler_environment()}
    named = surroundings.get("TORCH_EXTENSIONS_DIR")
    folder = Path(named) if named else Path.home() / ".cache" / "torch_extensions"
    return folder if folder.is_dir() else None


def triton() -> Finding:
    """The kernels' compiler; without it, and without a GPU, they run as plain torch."""
    if find_spec("triton") is None:
        return Finding("Triton", "missing", "not installed; only for kernels on a GPU", INSTALL)
    return Finding("Triton", "ok", metadata.version("triton"))


def _imported(name: str) -> tuple[Any, str]:
    """A module and nothing, or None and why it cannot be imported, in one line."""
    try:
        return import_module(name), ""
    except Exception as error:  # noqa: BLE001 - whatever a broken install raises is what is found
        said = re.sub(r"\s+", " ", str(error))[:120]
        return None, f"cannot be imported: {said or type(error).__name__}"
