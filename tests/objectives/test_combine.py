"""The objectives' sum: weights, multipliers of levels, units, padding; what is asked of a model."""
# B batch, T tokens, V vocabulary, D width

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from makd_llm.data.batch import Batch, collate
from makd_llm.data.schema import Example
from makd_llm.objectives.combine import Objectives
from makd_llm.objectives.head import CrossEntropy, Divergence, Timing
from makd_llm.objectives.terms import attention_term, hidden_term, matrix_term
from makd_llm.shown import AttentionShown, Needs, Shown

B, T, V, D = 2, 6, 11, 8


@pytest.fixture
def batch() -> Batch:
    """Rows of 6 and 4 tokens, of which 3 and 1 are the summary's."""
    torch.manual_seed(0)
    return collate([Example("a", [1, 2, 3, 4, 5, 6], 3), Example("b", [1, 2, 3, 4], 3)], pad_id=0)


def shown(seed: int, *, learns: bool = True) -> Shown:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(learns)

    attention = AttentionShown(random(B, 2, T, 4), random(B, 1, T, 4), None, None)
    return Shown(
        hidden={0: random(B, T, D), 1: random(B, T, D)},
        attention={1: attention},
        matrix={(0, "q"): random(B, T, D), (0, "up"): random(B, T, 5)},
    )


def all_terms() -> Objectives:
    return Objectives(
        {
            "matrix": matrix_term([0], ["q", "up"], weight=3.0),
            "attention": attention_term([1], weight=0.5, impl="reference"),
            "hidden": hidden_term([0, 1], weight=0.25, normalize="mean"),
            "off": hidden_term([0], weight=0.0),
        },
        {"cross_entropy": CrossEntropy(0.3), "logits": Divergence(2.0)},
    )


def relative(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1)


def written_out(batch: Batch, student: Shown, teacher: Shown) -> dict[str, torch.Tensor]:
    """Each aspect's sum over real tokens, by its formula."""
    real = batch.token_mask_BT
    pairs = [(0, "q"), (0, "up")]
    matrix = sum(relative(student.matrix[p], teacher.matrix[p])[real].sum() for p in pairs) / 2
    hidden = (
        sum((student.hidden[i] - teacher.hidden[i]).square().mean(-1)[real].sum() for i in (0, 1))
        / 2
    )
    logs = []
    for side in (teacher, student):
        a = side.attention[1]
        scores = a.query_BHTD @ a.key_BGTD.transpose(-1, -2) / 2.0
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        logs.append(scores.masked_fill(~causal, -torch.inf).log_softmax(-1))
    kl = torch.where(logs[0] > -torch.inf, logs[0].exp() * (logs[0] - logs[1]), 0.0)
    attention = kl.sum(-1).mean(1)[real].sum()
    assert isinstance(matrix, torch.Tensor) and isinstance(hidden, torch.Tensor)
    return {"matrix": matrix, "attention": attention, "hidden": hidden}


def test_sum_equals_the_formulas_written_out(batch: Batch) -> None:
    objectives, student, teacher = all_terms(), shown(1), shown(2, learns=False)
    objectives.multiplier = {"matrix": 1.5, "layer": 2.0, "model": 0.5}
    counts = {"targets": 7.0, "tokens": 20.0}
    hidden_BTD, weight_VD = torch.randn(B, T, D).double(), torch.randn(V, D).double()
    theirs_BTD, theirs_VD = torch.randn(B, T, D).double(), torch.randn(V, D).double()
    at_head = objectives.at_head(batch, counts, theirs_BTD, theirs_VD)(hidden_BTD, weight_VD)
    wanted = written_out(batch, student, teacher)
    matrices = list(student.matrix.values())
    points = [*student.hidden.values(), *matrices, student.attention[1].query_BHTD]
    losses = objectives(at_head, student, teacher, batch, counts)
    for side in (student, teacher):
        assert not (side.hidden or side.attention or side.matrix), "let go of, once compared"

    learnt = batch.target_mask_BT
    log_q = F.log_softmax((hidden_BTD @ weight_VD.T)[learnt], -1)
    log_p = F.log_softmax((theirs_BTD @ theirs_VD.T)[learnt], -1)
    wanted["cross_entropy"] = F.nll_loss(log_q, batch.labels_BT[learnt], reduction="sum")
    wanted["logits"] = (log_p.exp() * (log_p - log_q)).sum()
    assert losses.sums.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(losses.sums[name].double(), value.detach(), rtol=1e-5, atol=0)
    total = (
        1.5 * 3.0 * wanted["matrix"] / 20
        + 2.0 * (0.5 * wanted["attention"] + 0.25 * wanted["hidden"]) / 20
        + 0.5 * (0.3 * wanted["cross_entropy"] + 2.0 * wanted["logits"]) / 7
    )
    torch.testing.assert_close(losses.total.double(), total, rtol=1e-5, atol=0)

    losses.total.backward()
    assert all(point.grad is not None and point.grad.any() for point in points)
    padding = ~batch.token_mask_BT
    assert all((point.grad[padding] == 0).all() for point in matrices)  # type: ignore[index]


