"""The Triton kernels of the attention divergence: on the GPU, or through Triton's interpreter.

Every result is held to the error that eager attention maps make in the same dtype.
"""

import pytest
import torch
from torch import Tensor

from makd_kernels import attention_kl
from makd_kernels.attention_kl.op import attention_kl_op
from makd_kernels.attention_kl.reference import visible_keys
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


def assert_right(
    teacher, student, slack: float = 2.0, impl: str = "triton", given: dict | None = None, **options
) -> tuple[Tensor, ...]:
    """`given`: what ours is told beside what the others are."""
    ours = run(teacher, student, impl=impl, **(given or {}), **options)
    eager = run(teacher, student, impl="reference", **options)
    exact = run(
        [t.double() for t in teacher], [t.double() for t in student], impl="reference", **options
    )
    for one, other, truth in zip(ours, eager, exact, strict=True):
        cut_off = impl == "triton" and one.dtype == torch.bfloat16 and one.device.type == "cpu"
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


# where attention's own log-sum-exps are given: the same results in fewer sweeps, in torch too


def log_sum_exp(side: tuple[Tensor, Tensor], mask: Tensor | None, causal: bool) -> Tensor:
    """What flash attention returns beside its output: -inf where a query sees no key."""
    q, k = (tensor.float() for tensor in side)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    visible = visible_keys(q.shape[2], causal, None, mask, q.device)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return scores.logsumexp(-1)


def given_for(teacher, student, mask: Tensor | None = None, causal: bool = True) -> dict:
    return {
        "log_sum_exp_teacher_BHT": log_sum_exp(teacher, mask, causal),
        "log_sum_exp_student_BHT": log_sum_exp(student, mask, causal),
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_given_log_sum_exps(device: str, impl: str, divergence: str, causal: bool) -> None:
    teacher, student = inputs(device, batch=2), inputs(device, batch=2, seed=1)
    given = given_for(teacher, student, causal=causal)
    options = {"divergence": divergence, "causal": causal}
    assert_right(teacher, student, slack=3.0, impl=impl, given=given, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_given_log_sum_exps_in_half_precision(device: str, impl: str, dtype: torch.dtype) -> None:
    teacher, student = inputs(device, dtype=dtype), inputs(device, dtype=dtype, seed=1)
    assert_right(teacher, student, slack=3.0, impl=impl, given=given_for(teacher, student))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_given_log_sum_exps_are_not_finite_in_padding(
    device: str, impl: str, divergence: str
) -> None:
    mask = torch.ones(2, 21, device=device)
    mask[0, :18] = 0
    mask[1, 5:] = 0
    teacher, student = inputs(device, batch=2), inputs(device, batch=2, seed=1)
    given = given_for(teacher, student, mask)
    assert given["log_sum_exp_teacher_BHT"].isinf().any()
    options = {"divergence": divergence, "attention_mask_BT": mask}
    assert_right(teacher, student, slack=3.0, impl=impl, given=given, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_given_log_sum_exps_of_pairs_of_heads(device: str, impl: str, divergence: str) -> None:
    teacher = inputs(device, 6, 3, batch=2)
    student = inputs(device, 4, 2, size=24, seed=1, batch=2)
    options = {"divergence": divergence, "head_map": [[0, 1, 5], [2], [2, 4], [3]]}
    given = given_for(teacher, student)
    assert_right(teacher, student, slack=3.0, impl=impl, given=given, **options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_given_log_sum_exps_of_identical_inputs(device: str, impl: str) -> None:
    same = inputs(device, gain=4, batch=2)
    for tensor in run(same, same, impl=impl, **given_for(same, same)):
        assert (tensor == 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_gradient_flows_through_a_log_sum_exp(device: str, impl: str) -> None:
    """It is the same function either way: what is given is a shortcut, not an input."""
    teacher, (q, k) = inputs(device, batch=2), inputs(device, batch=2, seed=1)
    q.requires_grad_()
    given = given_for(teacher, (q, k))
    assert given["log_sum_exp_student_BHT"].requires_grad
    (with_them,) = torch.autograd.grad(attention_kl(*teacher, q, k, impl=impl, **given).sum(), q)
    (without,) = torch.autograd.grad(attention_kl(*teacher, q, k, impl=impl).sum(), q)
    torch.testing.assert_close(with_them, without)


def test_without_gradient_nothing_is_kept_for_one(device: str) -> None:
    teacher, student = inputs(device, batch=2), inputs(device, batch=2, seed=1)
    options = ([0, 1], [1, 1], 0.25, 0.25, True, None, "forward_kl", 0.5, "triton")
    lse = given_for(teacher, student).values()
    alone, with_gradient = (
        attention_kl_op(*teacher, *student, None, *lse, *options, wanted)
        for wanted in (False, True)
    )
    assert alone[2].numel() == 0 and with_gradient[2].shape == student[0].shape
    torch.testing.assert_close(alone[0], with_gradient[0])


def test_log_sum_exps_that_do_not_fit_are_refused(device: str) -> None:
    teacher, student = inputs(device), inputs(device, seed=1)
    given = given_for(teacher, student)
    lse = given["log_sum_exp_teacher_BHT"]
    with pytest.raises(ValueError, match="teacher and student, or neither"):
        attention_kl(*teacher, *student, log_sum_exp_teacher_BHT=lse)
    with pytest.raises(ValueError, match="log_sum_exp_student_BHT"):
        attention_kl(*teacher, *student, **(given | {"log_sum_exp_student_BHT": lse[..., :-1]}))
