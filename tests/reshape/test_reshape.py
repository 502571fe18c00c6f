"""All three in a row, then factorized: what loads, where it comes from, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import makd_llm  # noqa: F401  (makes the Auto classes know the students)
from makd_llm.checkpoint.export import merge, rewrite
from makd_llm.checkpoint.folder import read_config
from makd_llm.data.batch import Batch, batches_of
from makd_llm.data.schema import Example
from makd_llm.errors import UserError
from makd_llm.factorize.student import Recipe, factorize
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.models.origin import Origin, origin_of, set_origin
from makd_llm.reshape import reshape as module
from makd_llm.reshape.reshape import Depth, Heads, Shape, Width, check_shape, reshape
from makd_llm.testing import tiny_config

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
ALL_THREE = Shape(Depth(3, "ild"), Width(24, 32), Heads(2))
SETTINGS: dict[str, Any] = {"tokenizer": None, "dtype": torch.float32}


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 48, (8, 12), generator=generator).tolist()
    return batches_of([Example(str(i), row, 1) for i, row in enumerate(rows)], 4, 0)


def config_of(model_type: str, layers: int = 4) -> Any:
    config = tiny_config(model_type)
    config.initializer_range = 0.2
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % 2] for i in range(layers)]
    config.num_hidden_layers = layers
    if model_type != "gpt2":
        config.num_key_value_heads = 4
    return config


def saved(folder: Path, model_type: str = "llama") -> Path:
    torch.manual_seed(0)
    config = config_of(model_type)
    model = model_class_for(config)(config)
    model.generation_config.max_length = 77
    model.save_pretrained(folder)
    return folder


def loads_and_generates(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    written = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert written.shape[1] == IDS.shape[1] + 4
    return model


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "olmo2", "gemma3_text"])
def test_all_three_then_factorized_merged_and_exported(model_type: str, tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher", model_type)
    said: list[str] = []
    shaped = tmp_path / "shaped"
    origin = reshape(teacher, shaped, ALL_THREE, batches(), tell=said.append, **SETTINGS)
    model = loads_and_generates(shaped)
    config = model.config
    assert type(model).__name__ == tiny_config(model_type).architectures[0]
    assert config.hidden_size == 24 and config.intermediate_size == 32
    assert config.num_key_value_heads == 2 and config.num_attention_heads == 4
    assert model.generation_config.max_length == 77
    assert origin.teacher_layers == 4 and len(origin.layers) == 3
    assert origin.channels is not None and len(origin.channels) == 24
    assert origin.neurons is not None and {len(n) for n in origin.neurons} == {32}
    assert origin.query_heads is not None and origin.key_value_heads is not None
    assert len(origin.neurons) == len(origin.query_heads) == len(origin.key_value_heads) == 3
    assert all(sorted(order) == [0, 1, 2, 3] for order in origin.query_heads)
    assert [s.partition(" ")[0] for s in said] == ["shape:"] * 4
    # What is a copy in the student is that of the teacher's parts that the origin names.
    before, after = (load_file(f / "model.safetensors") for f in (teacher, shaped))
    for place, layer in enumerate(origin.layers):
        old = before[f"model.layers.{layer}.mlp.up_proj.weight"]
        new = after[f"model.layers.{place}.mlp.up_proj.weight"]
        assert torch.equal(new, old[list(origin.neurons[place])][:, list(origin.channels)])
        old = before[f"model.layers.{layer}.self_attn.q_proj.weight"].unflatten(0, (4, -1))
        new = after[f"model.layers.{place}.self_attn.q_proj.weight"].unflatten(0, (4, -1))
        assert torch.equal(new, old[list(origin.query_heads[place])][..., list(origin.channels)])
    factorize(shaped, tmp_path / "student", Recipe(0.6, rank_multiple=2), batches(), **SETTINGS)
    loads_and_generates(tmp_path / "student")
    merge(tmp_path / "student", tmp_path / "merged")
    loads_and_generates(tmp_path / "merged")
    rewrite(tmp_path / "student", tmp_path / "again")
    for name in ("shaped", "student", "merged", "again"):
        assert origin_of(read_config(tmp_path / name)) == origin, name


@pytest.mark.parametrize("budget", ["uniform", "greedy"])
def test_with_everything_kept_a_factorization_is_the_shape_alone(
    budget: str, tmp_path: Path
) -> None:
    teacher = saved(tmp_path / "teacher")
    reshape(teacher, tmp_path / "shaped", Shape(Depth(2)), [], **SETTINGS)
    reports = factorize(
        tmp_path / "shaped", tmp_path / "student", Recipe(1.0, "svd", budget), [], **SETTINGS
    )
    assert {report.rank for report in reports} == {None}
    student = loads_and_generates(tmp_path / "student")
    shaped = AutoModelForCausalLM.from_pretrained(tmp_path / "shaped")
    with torch.no_grad():
        assert torch.equal(student(IDS).logits, shaped(IDS).logits)


def test_a_student_of_a_teacher_that_was_shaped_itself_has_the_shape_of_that(
    tmp_path: Path,
) -> None:
    teacher = saved(tmp_path / "teacher")
    config = read_config(teacher)
    set_origin(config, Origin((0, 2, 4, 6), 8, channels=tuple(range(32))))
    config.save_pretrained(teacher)
    for keep_origin in (False, True):
        recipe = Recipe(0.5, "svd", rank_multiple=2)
        factorize(teacher, tmp_path / "s", recipe, [], keep_origin=keep_origin, **SETTINGS)
        assert (origin_of(read_config(tmp_path / "s")) is not None) == keep_origin
    found = reshape(teacher, tmp_path / "shaped", Shape(Depth(2)), [], **SETTINGS)
    assert found == Origin((0, 3), 4)


def test_an_interrupted_shape_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = saved(tmp_path / "teacher")
    reshape(teacher, tmp_path / "whole", ALL_THREE, batches(), **SETTINGS)
    with monkeypatch.context() as broken:
        broken.setattr(module, "merged_heads", None)
        with pytest.raises(TypeError):
            reshape(teacher, tmp_path / "shaped", ALL_THREE, batches(), **SETTINGS)
    assert not (tmp_path / "shaped").exists()
    with monkeypatch.context() as never:
        never.setattr(module, "ild_layers", None)
        never.setattr(module, "measured_activity", None)
        reshape(teacher, tmp_path / "shaped", ALL_THREE, batches(), **SETTINGS)
    first, second = (tmp_path / n / "model.safetensors" for n in ("whole", "shaped"))
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob(".shaped*"))


@pytest.mark.parametrize(
    ("model_type", "shape", "words"),
    [
        ("llama", Shape(Depth(5)), "student.depth.layers is 5, but the teacher has 4"),
        ("llama", Shape(width=Width(hidden=36)), "student.width.hidden is 36, but the teacher has"),
        ("llama", Shape(width=Width(hidden=30)), "student.width.hidden is 30, no multiple of the"),
        ("llama", Shape(width=Width(None, 41)), "student.width.feed_forward is 41, but the teach"),
        ("llama", Shape(heads=Heads(8)), "student.heads.key_value is 8, but the teacher has 4"),
        ("llama", Shape(heads=Heads(3)), "student.heads.key_value is 3, which does not divide"),
        (
            "phi3",
            Shape(width=Width(16)),
            "student.width: model_type 'phi3' cannot be made narrower",
        ),
        (
            "gpt2",
            Shape(width=Width(16)),
            "student.width: model_type 'gpt2' cannot be made narrower",
        ),
        ("phi3", Shape(heads=Heads(2)), "student.heads: key-value heads of model_type 'phi3'"),
        ("opt", Shape(heads=Heads(2)), "student.heads: key-value heads of model_type 'opt'"),
    ],
)
def test_what_a_teacher_cannot_become_is_one_line(model_type: str, shape: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_shape(config_of(model_type), shape)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert "choose" in str(caught.value)


def test_layers_that_depend_on_their_place_cannot_be_left_out() -> None:
    config = config_of("gpt2")
    check_shape(config, Shape(Depth(2)))
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UserError, match=r"student\.depth: .*scale_attn_by_inverse_layer_idx"):
        check_shape(config, Shape(Depth(2)))


def test_bad_input_is_found_before_the_work(tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher")
    with pytest.raises(UserError, match="the teacher itself"):
        reshape(teacher, teacher, Shape(Depth(2)), [], **SETTINGS)
    with pytest.raises(UserError, match="there is no calibration text"):
        reshape(teacher, tmp_path / "shaped", ALL_THREE, [], **SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="would be lost"):
        reshape(teacher, tmp_path / "mine", Shape(Depth(2)), [], **SETTINGS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "teacher"]
