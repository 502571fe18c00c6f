"""Layer level: divergence of the attention distributions, mean over the student's heads.

L_attn = sum over layers of (1/H) sum_h sum_t KL(A_T || A_S), from post-rotary queries and keys
(docs/methods/makd.md; the attention maps themselves never exist, see makd_kernels.attention_kl).
"""
# B batch, T tokens, H query heads

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from makd_kernels.attention_kl import attention_kl_loss
from makd_llm.objectives.masks import Masks
from makd_llm.shown import AttentionShown


def attention_divergence(
    student: AttentionShown,
    teacher: AttentionShown,
    masks: Masks,
    *,
    heads: Sequence[int] | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    impl: str = "auto",
) -> Tensor:
    """The divergence of every real token's attention, mean over heads, summed over the batch: a
    scalar, fp32 (or fp64), whose gradient is made with it.

    heads: the teacher's query head for each of the student's; None: the same. The number of
    key-value heads may differ. logit_mse is the mean over the keys that a token sees; the others
    are of distributions over them. Raises ValueError where teacher and student see windows of
    different length (their distributions would be over different keys).
    """
    if student.window != teacher.window:
        raise ValueError(
            f"attention windows differ: student {student.window}, teacher {teacher.window}"
        )
    parts = _by_record(student, teacher, masks)
    if parts is not None:
        settings: dict[str, Any] = {"divergence": divergence, "beta": beta, "impl": impl}
        return torch.stack(
            [attention_divergence(*part, heads=heads, **settings) for part in parts]
        ).sum()
    student, teacher = _padded(student, masks), _padded(teacher, masks)
    exact = torch.promote_types(student.query_BHTD.dtype, torch.float32)
    weights_BT = masks.tokens_BT.to(exact) / student.query_BHTD.shape[1]
    if divergence == "logit_mse":
        weights_BT = weights_BT / masks.seen_by(student.window)
    found = attention_kl_loss(
        teacher.query_BHTD,
        teacher.key_BGTD,
        student.query_BHTD,
        student.key_BGTD,
        weights_BT,
        scale_teacher=teacher.scale,
        scale_student=student.scale,
        window=student.window,
        attention_mask_BT=masks.keys_BT,
        head_map=None if heads is None else [[head] for head in heads],
        divergence=divergence,
        beta=beta,
        impl=impl,
    )
    return found.loss


def _by_record(
    student: AttentionShown, teacher: AttentionShown, masks: Masks
) -> list[tuple[AttentionShown, AttentionShown, Masks]] | None:
    """Each record by itself, where that is the better way."""
    sides = []
    for shown in (student, teacher):
        tensors = (shown.query_BHTD, shown.key_BGTD)
        cut = [masks.by_record(x.transpose(1, 2)) for x in tensors]
        if cut[0] is None or cut[1] is None:
            return None
        sides.append(
            [
                replace(shown, query_BHTD=query.transpose(1, 2), key_BGTD=key.transpose(1, 2))
                for query, key in zip(cut[0], cut[1], strict=True)
            ]
        )
    return list(zip(*sides, masks.of_records(), strict=True))


def _padded(shown: AttentionShown, masks: Masks) -> AttentionShown:
    query, key = (
        masks.padded(x.transpose(1, 2)).transpose(1, 2) for x in (shown.query_BHTD, shown.key_BGTD)
    )
    return replace(shown, query_BHTD=query, key_BGTD=key)
