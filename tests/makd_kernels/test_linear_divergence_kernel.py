"""The Triton kernel of the linear divergence: on the GPU, or through Triton's interpreter.

Every result is held to the error that whole logits in the same dtype make.
"""

import pytest
import torch
from torch import Tensor

from makd_kernels import (
    linear_cross_entropy_divergence,
    linear_cross_entropy_divergence_loss,
    linear_divergence,
)
from makd_llm.testing import assert_no_worse_than_eager

TOKENS, VOCAB = 9, 100  # two tiles of the interpreter's 64
DIVERGENCES = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "beta": 0.1},
    {"divergence": "jsd", "beta": 1.0},
    {"divergence": "skew_forward_kl", "alpha": 0.1},
    {"divergence": "skew_reverse_kl", "alpha": 0.1},
    {"divergence": "skew_reverse_kl", "alpha": 0.0},
    {"divergence": "tvd"},
]


def problem(
    device: str, dtype: torch.dtype = torch.float32, gain: float = 1.0, same: bool = False
) -> tuple[Tensor, ...]:
    """(student hidden, student head, teacher hidden, teacher head); heads are padded."""
    generator = torch.Generator().manual_seed(3)

    def side(size: int, padding: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(TOKENS, size, generator=generator) * gain
        head = torch.randn(VOCAB + padding, size, generator=generator) / size**0.5
        return hidden.to(device, dtype), head.to(device, dtype)

    student = side(16, 2)
    return *student, *(student if same else side(24, 5))


def labels(device: str) -> Tensor:
    found = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(5))
    found[::4] = -100
    return found.to(device)


def run(op: str, tensors: tuple[Tensor, ...], **options) -> tuple[Tensor, ...]:
    """Values and the student's gradients, under upstream gradients that differ."""
    hidden, head = (t.detach().clone().requires_grad_() for t in tensors[:2])
    label_N = labels(hidden.device.type)
    options["vocab_size"] = VOCAB
    if op == "rows":
        pair = linear_cross_entropy_divergence(hidden, head, label_N, *tensors[2:], **options)
        count = torch.arange(TOKENS, device=hidden.device, dtype=pair[0].dtype)
        ((pair[0] * count.cos()).sum() + (pair[1] * count.sin()).sum()).backward()
        values = pair
    else:
        weight_N = torch.linspace(0, 2, TOKENS, device=hidden.device)
        values = linear_cross_entropy_divergence_loss(
            hidden, head, label_N, *tensors[2:], weight_N=weight_N,
            cross_entropy_weight=0.3, divergence_weight=1.7, **options,
        )  # fmt: skip
        (values.loss * 3.5).backward()
    return *(v.detach() for v in values), hidden.grad, head.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
@pytest.mark.parametrize(("op", "temperature"), [("rows", 1.0), ("loss", 2.0)])
def test_no_worse_than_eager(
    device: str, op: str, options: dict, temperature: float, dtype: torch.dtype
) -> None:
    tensors = problem(device, dtype)
    options = {"temperature": temperature, **options}
    chunk_bytes = 4 * VOCAB * 2 * dtype.itemsize  # four tokens
    ours = run(op, tensors, impl="triton", chunk_bytes=chunk_bytes, **options)
    eager = run(op, tensors, impl="reference", **options)
    exact = run(op, tuple(t.double() for t in tensors), impl="reference", **options)
    slack = 4.0  # of few tokens, eager's largest error is a matter of luck; bf16 is cut off here
    for one, other, truth in zip(ours, eager, exact, strict=True):
        assert_no_worse_than_eager(one, other, truth, slack=slack)


@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
@pytest.mark.parametrize("gain", [1e-3, 60.0])
def test_extreme_logits_stay_finite_and_nonnegative(
    device: str, options: dict, gain: float
) -> None:
    tensors = problem(device, torch.float16, gain)
    values, *grads = run("loss", tensors, impl="triton", **options)[2:]
    assert values.isfinite().all() and (values >= 0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
def test_identical_sides_give_exactly_zero(device: str, options: dict) -> None:
    tensors = problem(device, torch.bfloat16, gain=8, same=True)
    values = linear_divergence(*tensors, impl="triton", temperature=2.0, **options)
    assert (values == 0).all()


def test_without_teacher_it_is_cross_entropy(device: str) -> None:
    tensors = problem(device)[:2]
    ours, eager = (
        linear_cross_entropy_divergence(*tensors, labels(device), impl=impl, vocab_size=VOCAB)[0]
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("op", ["rows", "loss"])
def test_is_deterministic(device: str, op: str) -> None:
    tensors = problem(device, torch.bfloat16)
    first, second = (run(op, tensors, impl="triton", divergence="jsd") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
