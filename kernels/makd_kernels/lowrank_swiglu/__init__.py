"""The first half of a gated feed-forward with low-rank matrices: silu(gate x) * (up x).

    from makd_kernels import lowrank_swiglu
    y = lowrank_swiglu(x, (gate.down, gate.up), (up.down, up.up))

Two ways exist, and `explain` says which one a shape takes and why:

* "pair": two matmuls for each side, then silu and the product. Autograd keeps three wide tensors,
  `N x M` each, for the backward.
* "fused": both wide products live only for a tile (Triton) or a block of rows (torch); what is kept
  is narrow, `N x R`, and the backward makes the wide products again, two matmuls more. Where memory
  traffic is the limit, on a GPU at small rank, that is the faster way; on a CPU it takes longer
  (benchmarks/results), so there it has to be asked for, to save memory: `impl="torch"`.
"""

# N rows, K inputs, R rank, M outputs

import torch
from torch import Tensor

from makd_kernels.dispatch import choose
from makd_kernels.lowrank_linear import Path, check_factors
from makd_kernels.lowrank_swiglu.op import lowrank_swiglu_op
from makd_kernels.lowrank_swiglu.reference import Factors, lowrank_swiglu_reference

IMPLEMENTATIONS = ("reference", "torch", "triton")
LARGEST_FUSED_RANK = 256  # beyond it two more matmuls cost more than the traffic that they save


def explain(gate_rank: int, up_rank: int, impl: str = "torch") -> Path:
    """The way that `lowrank_swiglu(impl="auto")` takes.

    `impl` is "torch" or "triton", what impl="auto" means on the device.
    """
    if impl != "triton":
        return Path("pair", "making the wide products twice takes longer than keeping them")
    rank = max(gate_rank, up_rank)
    if rank > LARGEST_FUSED_RANK:
        return Path("pair", f"rank {rank} makes the wide products too dear to be made twice")
    return Path("fused", f"at rank {rank} memory traffic is the limit, not the matmuls")


def lowrank_swiglu(x_NK: Tensor, gate: Factors, up: Factors, *, impl: str = "auto") -> Tensor:
    """silu(x @ gate^T) * (x @ up^T) for two matrices kept as factors.

    Args:
        x_NK: inputs, (..., K).
        gate, up: (down (R, K), up (M, R)) each; their ranks may differ.
        impl: "torch" (fused, a block of rows at a time), "triton" (fused, one kernel for both wide
            products), "reference" (the pair), or "auto": as `explain` says for the device.

    Returns:
        (..., M) in the inputs' dtype. Gradients reach x and all four factors.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown impl.
        RuntimeError: impl="triton" where Triton cannot run.
    """
    if impl == "auto" and x_NK.is_cpu and _is_plain(x_NK, gate, up):
        try:  # choosing among the ways would take as long as 5 % of a small batch's matmuls
            return lowrank_swiglu_reference(x_NK, gate, up)
        except RuntimeError:  # torch's words for shapes and dtypes are its own
            _check(x_NK, gate, up)
            raise
    chosen = choose(impl, IMPLEMENTATIONS, x_NK.device.type)
    if impl == "auto" and (
        x_NK.dtype == torch.float64
        or explain(gate[0].shape[0], up[0].shape[0], chosen).name == "pair"
    ):
        chosen = "reference"
    if chosen == "triton" and x_NK.dtype == torch.float64:
        raise ValueError("impl='triton' computes in fp32, and x is float64; use impl='torch'")
    _check(x_NK, gate, up)
    if chosen == "reference":
        return lowrank_swiglu_reference(x_NK, gate, up)
    flat_NK = x_NK.reshape(-1, x_NK.shape[-1])
    y_NM: Tensor = lowrank_swiglu_op(flat_NK, *gate, *up, chosen)[0]
    return y_NM.view(*x_NK.shape[:-1], y_NM.shape[-1])


def _is_plain(x_NK: Tensor, gate: Factors, up: Factors) -> bool:
    """Whether torch itself would find what is wrong with these."""
    return (
        gate[0].dim() == gate[1].dim() == up[0].dim() == up[1].dim() == 2
        and gate[1].shape[0] == up[1].shape[0]
        and x_NK.is_floating_point()
    )


def _check(x_NK: Tensor, gate: Factors, up: Factors) -> None:
    for name, factors in (("gate", gate), ("up", up)):
        check_factors(name, x_NK, *factors)
    if gate[1].shape[0] != up[1].shape[0]:
        raise ValueError(f"gate has {gate[1].shape[0]} outputs, up {up[1].shape[0]}")
