"""The ops as torch knows them: schemas, fake tensors, autograd, and graphs that do not break."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from makd_kernels import (
    attention_kl,
    linear_cross_entropy_divergence_loss,
    linear_divergence,
    lowrank_swiglu,
)
from makd_kernels.attention_kl.op import attention_kl_backward_op, attention_kl_op
from makd_kernels.linear_divergence.op import (
    linear_loss_op,
    linear_rows_backward_op,
    linear_rows_op,
    scale_op,
)
from makd_kernels.lowrank_linear.op import lowrank_chain_backward_op, lowrank_chain_op
from makd_kernels.lowrank_swiglu.op import lowrank_swiglu_backward_op, lowrank_swiglu_op


@pytest.fixture(autouse=True)
def on_the_device(device: str):
    """Tensors are made where the kernels run."""
    with torch.device(device):
        yield


def normal(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())
    return tensor.requires_grad_(grad)


def attention(grad: bool) -> tuple[Tensor, ...]:
    q, k = (2, 2, 9, 8), (2, 1, 9, 8)
    return (
        normal(*q),
        normal(*k, seed=1),
        normal(*q, seed=2, grad=grad),
        normal(*k, seed=3, grad=grad),
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("divergence", "known"),
    [("forward_kl", False), ("forward_kl", True), ("jsd", False), ("logit_mse", False)],
)
def test_attention_kl(impl: str, divergence: str, known: bool) -> None:
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    lse = (normal(2, 2, 9, seed=4) + 9, normal(2, 2, 9, seed=5) + 9) if known else (None, None)
    options = ([0, 1], [1] * 2, 0.3, 0.4, True, None, divergence, 0.5, impl)
    opcheck(attention_kl_op, (*attention(True), mask, *lse, *options, True))
    _, *saved = attention_kl_op(*attention(False), mask, *lse, *options, True)
    given = (normal(2, 2, 9), *attention(False), mask, *lse, *saved, *options)
    opcheck(attention_kl_backward_op, given)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("teacher", [True, False])
def test_linear_divergence(teacher: bool, impl: str) -> None:
    sides = (normal(5, 6, seed=2), normal(30, 6, seed=3)) if teacher else (None, None)
    labels = torch.tensor([1, -100, 3, 27, 0])
    options = ("forward_kl", 0.5, 0.1, 1.0, 28, None, impl)
    student = normal(5, 4, grad=True), normal(28, 4, seed=1, grad=True)
    opcheck(linear_rows_op, (*student, labels, *sides, *options))
    fixed = tuple(t.detach() for t in student)
    grads = (normal(5, seed=4), normal(5, seed=5))
    opcheck(linear_rows_backward_op, (*grads, *fixed, labels, *sides, *options, True, False))
    loss_options = (normal(5, seed=6), 0.3, 1.7, *options, True, True)
    # its backward scales the gradients where they are, which a traced graph has no way to say
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(linear_loss_op, (*student, labels, *sides, *loss_options), test_utils=checks)
    opcheck(scale_op, (normal(3), torch.tensor(2.0), 0.5))


def test_lowrank_chain() -> None:
    x, down, up, bias = (
        normal(*shape, seed=i, grad=True) for i, shape in enumerate(((5, 4), (2, 4), (7, 2), (7,)))
    )
    opcheck(lowrank_chain_op, (x, down, up, bias))
    fixed = [t.detach() for t in (x, down, up)]
    opcheck(lowrank_chain_backward_op, (normal(5, 7), *fixed, normal(5, 2)))


def test_a_backward_goes_through_the_backward_of_the_chain() -> None:
    """AD-KD's exact way: the slope of a gradient, which goes through both factors and x."""

    def slopes(apply: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        tensors = [
            normal(*shape, seed=i, grad=True) for i, shape in enumerate(((5, 4), (2, 4), (7, 2)))
        ]
        score = apply(*tensors).sin().sum()
        (gradient,) = torch.autograd.grad(score, tensors[0], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), tensors)

    chained = slopes(lambda x, down, up: lowrank_chain_op(x, down, up, None)[0])
    for one, other in zip(chained, slopes(lambda x, d, u: x @ d.mT @ u.mT), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_lowrank_swiglu(impl: str) -> None:
    shapes = ((5, 4), (2, 4), (7, 2), (3, 4), (7, 3))
    tensors = [normal(*shape, seed=i, grad=True) for i, shape in enumerate(shapes)]
    opcheck(lowrank_swiglu_op, (*tensors, impl))
    fixed = [t.detach() for t in tensors]
    narrow = (normal(5, 2), normal(5, 3))
    opcheck(lowrank_swiglu_backward_op, (normal(5, 7), *fixed, *narrow, impl))


def all_ops(
    teacher: tuple[Tensor, Tensor], q: Tensor, k: Tensor, hidden: Tensor, head: Tensor
) -> Tensor:
    """A loss that calls every op between plain arithmetic."""
    loss = attention_kl(*teacher, q * 2.0, k).mean()
    x = hidden * 0.5
    loss = loss + linear_divergence(x, head, x.detach() + 0.1, head.detach()).sum()
    labels = torch.arange(x.shape[0])
    whole = linear_cross_entropy_divergence_loss(x, head, labels, x.detach(), head.detach())
    gate = (head[:3], head[:, :3])
    return loss + whole.loss + lowrank_swiglu(x, gate, gate, impl="torch").square().mean()


def test_a_compiled_graph_has_no_break_and_the_same_gradients() -> None:
    q_teacher, k_teacher, q, k = attention(True)
    hidden, head = normal(5, 6, seed=7, grad=True), normal(11, 6, seed=8, grad=True)
    leaves = (q, k, hidden, head)
    eager = all_ops((q_teacher, k_teacher), *leaves)
    expected = torch.autograd.grad(eager, leaves)
    compiled = torch.compile(all_ops, backend="aot_eager", fullgraph=True)
    loss = compiled((q_teacher, k_teacher), *leaves)
    torch.testing.assert_close(loss, eager)
    for one, other in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(one, other)
