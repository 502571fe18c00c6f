"""Attributions, where no model is needed: against the formulas written out in float64."""
# B records, T tokens, K views, D width

import math

import pytest
import torch
from torch import Tensor

from makd_llm.data.batch import collate
from makd_llm.data.schema import Example
from makd_llm.objectives.attribution import (
    Attribution,
    ask,
    attribution_distance,
    sampled_positions,
    spans_of,
    token_importance,
)

B, T, K, D, V = 2, 5, 3, 8, 30


def random(*shape: int, seed: int = 0, learns: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(learns)


def examples() -> list[Example]:
    return [
        Example("a", list(range(3, 20)), 7, (2, 6)),
        Example("b", list(range(3, 9)), 3, (0, 2)),
        Example("c", list(range(3, 12)), 5),
    ]


@pytest.mark.parametrize("top_k", [0.5, 1.0])
def test_importance_is_the_norm_of_a_tokens_largest_products(top_k: float) -> None:
    g, x = random(B, T, D, learns=True), random(B, T, D, seed=3)
    document = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    found = token_importance(g, x, document, top_k)
    for b in range(B):
        for t in range(T):
            products = sorted(
                (abs(a * c) for a, c in zip(g[b, t].tolist(), x[b, t].tolist(), strict=True)),
                reverse=True,
            )
            kept = products[: round(top_k * D)]
            expected = math.sqrt(sum(p * p for p in kept)) if document[b, t] else 0.0
            assert found[b, t].item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda g: token_importance(g, x, document, top_k), g)


def test_a_token_that_counts_for_nothing_has_a_finite_slope() -> None:
    g, x = torch.zeros(1, 2, D, requires_grad=True), torch.ones(1, 2, D)
    token_importance(g, x, torch.ones(1, 2, dtype=torch.bool)).sum().backward()
    assert g.grad is not None and not g.grad.any()


def test_distance_compares_shares_and_weighs_views() -> None:
    ours, theirs = random(B, K, T, learns=True), random(B, K, T, seed=4, learns=True)
    weight = random(B, K, seed=5).abs()
    found = attribution_distance(ours, theirs, weight)
    for b in range(B):
        expected = 0.0
        for k in range(K):
            a, c = ours[b, k].tolist(), theirs[b, k].tolist()
            a_norm, c_norm = math.hypot(*a), math.hypot(*c)
            expected += weight[b, k].item() * sum(
                (p / a_norm - q / c_norm) ** 2 for p, q in zip(a, c, strict=True)
            )
        assert found[b].item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda a: attribution_distance(a, theirs, weight), ours)
    found.sum().backward()
    assert theirs.grad is None
    torch.testing.assert_close(
        attribution_distance(5 * theirs, theirs, weight), torch.zeros(B).double()
    )


def test_a_record_that_owes_nothing_to_its_document_teaches_nothing() -> None:
    ours = random(B, K, T, learns=True)
    theirs = random(B, K, T, seed=4).clone()
    theirs[1] = 0.0
    found = attribution_distance(ours, theirs, torch.ones(B, K).double())
    found.sum().backward()
    assert found[1] == 0.0 and ours.grad is not None
    assert ours.grad[0].any() and not ours.grad[1].any() and ours.grad.isfinite().all()
    with pytest.raises(ValueError, match="differ in shape"):
        attribution_distance(ours, theirs[..., 1:], torch.ones(B, K))


def test_positions_are_those_of_summary_tokens_and_do_not_depend_on_the_batch() -> None:
    batch = collate(examples(), pad_id=0)
    seen = set()
    for step in range(1, 30):
        places, taken = sampled_positions(batch, 4, step)
        assert taken.sum(1).tolist() == [4, 3, 4]
        for row, example in enumerate(examples()):
            alone = collate([example], pad_id=0)
            one, one_taken = sampled_positions(alone, 4, step)
            assert places[row].tolist() == one[0].tolist() and one_taken[0].equal(taken[row])
            mine = places[row][taken[row]].tolist()
            assert len(set(mine)) == len(mine)
            assert all(batch.labels_BT[row, place] != -100 for place in mine)
        seen |= set(places[0].tolist())
    assert seen == set(range(6, 16))  # the ten positions of the longest summary, in turns


def test_documents_are_marked_and_cut_into_even_spans() -> None:
    right = collate(examples(), pad_id=0)
    left = collate(examples(), pad_id=0, padding_side="left")
    assert right.document_mask_BT.sum(1).tolist() == [4, 2, 5]
    assert right.document_mask_BT[0].nonzero().flatten().tolist() == [2, 3, 4, 5]
    for row in range(3):
        ids = [b.input_ids_BT[row][b.document_mask_BT[row]].tolist() for b in (left, right)]
        assert ids[0] == ids[1]
    assert spans_of(right.document_mask_BT, 2)[0].tolist()[:8] == [-1, -1, 0, 0, 1, 1, -1, -1]
    assert spans_of(right.document_mask_BT, 2)[2].tolist()[:6] == [0, 0, 0, 1, 1, -1]


def test_the_views_are_the_references_and_the_teachers_likeliest() -> None:
    batch = collate(examples(), pad_id=0)
    hidden, weight = random(3, batch.labels_BT.shape[1], D, seed=8), random(V, D, seed=9)
    question = ask(batch, Attribution(1.0, views=2, positions=4), 3, hidden, weight)
    assert question.tokens_BSK.shape == (3, 4, 3)
    p = (hidden @ weight.T).softmax(-1)
    for row in range(3):
        means = torch.zeros(3).double()
        for s in question.taken_BS[row].nonzero().flatten().tolist():
            place, tokens = int(question.places_BS[row, s]), question.tokens_BSK[row, s]
            assert tokens[0] == batch.labels_BT[row, place]
            assert tokens[1:].tolist() == p[row, place].topk(2).indices.tolist()
            means += p[row, place][tokens] / int(question.taken_BS[row].sum())
        torch.testing.assert_close(question.probability_BK[row], means)
    scores = question.scores(hidden, weight)
    first = question.places_BS[0]
    expected = p[0, first].log().gather(-1, question.tokens_BSK[0]).mean(0)
    torch.testing.assert_close(scores[0], expected)
