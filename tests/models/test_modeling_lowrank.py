"""The low-rank models: equal to the dense ones at full rank, and whole transformers models."""

# Shapes: M outputs, K inputs, R rank.

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from makd_llm.models import modeling_lowrank
from makd_llm.models.families import FAMILIES, matrices_of, part_of
from makd_llm.models.modeling_lowrank import (
    ARCHITECTURES,
    Experts,
    Fused,
    LowRankLinear,
    LowRankParts,
    base_config,
    is_lowrank,
    lowrank_config,
    model_class_for,
)
from makd_llm.testing import run_on_ranks, tiny_config, unstacked

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4]])


def ranks_of(config: PreTrainedConfig, rank: int) -> dict[str, int | list[int]]:
    return {
        name: [rank] * matrix.parts if matrix.parts > 1 else rank
        for _, matrix, name in matrices_of(config)
    }


def random_student(model_type: str, tied: bool = False, rank: int = 5) -> Any:
    torch.manual_seed(1)
    config = tiny_config(model_type, tied)
    config = lowrank_config(config, ranks_of(config, rank))
    return model_class_for(config)(config).eval()


@torch.no_grad()
def exact_student(teacher: Any) -> Any:
    """A student whose factors multiply out to the teacher's matrices, filled in float64."""
    ranks: dict[str, Any] = {}
    teacher = unstacked(teacher)
    state = teacher.state_dict()
    for _, matrix, name in matrices_of(teacher.config):
        weight = teacher.state_dict()[f"{name}.weight"]
        weight = weight.T if matrix.transposed else weight
        weight_MK = part_of(teacher.config, matrix, weight, 0)
        u, s, vh = torch.linalg.svd(weight_MK, full_matrices=False)
        prefix = f"{name}.parts.{matrix.part}" if matrix.parts > 1 else name
        state[f"{prefix}.up"], state[f"{prefix}.down"] = u * s.sqrt(), s.sqrt()[:, None] * vh
        if f"{name}.bias" in teacher.state_dict() and matrix.parts > 1:
            bias = teacher.state_dict()[f"{name}.bias"]
            state[f"{prefix}.bias"] = part_of(teacher.config, matrix, bias, 0)
            state.pop(f"{name}.bias", None)
        state.pop(f"{name}.weight", None)
        if matrix.parts > 1:
            ranks[name] = [*ranks.get(name, []), len(s)]
        else:
            ranks[name] = len(s)
    config = lowrank_config(teacher.config, ranks)
    student: Any = model_class_for(config)(config).double().eval()
    student.load_state_dict(state)
    return student


