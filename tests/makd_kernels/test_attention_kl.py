"""Attention divergence: equal to the reference, exact at its edges, bounded in memory."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from makd_kernels import attention_kl, attention_kl_loss
from makd_kernels.attention_kl.settings import Settings

blockwise = importlib.import_module("makd_kernels.attention_kl.blockwise")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "probability_mse", "logit_mse")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and several groups of instances at the sizes of a test."""
    monkeypatch.setattr(blockwise, "SHORTEST_BLOCK", 4)
    monkeypatch.setattr(blockwise, "LONGEST_BLOCK", 8)
    monkeypatch.setattr(blockwise, "SLAB_ELEMENTS_CPU", 512)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def inputs(
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    tokens: int = 21,
    size: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, tokens, size), (batch, groups, tokens, size))
    q, k = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return (q * gain).to(dtype), k.to(dtype)


def run(teacher, student, upstream: Tensor | None = None, **options):
    """(values, dq, dk) with an upstream gradient that differs for every value."""
    q, k = (tensor.detach().clone().requires_grad_() for tensor in student)
    values = attention_kl(*teacher, q, k, **options)
    if upstream is None:
        upstream = torch.linspace(-2, 3, values.numel(), dtype=torch.float64).view(values.shape)
    values.backward(upstream.to(values.dtype))
    return values.detach(), q.grad, k.grad


