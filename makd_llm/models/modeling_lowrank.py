"""Causal language models whose matrices are stored as two thin factors.

A dense matrix W (M, K) of rank R is kept as `up` (M, R) times `down` (R, K): R * (M + K) numbers
instead of M * K, and as many multiplications per token. `LowRankLinear` is that pair. Each
supported architecture has a subclass of transformers' own model in which some modules are replaced
by such pairs; the config's `lowrank` says which, and with what rank:

    {"model.layers.0.self_attn.q_proj": 96, ...}        one matrix per module
    {"transformer.h.0.attn.c_attn": [64, 64, 96], ...}  q, k, v fused in one module, as in GPT-2
    {"model.layers.0.mlp.experts.3.gate_proj": 64, ...} one matrix of one expert
    {"model.embed_tokens": 256, ...}                    the embedding, and with it a head tied to it

A module that is absent from it stays dense, and so does a part of a fused one whose rank is null.
transformers keeps the experts of a layer stacked in two tensors; here every expert has modules of
its own (`Experts`), dense or factored. Attention, routers, caches, generation, checkpointing and
tied embeddings are transformers' own.

This file travels with an exported model: `save_pretrained` puts a copy beside the weights, and
`trust_remote_code=True` runs that copy where our package is not installed. It therefore imports
torch and transformers and nothing else. In our package, importing it makes the Auto classes know
these models.
"""

# Shapes: M outputs, K inputs, R rank; N tokens, D width, n tokens of one expert, C its choices.

import gc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers import initialization as init
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.pytorch_utils import Conv1D

Ranks = int | list[int | None]  # of one matrix, or of the parts of a fused one; None: dense


def two_matmuls(
    x: torch.Tensor, down_RK: torch.Tensor, up_MR: torch.Tensor, bias_M: torch.Tensor | None
) -> torch.Tensor:
    """(..., K) to (..., M)."""
    return F.linear(F.linear(x, down_RK), up_MR, bias_M)


