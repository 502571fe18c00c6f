"""The objectives below the output: each compares two `Shown` and returns one value per token.

A term declares what it needs; capture collects that and nothing else. Sums over layers and matrices
are divided by their number (ours), so that a weight means the same at every depth; nothing is
divided by tokens here.
"""
# B batch, T tokens

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from makd_llm.objectives.attention import attention_divergence
from makd_llm.objectives.squared_error import Normalize, squared_error
from makd_llm.shown import Needs, Shown


@dataclass(frozen=True)
class Term:
    """One objective: its level, its weight, what it needs, and how it compares (student, teacher,
    mask_BT).
    """

    level: str
    weight: float
    needs: Needs
    compare: Callable[[Shown, Shown, Tensor | None], Tensor]
    replays_teacher_input: bool = False


def matrix_term(
    layers: Sequence[int],
    roles: Sequence[str],
    *,
    weight: float,
    normalize: Normalize = "relative",
    teacher_input: bool = False,
) -> Term:
    """L_matrix = L_MHA + L_FNN: squared error of matrix outputs, mean over the given layers and
    roles.

    teacher_input: each factor pair is fed what the teacher's matrix was fed (local, no error
    carried in), rather than the student's own stream. Source: MaKD, reconstruction (methods.md
    section 1).
    """
    pairs = [(layer, role) for layer in layers for role in roles]

    def compare(student: Shown, teacher: Shown, mask_BT: Tensor | None) -> Tensor:
        errors = [
            squared_error(student.matrix[p], teacher.matrix[p], normalize=normalize) for p in pairs
        ]
        return _mean(errors)

    return Term("matrix", weight, Needs(matrix=frozenset(pairs)), compare, teacher_input)


def hidden_term(layers: Sequence[int], *, weight: float, normalize: Normalize = "relative") -> Term:
    """L_hidn: squared error of the layers' outputs, mean over the given layers. Source: MaKD,
    reconstruction.
    """

    def compare(student: Shown, teacher: Shown, mask_BT: Tensor | None) -> Tensor:
        return _mean(
            [
                squared_error(student.hidden[i], teacher.hidden[i], normalize=normalize)
                for i in layers
            ]
        )

    return Term("layer", weight, Needs(hidden=frozenset(layers)), compare)


def attention_term(
    layers: Sequence[int],
    *,
    weight: float,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    impl: str = "auto",
) -> Term:
    """L_attn: divergence of attention distributions, mean over heads and the given layers. Source:
    MaKD, reconstruction.
    """

    def compare(student: Shown, teacher: Shown, mask_BT: Tensor | None) -> Tensor:
        return _mean(
            [
                attention_divergence(
                    student.attention[i],
                    teacher.attention[i],
                    mask_BT,
                    divergence=divergence,
                    beta=beta,
                    impl=impl,
                )
                for i in layers
            ]
        )

    return Term("layer", weight, Needs(attention=frozenset(layers)), compare)


def _mean(values_BT: list[Tensor]) -> Tensor:
    total_BT = values_BT[0]
    for value_BT in values_BT[1:]:
        total_BT = total_BT + value_BT
    return total_BT / len(values_BT)
