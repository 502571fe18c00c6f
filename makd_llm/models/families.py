"""Which modules play q k v o gate up down in each architecture.

A decoder layer multiplies its stream with seven matrices: the queries, keys and values of the
attention (`q k v`) read the normed stream, `o` brings the heads' outputs back to it; in the
feed-forward part `gate` and `up` read the normed stream and `down` brings their product back. Every
architecture has these roles and names them in its own way. GPT-2 differs most: it stores q, k and v
fused in one matrix, keeps every matrix transposed (in, out), and has no gate.

A mixture of experts has `gate up down` once per expert. What a layer is made of then depends on the
config and on which layer it is, so a family gives the matrices of one layer of one model, and what
tells them apart within it is their `key`: the role, and for an expert its number behind it
(`gate.3`; `gate.shared` for the expert that every token goes through). transformers keeps a layer's
experts stacked in two tensors; here they have modules of their own, `mlp.experts.3.gate_proj`, as
`modeling_lowrank.unstack_experts` makes them. The router stays as it is: none of the matrices.

`FAMILIES` is the table; everything that factorizes, captures or counts matrices reads it. SmolLM2
and most other Llama-likes carry the model type `llama`. A low-rank student of ours belongs to the
family of its teacher: `makd_llama` is looked up as `llama`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from makd_llm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedConfig

STUDENT_PREFIX = "makd_"
SHARED = "shared"
_ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Matrix:
    """One matrix of a decoder layer.

    Attributes:
        role: one of q, k, v, o, gate, up, down: what budgets and tables go by.
        module: dotted path of the module that stores it, relative to the decoder layer.
        part, parts: the matrix is the `part`-th of `parts` that the module holds side by side, or
            head by head (`modeling_lowrank.fused_layout`).
        transposed: the module stores its weight as (in, out), as GPT-2's Conv1D does, instead of
            (out, in).
        expert: the expert that it belongs to: its number, SHARED, or "" where there are none.
    """

    role: str
    module: str
    part: int = 0
    parts: int = 1
    transposed: bool = False
    expert: str = ""

    @property
    def key(self) -> str:
        """Its name within its layer: statistics and files go by it."""
        return f"{self.role}.{self.expert}" if self.expert else self.role


@dataclass(frozen=True)
class Family:
    """One architecture: the names of its parts.

    Attributes:
        model_type: transformers' name of the architecture.
        causal_lm: name of the causal language model class in transformers.
        dense: the matrices of a decoder layer without experts.
        layers, backbone, head, embedding: dotted paths of the decoder layers, of the model without
            its head, of the output projection, and of the tokens' embedding, relative to the causal
            language model.
        experts: layers may have a mixture of experts in the place of the feed-forward matrices.
        shared_expert: such a layer has one more expert, which every token goes through.
    """

    model_type: str
    causal_lm: str
    dense: tuple[Matrix, ...]
    layers: str = "model.layers"
    backbone: str = "model"
    head: str = "lm_head"
    embedding: str = "model.embed_tokens"
    experts: bool = False
    shared_expert: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that its matrices have, whatever the layer."""
        return tuple(matrix.role for matrix in self.dense)

    def matrices(self, config: PreTrainedConfig, layer: int) -> tuple[Matrix, ...]:
        """The matrices of one decoder layer of a model."""
        count = n_experts(config, layer) if self.experts else 0
        if count == 0:
            return self.dense
        attention = tuple(m for m in self.dense if m.role in _ATTENTION)
        experts = [_expert(f"mlp.experts.{number}", str(number)) for number in range(count)]
        if self.shared_expert:
            experts.append(_expert("mlp.shared_expert", SHARED))
        return attention + tuple(matrix for expert in experts for matrix in expert)


def n_experts(config: PreTrainedConfig, layer: int) -> int:
    """How many experts the router of a layer chooses from; 0: the layer is dense.

    The Qwen families may make some layers dense: those listed in `mlp_only_layers`, and all but
    every `decoder_sparse_step`-th.
    """
    listed = layer in (getattr(config, "mlp_only_layers", None) or ())
    between = (layer + 1) % getattr(config, "decoder_sparse_step", 1) != 0
    return 0 if listed or between else int(config.num_experts)


def stages(matrices: Sequence[Matrix]) -> list[list[tuple[Matrix, ...]]]:
    """The groups of a layer's matrices that read the same input, in the order in which they work.

    One calibration statistic (and one packed product) serves a group. A stage holds the groups that
    work side by side on what the stage before has made: one, or one per expert.
    """
    found = []
    for roles in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
        groups: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            if matrix.role in roles:
                groups.setdefault(matrix.expert, []).append(matrix)
        found.append([tuple(group) for group in groups.values()])
    return found


def shared_inputs(matrices: Sequence[Matrix]) -> list[tuple[Matrix, ...]]:
    """The groups of all stages, one after another."""
    return [group for stage in stages(matrices) for group in stage]


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

_PHI3_MATRICES = (
    Matrix("q", "self_attn.qkv_proj", part=0, parts=3),
    Matrix("k", "self_attn.qkv_proj", part=1, parts=3),
    Matrix("v", "self_attn.qkv_proj", part=2, parts=3),
    Matrix("o", "self_attn.o_proj"),
    Matrix("gate", "mlp.gate_up_proj", part=0, parts=2),
    Matrix("up", "mlp.gate_up_proj", part=1, parts=2),
    Matrix("down", "mlp.down_proj"),
)

