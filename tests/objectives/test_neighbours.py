"""Objectives of MaKD's neighbours, each against its formula written out in float64."""
# B batch, T tokens, N summary tokens, V vocabulary, D width

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from makd_llm.objectives.cosine import cosine_distance
from makd_llm.objectives.head import Outputs
from makd_llm.objectives.local import local_distance
from makd_llm.objectives.masks import Masks
from makd_llm.objectives.ranking import ranking_loss, spearman
from makd_llm.objectives.relations import relation_divergence
from makd_llm.objectives.sinkhorn import sinkhorn_cost, transport_cost
from makd_llm.objectives.terms import local_term
from makd_llm.shown import Shown

B, T, D, V = 2, 6, 8, 30


def random(*shape: int, seed: int = 0, learns: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(learns)


def outputs(records: list[int], *, learns: bool = False, **changes: Any) -> Outputs:
    """A student of width 8 and a teacher of width 10, at as many summary tokens as records say."""
    count = len(records)
    made = {
        "student_ND": random(count, D, seed=1, learns=learns),
        "student_weight_VD": random(V, D, seed=2, learns=learns),
        "teacher_NE": random(count, 10, seed=3, learns=learns),
        "teacher_weight_VE": random(V, 10, seed=4, learns=learns),
        "record_N": torch.tensor(records),
    }
    return Outputs(**{**made, **changes})


def test_cosine_is_one_minus_the_cosine() -> None:
    ours, theirs = random(B, T, D, learns=True), random(B, T, D, seed=5, learns=True)
    expected = 1 - (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
    found = cosine_distance(ours, theirs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert theirs.grad is None and ours.grad is not None and ours.grad.any()
    torch.testing.assert_close(
        cosine_distance(ours.detach() * 3, ours.detach()), torch.zeros(B, T).double()
    )
    assert torch.autograd.gradcheck(lambda x: cosine_distance(x, theirs), ours)
    assert cosine_distance(torch.zeros(1, 1, D), torch.ones(1, 1, D)).item() == 1.0
    with pytest.raises(ValueError, match="differ in shape"):
        cosine_distance(ours, theirs[..., 1:])


@pytest.mark.parametrize("heads", [1, 2])
def test_relations_are_those_of_minilm_among_the_tokens_before(heads: int) -> None:
    """The student is narrower than its teacher; one row is padded."""
    ours, theirs = random(B, T, 8, learns=True), random(B, T, 12, seed=5, learns=True)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = False
    found = relation_divergence(ours, theirs, Masks(mask, mask), heads=heads)
    expected = 0.0
    for b in range(B):
        for t in range(T if b == 0 else 4):
            for h in range(heads):
                logs = []
                for x in (theirs.detach(), ours.detach()):
                    width = x.shape[-1] // heads
                    part = x[b, :, h * width : (h + 1) * width]
                    logs.append((part[: t + 1] @ part[t] / math.sqrt(width)).log_softmax(-1))
                expected += float((logs[0].exp() * (logs[0] - logs[1])).sum()) / heads
    assert found.item() == pytest.approx(expected, rel=1e-9)
    found.backward()
    assert theirs.grad is None and ours.grad is not None
    assert ours.grad[mask].any() and not ours.grad[~mask].any()
    assert torch.autograd.gradcheck(
        lambda x: relation_divergence(x, theirs, Masks(mask, mask), heads=heads), ours
    )


def test_relations_need_heads_that_divide_both_widths() -> None:
    with pytest.raises(ValueError, match="3 relation heads do not divide the student's width 8"):
        relation_divergence(random(B, T, 8), random(B, T, 12), Masks(torch.ones(B, T)), heads=3)


def plan_by_hand(cost: Tensor, regularization: float, iterations: int) -> Tensor:
    plan = torch.exp(-cost / regularization)
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan


def test_transport_is_within_a_record_and_as_the_formula_has_it() -> None:
    made = outputs([0, 0, 0, 1, 1], learns=True)
    found = sinkhorn_cost(made)
    for record, at in ((slice(0, 3), 0), (slice(3, 5), 3)):
        q = (made.student_ND[record] @ made.student_weight_VD.T / 2).softmax(-1)
        p = (made.teacher_NE[record] @ made.teacher_weight_VE.T / 2).softmax(-1)
        cost = (q[:, None] - p[None]).abs().sum(-1)
        expected = (plan_by_hand(cost, 0.1, 20) * cost).sum()
        torch.testing.assert_close(found[at], expected, rtol=1e-10, atol=0)
    assert found[[1, 2, 4]].eq(0).all()
    found.sum().backward()
    assert made.teacher_NE.grad is None and made.teacher_weight_VE.grad is None
    assert made.student_ND.grad is not None and made.student_ND.grad.any()


def test_transport_does_not_depend_on_the_other_records_and_takes_so_many_positions() -> None:
    whole = outputs([0, 0, 0, 1, 1])
    alone = Outputs(
        whole.student_ND[3:],
        whole.student_weight_VD,
        whole.teacher_NE[3:],
        whole.teacher_weight_VE,
        whole.record_N[3:],
    )
    torch.testing.assert_close(sinkhorn_cost(whole)[3], sinkhorn_cost(alone)[0])
    ends = outputs(
        [0, 0],
        student_ND=whole.student_ND[[0, 2]],
        teacher_NE=whole.teacher_NE[[0, 2]],
    )
    taken = sinkhorn_cost(whole, positions=2)
    torch.testing.assert_close(taken[0], sinkhorn_cost(ends)[0] * 3 / 2)


def test_transport_has_the_gradient_of_its_value() -> None:
    p = random(3, V, seed=6).softmax(-1)

    def cost(z: Tensor) -> Tensor:
        return transport_cost(z.softmax(-1), p, 0.1, 5)

    assert torch.autograd.gradcheck(cost, random(3, V, seed=7, learns=True))


def correlation_of_ranks(a: Tensor, b: Tensor) -> float:
    """Spearman's, of values without ties: 1 - 6 sum d² / (n (n² - 1))."""
    squares = (a.argsort().argsort() - b.argsort().argsort()).square().sum().item()
    return 1 - 6 * squares / (len(a) * (len(a) ** 2 - 1))


def test_hard_ranks_are_spearmans() -> None:
    ours, theirs = random(7, 9, seed=8), random(7, 9, seed=9)
    found = spearman(ours, theirs, torch.ones(7, 9, dtype=torch.bool), softness=1e-6)
    for row, a, b in zip(found, ours, theirs, strict=True):
        assert row.item() == pytest.approx(correlation_of_ranks(a, b), abs=1e-6)


def test_soft_ranks_are_in_units_of_the_logits_deviation() -> None:
    ours, theirs = random(3, 6, seed=8), random(3, 6, seed=9)
    found = spearman(ours, theirs, torch.ones(3, 6, dtype=torch.bool), softness=0.7)
    for row, z, y in zip(found, ours, theirs, strict=True):
        s = 0.7 * z.std(correction=0)
        soft = 0.5 + torch.sigmoid((z[None, :] - z[:, None]) / s).sum(1)
        hard = 1.0 + (y[None, :] > y[:, None]).sum(1)
        expected = torch.corrcoef(torch.stack([soft, hard.double()]))[0, 1]
        assert row.item() == pytest.approx(expected.item(), abs=1e-12)


def test_ranking_has_the_gradient_of_its_value_at_a_fixed_scale() -> None:
    """The scale of the ranks is not learnt through, so it is held where values are compared."""
    theirs, valid = random(2, 5, seed=9), torch.ones(2, 5, dtype=torch.bool)
    z = random(2, 5, seed=8, learns=True)
    spread = z.detach().std(-1, correction=0, keepdim=True)

    def held(x: Tensor) -> Tensor:
        softness = spread / x.detach().std(-1, correction=0, keepdim=True)
        return spearman(x, theirs, valid, softness)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(held, z)


def test_ranking_looks_at_the_union_of_both_models_likeliest_tokens() -> None:
    made = outputs([0] * 6, learns=True)
    found = ranking_loss(made, top_k=4, softness=1e-6)
    z = made.student_ND @ made.student_weight_VD.T
    y = made.teacher_NE @ made.teacher_weight_VE.T
    for n in range(6):
        union = sorted({*z[n].topk(4).indices.tolist(), *y[n].topk(4).indices.tolist()})
        rho = correlation_of_ranks(z[n, union], y[n, union])
        assert found[n].item() == pytest.approx(1 - rho, abs=1e-6)
    ranking_loss(made, top_k=4).sum().backward()
    assert made.teacher_NE.grad is None and made.teacher_weight_VE.grad is None
    assert made.student_weight_VD.grad is not None and made.student_weight_VD.grad.any()


def test_ranking_falls_where_the_student_follows_its_gradient() -> None:
    made = outputs([0] * 6)
    student = made.student_ND.clone().requires_grad_()
    losses = []
    for _ in range(60):
        one = outputs([0] * 6, student_ND=student)
        loss = ranking_loss(one, top_k=5).sum()
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, student)
        student = (student - 0.3 * gradient).detach().requires_grad_()
    assert losses[-1] < 0.6 * losses[0]


def test_no_summary_tokens_at_all() -> None:
    made = outputs([])
    assert ranking_loss(made).shape == sinkhorn_cost(made).shape == (0,)


def test_bf16_outputs_give_fp32_losses() -> None:
    made = outputs([0, 0, 1])
    low = Outputs(*(x.bfloat16() for x in list(vars(made).values())[:4]), made.record_N)
    for loss in (ranking_loss(low), sinkhorn_cost(low)):
        assert loss.dtype == torch.float32 and loss.isfinite().all()


def test_local_distance_is_lillamas() -> None:
    ours, theirs = random(B, T, D, learns=True), random(B, T, D, seed=5, learns=True)
    cosine = (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
    expected = (ours - theirs).abs().mean(-1) - torch.log(1 / (1 + torch.exp(-cosine)))
    found = local_distance(ours, theirs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert theirs.grad is None and ours.grad is not None and ours.grad.any()
    assert torch.autograd.gradcheck(lambda x: local_distance(x, theirs), ours)


def test_a_local_term_is_the_mean_over_inputs_and_layers_and_feeds_the_teachers_inputs() -> None:
    student = Shown(again={(i, s): random(B, T, D, seed=i) for i in (0, 1) for s in ("student",)})
    student.again |= {(i, "teacher"): random(B, T, D, seed=7 + i) for i in (0, 1)}
    teacher = Shown(
        hidden={2: random(B, T, D, seed=20), 5: random(B, T, D, seed=21)},
        layer_input={2: random(B, T, D, seed=22), 5: random(B, T, D, seed=23)},
    )
    term = local_term([0, 1], weight=1.0, teacher_layers=[2, 5])
    pairs = [((i, s), t) for i, t in ((0, 2), (1, 5)) for s in ("student", "teacher")]
    expected = sum(local_distance(student.again[a], teacher.hidden[t]) for a, t in pairs) / 4
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, 3:] = False
    found = term.compare(student, teacher, Masks(real))
    torch.testing.assert_close(found, expected[real].sum())  # type: ignore[index]
    assert term.replay is not None
    assert term.replay(teacher) == {
        (0, "layer"): teacher.layer_input[2],
        (1, "layer"): teacher.layer_input[5],
    }
    assert term.needs.again == frozenset(student.again)
    assert local_term([0], weight=1.0, inputs=["student"]).replay is None