class LowRankLinear(nn.Module):
    """y = up (down x) + bias, the factored form of `nn.Linear(in_features, out_features)`.

    Parameters: `down` (R, K), `up` (M, R), `bias` (M,) or None. `product` computes it; whoever has
    a faster way for the device may put it there.
    """

    product: Callable[..., torch.Tensor] = staticmethod(two_matmuls)

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        # nn.Linear's own default: entries of W with variance 1 / (3 K).
        self.reset_parameters(std=(3 * in_features) ** -0.5)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Random factors whose product has entries of standard deviation `std`; the bias is 0."""
        # An entry of the product sums R products of two independent factors: variance R * s**4.
        factor_std = (std * self.rank**-0.5) ** 0.5
        init.normal_(self.down, mean=0.0, std=factor_std)
        init.normal_(self.up, mean=0.0, std=factor_std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., M)."""
        return self.product(x, self.down, self.up, self.bias)

    def dense_weight(self) -> torch.Tensor:
        """The product up @ down, (M, K), multiplied in fp32 or wider, in the factors' dtype."""
        return multiply_factors(self.up, self.down).to(self.up.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


class LowRankEmbedding(nn.Module):
    """A row of `up` for each token, times `down`: the factored form of `nn.Embedding`.

    Parameters: `up` (V, R) and `down` (R, D), as a `LowRankLinear` with V outputs has them, so that
    a head may be tied to it. scale: what the embeddings are multiplied by, as in Gemma 2 and 3.
    """

    def __init__(
        self, tokens: int, width: int, rank: int, padding: int | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.tokens, self.width, self.rank = tokens, width, rank
        self.padding, self.scale = padding, scale
        self.up = nn.Parameter(torch.empty(tokens, rank))
        self.down = nn.Parameter(torch.empty(rank, width))
        self.reset_parameters(std=1.0)

    @classmethod
    def like(cls, dense: nn.Embedding, rank: int) -> "LowRankEmbedding":
        """One of this rank, with random factors, for a dense one."""
        scale = float(getattr(dense, "scalar_embed_scale", 1.0))
        tokens, width = dense.num_embeddings, dense.embedding_dim
        return cls(tokens, width, rank, dense.padding_idx, scale)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Random factors whose product has entries of standard deviation `std`."""
        factor_std = (std * self.rank**-0.5) ** 0.5
        init.normal_(self.up, mean=0.0, std=factor_std)
        init.normal_(self.down, mean=0.0, std=factor_std)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) to (..., D)."""
        rows = F.embedding(ids, self.up, self.padding) @ self.down
        return rows if self.scale == 1.0 else rows * rows.new_tensor(self.scale)


class Fused(NamedTuple):
    """How a module that holds several matrices lays out its outputs.

    `groups` times the same row of blocks, one block of `widths[i]` outputs for each part i. One
    group: the parts stand side by side. As many as there are heads: q, k and v of each head do.
    """

    groups: int
    widths: tuple[int, ...]

    def size(self, part: int) -> int:
        """Outputs of a part."""
        return self.groups * self.widths[part]

    def split(self, whole: torch.Tensor, dim: int = -1) -> list[torch.Tensor]:
        """The parts of a fused tensor along the dimension of its outputs."""
        dim %= whole.dim()
        grouped = whole.unflatten(dim, (self.groups, sum(self.widths)))
        return [part.flatten(dim, dim + 1) for part in grouped.split(self.widths, dim + 1)]

    def join(self, parts: Sequence[torch.Tensor], dim: int = -1) -> torch.Tensor:
        """The fused tensor of its parts."""
        dim %= parts[0].dim()
        if self.groups == 1:
            return torch.cat(list(parts), dim)
        grouped = [
            part.unflatten(dim, (self.groups, width))
            for part, width in zip(parts, self.widths, strict=True)
        ]
        return torch.cat(grouped, dim + 1).flatten(dim, dim + 1)


def fused_layout(config: PreTrainedConfig, module: str) -> Fused | None:
    """The layout of a module of a model, by the last part of its name; None: one matrix."""
    kind, leaf = config.model_type.removeprefix("makd_"), module.rpartition(".")[2]
    if (kind, leaf) == ("phi3", "gate_up_proj"):
        return Fused(1, (config.intermediate_size,) * 2)
    if (kind, leaf) not in _QKV:
        return None
    width, heads = config.hidden_size, config.num_attention_heads
    if kind == "gpt2":
        return Fused(1, (width,) * 3)
    if kind == "phi3":
        head = getattr(config, "head_dim", None) or width // heads
        key_value = config.num_key_value_heads * head
        return Fused(1, (heads * head, key_value, key_value))
    head = width // heads
    if kind == "falcon" and config.new_decoder_architecture:
        groups = config.num_kv_heads
        return Fused(groups, (heads // groups * head, head, head))
    if kind == "falcon" and config.multi_query:
        return Fused(1, (width, head, head))
    return Fused(heads, (head,) * 3)


_QKV = {
    ("gpt2", "c_attn"),
    ("phi3", "qkv_proj"),
    ("gpt_neox", "query_key_value"),
    ("falcon", "query_key_value"),
}


class LowRankParts(nn.Module):
    """Matrices that read one input, in one module, each factored or (rank None) dense."""

    def __init__(
        self, in_features: int, layout: Fused, ranks: list[int | None], bias: bool = True
    ) -> None:
        super().__init__()
        if len(ranks) != len(layout.widths):
            raise ValueError(f"{len(ranks)} ranks for {len(layout.widths)} fused matrices")
        self.layout = layout
        self.parts = nn.ModuleList(
            nn.Linear(in_features, layout.size(part), bias)
            if rank is None
            else LowRankLinear(in_features, layout.size(part), rank, bias)
            for part, rank in enumerate(ranks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., sum of the parts' outputs)."""
        return self.layout.join([part(x) for part in self.parts])


class Expert(nn.Module):
    """down (act(gate x) * up x), each a module of its own.

    token_n: while the expert works, the places among its layer's tokens (B T) of the rows that it
    is given; for whoever listens to its modules.
    """

    def __init__(self, width: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = activation
        self.token_n: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, D) to (n, D)."""
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.ModuleList):
    """The experts of a layer, one after another; the router before them is transformers' own."""

    def __init__(self, stacked: Any) -> None:
        """As many as the stacked module of transformers has, with fresh weights."""
        count, width, inner = stacked.num_experts, stacked.hidden_dim, stacked.intermediate_dim
        super().__init__(Expert(width, inner, stacked.act_fn) for _ in range(count))

    def forward(
        self, hidden_ND: torch.Tensor, chosen_NC: torch.Tensor, weight_NC: torch.Tensor
    ) -> torch.Tensor:
        """(N, D) to (N, D): the sum of each token's chosen experts, weighted.

        Summed in the order of transformers' own experts, by number. A token chooses an expert once.
        """
        total_ND = torch.zeros_like(hidden_ND)
        for number in chosen_NC.unique().tolist():
            choice_n, token_n = chosen_NC.T.eq(number).nonzero(as_tuple=True)
            expert = self[number]
            expert.token_n = token_n
            try:
                out_nD = expert(hidden_ND[token_n])
            finally:
                expert.token_n = None
            out_nD = out_nD * weight_NC[token_n, choice_n, None]
            total_ND.index_add_(0, token_n, out_nD.to(total_ND.dtype))
        return total_ND


_STACKED = (MixtralExperts, Qwen2MoeExperts, Qwen3MoeExperts)


def unstack_experts(model: nn.Module) -> None:
    """Replaces stacked experts by `Experts`, in place; their weights are fresh ones."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _STACKED):
                setattr(parent, name, Experts(child))


def multiply_factors(up_MR: torch.Tensor, down_RK: torch.Tensor) -> torch.Tensor:
    """up @ down, (M, K), in fp32, or in float64 where the factors are."""
    dtype = torch.promote_types(up_MR.dtype, torch.float32)
    return up_MR.to(dtype) @ down_RK.to(dtype)


class _LowRankConfig(PreTrainedConfig):
    """Put before a config class: what a low-rank model's config has beside the dense one's."""

    lowrank: dict[str, Ranks] | None = None  # None: every module is dense
    _auto_class = "AutoConfig"  # so that saving copies this file
    base_model_ep_plan: ClassVar[Any] = None  # a plan for stacked experts

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # The dense architecture's plan shards `weight`s that the factored modules do not have.
        self.base_model_tp_plan = None  # type: ignore[misc]  # as transformers does itself


class _LowRankCausalLM(PreTrainedModel):
    """Put before a causal language model class: unstacks experts, and swaps the modules that the
    config names.
    """

    _auto_class = "AutoModelForCausalLM"  # so that saving copies this file

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        unstack_experts(self)
        for name, ranks in (config.lowrank or {}).items():
            factor_module(self, name, ranks, fused_layout(config, name))
        if config.tie_word_embeddings:
            self._tie_factors()
        # Under deepspeed.zero.Init parameters refer to themselves: without this, the shards of the
        # replaced matrices would live until some later collection.
        gc.collect()
        self.post_init()

    def _tie_factors(self) -> None:
        """Gives a head that is tied to a factored embedding the same factors."""
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(embedding, LowRankEmbedding):
            return
        names = {module: name for name, module in self.named_modules()}
        tied = LowRankLinear(embedding.width, embedding.tokens, embedding.rank, bias=False)
        self.set_output_embeddings(tied)
        self._tied_weights_keys = {
            f"{names[head]}.{leaf}": f"{names[embedding]}.{leaf}" for leaf in ("up", "down")
        }

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        # The backbone is a model of its own and would not ask this class how to fill our modules.
        for module in self.modules():
            if isinstance(module, LowRankLinear | LowRankEmbedding):
                self._initialize_weights(module)
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LowRankLinear | LowRankEmbedding):
            # OPT's config has another name for it.
            std = getattr(self.config, "initializer_range", None) or self.config.init_std
            module.reset_parameters(std=std)
        else:
            super()._init_weights(module)


def factor_module(model: nn.Module, name: str, ranks: Ranks, layout: Fused | None) -> None:
    """Replace the dense module `name` of a model, or of a part of one, by random factors.

    ranks: a list for a module with a layout, of which each part gets its own.
    """
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        dense = getattr(parent, child)
    except AttributeError as error:
        raise ValueError(f"config.lowrank names {name!r}, which the model lacks") from error
    if isinstance(dense, nn.Embedding) and isinstance(ranks, int):
        setattr(parent, child, LowRankEmbedding.like(dense, ranks))
        return
    if isinstance(dense, nn.Linear):
        in_features, out_features = dense.in_features, dense.out_features
    elif isinstance(dense, Conv1D):
        in_features, out_features = dense.nx, dense.nf
    else:
        raise ValueError(f"config.lowrank names {name!r}, a {type(dense).__name__} and no matrix")
    bias = dense.bias is not None
    if isinstance(ranks, list) != (layout is not None):
        kind = "several matrices in one" if layout else "one matrix"
        raise ValueError(f"config.lowrank gives {name!r} the rank {ranks!r}, but it is {kind}")
    if isinstance(ranks, list):
        assert layout is not None
        factored: nn.Module = LowRankParts(in_features, layout, ranks, bias)
    else:
        factored = LowRankLinear(in_features, out_features, ranks, bias)
    setattr(parent, child, factored)
    # GPT-2 initialises its blocks through `c_proj.weight`, which is gone; a block has no parameters
    # of its own, so calling it initialised loses nothing.
    parent._is_hf_initialized = True  # type: ignore[assignment]


class LowRankLlamaConfig(_LowRankConfig, LlamaConfig):
    model_type = "makd_llama"


class LowRankLlamaForCausalLM(_LowRankCausalLM, LlamaForCausalLM):
    config_class = LowRankLlamaConfig


class LowRankQwen2Config(_LowRankConfig, Qwen2Config):
    model_type = "makd_qwen2"


class LowRankQwen2ForCausalLM(_LowRankCausalLM, Qwen2ForCausalLM):
    config_class = LowRankQwen2Config


class LowRankQwen3Config(_LowRankConfig, Qwen3Config):
    model_type = "makd_qwen3"


class LowRankQwen3ForCausalLM(_LowRankCausalLM, Qwen3ForCausalLM):
    config_class = LowRankQwen3Config


class LowRankMistralConfig(_LowRankConfig, MistralConfig):
    model_type = "makd_mistral"


class LowRankMistralForCausalLM(_LowRankCausalLM, MistralForCausalLM):
    config_class = LowRankMistralConfig


class LowRankGemmaConfig(_LowRankConfig, GemmaConfig):
    model_type = "makd_gemma"


class LowRankGemmaForCausalLM(_LowRankCausalLM, GemmaForCausalLM):
    config_class = LowRankGemmaConfig


class LowRankGemma3TextConfig(_LowRankConfig, Gemma3TextConfig):
    model_type = "makd_gemma3_text"


class LowRankGemma3ForCausalLM(_LowRankCausalLM, Gemma3ForCausalLM):
    config_class = LowRankGemma3TextConfig


class LowRankGemma2Config(_LowRankConfig, Gemma2Config):
    model_type = "makd_gemma2"


class LowRankGemma2ForCausalLM(_LowRankCausalLM, Gemma2ForCausalLM):
    config_class = LowRankGemma2Config


class LowRankPhi3Config(_LowRankConfig, Phi3Config):
    model_type = "makd_phi3"


class LowRankPhi3ForCausalLM(_LowRankCausalLM, Phi3ForCausalLM):
    config_class = LowRankPhi3Config


class LowRankOlmo2Config(_LowRankConfig, Olmo2Config):
    model_type = "makd_olmo2"


class LowRankOlmo2ForCausalLM(_LowRankCausalLM, Olmo2ForCausalLM):
    config_class = LowRankOlmo2Config


class LowRankMixtralConfig(_LowRankConfig, MixtralConfig):
    model_type = "makd_mixtral"


class LowRankMixtralForCausalLM(_LowRankCausalLM, MixtralForCausalLM):
    config_class = LowRankMixtralConfig


class LowRankQwen2MoeConfig(_LowRankConfig, Qwen2MoeConfig):
    model_type = "makd_qwen2_moe"


class LowRankQwen2MoeForCausalLM(_LowRankCausalLM, Qwen2MoeForCausalLM):
    config_class = LowRankQwen2MoeConfig


class LowRankQwen3MoeConfig(_LowRankConfig, Qwen3MoeConfig):
    model_type = "makd_qwen3_moe"


class LowRankQwen3MoeForCausalLM(_LowRankCausalLM, Qwen3MoeForCausalLM):
    config_class = LowRankQwen3MoeConfig


class LowRankOPTConfig(_LowRankConfig, OPTConfig):
    model_type = "makd_opt"


class LowRankOPTForCausalLM(_LowRankCausalLM, OPTForCausalLM):
    config_class = LowRankOPTConfig


class LowRankGPTNeoXConfig(_LowRankConfig, GPTNeoXConfig):
    model_type = "makd_gpt_neox"


class LowRankGPTNeoXForCausalLM(_LowRankCausalLM, GPTNeoXForCausalLM):
    config_class = LowRankGPTNeoXConfig


class LowRankFalconConfig(_LowRankConfig, FalconConfig):
    model_type = "makd_falcon"


class LowRankFalconForCausalLM(_LowRankCausalLM, FalconForCausalLM):
    config_class = LowRankFalconConfig


class LowRankGPT2Config(_LowRankConfig, GPT2Config):
    model_type = "makd_gpt2"


class LowRankGPT2LMHeadModel(_LowRankCausalLM, GPT2LMHeadModel):
    config_class = LowRankGPT2Config


# model_type: (config, model) of the dense architecture, and (config, model) of its low-rank form
Architecture = tuple[
    type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedConfig], type[PreTrainedModel]
]
ARCHITECTURES: dict[str, Architecture] = {
    "llama": (LlamaConfig, LlamaForCausalLM, LowRankLlamaConfig, LowRankLlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, LowRankQwen2Config, LowRankQwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, LowRankQwen3Config, LowRankQwen3ForCausalLM),
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        LowRankMistralConfig,
        LowRankMistralForCausalLM,
    ),
    "gemma": (GemmaConfig, GemmaForCausalLM, LowRankGemmaConfig, LowRankGemmaForCausalLM),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        LowRankGemma3TextConfig,
        LowRankGemma3ForCausalLM,
    ),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, LowRankGemma2Config, LowRankGemma2ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM, LowRankPhi3Config, LowRankPhi3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, LowRankOlmo2Config, LowRankOlmo2ForCausalLM),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        LowRankMixtralConfig,
        LowRankMixtralForCausalLM,
    ),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        LowRankQwen2MoeConfig,
        LowRankQwen2MoeForCausalLM,
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        LowRankQwen3MoeConfig,
        LowRankQwen3MoeForCausalLM,
    ),
    "opt": (OPTConfig, OPTForCausalLM, LowRankOPTConfig, LowRankOPTForCausalLM),
    "gpt_neox": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LowRankGPTNeoXConfig,
        LowRankGPTNeoXForCausalLM,
    ),
    "falcon": (FalconConfig, FalconForCausalLM, LowRankFalconConfig, LowRankFalconForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel, LowRankGPT2Config, LowRankGPT2LMHeadModel),
}


def _architecture_of(config: PreTrainedConfig) -> Architecture:
    model_type = config.model_type.removeprefix("makd_")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type {config.model_type!r} has no low-rank form; "
            f"these have one: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def is_lowrank(config: PreTrainedConfig) -> bool:
    """Whether a config describes a low-rank model of ours."""
    # By name, because a travelling copy's classes are others than the package's.
    return config.model_type.startswith("makd_")


def model_class_for(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class of a config: ours for a low-rank config, transformers' for a plain one.

    Raises:
        ValueError: the architecture has no low-rank form.
    """
    _, dense_model, _, lowrank_model = _architecture_of(config)
    return lowrank_model if is_lowrank(config) else dense_model


def lowrank_config(base: PreTrainedConfig, lowrank: dict[str, Ranks]) -> PreTrainedConfig:
    """The config of a low-rank model of the architecture of `base`.

    Args:
        base: config of the dense model (or of another low-rank one, whose ranks are replaced).
        lowrank: full module name to rank, or to the list of ranks of a fused module's parts.

    Raises:
        ValueError: the architecture has no low-rank form.
    """
    _, _, config_class, model_class = _architecture_of(base)
    module = __name__.rpartition(".")[2]
    config = _converted(base, config_class, model_class)
    config.lowrank = dict(lowrank)
    config.auto_map = {
        "AutoConfig": f"{module}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
    }
    return config


def base_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the dense model that a low-rank config was made from.

    Raises:
        ValueError: the architecture has no low-rank form.
    """
    config_class, model_class, _, _ = _architecture_of(config)
    return _converted(config, config_class, model_class)


def _converted(
    config: PreTrainedConfig,
    config_class: type[PreTrainedConfig],
    model_class: type[PreTrainedModel],
) -> PreTrainedConfig:
    fields = config.to_dict()
    for own in ("model_type", "architectures", "auto_map", "lowrank", "_name_or_path"):
        fields.pop(own, None)
    converted: PreTrainedConfig = config_class.from_dict(
        fields, attn_implementation=config._attn_implementation
    )
    converted.architectures = [model_class.__name__]
    return converted


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know the low-rank models; may be called again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for _, _, config_class, model_class in ARCHITECTURES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


# transformers registers the class that it loads from a travelling copy by itself.
if not __name__.startswith("transformers_modules."):
    register()