def assert_equals_reference(teacher, student, **options) -> None:
    ours = run(teacher, student, impl="torch", **options)
    reference = run(teacher, student, impl="reference", **options)
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert (ours[0] >= 0).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_reference_at_any_shape(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 29))
    batch = data.draw(st.integers(1, 3))
    heads, teacher_groups, student_groups = data.draw(
        st.sampled_from([(1, 1, 1), (4, 4, 4), (4, 1, 1), (4, 2, 2), (4, 1, 2), (6, 3, 2)])
    )
    causal = data.draw(st.booleans())
    window = data.draw(st.none() | st.integers(1, 31)) if causal else None
    mask = None
    if data.draw(st.booleans()):
        row = st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens)
        mask = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    assert_equals_reference(
        inputs(batch, heads, teacher_groups, tokens, data.draw(st.integers(1, 9)), seed=1),
        inputs(batch, heads, student_groups, tokens, data.draw(st.integers(1, 9)), seed=2),
        causal=causal,
        window=window,
        attention_mask_BT=mask,
        divergence=data.draw(st.sampled_from(DIVERGENCES)),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("gain", [1.0, 10.0, 60.0])
def test_float64_agrees_with_the_reference(divergence: str, gain: float) -> None:
    """Forward to 1e-12, gradients to 1e-10 of their largest entry, at any scale of the scores."""
    teacher, student = inputs(gain=gain, size=16), inputs(gain=gain, size=16, seed=1)
    ours = run(teacher, student, impl="torch", divergence=divergence)
    reference = run(teacher, student, impl="reference", divergence=divergence)
    for one, other, allowed in zip(ours, reference, (1e-12, 1e-10, 1e-10), strict=True):
        assert (one - other).abs().max() <= allowed * other.abs().max()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_that_of_the_values(divergence: str) -> None:
    teacher, student = inputs(1, 2, 1, 9, 3), inputs(1, 2, 1, 9, 4, seed=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0]])

    def values(q: Tensor, k: Tensor) -> Tensor:
        return attention_kl(*teacher, q, k, attention_mask_BT=mask, divergence=divergence, window=4)

    assert torch.autograd.gradcheck(values, [t.requires_grad_() for t in student])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_head_map_averages_pairs_of_heads(divergence: str) -> None:
    teacher, student = inputs(heads=6, groups=3, size=5), inputs(heads=4, groups=2, seed=1)
    head_map = [[0, 1, 5], [2], [2, 4], [3]]
    options = {"head_map": head_map, "divergence": divergence}
    assert_equals_reference(teacher, student, **options)
    values = attention_kl(*teacher, *student, **options)
    for head, others in enumerate(head_map):
        q, k = student[0][:, head : head + 1], student[1][:, head // 2 : head // 2 + 1]
        pairs = [
            attention_kl(
                teacher[0][:, o : o + 1], teacher[1][:, o // 2 : o // 2 + 1], q, k,
                divergence=divergence,
            )
            for o in others
        ]  # fmt: skip
        torch.testing.assert_close(values[:, head : head + 1], sum(pairs) / len(pairs))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_equals_the_shorter_sequence(side: str, divergence: str) -> None:
    teacher, student = inputs(tokens=30), inputs(tokens=30, seed=1)
    real = slice(17, 30) if side == "left" else slice(0, 13)  # the first blocks are all padding
    mask = torch.zeros(2, 30)
    mask[:, real] = 1
    padded = run(
        teacher, student, torch.ones(2, 4, 30), attention_mask_BT=mask, divergence=divergence
    )
    short = run(
        [t[:, :, real] for t in teacher],
        [t[:, :, real] for t in student],
        torch.ones(2, 4, 13),
        divergence=divergence,
    )
    for whole, part in zip(padded, short, strict=True):
        torch.testing.assert_close(whole[:, :, real], part)
        outside = mask[0] == 0
        assert (whole[:, :, outside] == 0).all(), "padding must stay at exactly 0"


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fully_masked_sequence_gives_zero(divergence: str, dtype: torch.dtype) -> None:
    mask = torch.tensor([[0] * 21, [1] * 21])
    teacher, student = inputs(dtype=dtype, gain=9), inputs(dtype=dtype, gain=9, seed=1)
    for tensor in run(teacher, student, attention_mask_BT=mask, divergence=divergence):
        assert tensor.isfinite().all()
        assert (tensor[0] == 0).all() and (tensor[1] != 0).any()


def test_window_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers.masking_utils", reason="needs transformers")
    overlay = transformers.sliding_window_causal_mask_function(5)
    tokens = 12
    reference = importlib.import_module("makd_kernels.attention_kl.reference")
    ours = reference.visible_keys(tokens, True, 5, None, torch.device("cpu"))[0, 0]
    index = [torch.tensor(i) for i in range(tokens)]
    theirs = [[bool(overlay(index[0], index[0], i, j)) for j in index] for i in index]
    assert ours.tolist() == theirs


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identical_inputs_give_exactly_zero(divergence: str, dtype: torch.dtype) -> None:
    same = inputs(tokens=37, dtype=dtype, gain=4)
    mask = torch.ones(2, 37)
    mask[0, :9] = 0
    values, dq, dk = run(same, same, divergence=divergence, attention_mask_BT=mask)
    assert (values == 0).all()
    assert dq.abs().max() < 1e-4 and dk.abs().max() < 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain", [1.0, 60.0])
def test_no_worse_than_eager(divergence: str, dtype: torch.dtype, gain: float) -> None:
    """Per tensor: our largest error is within 1.2 times eager's plus one unit of rounding."""
    teacher = inputs(tokens=33, size=16, dtype=dtype, gain=gain)
    student = inputs(tokens=33, size=16, dtype=dtype, gain=gain, seed=1)
    exact = run(
        [t.double() for t in teacher], [t.double() for t in student],
        impl="reference", divergence=divergence,
    )  # fmt: skip
    ours = run(teacher, student, impl="torch", divergence=divergence)
    eager = run(teacher, student, impl="reference", divergence=divergence)
    for name, truth, one, other in zip(("values", "dq", "dk"), exact, ours, eager, strict=True):
        assert one.isfinite().all()
        error, allowed = ((t.double() - truth).abs().max() for t in (one, other))
        slack = torch.finfo(one.dtype).eps * truth.abs().max()
        assert error <= 1.2 * allowed + slack, f"{name}: {error:.2e} against {allowed:.2e}"
    assert (ours[0] >= 0).all()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_has_the_plain_divergences_at_its_ends(beta: float) -> None:
    plain = "reverse_kl" if beta else "forward_kl"
    for impl in ("torch", "reference"):
        ends, other = (
            run(inputs(), inputs(seed=1), impl=impl, **options)
            for options in ({"divergence": "jsd", "beta": beta}, {"divergence": plain})
        )
        assert all(torch.equal(one, two) for one, two in zip(ends, other, strict=True))


def test_near_copies_are_never_negative() -> None:
    q, k = inputs(tokens=64, dtype=torch.float32, gain=8)
    for divergence in DIVERGENCES:
        near = (q * (1 + 1e-6), k)
        assert (attention_kl(q, k, *near, divergence=divergence) >= 0).all()


def test_a_common_offset_of_the_keys_changes_nothing() -> None:
    """Softmax forgets an offset; fp32 must too, or large key biases would drown the divergence."""
    (q, k), student = inputs(dtype=torch.float32), inputs(dtype=torch.float32, seed=1)
    q_offset = torch.cat([q, torch.full_like(q[..., :1], 64.0)], -1)
    k_offset = torch.cat([k, torch.full_like(k[..., :1], 8.0)], -1)
    plain = attention_kl(q, k, *student, scale_teacher=1.0)
    torch.testing.assert_close(
        attention_kl(q_offset, k_offset, *student, scale_teacher=1.0), plain, rtol=1e-3, atol=2e-4
    )


def test_takes_any_strides_and_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = inputs(), inputs(seed=1)
    as_projected = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (*teacher, *student)]
    assert not as_projected[0].is_contiguous()
    small = run(as_projected[:2], as_projected[2:], torch.ones(1, 1, 1).expand(2, 4, 21))
    monkeypatch.setattr(blockwise, "SLAB_ELEMENTS_CPU", 2**20)
    monkeypatch.setattr(blockwise, "LONGEST_BLOCK", 2**20)
    whole = run(teacher, student, torch.ones(2, 4, 21))
    for one, other in zip(small, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_is_deterministic() -> None:
    teacher, student = inputs(dtype=torch.bfloat16), inputs(dtype=torch.bfloat16, seed=1)
    for one, other in zip(run(teacher, student), run(teacher, student), strict=True):
        assert torch.equal(one, other)


def test_never_holds_a_map() -> None:
    tokens = 256
    teacher, student = inputs(1, 2, 1, tokens, 8), inputs(1, 2, 1, tokens, 8, seed=1)
    choices = Settings(0.3, 0.3, True, None, "forward_kl", 0.5)
    with LargestTensor() as seen:  # it cannot see into an operator, so the operator's parts
        values = blockwise.Sweep(*teacher, *student, None, None, None, choices).values()
        weights = torch.ones_like(values)
        blockwise.Sweep(*teacher, *student, None, None, None, choices).gradients(weights)
    assert seen.largest <= tokens * max(2 * 4, 2 * 8), seen.largest  # R x block x T, H x T x D


def test_the_teacher_never_gets_a_gradient() -> None:
    teacher, student = inputs(), inputs(seed=1)
    for index in (0, 1):
        asking = [t.clone().requires_grad_(i == index) for i, t in enumerate(teacher)]
        with pytest.raises(ValueError, match="teacher"):
            attention_kl(*asking, *student)
        with torch.no_grad():
            assert not attention_kl(*asking, *student).requires_grad


def test_only_what_asks_gets_a_gradient() -> None:
    q, k = inputs(seed=1)
    attention_kl(*inputs(), q.requires_grad_(), k).sum().backward()
    assert q.grad is not None and k.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "fast"}, "auto, reference, torch"),
        ({"divergence": "l2"}, "forward_kl, reverse_kl"),
        ({"window": 3, "causal": False}, "causal"),
        ({"window": 0}, "at least 1"),
        ({"attention_mask_BT": torch.ones(2, 5)}, "attention_mask_BT"),
        ({"head_map": [[0]]}, "each of 4 heads"),
        ({"head_map": [[0], [], [1], [2]]}, "at least one"),
        ({"head_map": [[0], [1], [2], [4]]}, "outside 0..3"),
    ],
)
def test_misuse_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_kl(*inputs(), *inputs(seed=1), **options)


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k = inputs()
    with pytest.raises(ValueError, match="head_map"):
        attention_kl(*inputs(heads=6, groups=3), q, k)
    with pytest.raises(ValueError, match="share batch and tokens"):
        attention_kl(*inputs(tokens=5), q, k)
    with pytest.raises(ValueError, match="student: keys"):
        attention_kl(q, k, q, torch.cat([k, k[:, :1]], 1))
    with pytest.raises(ValueError, match="one float dtype"):
        attention_kl(q, k, q, k.float())


