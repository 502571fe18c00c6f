"""Compile every configuration of the Triton kernels without a GPU, and show what became of it.

    python benchmarks/compiled.py                    # for sm_90 and sm_80, against the budget
    python benchmarks/compiled.py --arch 80
    python benchmarks/compiled.py --update           # record what is seen as the new budget

One row per kernel, divergence, head size (or rank) and dtype: registers a thread, bytes spilled to
local memory, shared memory, and the matrix instructions found in the machine code. It fails (exit
code 1) where something spills, where shared memory exceeds the device's, where registers exceed the
recorded budget, and on sm_90 where a half precision kernel lacks Hopper's own matrix instruction.
Registers depend on the compiler, so the budget holds for the Triton that it was recorded with.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

from makd_kernels.launching import Tiles

BUDGET = Path(__file__).parent / "results" / "registers.json"
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}  # sm_86 and sm_89 take sm_80's tiles
DIVISIBLE = [["tt.divisibility", 16]]  # what the JIT finds in pointers, strides and most sizes
COUNTS = ("heads", "key_heads", "pairs")  # but not in these
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


class Case(NamedTuple):
    """One compilation: the kernel, what it is specialised for, and its tiles."""

    kernel: str
    variant: str
    size: int
    dtype: str
    masked: bool = False

    @property
    def name(self) -> str:
        """As it stands in the table and in the recorded budget."""
        size = f" {self.size}" if self.size else ""
        mask = " padded" if self.masked else ""
        return f"{self.kernel} {self.variant}{size} {self.dtype}{mask}"


class Compiled(NamedTuple):
    """What the assembler and the disassembler say of one case."""

    case: str
    tiles: str
    registers: int
    spilled: int
    shared: int
    hgmma: int
    hmma: int


class Build(NamedTuple):
    """A kernel with everything that its compilation needs."""

    function: Any
    constants: dict[str, Any]
    kinds: dict[str, str]  # Triton's types, by the arguments' names
    tiles: Tiles


SIZES = (64, 128, 256)  # head sizes, and ranks
VARIANTS = {
    "kl": ("kl",),
    "values": ("forward_kl", "reverse_kl", "jsd", "probability_mse", "logit_mse"),
    "dq": ("forward_kl", "reverse_kl", "jsd", "probability_mse", "logit_mse"),
    "dq values": ("forward_kl",),
    "dk": ("forward_kl", "reverse_kl", "jsd", "probability_mse", "logit_mse"),
    "chain": ("forward", "biased", "backward"),
}
LOSSES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")


def cases() -> Iterator[Case]:
    """Every tile choice that a call can meet; both dtypes, with and without a padding mask."""
    for kernel, names in VARIANTS.items():
        for size, name, dtype in itertools.product(SIZES, names, DTYPES):
            yield Case(kernel, name, size, dtype)
            if dtype == "bfloat16" and kernel != "chain":
                yield Case(kernel, name, size, dtype, masked=True)
    for name, dtype in itertools.product(("forward", "backward"), DTYPES):
        yield Case("swiglu", name, 0, dtype)
    for name, dtype in itertools.product(LOSSES, DTYPES):
        yield Case("rows", name, 0, dtype)


def compile_case(case: Case, arch: int, tiles: Tiles | None = None) -> Compiled:
    """Compile one case for sm_`arch` and read the machine code; `tiles` in place of the table's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    builders = {"rows": _rows, "chain": _chain, "swiglu": _swiglu}
    build = builders.get(case.kernel, _attention)(case, arch, tiles)
    signature, attributes = {}, {}
    for index, name in enumerate(build.function.arg_names):
        kind = "constexpr" if name in build.constants else build.kinds.get(name, "i32")
        signature[name] = kind
        if kind.startswith("*") or (kind == "i32" and name not in COUNTS):
            attributes[(index,)] = DIVISIBLE
    source = ASTSource(build.function, signature, build.constants, attributes)
    target = GPUTarget("cuda", arch, 32)
    options = {
        "num_warps": build.tiles.warps,
        "num_stages": build.tiles.stages,
        "enable_fp_fusion": True,
    }
    built = triton.compile(source, target=target, options=options)
    registers, spilled = _resources(built.asm["cubin"])
    code = _disassembled(built.asm["cubin"])
    m, n, warps, stages = build.tiles
    return Compiled(
        case.name, f"{m}x{n}, {warps} warps, {stages} stages", registers, spilled,
        built.metadata.shared,
        len(re.findall(r"\bHGMMA", code)), len(re.findall(r"\bHMMA", code)),
    )  # fmt: skip


