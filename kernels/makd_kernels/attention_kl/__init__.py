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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from makd_kernels.attention_kl.blockwise import Sweep
from makd_kernels.attention_kl.op import attention_kl_op
from makd_kernels.attention_kl.reference import attention_kl_reference
from makd_kernels.attention_kl.settings import DIVERGENCES, HIDDEN, LARGEST_HEAD, Settings
from makd_kernels.dispatch import choose
from makd_kernels.divergences import checked_divergence

IMPLEMENTATIONS = ("reference", "torch", "triton")


def choose_impl(impl: str = "auto", device: str = "cpu") -> str:
    """The implementation that `impl` names on a device of type `device`.

    "auto" is "triton" on an NVIDIA or AMD GPU where Triton is installed, and "torch" elsewhere.
    ValueError if it is unknown; RuntimeError if "triton" is asked for and cannot run there.
    """
    return choose(impl, IMPLEMENTATIONS, device)


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
    log_sum_exp_teacher_BHT: Tensor | None = None,
    log_sum_exp_student_BHT: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    impl: str = "auto",
) -> Tensor:
    """Divergence of the student's attention from the teacher's, one per head and query.

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
        log_sum_exp_teacher_BHT, log_sum_exp_student_BHT: ln sum exp of each side's scaled scores
            over the keys that a query sees, where both attentions have made them (flash attention
            does); they save a sweep. Only their values count: the gradient, which is whole without
            them, goes to queries and keys. Rows of padding may hold anything. One number per query
            is rounded at the size of the scores, so the result is as exact as they are. For a
            forward KL the Triton kernels then keep one tensor of the queries' size for the backward
            (not in fp16).
        divergence: "forward_kl" is KL(teacher || student), "reverse_kl" KL(student || teacher),
            "jsd" beta KL(teacher || m) + (1-beta) KL(student || m) with m = beta teacher +
            (1-beta) student, all in nats; "probability_mse" and "logit_mse" are the squared error
            of the attention probabilities and of the scaled scores, summed over the keys that the
            query sees.
        beta: for "jsd"; exactly the forward KL at 0 and the reverse KL at 1, as in TRL.
        impl: "torch" (any device), "triton" (fused kernels on a GPU), "reference" (holds the maps;
            for checks), or "auto": Triton on a GPU unless an input is float64 or a head is larger
            than 256, torch otherwise.

    Returns:
        (B, H of the student, T) in fp32, or float64 where an input is float64; exactly 0 where the
        query is padding or sees no key. Extra memory is O(T x block) in forward and backward.

    Raises:
        ValueError: shapes that do not fit, a teacher tensor that requires grad, head counts that
            differ without a head_map, a window without causal, log-sum-exps of one side only, an
            unknown divergence or impl.
        RuntimeError: impl="triton" where Triton cannot run.
    """
    asked = _prepared(
        (q_teacher_BHTD, k_teacher_BGTD, scale_teacher, log_sum_exp_teacher_BHT),
        (q_student_BHTD, k_student_BGTD, scale_student, log_sum_exp_student_BHT),
        attention_mask_BT,
        (causal, window, divergence, beta),
        head_map,
        impl,
    )
    return _values(asked, attention_mask_BT)


class AttentionLoss(NamedTuple):
    """loss carries the gradient; values_BHT, as `attention_kl` returns them, does not."""

    loss: Tensor
    values_BHT: Tensor


def attention_kl_loss(
    q_teacher_BHTD: Tensor,
    k_teacher_BGTD: Tensor,
    q_student_BHTD: Tensor,
    k_student_BGTD: Tensor,
    weight_BT: Tensor,
    *,
    scale_teacher: float | None = None,
    scale_student: float | None = None,
    causal: bool = True,
    window: int | None = None,
    attention_mask_BT: Tensor | None = None,
    head_map: Sequence[Sequence[int]] | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    impl: str = "auto",
) -> AttentionLoss:
    """The sum over heads and queries of weight_BT times `attention_kl`.

    For training: where plain torch computes it, the gradient is made in the forward from the scores
    at hand, so that they are made once and not twice, and is kept as one tensor of the student's
    queries' and keys' shapes; the backward multiplies it by the incoming scalar, which is exact for
    any scalar. The teacher's queries and keys are not kept.

    Arguments as in `attention_kl`; weight_BT gets no gradient. Raises ValueError as it does, and
    for a weight of another shape.
    """
    shape_BT = (q_student_BHTD.shape[0], q_student_BHTD.shape[2])
    if weight_BT.shape != shape_BT:
        raise ValueError(f"weight_BT is {tuple(weight_BT.shape)}; it must be {shape_BT}")
    asked = _prepared(
        (q_teacher_BHTD, k_teacher_BGTD, scale_teacher, None),
        (q_student_BHTD, k_student_BGTD, scale_student, None),
        attention_mask_BT,
        (causal, window, divergence, beta),
        head_map,
        impl,
    )
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in asked.student[:2])
    if asked.impl == "torch" and learns:
        counts = torch.tensor(asked.pairs[1], device=weight_BT.device)
        share_P = counts.repeat_interleave(counts).reciprocal()
        weight_BPT = weight_BT.detach()[:, None] * share_P[:, None]
        loss, per_pair_BPT = _OnePass.apply(
            *asked.student[:2], weight_BPT, *asked.teacher[:2], attention_mask_BT, asked.settings
        )
        return AttentionLoss(loss, _by_head(per_pair_BPT, asked.pairs[1]))
    values_BHT = _values(asked, attention_mask_BT)
    return AttentionLoss((values_BHT * weight_BT.detach()[:, None]).sum(), values_BHT.detach())


