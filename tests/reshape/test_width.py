"""What is active is kept: nothing changes where all of it is, or where only what is dead goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from makd_llm import distributed
from makd_llm.checkpoint.folder import read_config
from makd_llm.data.batch import Batch, batches_of
from makd_llm.data.schema import Example
from makd_llm.layerwise.walk import Walk
from makd_llm.models.capture import attention_of
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.models.origin import Origin, origin_of
from makd_llm.reshape.reshape import Shape, Width, reshape
from makd_llm.reshape.width import (
    GEMMAS,
    WIDTH_FAMILIES,
    WidthCut,
    cut_tensor,
    measured_activity,
    most_active,
    scaled_norm,
)
from makd_llm.testing import run_on_ranks, tiny_config

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]])
DEAD_CHANNELS = (1, 2, 7, 20, 21, 22, 30, 31)
DEAD_NEURONS = ((0, 5, 39), (3, 8, 9))


def batches(rank: int = 0, world: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    lengths = (12, 7, 12, 9)
    rows = [torch.randint(3, 48, (n,), generator=generator).tolist() for n in lengths]
    return batches_of([Example(str(i), row, 1) for i, row in enumerate(rows)][rank::world], 2, 0)


def tiny(model_type: str, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = tiny_config(model_type, tied)
    config.initializer_range, config.pad_token_id = 0.2, None
    config.rms_norm_eps = 1e-9  # it does not grow with the width, as all else does
    model = model_class_for(config)(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def shaped(folder: Path, width: Width) -> Origin:
    return reshape(
        folder / "teacher",
        folder / "shaped",
        Shape(width=width),
        batches(),
        tokenizer=None,
        dtype=torch.float32,
    )


def both_logits(folder: Path) -> tuple[Tensor, Tensor]:
    found = []
    for name in ("shaped", "teacher"):
        model, info = AutoModelForCausalLM.from_pretrained(folder / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            found.append(model(IDS).logits)
    return found[0], found[1]


@pytest.mark.parametrize("model_type", WIDTH_FAMILIES)
def test_all_channels_and_neurons_are_the_teacher(model_type: str, tmp_path: Path) -> None:
    tiny(model_type).save_pretrained(tmp_path / "teacher")
    origin = shaped(tmp_path, Width(32, 40))
    assert origin.channels == tuple(range(32)) and origin.neurons == (tuple(range(40)),) * 2
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("teacher", "shaped"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def kill_channels(model: Any) -> None:
    """Nothing is ever written to these channels of the stream."""
    dead = list(DEAD_CHANNELS)
    model.model.embed_tokens.weight.data[:, dead] = 0
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.data[dead] = 0
            if module.bias is not None:
                module.bias.data[dead] = 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", WIDTH_FAMILIES)
def test_without_dead_channels_the_outputs_stay(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny(model_type, tied)
    kill_channels(model)
    model.save_pretrained(tmp_path / "teacher")
    origin = shaped(tmp_path, Width(hidden=24))
    assert origin.channels == tuple(i for i in range(32) if i not in DEAD_CHANNELS)
    assert origin.neurons is None
    ours, right = both_logits(tmp_path)
    torch.testing.assert_close(ours, right, rtol=2e-4, atol=2e-4)
    config = read_config(tmp_path / "shaped")
    head_dim = getattr(model.config, "head_dim", None) or 8
    assert config.hidden_size == 24 and config.head_dim == head_dim
    assert config.tie_word_embeddings == tied
    assert ("lm_head.weight" in load_file(tmp_path / "shaped" / "model.safetensors")) != tied


@pytest.mark.parametrize("model_type", WIDTH_FAMILIES)
def test_without_dead_neurons_the_outputs_stay(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    for layer, dead in zip(model.model.layers, DEAD_NEURONS, strict=True):
        layer.mlp.up_proj.weight.data[list(dead)] = 0
        if layer.mlp.up_proj.bias is not None:
            layer.mlp.up_proj.bias.data[list(dead)] = 0
    model.save_pretrained(tmp_path / "teacher")
    origin = shaped(tmp_path, Width(feed_forward=37))
    assert origin.channels is None
    assert origin.neurons == tuple(
        tuple(i for i in range(40) if i not in dead) for dead in DEAD_NEURONS
    )
    ours, right = both_logits(tmp_path)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
    assert read_config(tmp_path / "shaped").intermediate_size == 37


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2"])
def test_activity_is_that_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation(attention_of(model.config))
    found = measured_activity(Walk(tmp_path, batches(), dtype=torch.float32, device=CPU))
    channels = torch.zeros(32).double()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, module in model.named_modules():
        if name.endswith(("layernorm", "model.norm", "down_proj")):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.setdefault(name, []).append(
                    (args[0][0].double(), out[0].double())
                )
            )
    rows = [b.input_ids_BT[i][b.token_mask_BT[i]] for b in batches() for i in range(2)]
    with torch.no_grad():
        for row in rows:
            model(row[None])
    for name, pairs in seen.items():
        x_NK, y_NK = (torch.cat(side) for side in zip(*pairs, strict=True))
        if name.endswith("down_proj"):
            layer = int(name.split(".")[2])
            torch.testing.assert_close(found.neurons[layer], x_NK.abs().mean(0), rtol=1e-4, atol=0)
        else:
            channels += y_NK.abs().mean(0)
            shares = (x_NK.square() / x_NK.square().mean(1, keepdim=True)).mean(0)
            torch.testing.assert_close(found.norm_shares[name], shares, rtol=1e-3, atol=1e-6)
    assert len(found.norm_shares) == len(seen) - 2
    torch.testing.assert_close(found.channels_D, channels, rtol=1e-4, atol=0)


def test_a_norm_over_fewer_channels_keeps_the_size_of_its_outputs(tmp_path: Path) -> None:
    """To the root of the mean square, over the calibration tokens; without the factor it is off."""
    model = tiny("llama")
    model.model.embed_tokens.weight.data[:, :8] *= 0.01
    model.save_pretrained(tmp_path / "teacher")
    origin = shaped(tmp_path, Width(hidden=24))
    kept = list(origin.channels or ())
    weights = [
        load_file(tmp_path / n / "model.safetensors")["model.layers.0.input_layernorm.weight"]
        for n in ("teacher", "shaped")
    ]
    ids = torch.cat([b.input_ids_BT[b.token_mask_BT] for b in batches()])
    x_ND = model.model.embed_tokens.weight.data[ids]
    whole = torch.nn.functional.rms_norm(x_ND, (32,), weights[0])[:, kept]
    narrow = torch.nn.functional.rms_norm(x_ND[:, kept], (24,), weights[1])
    uncorrected = torch.nn.functional.rms_norm(x_ND[:, kept], (24,), weights[0][kept])
    ratio = float((narrow.square().mean() / whole.square().mean()).sqrt())
    off = float((uncorrected.square().mean() / whole.square().mean()).sqrt())
    assert ratio == pytest.approx(1.0, abs=0.02) and abs(off - 1) > 0.05


def test_most_active_of_equal_ones_the_first() -> None:
    assert most_active(torch.tensor([0.5, 2.0, 0.5, 1.0, 0.5]), 3) == (0, 1, 3)


def test_norms_that_multiply_by_one_plus_their_weight() -> None:
    weight = torch.tensor([0.5, -0.25])
    assert scaled_norm(weight, 2.0, one_plus=False).tolist() == [1.0, -0.5]
    assert scaled_norm(weight, 2.0, one_plus=True).tolist() == [2.0, 0.5]
    assert GEMMAS and set(GEMMAS) < set(WIDTH_FAMILIES)


def test_a_tensor_of_unknown_axes_is_refused() -> None:
    cut = WidthCut((0, 1), None, {})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.router.*not known"):
        cut_tensor("model.layers.0.mlp.router.weight", torch.zeros(4, 4), cut)


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].input_layernorm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    walk = Walk(tmp_path, batches(), dtype=torch.float32, device=CPU)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.input_layernorm"):
        measured_activity(walk)


@pytest.mark.slow
def test_two_ranks_write_what_one_does(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "teacher")
    one = shaped(tmp_path, Width(24, 32))
    on_two_ranks(str(tmp_path))
    assert origin_of(read_config(tmp_path / "two")) == one
    tensors = [load_file(tmp_path / n / "model.safetensors") for n in ("shaped", "two")]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor)


@run_on_ranks(2)
def on_two_ranks(folder: str) -> None:
    reshape(
        Path(folder) / "teacher",
        Path(folder) / "two",
        Shape(width=Width(24, 32)),
        batches(distributed.rank(), 2),
        tokenizer=None,
        dtype=torch.float32,
    )
