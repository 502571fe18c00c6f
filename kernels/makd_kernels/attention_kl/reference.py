"""Attention divergence in plain torch, holding both maps: what every other way must equal.

Works in any float dtype (float64 for checks) and is differentiated by autograd.
"""

# B batch, H query heads, G key heads, T tokens (queries first, keys second), D head size

import torch
from torch import Tensor

from makd_kernels.attention_kl.settings import HIDDEN, Settings
from makd_kernels.plain import DIVERGENCES


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
    attention_mask_BT: Tensor | None,
    settings: Settings,
) -> Tensor:
    """(B, H, T) divergence per query; both sides have H heads. See `attention_kl`."""
    tokens, device = q_student_BHTD.shape[2], q_student_BHTD.device
    visible = visible_keys(tokens, settings.causal, settings.window, attention_mask_BT, device)
    dtype = torch.promote_types(q_teacher_BHTD.dtype, q_student_BHTD.dtype)
    dtype = torch.promote_types(dtype, torch.float32)

    def scores(q_BHTD: Tensor, k_BGTD: Tensor, scale: float) -> Tensor:
        k_BHTD = k_BGTD.repeat_interleave(q_BHTD.shape[1] // k_BGTD.shape[1], dim=1)
        return (q_BHTD @ k_BHTD.mT).to(dtype) * scale

    t_BHTT = scores(q_teacher_BHTD, k_teacher_BGTD, settings.scale_teacher)
    s_BHTT = scores(q_student_BHTD, k_student_BGTD, settings.scale_student)
    if settings.divergence == "logit_mse":
        per_query_BHT = (t_BHTT - s_BHTT).masked_fill(~visible, 0.0).square().sum(-1)
    else:
        # hidden scores are finite: a row without visible keys stays free of NaN and is zeroed below
        log_p, log_q = (x.masked_fill(~visible, HIDDEN).log_softmax(-1) for x in (t_BHTT, s_BHTT))
        per_query_BHT = DIVERGENCES[settings.divergence](log_p, log_q, settings.beta, 0.0)
    counted_BHT = visible.any(-1)
    if attention_mask_BT is not None:
        counted_BHT = counted_BHT & attention_mask_BT.bool()[:, None]
    return per_query_BHT.masked_fill(~counted_BHT, 0.0)
