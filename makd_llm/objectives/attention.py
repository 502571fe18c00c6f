"""Layer level: divergence of the attention distributions, mean over the student's heads.

L_attn = sum over layers of (1/H) sum_h sum_t KL(A_T || A_S), from post-rotary queries and keys
(docs/methods/makd.md; the attention maps themselves never exist, see makd_kernels.attention_kl).
"""
# B batch, T tokens, H query heads

from collections.abc import Sequence

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
    lengths = masks.lengths()
    if lengths is not None:
        parts = zip(_by_record(student, lengths), _by_record(teacher, lengths), strict=True)
        return torch.stack(
            [
                attention_divergence(
                    ours,
                    theirs,
                    masks.of_record(row, lengths[row]),
                    heads=heads,
                    divergence=divergence,
                    beta=beta,
                    impl=impl,
                )
                for row, (ours, theirs) in enumerate(parts)
            ]
        ).sum()
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


def _by_record(shown: AttentionShown, lengths: Sequence[int]) -> list[AttentionShown]:
    """Each record's own queries and keys, without padding."""
    rows = zip(lengths, shown.query_BHTD.split(1), shown.key_BGTD.split(1), strict=True)
    return [
        AttentionShown(query[:, :, :length], key[:, :, :length], shown.scale, shown.window)
        for length, query, key in rows
    ]
