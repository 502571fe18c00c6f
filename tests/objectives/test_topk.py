"""The divergence over the k likeliest tokens and one bucket, against its formula in float64, and
against the divergence of the whole distributions.
"""
# N summary tokens, V vocabulary, D and E widths, K likeliest tokens

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from makd_kernels.linear_divergence import linear_divergence
from makd_kernels.plain import DIVERGENCES
from makd_llm.objectives import topk
from makd_llm.objectives.head import Outputs
from makd_llm.objectives.topk import topk_divergence
from makd_llm.offline.top_tokens import top_tokens
from makd_llm.shown import TopTokens

N, V, D, E = 7, 40, 8, 10
KINDS: list[dict[str, Any]] = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "beta": 0.3},
    {"divergence": "jsd", "beta": 0.0},
    {"divergence": "skew_forward_kl", "alpha": 0.2},
    {"divergence": "skew_reverse_kl", "alpha": 0.2},
    {"divergence": "tvd"},
]


def of(kind: dict[str, Any]) -> str:
    return "-".join(str(value) for value in kind.values())


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def models() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return random(N, D, seed=1), random(V, D, seed=2), random(N, E, seed=3), random(V, E, seed=4)


def outputs(k: int, temperatures: tuple[float, ...] = (1.0, 2.0), **changes: Any) -> Outputs:
    """With top tokens that are not rounded."""
    student_ND, weight_VD, teacher_NE, teacher_VE = models()
    top = top_tokens(teacher_NE, teacher_VE, k, temperatures)
    nothing = teacher_NE[:, :0]
    made = Outputs(student_ND, weight_VD, nothing, teacher_VE[:, :0], torch.zeros(N).long(), top)
    return replace(made, **changes)


def written_out(k: int, temperature: float, kind: dict[str, Any]) -> Tensor:
    """Whole distributions, of which all but the teacher's k likeliest tokens are added up."""
    student_ND, weight_VD, teacher_NE, teacher_VE = models()
    q = (student_ND @ weight_VD.T / temperature).softmax(-1)
    p = (teacher_NE @ teacher_VE.T / temperature).softmax(-1)
    found = []
    for n in range(N):
        chosen = p[n].topk(k).indices
        rest = torch.ones(V, dtype=torch.bool).scatter(0, chosen, False)
        coarse = [torch.cat([x[n, chosen], x[n, rest].sum()[None]]).log() for x in (p, q)]
        if k == V:
            coarse = [x[:-1] for x in coarse]
        name, beta, alpha = kind["divergence"], kind.get("beta", 0.5), kind.get("alpha", 0.1)
        if name == "jsd" and beta == 0.0:
            name = "forward_kl"
        found.append(DIVERGENCES[name](*coarse, beta, alpha))
    return torch.stack(found) * temperature**2


@pytest.mark.parametrize("kind", KINDS, ids=of)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V])
def test_it_is_the_formula_over_k_and_the_rest(
    kind: dict[str, Any], temperature: float, k: int
) -> None:
    found = topk_divergence(outputs(k), temperature=temperature, **kind)
    torch.testing.assert_close(found, written_out(k, temperature, kind), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=of)