class _OnePass(torch.autograd.Function):
    """Values and gradients of blockwise.py in one pass over the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        q_student: Tensor,
        k_student: Tensor,
        weight_BPT: Tensor,
        q_teacher: Tensor,
        k_teacher: Tensor,
        mask_BT: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        sweep = Sweep(q_teacher, k_teacher, q_student, k_student, mask_BT, None, None, settings)
        values_BPT, dq, dk = sweep.gradients(weight_BPT, with_values=True)
        assert values_BPT is not None
        ctx.save_for_backward(dq, dk)
        ctx.mark_non_differentiable(values_BPT)
        return (values_BPT * weight_BPT).sum(), values_BPT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = ctx.saved_tensors
        weight = teacher = mask = settings = None
        return (
            dq * grad.to(dq.dtype),
            dk * grad.to(dk.dtype),
            weight,
            teacher,
            teacher,
            mask,
            settings,
        )


_Side = tuple[Tensor, Tensor, Tensor | None]  # queries, keys, log-sum-exps


class _Asked(NamedTuple):
    """A checked call. pairs: the teacher's head of each pair, and how many pairs each of the
    student's heads has; for Triton the heads are as they came, else already in pairs.
    """

    teacher: _Side
    student: _Side
    pairs: tuple[list[int], list[int]]
    settings: Settings
    impl: str


def _prepared(
    teacher: tuple[Tensor, Tensor, float | None, Tensor | None],
    student: tuple[Tensor, Tensor, float | None, Tensor | None],
    attention_mask_BT: Tensor | None,
    choices: tuple[bool, int | None, str, float],
    head_map: Sequence[Sequence[int]] | None,
    impl: str,
) -> _Asked:
    q_teacher_BHTD, k_teacher_BGTD, scale_teacher, log_sum_exp_teacher_BHT = teacher
    q_student_BHTD, k_student_BGTD, scale_student, log_sum_exp_student_BHT = student
    causal, window, divergence, beta = choices
    divergence = checked_divergence(divergence, DIVERGENCES, beta)
    _check_shapes(q_teacher_BHTD, k_teacher_BGTD, q_student_BHTD, k_student_BGTD)
    chosen = choose_impl(impl, q_student_BHTD.device.type)
    unfit = _unfit_for_triton(q_teacher_BHTD, q_student_BHTD)
    if chosen == "triton" and unfit is not None:
        if impl == "triton":
            raise ValueError(f"impl='triton' {unfit}; impl='torch' takes it")
        chosen = "torch"
    _check_mask(q_student_BHTD, attention_mask_BT, causal, window)
    if torch.is_grad_enabled() and (q_teacher_BHTD.requires_grad or k_teacher_BGTD.requires_grad):
        raise ValueError("a teacher tensor requires grad, but the teacher never gets one; detach()")
    if scale_teacher is None:
        scale_teacher = q_teacher_BHTD.shape[-1] ** -0.5
    if scale_student is None:
        scale_student = q_student_BHTD.shape[-1] ** -0.5

    settings = Settings(
        float(scale_teacher), float(scale_student), causal, window, divergence, float(beta)
    )
    teacher_heads, student_heads = q_teacher_BHTD.shape[1], q_student_BHTD.shape[1]
    if head_map is None:
        if teacher_heads != student_heads:
            raise ValueError(
                f"head counts differ: teacher {teacher_heads}, student {student_heads}; pass "
                "head_map, the list of teacher heads for each student head"
            )
        head_map = [[head] for head in range(student_heads)]
    _check_head_map(head_map, teacher_heads, student_heads)
    counts = [len(others) for others in head_map]
    teacher_P = [other for others in head_map for other in others]
    lse_teacher, lse_student = _usable(
        (log_sum_exp_teacher_BHT, q_teacher_BHTD),
        (log_sum_exp_student_BHT, q_student_BHTD),
        attention_mask_BT,
    )
    if divergence == "logit_mse":  # has no softmax
        lse_teacher = lse_student = None
    teacher_side = (q_teacher_BHTD.detach(), k_teacher_BGTD.detach(), lse_teacher)
    student_side = (q_student_BHTD, k_student_BGTD, lse_student)
    in_order = teacher_P == list(range(teacher_heads)) and counts == [1] * student_heads
    if chosen != "triton" and not in_order:
        student_P = [head for head, count in enumerate(counts) for _ in range(count)]
        teacher_side = _take_heads(*teacher_side, teacher_P)
        student_side = _take_heads(*student_side, student_P)
    return _Asked(teacher_side, student_side, (teacher_P, counts), settings, chosen)


def _by_head(per_pair_BPT: Tensor, counts: list[int]) -> Tensor:
    """The mean over each of the student's heads' pairs, (B, H, T)."""
    if max(counts) == 1:
        return per_pair_BPT
    return torch.stack([part.mean(1) for part in per_pair_BPT.split(counts, dim=1)], dim=1)


def _values(asked: _Asked, attention_mask_BT: Tensor | None) -> Tensor:
    """(B, H, T) by the implementation that was asked for."""
    if asked.impl == "triton":
        return _from_op(asked, attention_mask_BT, asked.pairs)
    teacher, student = asked.teacher, asked.student
    if asked.impl == "reference":
        per_pair_BPT = attention_kl_reference(
            *teacher[:2], *student[:2], attention_mask_BT, asked.settings
        )
    else:
        in_order = (list(range(teacher[0].shape[1])), [1] * teacher[0].shape[1])
        per_pair_BPT = _from_op(asked, attention_mask_BT, in_order)
    return _by_head(per_pair_BPT, asked.pairs[1])


def _from_op(
    asked: _Asked, attention_mask_BT: Tensor | None, pairs: tuple[list[int], list[int]]
) -> Tensor:
    teacher = asked.teacher
    q_student, k_student, lse_student = asked.student
    with_gradient = torch.is_grad_enabled() and q_student.requires_grad
    values_BHT: Tensor = attention_kl_op(
        *teacher[:2],
        q_student,
        k_student,
        attention_mask_BT,
        teacher[2],
        lse_student,
        *pairs,
        *asked.settings,
        asked.impl,
        with_gradient,
    )[0]
    return values_BHT


def _usable(
    teacher: tuple[Tensor | None, Tensor],
    student: tuple[Tensor | None, Tensor],
    attention_mask_BT: Tensor | None,
) -> list[Tensor | None]:
    """Both sides' log-sum-exps, checked against their queries and detached.

    Queries that are padding or see no key get one so high that every probability, and with it value
    and gradient, is exactly 0, whatever attention left there.
    """
    if (teacher[0] is None) != (student[0] is None):
        raise ValueError("give the log-sum-exps of teacher and student, or neither")
    dtype = torch.promote_types(teacher[1].dtype, student[1].dtype)
    usable: list[Tensor | None] = []
    for name, (lse_BHT, q_BHTD) in (("teacher", teacher), ("student", student)):
        if lse_BHT is not None and lse_BHT.shape != q_BHTD.shape[:3]:
            raise ValueError(
                f"log_sum_exp_{name}_BHT is {tuple(lse_BHT.shape)}; it must be "
                f"{tuple(q_BHTD.shape[:3])}, one for each of the {name}'s queries"
            )
        if lse_BHT is not None:
            counted = lse_BHT.isfinite()
            if attention_mask_BT is not None:
                counted = counted & (attention_mask_BT != 0)[:, None]
            lse_BHT = lse_BHT.detach().to(torch.promote_types(dtype, torch.float32))
            lse_BHT = torch.where(counted, lse_BHT, -HIDDEN)
        usable.append(lse_BHT)
    return usable


def _take_heads(
    q_BHTD: Tensor, k_BGTD: Tensor, lse_BHT: Tensor | None, heads_P: list[int]
) -> _Side:
    """The queries of `heads_P` and, one for each, the keys that they attend to."""
    group = q_BHTD.shape[1] // k_BGTD.shape[1]
    lse_BPT = None if lse_BHT is None else lse_BHT[:, heads_P]
    return q_BHTD[:, heads_P], k_BGTD[:, [head // group for head in heads_P]], lse_BPT


def _unfit_for_triton(q_teacher: Tensor, q_student: Tensor) -> str | None:
    if torch.float64 in (q_teacher.dtype, q_student.dtype):
        return "computes in fp32, and an input is float64"
    size = max(q_teacher.shape[3], q_student.shape[3])
    if size > LARGEST_HEAD:
        return f"has tiles for head sizes up to {LARGEST_HEAD}, and one is {size}"
    return None


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
