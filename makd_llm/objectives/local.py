"""Layer level: Lillama's distance, for layers that are trained by themselves."""
# B batch, T tokens, D width

import torch.nn.functional as F
from torch import Tensor

from makd_llm.objectives.cosine import cosine_distance


def local_distance(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """mean|a - y| - log sigmoid(cos(a, y)) per token. Returns (B, T) fp32 (or fp64).

    Source: Lillama. The teacher receives no gradient. Raises ValueError where shapes differ.
    """
    cosine_BT = 1.0 - cosine_distance(student_BTD, teacher_BTD)
    difference_BTD = student_BTD.to(cosine_BT.dtype) - teacher_BTD.detach().to(cosine_BT.dtype)
    return difference_BTD.abs().mean(-1) - F.logsigmoid(cosine_BT)
