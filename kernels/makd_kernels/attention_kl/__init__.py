"""Divergence between two attention maps, query by query, without holding either map.

The student learns *where the teacher looks*: for every head and every query the teacher's attention
over the keys is a distribution p, the student's is q, and the op returns one divergence per query.
Queries and keys come in as attention sees them (after rotary embedding). The maps are never stored:
each block of queries makes its scores, is reduced, and is forgotten; the backward makes them again.

    from makd_kernels import attention_kl
    kl_BHT = attention_kl(q_teacher, k_teacher, q_student, k_student, attention_mask_BT=mask)
    (kl_BHT.sum() * loss_scale).backward()
"""

# B batch, H query heads, G key heads (H % G == 0), T tokens, D head size, P head pairs

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from makd_kernels.attention_kl.blockwise import attention_kl_blockwise
from makd_kernels.attention_kl.reference import attention_kl_reference
from makd_kernels.dispatch import choose
from makd_kernels.divergences import check_divergence

DIVERGENCES = ("forward_kl", "reverse_kl")

# each takes (q_teacher, k_teacher, q_student, k_student) with as many teacher as student heads
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": attention_kl_reference,
    "torch": attention_kl_blockwise,
}


def choose_impl(impl: str = "auto") -> str:
    """The implementation that `impl` names; "auto" is "torch". ValueError if it is unknown."""
    return choose(impl, IMPLEMENTATIONS, auto="torch")


