"""Which layers stay, and what a model without the others is."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from makd_llm import distributed
from makd_llm.checkpoint.folder import read_config
from makd_llm.data.batch import Batch, batches_of
from makd_llm.data.schema import Example
from makd_llm.layerwise.parts import Parts
from makd_llm.layerwise.walk import Walk
from makd_llm.models.families import FAMILIES, n_experts
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.models.origin import Origin, origin_of
from makd_llm.reshape.depth import depth_config, even_layers, ild_layers, losses_without
from makd_llm.reshape.reshape import Depth, Shape, reshape
from makd_llm.testing import run_on_ranks, tiny_config

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])


def batches(count: int = 6, rank: int = 0, world: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 48, (count, 12), generator=generator).tolist()
    return batches_of([Example(str(i), row, 1) for i, row in enumerate(rows)][rank::world], 2, 0)


def saved(folder: Path, model_type: str = "llama", layers: int = 4, dead: int | None = None) -> Any:
    """A random teacher. dead: a layer that hands its input on unchanged."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    config.init_std = config.initializer_range = 0.2  # OPT's name, and the others'
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = layers
    if kinds is not None:
        config.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    model = model_class_for(config)(config).eval()
    if dead is not None:
        layer = model.model.layers[dead]
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    model.save_pretrained(folder)
    return model


def parts(folder: Path) -> Parts:
    return Parts(folder, "key", lambda text: None, "shape")


@pytest.mark.parametrize(
    ("n_layers", "keep", "layers"),
    [
        (4, 2, (0, 3)),
        (4, 3, (0, 2, 3)),
        (4, 1, (0,)),
        (5, 3, (0, 2, 4)),
        (30, 30, tuple(range(30))),
        (12, 4, (0, 4, 7, 11)),
    ],
)
def test_even_layers(n_layers: int, keep: int, layers: tuple[int, ...]) -> None:
    assert even_layers(n_layers, keep) == layers


def test_even_layers_are_distinct_and_hold_both_ends() -> None:
    for n_layers in range(2, 40):
        for keep in range(2, n_layers + 1):
            layers = even_layers(n_layers, keep)
            assert layers[0] == 0 and layers[-1] == n_layers - 1
            gaps = {b - a for a, b in pairwise(layers)}
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_losses_are_those_of_the_models_without_each_layer(tmp_path: Path) -> None:
    model = saved(tmp_path)
    walk = Walk(tmp_path, batches(), dtype=torch.float32, device=CPU)
    kept = [0, 2, 3]
    found = losses_without(walk, kept)
    layers = list(model.model.layers)
    for place, left_out in enumerate(kept):
        model.model.layers = torch.nn.ModuleList(layers[i] for i in kept if i != left_out)
        total, count = 0.0, 0
        for batch in walk.batches:
            ids_BT = batch.input_ids_BT
            with torch.no_grad():
                logits_BTV = model(ids_BT, use_cache=False).logits[:, :-1]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"
                )
            )
            count += ids_BT[:, 1:].numel()
        assert float(found[place]) == pytest.approx(total / count, rel=1e-4)


def written_by(model: Any, rows: int = 8) -> list[Batch]:
    """Texts that the model itself writes, so that whatever changes it makes their loss worse."""
    begun = torch.arange(3, 3 + rows)[:, None]
    ids = model.generate(begun, max_new_tokens=11, do_sample=False)
    return batches_of([Example(str(i), row, 1) for i, row in enumerate(ids.tolist())], 4, 0)


@pytest.mark.parametrize("dead", [0, 2, 3])
def test_ild_drops_a_layer_that_does_nothing_first(dead: int, tmp_path: Path) -> None:
    given = written_by(saved(tmp_path / "teacher", dead=dead))
    walk = Walk(tmp_path / "teacher", given, dtype=torch.float32, device=CPU)
    said: list[str] = []
    left = ild_layers(walk, 3, parts(tmp_path / "parts"), said.append)
    assert left == tuple(i for i in range(4) if i != dead)
    assert said[0].startswith(f"shape: layer {dead} dropped")


