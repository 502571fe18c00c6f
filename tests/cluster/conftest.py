"""A teacher that needs many devices, and its distillation on 64 of them."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from makd_llm.cluster.job import Job
from makd_llm.planning import build_job

ZERO3 = Path(__file__).parents[2] / "ds_configs" / "zero3.json"


@pytest.fixture(scope="package")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of Llama 3's 70B."""
    path = tmp_path_factory.mktemp("large") / "config.json"
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    config.to_json_file(path, use_diff=False)
    return path


@pytest.fixture(scope="package")
def job(large: Path) -> Job:
    """On 64 devices, with gradient checkpointing."""
    found, notes = build_job(
        large, ZERO3, keep=0.4, nodes=8, gpus=8, batch=64, length=2048, checkpointing=True
    )
    assert notes == []
    return found
