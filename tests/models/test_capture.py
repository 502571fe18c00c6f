"""Capture shows what the forward used, in every kind of architecture, and leaves no trace."""

import copy

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from makd_llm.models.capture import CAPTURING_SDPA, capture
from makd_llm.models.families import family_of
from makd_llm.shown import Needs

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SMALL,
            sliding_window=4,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
}


def built(name: str, attention: str) -> PreTrainedModel:
    model_class, config = MODELS[name]
    torch.manual_seed(0)
    copied = copy.deepcopy(config)  # it remembers the attention it was used with
    model: PreTrainedModel = model_class._from_config(copied, attn_implementation=attention)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_queries_keys_scale_and_window_give_the_eager_attention_maps(name: str) -> None:
    model, eager = built(name, CAPTURING_SDPA), built(name, "eager")
    eager.load_state_dict(model.state_dict())
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with capture(model, family_of(model.config), Needs(attention=frozenset({0, 1}))) as shown:
            model(ids)
        maps = eager(ids, output_attentions=True).attentions
    for layer in (0, 1):
        seen = shown.attention[layer]
        repeat = seen.query_BHTD.shape[1] // seen.key_BGTD.shape[1]
        key_BHTD = seen.key_BGTD.repeat_interleave(repeat, dim=1)
        scale = seen.scale if seen.scale is not None else seen.query_BHTD.shape[-1] ** -0.5
        scores = seen.query_BHTD @ key_BHTD.transpose(-1, -2) * scale
        row, column = torch.arange(9)[:, None], torch.arange(9)[None]
        hidden = (column > row) | (column <= row - (seen.window or 9))
        torch.testing.assert_close(
            scores.masked_fill(hidden, -torch.inf).softmax(-1), maps[layer], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", MODELS)
def test_matrices_and_hidden_states_are_those_of_the_forward(name: str) -> None:
    model = built(name, CAPTURING_SDPA)
    family = family_of(model.config)
    matrices = family.matrices(model.config, 1)
    pairs = frozenset((1, matrix.role) for matrix in matrices)
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    needs = Needs(hidden=frozenset({0, 1}), matrix=pairs, matrix_input=True)
    with torch.no_grad():
        with capture(model, family, needs) as shown:
            model(ids)
        layer = model.get_submodule(family.layers)[1]  # type: ignore[index]
        for matrix in matrices:
            whole = layer.get_submodule(matrix.module)(shown.matrix_input[1, matrix.role])
            part = whole.chunk(matrix.parts, dim=-1)[matrix.part]
            assert torch.equal(shown.matrix[1, matrix.role], part), matrix.role
    assert shown.hidden[0].shape == shown.hidden[1].shape == (2, 7, 32)
    assert not torch.equal(shown.hidden[0], shown.hidden[1])


def test_nothing_is_left_behind_and_nothing_is_taken_unasked() -> None:
    model = built("llama", CAPTURING_SDPA)
    family = family_of(model.config)
    ids = torch.arange(5)[None]
    needs = Needs(frozenset({0}), frozenset({1}), frozenset({(0, "q")}))
    with capture(model, family, needs) as shown:
        model(ids)
    assert set(shown.hidden) == {0} and set(shown.attention) == {1}
    assert set(shown.matrix) == {(0, "q")} and not shown.matrix_input
    before = shown.hidden[0]
    model(ids + 1)
    assert shown.hidden[0] is before, "after the `with` nobody listens"
    assert not any(module._forward_hooks for module in model.modules())
    with capture(model, family, Needs()) as shown:
        model(ids)
    assert not (shown.hidden or shown.attention or shown.matrix)


def test_replay_gives_each_matrix_the_others_input() -> None:
    model = built("llama", CAPTURING_SDPA)
    family = family_of(model.config)
    x = torch.randn(1, 5, 32)
    pairs = frozenset({(0, "q"), (0, "k")})
    needs = Needs(matrix=pairs, fed=pairs)
    with capture(model, family, needs, replay={(0, "q"): x, (0, "k"): 2 * x}) as shown:
        model(torch.arange(5)[None])
    attention = model.get_submodule(family.layers)[0].self_attn  # type: ignore[index]
    assert torch.equal(shown.fed[0, "q"], attention.q_proj(x))
    assert torch.equal(shown.fed[0, "k"], attention.k_proj(2 * x))
    with capture(model, family, Needs(matrix=pairs)) as own:
        model(torch.arange(5)[None])
    assert all(torch.equal(shown.matrix[pair], own.matrix[pair]) for pair in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_run_again_is_by_itself_and_disturbs_nothing(name: str) -> None:
    model = built(name, CAPTURING_SDPA)
    family = family_of(model.config)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    everything = Needs(
        hidden=frozenset({0, 1}),
        attention=frozenset({1}),
        matrix=frozenset({(1, "q"), (1, "down")}),
        plain=frozenset({(1, "k")}),
        layer_input=frozenset({1}),
    )
    with capture(model, family, everything) as usual:
        model(ids)
    other = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    again = everything | Needs(again=frozenset({(1, "student"), (1, "teacher")}))
    with capture(model, family, again, {(1, "layer"): other}) as shown:
        model(ids)
    assert torch.equal(shown.layer_input[1], usual.layer_input[1])
    for kind in ("hidden", "matrix", "plain"):
        first, second = getattr(usual, kind), getattr(shown, kind)
        assert first.keys() == second.keys() and all(
            torch.equal(first[k], second[k]) for k in first
        )
    assert torch.equal(shown.attention[1].query_BHTD, usual.attention[1].query_BHTD)
    torch.testing.assert_close(shown.again[1, "student"], shown.hidden[1])
    assert not torch.allclose(shown.again[1, "teacher"], shown.hidden[1])
    layers = model.get_submodule(family.layers)
    (gradient,) = torch.autograd.grad(
        shown.again[1, "student"].sum(), next(layers[0].parameters()), allow_unused=True
    )
    assert gradient is None, "nothing reaches the layer before"
    replaced = layers[0].register_forward_hook(
        lambda m, a, o: (other, *o[1:]) if isinstance(o, tuple) else other
    )
    with capture(model, family, Needs(hidden=frozenset({1}))) as by_hand:
        model(ids)
    replaced.remove()
    torch.testing.assert_close(shown.again[1, "teacher"], by_hand.hidden[1])
