"""Layer level: how tokens relate to each other among a layer's queries, keys or values (MiniLM v2).

A relation is softmax(X Xᵀ / sqrt(d)) for X the layer's queries, keys or values, split anew into a
number of heads that teacher and student share; so their widths may differ. It is an attention
distribution of X over itself, and compared as one, without maps (makd_kernels.attention_kl).
"""
# B batch, T tokens, M and N widths, A relation heads

import torch
from torch import Tensor

from makd_kernels.attention_kl import attention_kl_loss
from makd_llm.objectives.masks import Masks


def relation_divergence(
    student_BTM: Tensor,
    teacher_BTN: Tensor,
    masks: Masks,
    *,
    heads: int,
    impl: str = "auto",
) -> Tensor:
    """KL(relation of the teacher || of the student) of every real token, mean over heads, summed
    over the batch: a scalar, fp32 (or fp64).

    Source: MiniLM v2, with causal relations (ours: a decoder's token has seen none after it). The
    teacher receives no gradient. Raises ValueError where a width cannot be split into the heads.
    """
    for who, width in (("student", student_BTM.shape[-1]), ("teacher", teacher_BTN.shape[-1])):
        if width % heads:
            raise ValueError(f"{heads} relation heads do not divide the {who}'s width {width}")
    ours, theirs = masks.by_record(student_BTM), masks.by_record(teacher_BTN)
    if ours is not None and theirs is not None:
        parts = zip(ours, theirs, masks.of_records(), strict=True)
        return torch.stack(
            [relation_divergence(*part, heads=heads, impl=impl) for part in parts]
        ).sum()
    student_BTM, teacher_BTN = masks.padded(student_BTM), masks.padded(teacher_BTN)
    ours_BATD = _split(student_BTM, heads)
    theirs_BATD = _split(teacher_BTN.detach(), heads)
    return attention_kl_loss(
        theirs_BATD,
        theirs_BATD,
        ours_BATD,
        ours_BATD,
        masks.tokens_BT / heads,
        attention_mask_BT=masks.keys_BT,
        impl=impl,
    ).loss


def _split(x_BTM: Tensor, heads: int) -> Tensor:
    x_BTAD: Tensor = x_BTM.unflatten(-1, (heads, -1))
    return x_BTAD.transpose(1, 2)
