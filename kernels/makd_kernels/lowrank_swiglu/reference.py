"""A gated feed-forward's first half with low-rank matrices, in plain torch, holding every product.

Works in any float dtype (float64 for checks) and is differentiated by autograd.
"""

# N rows, K inputs, R rank, M outputs

import torch.nn.functional as F
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # down (R, K), up (M, R)


def lowrank_swiglu_reference(x_NK: Tensor, gate: Factors, up: Factors) -> Tensor:
    """(..., M) for (..., K). See `lowrank_swiglu`."""
    gate_NM, up_NM = (F.linear(F.linear(x_NK, down), wide) for down, wide in (gate, up))
    return F.silu(gate_NM) * up_NM
