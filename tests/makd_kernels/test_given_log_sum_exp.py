"""attention_kl where attention's own log-sum-exps are given: the same results in fewer sweeps."""

import pytest
import torch
from torch import Tensor

from makd_kernels import attention_kl
from makd_kernels.attention_kl.reference import visible_keys
from makd_kernels.attention_kl.settings import DIVERGENCES
from makd_llm.testing import assert_no_worse_than_eager

IMPLEMENTATIONS = ["torch", "triton"]
Side = tuple[Tensor, Tensor]


def side(
    device: str,
    heads: int = 2,
    groups: int = 1,
    size: int = 16,
    seed: int = 0,
    gain: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Side:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, n, 21, size, generator=generator) for n in (heads, groups))
    return (q * gain).to(device, dtype), k.to(device, dtype)


def log_sum_exp(given: Side, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """What flash attention returns beside its output: -inf where a query sees no key."""
    q, k = given
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    visible = visible_keys(q.shape[2], causal, None, mask, q.device)
    scores = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return scores.logsumexp(-1)


def run(teacher: Side, student: Side, **options) -> tuple[Tensor, Tensor, Tensor]:
    """(values, dq, dk) with an upstream gradient that differs for every value."""
    q, k = (tensor.detach().clone().requires_grad_() for tensor in student)
    values = attention_kl(*teacher, q, k, **options)
    upstream = torch.linspace(-2, 3, values.numel(), dtype=values.dtype, device=values.device)
    values.backward(upstream.view(values.shape))
    return values.detach(), q.grad, k.grad


def assert_right(teacher: Side, student: Side, impl: str, slack: float = 2.0, **options) -> None:
    visibility = (options.get("attention_mask_BT"), options.get("causal", True))
    given = {
        "log_sum_exp_teacher_BHT": log_sum_exp(teacher, *visibility),
        "log_sum_exp_student_BHT": log_sum_exp(student, *visibility),
    }
    ours = run(teacher, student, impl=impl, **given, **options)
    eager = run(teacher, student, impl="reference", **options)
    double = [t.double() for t in teacher], [t.double() for t in student]
    exact = run(*double, impl="reference", **options)
    for one, other, truth in zip(ours, eager, exact, strict=True):
        assert_no_worse_than_eager(one, other, truth, slack=slack)
    assert (ours[0] >= 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_worse_than_eager(device: str, impl: str, divergence: str, causal: bool) -> None:
    given = side(device), side(device, seed=1)
    assert_right(*given, impl, slack=3.0, divergence=divergence, causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_half_precision(device: str, impl: str, dtype: torch.dtype) -> None:
    cut_off = impl == "triton" and device == "cpu" and dtype == torch.bfloat16
    slack = 6.0 if cut_off else 3.0  # the interpreter rounds to bf16 by cutting off
    assert_right(side(device, dtype=dtype), side(device, seed=1, dtype=dtype), impl, slack)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_padding_where_the_log_sum_exp_is_not_finite(
    device: str, impl: str, divergence: str
) -> None:
    mask = torch.ones(2, 21, device=device)
    mask[0, :18] = 0
    mask[1, 5:] = 0
    given = side(device), side(device, seed=1)
    assert log_sum_exp(given[0], mask).isinf().any()
    assert_right(*given, impl, slack=3.0, divergence=divergence, attention_mask_BT=mask)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pairs_of_heads_of_other_sizes(device: str, impl: str, divergence: str) -> None:
    teacher, student = side(device, 6, 3), side(device, 4, 2, size=24, seed=1)
    head_map = [[0, 1, 5], [2], [2, 4], [3]]
    assert_right(teacher, student, impl, slack=3.0, divergence=divergence, head_map=head_map)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_identical_inputs_give_exactly_zero(device: str, impl: str) -> None:
    same = side(device, gain=4)
    lse = log_sum_exp(same)
    given = {"log_sum_exp_teacher_BHT": lse, "log_sum_exp_student_BHT": lse}
    values, dq, dk = run(same, same, impl=impl, **given)
    assert (values == 0).all() and (dq == 0).all() and (dk == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_gradient_flows_through_a_log_sum_exp(device: str, impl: str) -> None:
    """It is the same function either way: what is given is a shortcut, not an input."""
    teacher, (q, k) = side(device), side(device, seed=1)
    q.requires_grad_()
    lse = log_sum_exp((q, k))
    options = {"log_sum_exp_teacher_BHT": log_sum_exp(teacher), "log_sum_exp_student_BHT": lse}
    (given,) = torch.autograd.grad(attention_kl(*teacher, q, k, impl=impl, **options).sum(), q)
    (alone,) = torch.autograd.grad(attention_kl(*teacher, q, k, impl=impl).sum(), q)
    torch.testing.assert_close(given, alone)


def test_without_gradient_nothing_is_kept_for_one(device: str) -> None:
    from makd_kernels.attention_kl.op import attention_kl_op

    teacher, student = side(device), side(device, seed=1)
    options = ([0, 1], [1, 1], 0.25, 0.25, True, None, "forward_kl", 0.5, "triton")
    lse = log_sum_exp(teacher), log_sum_exp(student)
    alone, with_gradient = (
        attention_kl_op(*teacher, *student, None, *lse, *options, wanted)
        for wanted in (False, True)
    )
    assert alone[2].numel() == 0 and with_gradient[2].shape == student[0].shape
    torch.testing.assert_close(alone[0], with_gradient[0])


def test_one_side_alone_is_refused(device: str) -> None:
    teacher, student = side(device), side(device, seed=1)
    lse = log_sum_exp(teacher)
    with pytest.raises(ValueError, match="teacher and student, or neither"):
        attention_kl(*teacher, *student, log_sum_exp_teacher_BHT=lse)
    options = {"log_sum_exp_teacher_BHT": lse, "log_sum_exp_student_BHT": lse[..., :-1]}
    with pytest.raises(ValueError, match="log_sum_exp_student_BHT"):
        attention_kl(*teacher, *student, **options)