_OPT_MATRICES = (
    Matrix("q", "self_attn.q_proj"),
    Matrix("k", "self_attn.k_proj"),
    Matrix("v", "self_attn.v_proj"),
    Matrix("o", "self_attn.out_proj"),
    Matrix("up", "fc1"),
    Matrix("down", "fc2"),
)


def _fused_by_head(attention: str) -> tuple[Matrix, ...]:
    """GPT-NeoX and Falcon: one module for q, k and v, dense_h_to_4h and back."""
    return (
        *(Matrix(r, f"{attention}.query_key_value", part=i, parts=3) for i, r in enumerate("qkv")),
        Matrix("o", f"{attention}.dense"),
        Matrix("up", "mlp.dense_h_to_4h"),
        Matrix("down", "mlp.dense_4h_to_h"),
    )


def _expert(module: str, expert: str) -> tuple[Matrix, ...]:
    return tuple(
        Matrix(role, f"{module}.{role}_proj", expert=expert) for role in ("gate", "up", "down")
    )


_KNOWN = (
    Family("llama", "LlamaForCausalLM", _LLAMA_MATRICES),
    Family("qwen2", "Qwen2ForCausalLM", _LLAMA_MATRICES),
    Family("qwen3", "Qwen3ForCausalLM", _LLAMA_MATRICES),
    Family("mistral", "MistralForCausalLM", _LLAMA_MATRICES),
    Family("gemma", "GemmaForCausalLM", _LLAMA_MATRICES),
    Family("gemma2", "Gemma2ForCausalLM", _LLAMA_MATRICES),
    Family("gemma3_text", "Gemma3ForCausalLM", _LLAMA_MATRICES),
    Family("olmo2", "Olmo2ForCausalLM", _LLAMA_MATRICES),
    Family("phi3", "Phi3ForCausalLM", _PHI3_MATRICES),
    Family(
        "opt",
        "OPTForCausalLM",
        _OPT_MATRICES,
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _fused_by_head("attention"),
        layers="gpt_neox.layers",
        backbone="gpt_neox",
        embedding="gpt_neox.embed_in",
    ),
    Family(
        "falcon",
        "FalconForCausalLM",
        _fused_by_head("self_attention"),
        layers="transformer.h",
        backbone="transformer",
        embedding="transformer.word_embeddings",
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        _GPT2_MATRICES,
        layers="transformer.h",
        backbone="transformer",
        embedding="transformer.wte",
    ),
    Family("mixtral", "MixtralForCausalLM", _LLAMA_MATRICES, experts=True),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", _LLAMA_MATRICES, experts=True, shared_expert=True),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", _LLAMA_MATRICES, experts=True),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _KNOWN}

# What a config may ask for: experts, which some families have and no objective models yet; what is
# not built at all; and what else the objectives do not model.
_EXPERTS = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
}
_NOT_BUILT = {
    "add_cross_attention": "cross-attention",
    "use_bidirectional_attention": "bidirectional attention",
}
_NOT_DISTILLED = {
    "attn_logit_softcapping": "attention logit softcapping",
    "final_logit_softcapping": "final logit softcapping",
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model, by its config; a low-rank student's is its teacher's.

    Raises:
        UserError: the architecture is unknown, the weights are quantized, or the config asks for
            something that is not built.
    """
    known = ", ".join(FAMILIES)
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise UserError(
            f"the model's weights are quantized ({method or 'quantization_config'}), which only "
            "its own loader can read; save a bfloat16 copy of it, or take what it was made from"
        )
    family = FAMILIES.get(config.model_type.removeprefix(STUDENT_PREFIX))
    refused = _NOT_BUILT if family is not None and family.experts else _EXPERTS | _NOT_BUILT
    _refuse(config, refused, f"choose a decoder of one of these model types: {known}")
    if family is None:
        raise UserError(
            f"model_type {config.model_type!r} is not supported; "
            f"choose a model of one of these model types: {known}"
        )
    return family


def check_distillable(config: PreTrainedConfig) -> None:
    """Raises UserError for what can be factorized, but what no objective models yet."""
    advice = "makd factorize takes it, distillation does not"
    _refuse(config, _EXPERTS | _NOT_DISTILLED, advice)


def _refuse(config: PreTrainedConfig, fields: dict[str, str], advice: str) -> None:
    for field, meaning in fields.items():
        value = getattr(config, field, None)
        if value is not None and value is not False and value != 0:
            raise UserError(
                f"model_type {config.model_type!r} has {meaning} ({field}={value}), which is not "
                f"supported; {advice}"
            )


def matrices_of(config: PreTrainedConfig) -> list[tuple[int, Matrix, str]]:
    """All matrices of a model in order: (layer index, matrix, full module name).

    Raises:
        UserError: as `family_of`.
    """
    family = family_of(config)
    return [
        (layer, matrix, f"{family.layers}.{layer}.{matrix.module}")
        for layer in range(config.num_hidden_layers)
        for matrix in family.matrices(config, layer)
    ]


def part_of(config: PreTrainedConfig, matrix: Matrix, whole: Tensor, dim: int = -1) -> Tensor:
    """The matrix's own share of a tensor whose dimension `dim` is its module's outputs."""
    from makd_llm.models.modeling_lowrank import fused_layout

    layout = fused_layout(config, matrix.module)
    return whole if layout is None else layout.split(whole, dim)[matrix.part]
