"""Layer level: Lillama's distance, for layers that are trained by themselves."""
# B batch, T tokens, D width

import torch
import torch.nn.functional as F
from torch import Tensor


def local_distance(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """mean|a - y| - log sigmoid(cos(a, y)) per token. Returns (B, T) fp32 (or fp64).

    Source: Lillama. The teacher receives no gradient. Raises ValueError where shapes differ.
    """
    if student_BTD.shape != teacher_BTD.shape:
        raise ValueError(
            f"student {tuple(student_BTD.shape)} and teacher {tuple(teacher_BTD.shape)} "
            "differ in shape"
        )
    exact = torch.promote_types(student_BTD.dtype, torch.float32)
    ours, theirs = student_BTD.to(exact), teacher_BTD.detach().to(exact)
    cosine_BT = F.cosine_similarity(ours, theirs, dim=-1, eps=1e-12)
    return (ours - theirs).abs().mean(-1) - F.logsigmoid(cosine_BT)
