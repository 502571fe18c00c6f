"""How large a model is, from its config.json alone: every parameter's size, and its layers' widths.

The model is built without memory (on torch's meta device), so tied embeddings, grouped heads,
biases and norms count as they are in every family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from makd_llm.errors import UserError
from makd_llm.factorize.ranks import MatrixShape, uniform_ranks
from makd_llm.models.families import check_distillable, family_of, matrices_of
from makd_llm.models.modeling_lowrank import (
    is_lowrank,
    lowrank_config,
    model_class_for,
    register,
)
from makd_llm.models.pairing import shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from makd_llm.models.modeling_lowrank import Ranks


@dataclass(frozen=True)
class Sizes:
    """A decoder in numbers; widths in features, all else in numbers that are stored.

    Attributes:
        family: its architecture, as transformers names it.
        layers, width, heads: decoder layers, width of the stream, query heads.
        query, key_value: outputs of q, and of k (and of v): heads times their width.
        neurons: of the feed-forward part; gated: whether it has a gate; activation: its name.
        vocabulary: rows of the embedding and of the head.
        tensors: the size of every parameter, in the model's order; a tied head is none.
        windows: by layer, how many tokens its attention sees at most; 0: all.
        sequential: the feed-forward part reads what the attention has written, in a family where it
            usually reads the same stream.
        ranks: by layer, the sum of its factored matrices' ranks.
        dense: by layer, the roles of its matrices that are not factored.
        products: by layer, multiplications per token in its matrices.
    """

    family: str
    layers: int
    width: int
    heads: int
    query: int
    key_value: int
    neurons: int
    gated: bool
    activation: str
    vocabulary: int
    tied: bool
    tensors: tuple[int, ...]
    windows: tuple[int, ...]
    sequential: bool
    ranks: tuple[int, ...]
    dense: tuple[frozenset[str], ...]
    products: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """All parameters."""
        return sum(self.tensors)

    @property
    def own_head(self) -> int:
        """Numbers of a head that is not the embedding."""
        return 0 if self.tied else self.table

    def shard(self, ranks: int) -> int:
        """Numbers that one of so many ranks holds: ZeRO-3 pads every tensor to a multiple."""
        return sum(math.ceil(numel / ranks) for numel in self.tensors)

    @property
    def table(self) -> int:
        """Numbers of the embedding, and of the head."""
        return self.vocabulary * self.width

    @property
    def largest_inside(self) -> int:
        """Numbers of the largest tensor that is neither the embedding nor the head."""
        return max((numel for numel in self.tensors if numel != self.table), default=0)

    def small(self, threshold: int) -> int:
        """Numbers in tensors of at most `threshold`."""
        return sum(numel for numel in self.tensors if numel <= threshold)

    def masked(self, layer: int, length: int) -> bool:
        """Whether records of so many tokens are as long as a layer's window, or longer: from there
        on transformers gives it a mask.
        """
        return 0 < self.windows[layer] <= length

    def outputs(self, role: str) -> int:
        """Outputs of the matrix of a role."""
        named = {"q": self.query, "k": self.key_value, "v": self.key_value}
        named |= {"gate": self.neurons, "up": self.neurons}
        return named.get(role, self.width)

    def inputs(self, role: str) -> int:
        """Inputs of the matrix of a role."""
        return {"o": self.query, "down": self.neurons}.get(role, self.width)


def read_model_config(path: Path) -> PreTrainedConfig:
    """The config of a model's folder, or of a bare config.json. Raises UserError."""
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no model folder and no config.json; check the path")
    register()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(file))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file} cannot be read as a model's config: {reason}") from error
    return config


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """The sizes of a model, dense or low-rank.

    Raises UserError for an architecture that cannot be distilled, a mixture of experts among them.
    """
    import torch
    from transformers.initialization import no_init_weights

    family = family_of(config)
    check_distillable(config)
    with no_init_weights(), torch.device("meta"):
        model = model_class_for(config)._from_config(config)
    model.tie_weights()
    shape = shape_of(config)
    ranks, products = [0] * shape.layers, [0] * shape.layers
    dense: list[set[str]] = [set() for _ in range(shape.layers)]
    for layer, matrix, rank in _ranked(config):
        ranks[layer] += rank or 0
        if rank is None:
            dense[layer].add(matrix.role)
        products[layer] += matrix.stored(rank)
    return Sizes(
        family=family.model_type,
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        query=shape.width_of("q"),
        key_value=shape.width_of("k"),
        neurons=shape.neurons,
        gated="gate" in family.roles,
        activation=_activation(config),
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        tensors=tuple(parameter.numel() for parameter in model.parameters()),
        windows=_windows(config),
        sequential=not getattr(config, "use_parallel_residual", True),
        ranks=tuple(ranks),
        dense=tuple(frozenset(roles) for roles in dense),
        products=tuple(products),
    )


def _windows(config: PreTrainedConfig) -> tuple[int, ...]:
    window: int = getattr(config, "sliding_window", None) or 0
    types: list[str] | None = getattr(config, "layer_types", None)
    if types is None:
        layers: int = config.num_hidden_layers
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _activation(config: PreTrainedConfig) -> str:
    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    return next((str(found) for n in names if (found := getattr(config, n, None))), "gelu")


def student_config(teacher: PreTrainedConfig, keep_ratio: float, multiple: int) -> PreTrainedConfig:
    """The config of a student that keeps this share of every matrix.

    Other budgets spread the same total differently. Raises UserError where no ranks meet it.
    """
    if is_lowrank(teacher):
        raise UserError(
            "the teacher's config is a low-rank student's; give the dense model's, or pass this "
            "one as --student"
        )
    named = [(name, matrix, part) for _, name, matrix, part in _shapes(teacher)]
    found = uniform_ranks([matrix for _, matrix, _ in named], keep_ratio, multiple=multiple)
    fused: dict[str, list[int | None]] = {}
    for (name, _, _), rank in zip(named, found, strict=True):
        fused.setdefault(name, []).append(rank)
    parts = {name: part for name, _, part in named}
    lowrank: dict[str, Ranks] = {}
    for name, chosen in fused.items():
        if parts[name]:
            if any(rank is not None for rank in chosen):
                lowrank[name] = chosen
        elif chosen[0] is not None:
            lowrank[name] = chosen[0]
    return lowrank_config(teacher, lowrank)


def _shapes(config: PreTrainedConfig) -> Iterator[tuple[int, str, MatrixShape, bool]]:
    """(layer, module, matrix, whether the module holds several) of a model, in order."""
    shape = shape_of(config)
    inputs = {"o": shape.width_of("q"), "down": shape.neurons}
    for layer, matrix, name in matrices_of(config):
        columns = inputs.get(matrix.role, shape.width)
        found = MatrixShape(name, matrix.role, shape.width_of(matrix.role), columns)
        yield layer, name, found, matrix.parts > 1


def _ranked(config: PreTrainedConfig) -> Iterator[tuple[int, MatrixShape, int | None]]:
    """(layer, matrix, its rank; None: dense)."""
    lowrank: dict[str, Ranks] = getattr(config, "lowrank", None) or {}
    part: dict[str, int] = {}
    for layer, name, matrix, _ in _shapes(config):
        ranks = lowrank.get(name)
        number = part[name] = part.get(name, -1) + 1
        yield layer, matrix, ranks[number] if isinstance(ranks, list) else ranks
