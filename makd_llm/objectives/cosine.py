"""Distance of directions: 1 - cos of two vectors, per token."""
# B batch, T tokens, D width

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distance(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """1 - cos(h_S, h_T) per token, 1 where one of them is zero. Returns (B, T) fp32 (or fp64).

    Source: DistilBERT's third loss, on the last hidden states; feature alignment on all layers. The
    teacher receives no gradient. Raises ValueError where shapes differ.
    """
    if student_BTD.shape != teacher_BTD.shape:
        raise ValueError(
            f"student {tuple(student_BTD.shape)} and teacher {tuple(teacher_BTD.shape)} "
            "differ in shape"
        )
    exact = torch.promote_types(student_BTD.dtype, torch.float32)
    ours, theirs = student_BTD.to(exact), teacher_BTD.detach().to(exact)
    return 1.0 - F.cosine_similarity(ours, theirs, dim=-1, eps=1e-12)
