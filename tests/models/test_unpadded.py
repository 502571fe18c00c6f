"""A backbone on real tokens alone says what it says on padded rows, in every architecture."""

import pytest
import torch
from torch import Tensor

from makd_llm.data.batch import Batch, collate
from makd_llm.data.schema import Example
from makd_llm.models import unpadded
from makd_llm.models.capture import attention_of, capture
from makd_llm.models.causal import CausalModel
from makd_llm.models.families import FAMILIES, family_of
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.shown import LAYER, Needs, Shown
from makd_llm.testing import tiny_config

LENGTHS = (3, 9, 1, 6)
# Falcon takes its attention from nowhere; Gemma 2's capped logits need eager attention.
LEFT_AS_IT_IS = {"falcon", "gemma2"}
# Its experts are chosen by token, and are not distilled yet.
MODELS = sorted(set(FAMILIES) - {"mixtral", "qwen2_moe", "qwen3_moe"})


def built(model_type: str) -> CausalModel:
    config = tiny_config(model_type)
    torch.manual_seed(0)
    model = model_class_for(config)._from_config(
        config, dtype=torch.float64, attn_implementation=attention_of(config)
    )
    return CausalModel(model.eval(), family_of(config))


def batch_of(change: int | None = None) -> Batch:
    numbers = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 46, (n,), generator=numbers).tolist() for n in LENGTHS]
    if change is not None:
        rows[change] = [token + 1 for token in rows[change]]
    examples = [Example(str(n), row, max(len(row) - 2, 1)) for n, row in enumerate(rows)]
    return collate(examples, 0)


def seen(model: CausalModel, batch: Batch) -> tuple[Tensor, Shown]:
    matrices = frozenset(
        (layer, matrix.key)
        for layer in (0, 1)
        for matrix in model.family.matrices(model.model.config, layer)
    )
    layers = frozenset({0, 1})
    needs = Needs(
        hidden=layers, layer_input=layers, attention=layers, matrix=matrices, matrix_input=True
    )
    with capture(model.model, model.family, needs) as shown:
        hidden_BTD = model(batch)
    return hidden_BTD, shown


def real(x: Tensor, batch: Batch) -> Tensor:
    """Of (B, T, ...) the real tokens; of (B, H, T, D) likewise; (1, N, ...) has no others."""
    if x.dim() == 4:
        x = x.transpose(1, 2)
    return x[0] if x.shape[:2] == (1, sum(LENGTHS)) else x[batch.token_mask_BT]


@pytest.mark.parametrize("devices", [frozenset({"cpu"}), frozenset()], ids=["records", "rows"])
@pytest.mark.parametrize("name", MODELS)
def test_states_captures_and_gradients_are_those_of_padded_rows(
    name: str, devices: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpadded, "RECORDS_APART", devices)
    model, batch = built(name), batch_of()
    assert model.without_padding == (name not in LEFT_AS_IT_IS)
    found: dict[bool, list[Tensor]] = {}
    for padded in (True, False):
        hidden_BTD, shown = seen(model, batch.with_padding() if padded else batch)
        tensors = [hidden_BTD]
        for place in (shown.hidden, shown.layer_input, shown.matrix, shown.matrix_input):
            assert place
            tensors += [place[key] for key in sorted(place)]  # type: ignore[type-var,index]
        for layer in sorted(shown.attention):
            tensors += [shown.attention[layer].query_BHTD, shown.attention[layer].key_BGTD]
        tensors = [real(x, batch) for x in tensors]
        weights = list(model.model.parameters())
        loss = torch.stack([x.square().mean() for x in tensors]).sum()
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        found[padded] = tensors + [slope for slope in slopes if slope is not None]
    assert len(found[True]) == len(found[False]) > 10
    for with_padding, without in zip(found[True], found[False], strict=True):
        # Gemma computes its norms in fp32, whatever the model is in.
        torch.testing.assert_close(without, with_padding, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_no_padding_goes_through_the_backbone(name: str) -> None:
    model, batch = built(name), batch_of()
    rows: list[int] = []
    matrix = model.family.matrices(model.model.config, 0)[0]
    layer = model.model.get_submodule(model.family.layers)[0]  # type: ignore[index]
    layer.get_submodule(matrix.module).register_forward_hook(
        lambda module, args, output: rows.append(args[0].flatten(0, -2).shape[0])
    )
    model(batch)
    model(batch.with_padding())
    assert rows == [sum(LENGTHS), len(LENGTHS) * max(LENGTHS)]


@pytest.mark.parametrize("devices", [frozenset({"cpu"}), frozenset()], ids=["records", "rows"])
def test_a_record_sees_no_other(devices: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpadded, "RECORDS_APART", devices)
    model = built("llama")
    before, after = model(batch_of()), model(batch_of(change=0))
    assert not torch.equal(before[0, :3], after[0, :3])
    for row in (1, 2, 3):
        assert torch.equal(before[row], after[row])


def test_checkpointing_has_the_same_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model = built("llama")
        model.model.train()
        if checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(batch_of()).square().sum().backward()
        found.append([p.grad for p in model.model.parameters() if p.grad is not None])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_what_runs_again_on_the_teachers_inputs_is_the_same() -> None:
    model, batch = built("llama"), batch_of()
    key = model.family.matrices(model.model.config, 1)[0].key
    replay = {
        place: torch.randn(len(LENGTHS), max(LENGTHS), 32, dtype=torch.float64)
        for place in ((1, key), (1, LAYER))
    }
    needs = Needs(fed=frozenset({(1, key)}), again=frozenset({(1, "student"), (1, "teacher")}))
    found = []
    for made in (batch.with_padding(), batch):
        given = (
            replay
            if made.tokens_N is None
            else {p: real(x, batch)[None] for p, x in replay.items()}
        )
        with capture(model.model, model.family, needs, given) as shown:
            model(made)
        found.append([*shown.fed.values(), *shown.again.values()])
    assert len(found[0]) == 3
    for padded, without in zip(*found, strict=True):
        torch.testing.assert_close(real(without, batch), real(padded, batch), rtol=1e-9, atol=1e-12)