def test_import_brings_torch_alone() -> None:
    kernels = Path(importlib.import_module("makd_kernels").__file__).parents[1]
    code = (
        "import sys, makd_kernels; "
        "bad = {'makd_llm', 'transformers', 'triton'} & set(sys.modules); assert not bad, bad"
    )
    environment = {**os.environ, "PYTHONPATH": str(kernels)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("head_map", [None, [[1, 0], [3], [2, 2], [0]]])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_loss_is_the_weighted_sum_with_its_gradient(
    divergence: str, head_map: list[list[int]] | None, impl: str
) -> None:
    """One sweep for values and gradient, against a sweep for each; for any upstream scalar."""
    teacher, student = inputs(seed=1), inputs(seed=2, groups=4 if head_map else 2)
    mask = torch.ones(2, 21)
    mask[1, 15:] = 0
    weight = torch.linspace(-1, 2, 42, dtype=torch.float64).view(2, 21)
    options = {"divergence": divergence, "head_map": head_map, "attention_mask_BT": mask}
    upstream = (3.0 * weight[:, None]).expand(2, 4, 21)
    expected = run(teacher, student, upstream, impl="reference", **options)
    q, k = (tensor.detach().clone().requires_grad_() for tensor in student)
    found = attention_kl_loss(*teacher, q, k, weight, impl=impl, **options)
    (3.0 * found.loss).backward()
    torch.testing.assert_close(found.values_BHT, expected[0], rtol=1e-10, atol=1e-12)
    total = (expected[0] * weight[:, None]).sum()
    torch.testing.assert_close(found.loss.detach(), total, rtol=1e-10, atol=1e-12)
    for one, other in zip((q.grad, k.grad), expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert not found.values_BHT.requires_grad
    with torch.no_grad():
        silent = attention_kl_loss(*teacher, q, k, weight, impl=impl, **options)
    torch.testing.assert_close(silent.loss, total, rtol=1e-10, atol=1e-12)


def test_the_loss_holds_its_gradient_and_not_its_inputs() -> None:
    teacher, student = inputs(), inputs(seed=3)
    q, k = (tensor.requires_grad_() for tensor in student)
    loss = attention_kl_loss(*teacher, q, k, torch.ones(2, 21)).loss
    saved = [tuple(tensor.shape) for tensor in loss.grad_fn.saved_tensors]
    assert saved == [tuple(q.shape), tuple(k.shape)]
    assert torch.autograd.gradcheck(
        lambda q, k: attention_kl_loss(*teacher, q, k, torch.ones(2, 21)).loss, (q, k)
    )
    with pytest.raises(ValueError, match="weight_BT is"):
        attention_kl_loss(*teacher, q, k, torch.ones(21))
