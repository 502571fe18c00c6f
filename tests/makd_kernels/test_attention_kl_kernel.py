"""The Triton kernels of the attention divergence: on the GPU, or through Triton's interpreter.

Every result is held to the error that eager attention maps make in the same dtype.
"""

import pytest
import torch
from torch import Tensor

from makd_kernels import attention_kl
from makd_kernels.attention_kl.settings import DIVERGENCES
from makd_llm.testing import assert_no_worse_than_eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    device: str,
    heads: int = 2,
    groups: int = 1,
    tokens: int = 21,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gain: float = 1.0,
    batch: int = 1,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, n, tokens, size, generator=generator) for n in (heads, groups))
    return (q * gain).to(device, dtype), k.to(device, dtype)


def run(teacher, student, **options) -> tuple[Tensor, Tensor, Tensor]:
    """(values, dq, dk) with an upstream gradient that differs for every value."""
    q, k = (tensor.detach().clone().requires_grad_() for tensor in student)
    values = attention_kl(*teacher, q, k, **options)
    upstream = torch.linspace(-2, 3, values.numel(), dtype=values.dtype, device=values.device)
    values.backward(upstream.view(values.shape))
    return values.detach(), q.grad, k.grad


def assert_right(teacher, student, slack: float = 2.0, **options) -> tuple[Tensor, ...]:
    ours = run(teacher, student, impl="triton", **options)
    eager = run(teacher, student, impl="reference", **options)
    exact = run(
        [t.double() for t in teacher], [t.double() for t in student], impl="reference", **options
    )
    for one, other, truth in zip(ours, eager, exact, strict=True):
        cut_off = one.dtype == torch.bfloat16 and one.device.type == "cpu"
        # the interpreter rounds to bf16 by cutting off
        assert_no_worse_than_eager(one, other, truth, slack=2 * slack if cut_off else slack)
    assert (ours[0] >= 0).all()
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_worse_than_eager(device: str, divergence: str, dtype: torch.dtype) -> None:
    teacher = inputs(device, dtype=dtype)
    student = inputs(device, dtype=dtype, seed=1)
    assert_right(teacher, student, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("gain", [10.0, 60.0])
def test_large_scores(device: str, divergence: str, gain: float) -> None:
    teacher, student = inputs(device, gain=gain), inputs(device, gain=gain, seed=1)
    assert_right(teacher, student, slack=3.0, divergence=divergence)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 5},
        {"window": 18},
        {"scale_teacher": 0.3, "scale_student": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_visibility_and_scales(device: str, divergence: str, options: dict) -> None:
    assert_right(inputs(device), inputs(device, seed=1), divergence=divergence, **options)


@pytest.mark.parametrize(
    ("teacher", "student", "head_map"),
    [
        ((4, 4, 16), (4, 1, 24), None),
        ((4, 2, 40), (4, 4, 16), None),
        ((6, 3, 16), (4, 2, 32), [[0, 1, 5], [2], [2, 4], [3]]),
    ],
    ids=["one key head, size 24", "grouped teacher, size 40", "pairs of heads"],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_heads_of_any_number_and_size(
    device: str, divergence: str, teacher: tuple, student: tuple, head_map: list | None
) -> None:
    def side(heads: int, groups: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        return inputs(device, heads, groups, 19, size, seed=seed)

    options = {"divergence": divergence, "head_map": head_map}
    assert_right(side(*teacher, 0), side(*student, 1), **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_on_either_side(device: str, divergence: str, causal: bool) -> None:
    """The first tile is all padding in one sequence, the last in the other."""
    mask = torch.ones(2, 37, device=device)
    mask[0, :19] = 0
    mask[1, 11:] = 0
    options = {"divergence": divergence, "causal": causal, "attention_mask_BT": mask}
    teacher, student = (
        inputs(device, tokens=37, batch=2),
        inputs(device, tokens=37, batch=2, seed=1),
    )
    ours = assert_right(teacher, student, **options)
    for tensor in ours:
        assert (tensor[0, :, :19] == 0).all() and (tensor[1, :, 11:] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_fully_masked_sequence_gives_zero(device: str, divergence: str) -> None:
    mask = torch.tensor([[0] * 21, [1] * 21], device=device)
    teacher, student = inputs(device, gain=9, batch=2), inputs(device, gain=9, batch=2, seed=1)
    options = {"divergence": divergence, "attention_mask_BT": mask, "impl": "triton"}
    for tensor in run(teacher, student, **options):
        assert tensor.isfinite().all()
        assert (tensor[0] == 0).all() and (tensor[1] != 0).any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_inputs_give_exactly_zero(
    device: str, divergence: str, dtype: torch.dtype
) -> None:
    same = inputs(device, dtype=dtype, gain=4)
    values, dq, dk = run(same, same, divergence=divergence, impl="triton")
    assert (values == 0).all()
    assert dq.abs().max() < 1e-4 and dk.abs().max() < 1e-4


def test_any_strides_and_unwritten_outputs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are made of NaN before the kernels run: every entry must be written."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    teacher, student = inputs(device, 4, 2), inputs(device, 4, 2, seed=1)
    expected = run(teacher, student, impl="triton")
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (*teacher, *student)]
    strided[0] = strided[0].transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided[0].is_contiguous() and not strided[3].is_contiguous()
    monkeypatch.setattr(torch, "empty", poisoned)
    for one, other in zip(run(strided[:2], strided[2:], impl="triton"), expected, strict=True):
        assert torch.equal(one, other)


def test_is_deterministic(device: str) -> None:
    teacher, student = inputs(device, 4, 1, 37), inputs(device, 4, 1, 37, seed=1)
    first, second = (run(teacher, student, impl="triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.9, 1.0])
def test_jsd_has_the_plain_divergences_at_its_ends(device: str, beta: float) -> None:
    assert_right(inputs(device), inputs(device, seed=1), divergence="jsd", beta=beta)


def test_no_tokens_are_no_launch(device: str) -> None:
    values, dq, dk = run(inputs(device, tokens=0), inputs(device, tokens=0), impl="triton")
    assert values.shape == (1, 2, 0) and dq.numel() == dk.numel() == 0


def test_dtypes_of_the_sides_may_differ(device: str) -> None:
    assert_right(inputs(device, dtype=torch.bfloat16), inputs(device, seed=1), slack=3.0)


def test_float64_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="float64"):
        run([t.double() for t in inputs(device)], inputs(device), impl="triton")
