"""Attention's and relations' divergence record by record, as on padded rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from makd_llm.objectives.attention import attention_divergence
from makd_llm.objectives.masks import Masks
from makd_llm.objectives.relations import relation_divergence
from makd_llm.shown import AttentionShown

LENGTHS = (5, 9, 1, 7)


def tokens_BT() -> Tensor:
    return torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def attention(**settings: Any) -> Callable[[list[Tensor], Masks], Tensor]:
    window = settings.pop("window", None)

    def run(leaves: list[Tensor], masks: Masks) -> Tensor:
        teacher = [numbers(4, heads, 9, 8, seed=heads) for heads in (4, 2)]
        student = AttentionShown(leaves[0], leaves[1], None, window)
        return attention_divergence(
            student, AttentionShown(*teacher, None, window), masks, **settings
        )

    return run


def relations(leaves: list[Tensor], masks: Masks) -> Tensor:
    mine_BTM = torch.cat([leaves[0].transpose(1, 2).flatten(2)], -1)
    return relation_divergence(mine_BTM, numbers(4, 9, 12, seed=7), masks, heads=4)


CASES: dict[str, Callable[[list[Tensor], Masks], Tensor]] = {
    "attention": attention(),
    "window": attention(window=3),
    "logits": attention(divergence="logit_mse"),
    "heads": attention(heads=[3, 0, 1, 1]),
    "relations": relations,
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_padded_rows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for by_record in (True, False):
        if not by_record:
            monkeypatch.setattr(Masks, "by_record", lambda masks, x: None)
        leaves = [numbers(4, h, 9, 8, seed=9).requires_grad_() for h in (4, 2)]
        value = CASES[name](leaves, Masks(tokens_BT()))
        slopes = torch.autograd.grad(value, leaves, allow_unused=True)
        found.append([value, *(slope for slope in slopes if slope is not None)])
    assert len(found[0]) == len(found[1]) > 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by_record", [True, False])
def test_real_tokens_alone_are_compared_as_padded_rows(
    by_record: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_record:
        monkeypatch.setattr(Masks, "by_record", lambda masks, x: None)
    real = tokens_BT()
    masks = Masks(real, None, real.flatten().nonzero().flatten())
    ours, theirs = (
        [numbers(4, heads, 9, 8, seed=seed + heads) for heads in (4, 2)] for seed in (1, 5)
    )
    values = []
    for alone in (False, True):
        shown = [
            [x.transpose(1, 2)[real][None].transpose(1, 2) if alone else x for x in side]
            for side in (ours, theirs)
        ]
        values.append(
            attention_divergence(*(AttentionShown(*side, None, None) for side in shown), masks)
        )
        flat = [side[0].transpose(1, 2).flatten(2) for side in shown]
        values.append(relation_divergence(*flat, masks, heads=4))
    torch.testing.assert_close(values[:2], values[2:], rtol=1e-9, atol=1e-12)


def test_records_of_one_length_and_padding_on_the_left_stay_together() -> None:
    assert Masks(torch.ones(2, 4, dtype=torch.bool)).by_record(torch.ones(2, 4)) is None
    left = tokens_BT().flip(1)
    assert Masks(left, left).by_record(torch.ones(4, 9)) is None