def test_a_level_that_is_off_asks_for_nothing_and_counts_nothing(batch: Batch) -> None:
    objectives = all_terms()
    everything = objectives.needs_of_student
    assert everything == Needs(
        hidden=frozenset({0, 1}),
        attention=frozenset({1}),
        matrix=frozenset({(0, "q"), (0, "up")}),
    )
    assert objectives.names == ["matrix", "attention", "hidden", "cross_entropy", "logits"]
    assert objectives.levels == ["matrix", "layer", "model"]
    objectives.multiplier["layer"] = objectives.multiplier["model"] = 0.0
    assert objectives.needs_of_student == Needs(matrix=everything.matrix)
    counts = {"targets": 1.0, "tokens": 1.0}
    hidden_BTD = torch.randn(B, T, D, requires_grad=True)
    at_head = objectives.at_head(batch, counts)(hidden_BTD, torch.randn(V, D))
    losses = objectives(at_head, shown(1), shown(2), batch, counts)
    assert list(losses.sums) == ["matrix"]
    losses.total.backward()
    assert hidden_BTD.grad is not None and not hidden_BTD.grad.any(), "in the graph, without effect"


def test_presets_without_a_teacher_say_so() -> None:
    assert not Objectives({}, {"cross_entropy": CrossEntropy(1.0)}).needs_teacher
    assert Objectives({}, {"logits": Divergence(1.0)}).needs_teacher
    assert all_terms().needs_teacher
    replaying = matrix_term([0], ["q"], weight=1.0, teacher_input=True)
    objectives = Objectives({"matrix": replaying}, {"logits": Divergence(1.0)})
    assert objectives.needs_of_teacher.matrix_input
    assert not objectives.needs_of_student.matrix_input


def test_two_divergences_and_no_cross_entropy(batch: Batch) -> None:
    objectives = Objectives(
        {},
        {"forward": Divergence(2.0), "reverse": Divergence(3.0, "reverse_kl", temperature=2.0)},
    )
    ours = torch.randn(B, T, D).double(), torch.randn(V, D).double()
    theirs = torch.randn(B, T, D).double(), torch.randn(V, D).double()
    loss, sums = objectives.at_head(batch, {"targets": 5.0, "tokens": 1.0}, *theirs)(*ours)
    learnt = batch.target_mask_BT
    expected = {}
    for name, temperature in (("forward", 1.0), ("reverse", 2.0)):
        log_q, log_p = (
            ((h @ w.T)[learnt] / temperature).log_softmax(-1) for h, w in (ours, theirs)
        )
        first, second = (log_p, log_q) if name == "forward" else (log_q, log_p)
        expected[name] = (first.exp() * (first - second)).sum() * temperature**2
        torch.testing.assert_close(sums[name].double(), expected[name], rtol=1e-9, atol=0)
    total = (2.0 * expected["forward"] + 3.0 * expected["reverse"]) / 5.0
    torch.testing.assert_close(loss.double(), total, rtol=1e-6, atol=0)
    assert sums.keys() == {"forward", "reverse", "cross_entropy"}, "the last is measured only"
    assert objectives.scale_of("cross_entropy") == 0.0


def test_cross_entropies_add_up_and_are_all_measured(batch: Batch) -> None:
    ours = torch.randn(B, T, D).double(), torch.randn(V, D).double()
    theirs = torch.randn(B, T, D).double(), torch.randn(V, D).double()

    def at_head(**head: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        made = Objectives({}, {**head, "logits": Divergence(2.0)})
        return made.at_head(batch, {"targets": 5.0, "tokens": 1.0}, *theirs)(*ours)

    once, sums = at_head(one=CrossEntropy(6.0))
    twice, both = at_head(one=CrossEntropy(1.0), other=CrossEntropy(5.0))
    torch.testing.assert_close(twice, once)
    assert both["one"] == both["other"] == sums["one"]


def test_a_turn_counts_from_its_own_first_step() -> None:
    timing = Timing(every=2, warmup_steps=4)
    objectives = Objectives({}, {"logits": Divergence(4.0, timing=timing)})
    objectives.steps_before = 7
    scales = []
    for objectives.step in range(8, 13):
        scales.append(objectives.scale_of("logits"))
    assert scales == [1.0, 0.0, 3.0, 0.0, 4.0]


def test_an_objective_that_skips_steps_is_not_computed_on_them_and_one_warms_up(
    batch: Batch,
) -> None:
    rare = hidden_term([0], weight=4.0)
    objectives = Objectives(
        {"rare": replace(rare, timing=Timing(every=3))},
        {"cross_entropy": CrossEntropy(2.0, Timing(warmup_steps=4))},
    )
    seen = []
    for step in range(1, 6):
        objectives.step = step
        seen.append((objectives.scale_of("rare"), objectives.scale_of("cross_entropy")))
        assert bool(objectives.needs_of_student.hidden) == (step in (1, 4))
    assert seen == [(4.0, 0.5), (0.0, 1.0), (0.0, 1.5), (4.0, 2.0), (0.0, 2.0)]
