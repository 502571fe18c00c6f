"""Every published family by its own name, with what its configs have that others lack: factorized,
at full rank equal to the teacher, exported, loaded again, generating.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from makd_llm.checkpoint.export import merge, rewrite
from makd_llm.checkpoint.folder import read_config
from makd_llm.data.batch import Batch, batches_of
from makd_llm.data.schema import Example
from makd_llm.factorize import student
from makd_llm.factorize.student import Recipe, factorize
from makd_llm.models.families import FAMILIES
from makd_llm.models.modeling_lowrank import is_lowrank
from makd_llm.testing import tiny_config

IDS = torch.arange(3, 20)[None]


class Published(NamedTuple):
    """model_type: transformers' name. settings: what its configs say."""

    model_type: str
    tied: bool = False
    settings: dict[str, Any] = {}  # noqa: RUF012  (never written to)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "partial_rotary_factor": 1.0,
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}
PUBLISHED = {
    "Llama-2": Published("llama", settings={"num_key_value_heads": 4, "attention_bias": False}),
    "Llama-3": Published(
        "llama", settings={"attention_bias": False, "rope_parameters": LLAMA3_ROPE}
    ),
    "SmolLM2": Published("llama", tied=True, settings={"attention_bias": False, "mlp_bias": False}),
    "Qwen2": Published("qwen2"),
    "Qwen2.5": Published("qwen2", tied=True, settings={"max_window_layers": 1}),
    "Qwen3": Published("qwen3", tied=True),
    "Mistral": Published("mistral"),
    "Gemma": Published("gemma", tied=True),
    "Gemma-2": Published("gemma2", tied=True),
    "Gemma-3": Published("gemma3_text", tied=True),
    "Phi-3": Published("phi3"),
    "Phi-3-128k": Published("phi3", settings={"rope_parameters": LONG_ROPE}),
    "OLMo-2": Published("olmo2"),
    "GPT-NeoX": Published("gpt_neox", settings={"use_parallel_residual": True}),
    "Pythia": Published("gpt_neox", settings={"attention_bias": True}),
    "GPT-2": Published("gpt2", tied=True),
    "OPT-125m": Published("opt", tied=True),
    "OPT-350m": Published(
        "opt", tied=True, settings={"do_layer_norm_before": False, "word_embed_proj_dim": 16}
    ),
    "Falcon-7B": Published(
        "falcon",
        tied=True,
        settings={"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": 1},
    ),
    "Falcon-40B": Published("falcon", tied=True),
    "Falcon-RW": Published(
        "falcon",
        settings={
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
            "num_kv_heads": 4,
        },
    ),
    "Mixtral": Published("mixtral"),
    "Qwen1.5-MoE": Published("qwen2_moe"),
    "Qwen3-MoE": Published("qwen3_moe"),
}


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model_type, tied, settings = PUBLISHED[name]
    config = tiny_config(model_type, tied)
    for key, value in settings.items():
        assert hasattr(config, key), f"{model_type} has no {key}"
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # so that biases and norms say something
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    model.save_pretrained(folder)
    return folder


def texts() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 48, (24, 16), generator=generator)
    return batches_of([Example(str(i), row, 1) for i, row in enumerate(ids.tolist())], 4, 0)


def cut(teacher: Path, out: Path, recipe: Recipe) -> None:
    factorize(teacher, out, recipe, texts(), tokenizer=None, dtype=torch.float32)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_no_family_is_missing() -> None:
    assert {published.model_type for published in PUBLISHED.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_factorized_equal_at_full_rank_exported_reloaded_generating(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = saved(name, tmp_path / "teacher")
    with monkeypatch.context() as patch:
        full = lambda shapes, keep, **more: [min(s.rows, s.columns) for s in shapes]  # noqa: E731
        patch.setattr(student, "uniform_ranks", full)
        cut(teacher, tmp_path / "full", Recipe(1.0))
    assert read_config(tmp_path / "full").lowrank
    torch.testing.assert_close(logits(tmp_path / "full"), logits(teacher), rtol=1e-3, atol=1e-3)
    cut(teacher, tmp_path / "student", Recipe(0.5, rank_multiple=2))
    rewrite(tmp_path / "student", tmp_path / "exported")
    merge(tmp_path / "student", tmp_path / "merged")
    said = {name: logits(tmp_path / name) for name in ("student", "exported", "merged")}
    assert torch.equal(said["exported"], said["student"])
    torch.testing.assert_close(said["merged"], said["student"], rtol=1e-3, atol=1e-3)
    assert is_lowrank(read_config(tmp_path / "exported"))
    assert not is_lowrank(read_config(tmp_path / "merged"))
    for folder in ("exported", "merged"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        written = model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert written.shape[1] == IDS.shape[1] + 4
