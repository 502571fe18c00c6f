"""A loaded model's low-rank products go through the kernels, as the config says."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from makd_llm.models import sharded
from makd_llm.models.families import FAMILIES
from makd_llm.models.modeling_lowrank import (
    LowRankLinear,
    lowrank_config,
    model_class_for,
    two_matmuls,
)
from makd_llm.testing import tiny_config

EXPERTS = ("mixtral", "_moe")  # have no low-rank model yet
CONFIG = {"train_micro_batch_size_per_gpu": 1}


@pytest.mark.parametrize(
    ("kernels", "expected"), [("auto", "auto"), ("triton", "auto"), ("reference", "reference")]
)
def test_low_rank_products(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, expected: str
) -> None:
    ranks = {"model.layers.0.self_attn.q_proj": 4, "model.layers.3.mlp.up_proj": 9}
    config = lowrank_config(LlamaConfig.from_pretrained(tiny / "teacher"), ranks)
    model_class_for(config)(config).save_pretrained(tmp_path)
    asked: list[str] = []

    def recorded(*tensors: torch.Tensor, impl: str) -> torch.Tensor:
        asked.append(impl)
        return two_matmuls(*tensors)

    monkeypatch.setattr(sharded, "lowrank_linear", recorded)
    model = sharded.load_sharded(tmp_path, CONFIG, torch.float32, kernels).model
    model(input_ids=torch.tensor([[1, 2, 3]]))
    factored = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert len(factored) == 2 and asked == [expected] * 2


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.endswith(EXPERTS)])
def test_two_forwards_of_a_model_that_learns_are_equal(tmp_path: Path, family: str) -> None:
    """Whatever its config says of dropout, and wherever its attention reads the rate."""
    config = tiny_config(family)
    rates = [name for name, value in vars(config).items() if "drop" in name and value is not None]
    for name in rates:
        setattr(config, name, 0.5)
    model_class_for(config)(config).save_pretrained(tmp_path)
    model = sharded.load_sharded(tmp_path, CONFIG, torch.float32).model.train()
    ids = torch.arange(2, 14)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits)
