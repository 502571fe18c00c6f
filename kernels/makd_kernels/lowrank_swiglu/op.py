"""Low-rank SwiGLU as an operator that torch knows: autograd, fake tensors, torch.compile."""

from typing import Any

import torch
from torch import Tensor

from makd_kernels.launching import where_it_is
from makd_kernels.lowrank_swiglu import blockwise


@torch.library.custom_op("makd_kernels::lowrank_swiglu", mutates_args=())
def lowrank_swiglu_op(
    x: Tensor, gate_down: Tensor, gate_up: Tensor, up_down: Tensor, up_up: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (N, M), x @ gate_down^T, x @ up_down^T)."""
    if impl == "torch":
        return blockwise.forward(x, gate_down, gate_up, up_down, up_up)
    from makd_kernels.lowrank_swiglu import launch

    with where_it_is(x):
        return launch.forward(x, gate_down, gate_up, up_down, up_up)


@lowrank_swiglu_op.register_fake
def _(
    x: Tensor, gate_down: Tensor, gate_up: Tensor, up_down: Tensor, up_up: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    widths = (gate_up.shape[0], gate_down.shape[0], up_down.shape[0])
    y, gate, up = (x.new_empty(x.shape[0], width) for width in widths)
    return y, gate, up


@torch.library.custom_op("makd_kernels::lowrank_swiglu_backward", mutates_args=())
def lowrank_swiglu_backward_op(
    grad: Tensor,
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    up_down: Tensor,
    up_up: Tensor,
    gate: Tensor,
    up: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_down, gate_up, up_down and up_up, contiguous."""
    if impl == "torch":
        return blockwise.backward(grad, x, gate_down, gate_up, up_down, up_up, gate, up)
    from makd_kernels.lowrank_swiglu import launch

    with where_it_is(x):
        return launch.backward(grad, x, gate_down, gate_up, up_down, up_up, gate, up)


@lowrank_swiglu_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    up_down: Tensor,
    up_up: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d, e = (t.new_empty(t.shape) for t in (x, gate_down, gate_up, up_down, up_up))
    return a, b, c, d, e


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    grads = lowrank_swiglu_backward_op(grad, *ctx.saved_tensors, ctx.impl)
    impl = None
    return (*grads, impl)


lowrank_swiglu_op.register_autograd(_backward, setup_context=_setup_context)
