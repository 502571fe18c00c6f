"""The objectives below the output: each compares two `Shown` and returns a sum over tokens.

A term lists what it compares with what, pair by pair; capture collects that and nothing else, and
whatever no pair needs any more can be let go. Sums over pairs are divided by their number (ours),
so that a weight means the same at every depth; nothing is divided by tokens here.

Layers are the student's. Where its depth is not the teacher's, `teacher_layers` names the teacher's
layer for each of them; where it has only some of the teacher's features, or has them permuted, a
`Selection` picks them on the teacher's side. What differs in width beyond that comes projected.
"""
# B batch, T tokens

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from makd_llm.objectives.attention import attention_divergence
from makd_llm.objectives.cosine import cosine_distance
from makd_llm.objectives.head import ALWAYS, Timing
from makd_llm.objectives.local import local_distance
from makd_llm.objectives.masks import Masks
from makd_llm.objectives.relations import relation_divergence
from makd_llm.objectives.selection import Selection
from makd_llm.objectives.squared_error import Normalize, squared_error
from makd_llm.shown import LAYER, Needs, Shown

Key = tuple[int, str]
"""A matrix: the student's layer, and the role."""


@dataclass(frozen=True)
class Place:
    """Where in a `Shown` something is: `kind` is one of its dictionaries, `key` a key of it."""

    kind: str
    key: Any

    def of(self, shown: Shown) -> Any:
        """What is there."""
        return getattr(shown, self.kind)[self.key]

    def clear(self, shown: Shown) -> None:
        """Lets go of it."""
        del getattr(shown, self.kind)[self.key]


@dataclass(frozen=True)
class Term:
    """One objective: its level, its weight, which places of the student are compared with which of
    the teacher (None: none), and how: distance(student's, teacher's, masks, place of the student),
    summed over the tokens that count; a number of the weights alone is every token's.
    replay: the teacher's inputs that parts of the student are fed, by the place where the teacher
    shows them, where they are fed at all.
    """

    level: str
    weight: float
    pairs: tuple[tuple[Place, Place | None], ...]
    distance: Callable[[Any, Any, Masks, Place], Tensor]
    replay: Callable[[Shown], dict[Key, Tensor]] | None = None
    replayed: Needs = Needs()  # noqa: RUF009 (frozen, and empty)
    timing: Timing = ALWAYS

    @property
    def needs(self) -> Needs:
        """What it needs of the student."""
        return _needs(ours for ours, _ in self.pairs)

    @property
    def needs_of_teacher(self) -> Needs:
        """What it needs of the teacher; what is replayed among it."""
        return _needs(theirs for _, theirs in self.pairs if theirs) | self.replayed

    def compare(
        self,
        student: Shown,
        teacher: Shown,
        masks: Masks,
        compared: Callable[[Place, Place | None], None] = lambda ours, theirs: None,
    ) -> Tensor:
        """The mean over all pairs, summed over tokens. compared: called after each pair."""
        total: Tensor | None = None
        for ours, theirs in self.pairs:
            target = theirs.of(teacher) if theirs else None
            value = self.distance(ours.of(student), target, masks, ours)
            total = value if total is None else total + value
            compared(ours, theirs)
        assert total is not None
        return total / len(self.pairs)


def matrix_term(
    layers: Sequence[int],
    roles: Sequence[str],
    *,
    weight: float,
    normalize: Normalize = "relative",
    teacher_input: bool = False,
    teacher_layers: Sequence[int] | None = None,
    outputs: Mapping[Key, Selection] | None = None,
    inputs: Mapping[Key, Selection] | None = None,
) -> Term:
    """L_matrix = L_MHA + L_FNN: squared error of matrix outputs, mean over the given layers and
    roles.

    teacher_input: each factor pair is fed what the teacher's matrix was fed (local, no error
    carried in), rather than the student's own stream. outputs, inputs: what is picked of the
    teacher's, where that is not everything. Source: MaKD, reconstruction (docs/methods/makd.md).
    """
    keys = [
        ((ours, role), (theirs, role))
        for ours, theirs in _mapped(layers, teacher_layers)
        for role in roles
    ]

    def distance(student: Tensor, teacher: Tensor, masks: Masks, place: Place) -> Tensor:
        theirs = _picked(outputs, place.key, teacher)
        return masks.summed(squared_error(student, theirs, normalize=normalize))

    def replay(teacher: Shown) -> dict[Key, Tensor]:
        return {ours: _picked(inputs, ours, teacher.matrix_input[theirs]) for ours, theirs in keys}

    return Term(
        "matrix",
        weight,
        tuple(
            (Place("fed" if teacher_input else "matrix", ours), Place("matrix", theirs))
            for ours, theirs in keys
        ),
        distance,
        replay if teacher_input else None,
        Needs(matrix_input=teacher_input),
    )


