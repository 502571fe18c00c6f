"""The attention divergence as an operator that torch knows: autograd, fake tensors, torch.compile.

`torch.ops.makd_kernels.attention_kl` returns the values and what its backward needs; the backward
is an operator too. Both run what `impl` names, and Triton is imported only there.
"""

# B batch, H student heads, P pairs of heads, T tokens, D head size

from typing import Any

import torch
from torch import Tensor

from makd_kernels.attention_kl.blockwise import Sweep
from makd_kernels.attention_kl.settings import Settings, in_one_sweep, statistics_of
from makd_kernels.launching import where_it_is


@torch.library.custom_op("makd_kernels::attention_kl", mutates_args=())
def attention_kl_op(
    q_teacher: Tensor,
    k_teacher: Tensor,
    q_student: Tensor,
    k_student: Tensor,
    mask: Tensor | None,
    lse_teacher: Tensor | None,
    lse_student: Tensor | None,
    pair_teacher: list[int],
    pair_counts: list[int],
    scale_teacher: float,
    scale_student: float,
    causal: bool,
    window: int | None,
    divergence: str,
    beta: float,
    impl: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """((B, H, T) divergences, (statistics, B, P, T) and the plain dq for the backward)."""
    settings = Settings(scale_teacher, scale_student, causal, window, divergence, beta)
    tensors = (q_teacher, k_teacher, q_student, k_student, mask)
    if impl == "torch":
        values = Sweep(*tensors, lse_teacher, lse_student, settings).values()
        return values, values.new_empty(0), q_student.new_empty(0)
    from makd_kernels.attention_kl.launch import Call

    call = Call(*tensors, pair_teacher, pair_counts, settings)
    with where_it_is(q_student):
        return call.values(lse_teacher, lse_student, with_gradient)


@attention_kl_op.register_fake
def _(
    q_teacher: Tensor,
    k_teacher: Tensor,
    q_student: Tensor,
    k_student: Tensor,
    mask: Tensor | None,
    lse_teacher: Tensor | None,
    lse_student: Tensor | None,
    pair_teacher: list[int],
    pair_counts: list[int],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *choices, impl, with_gradient = options
    batch, heads, tokens, _ = q_student.shape
    dtype = torch.promote_types(q_teacher.dtype, q_student.dtype)
    values = q_student.new_empty(
        (batch, heads, tokens), dtype=torch.promote_types(dtype, torch.float32)
    )
    if impl == "torch":
        return values, values.new_empty(0), q_student.new_empty(0)
    divergence = Settings(*choices).divergence
    statistics = values.new_empty(statistics_of(divergence), batch, len(pair_teacher), tokens)
    together = lse_student is not None and with_gradient
    together = together and in_one_sweep(divergence, q_student.dtype)
    plain_dq = q_student.new_empty(q_student.shape if together else (0,))
    return values, statistics, plain_dq


@torch.library.custom_op("makd_kernels::attention_kl_backward", mutates_args=())
def attention_kl_backward_op(
    grad: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    q_student: Tensor,
    k_student: Tensor,
    mask: Tensor | None,
    lse_teacher: Tensor | None,
    lse_student: Tensor | None,
    statistics: Tensor,
    plain_dq: Tensor,
    pair_teacher: list[int],
    pair_counts: list[int],
    scale_teacher: float,
    scale_student: float,
    causal: bool,
    window: int | None,
    divergence: str,
    beta: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The student's (dq_BHTD, dk_BGTD), contiguous, for the gradient `grad` of the values."""
    settings = Settings(scale_teacher, scale_student, causal, window, divergence, beta)
    tensors = (q_teacher, k_teacher, q_student, k_student, mask)
    if impl == "torch":
        sweep = Sweep(*tensors, lse_teacher, lse_student, settings)
        return sweep.gradients(grad)[1:]
    from makd_kernels.attention_kl.launch import Call

    call = Call(*tensors, pair_teacher, pair_counts, settings)
    with where_it_is(q_student):
        return call.gradients(grad, statistics, plain_dq)


@attention_kl_backward_op.register_fake
def _(
    grad: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    q_student: Tensor,
    k_student: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return q_student.new_empty(q_student.shape), k_student.new_empty(k_student.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:7], *output[1:])
    *ctx.options, _ = inputs[7:]
    ctx.set_materialize_grads(False)  # or zeros of the size of all that is kept


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * (8 + len(ctx.options))
    dq, dk = attention_kl_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    teacher = mask = lse = with_gradient = None
    options = (None for _ in ctx.options)
    return (teacher, teacher, dq, dk, mask, lse, lse, *options, with_gradient)


attention_kl_op.register_autograd(_backward, setup_context=_setup_context)
