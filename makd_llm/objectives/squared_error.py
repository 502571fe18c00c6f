"""Squared error per token, with a backward that keeps one tensor.

Written out in plain torch, (y - t)² in fp32 leaves three fp32 tensors of the outputs' size behind
for the backward. Here the backward keeps the difference in the inputs' own dtype, so a matrix loss
costs half a copy of what it compares.
"""
# B batch, T tokens, M features

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Normalize = Literal["relative", "mean"]


def squared_error(
    student_BTM: Tensor, teacher_BTM: Tensor, *, normalize: Normalize = "relative"
) -> Tensor:
    """|y_S - y_T|² per token, divided by |y_T|² (relative) or by M (mean). Returns (B, T) fp32 (or
    fp64).

    The relative form is ours: it puts matrices, whose scales differ by orders of magnitude, on one
    scale. The mean is MaKD's reconstruction. A token whose teacher output is all zero counts as its
    plain squared norm. The teacher receives no gradient. Raises ValueError where shapes differ.
    """
    if student_BTM.shape != teacher_BTM.shape:
        raise ValueError(
            f"student {tuple(student_BTM.shape)} and teacher {tuple(teacher_BTM.shape)} "
            "differ in shape"
        )
    result: Tensor = _SquaredError.apply(student_BTM, teacher_BTM.detach(), normalize)
    return result


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_BTM: Tensor, teacher_BTM: Tensor, normalize: Normalize) -> Tensor:
        exact = torch.promote_types(student_BTM.dtype, torch.float32)
        # In the inputs' dtype: that is what the backward keeps, and half the memory to go through.
        difference_BTM = student_BTM - teacher_BTM
        error_BT = torch.linalg.vector_norm(difference_BTM, dim=-1, dtype=exact).square_()
        if normalize == "mean":
            inverse_BT = torch.full_like(error_BT, 1.0 / student_BTM.shape[-1])
        else:
            norm_BT = torch.linalg.vector_norm(teacher_BTM, dim=-1, dtype=exact).square_()
            inverse_BT = torch.where(norm_BT > 0, norm_BT, 1.0).reciprocal_()
        ctx.save_for_backward(difference_BTM.to(student_BTM.dtype), inverse_BT)
        scaled_BT: Tensor = error_BT.mul_(inverse_BT)
        return scaled_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None, None]:
        difference_BTM, inverse_BT = ctx.saved_tensors
        scale_BT1 = (2.0 * grad_BT * inverse_BT).unsqueeze(-1)
        teacher = normalize = None
        return (difference_BTM * scale_BT1.to(difference_BTM.dtype)), teacher, normalize