def hidden_term(
    layers: Sequence[int],
    *,
    weight: float,
    metric: Literal["squared", "cosine"] = "squared",
    normalize: Normalize = "relative",
    teacher_layers: Sequence[int] | None = None,
    channels: Selection | None = None,
) -> Term:
    """L_hidn: squared error, or cosine distance, of the layers' outputs (before any final norm),
    mean over the given layers. channels: what is picked of the teacher's, where that is not
    everything. Source: MaKD, reconstruction; the cosine is DistilBERT's.
    """
    measure = cosine_distance if metric == "cosine" else partial(squared_error, normalize=normalize)

    def distance(student: Tensor, teacher: Tensor, masks: Masks, place: Place) -> Tensor:
        theirs = teacher if channels is None else channels(teacher)
        return masks.summed(measure(student, theirs))

    return Term("layer", weight, _same("hidden", layers, teacher_layers), distance)


def attention_term(
    layers: Sequence[int],
    *,
    weight: float,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    impl: str = "auto",
    teacher_layers: Sequence[int] | None = None,
    heads: Mapping[int, Sequence[int]] | None = None,
) -> Term:
    """L_attn: divergence of attention distributions, mean over heads and the given layers. heads:
    by layer, the teacher's query head for each of the student's, where that is not the same.
    Source: MaKD, reconstruction.
    """

    def distance(student: Any, teacher: Any, masks: Masks, place: Place) -> Tensor:
        return attention_divergence(
            student,
            teacher,
            masks,
            heads=(heads or {}).get(place.key),
            divergence=divergence,
            beta=beta,
            impl=impl,
        )

    return Term("layer", weight, _same("attention", layers, teacher_layers), distance)


def relations_term(
    layers: Sequence[int],
    roles: Sequence[str],
    *,
    weight: float,
    heads: int,
    impl: str = "auto",
    teacher_layers: Sequence[int] | None = None,
) -> Term:
    """Divergence of the relations among queries, keys or values, before rotary embedding, mean over
    relation heads, roles (of q k v) and layers. Source: MiniLM v2.
    """
    pairs = [
        (Place("plain", (ours, role)), Place("plain", (theirs, role)))
        for ours, theirs in _mapped(layers, teacher_layers)
        for role in roles
    ]

    def distance(student: Tensor, teacher: Tensor, masks: Masks, place: Place) -> Tensor:
        return relation_divergence(student, teacher, masks, heads=heads, impl=impl)

    return Term("layer", weight, tuple(pairs), distance)


def local_term(
    layers: Sequence[int],
    *,
    weight: float,
    inputs: Sequence[str] = ("student", "teacher"),
    teacher_layers: Sequence[int] | None = None,
) -> Term:
    """mean|a - y| - log sigmoid(cos(a, y)) per token, mean over inputs and the given layers: a is
    what a layer makes, by itself, of the input that the student has there or of the teacher's, y
    the teacher's output of that layer. No gradient reaches the layers before. Source: Lillama.
    """
    mapped = _mapped(layers, teacher_layers)
    pairs = [
        (Place("again", (ours, source)), Place("hidden", theirs))
        for ours, theirs in mapped
        for source in inputs
    ]

    def distance(student: Tensor, teacher: Tensor, masks: Masks, place: Place) -> Tensor:
        return masks.summed(local_distance(student, teacher))

    def replay(teacher: Shown) -> dict[Key, Tensor]:
        return {(ours, LAYER): teacher.layer_input[theirs] for ours, theirs in mapped}

    fed = frozenset(theirs for _, theirs in mapped) if "teacher" in inputs else frozenset()
    return Term(
        "layer", weight, tuple(pairs), distance, replay if fed else None, Needs(layer_input=fed)
    )


def auxiliary_term(layers: Sequence[int], *, weight: float) -> Term:
    """Mean squared error of auxiliary tensors, mean over the given layers (and their matrices).

    It is of the parameters and not of tokens, and is taken where those are whole, in the model. As
    every token's value, its sum over tokens by their number is itself, whatever the split (ours).
    Source: OPDF.
    """
    pairs = tuple((Place("auxiliary", layer), None) for layer in layers)

    def distance(student: Tensor, teacher: None, masks: Masks, place: Place) -> Tensor:
        return masks.summed(student.expand(masks.tokens_BT.shape))

    return Term("matrix", weight, pairs, distance)


def _needs(places: Any) -> Needs:
    by_kind: dict[str, set[Any]] = {}
    for place in places:
        by_kind.setdefault(place.kind, set()).add(place.key)
    found: dict[str, Any] = {kind: frozenset(keys) for kind, keys in by_kind.items()}
    return Needs(**found)


def _mapped(layers: Sequence[int], teacher_layers: Sequence[int] | None) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer) pairs."""
    return list(zip(layers, layers if teacher_layers is None else teacher_layers, strict=True))


def _same(
    kind: str, layers: Sequence[int], teacher_layers: Sequence[int] | None
) -> tuple[tuple[Place, Place], ...]:
    """Pairs of one kind, layer by layer."""
    mapped = _mapped(layers, teacher_layers)
    return tuple((Place(kind, ours), Place(kind, theirs)) for ours, theirs in mapped)


def _picked(selections: Mapping[Key, Selection] | None, key: Key, x_BTM: Tensor) -> Tensor:
    selection = None if selections is None else selections.get(key)
    return x_BTM if selection is None else selection(x_BTM)
