"""The divergence by layer and head is that of the attention maps, however many ranks share the
records; what cannot be compared is refused by name.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from makd_llm.checkpoint.folder import read_config
from makd_llm.data.schema import Example
from makd_llm.errors import UserError
from makd_llm.evaluation.attention import (
    Divergences,
    PairedLayer,
    attention_divergence,
    drawn,
    paired_layers,
)
from makd_llm.models.sharded import load_sharded
from makd_llm.reshape.reshape import Depth, Heads, Shape, reshape
from makd_llm.testing import launch_ranks, tiny_config
from makd_llm.testing.training import FP32_ZERO3, factorized
from makd_llm.train.deepspeed_config import frozen_config
from makd_llm.train.engine import Frozen


def examples(count: int = 5) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 4, 14, 6, 11, 7, 5][:count]
    return [
        Example(f"r{n}", torch.randint(3, 250, (n,), generator=generator).tolist(), n // 2)
        for n in lengths
    ]


def layers_of(folder: Path, student: Path) -> list[PairedLayer]:
    return paired_layers(read_config(student), read_config(folder / "teacher"))


def measured(folder: Path) -> dict[str, Divergences]:
    """On every rank: teacher/ against each student, all of them sharded."""
    cut = factorized(folder)
    reshape(
        folder / "teacher",
        folder / "shorter",
        Shape(depth=Depth(2), heads=Heads(1)),
        [],
        tokenizer=None,
        dtype=torch.float32,
    )
    ds = frozen_config(FP32_ZERO3, micro_batch_size=1)
    teacher = Frozen(load_sharded(folder / "teacher", ds, torch.float32), ds)
    found = {}
    for student in (folder / "teacher", cut, folder / "shorter"):
        model = Frozen(load_sharded(student, ds, torch.float32), ds)
        chosen = drawn(examples(), 5, 0)
        layers = layers_of(folder, student)
        found[student.name] = attention_divergence(teacher, model, layers, chosen, pad_id=2)
        model.close()
    teacher.close()
    return found


def by_maps(folder: Path, student: Path) -> list[list[float]]:
    """The same from whole attention maps, as transformers' eager attention makes them."""
    models = [
        AutoModelForCausalLM.from_pretrained(
            f, attn_implementation="eager", dtype=torch.float32
        ).eval()
        for f in (folder / "teacher", student)
    ]
    layers = layers_of(folder, student)
    sums = [torch.zeros(len(layer.heads), dtype=torch.float64) for layer in layers]
    tokens = 0
    for example in examples():
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            theirs, ours = (m(ids, output_attentions=True).attentions for m in models)
        tokens += ids.numel()
        for layer, total in zip(layers, sums, strict=True):
            p_HTT = theirs[layer.teacher][0, list(layer.heads)].double()
            q_HTT = ours[layer.student][0].double()
            total += torch.where(p_HTT > 0, p_HTT * (p_HTT / q_HTT).log(), 0.0).sum((1, 2))
    return [(total / tokens).tolist() for total in sums]


def test_two_ranks_find_the_divergence_of_the_maps(tiny: Path) -> None:
    one, other = launch_ranks(2, measured, tiny)
    assert one == other
    for name, found in one.items():
        expected = by_maps(tiny, tiny / name)
        assert found.tokens == sum(len(e.input_ids) for e in examples())
        assert [len(heads) for heads in found.by_head] == [4] * len(expected)
        for measured_heads, heads in zip(found.by_head, expected, strict=True):
            assert measured_heads == pytest.approx(heads, rel=1e-4, abs=1e-6)
    assert max(max(heads) for heads in one["teacher"].by_head) < 1e-6
    assert min(min(heads) for heads in one["student-2"].by_head) > 1e-4
    shorter = layers_of(tiny, tiny / "shorter")
    assert [layer.student for layer in shorter] == [0, 1]
    assert shorter[1].teacher > 1


def test_records_are_drawn_by_the_seed() -> None:
    every = examples(7)
    assert drawn(every, 3, 1) == drawn(every, 3, 1) and len(drawn(every, 3, 1)) == 3
    assert drawn(every, 0, 1) == []
    some = {tuple(e.record_id for e in drawn(every, 3, seed)) for seed in range(8)}
    assert len(some) > 1
    lengths = [len(e.input_ids) for e in drawn(every, 99, 0)]
    assert lengths == sorted(len(e.input_ids) for e in every)


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    llama, falcon = tiny_config("llama"), tiny_config("falcon")
    with pytest.raises(UserError, match="falcon"):
        paired_layers(llama, falcon)
    other = tiny_config("llama")
    other.num_hidden_layers = 1
    with pytest.raises(UserError, match="layers"):
        paired_layers(other, llama)
    slid = tiny_config("gemma3_text")
    full = tiny_config("gemma3_text")
    full.layer_types = ["full_attention", "full_attention"]
    with pytest.raises(UserError, match="sees other tokens"):
        paired_layers(full, slid)
