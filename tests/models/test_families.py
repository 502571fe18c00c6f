"""The table of families against transformers' own models."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from makd_llm.errors import UserError
from makd_llm.models.families import (
    FAMILIES,
    check_distillable,
    family_of,
    matrices_of,
    shared_inputs,
    stages,
)
from makd_llm.models.modeling_lowrank import lowrank_config
from makd_llm.testing import TINY_LAYERS as LAYERS
from makd_llm.testing import tiny_config, unstacked


def tiny_model(model_type: str) -> Any:
    torch.manual_seed(0)
    return unstacked(AutoModelForCausalLM.from_config(tiny_config(model_type)).eval())


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def test_names_exist_and_cover_every_matrix_of_the_layers(model: Any) -> None:
    family = family_of(model.config)
    assert type(model) is getattr(transformers, family.causal_lm)
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    assert model.get_submodule(family.backbone) is model.base_model
    assert len(model.get_submodule(family.layers)) == LAYERS

    matrices = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.startswith(f"{family.layers}.")
        and not name.endswith("shared_expert_gate")  # one number per token, as a router makes
    }
    named = matrices_of(model.config)
    assert len({(layer, matrix.key) for layer, matrix, _ in named}) == len(named)
    assert {name for _, _, name in named} == matrices
    assert [layer for layer, _, _ in named] == sorted(layer for layer, _, _ in named)
    for _, matrix, name in named:
        assert isinstance(model.get_submodule(name), Conv1D) == matrix.transposed


def test_parts_of_a_module_are_listed_once_each(model: Any) -> None:
    family = family_of(model.config)
    for layer in range(LAYERS):
        matrices = family.matrices(model.config, layer)
        for module in {matrix.module for matrix in matrices}:
            parts = [matrix.part for matrix in matrices if matrix.module == module]
            (count,) = {matrix.parts for matrix in matrices if matrix.module == module}
            assert parts == list(range(count))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_matrices_that_share_an_input_get_the_same_tensor(model: Any, layer: int) -> None:
    matrices = family_of(model.config).matrices(model.config, layer)
    grouped = [matrix.key for group in shared_inputs(matrices) for matrix in group]
    assert sorted(grouped) == sorted(matrix.key for matrix in matrices)

    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, key=matrix.key: inputs.__setitem__(key, args[0])
        )
        for of_layer, matrix, name in matrices_of(model.config)
        if of_layer == layer
    ]
    with torch.no_grad():
        model(torch.arange(24)[None])
    for hook in hooks:
        hook.remove()
    assert set(inputs) == set(grouped)
    group_of = {matrix.key: group for group in shared_inputs(matrices) for matrix in group}
    for first in inputs:
        for second in inputs:
            same = inputs[first] is inputs[second]
            assert same == (group_of[first] == group_of[second]), (first, second)


def test_a_student_belongs_to_its_teachers_family(model: Any) -> None:
    assert family_of(lowrank_config(model.config, {})) is family_of(model.config)


@pytest.mark.parametrize(
    ("model_type", "fields", "said"),
    [
        ("bloom", {}, "llama, qwen2, qwen3, mistral, gemma, gemma2, gemma3_text, olmo2, phi3, opt"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("olmoe", {}, "mixture of experts (num_experts="),
        ("deepseek_v3", {}, "mixture of experts (n"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_what_is_not_built_is_an_error_that_names_what_is(
    model_type: str, fields: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError) as error:
        family_of(AutoConfig.for_model(model_type, **fields))
    assert repr(model_type) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("gemma2"),
        AutoConfig.for_model("gemma3_text", final_logit_softcapping=30.0),
        AutoConfig.for_model("mixtral"),
        AutoConfig.for_model("qwen2_moe"),
        AutoConfig.for_model("qwen3_moe"),
        lowrank_config(AutoConfig.for_model("qwen3_moe"), {}),
    ],
)
def test_what_cannot_be_distilled_yet_can_be_factorized(config: PreTrainedConfig) -> None:
    assert family_of(config).model_type == config.model_type.removeprefix("makd_")
    with pytest.raises(UserError, match=r"softcapping|mixture of experts") as error:
        check_distillable(config)
    assert "makd factorize takes it, distillation does not" in str(error.value)
    assert "\n" not in str(error.value)


def test_which_layers_have_experts_is_the_configs_word() -> None:
    fields = {"num_hidden_layers": 4, "num_experts": 2, "decoder_sparse_step": 2}
    config = AutoConfig.for_model("qwen2_moe", **fields, mlp_only_layers=[3])
    matrices = family_of(config).matrices
    dense = ["q", "k", "v", "o", "gate", "up", "down"]
    for layer in (0, 2, 3):  # every second one is sparse, but the last is listed
        assert [matrix.key for matrix in matrices(config, layer)] == dense
    sparse = matrices(config, 1)
    assert [matrix.key for matrix in sparse[4:7]] == ["gate.0", "up.0", "down.0"]
    assert sparse[-1].key == "down.shared"
    assert sparse[-1].module == "mlp.shared_expert.down_proj"
    of_stages = [[[m.key for m in group] for group in stage] for stage in stages(sparse)]
    assert of_stages[:2] == [[["q", "k", "v"]], [["o"]]]
    assert of_stages[2] == [["gate.0", "up.0"], ["gate.1", "up.1"], ["gate.shared", "up.shared"]]
    assert of_stages[3] == [["down.0"], ["down.1"], ["down.shared"]]
    config.num_experts = 0
    assert [matrix.key for matrix in matrices(config, 1)] == dense
