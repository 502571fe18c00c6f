"""The first half of a gated feed-forward with low-rank matrices: silu(gate x) * (up x).

    from makd_kernels import lowrank_swiglu
    y = lowrank_swiglu(x, (gate.down, gate.up), (up.down, up.up))

Both wide products, `N x M` each, live only for a block of rows; between forward and backward the
narrow ones are kept, `N x R`.
"""

# N rows, K inputs, R rank, M outputs

import torch
from torch import Tensor

from makd_kernels.dispatch import choose
from makd_kernels.lowrank_linear import check_factors
from makd_kernels.lowrank_swiglu.op import lowrank_swiglu_op
from makd_kernels.lowrank_swiglu.reference import Factors, lowrank_swiglu_reference

IMPLEMENTATIONS = ("reference", "torch", "triton")


def lowrank_swiglu(x_NK: Tensor, gate: Factors, up: Factors, *, impl: str = "auto") -> Tensor:
    """silu(x @ gate^T) * (x @ up^T) for two matrices kept as factors.

    Args:
        x_NK: inputs, (..., K).
        gate, up: (down (R, K), up (M, R)) each; their ranks may differ.
        impl: "torch" (blocks of rows), "triton" (one kernel for both wide products), "reference"
            (holds them), or "auto": Triton on a GPU unless the inputs are float64, torch elsewhere.

    Returns:
        (..., M) in the inputs' dtype. Gradients reach x and all four factors; the backward makes
        the wide products again from the narrow ones.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown impl.
        RuntimeError: impl="triton" where Triton cannot run.
    """
    chosen = choose(impl, IMPLEMENTATIONS, x_NK.device.type)
    if chosen == "triton" and x_NK.dtype == torch.float64:
        if impl == "triton":
            raise ValueError("impl='triton' computes in fp32, and x is float64; use impl='torch'")
        chosen = "torch"
    for name, factors in (("gate", gate), ("up", up)):
        check_factors(name, x_NK, *factors)
    if gate[1].shape[0] != up[1].shape[0]:
        raise ValueError(f"gate has {gate[1].shape[0]} outputs, up {up[1].shape[0]}")
    if chosen == "reference":
        return lowrank_swiglu_reference(x_NK, gate, up)
    flat_NK = x_NK.reshape(-1, x_NK.shape[-1])
    y_NM: Tensor = lowrank_swiglu_op(flat_NK, *gate, *up, chosen)[0]
    return y_NM.view(*x_NK.shape[:-1], y_NM.shape[-1])