def attention_kl(
    q_teacher_BHTD: Tensor,
    k_teacher_BGTD: Tensor,
    q_student_BHTD: Tensor,
    k_student_BGTD: Tensor,
    *,
    scale_teacher: float | None = None,
    scale_student: float | None = None,
    causal: bool = True,
    window: int | None = None,
    attention_mask_BT: Tensor | None = None,
    head_map: Sequence[Sequence[int]] | None = None,
    divergence: str = "forward_kl",
    impl: str = "auto",
) -> Tensor:
    """Divergence in nats of the student's attention from the teacher's, one per head and query.

    Teacher and student share B and T and may differ in head count, key heads and head size.

    Args:
        q_teacher_BHTD, k_teacher_BGTD: the teacher's queries and keys; they never get a gradient.
        q_student_BHTD, k_student_BGTD: the student's.
        scale_teacher, scale_student: factor on the scores; None is head size ** -0.5 of that side.
        causal: query i sees keys j <= i.
        window: query i sees only keys i - window < j <= i, as transformers' sliding window.
        attention_mask_BT: 1 (or True) for a real token, 0 for padding, on either side.
        head_map: `head_map[h]` lists the teacher heads that student head h learns from; their
            divergences are averaged. None is the identity and needs equal head counts.
        divergence: "forward_kl" is KL(teacher || student), "reverse_kl" KL(student || teacher).
        impl: "auto", "reference" (holds the maps; for checks) or "torch" (bounded memory).

    Returns:
        (B, H of the student, T) in fp32, or float64 where an input is float64; exactly 0 where the
        query is padding or sees no key. Extra memory is O(T x block) in forward and backward.

    Raises:
        ValueError: shapes that do not fit, a teacher tensor that requires grad, head counts that
            differ without a head_map, a window without causal, an unknown divergence or impl.
    """
    chosen = IMPLEMENTATIONS[choose_impl(impl)]
    check_divergence(divergence, DIVERGENCES)
    _check_shapes(q_teacher_BHTD, k_teacher_BGTD, q_student_BHTD, k_student_BGTD)
    _check_mask(q_student_BHTD, attention_mask_BT, causal, window)
    if torch.is_grad_enabled() and (q_teacher_BHTD.requires_grad or k_teacher_BGTD.requires_grad):
        raise ValueError("a teacher tensor requires grad, but the teacher never gets one; detach()")
    if scale_teacher is None:
        scale_teacher = q_teacher_BHTD.shape[-1] ** -0.5
    if scale_student is None:
        scale_student = q_student_BHTD.shape[-1] ** -0.5

    def over_heads(q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
        scales = (float(scale_teacher), float(scale_student))
        return chosen(q_t, k_t, q_s, k_s, scales, causal, window, attention_mask_BT, divergence)

    teacher_heads, student_heads = q_teacher_BHTD.shape[1], q_student_BHTD.shape[1]
    if head_map is None:
        if teacher_heads != student_heads:
            raise ValueError(
                f"head counts differ: teacher {teacher_heads}, student {student_heads}; pass "
                "head_map, the list of teacher heads for each student head"
            )
        return over_heads(q_teacher_BHTD, k_teacher_BGTD, q_student_BHTD, k_student_BGTD)

    _check_head_map(head_map, teacher_heads, student_heads)
    pairs = [(h, other) for h, others in enumerate(head_map) for other in others]
    device = q_student_BHTD.device
    student_P = torch.tensor([h for h, _ in pairs], device=device)
    teacher_P = torch.tensor([other for _, other in pairs], device=device)
    per_pair_BPT = over_heads(
        *_take_heads(q_teacher_BHTD, k_teacher_BGTD, teacher_P),
        *_take_heads(q_student_BHTD, k_student_BGTD, student_P),
    )
    share_P1 = torch.tensor([[1.0 / len(head_map[h])] for h, _ in pairs], device=device)
    batch, _, tokens = per_pair_BPT.shape
    mean_BHT = per_pair_BPT.new_zeros(batch, student_heads, tokens)
    return mean_BHT.index_add(1, student_P, per_pair_BPT * share_P1.to(per_pair_BPT.dtype))


def _take_heads(q_BHTD: Tensor, k_BGTD: Tensor, heads_P: Tensor) -> tuple[Tensor, Tensor]:
    """The queries of `heads_P` and, one for each, the keys that they attend to."""
    group = q_BHTD.shape[1] // k_BGTD.shape[1]
    return q_BHTD[:, heads_P], k_BGTD[:, heads_P // group]


def _check_shapes(
    q_teacher: Tensor, k_teacher: Tensor, q_student: Tensor, k_student: Tensor
) -> None:
    for side, q_BHTD, k_BGTD in (
        ("teacher", q_teacher, k_teacher),
        ("student", q_student, k_student),
    ):
        if q_BHTD.dim() != 4 or k_BGTD.dim() != 4:
            raise ValueError(
                f"{side}: queries and keys must be (batch, heads, tokens, head size), got "
                f"{tuple(q_BHTD.shape)} and {tuple(k_BGTD.shape)}"
            )
        batch, heads, tokens, size = q_BHTD.shape
        key_heads = k_BGTD.shape[1]
        if k_BGTD.shape != (batch, key_heads, tokens, size) or key_heads == 0 or heads % key_heads:
            raise ValueError(
                f"{side}: keys {tuple(k_BGTD.shape)} do not fit queries {tuple(q_BHTD.shape)}; "
                "only the head count may differ, and it must divide the queries'"
            )
        if q_BHTD.dtype != k_BGTD.dtype or not q_BHTD.is_floating_point():
            raise ValueError(f"{side}: dtypes {q_BHTD.dtype}, {k_BGTD.dtype}; need one float dtype")
    if (q_teacher.shape[0], q_teacher.shape[2]) != (q_student.shape[0], q_student.shape[2]):
        raise ValueError(
            f"teacher {tuple(q_teacher.shape)} and student {tuple(q_student.shape)} must share "
            "batch and tokens"
        )


def _check_mask(
    q_BHTD: Tensor, attention_mask_BT: Tensor | None, causal: bool, window: int | None
) -> None:
    batch_tokens = (q_BHTD.shape[0], q_BHTD.shape[2])
    if attention_mask_BT is not None and attention_mask_BT.shape != batch_tokens:
        raise ValueError(
            f"attention_mask_BT is {tuple(attention_mask_BT.shape)}; it must be {batch_tokens}"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window={window} needs causal=True and at least 1")


def _check_head_map(head_map: Sequence[Sequence[int]], teachers: int, students: int) -> None:
    if len(head_map) != students or not all(len(others) for others in head_map):
        raise ValueError(
            f"head_map must name at least one teacher head for each of {students} heads"
        )
    if not all(0 <= other < teachers for others in head_map for other in others):
        raise ValueError(f"head_map names a teacher head outside 0..{teachers - 1}")
