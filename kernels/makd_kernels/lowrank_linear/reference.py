"""The low-rank product in plain torch, as two matmuls: what every other way must equal.

Works in any float dtype (float64 for checks) and is differentiated by autograd.
"""

# N rows, K inputs, R rank, M outputs

import torch.nn.functional as F
from torch import Tensor


def lowrank_linear_reference(
    x_NK: Tensor, down_RK: Tensor, up_MR: Tensor, bias_M: Tensor | None
) -> Tensor:
    """(..., M) for (..., K). See `lowrank_linear`."""
    return F.linear(F.linear(x_NK, down_RK), up_MR, bias_M)
