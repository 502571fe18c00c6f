"""The table of families against transformers' own models."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from makd_llm.errors import UserError
from makd_llm.models.families import FAMILIES, check_distillable, family_of, matrices_of
from makd_llm.models.modeling_lowrank import lowrank_config
from makd_llm.testing import TINY_LAYERS as LAYERS
from makd_llm.testing import tiny_config


def tiny_model(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()


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
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(f"{family.layers}.")
    }
    named = matrices_of(family, LAYERS)
    assert {name for _, _, name in named} == matrices
    assert [layer for layer, _, _ in named] == sorted(layer for layer, _, _ in named)
    for _, matrix, name in named:
        assert isinstance(model.get_submodule(name), Conv1D) == matrix.transposed


def test_parts_of_a_module_are_listed_once_each(model: Any) -> None:
    family = family_of(model.config)
    for module in {matrix.module for matrix in family.matrices}:
        parts = [matrix.part for matrix in family.matrices if matrix.module == module]
        (count,) = {matrix.parts for matrix in family.matrices if matrix.module == module}
        assert parts == list(range(count))


def test_roles_that_share_an_input_get_the_same_tensor(model: Any) -> None:
    family = family_of(model.config)
    grouped = [role for group in family.shared_inputs for role in group]
    assert sorted(grouped) == sorted(matrix.role for matrix in family.matrices)

    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, role=matrix.role: inputs.__setitem__(role, args[0])
        )
        for layer, matrix, name in matrices_of(family, LAYERS)
        if layer == 0
    ]
    with torch.no_grad():
        model(torch.arange(6)[None])
    for hook in hooks:
        hook.remove()
    group_of = {role: group for group in family.shared_inputs for role in group}
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
        ("mixtral", {}, "mixture of experts"),
        ("qwen3_moe", {}, "mixture of experts"),
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
    ],
)
def test_what_cannot_be_distilled_yet_can_be_factorized(config: PreTrainedConfig) -> None:
    assert family_of(config).model_type == config.model_type
    with pytest.raises(UserError, match="softcapping"):
        check_distillable(config)
