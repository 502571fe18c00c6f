"""Norm and SwiGLU against plain torch: values, first and second gradients, and what is kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from makd_kernels import lean, lowrank_linear
from makd_kernels.lean import (
    keeping_less,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)

# Of the reference in the same dtype: sums are taken in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def assert_close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for ours, reference in zip(found, wanted, strict=True):
        assert ours.dtype == reference.dtype == dtype
        most = reference.abs().max().item()
        torch.testing.assert_close(ours, reference, rtol=0, atol=TOLERANCE[dtype] * most)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (3, 7, 24), (1, 24), (700, 400)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [numbers(*shape, dtype=dtype), numbers(shape[-1], dtype=dtype, seed=1)]
    grad = numbers(*shape, dtype=dtype, seed=2).detach()
    results = []
    for function in (rms_norm, rms_norm_reference):
        y = function(*inputs, 1e-5)
        results.append([y, *torch.autograd.grad(y, inputs, grad)])
    assert_close(*results, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (3, 7, 24), (700, 400)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [numbers(*shape, dtype=dtype, seed=seed) for seed in (0, 1)]
    grad = numbers(*shape, dtype=dtype, seed=2).detach()
    results = []
    for function in (swiglu, swiglu_reference):
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, grad)])
    assert_close(*results, dtype)


def test_first_and_second_derivatives() -> None:
    x, weight = numbers(3, 5), numbers(5, seed=1)
    for function, inputs in (
        (lambda x, w: rms_norm(x, w, 1e-5), (x, weight)),
        (lambda g, u: swiglu(g, u), (numbers(3, 5), numbers(3, 5, seed=1))),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_what_is_not_asked_for_gets_no_gradient() -> None:
    x, weight = numbers(3, 5), numbers(5, seed=1).detach()
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(5, dtype=torch.float64)])
def test_a_weight_that_does_not_fit_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(torch.ones(2, 5), weight, 1e-5)


def test_sides_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="must be alike"):
        swiglu(torch.ones(2, 5), torch.ones(2, 4))


class Layer:
    """A norm, three products of it, SwiGLU of two, and a product of that."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        shapes = [(24,), (4, 24), (16, 4), (4, 24), (40, 4), (4, 24), (40, 4), (4, 40), (24, 4)]
        self.weights = [numbers(*s, dtype=dtype, seed=n) for n, s in enumerate(shapes)]
        self.bias = numbers(16, dtype=dtype, seed=20)

    def __call__(self, x: Tensor) -> Tensor:
        norm, *factors = self.weights
        normed = rms_norm(x, norm, 1e-5)
        query = lowrank_linear(normed, *factors[:2], self.bias)
        gate, up = (lowrank_linear(normed, *pair) for pair in (factors[2:4], factors[4:6]))
        out = lowrank_linear(swiglu(gate, up), *factors[6:])
        return torch.cat([out + x, query], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_keeping_less_changes_no_bit(dtype: torch.dtype) -> None:
    layer, x = Layer(dtype), numbers(2, 9, 24, dtype=dtype, seed=9)
    asked = [x, *layer.weights, layer.bias]
    plain = layer(x)
    with keeping_less():
        less = layer(x)
    assert torch.equal(plain, less)
    both = (torch.autograd.grad(y.square().sum(), asked) for y in (plain, less))
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


def kept(run: Callable[[], Tensor]) -> int:
    """Bytes that a result's backward keeps."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize(("whole", "numbers_less"), [(True, 24 + 40 + 40), (False, 24 + 40)])
def test_outputs_of_norm_gate_and_up_are_not_kept(whole: bool, numbers_less: int) -> None:
    layer, x = Layer(), numbers(512, 24, seed=9)
    plain = kept(lambda: layer(x))

    def less() -> Tensor:
        with keeping_less(whole_weights=whole):
            return layer(x)

    saved = plain - kept(less)
    assert saved == pytest.approx(512 * 8 * numbers_less, abs=512)  # but a copy of a weight


def test_up_is_made_again_once_for_both_that_need_it() -> None:
    """The product behind the gate, and the gate's own backward: one more product, 2 N R M."""
    layer, x = Layer(), numbers(6, 24, seed=9)
    flops = []
    for whole in (False, True):
        with keeping_less(whole_weights=whole):
            result = layer(x)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(result.square().sum(), [x, *layer.weights])
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 2 * 6 * 4 * 40


def test_a_gradient_through_up_is_not_differentiated_again() -> None:
    """Wrongly, which would be in silence: what is made again has no history."""
    layer, x = Layer(), numbers(6, 24, seed=9)
    with keeping_less():
        result = layer(x)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
        grad.square().sum().backward()


def test_a_part_of_a_noted_tensor_is_kept_itself() -> None:
    layer, x = Layer(), numbers(6, 24, seed=9)
    factors = layer.weights[1:3]
    with keeping_less():
        normed = rms_norm(x, layer.weights[0], 1e-5)
        assert lean.note_of(normed) is not None
        for part in (normed[:3], normed.T, normed.detach()):
            assert lean.note_of(part) is None
        found = torch.autograd.grad(lowrank_linear(normed[:3], *factors).sum(), x)
    wanted = torch.autograd.grad(
        lowrank_linear(rms_norm_reference(x, layer.weights[0], 1e-5)[:3], *factors).sum(), x
    )
    torch.testing.assert_close(found, wanted)
    assert lean.note_of(normed) is None  # outside


def test_notes_hold_nothing_after_the_forward() -> None:
    layer, x = Layer(), numbers(64, 24, seed=9)
    with keeping_less():
        normed = rms_norm(x, layer.weights[0], 1e-5)
        note = lean.note_of(normed)
        assert note is not None and len(note.tensors) == 2
    assert note.tensors == ()


def test_an_address_that_is_used_again_has_no_old_note() -> None:
    weight = numbers(24, seed=1)
    with keeping_less():
        for seed in range(50):
            x = numbers(64, 24, seed=seed)
            normed = rms_norm(x, weight, 1e-5)
            del normed
            other = x * 2
            assert lean.note_of(other) is None
            del other
