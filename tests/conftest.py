"""Settings that hold for every test and for the processes that tests start; a tiny teacher and its
data.
"""

import json
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Set before torch is imported. Tests are many small processes, each of which is to keep to itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Triton reads it when it is imported. Without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples in every run; and a busy machine is no failure.
settings.register_profile("project", derandomize=True, deadline=None)
settings.load_profile("project")


NEEDS = {
    "cluster": ("MAKD_TEST_CLUSTER", "needs root and SLURM; `make test-slurm` runs it"),
    "browser": ("MAKD_TEST_BROWSER", "needs Chromium; `make test-report` runs it"),
}
"""Markers of tests that only run where a variable says that what they need is there."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: otherwise one worker still has them when the others are done. Those that
    need a cluster or a browser are left out where nobody has made what they need.
    """
    for marker, (variable, reason) in NEEDS.items():
        if not os.environ.get(variable):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "over",
    "old",
    "town",
    "and",
    "nobody",
    "came",
    "to",
    "see",
    "it",
    "again",
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher/ (a random Llama with grouped heads and tied embeddings), train.jsonl
    and validation.jsonl.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    rows = []
    for index in range(40):
        words = [
            WORDS[(index * 7 + k * (1 + index % 5)) % len(WORDS)] for k in range(8 + index % 9)
        ]
        rows.append(
            {
                "id": f"r{index}",
                "document": " ".join(words),
                "summary": " ".join(words[: 2 + index % 3]),
            }
        )
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((row["document"] for row in rows), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,  # otherwise that token's embedding is zero
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    fast.save_pretrained(folder / "teacher")
    return folder