def _attention(case: Case, arch: int, tiles: Tiles | None) -> Build:
    import torch

    from makd_kernels.attention_kl import kernel, launch
    from makd_kernels.attention_kl.tiles import tiles as tiles_of

    function = getattr(kernel, f"_{case.kernel.split()[0]}_kernel")
    dtype = getattr(torch, case.dtype)
    tile = tiles or tiles_of(case.kernel, case.variant, case.size, dtype, arch)
    constants = {
        "DIVERGENCE": launch.CODES.get(case.variant, 0),
        "VALUES": case.kernel == "dq values",
        "TEACHER_FIRST": True,
        "CAUSAL": True,
        "WINDOW": 0,
        "MASKED": case.masked,
        "TILE_M": tile.m,
        "TILE_N": tile.n,
    }
    kinds = {"real_keys": "*i1"}
    for name in function.arg_names:
        if name.startswith(("SIZE", "PADDED")):
            constants[name] = case.size
        elif name.startswith("GROUP"):
            constants[name] = 4
        elif name.startswith("stride") and name.endswith("d"):
            constants[name] = 1
        elif name.startswith(("q_", "k_")) or name in ("dq", "dk"):
            kinds[name] = "*" + DTYPES[case.dtype]
        elif name.startswith(("head_", "first_pair")):
            kinds[name] = "*i32"
        elif name.startswith("scale_") or name == "beta":
            kinds[name] = "fp32"
        elif name in ("values", "statistics", "gradient"):
            kinds[name] = "*fp32"
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    return Build(function, constants, kinds, tile)


def _rows(case: Case, arch: int, tiles: Tiles | None) -> Build:
    import torch

    from makd_kernels.linear_divergence import kernel, launch

    tile = Tiles(1, launch.tile_size(getattr(torch, case.dtype)), launch.WARPS, 3)
    constants = {
        "DIVERGENCE": launch.CODES[case.variant],
        "LABELS": True,
        "HEATED": True,
        "GRADIENT": True,
        "TILE_V": tile.n,
    }
    function = kernel._rows_kernel
    data = "*" + DTYPES[case.dtype]
    kinds = {"student": data, "teacher": data, "labels": "*i64"}
    kinds |= dict.fromkeys(("temperature", "beta", "alpha"), "fp32")
    others = set(function.arg_names) - {*constants, *kinds, "vocab"}
    kinds |= {name: "*fp32" for name in others if not name.startswith("stride")}
    return Build(function, constants, kinds, tile)


def _chain(case: Case, arch: int, tiles: Tiles | None) -> Build:
    import torch

    from makd_kernels.lowrank_linear import kernel, launch

    backward = case.variant == "backward"
    tile = tiles or launch.tiles(case.size, getattr(torch, case.dtype), arch)
    constants = {
        "stride_xk": 1,
        # the factors as linear layers keep them: transposed in the forward
        **({"stride_fr": 1, "stride_sm": 1} if backward else {"stride_fk": 1, "stride_sr": 1}),
        "BIAS": case.variant == "biased",
        "RANK": case.size,
        "PADDED_R": case.size,
        "TILE_N": tile.m,
        "TILE_K": tile.n,
        "TILE_M": tile.n,
    }
    tensors = ("x", "first", "second", "bias", "narrow", "out")
    kinds = dict.fromkeys(tensors, "*" + DTYPES[case.dtype])
    return Build(kernel._chain_kernel, constants, kinds, tile)


