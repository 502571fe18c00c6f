"""All objectives of a run as one loss.

Every objective is a sum over valid positions divided by the number of such positions in the whole
optimizer step, over all ranks and micro-batches; that number comes in from outside, so the gradient
is the same for every split. Units: the model level counts summary tokens ("targets"; attributions
count "records"), the matrix and layer levels count all real tokens.
"""
# B batch, T tokens, N summary tokens, V vocabulary, D and E widths

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from makd_kernels.linear_divergence import linear_cross_entropy_divergence_loss
from makd_llm.data.batch import Batch
from makd_llm.objectives.attribution import Attribution
from makd_llm.objectives.head import Compared, CrossEntropy, Divergence, HeadTerm, Outputs
from makd_llm.objectives.masks import Masks
from makd_llm.objectives.terms import Place, Term
from makd_llm.shown import Needs, Shown, TopTokens

LEVELS = ("matrix", "layer", "model")


@dataclass(frozen=True)
class Losses:
    """One micro-batch: `total` carries the gradient; `sums` are unnormalised, per objective."""

    total: Tensor
    sums: dict[str, Tensor]

    def plus(self, name: str, loss: Tensor, summed: Tensor) -> "Losses":
        """With one more objective: what it adds to the loss, and its plain sum."""
        return Losses(self.total + loss, {**self.sums, name: summed})

    def detached(self) -> "Losses":
        """The same values, without the graph."""
        return Losses(self.total.detach(), self.sums)


AtOutput = tuple[Tensor, dict[str, Tensor]]
"""The model level's share of the loss, and its sums. A plain tuple: DeepSpeed looks into it."""


