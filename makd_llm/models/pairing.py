"""What of a student is compared with what of its teacher: layers, channels, neurons and heads.

A student of its teacher's shape is compared part by part. One of another shape says in its config
which of the teacher's parts it was made of (origin.py). Where the teacher's side can be brought
into the student's order by picking features, it is (`selection`); where the student is narrower, a
learned projection brings it to the teacher's width, which starts by putting every feature in its
place (`projection`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig

from makd_llm.errors import UserError
from makd_llm.models.origin import KEY, Origin, origin_of
from makd_llm.models.projections import Projection

LayerMap = Literal["origin", "uniform"] | tuple[int, ...]
Places = tuple[tuple[int, ...], ...]
"""For each of the student's features (or heads), those of the teacher that it stands for."""

HIDDEN = "hidden"
"""The role of a layer's output, beside the roles of the matrices."""

# The kind of features that a matrix gives, and that it takes.
_GIVES = {HIDDEN: "width", "o": "width", "down": "width", "gate": "neurons", "up": "neurons"}
_GIVES |= {"q": "heads", "k": "key_value_heads", "v": "key_value_heads"}
_TAKES = {"q": "width", "k": "width", "v": "width", "gate": "width", "up": "width"}
_TAKES |= {"o": "heads", "down": "neurons"}


@dataclass(frozen=True)
class Shape:
    """The sizes in which two models of one family may differ."""

    layers: int
    width: int
    neurons: int
    heads: int
    key_value_heads: int
    head_width: int

    def width_of(self, role: str) -> int:
        """How many outputs the matrix of a role has."""
        kind = _GIVES[role]
        size: int = getattr(self, kind)
        return size * (self.head_width if "heads" in kind else 1)


def shape_of(config: PreTrainedConfig) -> Shape:
    """The sizes that a model's config gives, under the names that its family has for them."""
    width, heads = config.hidden_size, config.num_attention_heads
    neurons = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    key_value = getattr(config, "num_key_value_heads", None)
    if config.model_type.removeprefix("makd_") == "falcon":
        one = 1 if config.multi_query else heads
        key_value = config.num_kv_heads if config.new_decoder_architecture else one
    return Shape(
        layers=config.num_hidden_layers,
        width=width,
        neurons=next((n for name in neurons if (n := getattr(config, name, None))), 4 * width),
        heads=heads,
        key_value_heads=key_value or heads,
        head_width=getattr(config, "head_dim", None) or width // heads,
    )


def pair(
    student: PreTrainedConfig, teacher: PreTrainedConfig, layer_map: LayerMap = "origin"
) -> "Pairing":
    """The pairing of a student with its teacher, by their configs.

    Raises UserError where the student's origin does not fit them, or layer_map the layers.
    """
    origin = origin_of(student)
    if origin == origin_of(teacher):  # the teacher's own, handed on with its config
        origin = None
    return Pairing(
        shape_of(student),
        shape_of(teacher),
        origin,
        layer_map,
        _layer_types(student),
        _layer_types(teacher),
    )


def check_layer_map(layer_map: LayerMap, teacher_layers: int) -> None:
    """Raises UserError where an explicit map names a layer that the teacher does not have."""
    named = () if isinstance(layer_map, str) else layer_map
    wrong = [layer for layer in named if not 0 <= layer < teacher_layers]
    if wrong:
        raise UserError(
            f"distil.layer_map: there is no layer {wrong[0]}; "
            f"the teacher has layers 0 to {teacher_layers - 1}"
        )


@dataclass(frozen=True)
class Pairing:
    """A student and its teacher, part by part.

    Under another map than the origin's, heads and neurons keep the order of the layer that the
    student's was copied from: there is no better place for them to start from.

    Attributes:
        student, teacher: their sizes.
        origin: which of the teacher's parts the student was made of; None: all.
        layer_map: what says which layers are compared: the origin, an even spread (TinyBERT's), or
            a list of the teacher's layers, one for each of the student's.
        student_types, teacher_types: the kind of attention of each layer, where the configs say.
    """

    student: Shape
    teacher: Shape
    origin: Origin | None = None
    layer_map: LayerMap = "origin"
    student_types: tuple[str, ...] | None = None
    teacher_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.origin is not None:
            _check_origin(self.origin, self.student, self.teacher)
        check_layer_map(self.layer_map, self.teacher.layers)
        if not isinstance(self.layer_map, str) and len(self.layer_map) != self.student.layers:
            raise UserError(
                f"distil.layer_map: {len(self.layer_map)} layers are named, but the student has "
                f"{self.student.layers}; name a teacher layer for each of them"
            )

    @classmethod
    def one_to_one(cls, n_layers: int) -> "Pairing":
        """Of two models of the same shape."""
        same = Shape(n_layers, 0, 0, 0, 0, 0)
        return cls(same, same)

    def teacher_layers(self, layers: Sequence[int], *, hidden: bool = False) -> list[int]:
        """The teacher's layer for each of these layers of the student.

        hidden: for the layers' outputs. By the origin that is the last layer before the next one
        that was kept (ours): the student's layer has to do the work of those that were dropped.

        Raises UserError where nothing says which layers belong together.
        """
        ours, theirs = self.student.layers, self.teacher.layers
        if not isinstance(self.layer_map, str):
            return [self.layer_map[layer] for layer in layers]
        if self.layer_map == "uniform":
            if ours > theirs:
                raise UserError(
                    f"distil.layer_map=uniform: the student has {ours} layers, more than its "
                    f"teacher's {theirs}; name a teacher layer for each in distil.layer_map"
                )
            return [(layer + 1) * theirs // ours - 1 for layer in layers]
        if self.origin is not None:
            copied = self.origin.layers
            last = [following - 1 for following in copied[1:]] + [theirs - 1]
            return [(last if hidden else copied)[layer] for layer in layers]
        if ours != theirs:
            raise UserError(
                f"the student has {ours} layers and its teacher {theirs}, and the student's config "
                f"has no {KEY} to say which were kept; set distil.layer_map=uniform, or name a "
                "teacher layer for each in distil.layer_map"
            )
        return list(layers)

    def heads(self, layer: int) -> tuple[int, ...] | None:
        """The teacher's query head for each of the student's; None: the same in the same order."""
        kept = self._kept("heads", layer)
        return None if kept is None else tuple(head for (head,) in kept)

    def check_windows(self, layers: Sequence[int]) -> None:
        """Raises UserError where these layers would be compared over other keys than theirs."""
        if self.student_types is None or self.teacher_types is None:
            return
        for ours, theirs in zip(layers, self.teacher_layers(layers), strict=True):
            if self.student_types[ours] != self.teacher_types[theirs]:
                raise UserError(
                    f"distil.layer_map: the student's layer {ours} ({self.student_types[ours]}) "
                    f"would be compared with the teacher's layer {theirs} "
                    f"({self.teacher_types[theirs]}), whose attention sees other tokens; choose "
                    "another map, or set distil.objectives.attention.weight=0"
                )

    def selection(self, layer: int, role: str) -> tuple[int, ...] | None:
        """The teacher's outputs that the student's are compared with, in the student's order; None:
        all as they are, or `projection` brings the student's to them.
        """
        places = self._places(_GIVES, layer, role)
        if places is None or self._is_projected(places, role):
            return None
        return tuple(place for (place,) in places)

    def projection(self, layer: int, role: str) -> Projection | None:
        """What brings the student's outputs to the teacher's width; None: they have it."""
        places = self._places(_GIVES, layer, role)
        if places is None or not self._is_projected(places, role):
            return None
        pairs = [(theirs, ours) for ours, place in enumerate(places) for theirs in place]
        rows, columns = zip(*pairs, strict=True)
        return Projection(len(places), self.teacher.width_of(role), rows, columns)

    def input_selection(self, layer: int, role: str) -> tuple[int, ...] | None:
        """Which of the inputs of the teacher's matrix are fed to the student's; None: all.

        Raises UserError where they come from a layer whose heads or neurons the student lacks.
        """
        places = self._places(_TAKES, layer, role)
        if places is None:
            return None
        (theirs,) = self.teacher_layers([layer])
        if self.origin and _TAKES[role] != "width" and theirs != self.origin.layers[layer]:
            raise UserError(
                f"distil.objectives.matrix.input=teacher: the {_TAKES[role]} of the student's "
                f"layer {layer} are of the teacher's layer {self.origin.layers[layer]}, but "
                f"distil.layer_map feeds them the inputs of layer {theirs}; set "
                f"distil.layer_map=origin, or leave {role} out of distil.objectives.matrix.roles"
            )
        return tuple(place for (place,) in places)

    def features(self, layer: int, role: str, *, of_input: bool = False) -> Places | None:
        """The teacher's outputs, or inputs, that each of a matrix's stands for; None: the same."""
        return self._places(_TAKES if of_input else _GIVES, layer, role)

    def _is_projected(self, places: Places, role: str) -> bool:
        """Queries have one head of the teacher each, so theirs are picked whatever their number."""
        permuted = len(places) == self.teacher.width_of(role)
        return role != "q" and not (permuted and all(len(place) == 1 for place in places))

    def _places(self, kinds: dict[str, str], layer: int, role: str) -> Places | None:
        """The places of a matrix's outputs or inputs; None: every feature is in its own."""
        if self.origin is None and _widths(self.student) == _widths(self.teacher):
            return None
        kind = kinds[role]
        kept = self._kept(kind, layer)
        if "heads" not in kind:
            return kept
        ours, theirs = self.student.head_width, self.teacher.head_width
        if ours != theirs:
            raise UserError(
                f"the student's heads have {ours} channels and its teacher's {theirs}, so {role} "
                "cannot be compared; leave it out of distil.objectives.matrix.roles"
            )
        if kept is None:
            return None
        return tuple(
            tuple(head * ours + channel for head in heads)
            for heads in kept
            for channel in range(ours)
        )

    def _kept(self, kind: str, layer: int) -> Places | None:
        """The teacher's channels, neurons or heads in the student's order; None: all, in theirs."""
        ours, theirs = getattr(self.student, kind), getattr(self.teacher, kind)
        kept = None if self.origin is None else _kept(self.origin, kind, layer)
        if kept is None and ours != theirs:
            raise UserError(
                f"the student has {ours} for {_SAID[kind]} and its teacher {theirs}, and the "
                f"student's config has no {KEY} to say which were kept; cut the student with "
                "makd_llm, or set distil.preset=kd"
            )
        return None if kept == tuple((place,) for place in range(theirs)) else kept


_SAID = {
    "width": "hidden_size",
    "neurons": "intermediate_size",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
}


def _kept(origin: Origin, kind: str, layer: int) -> Places | None:
    if kind == "key_value_heads":
        return None if origin.key_value_heads is None else origin.key_value_heads[layer]
    if kind == "width":
        found = origin.channels
    else:
        by_layer = origin.neurons if kind == "neurons" else origin.query_heads
        found = None if by_layer is None else by_layer[layer]
    return None if found is None else tuple((place,) for place in found)


def _widths(shape: Shape) -> tuple[int, ...]:
    return shape.width, shape.neurons, shape.heads, shape.key_value_heads, shape.head_width


def _layer_types(config: PreTrainedConfig) -> tuple[str, ...] | None:
    types = getattr(config, "layer_types", None)
    return None if types is None else tuple(types)


def _check_origin(origin: Origin, student: Shape, teacher: Shape) -> None:
    """Raises UserError where an origin is not of these two models."""

    def refuse(what: str) -> None:
        raise UserError(
            f"the student's config says in {KEY} that {what}, so it was made from another teacher, "
            "or by hand; cut it anew from this one"
        )

    layers = origin.layers
    if origin.teacher_layers != teacher.layers:
        refuse(f"its teacher has {origin.teacher_layers} layers, but this one has {teacher.layers}")
    if len(layers) != student.layers:
        refuse(f"{len(layers)} layers were kept, but the student has {student.layers}")
    if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < teacher.layers:
        refuse(f"the layers {list(layers)} were kept, which are not in order")
    for kind, said in _SAID.items():
        ours, theirs = getattr(student, kind), getattr(teacher, kind)
        for layer in range(student.layers):
            kept = _kept(origin, kind, layer)
            if kept is None:
                continue
            if len(kept) != ours:
                refuse(f"{len(kept)} of {said} were kept, but the student has {ours}")
            if not all(place and 0 <= min(place) <= max(place) < theirs for place in kept):
                refuse(f"of {said} some were kept that this teacher, with {theirs}, does not have")
