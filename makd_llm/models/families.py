"""Which modules play q k v o gate up down in each architecture.

A decoder layer multiplies its stream with seven matrices: the queries, keys and values of the
attention (`q k v`) read the normed stream, `o` brings the heads' outputs back to it; in the
feed-forward part `gate` and `up` read the normed stream and `down` brings their product back. Every
architecture has these roles and names them in its own way. GPT-2 differs most: it stores q, k and v
fused in one matrix, keeps every matrix transposed (in, out), and has no gate.

`FAMILIES` is the table; everything that factorizes, captures or counts matrices reads it. SmolLM2
and most other Llama-likes carry the model type `llama`. A low-rank student of ours belongs to the
family of its teacher: `makd_llama` is looked up as `llama`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from makd_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STUDENT_PREFIX = "makd_"


@dataclass(frozen=True)
class Matrix:
    """One matrix of a decoder layer.

    Attributes:
        role: one of q, k, v, o, gate, up, down.
        module: dotted path of the module that stores it, relative to the decoder layer.
        part, parts: the matrix is the `part`-th of `parts` equal pieces of the module's outputs.
        transposed: the module stores its weight as (in, out), as GPT-2's Conv1D does, instead of
            (out, in).
    """

    role: str
    module: str
    part: int = 0
    parts: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture: the names of its parts.

    Attributes:
        model_type: transformers' name of the architecture.
        causal_lm: name of the causal language model class in transformers.
        layers, backbone, head: dotted paths of the decoder layers, of the model without its head,
            and of the output projection, relative to the causal language model.
        matrices: the matrices of one decoder layer.
        shared_inputs: groups of roles that read the same input, so that one calibration statistic
            (and one packed product) serves the group.
    """

    model_type: str
    causal_lm: str
    layers: str
    backbone: str
    head: str
    matrices: tuple[Matrix, ...]
    shared_inputs: tuple[tuple[str, ...], ...]


_LLAMA_MATRICES = (
    Matrix("q", "self_attn.q_proj"),
    Matrix("k", "self_attn.k_proj"),
    Matrix("v", "self_attn.v_proj"),
    Matrix("o", "self_attn.o_proj"),
    Matrix("gate", "mlp.gate_proj"),
    Matrix("up", "mlp.up_proj"),
    Matrix("down", "mlp.down_proj"),
)

_GPT2_MATRICES = (
    Matrix("q", "attn.c_attn", part=0, parts=3, transposed=True),
    Matrix("k", "attn.c_attn", part=1, parts=3, transposed=True),
    Matrix("v", "attn.c_attn", part=2, parts=3, transposed=True),
    Matrix("o", "attn.c_proj", transposed=True),
    Matrix("up", "mlp.c_fc", transposed=True),
    Matrix("down", "mlp.c_proj", transposed=True),
)


def _like_llama(model_type: str, causal_lm: str) -> Family:
    return Family(
        model_type=model_type,
        causal_lm=causal_lm,
        layers="model.layers",
        backbone="model",
        head="lm_head",
        matrices=_LLAMA_MATRICES,
        shared_inputs=(("q", "k", "v"), ("o",), ("gate", "up"), ("down",)),
    )


FAMILIES: dict[str, Family] = {
    "llama": _like_llama("llama", "LlamaForCausalLM"),
    "qwen2": _like_llama("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _like_llama("qwen3", "Qwen3ForCausalLM"),
    "mistral": _like_llama("mistral", "MistralForCausalLM"),
    "gemma": _like_llama("gemma", "GemmaForCausalLM"),
    "gemma3_text": _like_llama("gemma3_text", "Gemma3ForCausalLM"),
    "gpt2": Family(
        model_type="gpt2",
        causal_lm="GPT2LMHeadModel",
        layers="transformer.h",
        backbone="transformer",
        head="lm_head",
        matrices=_GPT2_MATRICES,
        shared_inputs=(("q", "k", "v"), ("o",), ("up",), ("down",)),
    ),
}

# What a config may ask for that the objectives and the factorization do not model yet.
_NOT_BUILT = {
    "attn_logit_softcapping": "attention logit softcapping",
    "final_logit_softcapping": "final logit softcapping",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "add_cross_attention": "cross-attention",
    "use_bidirectional_attention": "bidirectional attention",
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model, by its config; a low-rank student's is its teacher's.

    Raises:
        UserError: the architecture is unknown, or the config asks for something that is not built.
    """
    known = ", ".join(FAMILIES)
    for field, meaning in _NOT_BUILT.items():
        value = getattr(config, field, None)
        if value is not None and value is not False and value != 0:
            raise UserError(
                f"model_type {config.model_type!r} has {meaning} ({field}={value}), which is not "
                f"supported; choose a dense decoder of one of these model types: {known}"
            )
    family = FAMILIES.get(config.model_type.removeprefix(STUDENT_PREFIX))
    if family is None:
        raise UserError(
            f"model_type {config.model_type!r} is not supported; "
            f"choose a model of one of these model types: {known}"
        )
    return family


def matrices_of(family: Family, n_layers: int) -> list[tuple[int, Matrix, str]]:
    """All matrices of a model in order: (layer index, matrix, full module name)."""
    return [
        (layer, matrix, f"{family.layers}.{layer}.{matrix.module}")
        for layer in range(n_layers)
        for matrix in family.matrices
    ]
