"""Which modules of transformers' models get the lean forward, and that it says the same."""

import pytest
import torch

from makd_kernels.lean import keeping_less
from makd_llm.models.families import FAMILIES
from makd_llm.models.lean import make_lean
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.testing import TINY_LAYERS, tiny_config

NORMED = {"llama", "mistral", "qwen2", "qwen3", "phi3"}
GATED = {"llama", "mistral", "qwen2", "qwen3", "olmo2"}


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"mixtral", "qwen2_moe", "qwen3_moe"}))
def test_the_same_values_and_gradients(name: str) -> None:
    config = tiny_config(name)
    torch.manual_seed(0)
    model = model_class_for(config)._from_config(config, dtype=torch.float64).eval()
    ids = torch.randint(3, 46, (2, 7))
    results = []
    kinds = [type(module) for module in model.modules()]
    for lean in (False, True):
        if lean:
            make_lean(model)
        with keeping_less():
            logits = model(ids).logits
        grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *grads])
    for plain, ours in zip(*results, strict=True):
        # transformers' norms compute in fp32, ours in the model's fp64
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    changed = [
        (before.__name__, type(module).__name__)
        for before, module in zip(kinds, model.modules(), strict=True)
        if type(module) is not before
    ]
    assert all(before == after for before, after in changed)
    norms = sum(before.endswith("RMSNorm") for before, _ in changed)
    gates = sum(before.endswith("MLP") for before, _ in changed)
    per_layer = 4 if name == "qwen3" else 2  # of queries and keys, too
    assert norms == (per_layer * TINY_LAYERS + 1 if name in NORMED else 0)
    assert gates == (TINY_LAYERS if name in GATED else 0)


@pytest.mark.parametrize("name", sorted(NORMED))
def test_under_autocast_as_without(name: str) -> None:
    """Weights in fp32, products in bf16, whose outputs Qwen3 norms again."""
    config = tiny_config(name)
    torch.manual_seed(0)
    model = model_class_for(config)._from_config(config, dtype=torch.float32)
    ids = torch.randint(3, 46, (2, 7))
    logits = []
    for lean in (False, True):
        if lean:
            make_lean(model)
        with torch.autocast("cpu", torch.bfloat16), keeping_less():
            logits.append(model(ids).logits)
        logits[-1].sum().backward()
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-2, atol=2e-2)
