"""Fewer layers: which of them stay, and the folder without the others.

Two choices: `even_layers`, from the numbers alone, and `ild_layers`, by what the model loses on the
calibration text without a layer.
"""
# B batch, T tokens, D width

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from makd_llm import distributed
from makd_llm.checkpoint.export import expected_shapes
from makd_llm.checkpoint.folder import TensorReader
from makd_llm.layerwise.parts import Parts
from makd_llm.layerwise.walk import Stream, Walk
from makd_llm.models.families import Family, n_experts
from makd_llm.report.progress import progress

# Of a config: one entry per layer; the index at which something begins.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
_BEGINNINGS = ("max_window_layers",)


def even_layers(n_layers: int, keep: int) -> tuple[int, ...]:
    """The layers round(j (n - 1) / (keep - 1)) for j = 0 .. keep - 1, halves up: spread evenly, the
    first and the last among them. Of one that is kept alone: the first.
    """
    if keep == 1:
        return (0,)
    gaps = keep - 1
    return tuple((2 * j * (n_layers - 1) + gaps) // (2 * gaps) for j in range(keep))


def ild_layers(
    walk: Walk, keep: int, parts: Parts, tell: Callable[[str], None] = lambda text: None
) -> tuple[int, ...]:
    """The layers that are left after the least missed one is dropped, again and again.

    Missed: by the cross-entropy of the calibration targets. Source: ILD, iterative layer-wise
    distillation, which trains between two drops; here nothing is trained in between, distillation
    follows once at the end. parts: keeps each round's losses, so that an interrupted choice goes
    on. Collective; every rank scores with its batches, and all choose the same. Raises ValueError
    where no loss is finite.
    """
    kept = list(range(len(walk)))
    rounds = range(len(kept), keep, -1)
    with progress("shape: layers", sum(n * (n - 1) // 2 for n in rounds)) as advance:
        for n in rounds:
            name = f"without-one-of-{n:04d}"
            if parts.missing([name]):
                losses = losses_without(walk, kept, advance)
                distributed.on_main(parts.write, name, {"losses": losses})
            else:
                for _ in range(n * (n - 1) // 2):
                    advance()
            least, loss = distributed.on_main(_least, parts, name)
            tell(
                f"shape: layer {kept.pop(least)} dropped, cross-entropy {loss:.4f} without it, "
                f"{len(kept)} left"
            )
    return tuple(kept)


def losses_without(
    walk: Walk, kept: Sequence[int], advance: Callable[[], None] = lambda: None
) -> Tensor:
    """Float64: the mean cross-entropy of all ranks' targets without each one of the kept layers.

    The streams of all candidates go through the layers side by side, so that a layer is read once
    for all of them; held are as many streams as there are layers. Collective.
    """
    whole = walk.embedded()
    without: list[Stream] = []
    for index in kept:
        layer = walk.layer(index)
        for candidate, stream in enumerate(without):
            without[candidate] = walk.advanced(index, layer, stream)
            advance()
        without.append(whole)  # what this layer reads, the next one reads without it
        whole = walk.advanced(index, layer, whole)
    weight_VD = walk.output_weight()
    sums = torch.stack([_summed_nats(walk, stream, weight_VD) for stream in without])
    targets = torch.tensor([sum(len(batch.targets_N) for batch in walk.batches)])
    return distributed.sum_over_ranks(sums) / distributed.sum_over_ranks(targets)


@torch.no_grad()
def _summed_nats(walk: Walk, stream: Stream, weight_VD: Tensor) -> Tensor:
    """() float64: the cross-entropy of this rank's targets, summed."""
    total = torch.zeros((), dtype=torch.float64)
    for batch, last_BTD in zip(walk.batches, walk.finished(stream), strict=True):
        total += walk.nats(last_BTD, batch, weight_VD).double().sum().cpu()
    return total


def _least(parts: Parts, name: str) -> tuple[int, float]:
    """The place of the least loss, the first of equal ones, and that loss."""
    losses = parts.read(name)["losses"].nan_to_num(nan=math.inf).tolist()
    least = min(range(len(losses)), key=losses.__getitem__)
    if math.isinf(losses[least]):
        raise ValueError("shape: the calibration loss is not finite, whichever layer is left out")
    return least, losses[least]


def depth_config(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """The config of the model that has only these layers; each keeps its kind."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = len(layers)
    for field in _PER_LAYER:
        if getattr(config, field, None) is not None:
            given: Sequence[Any] = getattr(config, field)
            setattr(cut, field, [given[layer] for layer in layers])
    if getattr(config, "decoder_sparse_step", None) is not None:
        cut.decoder_sparse_step = 1
        dense = [new for new, layer in enumerate(layers) if n_experts(config, layer) == 0]
        cut.mlp_only_layers = dense
    for field in _BEGINNINGS:
        if getattr(config, field, None) is not None:
            begin = getattr(config, field)
            setattr(cut, field, sum(layer < begin for layer in layers))
    return cut


def depth_tensors(
    reader: TensorReader, family: Family, config: PreTrainedConfig, layers: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of that model, named as in it. config: `depth_config`'s."""
    for name in expected_shapes(config):
        own = name.removeprefix(f"{family.layers}.")
        if own == name:
            yield name, reader.get(name)
        else:
            index, _, rest = own.partition(".")
            yield name, reader.get(f"{family.layers}.{layers[int(index)]}.{rest}")
