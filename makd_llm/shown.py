"""What an objective asks a model to show, and what the model showed: the vocabulary between models
and objectives.

Plain tensors in plain dataclasses, so that `models` (which captures) and `objectives` (which
compares) need not know each other.
"""
# B batch, T tokens, H query heads, G key-value heads, D width (of a head where after H or G), M, K
# matrix out and in; of the likeliest tokens: N summary tokens, K likeliest, S temperatures

from dataclasses import dataclass, field

from torch import Tensor

RECORDS_APART = frozenset({"cpu"})
"""Devices on which attention of each record by itself costs less than of padded rows; their host
knows the lengths without waiting."""

LAYER = "layer"
"""In the place of a role, where a layer's own input is meant."""


@dataclass(frozen=True)
class Needs:
    """Which points of a forward pass are asked for; layers count from 0. Empty: nothing is
    captured.
    """

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    matrix: frozenset[tuple[int, str]] = frozenset()
    """(layer, role) pairs, role in q k v o gate up down."""
    matrix_input: bool = False
    """Also what goes into those matrices."""
    fed: frozenset[tuple[int, str]] = frozenset()
    """(layer, role) pairs that are to run once more, on what the teacher's were fed."""
    plain: frozenset[tuple[int, str]] = frozenset()
    """(layer, role) pairs whose outputs are wanted as they are: never projected."""
    layer_input: frozenset[int] = frozenset()
    """Layers whose input is wanted."""
    again: frozenset[tuple[int, str]] = frozenset()
    """(layer, source): layers that are to run once more by themselves, on the input that the
    `student` has there, without its history, or on the `teacher`'s."""
    auxiliary: frozenset[int] = frozenset()
    """Layers whose auxiliary tensors are compared."""

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.hidden | other.hidden,
            self.attention | other.attention,
            self.matrix | other.matrix,
            self.matrix_input or other.matrix_input,
            self.fed | other.fed,
            self.plain | other.plain,
            self.layer_input | other.layer_input,
            self.again | other.again,
            self.auxiliary | other.auxiliary,
        )


@dataclass(frozen=True)
class AttentionShown:
    """Post-rotary queries and keys of one layer, as the attention function received them."""

    query_BHTD: Tensor
    key_BGTD: Tensor
    scale: float | None
    window: int | None
    """Sliding window in tokens, where the layer has one."""


@dataclass(frozen=True)
class TopTokens:
    """The likeliest next tokens at a batch's summary tokens, and what all others have together."""

    ids_NK: Tensor
    """int64, ascending in every row."""
    log_p_NK: Tensor
    """Of the softmax over the whole vocabulary, at temperature 1."""
    log_rest_NS: Tensor
    """For each temperature tau, the log of the sum of p^(1/tau) over all other tokens; -inf where
    there are none."""
    temperatures: tuple[float, ...]


def padded_rows(x_1N: Tensor, tokens_N: Tensor, rows: int, length: int) -> Tensor:
    """(1, N, ...) -> (B, T, ...), with zeros at the padding. tokens_N: places in the flattened (B
    T), as `Batch.tokens_N`. rows, length: B and T.
    """
    flat = x_1N.new_zeros(rows * length, *x_1N.shape[2:])
    padded: Tensor = flat.index_copy(0, tokens_N, x_1N[0])
    return padded.view(rows, length, *x_1N.shape[2:])


@dataclass
class Shown:
    """What one forward pass showed. Of a model that ran without padding, (1, N, ...) stands for (B,
    T, ...) everywhere, and (1, H, N, D) for (B, H, T, D): the real tokens, record after record.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Layer outputs (B, T, D)."""
    attention: dict[int, AttentionShown] = field(default_factory=dict)
    matrix: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Matrix outputs (B, T, M)."""
    matrix_input: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Matrix inputs (B, T, K)."""
    fed: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Matrix outputs (B, T, M) for the teacher's inputs."""
    plain: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Matrix outputs (B, T, M), as they are."""
    layer_input: dict[int, Tensor] = field(default_factory=dict)
    """(B, T, D)."""
    again: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """(layer, source) -> what the layer makes of that input alone, (B, T, D)."""
    auxiliary: dict[int, Tensor] = field(default_factory=dict)
    """How far a layer's auxiliary tensors are from the teacher's: one number for any batch."""
    idle: Tensor | None = None
    """A zero that keeps in the graph what took part in the forward, but was asked for by nobody."""
    top: TopTokens | None = None
    """Of a teacher that is read from a cache."""