def test_ild_repeats_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "teacher")
    walk = Walk(tmp_path / "teacher", batches(), dtype=torch.float32, device=CPU)
    kept = parts(tmp_path / "parts")
    first = int(losses_without(walk, range(4)).argmin())
    rest = [i for i in range(4) if i != first]
    second = rest[int(losses_without(walk, rest).argmin())]
    right = tuple(i for i in rest if i != second)
    assert ild_layers(walk, 2, kept) == right
    monkeypatch.setattr("makd_llm.reshape.depth.losses_without", None)  # nothing is scored again
    assert ild_layers(walk, 2, kept) == right
    assert ild_layers(walk, 3, kept) == tuple(rest)


def test_losses_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = saved(tmp_path / "teacher")
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "teacher")
    walk = Walk(tmp_path / "teacher", batches(), dtype=torch.float32, device=CPU)
    with pytest.raises(ValueError, match="loss is not finite"):
        ild_layers(walk, 3, parts(tmp_path / "parts"))


def test_a_kept_layer_keeps_its_kind() -> None:
    config = tiny_config("gemma3_text")
    config.num_hidden_layers = 4
    config.layer_types = ["full_attention", "sliding_attention"] * 2
    cut = depth_config(config, (1, 2, 3))
    assert cut.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert cut.num_hidden_layers == 3 and config.num_hidden_layers == 4
    config = tiny_config("qwen2")
    config.num_hidden_layers, config.layer_types = 4, None
    config.max_window_layers = 2
    assert depth_config(config, (1, 3)).max_window_layers == 1


def test_dense_layers_among_sparse_ones_stay_dense() -> None:
    config = tiny_config("qwen2_moe")
    config.num_hidden_layers, config.layer_types = 6, None
    config.mlp_only_layers, config.decoder_sparse_step = [3], 2
    dense = [n_experts(config, layer) == 0 for layer in range(6)]
    assert dense == [True, False, True, True, True, False]
    cut = depth_config(config, (1, 2, 3, 5))
    assert [n_experts(cut, layer) == 0 for layer in range(4)] == [False, True, True, False]


@pytest.mark.parametrize("choose", ["even", "ild"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_loads_without_some_layers_and_generates(
    model_type: str, choose: Any, tmp_path: Path
) -> None:
    model = saved(tmp_path / "teacher", model_type)
    shape = Shape(depth=Depth(2, choose))
    origin = reshape(
        tmp_path / "teacher",
        tmp_path / "shaped",
        shape,
        batches() if shape.needs_calibration else [],
        tokenizer=None,
        dtype=torch.float32,
    )
    if choose == "even":
        assert origin == Origin(layers=(0, 3), teacher_layers=4)
    assert origin_of(read_config(tmp_path / "shaped")) == origin and len(origin.layers) == 2
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "shaped", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is type(model)
    written = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
    assert written.shape[1] == IDS.shape[1] + 4
    # The teacher's own layers in a row, each with what its place in the teacher made it.
    name = FAMILIES[model_type].layers
    layers = list(model.get_submodule(name))
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], torch.nn.ModuleList(layers[i] for i in origin.layers))
    for config in {id(c): c for c in (model.config, parent.config)}.values():
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in origin.layers]
    with torch.no_grad():
        right, ours = model(IDS, use_cache=False).logits, loaded(IDS, use_cache=False).logits
    torch.testing.assert_close(ours, right)
    assert not list(tmp_path.glob(".shaped*"))


@pytest.mark.slow
def test_two_ranks_choose_and_write_what_one_does(tmp_path: Path) -> None:
    saved(tmp_path / "teacher")
    shaped_by_ild(str(tmp_path), "one")
    one = tmp_path / "one"
    on_two_ranks(str(tmp_path))
    two = tmp_path / "two"
    assert (one / "config.json").read_text() == (two / "config.json").read_text()
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def shaped_by_ild(folder: str, name: str) -> Origin:
    return reshape(
        Path(folder) / "teacher",
        Path(folder) / name,
        Shape(depth=Depth(2, "ild")),
        batches(8, distributed.rank(), distributed.world_size()),
        tokenizer=None,
        dtype=torch.float32,
    )


@run_on_ranks(2)
def on_two_ranks(folder: str) -> None:
    origins = distributed.gather_objects(shaped_by_ild(folder, "two"))
    assert origins[0] == origins[1] and len(origins[0].layers) == 2