def load_with_info(folder: Path) -> Any:
    """The model, and what transformers says about missing and unexpected tensors."""
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_full_rank_equals_dense(model_type: str, tied: bool) -> None:
    torch.manual_seed(0)
    config = tiny_config(model_type, tied)
    teacher: Any = model_class_for(config)(config).double().eval()
    for name, parameter in teacher.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # zero, as initialised, would hide a lost bias
    if FAMILIES[model_type].experts:
        teacher.set_experts_implementation("eager")  # the others do without float64
    student = exact_student(teacher)
    assert (student.lm_head.weight is student.get_input_embeddings().weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_generation_with_a_cache_equals_generation_without(model_type: str) -> None:
    student = random_student(model_type)
    nn.init.normal_(student.lm_head.weight)  # sharp enough that no two tokens come close
    generated = [
        student.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert generated[0].shape == (2, 16)
    assert torch.equal(*generated)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_attention_implementations_agree(model_type: str) -> None:
    student = random_student(model_type)
    assert student.config._attn_implementation == "sdpa"
    with torch.no_grad():
        sdpa = student(IDS).logits
        student.set_attn_implementation("eager")
        torch.testing.assert_close(student(IDS).logits, sdpa)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(model_type: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        student = random_student(model_type)
        if model_type == "gpt2":
            student.apply(lambda module: setattr(module, "p", 0.0))  # dropout would differ
        if checkpointing:
            student.gradient_checkpointing_enable()
        student.train()(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fresh_model_has_the_scale_of_a_fresh_dense_one(model_type: str) -> None:
    torch.manual_seed(2)
    config = tiny_config(model_type)
    config.initializer_range = 0.05
    config = lowrank_config(config, ranks_of(config, 8))
    student = model_class_for(config)(config)
    weights = [m for m in student.modules() if isinstance(m, LowRankLinear)]
    assert len(weights) == len(matrices_of(config))
    for module in weights:
        assert module.dense_weight().std().item() == pytest.approx(0.05, rel=0.5)
        assert module.bias is None or not module.bias.any()
    assert student(IDS).logits.isfinite().all()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_reload_is_complete_and_saving_again_keeps_the_count(
    model_type: str, tmp_path: Path
) -> None:
    student = random_student(model_type, tied=True)
    student.save_pretrained(tmp_path / "first")
    loaded, info = load_with_info(tmp_path / "first")
    assert type(loaded) is type(student)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, student(IDS).logits)
    loaded.save_pretrained(tmp_path / "second")
    stored = [load_file(tmp_path / at / "model.safetensors") for at in ("first", "second")]
    assert stored[0].keys() == stored[1].keys()
    for tensors in stored:
        count = sum(tensor.numel() for tensor in tensors.values())
        assert count == sum(parameter.numel() for parameter in student.parameters())
    assert (tmp_path / "second" / "modeling_lowrank.py").is_file()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_factor_missing_from_the_file_is_initialised(model_type: str, tmp_path: Path) -> None:
    student = random_student(model_type)
    student.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("c_proj.up") or "o_proj.up" in name)
    kept = tensors.pop(lost).shape
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = load_with_info(tmp_path)
    assert info["missing_keys"] == {lost}
    filled = loaded.get_parameter(lost)
    assert filled.shape == kept
    # sqrt(initializer_range / sqrt(rank)): the scale at which the product's entries have 0.02
    assert filled.std().item() == pytest.approx((0.02 * 5**-0.5) ** 0.5, rel=0.4)


def test_part_of_the_modules_may_stay_dense() -> None:
    config = tiny_config("llama")
    config = lowrank_config(config, {"model.layers.1.mlp.up_proj": 3})
    student = model_class_for(config)(config)
    assert isinstance(student.model.layers[0].mlp.up_proj, nn.Linear)
    assert isinstance(student.model.layers[1].mlp.up_proj, LowRankLinear)
    assert isinstance(student.model.layers[1].mlp.down_proj, nn.Linear)


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj", "model.norm"])
def test_a_rank_for_something_else_than_a_matrix_is_an_error(name: str) -> None:
    config = lowrank_config(tiny_config("llama"), {name: 3})
    with pytest.raises(ValueError, match=name):
        model_class_for(config)(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_configs_convert_there_and_back(model_type: str) -> None:
    config = tiny_config(model_type, tied=True)
    student = lowrank_config(config, ranks_of(config, 3))
    assert is_lowrank(student) and not is_lowrank(config)
    assert student.model_type == f"makd_{model_type}"
    assert base_config(student).to_dict() == config.to_dict()
    assert lowrank_config(student, {}).lowrank == {}
    assert pickle.loads(pickle.dumps(student)).to_dict() == student.to_dict()
    # The fields of every low-rank config default to what the dense architecture's default to.
    dense, lowrank, own = base_config(student), type(student)().to_dict(), {"lowrank", "model_type"}
    defaults = type(dense)().to_dict()
    assert {key: lowrank[key] for key in lowrank.keys() - own} == {
        key: defaults[key] for key in defaults.keys() - own
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_classes_are_module_attributes_and_models_are_copied_whole(model_type: str) -> None:
    _, dense, config_class, model_class = ARCHITECTURES[model_type]
    assert dense.__name__ == FAMILIES[model_type].causal_lm
    assert getattr(modeling_lowrank, config_class.__name__) is config_class
    assert pickle.loads(pickle.dumps(model_class)) is model_class
    student = random_student(model_type)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, student(IDS).logits)


@pytest.mark.parametrize("groups", [1, 3])
def test_parts_are_laid_out_as_the_dense_module_has_them(groups: int) -> None:
    torch.manual_seed(0)
    layout = Fused(groups, (4, 2, 2))
    module = LowRankParts(6, layout, [1, None, 3])
    x = torch.randn(2, 5, 6)
    y = module(x)
    assert y.shape == (2, 5, 8 * groups)
    parts: Any = module.parts
    for number, (part, out) in enumerate(zip(parts, layout.split(y), strict=True)):
        assert out.shape[-1] == layout.size(number) == groups * layout.widths[number]
        weight = part.weight if number == 1 else part.dense_weight()
        torch.testing.assert_close(out, x @ weight.T + part.bias)
    weight = torch.randn(8 * groups, 6)
    assert torch.equal(layout.join(layout.split(weight, 0), 0), weight)
    with pytest.raises(ValueError, match="2 ranks for 3 fused"):
        LowRankParts(6, layout, [1, 2])
    with pytest.raises(ValueError, match="at least 1"):
        LowRankLinear(6, 12, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
        {
            "new_decoder_architecture": False,
            "multi_query": False,
            "num_kv_heads": 4,
            "alibi": True,
            "bias": True,
        },
    ],
    ids=["multi-query", "head by head", "alibi"],
)
def test_falcons_earlier_layouts(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = tiny_config("falcon")
    for name, value in fields.items():
        setattr(config, name, value)
    teacher: Any = model_class_for(config)(config).double().eval()
    student = exact_student(teacher)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits)


def test_ranks_that_do_not_fit_the_module_are_an_error() -> None:
    for model_type, name, ranks in (
        ("gpt2", "transformer.h.0.attn.c_attn", 3),
        ("llama", "model.layers.0.mlp.up_proj", [3]),
    ):
        config = lowrank_config(tiny_config(model_type), {name: ranks})
        with pytest.raises(ValueError, match=f"gives '{name}' the rank"):
            model_class_for(config)(config)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_equal_the_stacked_ones(model_type: str) -> None:
    torch.manual_seed(0)
    config = tiny_config(model_type)
    teacher: Any = model_class_for(config)(config).eval()
    teacher.set_experts_implementation("eager")
    own = unstacked(teacher)
    assert isinstance(own.model.layers[1].mlp.experts, Experts)
    with torch.no_grad():
        # Not to the bit: gate and up are one product there and two here.
        torch.testing.assert_close(own(IDS).logits, teacher(IDS).logits, rtol=1e-5, atol=1e-6)
        half, right = own.bfloat16()(IDS).logits, teacher.bfloat16()(IDS).logits
        torch.testing.assert_close(half, right, rtol=0.02, atol=0.01)


def test_an_expert_knows_its_tokens_only_while_it_works() -> None:
    config = tiny_config("mixtral")
    config.num_local_experts, config.num_experts_per_tok = 6, 1
    own = unstacked(model_class_for(config)(config))
    experts = own.model.layers[0].mlp.experts
    seen: dict[int, torch.Tensor] = {}
    for number, expert in enumerate(experts):
        expert.up_proj.register_forward_hook(
            lambda module, args, out, number=number: seen.update({number: experts[number].token_n})
        )
    with torch.no_grad():
        own(IDS[:, :2])
    assert len(seen) < 6, "four tokens reach at most four experts"
    assert sorted(torch.cat(list(seen.values())).tolist()) == [0, 1, 2, 3]
    assert all(expert.token_n is None for expert in experts)


def test_one_matrix_of_one_expert_may_be_factored() -> None:
    config = lowrank_config(tiny_config("qwen3_moe"), {"model.layers.1.mlp.experts.3.up_proj": 3})
    student: Any = model_class_for(config)(config)
    experts = student.model.layers[1].mlp.experts
    assert isinstance(experts[3].up_proj, LowRankLinear)
    assert isinstance(experts[3].gate_proj, nn.Linear) and isinstance(experts[2].up_proj, nn.Linear)
    assert student(IDS).logits.isfinite().all()


@run_on_ranks(1)  # in a process of its own, since deepspeed patches torch
def test_built_under_zero_init_only_the_student_remains() -> None:
    import deepspeed

    config = tiny_config("gpt2")
    config = lowrank_config(config, ranks_of(config, 4))
    ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    gc.collect()
    before = {id(x) for x in gc.get_objects() if isinstance(x, nn.Parameter)}
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        student: Any = model_class_for(config)(config)
    after = [x for x in gc.get_objects() if isinstance(x, nn.Parameter) and id(x) not in before]
    parameters: dict[str, Any] = dict(student.named_parameters())
    assert {id(x) for x in after} == {id(parameter) for parameter in parameters.values()}
    assert all(hasattr(parameter, "ds_id") for parameter in parameters.values())

    with torch.device("meta"):
        whole = model_class_for(config)(config)
    for name, parameter in whole.named_parameters():
        assert tuple(parameters[name].ds_shape) == tuple(parameter.shape)
    part = student.transformer.h[0].attn.c_attn.parts[1]
    with deepspeed.zero.GatheredParameters(list(part.parameters())):
        assert 0.005 < part.dense_weight().std().item() < 1
