"""Linear divergence in plain torch, holding all logits: what the other implementations must equal.

Works in any float dtype (float64 for checks) and is differentiated by autograd.
"""

# N tokens, D and E hidden sizes of student and teacher, V vocabulary

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from makd_kernels.linear_divergence.settings import IGNORED_LABEL, Settings


def forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """KL(p||q) over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """KL(q||p) over the last dimension."""
    return forward_kl(log_q, log_p, beta)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p||m) + (1-beta) KL(q||m); the forward KL at beta 0, the reverse KL at beta 1."""
    if beta == 0.0:
        return forward_kl(log_p, log_q, beta)
    if beta == 1.0:
        return reverse_kl(log_p, log_q, beta)
    share_p, share_q = (log_p.new_tensor(share).log() for share in (beta, 1.0 - beta))
    log_m = torch.logaddexp(log_p + share_p, log_q + share_q)
    return beta * forward_kl(log_p, log_m, beta) + (1.0 - beta) * forward_kl(log_q, log_m, beta)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}


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
    divergence_N = DIVERGENCES[settings.divergence](log_p_NV, log_q_NV, settings.beta)
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
