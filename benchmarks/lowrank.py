"""lowrank_linear and lowrank_swiglu against two plain matmuls and the dense matrix, in one run.

    python benchmarks/lowrank.py [--device cuda]

"two matmuls" is the plain way with autograd (for SwiGLU: twice, then silu and the product); "dense"
is the matrix before it was factored, "torch.compile" the plain way compiled. "ours" takes the way
that `explain` names; the ways that it chooses from also stand alone, so that its rule can be
checked. The cases of the map (ranks against rows) show where a way loses.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import LOWRANK_CPU, LOWRANK_GPU, LOWRANK_MAP_CPU, LOWRANK_MAP_GPU, LowRankCase
from makd_kernels import lowrank_linear, lowrank_swiglu
from makd_kernels.lowrank_linear import FEWEST_CHAIN_ROWS, LARGEST_CHAIN_RANK, explain
from measure import Rows, checked, command, measured, modes, say

Provider = Callable[..., Tensor]
MATRICES = {"lowrank_linear": 1, "lowrank_swiglu": 2}


def providers(op: str, device: str, rank: int) -> dict[str, Provider]:
    """x and the factors -> y; "dense" takes the matrices instead of the factors."""
    plain: Provider = _two_matmuls if op == "lowrank_linear" else _plain_swiglu
    function: Provider = lowrank_linear if op == "lowrank_linear" else _swiglu
    dense: Provider = F.linear if op == "lowrank_linear" else _dense_swiglu
    found: dict[str, Provider] = {
        "two matmuls": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
        "dense": dense,
        "ours": function,
    }
    if op == "lowrank_swiglu":
        found["ours, blockwise"] = functools.partial(function, impl="torch")
    if device == "cuda" and (op == "lowrank_swiglu" or rank <= LARGEST_CHAIN_RANK):
        found["ours, Triton"] = functools.partial(function, impl="triton")
    return found


def _two_matmuls(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(F.linear(x, down), up)


def _plain_swiglu(
    x: Tensor, gate_down: Tensor, gate_up: Tensor, up_down: Tensor, up_up: Tensor
) -> Tensor:
    gate, up = _two_matmuls(x, gate_down, gate_up), _two_matmuls(x, up_down, up_up)
    return F.silu(gate) * up


def _swiglu(
    x: Tensor, gate_down: Tensor, gate_up: Tensor, up_down: Tensor, up_up: Tensor,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    return lowrank_swiglu(x, (gate_down, gate_up), (up_down, up_up), impl=impl)


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


def run(device: str, repeats: int) -> Iterator[Rows]:
    """Measure every case in every dtype and mode, then the map."""
    impl = "triton" if device == "cuda" else "torch"
    cases, of_map = (
        (LOWRANK_CPU, LOWRANK_MAP_CPU) if device == "cpu" else (LOWRANK_GPU, LOWRANK_MAP_GPU)
    )
    for case in cases:
        for dtype in (torch.bfloat16, torch.float32):
            path = explain(case.rows, case.inputs, case.rank, case.outputs, impl, dtype)
            say(f"lowrank: {case.name} {dtype} takes the way {path.name!r}: {path.why}")
            for op in MATRICES:
                for mode in modes(dtype, device):
                    yield _case(op, case, dtype, mode, device, repeats)
    for case in of_map:
        say(f"lowrank: {case.name} {case.shape}")
        for op in MATRICES:
            yield _case(op, case, torch.bfloat16, "full", device, repeats)


def _case(
    op: str, case: LowRankCase, dtype: torch.dtype, mode: str, device: str, repeats: int
) -> Rows:
    torch.compiler.reset()  # past a limit of recompilations it would run eager, in silence
    errors = _errors(op, case, dtype, mode, device)
    torch.compiler.reset()
    matrices = MATRICES[op]
    given = tensors(case, matrices, dtype, device)
    dense = [given[0], *(up @ down for down, up in zip(given[1::2], given[2::2], strict=True))]
    found = providers(op, device, case.rank)
    calls = {n: call(dense if n == "dense" else given, found[n], mode) for n in errors}
    flops = 2 * matrices * case.rows * case.rank * (case.inputs + case.outputs)
    size = sum(t.numel() * t.element_size() for t in given)
    size += case.rows * case.outputs * dtype.itemsize
    return measured(
        op, case.name, case.shape, dtype, mode, calls, errors, [*given, *dense],
        flops=flops * (1 if mode == "forward" else 3),
        traffic=size * (1 if mode == "forward" else 3), device=device, repeats=repeats,
    )  # fmt: skip


def _errors(
    op: str, case: LowRankCase, dtype: torch.dtype, mode: str, device: str
) -> dict[str, float]:
    """Error of each provider against float64 on the first rows of the case."""
    found = providers(op, device, case.rank)
    del found["dense"]  # another matrix: rounded once more
    if case.name == "map":
        del found["torch.compile"]
    # on a GPU with as many rows as it takes for the way that is timed
    rows = 64 if device == "cpu" else min(case.rows, FEWEST_CHAIN_ROWS)
    small = tensors(case._replace(rows=rows), MATRICES[op], dtype, device)
    truth = call([t.double() for t in small], found["two matmuls"], mode)()
    calls = {name: call(small, provider, mode) for name, provider in found.items()}
    errors = checked(op, calls, truth, "two matmuls", dtype)
    return errors | {"dense": float("nan")}


if __name__ == "__main__":
    command(__doc__, "lowrank", run, repeats=25)
