"""Attention divergence in plain torch, holding both maps: what every other way must equal.

Works in any float dtype (float64 for checks) and is differentiated by autograd.
"""

# B batch, H query heads, G key heads, T tokens (queries first, keys second), D head size

from collections.abc import Callable

import torch
from torch import Tensor


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p||q) over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q||p) over the last dimension."""
    return forward_kl(log_q, log_p)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
}


def visible_keys(
    tokens: int,
    causal: bool,
    window: int | None,
    attention_mask_BT: Tensor | None,
    device: torch.device,
) -> Tensor:
    """(B or 1, 1, T, T) bool: may this query see this key."""
    positions_T = torch.arange(tokens, device=device)
    gap_TT = positions_T[:, None] - positions_T
    visible_TT = gap_TT >= 0 if causal else torch.ones_like(gap_TT, dtype=torch.bool)
    if window is not None:
        visible_TT = visible_TT & (gap_TT < window)
    if attention_mask_BT is None:
        return visible_TT[None, None]
    return visible_TT & attention_mask_BT.bool()[:, None, None, :]


def attention_kl_reference(
    q_teacher_BHTD: Tensor,
    k_teacher_BGTD: Tensor,
    q_student_BHTD: Tensor,
    k_student_BGTD: Tensor,
    scales: tuple[float, float],
    causal: bool,
    window: int | None,
    attention_mask_BT: Tensor | None,
    divergence: str,
) -> Tensor:
    """(B, H, T) divergence per query; both sides have H heads. See `attention_kl`."""
    tokens, device = q_student_BHTD.shape[2], q_student_BHTD.device
    visible = visible_keys(tokens, causal, window, attention_mask_BT, device)
    dtype = torch.promote_types(q_teacher_BHTD.dtype, q_student_BHTD.dtype)
    dtype = torch.promote_types(dtype, torch.float32)

    def log_attention(q_BHTD: Tensor, k_BGTD: Tensor, scale: float) -> Tensor:
        k_BHTD = k_BGTD.repeat_interleave(q_BHTD.shape[1] // k_BGTD.shape[1], dim=1)
        scores_BHTT = (q_BHTD @ k_BHTD.mT).to(dtype) * scale
        # finite, so that a row without visible keys stays free of NaN; it is zeroed below
        return scores_BHTT.masked_fill(~visible, -1e30).log_softmax(-1)

    log_p_BHTT = log_attention(q_teacher_BHTD, k_teacher_BGTD, scales[0])
    log_q_BHTT = log_attention(q_student_BHTD, k_student_BGTD, scales[1])
    per_query_BHT = DIVERGENCES[divergence](log_p_BHTT, log_q_BHTT)
    counted_BHT = visible.any(-1)
    if attention_mask_BT is not None:
        counted_BHT = counted_BHT & attention_mask_BT.bool()[:, None]
    return per_query_BHT.masked_fill(~counted_BHT, 0.0)
