"""The Triton kernels of the low-rank products: on the GPU, or through Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from makd_kernels import lowrank_linear, lowrank_swiglu
from makd_llm.testing import assert_no_worse_than_eager


def normal(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)


def run(function, *tensors: Tensor, **options) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    out.backward(
        torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    )
    return out.detach(), *(leaf.grad for leaf in leaves)


def swiglu(x: Tensor, *four: Tensor, **options) -> Tensor:
    return lowrank_swiglu(x, four[:2], four[2:], **options)


def assert_right(function, tensors: list[Tensor]) -> None:
    ours = run(function, *tensors, impl="triton")
    eager = run(function, *tensors, impl="reference")
    exact = run(function, *(t.double() for t in tensors), impl="reference")
    cut_off = tensors[0].dtype == torch.bfloat16 and tensors[0].device.type == "cpu"
    for one, other, truth in zip(ours, eager, exact, strict=True):
        # the interpreter rounds to bf16 by cutting off, sixteen times a matmul
        assert_no_worse_than_eager(one, other, truth, slack=4.0 if cut_off else 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [5, 16, 40])
def test_chain_is_no_worse_than_eager(
    device: str, rank: int, bias: bool, dtype: torch.dtype
) -> None:
    tensors = [
        normal(device, dtype, 37, 24),
        normal(device, dtype, rank, 24, seed=1),
        normal(device, dtype, 19, rank, seed=2),
    ]
    if bias:
        tensors.append(normal(device, dtype, 19, seed=3))
    assert_right(lowrank_linear, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(16, 16), (5, 33)])
def test_swiglu_is_no_worse_than_eager(
    device: str, ranks: tuple[int, int], dtype: torch.dtype
) -> None:
    gate, up = ranks
    tensors = [
        normal(device, dtype, 21, 24),
        normal(device, dtype, gate, 24, seed=1),
        normal(device, dtype, 35, gate, seed=2),
        normal(device, dtype, up, 24, seed=3),
        normal(device, dtype, 35, up, seed=4),
    ]
    assert_right(swiglu, tensors)


def test_is_deterministic(device: str) -> None:
    shapes = ((33, 24), (8, 24), (35, 8), (8, 24), (35, 8))
    tensors = [normal(device, torch.bfloat16, *shape, seed=i) for i, shape in enumerate(shapes)]
    for function, given in ((lowrank_linear, tensors[:3]), (swiglu, tensors)):
        first, second = (run(function, *given, impl="triton") for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_the_kernels_cannot_take_is_named(device: str) -> None:
    x, down, up = (
        normal(device, torch.float32, 4, 8),
        *(normal(device, torch.float32, *shape) for shape in ((300, 8), (6, 300))),
    )
    with pytest.raises(ValueError, match="rank 300"):
        lowrank_linear(x, down, up, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        swiglu(*(t.double() for t in (x, down, up, down, up)), impl="triton")
