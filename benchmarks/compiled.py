"""Compile every configuration of the Triton kernels without a GPU, and show what became of it.

    python -m benchmarks.compiled                    # for sm_90, compared with the recorded budget
    python -m benchmarks.compiled --arch 80
    python -m benchmarks.compiled --update           # record what is seen as the new budget

One row per kernel, divergence, head size and dtype: registers a thread, bytes spilled to local
memory, shared memory, and the matrix instructions found in the machine code. It fails (exit code 1)
where something spills, where shared memory exceeds the device's, where registers exceed the
recorded budget, and on sm_90 where a half precision kernel lacks Hopper's own matrix instruction.
"""

import argparse
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

BUDGET = Path(__file__).parent / "results" / "registers.json"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
DIVISIBLE = [["tt.divisibility", 16]]
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


class Case(NamedTuple):
    """One compilation: the kernel, what it is specialised for, and its tiles."""

    kernel: str
    divergence: str
    size: int
    dtype: str
    masked: bool

    @property
    def name(self) -> str:
        """As it stands in the table and in the recorded budget."""
        mask = " padded" if self.masked else ""
        return f"{self.kernel} {self.divergence} {self.size} {self.dtype}{mask}"


class Compiled(NamedTuple):
    """What the assembler and the disassembler say of one case."""

    case: str
    tiles: str
    registers: int
    spilled: int
    shared: int
    hgmma: int
    hmma: int


def cases() -> Iterator[Case]:
    """Every tile choice that a call can meet; both dtypes, with and without a padding mask."""
    divergences = {
        "kl": ("kl",),
        "values": ("jsd", "probability_mse", "logit_mse"),
        "dq": ("forward_kl", "reverse_kl", "jsd", "probability_mse", "logit_mse"),
        "dk": ("forward_kl", "reverse_kl", "jsd", "probability_mse", "logit_mse"),
    }
    for kernel, names in divergences.items():
        for size in (64, 128, 256):
            for name in names:
                for dtype in DTYPES:
                    main = name in ("kl", "forward_kl") and dtype == "bfloat16"
                    yield Case(kernel, name, size, dtype, False)
                    if main:
                        yield Case(kernel, name, size, dtype, True)
    for name in ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        yield Case("rows", name, 0, "bfloat16", False)


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile one case for sm_`arch` and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, arguments, options, tiles = _rows(case) if case.kernel == "rows" else _attention(case)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        kind, value = arguments[name]
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif (
            kind.startswith("*") or name.startswith("stride") or name in ("tokens", "vocab", "size")
        ):
            attributes[(index,)] = DIVISIBLE
    source = ASTSource(function, signature, constants, attributes)
    target = GPUTarget("cuda", arch, 32)
    built = triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})
    registers, spilled = _resources(built.asm["cubin"])
    code = _disassembled(built.asm["cubin"])
    return Compiled(
        case.name, tiles, registers, spilled, built.metadata.shared,
        len(re.findall(r"\bHGMMA", code)), len(re.findall(r"\bHMMA", code)),
    )  # fmt: skip


def _attention(case: Case) -> tuple[Any, dict[str, tuple[str, Any]], dict[str, int], str]:
    import torch

    from makd_kernels.attention_kl import kernel, launch

    function = getattr(kernel, f"_{case.kernel}_kernel")
    dtype = getattr(torch, case.dtype)
    tile = launch.tiles(case.kernel, case.divergence, case.size, dtype)
    constants = {
        "DIVERGENCE": launch.CODES.get(case.divergence, 0),
        "CAUSAL": True,
        "WINDOW": 0,
        "MASKED": case.masked,
        "TILE_M": tile.m,
        "TILE_N": tile.n,
    }
    data = "*" + DTYPES[case.dtype]

    def argument(name: str) -> tuple[str, Any]:
        if name in constants:
            return "constexpr", constants[name]
        if name == "TEACHER_FIRST":
            return "constexpr", True
        if name.startswith(("SIZE", "PADDED")):
            return "constexpr", case.size
        if name.startswith("GROUP"):
            return "constexpr", 4
        if name.startswith("stride"):
            return ("constexpr", 1) if name.endswith("d") else ("i32", None)
        if name.startswith(("q_", "k_")) or name in ("dq", "dk"):
            return data, None
        if name.startswith(("head_", "first_pair")):
            return "*i32", None
        if name == "real_keys":
            return "*i1", None
        if name in ("tokens", "heads", "pairs", "key_heads", "size"):
            return "i32", None
        if name in ("scale_1", "scale_2", "scale_t", "scale_s", "beta"):
            return "fp32", None
        return "*fp32", None

    arguments = {name: argument(name) for name in function.arg_names}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return function, arguments, options, f"{tile.m}x{tile.n}, {tile.warps} warps, {tile.stages}"


def _rows(case: Case) -> tuple[Any, dict[str, tuple[str, Any]], dict[str, int], str]:
    from makd_kernels.linear_divergence import kernel, launch

    constants = {
        "DIVERGENCE": launch.CODES[case.divergence],
        "LABELS": True,
        "HEATED": True,
        "GRADIENT": True,
        "TILE_V": launch.LARGEST_TILE,
    }
    kinds = {"student": "*bf16", "teacher": "*bf16", "labels": "*i64", "vocab": "i32"}

    def argument(name: str) -> tuple[str, Any]:
        if name in constants:
            return "constexpr", constants[name]
        if name.startswith("stride"):
            return "i32", None
        if name in ("temperature", "beta", "alpha"):
            return "fp32", None
        return kinds.get(name, "*fp32"), None

    function = kernel._rows_kernel
    arguments = {name: argument(name) for name in function.arg_names}
    return function, arguments, {"num_warps": launch.WARPS}, f"{launch.LARGEST_TILE}"


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
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_LIMIT))
    parser.add_argument("--update", action="store_true", help="record the registers as the budget")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    recorded = json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.exists() else {}
    budget = recorded.get(f"sm_{arguments.arch}", {})
    chosen = [case for case in cases() if arguments.only in case.name]
    wrong = 0
    print(f"{'case':44} {'tiles':24} regs spill shared HGMMA HMMA")
    seen = {}
    with ProcessPoolExecutor() as pool:
        for found in pool.map(compile_case, chosen, [arguments.arch] * len(chosen)):
            print(f"{found.case:44} {found.tiles:24} {found.registers:4} {found.spilled:5} "
                  f"{found.shared:6} {found.hgmma:5} {found.hmma:4}", flush=True)  # fmt: skip
            seen[found.case] = found.registers
            if arguments.update:
                budget = budget | {found.case: found.registers}
            for fault in faults(found, arguments.arch, budget):
                wrong += 1
                print(f"  WRONG: {fault}", flush=True)
    if arguments.update:
        recorded[f"sm_{arguments.arch}"] = budget if arguments.only else seen
        BUDGET.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(chosen)} configurations for sm_{arguments.arch}, {wrong} faults")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