class Objectives:
    """The terms of a run by name, those at the output and those below it, and attributions; each
    level's current multiplier (balance and schedule set it; 0 switches off), and the step that is
    next, from 1.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        head: Mapping[str, HeadTerm],
        attributions: Mapping[str, Attribution] | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        """impl: of the losses that run fused with the head's product."""
        self.terms = {name: term for name, term in terms.items() if term.weight > 0}
        self.head = {name: term for name, term in head.items() if term.weight > 0}
        given = attributions or {}
        self.attributions = {name: term for name, term in given.items() if term.weight > 0}
        self.impl = impl
        self.multiplier = dict.fromkeys(LEVELS, 1.0)
        self.step = 1
        self.steps_before = 0
        """Of other levels' turns: from there on `every` and warm-ups count."""
        self.own_words = False
        """Whether the summaries of this step are the student's own: none are learnt by heart."""

    @property
    def names(self) -> list[str]:
        """Objectives that are switched on, those at the output last."""
        return [*self.terms, *self.head, *self.attributions]

    @property
    def levels(self) -> list[str]:
        """Levels that have at least one objective."""
        found = {self.level_of(name) for name in self.names}
        return [level for level in LEVELS if level in found]

    def level_of(self, name: str) -> str:
        """The level of an objective."""
        return self.terms[name].level if name in self.terms else "model"

    def unit_of(self, name: str) -> str:
        """What an objective's sum is divided by: the output's by summary tokens."""
        return (
            "tokens"
            if name in self.terms
            else "records"
            if name in self.attributions
            else "targets"
        )

    def weight_of(self, name: str) -> float:
        """What an objective counts in this step, before its level's multiplier; 0 for what is only
        measured beside others.
        """
        term = self._term_of(name)
        if term is None or (self.own_words and isinstance(term, CrossEntropy)):
            return 0.0
        return term.weight * term.timing.share(self.step - self.steps_before)

    def full_weight_of(self, name: str) -> float:
        """What an objective counts on the steps on which it is learnt, once it is warm."""
        term = self._term_of(name)
        return term.weight if term else 0.0

    def _term_of(self, name: str) -> Term | HeadTerm | Attribution | None:
        return self.terms.get(name) or self.head.get(name) or self.attributions.get(name)

    def scale_of(self, name: str) -> float:
        """What an objective counts in this step."""
        return self.weight_of(name) * self.multiplier[self.level_of(name)]

    @property
    def needs_teacher(self) -> bool:
        """False where the teacher would run for nothing (plain fine-tuning)."""
        compares = any(not isinstance(term, CrossEntropy) for term in self.head.values())
        return bool(self.terms) or bool(self.attributions) or compares

    @property
    def active(self) -> dict[str, Term]:
        """Terms below the output that count in this step."""
        return {name: term for name, term in self.terms.items() if self.scale_of(name) > 0}

    @property
    def asked(self) -> dict[str, Attribution]:
        """Attributions that count in this step."""
        return {name: term for name, term in self.attributions.items() if self.scale_of(name) > 0}

    @property
    def needs_of_student(self) -> Needs:
        """What the student's forward has to show."""
        needs = Needs()
        for term in self.active.values():
            needs |= term.needs
        return needs

    @property
    def needs_of_teacher(self) -> Needs:
        """The same of the teacher's layers, with the inputs that are replayed."""
        needs = Needs()
        for term in self.active.values():
            needs |= term.needs_of_teacher
        return needs

    def replayed(self, teacher: Shown) -> dict[tuple[int, str], Tensor] | None:
        """The teacher's inputs that parts of the student are fed; None: all keep their own."""
        replays = [term.replay(teacher) for term in self.active.values() if term.replay]
        return {key: x for inputs in replays for key, x in inputs.items()} if replays else None

    def at_head(
        self,
        batch: Batch,
        denominators: Mapping[str, float],
        teacher_hidden_BTE: Tensor | None = None,
        teacher_weight_VE: Tensor | None = None,
        top: TopTokens | None = None,
    ) -> Callable[[Tensor, Tensor], AtOutput]:
        """The function that the student's head calls with (hidden_BTD, weight_VD): the model level,
        or, where that is off, a zero that keeps the whole model in the graph (ZeRO-3 has to see
        every module's backward). top: the teacher's side, where it is read from a cache.
        """
        active = {name: term for name, term in self.head.items() if self.scale_of(name) > 0}
        if not active:
            return lambda hidden_BTD, weight_VD: ((hidden_BTD[0, 0, 0] + weight_VD[0, 0]) * 0.0, {})
        scale = {name: self.scale_of(name) / denominators["targets"] for name in active}

        def at_head(hidden_BTD: Tensor, weight_VD: Tensor) -> AtOutput:
            theirs = teacher_hidden_BTE, teacher_weight_VE
            outputs = replace(_outputs(batch, hidden_BTD, weight_VD, *theirs), top=top)
            losses: list[Tensor] = []
            sums: dict[str, Tensor] = {}
            for pair in _fused(active):
                loss, found = self._fused_losses(pair, scale, batch, outputs)
                losses.append(loss)
                sums |= found
            for name, term in active.items():
                if isinstance(term, Compared):
                    sums[name] = term.compare(outputs).sum()
                    losses.append(sums[name] * scale[name])
            return _total(losses), {name: value.detach() for name, value in sums.items()}

        return at_head

    def _fused_losses(
        self,
        pair: Mapping[str, CrossEntropy | Divergence],
        scale: Mapping[str, float],
        batch: Batch,
        outputs: Outputs,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, a divergence, or both, from one product: (loss, sums). Cross-entropy is
        measured in any case, as it costs nothing more; of its own words it is the student's doubt.
        """
        entropies = [name for name, term in pair.items() if isinstance(term, CrossEntropy)]
        compared = next((n for n, term in pair.items() if isinstance(term, Divergence)), None)
        term = self.head[compared] if compared else Divergence(0.0)
        assert isinstance(term, Divergence)
        loss, entropy_N, divergence_N = linear_cross_entropy_divergence_loss(
            outputs.student_ND,
            outputs.student_weight_VD,
            batch.labels_BT.flatten()[batch.targets_N],
            outputs.teacher_NE if compared else None,
            outputs.teacher_weight_VE if compared else None,
            cross_entropy_weight=sum(scale[name] for name in entropies),
            divergence_weight=scale[compared] if compared else 0.0,
            divergence=term.divergence,
            beta=term.beta,
            alpha=term.alpha,
            temperature=term.temperature,
            impl=self.impl,
        )
        measured = "own_words" if self.own_words else "cross_entropy"
        sums = dict.fromkeys(entropies or [measured], entropy_N.sum())
        if compared:
            assert divergence_N is not None
            sums[compared] = divergence_N.sum()
        return loss, sums

    def __call__(
        self,
        at_output: AtOutput,
        student: Shown,
        teacher: Shown,
        batch: Batch,
        denominators: Mapping[str, float],
    ) -> Losses:
        """at_output: what the head returned. Returns the loss whose gradient is to be taken, and
        the plain sums. What was shown is let go of as soon as nothing more is compared with it, so
        that states and what their comparison keeps for the backward do not pile up together.
        """
        at_head, sums = at_output[0], dict(at_output[1])
        parts: list[Tensor] = []
        masks = Masks(batch.token_mask_BT, batch.key_mask_BT, batch.tokens_N)
        active = self.active
        pairs = [pair for term in active.values() for pair in term.pairs]
        left: tuple[Counter[Place | None], ...] = tuple(
            Counter(s) for s in zip(*pairs, strict=True)
        )

        def compared(*places: Place | None) -> None:
            for shown, place, uses in zip((student, teacher), places, left, strict=True):
                if place is None:
                    continue
                uses[place] -= 1
                if not uses[place]:
                    place.clear(shown)

        for name, term in active.items():
            sums[name] = term.compare(student, teacher, masks, compared)
            parts.append(sums[name] * (self.scale_of(name) / denominators["tokens"]))
        if student.idle is not None:
            parts.append(student.idle)
        total = _total([*parts, at_head])
        return Losses(total, {name: value.detach() for name, value in sums.items()})


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _outputs(
    batch: Batch,
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_BTE: Tensor | None,
    teacher_weight_VE: Tensor | None,
) -> Outputs:
    """Of the summary's tokens. Without a teacher its side is empty: nothing that is on reads it."""
    student_ND = hidden_BTD.flatten(0, 1)[batch.targets_N]
    if teacher_hidden_BTE is None or teacher_weight_VE is None:
        teacher_NE, teacher_weight_VE = student_ND[:, :0], weight_VD[:, :0]
    else:
        teacher_NE = teacher_hidden_BTE.flatten(0, 1)[batch.targets_N]
    record_N = batch.targets_N // hidden_BTD.shape[1]
    return Outputs(student_ND, weight_VD, teacher_NE, teacher_weight_VE, record_N)


def _fused(active: Mapping[str, HeadTerm]) -> list[dict[str, CrossEntropy | Divergence]]:
    """The terms that need one product each: the first divergence takes the cross-entropy along."""
    entropies = {n: t for n, t in active.items() if isinstance(t, CrossEntropy)}
    groups: list[dict[str, CrossEntropy | Divergence]] = [
        {name: term} for name, term in active.items() if isinstance(term, Divergence)
    ]
    if entropies:
        groups[:1] = [{**entropies, **(groups[0] if groups else {})}]
    return groups