def test_it_has_the_gradient_of_its_value_also_across_chunks(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "CHUNK", 3)
    made = outputs(5)

    def loss(student_ND: Tensor, weight_VD: Tensor) -> Tensor:
        side = replace(made, student_ND=student_ND, student_weight_VD=weight_VD)
        return topk_divergence(side, temperature=2.0, **kind)

    student_ND, weight_VD, *_ = models()
    inputs = (student_ND.requires_grad_(), weight_VD.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    whole = loss(*inputs)
    monkeypatch.setattr(topk, "CHUNK", 256)
    torch.testing.assert_close(whole, loss(*inputs))


@pytest.mark.parametrize("kind", KINDS, ids=of)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_putting_tokens_together_never_raises_a_divergence(
    kind: dict[str, Any], temperature: float
) -> None:
    """The inequality of data processing, from one bucket to the whole vocabulary, where it is the
    divergence that the online loss computes.
    """
    online = linear_divergence(*models()[:2], *models()[2:], temperature=temperature, **kind)
    steps = [1, 2, 4, 8, 16, 32, V - 1, V]
    found = [topk_divergence(outputs(k), temperature=temperature, **kind) for k in steps]
    for coarse, fine in pairwise(found):
        assert (coarse <= fine + 1e-12).all()
    assert (found[0] < found[-1]).all()
    torch.testing.assert_close(found[-1], online, rtol=1e-9, atol=1e-12)


def test_a_student_that_agrees_has_no_loss() -> None:
    _, _, teacher_NE, teacher_VE = models()
    same = outputs(5, student_ND=teacher_NE, student_weight_VD=teacher_VE)
    for kind in KINDS:
        torch.testing.assert_close(
            topk_divergence(same, **kind), torch.zeros(N).double(), rtol=0, atol=1e-12
        )


def test_ties_among_the_likeliest_change_nothing() -> None:
    """All of a row's tokens are as likely: whichever k are kept, the loss is the same."""
    _, weight_VD, *_ = models()
    flat = replace(
        outputs(5, student_weight_VD=weight_VD * 0),
        top=top_tokens(torch.zeros(N, E).double(), random(V, E, seed=4), 5, (1.0,)),
    )
    assert flat.top is not None and (flat.top.ids_NK.diff(dim=-1) > 0).all()
    torch.testing.assert_close(topk_divergence(flat), torch.zeros(N).double(), rtol=0, atol=1e-12)


def test_the_rest_is_exact_where_it_is_all_but_nothing() -> None:
    """1 - sum p of fp32 numbers would be 0, or some 1e-7."""
    logits_NV = torch.tensor([[40.0, 30.0, 2.0, 1.0, 0.0]])
    top = top_tokens(logits_NV, torch.eye(5), 2, (1.0,))
    expected = logits_NV.double().log_softmax(-1)[:, 2:].logsumexp(-1)
    torch.testing.assert_close(top.log_rest_NS[:, 0].double(), expected, rtol=1e-6, atol=0)
    assert expected.item() < -37


def test_bf16_outputs_give_fp32_losses_and_none_give_none() -> None:
    made = outputs(5)
    low = {name: getattr(made, name).bfloat16() for name in ("student_ND", "student_weight_VD")}
    found = topk_divergence(replace(made, **low))
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert made.top is not None
    empty = TopTokens(
        *(x[:0] for x in (made.top.ids_NK, made.top.log_p_NK)), made.top.log_rest_NS[:0], (1.0,)
    )
    assert topk_divergence(replace(made, student_ND=made.student_ND[:0], top=empty)).shape == (0,)


@pytest.mark.parametrize(("top", "words"), [(None, "none at all"), ("kept", r"\(1.0, 2.0\)")])
def test_what_was_not_stored_is_not_made_up(top: str | None, words: str) -> None:
    made = outputs(5) if top else outputs(5, top=None)
    with pytest.raises(ValueError, match=words):
        topk_divergence(made, temperature=3.0)


@pytest.mark.parametrize("kind", KINDS, ids=of)
def test_never_negative_where_a_bf16_student_agrees_and_the_gradient_stays(
    kind: dict[str, Any],
) -> None:
    x_ND, weight_VD = random(400, D, seed=1).bfloat16(), random(V, D, seed=2).bfloat16()
    top = top_tokens(x_ND, weight_VD, 16, (1.0,))
    nothing = x_ND[:, :0]
    given = Outputs(
        x_ND.requires_grad_(), weight_VD, nothing, weight_VD[:, :0], torch.zeros(400), top
    )
    loss_N = topk_divergence(given, **kind)
    assert (loss_N >= 0).all() and loss_N.max() < 1e-4
    (gradient,) = torch.autograd.grad(loss_N.sum(), x_ND)
    assert torch.isfinite(gradient).all()