def _swiglu(case: Case, arch: int, tiles: Tiles | None) -> Build:
    import torch

    from makd_kernels.lowrank_swiglu import kernel, launch

    tile = tiles or launch.tiles(getattr(torch, case.dtype), backward=case.variant == "backward")
    constants = {
        "BACKWARD": case.variant == "backward",
        "TILE_N": tile.m,
        "TILE_M": tile.n,
        "TILE_R": launch.RANK_TILE,
    }
    tensors = ("gate", "gate_factor", "up", "up_factor", "grad", "out", "grad_up")
    kinds = dict.fromkeys(tensors, "*" + DTYPES[case.dtype])
    return Build(kernel._swiglu_kernel, constants, kinds, tile)


def _tool(name: str, *arguments: str) -> str:
    """Run one of the programs that Triton brings along."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread)"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _tool("cuobjdump", "--dump-resource-usage", file.name)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("nvdisasm", file.name)


def faults(found: Compiled, arch: int, budget: dict[str, int]) -> list[str]:
    """What is wrong with one compiled case, a line each."""
    wrong = []
    if found.spilled:
        wrong.append(f"{found.spilled} bytes a thread spilled")
    if found.shared > SHARED_LIMIT[arch]:
        wrong.append(f"{found.shared} bytes of shared memory, limit {SHARED_LIMIT[arch]}")
    multiplies = not found.case.startswith("rows")
    if arch == 90 and multiplies and "bfloat16" in found.case and (not found.hgmma or found.hmma):
        wrong.append(f"HGMMA {found.hgmma}, HMMA {found.hmma}: not Hopper's own multiplication")
    allowed = budget.get(found.case)
    if allowed is None:
        wrong.append("no recorded budget; run with --update")
    elif found.registers > allowed:
        wrong.append(f"{found.registers} registers, recorded {allowed}")
    return wrong


def main() -> None:
    """Compile, print, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT), help="one; all if absent")
    parser.add_argument("--update", action="store_true", help="record the registers as the budget")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    version = importlib.metadata.version("triton")
    recorded = json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.exists() else {}
    if not arguments.update and recorded.get("triton") != version:
        raise SystemExit(
            f"the budget in {BUDGET.name} is of triton {recorded.get('triton')}, and this is "
            f"{version}: install that one, or record a budget with --update"
        )
    if arguments.update and (arguments.only or arguments.arch) and recorded["triton"] != version:
        raise SystemExit("a budget of another triton is recorded whole: no --only, no --arch")
    chosen = [case for case in cases() if arguments.only in case.name]
    wrong = 0
    for arch in [arguments.arch] if arguments.arch else sorted(SHARED_LIMIT, reverse=True):
        budget = recorded.get(f"sm_{arch}", {})
        found = compiled(chosen, arch, None if arguments.update else budget)
        recorded[f"sm_{arch}"] = (budget if arguments.only else {}) | found.registers
        wrong += found.faults
        print(f"{len(chosen)} configurations for sm_{arch}, {found.faults} faults")
    if arguments.update:
        text = json.dumps(recorded | {"triton": version}, indent=1, sort_keys=True)
        BUDGET.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(1 if wrong else 0)


class Found(NamedTuple):
    """What became of all cases on one architecture."""

    registers: dict[str, int]
    faults: int


def compiled(chosen: list[Case], arch: int, budget: dict[str, int] | None) -> Found:
    """Compile all, a line each; without a budget every number of registers is right."""
    print(f"{f'sm_{arch}':44} {'tiles':26} regs spill shared HGMMA HMMA")
    registers, count = {}, 0
    with ProcessPoolExecutor() as pool:
        for one in pool.map(compile_case, chosen, [arch] * len(chosen)):
            print(f"{one.case:44} {one.tiles:26} {one.registers:4} {one.spilled:5} "
                  f"{one.shared:6} {one.hgmma:5} {one.hmma:4}", flush=True)  # fmt: skip
            registers[one.case] = one.registers
            for fault in faults(one, arch, registers if budget is None else budget):
                count += 1
                print(f"  WRONG: {fault}", flush=True)
    return Found(registers, count)


if __name__ == "__main__":
    main()
