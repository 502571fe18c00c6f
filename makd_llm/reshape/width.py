"""Narrower hidden states and feed-forward parts: what is kept is what is active.

Hidden channels are ranked by the mean absolute output of the norms over the calibration tokens,
summed over all norms of the stream; the feed-forward neurons of a layer by the mean absolute input
of its `down`. Source: Minitron (Muralidharan et al. 2024). Heads and their dimension stay as they
are.

An RMSNorm over fewer channels divides by another root mean square. Its weights are multiplied by
the ratio of the two that was measured, so that what it puts out keeps its size (ours).
"""
# N tokens, D channels, I neurons

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from makd_llm import distributed
from makd_llm.checkpoint.export import expected_shapes
from makd_llm.checkpoint.folder import TensorReader
from makd_llm.data.batch import Batch
from makd_llm.factorize.statistics import Read, inputs_of, real_rows
from makd_llm.layerwise.walk import Stream, Walk
from makd_llm.report.progress import progress
from makd_llm.reshape.heads import head_dim_of

GEMMAS = ("gemma", "gemma2", "gemma3_text")
"""They multiply what they embed by the root of the width, and norms by 1 + weight."""

WIDTH_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "olmo2", *GEMMAS)
"""The model types of which it is known along which axes the channels lie."""

CHANNELS, NEURONS = "channels", "neurons"

# Of the modules in a layer: what lies along their weight's dimensions; a bias lies as the first.
_AXES: dict[str, tuple[str | None, ...]] = {
    "self_attn.q_proj": (None, CHANNELS),
    "self_attn.k_proj": (None, CHANNELS),
    "self_attn.v_proj": (None, CHANNELS),
    "self_attn.o_proj": (CHANNELS, None),
    "self_attn.q_norm": (None,),
    "self_attn.k_norm": (None,),
    "mlp.gate_proj": (NEURONS, CHANNELS),
    "mlp.up_proj": (NEURONS, CHANNELS),
    "mlp.down_proj": (CHANNELS, NEURONS),
}
_NORM = "_layernorm"  # how the names of the stream's norms end, in all of WIDTH_FAMILIES
_LAST_NORM = "model.norm"


@dataclass
class Activity:
    """What the calibration tokens of all ranks say of a model's channels and neurons. float64.

    Attributes:
        channels_D: mean |output| of the norms, summed over them.
        neurons: for each layer, (I,) mean |input of down|.
        norm_shares: name of a norm -> (D,) the mean over tokens of each channel's square by the
            mean square of all channels, at the norm's input.
    """

    channels_D: Tensor
    neurons: list[Tensor] = field(default_factory=list)
    norm_shares: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WidthCut:
    """What a narrower model keeps; None: all of it.

    Attributes:
        channels: of the hidden states, ascending.
        neurons: for each layer, ascending.
        norm_factors: name of a norm -> by what its output is multiplied.
    """

    channels: tuple[int, ...] | None
    neurons: tuple[tuple[int, ...], ...] | None
    norm_factors: Mapping[str, float]


def measured_activity(walk: Walk) -> Activity:
    """One walk over the calibration batches. Collective.

    Raises ValueError, with the place, where activations are not finite.
    """
    mine = sum(int(batch.n_tokens) for batch in walk.batches)
    tokens = float(distributed.sum_over_ranks(torch.tensor([mine])))
    width = walk.config.hidden_size
    found = Activity(torch.zeros(width, dtype=torch.float64, device=walk.device))
    stream = walk.embedded()
    with progress("shape: width", len(walk)) as advance:
        for index in range(len(walk)):
            sums = _Sums(walk, f"{walk.family.layers}.{index}.")
            stream = _measured_layer(walk, index, stream, sums)
            sums.into(found, tokens)
            advance()
    last = _Sums(walk, "")
    with torch.no_grad():
        for batch, x_BTD, y_BTD in zip(walk.batches, stream, walk.finished(stream), strict=True):
            last.add_norm(_LAST_NORM, x_BTD.to(walk.device), y_BTD, batch)
    last.into(found, tokens)
    return found


class _Sums:
    """Sums over one rank's real tokens in one layer, by name."""

    def __init__(self, walk: Walk, prefix: str) -> None:
        self._walk, self._prefix = walk, prefix
        self._outputs: dict[str, Tensor] = {}
        self._shares: dict[str, Tensor] = {}
        self._neurons: Tensor | None = None

    def add_norm(self, name: str, x_BTD: Tensor, y_BTD: Tensor, batch: Batch) -> None:
        """Counts a norm's input and output in."""
        squares_ND = real_rows(x_BTD, batch).square()
        mean_N1 = squares_ND.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        _add(self._shares, name, (squares_ND / mean_N1).sum(0))
        _add(self._outputs, name, real_rows(y_BTD, batch).abs().sum(0))

    def add_neurons(self, read: Read) -> None:
        """Counts an input of `down` in."""
        sum_I = read.x_NK.double().abs().sum(0)
        self._neurons = sum_I if self._neurons is None else self._neurons + sum_I

    def into(self, found: Activity, tokens: float) -> None:
        """Means over all ranks' tokens. Collective."""
        for name, sum_D in sorted(self._outputs.items()):
            found.channels_D += self._mean(sum_D, tokens, name)
            shares_D = self._mean(self._shares[name], tokens, name)
            found.norm_shares[f"{self._prefix}{name}"] = shares_D
        if self._neurons is not None:
            found.neurons.append(self._mean(self._neurons, tokens, "mlp.down_proj"))

    def _mean(self, sums: Tensor, tokens: float, name: str) -> Tensor:
        summed = distributed.sum_over_ranks(sums)
        if not bool(summed.isfinite().all()):
            raise ValueError(f"shape: what {self._prefix}{name} reads or writes is not finite")
        return summed / tokens


