"""The linear divergences as operators that torch knows: autograd, fake tensors, torch.compile.

`linear_rows` gives one value per token and makes the logits again in its backward; `linear_loss`
gives their weighted sum, and its gradients as further outputs, which the backward only scales.
"""

# N tokens, D and E hidden sizes of student and teacher, V vocabulary

from typing import Any

import torch
from torch import Tensor

from makd_kernels.linear_divergence.blockwise import Inputs, sweep
from makd_kernels.linear_divergence.settings import RowWeights, Settings


def _sum_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(student.dtype, torch.float32)
    return dtype if teacher is None else torch.promote_types(dtype, teacher.dtype)


@torch.library.custom_op("makd_kernels::linear_rows", mutates_args=())
def linear_rows_op(
    student: Tensor,
    student_head: Tensor,
    labels: Tensor | None,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    divergence: str,
    beta: float,
    alpha: float,
    temperature: float,
    vocab_size: int,
    chunk_bytes: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(cross_entropy_N, divergence_N); zeros for what there is no input for."""
    settings = Settings(divergence, beta, alpha, temperature, vocab_size, chunk_bytes)
    result = sweep(Inputs(student, student_head, labels, teacher, teacher_head), settings, impl)
    if result.divergence_N is None:
        return result.cross_entropy_N, torch.zeros_like(result.cross_entropy_N)
    return result.cross_entropy_N, result.divergence_N


@linear_rows_op.register_fake
def _(
    student: Tensor, student_head: Tensor, labels: Tensor | None, teacher: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    values = student.new_empty(student.shape[0], dtype=_sum_dtype(student, teacher))
    return values, torch.empty_like(values)


@torch.library.custom_op("makd_kernels::linear_rows_backward", mutates_args=())
def linear_rows_backward_op(
    grad_cross_entropy: Tensor,
    grad_divergence: Tensor,
    student: Tensor,
    student_head: Tensor,
    labels: Tensor | None,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    divergence: str,
    beta: float,
    alpha: float,
    temperature: float,
    vocab_size: int,
    chunk_bytes: int | None,
    impl: str,
    need_student: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the student's hidden states and head; empty where not needed."""
    settings = Settings(divergence, beta, alpha, temperature, vocab_size, chunk_bytes)
    inputs = Inputs(student, student_head, labels, teacher, teacher_head)
    weights = RowWeights(grad_cross_entropy, grad_divergence)
    result = sweep(inputs, settings, impl, weights, (need_student, need_head))
    return _or_empty(result.grad_student_ND, student), _or_empty(result.grad_head_VD, student_head)


@linear_rows_backward_op.register_fake
def _(
    grad_cross_entropy: Tensor,
    grad_divergence: Tensor,
    student: Tensor,
    student_head: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return _fake_gradients(student, student_head, *rest[-2:])


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _rows_backward(ctx: Any, grad_ce: Tensor, grad_div: Tensor) -> tuple[Any, ...]:
    need_student, need_head = ctx.needs_input_grad[:2]
    grad_student, grad_head = linear_rows_backward_op(
        grad_ce, grad_div, *ctx.saved_tensors, *ctx.options, need_student, need_head
    )
    labels = teacher = None
    return (
        grad_student if need_student else None,
        grad_head if need_head else None,
        labels,
        teacher,
        teacher,
        *(None for _ in ctx.options),
    )


linear_rows_op.register_autograd(_rows_backward, setup_context=_setup_rows)


@torch.library.custom_op("makd_kernels::linear_loss", mutates_args=())
def linear_loss_op(
    student: Tensor,
    student_head: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    weight: Tensor | None,
    cross_entropy_weight: float,
    divergence_weight: float,
    divergence: str,
    beta: float,
    alpha: float,
    temperature: float,
    vocab_size: int,
    chunk_bytes: int | None,
    impl: str,
    need_student: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, cross_entropy_N, divergence_N, and the gradients less `_common_size`)."""
    settings = Settings(divergence, beta, alpha, temperature, vocab_size, chunk_bytes)
    inputs = Inputs(student, student_head, labels, teacher, teacher_head)
    shares = (cross_entropy_weight, divergence_weight)
    row = student.new_ones(student.shape[0], dtype=_sum_dtype(student, teacher))
    if weight is not None:
        row = weight.to(row.dtype)
    size = _common_size(*shares)
    weights = RowWeights(*(row * (share / size) for share in shares))
    result = sweep(inputs, settings, impl, weights, (need_student, need_head))
    cross_entropy_N = result.cross_entropy_N * row
    divergence_N = torch.zeros_like(row)
    if result.divergence_N is not None:
        divergence_N = result.divergence_N * row
    loss = shares[0] * cross_entropy_N.sum() + shares[1] * divergence_N.sum()
    grad_student = _or_empty(result.grad_student_ND, student)
    return (
        loss,
        cross_entropy_N,
        divergence_N,
        grad_student,
        _or_empty(result.grad_head_VD, student_head),
    )


@linear_loss_op.register_fake
def _(
    student: Tensor, student_head: Tensor, labels: Tensor, teacher: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values = student.new_empty(student.shape[0], dtype=_sum_dtype(student, teacher))
    gradients = _fake_gradients(student, student_head, *rest[-2:])
    return values.new_empty(()), values, torch.empty_like(values), *gradients


@torch.library.custom_op("makd_kernels::scale_", mutates_args=("kept",))
def scale_op(kept: Tensor, grad: Tensor, size: float) -> None:
    """kept *= grad * size: a copy of the head's gradient would cost a tenth of the loss."""
    kept.mul_(grad * size)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needed = inputs[-2:]
    ctx.size = _common_size(*inputs[6:8])
    ctx.rest = len(inputs) - 2
    ctx.handed_over = False
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or a backward makes zeros of the head's size


def _loss_backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Any, ...]:
    if grad is None:
        return (None, None, *(None for _ in range(ctx.rest)))
    if ctx.handed_over:
        raise RuntimeError(
            "linear_cross_entropy_divergence_loss hands its gradient over once; to go backward "
            "twice, use linear_cross_entropy_divergence"
        )
    ctx.handed_over = True
    gradients = []
    for kept, needed in zip(ctx.saved_tensors, ctx.needed, strict=True):
        if needed:
            scale_op(kept, grad, ctx.size)
        gradients.append(kept if needed else None)
    return (*gradients, *(None for _ in range(ctx.rest)))


linear_loss_op.register_autograd(_loss_backward, setup_context=_setup_loss)


def _common_size(cross_entropy_weight: float, divergence_weight: float) -> float:
    """The weights' size, which is left for the backward: fp16 would lose small ones."""
    return max(abs(cross_entropy_weight), abs(divergence_weight)) or 1.0


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


def _fake_gradients(
    student: Tensor, student_head: Tensor, need_student: bool, need_head: bool
) -> tuple[Tensor, Tensor]:
    grad_student = student.new_empty(student.shape if need_student else (0,))
    return grad_student, student_head.new_empty(student_head.shape if need_head else (0,))
