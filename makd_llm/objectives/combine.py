"""All objectives of a run as one loss.

Every objective is a sum over valid positions divided by the number of such positions in the whole
optimizer step, over all ranks and micro-batches; that number comes in from outside, so the gradient
is the same for every split. Units: the model level counts summary tokens ("targets"), the matrix
and layer levels count all real tokens.
"""
# B batch, T tokens, N summary tokens, V vocabulary, D and E widths

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from makd_kernels.linear_divergence import linear_cross_entropy_divergence_loss
from makd_llm.data.batch import Batch
from makd_llm.objectives.terms import Term
from makd_llm.shown import Needs, Shown

LEVELS = ("matrix", "layer", "model")
UNITS = {"cross_entropy": "targets", "logits": "targets"}  # all others: tokens


@dataclass(frozen=True)
class ModelLevel:
    """The output's objectives: w_ce CE + w_model tau² D(teacher, student)."""

    cross_entropy: float
    logits: float
    divergence: str = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    temperature: float = 1.0
    impl: str = "auto"


@dataclass(frozen=True)
class Losses:
    """One micro-batch: `total` carries the gradient; `sums` are unnormalised, per objective."""

    total: Tensor
    sums: dict[str, Tensor]

    def detached(self) -> "Losses":
        """The same values, without the graph."""
        return Losses(self.total.detach(), self.sums)


class Objectives:
    """The terms of a run, and each level's current multiplier (balance and schedule set it; 0
    switches off).
    """

    def __init__(self, model_level: ModelLevel, terms: Mapping[str, Term]) -> None:
        self.model_level = model_level
        self.terms = {name: term for name, term in terms.items() if term.weight > 0}
        self.multiplier = dict.fromkeys(LEVELS, 1.0)

    @property
    def names(self) -> list[str]:
        """Objectives that are switched on, in the order of `LEVELS`."""
        at_head = [n for n in ("cross_entropy", "logits") if getattr(self.model_level, n) > 0]
        return [*self.terms, *at_head]

    @property
    def levels(self) -> list[str]:
        """Levels that have at least one objective."""
        with_terms = {term.level for term in self.terms.values()}
        if self.model_level.cross_entropy or self.model_level.logits:
            with_terms.add("model")
        return [level for level in LEVELS if level in with_terms]

    def level_of(self, name: str) -> str:
        """The level of an objective."""
        return self.terms[name].level if name in self.terms else "model"

    def weight_of(self, name: str) -> float:
        """The objective's own weight, before its level's multiplier."""
        return self.terms[name].weight if name in self.terms else getattr(self.model_level, name)

    @property
    def needs_teacher(self) -> bool:
        """False where the teacher would run for nothing (plain fine-tuning)."""
        return bool(self.terms) or self.model_level.logits > 0

    @property
    def active(self) -> dict[str, Term]:
        """Terms whose level is not switched off at this point of the schedule."""
        return {name: term for name, term in self.terms.items() if self.multiplier[term.level] > 0}

    @property
    def replays_teacher_input(self) -> bool:
        """Whether factor pairs are to be fed the teacher's inputs."""
        return any(term.replay for term in self.active.values())

    @property
    def needs_of_student(self) -> Needs:
        """What the student's forward has to show."""
        needs = Needs()
        for term in self.active.values():
            needs |= term.needs
        return needs

    @property
    def needs_of_teacher(self) -> Needs:
        """The same of the teacher's layers, with its matrices' inputs where those are replayed."""
        needs = Needs()
        for term in self.active.values():
            needs |= term.needs_of_teacher
        return replace(needs, matrix_input=self.replays_teacher_input)

    def replayed(self, teacher: Shown) -> dict[tuple[int, str], Tensor] | None:
        """The inputs of the teacher for the student's matrices; None: they keep their own."""
        replays = [term.replay(teacher) for term in self.active.values() if term.replay]
        return {key: x for inputs in replays for key, x in inputs.items()} if replays else None

    def at_head(
        self,
        batch: Batch,
        denominators: Mapping[str, float],
        teacher_hidden_BTE: Tensor | None = None,
        teacher_weight_VE: Tensor | None = None,
    ) -> Callable[[Tensor, Tensor], Any]:
        """The function that the student's head calls with (hidden_BTD, weight_VD): the model level,
        or, where that is off, a zero that keeps the whole model in the graph (ZeRO-3 has to see
        every module's backward).
        """
        level, scale = self.model_level, self.multiplier["model"] / denominators["targets"]
        if scale == 0 or not (level.cross_entropy or level.logits):
            return lambda hidden_BTD, weight_VD: (hidden_BTD[0, 0, 0] + weight_VD[0, 0]) * 0.0

        def model_level(
            hidden_BTD: Tensor, weight_VD: Tensor
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            student_ND = hidden_BTD.flatten(0, 1)[batch.targets_N]
            teacher_NE = None
            if level.logits > 0 and teacher_hidden_BTE is not None:
                teacher_NE = teacher_hidden_BTE.flatten(0, 1)[batch.targets_N]
            result: tuple[Tensor, Tensor, Tensor | None] = linear_cross_entropy_divergence_loss(
                student_ND,
                weight_VD,
                batch.labels_BT.flatten()[batch.targets_N],
                teacher_NE,
                None if teacher_NE is None else teacher_weight_VE,
                cross_entropy_weight=scale * level.cross_entropy,
                divergence_weight=scale * level.logits,
                divergence=level.divergence,
                beta=level.beta,
                alpha=level.alpha,
                temperature=level.temperature,
                impl=level.impl,
            )
            return result

        return model_level

    def __call__(
        self,
        at_head: Any,
        student: Shown,
        teacher: Shown,
        batch: Batch,
        denominators: Mapping[str, float],
    ) -> Losses:
        """at_head: what the head returned. Returns the loss whose gradient is to be taken, and the
        plain sums.
        """
        sums: dict[str, Tensor] = {}
        parts: list[Tensor] = []
        mask_BT = batch.token_mask_BT
        for name, term in self.active.items():
            sums[name] = torch.where(
                mask_BT, term.compare(student, teacher, batch.key_mask_BT), 0.0
            ).sum()
            parts.append(
                sums[name] * (term.weight * self.multiplier[term.level] / denominators["tokens"])
            )
        if student.idle is not None:
            parts.append(student.idle)
        if isinstance(at_head, Tensor):
            parts.append(at_head)
        else:
            loss, cross_entropy_N, divergence_N = at_head
            parts.append(loss)
            sums["cross_entropy"] = cross_entropy_N.sum()
            if divergence_N is not None:
                sums["logits"] = divergence_N.sum()
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return Losses(total, {name: value.detach() for name, value in sums.items()})
