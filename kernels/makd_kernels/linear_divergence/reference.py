"""Linear divergence in plain torch, holding all logits: what the other implementations must equal.

Works in any float dtype (float64 for checks) and is differentiated by autograd.
"""

# N tokens, D and E hidden sizes of student and teacher, V vocabulary

import torch
import torch.nn.functional as F
from torch import Tensor

from makd_kernels.linear_divergence.settings import IGNORED_LABEL, Settings
from makd_kernels.plain import DIVERGENCES


def rows(
    student_ND: Tensor,
    student_head_VD: Tensor,
    labels_N: Tensor | None,
    teacher_NE: Tensor | None,
    teacher_head_VE: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor | None]:
    """(cross_entropy_N, divergence_N). See `linear_cross_entropy_divergence`."""
    dtype = torch.promote_types(student_ND.dtype, torch.float32)
    if teacher_NE is not None:
        dtype = torch.promote_types(dtype, teacher_NE.dtype)
    logits_NV = (student_ND @ student_head_VD[: settings.vocab_size].T).to(dtype)
    cross_entropy_N = logits_NV.new_zeros(logits_NV.shape[0])
    if labels_N is not None:
        cross_entropy_N = F.cross_entropy(
            logits_NV, labels_N, ignore_index=IGNORED_LABEL, reduction="none"
        )
    if teacher_NE is None or teacher_head_VE is None:
        return cross_entropy_N, None
    teacher_logits_NV = (teacher_NE @ teacher_head_VE[: settings.vocab_size].T).to(dtype)
    log_p_NV = (teacher_logits_NV / settings.temperature).log_softmax(-1)
    log_q_NV = (logits_NV / settings.temperature).log_softmax(-1)
    divergence = DIVERGENCES[settings.divergence]
    divergence_N = divergence(log_p_NV, log_q_NV, settings.beta, settings.alpha)
    return cross_entropy_N, divergence_N * settings.temperature**2


def loss(
    student_ND: Tensor,
    student_head_VD: Tensor,
    labels_N: Tensor,
    teacher_NE: Tensor | None,
    teacher_head_VE: Tensor | None,
    weights: tuple[float, float],
    weight_N: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, cross_entropy_N, divergence_N). See `linear_cross_entropy_divergence_loss`."""
    cross_entropy_N, divergence_N = rows(
        student_ND, student_head_VD, labels_N, teacher_NE, teacher_head_VE, settings
    )
    if weight_N is not None:
        cross_entropy_N = cross_entropy_N * weight_N
        divergence_N = None if divergence_N is None else divergence_N * weight_N
    total = weights[0] * cross_entropy_N.sum()
    if divergence_N is None:
        return total, cross_entropy_N.detach(), None
    total = total + weights[1] * divergence_N.sum()
    return total, cross_entropy_N.detach(), divergence_N.detach()
