"""Greedy and beams are transformers' own; draws follow the distribution, each text by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from makd_llm.data.batch import Batch
from makd_llm.generation.decoding import Decoding, Draw, continuations

NEW = 6
PROMPTS = [[1, 30, 40, 50], [1, 60], [1, 70, 80, 90, 100, 110, 120]]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    # In float64, so that padding changes no text by rounding.
    return LlamaForCausalLM.from_pretrained(tiny / "teacher", dtype=torch.float64).eval()


def written(
    model: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    draws_BN: np.ndarray | None = None,
) -> list[list[list[int]]]:
    def generate(batch: Batch, **arguments: Any) -> Tensor:
        ids: Tensor = model.generate(
            batch.input_ids_BT, attention_mask=batch.attention_mask_BT, **arguments
        )
        return ids

    return continuations(generate, prompts, decoding, eos_ids=[2, 7], pad_id=2, draws_BN=draws_BN)


def by_transformers(model: Any, prompt: list[int], **arguments: Any) -> list[list[int]]:
    """Each text up to its end, of one prompt without padding."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=[2, 7],
        pad_token_id=2,
        **arguments,
    )
    texts = []
    for new in found[:, len(prompt) :].tolist():
        end = next((i for i, id_ in enumerate(new) if id_ in (2, 7)), len(new))
        texts.append(new[: end + 1])
    return texts


def test_greedy_is_transformers_own(model: Any) -> None:
    found = written(model, PROMPTS, Decoding(max_new_tokens=NEW))
    assert found == [by_transformers(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(("beams", "wanted"), [(1, 1), (3, 1), (4, 3)])
def test_beams_are_transformers_own_and_the_best_come_first(
    model: Any, beams: int, wanted: int
) -> None:
    decoding = Decoding("beam", NEW, beams=beams, per_document=wanted)
    found = written(model, PROMPTS, decoding)
    own = {"num_beams": beams, "num_return_sequences": wanted}
    assert found == [by_transformers(model, prompt, **own) for prompt in PROMPTS]
    assert all(len(texts) == wanted for texts in found)


def test_what_a_model_brings_along_has_no_say(model: Any) -> None:
    before = written(model, PROMPTS, Decoding(max_new_tokens=NEW))
    own = model.generation_config
    changes = {"do_sample": True, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "top_k": 2}
    kept = {name: getattr(own, name) for name in changes}
    own.update(**changes)
    try:
        assert written(model, PROMPTS, Decoding(max_new_tokens=NEW)) == before
    finally:
        own.update(**kept)


def draws(decoding: Decoding, rows: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.stack([decoding.draws_of(*row) for row in rows])


def test_a_sample_does_not_depend_on_its_batch(model: Any) -> None:
    decoding = Decoding("sample", NEW, temperature=0.9, top_p=0.95, top_k=50, seed=3)
    rows = [(0, 0), (1, 0), (2, 0)]
    together = written(model, PROMPTS, decoding, draws(decoding, rows))
    for prompt, row, expected in zip(PROMPTS, rows, together, strict=True):
        assert written(model, [prompt], decoding, draws(decoding, [row])) == [expected]


def test_seeds_records_and_copies_give_different_samples(model: Any) -> None:
    texts = set()
    for seed, row in ((0, (0, 0)), (1, (0, 0)), (0, (1, 0)), (0, (0, 1))):
        decoding = Decoding("sample", NEW, seed=seed)
        ((text,),) = written(model, PROMPTS[:1], decoding, draws(decoding, [row]))
        texts.add(tuple(text))
    assert len(texts) == 4


def test_numbers_are_spread_evenly_and_a_longer_text_begins_alike() -> None:
    numbers = Decoding("sample", 4000).draws_of(7, 1)
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    assert np.histogram(numbers, bins=10, range=(0.0, 1.0))[0].min() > 320
    assert (Decoding("sample", 50).draws_of(7, 1) == numbers[:50]).all()


def drawn(scores_V: list[float], numbers: np.ndarray) -> Tensor:
    """The token that each of the numbers draws."""
    scores_BV = torch.tensor([scores_V]).repeat(len(numbers), 1)
    draw = Draw(torch.from_numpy(numbers)[:, None], prompt_length=5)
    return draw(torch.zeros(len(numbers), 5, dtype=torch.long), scores_BV).argmax(-1)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    numbers = (np.arange(1000) + 0.5) / 1000  # as even as numbers can be
    counts = drawn(probabilities.log().tolist(), numbers).bincount(minlength=5)
    assert (counts - 1000 * probabilities).abs().max() <= 1
    assert counts[1] == counts[4] == 0


def test_an_impossible_token_is_not_drawn_at_the_ends_either() -> None:
    never = -float("inf")
    ends = np.array([0.0, np.nextafter(1.0, 0.0)])
    assert drawn([never, 0.3, 0.1, never], ends).tolist() == [1, 2]


def test_only_the_top_k_and_the_top_p_are_drawn(model: Any) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        p_V = model(prompt).logits[0, -1].softmax(-1)
    order = p_V.argsort(descending=True)
    nucleus = order[: int((p_V[order].cumsum(0) < 0.3).sum()) + 1].tolist()
    numbers = [np.array([[x]]) for x in np.linspace(0.0, 0.999, 40)]
    for decoding, allowed in (
        (Decoding("sample", 1, top_k=3), order[:3].tolist()),
        (Decoding("sample", 1, top_p=0.3), nucleus),
    ):
        found = {written(model, PROMPTS[:1], decoding, n)[0][0][0] for n in numbers}
        assert found == set(allowed)
    cold = Decoding("sample", 1, temperature=1e-4)
    assert {written(model, PROMPTS[:1], cold, n)[0][0][0] for n in numbers} == {int(order[0])}


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="greedy"):
        Decoding("greedy", per_document=2)
    with pytest.raises(ValueError, match="4 beams have no 5"):
        Decoding("beam", beams=4, per_document=5)
    with pytest.raises(ValueError, match="draws belong to sampling"):
        continuations(lambda batch, **more: batch.input_ids_BT, [[1]], Decoding("sample"),
                      eos_ids=[2], pad_id=2)  # fmt: skip


def test_only_what_has_a_say_is_said() -> None:
    assert Decoding("greedy", 5, beams=9, seed=3).says == {
        "method": "greedy", "max_new_tokens": 5, "per_document": 1,
    }  # fmt: skip
    assert "seed" in Decoding("sample").says and "beams" in Decoding("beam").says
