"""Terms of a student of another depth and another order of heads: which tensors are compared."""
# B batch, T tokens, D width

import pytest
import torch

from makd_llm.objectives.combine import Objectives
from makd_llm.objectives.head import CrossEntropy, Divergence
from makd_llm.objectives.masks import Masks
from makd_llm.objectives.selection import Selection
from makd_llm.objectives.terms import attention_term, hidden_term, matrix_term
from makd_llm.shown import AttentionShown, Needs, Shown

B, T = 2, 5
REAL = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
MASKS = Masks(REAL)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def relative(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1)


def test_matrices_are_compared_with_the_layers_and_features_that_are_named() -> None:
    student = Shown(fed={(0, "q"): random(B, T, 4), (1, "q"): random(B, T, 4)})
    teacher = Shown(
        matrix={(2, "q"): random(B, T, 6), (5, "q"): random(B, T, 4)},
        matrix_input={(2, "q"): random(B, T, 3), (5, "q"): random(B, T, 3)},
    )
    term = matrix_term(
        [0, 1],
        ["q"],
        weight=1.0,
        teacher_input=True,
        teacher_layers=[2, 5],
        outputs={(0, "q"): Selection([5, 4, 0, 1])},
        inputs={(1, "q"): Selection([2, 0])},
    )
    first = relative(student.fed[0, "q"], teacher.matrix[2, "q"][..., [5, 4, 0, 1]])
    second = relative(student.fed[1, "q"], teacher.matrix[5, "q"])
    torch.testing.assert_close(
        term.compare(student, teacher, MASKS), ((first + second) / 2)[REAL].sum()
    )

    objectives = Objectives({"matrix": term}, {"logits": Divergence(1.0)})
    assert objectives.needs_of_student == Needs(fed=frozenset({(0, "q"), (1, "q")}))
    assert objectives.needs_of_teacher == Needs(
        matrix=frozenset({(2, "q"), (5, "q")}), matrix_input=True
    )
    replayed = objectives.replayed(teacher)
    assert replayed is not None and replayed.keys() == {(0, "q"), (1, "q")}
    assert torch.equal(replayed[0, "q"], teacher.matrix_input[2, "q"])
    assert torch.equal(replayed[1, "q"], teacher.matrix_input[5, "q"][..., [2, 0]])
    objectives.multiplier["matrix"] = 0.0
    assert objectives.replayed(teacher) is None and objectives.needs_of_teacher == Needs()


def test_hidden_states_are_compared_with_the_layers_and_channels_that_are_named() -> None:
    student = Shown(hidden={0: random(B, T, 3), 1: random(B, T, 3)})
    teacher = Shown(hidden={1: random(B, T, 3), 4: random(B, T, 3)})
    term = hidden_term([0, 1], weight=1.0, teacher_layers=[1, 4], channels=Selection([2, 0, 1]))
    errors = [
        relative(student.hidden[i], teacher.hidden[t][..., [2, 0, 1]]) for i, t in ((0, 1), (1, 4))
    ]
    expected = (errors[0] + errors[1])[REAL].sum() / 2
    torch.testing.assert_close(term.compare(student, teacher, MASKS), expected)
    assert term.needs == Needs(hidden=frozenset({0, 1}))
    assert term.needs_of_teacher == Needs(hidden=frozenset({1, 4}))


def maps(shown: AttentionShown) -> torch.Tensor:
    """Causal log attention maps, written out."""
    repeat = shown.query_BHTD.shape[1] // shown.key_BGTD.shape[1]
    scores = shown.query_BHTD @ shown.key_BGTD.repeat_interleave(repeat, 1).mT / 2.0
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    return scores.masked_fill(~causal, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_heads_are_compared_with_those_that_are_named(impl: str) -> None:
    student = AttentionShown(random(B, 4, T, 4), random(B, 1, T, 4), None, None)
    teacher = AttentionShown(random(B, 4, T, 4), random(B, 2, T, 4), None, None)
    order = [2, 0, 3, 1]
    term = attention_term([0], weight=1.0, impl=impl, teacher_layers=[3], heads={0: order})
    found = term.compare(Shown(attention={0: student}), Shown(attention={3: teacher}), MASKS)
    p, q = maps(teacher)[:, order], maps(student)
    kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1).mean(1)
    torch.testing.assert_close(found, kl[REAL].sum())
    assert term.needs_of_teacher == Needs(attention=frozenset({3}))


@pytest.mark.parametrize("window", [None, 3])
def test_the_error_of_attention_scores_is_their_mean_over_the_keys_that_a_token_sees(
    window: int | None,
) -> None:
    keys = REAL.clone()
    keys[0, 0] = False  # padding on the left
    sides = [AttentionShown(random(B, 2, T, 4), random(B, 2, T, 4), None, window) for _ in range(2)]
    scores = [side.query_BHTD @ side.key_BGTD.mT / 2.0 for side in sides]
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    if window:
        seen = seen.triu(1 - window)
    error, counted = 0.0, REAL & keys
    for b in range(B):
        for t in range(T):
            visible = seen[t] & keys[b]
            if counted[b, t]:
                gap = (scores[0] - scores[1])[b, :, t, visible]
                error += gap.square().mean(-1).mean().item()
    term = attention_term([0], weight=1.0, divergence="logit_mse", impl="torch")
    first, second = (Shown(attention={0: side}) for side in sides)
    found = term.compare(first, second, Masks(counted, keys))
    assert found.item() == pytest.approx(error, rel=1e-9)


def test_an_idle_zero_is_part_of_the_loss() -> None:
    from makd_llm.data.batch import collate
    from makd_llm.data.schema import Example

    batch = collate([Example("a", [1, 2, 3], 2)], pad_id=0)
    objectives = Objectives({}, {"cross_entropy": CrossEntropy(1.0)})
    unused = torch.zeros(1, requires_grad=True)
    losses = objectives(
        (torch.ones(()), {}), Shown(idle=(unused * 0.0).sum()), Shown(), batch, {"tokens": 1.0}
    )
    losses.total.backward()
    assert losses.total.item() == 1.0 and unused.grad is not None
