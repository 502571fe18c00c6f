"""Low-rank products: equal to two plain matmuls, forward and backward, at any shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from makd_kernels import lowrank_linear, lowrank_linear_packed, lowrank_swiglu
from makd_kernels.lowrank_linear import explain
from makd_kernels.lowrank_swiglu import blockwise
from makd_kernels.lowrank_swiglu import explain as explain_swiglu
from makd_llm.testing import assert_no_worse_than_eager


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows at the sizes of a test."""
    monkeypatch.setattr(blockwise, "BLOCK_ROWS_CPU", 3)


def factors(
    inputs: int, rank: int, outputs: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    up = torch.randn(outputs, rank, generator=generator, dtype=torch.float64) / rank**0.5
    return down.to(dtype), up.to(dtype)


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(function, *tensors: Tensor, **options) -> tuple[Tensor, ...]:
    """Output and the gradients of all tensors, under an upstream gradient that varies."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    out.backward(upstream.to(out.dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)


def swiglu(x: Tensor, *four: Tensor, **options) -> Tensor:
    return lowrank_swiglu(x, four[:2], four[2:], **options)


def assert_all_close(ours, reference) -> None:
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


SIZES = st.integers(1, 13)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 20), inputs=SIZES, rank=SIZES, outputs=SIZES, bias=st.booleans())
def test_linear_equals_reference(tokens, inputs, rank, outputs, bias) -> None:
    tensors = [rows(tokens, inputs), *factors(inputs, rank, outputs, 1)]
    if bias:
        tensors.append(rows(outputs))
    ours, reference = (run(lowrank_linear, *tensors, impl=i) for i in ("torch", "reference"))
    assert_all_close(ours, reference)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 20), inputs=SIZES, gate=SIZES, up=SIZES, outputs=SIZES)
def test_swiglu_equals_reference(tokens, inputs, gate, up, outputs) -> None:
    tensors = (
        rows(tokens, inputs), *factors(inputs, gate, outputs, 1), *factors(inputs, up, outputs, 2),
    )  # fmt: skip
    ours, reference = (run(swiglu, *tensors, impl=i) for i in ("torch", "reference"))
    assert_all_close(ours, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_no_worse_than_eager(dtype: torch.dtype) -> None:
    tensors = (rows(50, 24), *factors(24, 8, 40, 1), *factors(24, 6, 40, 2))
    low = [t.to(dtype) for t in tensors]
    exact = run(swiglu, *(t.double() for t in low), impl="reference")
    ours, eager = (run(swiglu, *low, impl=impl) for impl in ("torch", "reference"))
    for one, other, truth in zip(ours, eager, exact, strict=True):
        assert_no_worse_than_eager(one, other, truth)


def test_leading_dimensions_and_strides_are_kept() -> None:
    x, gate, up = rows(3, 2, 10), factors(10, 4, 7, 1), factors(10, 5, 7, 2)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert lowrank_linear(x, *gate).shape == (3, 2, 7)
    blocks = lowrank_swiglu(strided, gate, up, impl="torch")
    torch.testing.assert_close(blocks, lowrank_swiglu(x, gate, up, impl="reference"))


def test_autocast_does_what_it_does_to_a_linear_layer() -> None:
    x, (down, up) = rows(4, 10).float(), (t.float() for t in factors(10, 4, 7, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lowrank_linear(x.bfloat16(), down, up)
        expected = torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_packed_equals_one_by_one() -> None:
    x = rows(9, 10)
    matrices = [factors(10, rank, outputs, rank) for rank, outputs in ((4, 12), (2, 6), (3, 6))]
    biases = [rows(12), None, None]
    down = torch.cat([down for down, _ in matrices])
    ups = [up for _, up in matrices]
    together = lowrank_linear_packed(x, down, ups, biases)
    for (down_RK, up_MR), bias, out in zip(matrices, biases, together, strict=True):
        torch.testing.assert_close(out, lowrank_linear(x, down_RK, up_MR, bias, impl="reference"))
    with pytest.raises(ValueError, match="together 9"):
        lowrank_linear_packed(x, down[1:], ups)


def test_swiglu_keeps_no_wide_tensor() -> None:
    x, gate, up = rows(64, 8), factors(8, 2, 100, 1), factors(8, 3, 100, 2)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        lowrank_swiglu(x.requires_grad_(), gate, up, impl="torch").sum()
    assert max(kept) <= max(64 * 8, 100 * 3), kept


def test_the_way_is_explained() -> None:
    assert explain(4096, 576, 144, 1536).name == "pair"
    high = explain(4096, 576, 500, 1536)
    assert high.name == "dense" and "rank 500" in high.why
    assert explain(2, 576, 500, 1536).name == "pair", "two rows do not pay for the product"
    assert explain(2**15, 576, 64, 1536, "triton").name == "chain"
    assert explain(2**15, 576, 64, 1536, "triton", torch.float32).name == "pair"
    assert explain(2048, 576, 64, 1536, "triton").name == "pair", "too few tiles for the chip"


def test_the_way_of_swiglu_is_explained() -> None:
    assert explain_swiglu(64, 64).name == "pair", "on a CPU the fused way is slower"
    assert explain_swiglu(64, 128, "triton").name == "fused"
    high = explain_swiglu(64, 512, "triton")
    assert high.name == "pair" and "rank 512" in high.why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": rows(4, 9)}, "10 inputs"),
        ({"x": rows(4, 10).float()}, "one float dtype"),
        ({"gate": factors(10, 3, 8, 1)}, "gate has 8 outputs, up 7"),
        ({"up": (rows(4, 10), rows(7, 5))}, "up: down"),
        ({"impl": "fast"}, "auto, reference, torch"),
    ],
)
def test_misuse_is_named(change: dict, message: str) -> None:
    given = {"x": rows(4, 10), "gate": factors(10, 4, 7, 1), "up": factors(10, 5, 7, 2)} | change
    with pytest.raises(ValueError, match=message):
        lowrank_swiglu(given.pop("x"), given.pop("gate"), given.pop("up"), **given)