def _add(sums: dict[str, Tensor], name: str, more: Tensor) -> None:
    sums[name] = sums[name] + more if name in sums else more


def _measured_layer(walk: Walk, index: int, stream: Stream, sums: _Sums) -> Stream:
    """One layer over all batches: its outputs; what its norms and `down` see goes into `sums`."""
    layer = walk.layer(index)
    norms = {name: module for name, module in layer.named_children() if name.endswith(_NORM)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    after = []
    with ExitStack() as stack:
        for name, norm in norms.items():

            def hook(
                _: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name
            ) -> None:
                seen[name] = (args[0].detach(), output.detach())

            stack.callback(norm.register_forward_hook(hook).remove)
        stack.enter_context(torch.no_grad())
        for batch, before in zip(walk.batches, stream, strict=True):
            with inputs_of(layer, walk.matrices(index), ("down",), batch) as inputs:
                after.append(walk.step(index, layer, batch, before).to("cpu"))
            for name in norms:
                sums.add_norm(name, *seen[name], batch)
            sums.add_neurons(inputs["down"])
    return after


def most_active(activity_K: Tensor, keep: int) -> tuple[int, ...]:
    """The places of the `keep` largest values, ascending; of equal ones the first."""
    order = torch.argsort(activity_K.cpu(), descending=True, stable=True)
    return tuple(sorted(order[:keep].tolist()))


def chosen_cut(activity: Activity, hidden: int | None, feed_forward: int | None) -> WidthCut:
    """What is kept at these widths; None: all of it."""
    channels = neurons = None
    factors: dict[str, float] = {}
    if hidden is not None:
        channels = most_active(activity.channels_D, hidden)
        if hidden < len(activity.channels_D):
            factors = {
                name: math.sqrt(float(shares_D[list(channels)].mean()))
                for name, shares_D in activity.norm_shares.items()
            }
    if feed_forward is not None:
        neurons = tuple(most_active(active_I, feed_forward) for active_I in activity.neurons)
    return WidthCut(channels, neurons, factors)


def width_config(config: PreTrainedConfig, cut: WidthCut) -> PreTrainedConfig:
    """The config of the narrower model; its heads keep their dimension."""
    narrow = copy.deepcopy(config)
    if cut.channels is not None:
        narrow.head_dim = head_dim_of(config)
        narrow.hidden_size = len(cut.channels)
    if cut.neurons is not None:
        narrow.intermediate_size = len(cut.neurons[0])
    return narrow


def width_tensors(
    reader: TensorReader, config: PreTrainedConfig, narrow: PreTrainedConfig, cut: WidthCut
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the narrower model. config: of the model that is read; narrow: its own."""
    scale = math.sqrt(config.hidden_size / narrow.hidden_size) if _is_gemma(config) else 1.0
    tied = config.tie_word_embeddings
    for name in expected_shapes(narrow):
        tensor = cut_tensor(name, reader.get(name), cut)
        module = name.rpartition(".")[0]
        factor = cut.norm_factors.get(module, 1.0)
        if module == "model.embed_tokens" and scale != 1.0:
            # Gemma multiplies by the root of the width, which is now less.
            tensor = (tensor.float() * scale).to(tensor.dtype)
        if module == _LAST_NORM and tied:
            factor /= scale  # the head is the embedding
        if factor != 1.0:
            tensor = scaled_norm(tensor, factor, one_plus=_is_gemma(config))
        yield name, tensor


def _is_gemma(config: PreTrainedConfig) -> bool:
    return config.model_type in GEMMAS


def scaled_norm(weight_D: Tensor, factor: float, *, one_plus: bool) -> Tensor:
    """A norm's weight with which it puts out `factor` times as much. one_plus: it multiplies by 1 +
    weight.
    """
    one = 1.0 if one_plus else 0.0
    return ((weight_D.float() + one) * factor - one).to(weight_D.dtype)


def cut_tensor(name: str, tensor: Tensor, cut: WidthCut) -> Tensor:
    """The kept share of a tensor of a model of WIDTH_FAMILIES, by its name."""
    module, _, leaf = name.rpartition(".")
    layer, axes = _axes_of(module)
    for dim, axis in enumerate(axes[:1] if leaf == "bias" else axes):
        kept: Sequence[int] | None = None
        if axis == CHANNELS:
            kept = cut.channels
        elif axis == NEURONS and cut.neurons is not None:
            kept = cut.neurons[layer]
        if kept is not None:
            tensor = tensor.index_select(dim, torch.tensor(kept))
    return tensor


def _axes_of(module: str) -> tuple[int, tuple[str | None, ...]]:
    """The layer of a module (0 outside) and what lies along the dimensions of its weight."""
    if module in ("model.embed_tokens", "lm_head"):
        return 0, (None, CHANNELS)
    if module == _LAST_NORM:
        return 0, (CHANNELS,)
    index, _, own = module.removeprefix("model.layers.").partition(".")
    axes = (CHANNELS,) if own.endswith(_NORM) else _AXES.get(own)
    if axes is None:
        raise ValueError(f"module {module!r}: it is not known where its channels lie")
    return int(index), axes
