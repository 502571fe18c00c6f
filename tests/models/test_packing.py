"""Packed models say what they said before, in fewer calls."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from makd_llm.models import packing
from makd_llm.models.families import FAMILIES, family_of, matrices_of, shared_inputs
from makd_llm.models.modeling_lowrank import LowRankLinear, lowrank_config, model_class_for
from makd_llm.models.packing import Packing, SharedProduct, numbers_per_call, pack
from makd_llm.testing import TINY_LAYERS as LAYERS
from makd_llm.testing import tiny_config

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4]])


def model_of(model_type: str, rank: int | None, seed: int = 1) -> Any:
    """A random tiny model, every matrix of this rank, or dense."""
    torch.manual_seed(seed)
    config = tiny_config(model_type)
    if rank is not None:
        ranks: dict[str, Any] = {
            name: [rank] * matrix.parts if matrix.parts > 1 else rank
            for _, matrix, name in matrices_of(config)
        }
        config = lowrank_config(config, ranks)
    model: Any = model_class_for(config)(config).eval()
    nn.init.normal_(model.get_output_embeddings().weight)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.double()  # so that only a mistake is seen, and no rounding


@torch.no_grad()
def assert_says_the_same(packed: Any, before: Any) -> None:
    torch.testing.assert_close(packed(IDS).logits, before(IDS).logits)
    written, wanted = (
        m.generate(IDS[:1], max_new_tokens=6, do_sample=False) for m in (packed, before)
    )
    assert torch.equal(written, wanted)


def pairs_and_groups(model: Any) -> tuple[int, int]:
    """How many matrices, and how many groups of them that read one input."""
    config, family = model.config, family_of(model.config)
    layers = [family.matrices(config, layer) for layer in range(LAYERS)]
    return sum(map(len, layers)), sum(len(shared_inputs(matrices)) for matrices in layers)


def shared(model: nn.Module) -> list[SharedProduct]:
    return [module for module in model.modules() if isinstance(module, SharedProduct)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_factors_that_read_one_input_are_multiplied_at_once(model_type: str) -> None:
    student = model_of(model_type, rank=4)
    packed = copy.deepcopy(student)
    pairs, groups = pairs_and_groups(student)
    assert pack(packed, call=0.0) == Packing(2 * pairs, groups + pairs, 0)
    assert_says_the_same(packed, student)
    numbers = [sum(p.numel() for p in model.parameters()) for model in (packed, student)]
    assert numbers[0] == numbers[1]
    assert all(module._input is None for module in shared(packed))
    pack(packed, call=0.0)  # nothing is left to pack
    assert_says_the_same(packed, student)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_pairs_are_multiplied_out_where_calls_are_dear(model_type: str) -> None:
    student = model_of(model_type, rank=4)
    packed = copy.deepcopy(student)
    pairs, groups = pairs_and_groups(student)
    assert pack(packed, call=math.inf) == Packing(2 * pairs, groups, pairs)
    assert not any(isinstance(module, LowRankLinear) for module in packed.modules())
    assert_says_the_same(packed, student)


def test_dense_matrices_stand_in_the_same_product_as_factors() -> None:
    student = model_of("qwen2", rank=4)  # its q, k and v have biases
    packed = copy.deepcopy(student)
    q, k = (getattr(student.model.layers[0].self_attn, f"{name}_proj") for name in "qk")
    saved = {
        m: packing.WORTH * m.out_features * m.in_features - 4 * (m.out_features + m.in_features)
        for m in (q, k)
    }
    assert saved[k] < saved[q]
    assert pack(packed, call=saved[k]).merged > 0
    attention = packed.model.layers[0].self_attn
    assert attention.q_proj.up is not None
    assert attention.k_proj.up is None
    assert attention.shared_q_proj.bias is not None
    assert_says_the_same(packed, student)


@pytest.mark.parametrize(
    ("model_type", "before", "after"),
    [("llama", 7, 4), ("mixtral", 4, 2)],  # its experts are one stack in transformers
)
def test_a_teacher_may_be_packed_too(model_type: str, before: int, after: int) -> None:
    teacher = model_of(model_type, rank=None).float()  # stacks of experts run in no double
    packed = copy.deepcopy(teacher)
    assert pack(packed, call=0.0) == Packing(LAYERS * before, LAYERS * after, 0)
    assert_says_the_same(packed, teacher)


def test_a_call_costs_the_line_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packing, "_seconds", lambda shapes, *_: [5.0 + 0.01 * m * k for m, k in shapes]
    )
    found = numbers_per_call([(8, 8), (32, 8), (64, 16)], torch.device("cpu"), torch.float32, 1)
    assert found == pytest.approx(500.0)


def test_measured_on_this_device_it_is_a_number() -> None:
    packed = model_of("llama", rank=4)
    found = pack(packed)
    assert found.calls_before == LAYERS * 14 and found.calls_after < LAYERS * 14
    cost = numbers_per_call([(64, 64), (512, 512)], torch.device("cpu"), torch.float32, 1)
    assert 0.0 <= cost < math.inf
    with pytest.raises(ValueError, match="two sizes"):
        numbers_per_call([(64, 64), (64, 64)], torch.device("cpu"), torch.float32, 1)
