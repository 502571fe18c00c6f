"""The chain kernel as an operator that torch knows: autograd, fake tensors, torch.compile.

Triton is imported where it runs. (Plain torch needs no operator: it is two calls that autograd and
the compiler know.)
"""

from typing import Any

import torch
from torch import Tensor

from makd_kernels.launching import where_it_is


@torch.library.custom_op("makd_kernels::lowrank_chain", mutates_args=())
def lowrank_chain_op(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x @ down^T @ up^T + bias, x @ down^T) for x (N, K)."""
    from makd_kernels.lowrank_linear import launch

    with where_it_is(x):
        return launch.forward(x, down, up, bias)


@lowrank_chain_op.register_fake
def _(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], up.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@torch.library.custom_op("makd_kernels::lowrank_chain_backward", mutates_args=())
def lowrank_chain_backward_op(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, narrow: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, down and up."""
    from makd_kernels.lowrank_linear import launch

    with where_it_is(x):
        return launch.backward(grad, x, down, up, narrow)


@lowrank_chain_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, narrow: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), down.new_empty(down.shape), up.new_empty(up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, down, up, bias = inputs
    ctx.save_for_backward(x, down, up, output[1])
    ctx.biased = bias is not None
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    if torch.is_grad_enabled():  # this backward is to be differentiated itself: products can be
        x, down, up, _ = ctx.saved_tensors
        grad_narrow = grad @ up
        plain = grad_narrow @ down, grad_narrow.mT @ x, grad.mT @ (x @ down.mT)
        return *plain, grad.sum(0) if ctx.biased else None
    grads = lowrank_chain_backward_op(grad, *ctx.saved_tensors)
    return *grads, grad.sum(0) if ctx.biased else None


lowrank_chain_op.register_autograd(_backward, setup_context=_setup_context)
