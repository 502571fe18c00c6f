"""Key-value heads that are alike are merged, and nothing changes where they are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from makd_llm.checkpoint.folder import read_config
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.models.origin import Origin, origin_of
from makd_llm.reshape.heads import (
    HEADS_FAMILIES,
    averaged_heads,
    permuted_heads,
    query_order,
    similar_groups,
    similarity,
)
from makd_llm.reshape.reshape import Heads, Shape, reshape
from makd_llm.testing import tiny_config

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]])
PAIRS = ((0, 2), (1, 3))


def test_most_similar_first_in_sets_of_one_size() -> None:
    near = torch.eye(6)
    for i, j, how in ((1, 4, 0.9), (1, 5, 0.2), (4, 5, 0.5), (0, 2, 0.3), (1, 0, 0.6), (4, 0, 0.0)):
        near[i, j] = near[j, i] = how
    assert similar_groups(near, 3) == ((0, 2), (1, 4), (3, 5))
    assert similar_groups(near, 2) == ((0, 2, 3), (1, 4, 5))
    assert similar_groups(near, 6) == tuple((i,) for i in range(6))
    assert similar_groups(near, 1) == (tuple(range(6)),)


def test_similarity_is_the_cosine_of_queries_and_keys_together() -> None:
    generator = torch.Generator().manual_seed(0)
    q_MK, k_NK = (torch.randn(n, 5, generator=generator) for n in (12, 6))
    found = similarity(q_MK, k_NK, 3)
    joined = [torch.cat([q_MK[4 * g : 4 * g + 4], k_NK[2 * g : 2 * g + 2]]) for g in range(3)]
    for i in range(3):
        for j in range(3):
            right = torch.cosine_similarity(joined[i].flatten(), joined[j].flatten(), dim=0)
            assert float(found[i, j]) == pytest.approx(float(right), abs=1e-6)


def test_heads_are_moved_and_averaged_whole() -> None:
    order = query_order(PAIRS, 2)
    assert order == (0, 1, 4, 5, 2, 3, 6, 7)
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    assert permuted_heads(rows, order, 0)[:, 0].tolist() == [
        *(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15)
    ]
    assert torch.equal(permuted_heads(rows.T, order, 1), permuted_heads(rows, order, 0).T)
    assert averaged_heads(torch.arange(8.0), PAIRS).tolist() == [2, 3, 4, 5]
    third = torch.tensor([1 / 3, 1 / 3, 1 / 3], dtype=torch.bfloat16)
    assert torch.equal(averaged_heads(third, ((0, 1, 2),)), third[:1])


def saved(folder: Path, model_type: str, pairs: tuple[tuple[int, ...], ...] | None) -> Any:
    """A random teacher of 8 query and 4 key-value heads. pairs: of these the second is made the
    first, queries excepted but for a little, so that which are alike is known.
    """
    torch.manual_seed(0)
    config = tiny_config(model_type)
    config.initializer_range = 0.2
    config.num_attention_heads, config.num_key_value_heads = 8, 4
    config.head_dim = getattr(config, "head_dim", None) or 4
    model = model_class_for(config)(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        module, _, _ = name.rpartition(".")
        whole_key = module.endswith("k_norm") and len(parameter) > config.head_dim
        if pairs and (module.endswith(("k_proj", "v_proj")) or whole_key):
            heads = parameter.data.unflatten(0, (4, -1))
            for first, second in pairs:
                heads[second] = heads[first]
        if pairs and name.endswith("q_proj.weight"):
            heads = parameter.data.unflatten(0, (4, -1))
            for first, second in pairs:
                heads[second] = heads[first] + 0.05 * heads[second]
    model.save_pretrained(folder)
    return model


def shared(folder: Path, key_value: int) -> Origin:
    return reshape(
        folder / "teacher",
        folder / "shaped",
        Shape(heads=Heads(key_value)),
        [],
        tokenizer=None,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("model_type", HEADS_FAMILIES)
def test_equal_heads_are_merged_and_nothing_changes(model_type: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "teacher", model_type, PAIRS)
    origin = shared(tmp_path, 2)
    assert origin.key_value_heads == (PAIRS,) * 2
    assert origin.query_heads == ((0, 1, 4, 5, 2, 3, 6, 7),) * 2
    assert origin.layers == (0, 1) and origin.channels is None
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "shaped", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_key_value_heads == 2 and type(loaded) is type(model)
    with torch.no_grad():
        ours, right = loaded(IDS).logits, model(IDS).logits
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


def test_heads_that_differ_become_their_mean(tmp_path: Path) -> None:
    saved(tmp_path / "teacher", "llama", None)
    origin = shared(tmp_path, 2)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("teacher", "shaped"))
    assert origin.key_value_heads is not None
    for layer, groups in enumerate(origin.key_value_heads):
        for leaf in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            name = f"model.layers.{layer}.self_attn.{leaf}"
            old, new = (t[name].unflatten(0, (n, -1)) for t, n in ((before, 4), (after, 2)))
            for place, group in enumerate(groups):
                torch.testing.assert_close(new[place], old[list(group)].mean(0))
    name = "model.layers.0.self_attn.o_proj.bias"
    assert torch.equal(before[name], after[name])


def test_as_many_heads_as_there_are_change_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "teacher", "qwen3", None)
    origin = shared(tmp_path, 4)
    assert origin.query_heads == (tuple(range(8)),) * 2
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("teacher", "shaped"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert origin_of(read_config(tmp_path / "shaped")) == origin
