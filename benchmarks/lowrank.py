"""lowrank_linear and lowrank_swiglu against two plain matmuls and the dense matrix, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.lowrank [--device cuda]

"two matmuls" is the plain way with autograd (for SwiGLU: twice, then silu and the product); "dense"
is the matrix before it was factored, "torch.compile" the plain way compiled.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import LOWRANK_CPU, LOWRANK_GPU, LowRankCase
from benchmarks.measure import Rows, check, command, measured, relative_error, say
from makd_kernels import lowrank_linear, lowrank_swiglu
from makd_kernels.lowrank_linear import explain

Provider = Callable[..., Tensor]


def linear_providers() -> dict[str, Provider]:
    """x, down, up -> y."""
    plain = functools.partial(lowrank_linear, impl="reference")
    return {
        "two matmuls": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
        "ours": lowrank_linear,
    }


def _swiglu(
    impl: str, x: Tensor, gate_down: Tensor, gate_up: Tensor, up_down: Tensor, up_up: Tensor
) -> Tensor:
    return lowrank_swiglu(x, (gate_down, gate_up), (up_down, up_up), impl=impl)


def swiglu_providers() -> dict[str, Provider]:
    """x, gate's down and up, up's down and up -> y."""
    plain = functools.partial(_swiglu, "reference")
    return {
        "two matmuls": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
        "ours": functools.partial(_swiglu, "auto"),
    }


def _dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _dense_swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    y: Tensor = F.silu(F.linear(x, gate)) * F.linear(x, up)
    return y


def tensors(case: LowRankCase, matrices: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, and (down, up) for each matrix."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        made: Tensor = torch.randn(rows, columns, generator=generator) / columns**0.5
        return made

    found = [normal(case.rows, case.inputs) * case.inputs**0.5]
    for _ in range(matrices):
        found += [normal(case.rank, case.inputs), normal(case.outputs, case.rank)]
    return [t.to(device, dtype) for t in found]


def call(given: list[Tensor], provider: Provider, mode: str) -> Callable[[], list[Tensor]]:
    """What is measured: the output (forward), or the output and all gradients (full)."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [provider(*given)]

    def full() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in given]
        out = provider(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return {"forward": forward, "full": full}[mode]


def run(device: str, repeats: int) -> Rows:
    """Measure every case."""
    rows: Rows = []
    for case in LOWRANK_CPU if device == "cpu" else LOWRANK_GPU:
        path = explain(case.rows, case.inputs, case.rank, case.outputs)
        say(f"lowrank: {case.name} takes the way {path.name!r}: {path.why}")
        for dtype in (torch.bfloat16, torch.float32):
            for mode in ("forward", "full"):
                rows += _case("lowrank_linear", case, 1, dtype, mode, device, repeats)
                rows += _case("lowrank_swiglu", case, 2, dtype, mode, device, repeats)
    return rows


def _case(
    op: str, case: LowRankCase, matrices: int, dtype: torch.dtype, mode: str, device: str,
    repeats: int,
) -> Rows:  # fmt: skip
    found = linear_providers() if matrices == 1 else swiglu_providers()
    small = tensors(case._replace(rows=64), matrices, dtype, device)
    truth = call([t.double() for t in small], found["two matmuls"], mode)()
    errors = {n: relative_error(call(small, p, mode)(), truth) for n, p in found.items()}
    check(op, "ours", errors["ours"], errors["two matmuls"], dtype)
    given = tensors(case, matrices, dtype, device)
    calls = {name: call(given, provider, mode) for name, provider in found.items()}
    dense = [given[0], *(up @ down for down, up in zip(given[1::2], given[2::2], strict=True))]
    calls["dense"] = call(dense, _dense_linear if matrices == 1 else _dense_swiglu, mode)
    errors["dense"] = float("nan")  # another matrix: rounded once more
    flops = 2 * matrices * case.rows * case.rank * (case.inputs + case.outputs)
    size = sum(t.numel() * t.element_size() for t in given)
    size += case.rows * case.outputs * dtype.itemsize
    return measured(
        op, case.name, case.shape, dtype, mode, calls, errors,
        flops=flops * (1 if mode == "forward" else 3),
        traffic=size * (1 if mode == "forward" else 3), device=device, repeats=repeats,
    )  # fmt: skip


if __name__ == "__main__":
    command(__doc__, "lowrank", run, repeats=15)
