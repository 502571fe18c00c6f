"""Model folders tensor by tensor: what transformers writes is read, what is written it reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from makd_llm.checkpoint.folder import TensorReader, TensorWriter, read_config, write_config
from makd_llm.errors import UserError
from makd_llm.testing import tiny_config, unstacked


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def sharded(llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


def assert_holds(reader: TensorReader, tensors: dict[str, torch.Tensor]) -> None:
    assert reader.names() == tensors.keys()
    for name, tensor in tensors.items():
        assert name in reader
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.get(name).dtype == tensor.dtype
        assert torch.equal(reader.get(name), tensor)
    assert reader.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_reads_what_transformers_writes(llama: LlamaForCausalLM, sharded: Path) -> None:
    assert_holds(TensorReader(sharded), llama.state_dict())
    llama.bfloat16().save_pretrained(sharded.parent / "single")
    assert_holds(TensorReader(sharded.parent / "single"), llama.state_dict())


@pytest.mark.parametrize("max_shard_bytes", [2**30, 10_000])
def test_transformers_reads_what_is_written(
    llama: LlamaForCausalLM, tmp_path: Path, max_shard_bytes: int
) -> None:
    llama = llama.bfloat16()
    llama.config.dtype = torch.bfloat16
    with TensorWriter(tmp_path / "model", max_shard_bytes=max_shard_bytes) as writer:
        write_config(writer.staging, llama.config, GenerationConfig(max_new_tokens=7))
        for name, tensor in llama.state_dict().items():
            writer.add(name, tensor)
    assert_holds(TensorReader(tmp_path / "model"), llama.state_dict())
    result: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    loaded, info = result
    assert not any(info.values()), info
    assert loaded.generation_config.max_new_tokens == 7
    torch.testing.assert_close(dict(loaded.state_dict()), dict(llama.state_dict()))
    assert read_config(tmp_path / "model").hidden_size == 32
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_shard_is_no_larger_than_asked_unless_one_tensor_is(tmp_path: Path) -> None:
    sizes = [10, 200, 10, 60, 30, 30]
    with TensorWriter(tmp_path / "model", max_shard_bytes=400) as writer:
        for number, size in enumerate(sizes):
            writer.add(f"t{number}", torch.full((size,), float(number)))
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)
    ]
    contents = [load_file(shard) for shard in shards]
    assert [list(content) for content in contents] == [["t0"], ["t1"], ["t2", "t3", "t4"], ["t5"]]
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * sum(sizes), "total_parameters": sum(sizes)}
    assert TensorReader(tmp_path / "model").nbytes == 4 * sum(sizes)


def test_a_tensor_is_copied_when_it_is_added(tmp_path: Path) -> None:
    buffer = torch.arange(12.0).reshape(3, 4)
    with TensorWriter(tmp_path / "model") as writer:
        writer.add("transposed", buffer.T)
        writer.add("row", buffer[1])
        with pytest.raises(ValueError, match="'row'"):
            writer.add("row", buffer[1])
        buffer.zero_()
    reader = TensorReader(tmp_path / "model")
    assert torch.equal(reader.get("transposed"), torch.arange(12.0).reshape(3, 4).T)
    assert torch.equal(reader.get("row"), torch.arange(4.0, 8.0))


def test_a_failed_write_leaves_the_old_folder(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    target = tmp_path / "model"
    llama.save_pretrained(target)
    with pytest.raises(KeyError), TensorWriter(target, max_shard_bytes=8) as writer:
        for name in ("a", "b", "c"):
            writer.add(name, torch.ones(9))
        raise KeyError
    assert_holds(TensorReader(target), llama.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_finished_write_replaces_the_old_folder(sharded: Path) -> None:
    with TensorWriter(sharded) as writer:
        writer.add("only", torch.ones(3))
    assert [path.name for path in sharded.iterdir()] == ["model.safetensors"]
    assert [path.name for path in sharded.parent.iterdir()] == ["sharded"]


def test_a_write_that_was_killed_is_cleaned_up_by_the_next(sharded: Path) -> None:
    killed = TensorWriter(sharded, max_shard_bytes=8)
    killed.add("a", torch.ones(9))
    killed.add("b", torch.ones(9))
    # Killed between the two renames: the old folder has moved away, the new one is not in place.
    sharded.rename(killed._replaced)
    with pytest.raises(KeyError), TensorWriter(sharded):
        raise KeyError
    assert len(TensorReader(sharded).names()) == 21
    assert [path.name for path in sharded.parent.iterdir()] == ["sharded"]


@pytest.mark.parametrize("foreign", ["thesis.tex", "src/"])
def test_a_folder_with_other_things_in_it_is_not_replaced(tmp_path: Path, foreign: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    if foreign.endswith("/"):
        (tmp_path / foreign).mkdir()
    else:
        (tmp_path / foreign).write_text("years of work")
    with pytest.raises(UserError, match=foreign.rstrip("/")):
        TensorWriter(tmp_path)
    assert (tmp_path / foreign).exists()


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("not a folder")
    with pytest.raises(UserError, match="is a file"):
        TensorWriter(tmp_path / "model")


def test_names_with_and_without_the_backbones_prefix(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with TensorWriter(tmp_path / "hub") as writer:  # as GPT-2's files on the Hub are
        for name, tensor in model.transformer.state_dict().items():
            writer.add(name, tensor)
    reader = TensorReader(tmp_path / "hub")
    name = "transformer.h.0.attn.c_attn.weight"
    assert reader.resolve(name, "transformer") == reader.resolve(name) == "h.0.attn.c_attn.weight"
    assert name in reader and "h.0.attn.c_attn.weight" in reader
    assert torch.equal(reader.get(name), model.get_parameter(name))
    assert reader.shape(name) == (8, 24)
    with pytest.raises(UserError, match=r"other\.h\.0"):
        reader.resolve("other.h.0.attn.c_attn.weight", "transformer")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "stacked"])
def test_experts_by_their_own_names_whatever_the_files_call_them(kind: str, tmp_path: Path) -> None:
    model_type = "mixtral" if kind == "stacked" else kind
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    if kind == "stacked":
        with TensorWriter(tmp_path / "model") as writer:
            for name, tensor in model.state_dict().items():
                writer.add(name, tensor)
    else:
        model.save_pretrained(tmp_path / "model")
    reader = TensorReader(tmp_path / "model")
    own = unstacked(model)
    block = "model.layers.1.mlp"
    in_file = {
        "mixtral": "model.layers.1.block_sparse_moe.experts.3.w3.weight",
        "qwen3_moe": f"{block}.experts.3.up_proj.weight",
        "stacked": f"{block}.experts.gate_up_proj",
    }
    assert reader.resolve(f"{block}.experts.3.up_proj.weight") == in_file[kind]
    for name, tensor in own.state_dict().items():
        assert name in reader
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader.get(name), tensor), name
    if kind == "stacked":  # a stored stack may also be asked for whole
        assert torch.equal(reader.get(in_file[kind]), model.get_parameter(in_file[kind]))
    assert f"{block}.experts.9.up_proj.weight" not in reader
    assert f"{block}.experts.9.down_proj.weight" not in reader


def damage(folder: Path, how: str) -> Path:
    """Damage one file of a sharded folder; return the file that the error must name."""
    shard = sorted(folder.glob("*.safetensors"))[1]
    index = folder / "model.safetensors.index.json"
    if how == "cut short":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "cut in the table":
        shard.write_bytes(shard.read_bytes()[:20])
    elif how == "empty":
        shard.write_bytes(b"")
    elif how == "missing":
        shard.unlink()
    elif how == "index":
        index.write_text(index.read_text()[:-50])
        return index
    elif how == "no weights":
        for path in [*folder.glob("*.safetensors"), index]:
            path.unlink()
        return folder
    return shard


@pytest.mark.parametrize(
    "how", ["cut short", "cut in the table", "empty", "missing", "index", "no weights"]
)
def test_damage_is_an_error_that_names_the_file(sharded: Path, how: str) -> None:
    damaged = damage(sharded, how)
    with pytest.raises(UserError) as error:
        reader = TensorReader(sharded)
        for name in reader.names():
            reader.get(name)
    assert str(damaged) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tensor_that_its_shard_lacks_is_an_error(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    shard = table["weight_map"]["model.norm.weight"]
    table["weight_map"]["model.extra.weight"] = shard
    index.write_text(json.dumps(table))
    for ask in (TensorReader(sharded).get, TensorReader(sharded).shape):
        with pytest.raises(UserError, match=shard):
            ask("model.extra.weight")
    with pytest.raises(UserError, match=r"lacks the tensor 'model\.more\.weight'"):
        TensorReader(sharded).get("model.more.weight")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "no-such-type"}', "{}"])
def test_an_unreadable_config_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json") as error:
        read_config(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
