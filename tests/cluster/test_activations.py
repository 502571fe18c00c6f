"""What the planner says a layer keeps, against what autograd keeps in a real one."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from makd_kernels import lowrank_linear
from makd_kernels.lean import keeping_less
from makd_llm.cluster.activations import RULES, layer_keeps
from makd_llm.cluster.sizes import sizes_of, student_config
from makd_llm.models.capture import attention_of
from makd_llm.models.families import FAMILIES
from makd_llm.models.lean import make_lean
from makd_llm.models.modeling_lowrank import LowRankLinear, model_class_for
from makd_llm.models.sharded import _without_dropout
from makd_llm.testing import tiny_config

TOKENS = 64


def kept_bytes(config: object, dtype: torch.dtype, noted: bool, whole: bool) -> int:
    """What the backbone's forward keeps beside its parameters, each tensor once."""
    made = (
        model_class_for(config)
        ._from_config(  # type: ignore[arg-type]
            config,
            dtype=dtype,
            attn_implementation=attention_of(config),  # type: ignore[arg-type]
        )
        .train()
    )
    for module in made.modules():
        if isinstance(module, LowRankLinear):
            module.product = lowrank_linear
    make_lean(made)
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    family = FAMILIES[made.config.model_type.removeprefix("makd_")]
    backbone = made.get_submodule(family.backbone)
    ids = torch.randint(1, 40, (1, TOKENS))
    less = keeping_less(whole_weights=whole) if noted else nullcontext()
    with less, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = backbone(input_ids=ids, use_cache=False).last_hidden_state
    assert result.grad_fn is not None
    return sum(kept.values())


def said_and_kept(
    family: str,
    dtype: torch.dtype,
    *,
    noted: bool = True,
    whole: bool = True,
    keep: float = 0.6,
    **changed: Any,
) -> tuple[int, float]:
    """Bytes per token of a second layer: what the planner says, and what autograd keeps."""
    totals, sizes = [], None
    for layers in (1, 2):
        config = _without_dropout(tiny_config(family))
        for name, value in changed.items():
            setattr(config, name, value)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
        student = student_config(config, keep, 1)
        sizes = sizes_of(student)
        totals.append(kept_bytes(student, dtype, noted, whole))
    assert sizes is not None
    said = layer_keeps(sizes, dtype.itemsize, 1, TOKENS, noted=noted, whole=whole)
    return said, (totals[1] - totals[0]) / TOKENS


@pytest.mark.parametrize(
    ("noted", "whole"), [(True, True), (True, False), (False, True)], ids=["whole", "cut", "plain"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", list(RULES))
def test_a_layer_keeps_what_is_said(
    family: str, dtype: torch.dtype, noted: bool, whole: bool
) -> None:
    types = {"layer_types": ["full_attention"]} if family == "gemma3_text" else {}
    said, kept = said_and_kept(family, dtype, noted=noted, whole=whole, **types)
    assert said == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("window", [TOKENS // 4, TOKENS, 2 * TOKENS])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "phi3"])
def test_a_layer_keeps_its_windows_mask(family: str, window: int) -> None:
    said, kept = said_and_kept(family, torch.bfloat16, sliding_window=window)
    assert said == pytest.approx(kept, rel=0.02)


def test_a_layer_that_is_not_parallel_keeps_both_streams() -> None:
    said, kept = said_and_kept("gpt_neox", torch.bfloat16, use_parallel_residual=False)
    assert said == pytest.approx(kept, rel=0.02)


def test_every_family_that_can_be_distilled_has_rules() -> None:
    refused = {"gemma2", *(name for name, family in FAMILIES.items() if family.experts)}
    assert set(RULES) == set(FAMILIES) - refused
