"""Perplexity: every token predicted once, whatever the batch; transformers' own loss agrees."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from makd_llm.data.batch import Batch
from makd_llm.data.schema import Example
from makd_llm.data.text import text_windows
from makd_llm.evaluation.perplexity import perplexity
from makd_llm.testing import launch_ranks


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_every_token_but_the_first_is_predicted_once(length: int, window: int, data: Any) -> None:
    stride = data.draw(st.integers(1, window - 1))
    tokens = list(range(length))
    predicted = []
    for example in text_windows(tokens, window=window, stride=stride):
        assert len(example.input_ids) <= window and example.prompt_length >= 1
        predicted += example.input_ids[example.prompt_length :]
    assert predicted == tokens[1:]


def test_a_stride_as_long_as_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="less than the window"):
        text_windows([1, 2, 3], window=4, stride=4)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny / "teacher", dtype=torch.float32).eval()


def forward_of(model: Any) -> Callable[..., Any]:
    @torch.no_grad()
    def forward(batch: Batch, at_head: Any) -> Any:
        hidden = model.model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
        return at_head(hidden.last_hidden_state, model.lm_head.weight)

    return forward


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 4, 14, 6, 11, 7, 5]
    return [
        Example(f"r{n}", torch.randint(3, 250, (n,), generator=generator).tolist(), n // 2)
        for n in lengths
    ]


def test_it_equals_the_loss_of_transformers(model: Any) -> None:
    example = examples()[2]
    ids = torch.tensor([example.input_ids])
    labels = ids.clone()
    labels[:, : example.prompt_length] = -100
    with torch.no_grad():
        loss = model(ids, labels=labels).loss.item()
    found = perplexity(forward_of(model), [example], batch_size=1, pad_id=2, utf8_bytes=10)
    assert found.value == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.tokens == len(example.input_ids) - example.prompt_length
    assert found.bits_per_byte == pytest.approx(loss * found.tokens / math.log(2) / 10, rel=1e-4)


def test_the_batch_size_does_not_matter(model: Any) -> None:
    found = [
        perplexity(forward_of(model), examples(), batch_size=size, pad_id=2) for size in (1, 3, 16)
    ]
    assert len({f.tokens for f in found}) == 1
    assert found[0].nats == pytest.approx(found[1].nats, rel=1e-5)
    assert found[0].nats == pytest.approx(found[2].nats, rel=1e-5)
    alone = [
        perplexity(forward_of(model), [example], batch_size=1, pad_id=2).nats
        for example in examples()
    ]
    assert found[1].each == pytest.approx(alone, rel=1e-5) and sum(alone) > 0


def on_two_ranks(folder: str) -> tuple[float, int, list[str]]:
    """Sharded, and with 7 examples and 5 prompts for 2 ranks: one of them runs out first."""
    from makd_llm import distributed
    from makd_llm.generation.summaries import summarize
    from makd_llm.models.sharded import load_sharded
    from makd_llm.models.source import load_tokenizer
    from makd_llm.train.engine import Frozen

    distributed.init()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    teacher = Path(folder) / "teacher"
    engine = Frozen(load_sharded(teacher, config, torch.float32), config)
    found = perplexity(engine, examples(), batch_size=2, pad_id=2)
    prompts = [example.input_ids for example in examples()[:5]]
    texts = summarize(
        engine.generate,
        load_tokenizer(teacher),
        prompts,
        batch_size=1,
        max_new_tokens=6,
        eos_ids=[2],
        pad_id=2,
    )
    again = perplexity(engine, examples(), batch_size=2, pad_id=2)
    assert again == found, "a generation in between leaves no trace"
    return found.nats, found.tokens, texts


def test_uneven_shares_on_two_sharded_ranks_equal_one_process(tiny: Path, model: Any) -> None:
    from transformers import AutoTokenizer

    results = launch_ranks(2, on_two_ranks, str(tiny))
    assert results[0] == results[1]
    nats, tokens, texts = results[0]
    alone = perplexity(forward_of(model), examples(), batch_size=4, pad_id=2)
    assert tokens == alone.tokens and nats == pytest.approx(alone.nats, rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "teacher")
    for example, text in zip(examples()[:5], texts, strict=True):
        ids = torch.tensor([example.input_ids])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            eos_token_id=[2], pad_token_id=2,
        )  # fmt: skip
        new = written[0, ids.shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()
