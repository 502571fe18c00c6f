"""Students of another shape than their teacher's, made by hand from a teacher with idle parts: what
is left out of them changes nothing.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from makd_llm.models.families import FAMILIES
from makd_llm.models.origin import Origin, set_origin

HEAD = 8
CHANNELS = tuple(c for c in range(32) if c % 4 != 1)
NEURONS = tuple(tuple(n for n in range(48) if n % 6 != layer) for layer in (0, 2, 3))
HEADS = ((2, 0, 3, 1), (0, 1, 2, 3), (3, 1, 0, 2))
ORIGIN = Origin((0, 2, 3), 4, CHANNELS, NEURONS, HEADS, (((0, 1),),) * 3)
MODULES = {matrix.role: matrix.module for matrix in FAMILIES["llama"].dense}


def rows_of(heads: tuple[int, ...]) -> list[int]:
    return [head * HEAD + channel for head in heads for channel in range(HEAD)]


@torch.no_grad()
def teacher_with_idle_parts(vocabulary: int = 64) -> Any:
    """A random Llama whose layer 1 does nothing, in which some channels and neurons are silent, and
    whose two key-value heads are one.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
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
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    silent = [c for c in range(32) if c not in CHANNELS]
    model.model.embed_tokens.weight[:, silent] = 0.0
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.uniform_(0.5, 1.5)
        for matrix in (attention.k_proj, attention.v_proj):
            matrix.weight[HEAD:] = matrix.weight[:HEAD]
        for matrix in (attention.o_proj, mlp.down_proj):
            matrix.weight[silent] = 0.0
            if index == 1:
                matrix.weight.zero_()
        for matrix in (mlp.gate_proj, mlp.up_proj):
            matrix.weight[[n for n in range(48) if n % 6 == index]] = 0.0
    return model


@torch.no_grad()
def reduced(teacher: Any) -> Any:
    """The same function without the idle parts, with its query heads in another order."""
    config = copy.deepcopy(teacher.config)
    config.hidden_size, config.intermediate_size, config.head_dim = 24, 40, HEAD
    config.num_hidden_layers, config.num_key_value_heads = 3, 1
    # The root mean square is over fewer channels: the silent ones counted as zeros.
    config.rms_norm_eps = teacher.config.rms_norm_eps * 32 / 24
    set_origin(config, ORIGIN)
    student = type(teacher)(config)
    channels = list(CHANNELS)

    def copy_norm(ours: Any, theirs: Any) -> None:
        ours.weight.copy_(theirs.weight[channels] * (24 / 32) ** -0.5)

    student.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight[:, channels])
    copy_norm(student.model.norm, teacher.model.norm)
    for index, layer in enumerate(student.model.layers):
        source = teacher.model.layers[ORIGIN.layers[index]]
        heads, neurons = rows_of(HEADS[index]), list(NEURONS[index])
        copy_norm(layer.input_layernorm, source.input_layernorm)
        copy_norm(layer.post_attention_layernorm, source.post_attention_layernorm)
        kept = {"q": heads, "k": range(HEAD), "v": range(HEAD), "gate": neurons, "up": neurons}
        for role, rows in kept.items():
            weight = source.get_submodule(MODULES[role]).weight
            layer.get_submodule(MODULES[role]).weight.copy_(weight[list(rows)][:, channels])
        for role, columns in {"o": heads, "down": neurons}.items():
            weight = source.get_submodule(MODULES[role]).weight
            layer.get_submodule(MODULES[role]).weight.copy_(weight[channels][:, columns])
    return student


@torch.no_grad()
def permuted(teacher: Any) -> Any:
    """The teacher with its key-value heads swapped, and its query heads inside and with them."""
    student = copy.deepcopy(teacher)
    order = (3, 2, 0, 1)
    swapped = (((1,), (0,)),) * 4
    set_origin(
        student.config,
        Origin((0, 1, 2, 3), 4, query_heads=(order,) * 4, key_value_heads=swapped),
    )
    for layer in student.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.copy_(attention.q_proj.weight[rows_of(order)])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows_of(order)])
        for matrix in (attention.k_proj, attention.v_proj):
            matrix.weight.copy_(matrix.weight[rows_of((1, 0))])
    return student


@pytest.fixture
def idle_and_reduced() -> tuple[Any, Any]:
    """A teacher with idle parts, and the student without them."""
    teacher = teacher_with_idle_parts()
    return teacher, reduced(teacher)


@pytest.fixture
def plain_and_permuted() -> tuple[Any, Any]:
    """A teacher whose key-value heads differ, and the student with other orders of heads."""
    teacher = teacher_with_idle_parts()
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.k_proj.weight.normal_(std=0.2)
            layer.self_attn.v_proj.weight.normal_(std=0.2)
    return teacher, permuted(teacher)


@pytest.fixture(scope="module")
def reshaped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher/, reduced/ and the tiny teacher's data."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("reshaped")
    for name in ("train.jsonl", "validation.jsonl"):
        shutil.copy(tiny / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "teacher")
    teacher = teacher_with_idle_parts(len(tokenizer))
    for name, model in (("teacher", teacher), ("reduced", reduced(teacher))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder
