"""The objectives below the output: each compares two `Shown` and returns one value per token.

A term declares what it needs; capture collects that and nothing else. Sums over layers and matrices
are divided by their number (ours), so that a weight means the same at every depth; nothing is
divided by tokens here.

Layers are the student's. Where its depth is not the teacher's, `teacher_layers` names the teacher's
layer for each of them; where it has only some of the teacher's features, or has them permuted, a
`Selection` picks them on the teacher's side. What differs in width beyond that comes projected.
"""
# B batch, T tokens

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from makd_llm.objectives.attention import attention_divergence
from makd_llm.objectives.cosine import cosine_distance
from makd_llm.objectives.head import ALWAYS, Timing
from makd_llm.objectives.local import local_distance
from makd_llm.objectives.relations import relation_divergence
from makd_llm.objectives.selection import Selection
from makd_llm.objectives.squared_error import Normalize, squared_error
from makd_llm.shown import LAYER, Needs, Shown

Key = tuple[int, str]
"""A matrix: the student's layer, and the role."""


@dataclass(frozen=True)
class Term:
    """One objective: its level, its weight, what it needs of student and teacher, and how it
    compares (student, teacher, mask_BT). replay: the inputs of the teacher that the student's
    matrices are fed, where they are.
    """

    level: str
    weight: float
    needs: Needs
    needs_of_teacher: Needs
    compare: Callable[[Shown, Shown, Tensor | None], Tensor]
    replay: Callable[[Shown], dict[Key, Tensor]] | None = None
    timing: Timing = ALWAYS


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
    teacher's, where that is not everything. Source: MaKD, reconstruction (methods.md section 1).
    """
    mapped = _mapped(layers, teacher_layers)
    pairs = [((ours, role), (theirs, role)) for ours, theirs in mapped for role in roles]

    def compare(student: Shown, teacher: Shown, mask_BT: Tensor | None) -> Tensor:
        errors = [
            squared_error(
                student.matrix[ours],
                _picked(outputs, ours, teacher.matrix[theirs]),
                normalize=normalize,
            )
            for ours, theirs in pairs
        ]
        return _mean(errors)

    def replay(teacher: Shown) -> dict[Key, Tensor]:
        return {ours: _picked(inputs, ours, teacher.matrix_input[theirs]) for ours, theirs in pairs}

    return Term(
        "matrix",
        weight,
        Needs(matrix=frozenset(ours for ours, _ in pairs)),
        Needs(matrix=frozenset(theirs for _, theirs in pairs)),
        compare,
        replay if teacher_input else None,
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
    mapped = _mapped(layers, teacher_layers)

    def compare(student: Shown, teacher: Shown, mask_BT: Tensor | None) -> Tensor:
        errors = []
        for ours, theirs in mapped:
            teacher_BTD = teacher.hidden[theirs]
            if channels is not None:
                teacher_BTD = channels(teacher_BTD)
            student_BTD = student.hidden[ours]
            if metric == "cosine":
                errors.append(cosine_distance(student_BTD, teacher_BTD))
            else:
                errors.append(squared_error(student_BTD, teacher_BTD, normalize=normalize))
        return _mean(errors)

    return Term(
        "layer",
        weight,
        Needs(hidden=frozenset(ours for ours, _ in mapped)),
        Needs(hidden=frozenset(theirs for _, theirs in mapped)),
        compare,
    )


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
    mapped = _mapped(layers, teacher_layers)

    def compare(student: Shown, teacher: Shown, mask_BT: Tensor | None) -> Tensor:
        return _mean(
            [
                attention_divergence(
                    student.attention[ours],
                    teacher.attention[theirs],
                    mask_BT,
                    heads=(heads or {}).get(ours),
                    divergence=divergence,
                    beta=beta,
                    impl=impl,
                )
                for ours, theirs in mapped
            ]
        )

    return Term(
        "layer",
        weight,
        Needs(attention=frozenset(ours for ours, _ in mapped)),
        Needs(attention=frozenset(theirs for _, theirs in mapped)),
        compare,
    )


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
    mapped = _mapped(layers, teacher_layers)
    pairs = [((ours, role), (theirs, role)) for ours, theirs in mapped for role in roles]

    def compare(student: Shown, teacher: Shown, mask_BT: Tensor | None) -> Tensor:
        return _mean(
            [
                relation_divergence(
                    student.plain[ours], teacher.plain[theirs], mask_BT, heads=heads, impl=impl
                )
                for ours, theirs in pairs
            ]
        )

    return Term(
        "layer",
        weight,
        Needs(plain=frozenset(ours for ours, _ in pairs)),
        Needs(plain=frozenset(theirs for _, theirs in pairs)),
        compare,
    )


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
    again = [(ours, source) for ours, _ in mapped for source in inputs]
    from_teacher = "teacher" in inputs

    def compare(student: Shown, teacher: Shown, mask_BT: Tensor | None) -> Tensor:
        return _mean(
            [
                local_distance(student.again[ours, source], teacher.hidden[theirs])
                for ours, theirs in mapped
                for source in inputs
            ]
        )

    def replay(teacher: Shown) -> dict[Key, Tensor]:
        return {(ours, LAYER): teacher.layer_input[theirs] for ours, theirs in mapped}

    theirs = frozenset(theirs for _, theirs in mapped)
    return Term(
        "layer",
        weight,
        Needs(again=frozenset(again)),
        Needs(hidden=theirs, layer_input=theirs if from_teacher else frozenset()),
        compare,
        replay if from_teacher else None,
    )


def _mapped(layers: Sequence[int], teacher_layers: Sequence[int] | None) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer) pairs."""
    return list(zip(layers, layers if teacher_layers is None else teacher_layers, strict=True))


def _picked(selections: Mapping[Key, Selection] | None, key: Key, x_BTM: Tensor) -> Tensor:
    selection = None if selections is None else selections.get(key)
    return x_BTM if selection is None else selection(x_BTM)


def _mean(values_BT: list[Tensor]) -> Tensor:
    total_BT = values_BT[0]
    for value_BT in values_BT[1:]:
        total_BT = total_BT + value_BT
    return total_BT / len(values_BT)
