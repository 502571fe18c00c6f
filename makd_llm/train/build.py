"""From the run's config to objects: the only place where `train` reads the config."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from makd_llm import distributed
from makd_llm.config import DataConfig, DistilConfig, StudentConfig, TrainConfig
from makd_llm.config.objectives import (
    AttentionConfig,
    AttributionConfig,
    AuxiliaryConfig,
    CrossEntropyConfig,
    HiddenConfig,
    Layers,
    LocalConfig,
    LogitsConfig,
    MatrixConfig,
    ObjectiveConfig,
    RankingConfig,
    RelationsConfig,
    SinkhornConfig,
)
from makd_llm.config.sequences import GenerationConfig
from makd_llm.data.loader import TrainLoader
from makd_llm.data.prompt import PromptBuilder
from makd_llm.data.records import RecordList, RecordStream, load_records
from makd_llm.data.schema import Columns
from makd_llm.errors import UserError
from makd_llm.factorize.refine import Refinement
from makd_llm.factorize.student import Recipe
from makd_llm.generation.decoding import Decoding
from makd_llm.models.causal import CausalModel
from makd_llm.models.families import Family
from makd_llm.models.pairing import HIDDEN, Pairing
from makd_llm.models.projections import Point, Projection
from makd_llm.objectives.attribution import Attribution
from makd_llm.objectives.combine import Objectives
from makd_llm.objectives.head import Compared, CrossEntropy, Divergence, HeadTerm, Timing
from makd_llm.objectives.ranking import ranking_loss
from makd_llm.objectives.selection import Selection
from makd_llm.objectives.sinkhorn import sinkhorn_cost
from makd_llm.objectives.terms import (
    Term,
    attention_term,
    auxiliary_term,
    hidden_term,
    local_term,
    matrix_term,
    relations_term,
)
from makd_llm.objectives.topk import topk_divergence
from makd_llm.reshape.reshape import Depth, Heads, Shape, Width
from makd_llm.train.consolidated import Consolidated
from makd_llm.train.levels import LevelBalance
from makd_llm.train.on_policy import Adaptive, OnPolicy, Settings
from makd_llm.train.over_parameterize import Chains


def build_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptBuilder:
    """The prompt builder of a run, for its tokenizer."""
    prompt = data.prompt
    return PromptBuilder(
        tokenizer,
        template=prompt.template,
        user_template=prompt.user_template,
        instruction=prompt.instruction,
        chat=prompt.chat,
        system=prompt.system,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        bos=prompt.bos,
    )


def build_records(
    data: DataConfig,
    *,
    validation: bool = False,
    limit: int | None = None,
    summarized: bool = True,
) -> RecordList | RecordStream:
    """Training records (as a stream where asked for), or the validation split (always a list).
    summarized: False where documents are all that is needed.
    """
    source = data.validation_source if validation and data.validation_source else data.source
    return load_records(
        source,
        data.validation_split if validation else data.train_split,
        Columns(**data.columns.model_dump(), summarized=summarized),
        on_bad_record=data.on_bad_record,
        streaming=data.streaming and not validation,
        limit=limit if validation else data.limit,
    )


def build_loader(
    data: DataConfig,
    prompts: PromptBuilder,
    *,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    pad_id: int,
) -> TrainLoader:
    """This rank's micro-batches of the training split."""
    return TrainLoader(
        build_records(data),
        prompts,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=seed,
        pad_id=pad_id,
        padding_side=data.padding_side,
        shuffle_buffer=data.shuffle_buffer,
        on_bad_record=data.on_bad_record,
    )


def build_decoding(generation: GenerationConfig, seed: int) -> Decoding:
    """How a model is to write."""
    return Decoding(**generation.model_dump(exclude={"batch_size"}), seed=seed)


def build_recipe(student: StudentConfig) -> Recipe:
    """How the student is to be cut."""
    return Recipe(
        keep_ratio=student.keep_ratio,
        method=student.method,
        budget=student.budget,
        rank_multiple=student.rank_multiple,
        limits=dict(student.limits.items()),
        refine=Refinement(**student.refine.model_dump()) if student.refine else None,
        embedding=student.embedding,
    )


def build_shape(student: StudentConfig) -> Shape | None:
    """The shape that the student is to get; None: the teacher's."""
    if student.depth is None and student.width is None and student.heads is None:
        return None
    return Shape(
        depth=Depth(**student.depth.model_dump()) if student.depth else None,
        width=Width(**student.width.model_dump()) if student.width else None,
        heads=Heads(**student.heads.model_dump()) if student.heads else None,
    )


def build_objectives(
    distil: DistilConfig, family: Family, n_layers: int, pairing: Pairing | None = None
) -> Objectives:
    """The objectives of a distillation, for a family and the student's depth.

    pairing: what of the student is compared with what of the teacher; None: they have one shape.
    Raises UserError where nothing is to be learnt, or the two cannot be compared.
    """
    builder = _Terms(distil, family, n_layers, pairing or Pairing.one_to_one(n_layers))
    terms, head = builder.terms(), _head_terms(distil)
    objectives = Objectives(terms, head, _attributions(distil), impl=distil.kernels)
    if not objectives.levels:
        raise UserError(
            "distil.objectives: every weight is 0; give at least one objective a weight"
        )
    if distil.schedule.kind == "staged":
        _check_schedule(distil, objectives)
    if distil.weights == "balanced":
        _check_balance(distil, objectives)
    _check_every_step(distil, objectives)
    return objectives


def build_projections(objectives: Objectives, pairing: Pairing) -> dict[Point, Projection]:
    """The learned projections that the objectives' terms need; empty where the widths agree."""
    points: set[Point] = set()
    for term in objectives.terms.values():
        needs = term.needs
        points |= needs.matrix | needs.fed | {(layer, HIDDEN) for layer in needs.hidden}
    found = {point: pairing.projection(*point) for point in sorted(points)}
    return {point: projection for point, projection in found.items() if projection is not None}


def build_chains(distil: DistilConfig, objectives: Objectives) -> Chains | None:
    """How the student is over-parameterized while it learns, or None."""
    asked = distil.over_parameterize
    if asked is None:
        return None
    layers = [term.needs.auxiliary for term in objectives.terms.values()]
    return Chains(asked.tensors, asked.roles, frozenset().union(*layers))


def _timing(asked: ObjectiveConfig) -> Timing:
    return Timing(asked.every, asked.warmup_steps)


def _attributions(distil: DistilConfig) -> dict[str, Attribution]:
    return {
        name: Attribution(
            asked.weight,
            **asked.model_dump(exclude=set(ObjectiveConfig.model_fields)),
            timing=_timing(asked),
        )
        for name, asked in distil.of(AttributionConfig).items()
    }


def _head_terms(distil: DistilConfig) -> dict[str, HeadTerm]:
    """The objectives at the output."""
    found: dict[str, HeadTerm] = {}
    for name, asked in distil.of(ObjectiveConfig).items():
        timing, weight = _timing(asked), asked.weight
        if isinstance(asked, CrossEntropyConfig):
            found[name] = CrossEntropy(weight, timing)
        elif isinstance(asked, LogitsConfig):
            settings = asked.model_dump(exclude=set(ObjectiveConfig.model_fields))
            if distil.offline:
                found[name] = Compared(weight, partial(topk_divergence, **settings), timing)
            else:
                found[name] = Divergence(weight, timing=timing, **settings)
        elif isinstance(asked, SinkhornConfig):
            settings = asked.model_dump(exclude=set(ObjectiveConfig.model_fields))
            found[name] = Compared(weight, partial(sinkhorn_cost, **settings), timing)
        elif isinstance(asked, RankingConfig):
            settings = asked.model_dump(exclude=set(ObjectiveConfig.model_fields))
            found[name] = Compared(weight, partial(ranking_loss, **settings), timing)
    return found


class _Terms:
    """The objectives below the output, for a student's depth and its pairing with the teacher."""

    def __init__(
        self, distil: DistilConfig, family: Family, n_layers: int, pairing: Pairing
    ) -> None:
        self.distil, self.family, self.n_layers = distil, family, n_layers
        self.pairing = pairing

    def terms(self) -> dict[str, Term]:
        """Those that are switched on and have layers, by name."""
        made: dict[str, Term | None] = {}
        for name, asked in self.distil.of(ObjectiveConfig).items():
            if isinstance(asked, MatrixConfig):
                made[name] = self._matrix(asked, self._layers(asked.layers, name))
            elif isinstance(asked, AttentionConfig):
                made[name] = self._attention(asked, self._layers(asked.layers, name))
            elif isinstance(asked, HiddenConfig):
                made[name] = self._hidden(asked, self._layers(asked.layers, name))
            elif isinstance(asked, RelationsConfig):
                made[name] = self._relations(asked, self._layers(asked.layers, name), name)
            elif isinstance(asked, LocalConfig):
                made[name] = self._local(asked, self._layers(asked.layers, name), name)
            elif isinstance(asked, AuxiliaryConfig):
                layers = self._layers(asked.layers, name)
                made[name] = auxiliary_term(layers, weight=asked.weight) if layers else None
        timings = {name: _timing(self.distil.objectives[name]) for name in made}
        return {name: replace(t, timing=timings[name]) for name, t in made.items() if t}

    def _matrix(self, asked: MatrixConfig, layers: list[int]) -> Term | None:
        roles = [role for role in asked.roles if role in self.family.roles]
        if not layers or not roles:
            return None
        pairing = self.pairing
        keys = [(layer, role) for layer in layers for role in roles]
        from_teacher = asked.input == "teacher"
        outputs = {key: pairing.selection(*key) for key in keys}
        inputs = {key: pairing.input_selection(*key) for key in keys} if from_teacher else {}
        return matrix_term(
            layers,
            roles,
            weight=asked.weight,
            normalize=asked.normalize,
            teacher_input=from_teacher,
            teacher_layers=pairing.teacher_layers(layers),
            outputs={key: Selection(kept) for key, kept in outputs.items() if kept is not None},
            inputs={key: Selection(kept) for key, kept in inputs.items() if kept is not None},
        )

    def _attention(self, asked: AttentionConfig, layers: list[int]) -> Term | None:
        if not layers:
            return None
        self.pairing.check_windows(layers)
        heads = {layer: self.pairing.heads(layer) for layer in layers}
        return attention_term(
            layers,
            weight=asked.weight,
            divergence=asked.divergence,
            beta=asked.beta,
            impl=self.distil.kernels,
            teacher_layers=self.pairing.teacher_layers(layers),
            heads={layer: kept for layer, kept in heads.items() if kept is not None},
        )

    def _hidden(self, asked: HiddenConfig, layers: list[int]) -> Term | None:
        if not layers:
            return None
        channels = self.pairing.selection(layers[0], HIDDEN)
        return hidden_term(
            layers,
            weight=asked.weight,
            metric=asked.metric,
            normalize=asked.normalize,
            teacher_layers=self.pairing.teacher_layers(layers, hidden=True),
            channels=None if channels is None else Selection(channels),
        )

    def _relations(self, asked: RelationsConfig, layers: list[int], name: str) -> Term | None:
        if not layers:
            return None
        student, teacher = self.pairing.student, self.pairing.teacher
        heads = asked.heads or student.key_value_heads or 1
        for shape, who in ((student, "student"), (teacher, "teacher")):
            widths = {role: shape.width_of(role) for role in asked.roles}
            wrong = next((role for role, width in widths.items() if width % heads), None)
            if wrong:
                raise UserError(
                    f"distil.objectives.{name}.heads: {heads} heads do not divide the {who}'s "
                    f"{wrong}, which is {widths[wrong]} wide; give another number"
                )
        return relations_term(
            layers,
            asked.roles,
            weight=asked.weight,
            heads=heads,
            impl=self.distil.kernels,
            teacher_layers=self.pairing.teacher_layers(layers),
        )

    def _local(self, asked: LocalConfig, layers: list[int], name: str) -> Term | None:
        if not layers:
            return None
        student, teacher = self.pairing.student, self.pairing.teacher
        if student.width != teacher.width or self.pairing.selection(0, HIDDEN) is not None:
            raise UserError(
                f"distil.objectives.{name}: the student is {student.width} wide and its teacher "
                f"{teacher.width}, so that their layers' inputs are not alike; use hidden"
            )
        return local_term(
            layers,
            weight=asked.weight,
            inputs=("student", "teacher") if asked.inputs == "both" else (asked.inputs,),
            teacher_layers=self.pairing.teacher_layers(layers),
        )

    def _layers(self, asked: Layers, name: str) -> list[int]:
        n_layers = self.n_layers
        split = round(self.distil.split * n_layers)
        if isinstance(asked, str):
            return list(
                {"all": range(n_layers), "shallow": range(split)}.get(asked, range(split, n_layers))
            )
        named = {"middle": (n_layers - 1) // 2, "last": n_layers - 1}
        numbers = [named[layer] if isinstance(layer, str) else layer for layer in asked]
        wrong = [number for number in numbers if not -n_layers <= number < n_layers]
        if wrong:
            raise UserError(
                f"distil.objectives.{name}.layers: there is no layer {wrong[0]}; "
                f"the student has layers 0 to {n_layers - 1}"
            )
        return sorted({number % n_layers for number in numbers})


def build_on_policy(
    distil: DistilConfig,
    data: DataConfig,
    seed: int,
    model: CausalModel,
    eos_ids: tuple[int, ...],
    *,
    dtype: torch.dtype,
    pad_id: int,
    validation_loss: Callable[[], float],
) -> OnPolicy | None:
    """The student's texts of a distillation, or None where it writes none."""
    asked = distil.sequences.student
    if asked is None:
        return None
    adaptive = None
    if asked.adaptive is not None:
        rule = asked.adaptive
        adaptive = Adaptive(rule.every, rule.increment, rule.tolerance, validation_loss)
    settings = Settings(
        lmbda=asked.lmbda,
        decoding=Decoding(
            "sample" if asked.temperature > 0 else "greedy",
            asked.max_new_tokens,
            temperature=asked.temperature or 1.0,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=seed,
        ),
        batch_size=asked.batch_size,
        steps=distil.train.steps,
        max_length=data.max_length,
        pad_id=pad_id,
        eos_ids=eos_ids,
        seed=seed,
        padding_side=data.padding_side,
        replay=asked.replay,
        adaptive=adaptive,
    )
    return OnPolicy(settings, Consolidated(model, dtype).writer)


def build_schedule(train: TrainConfig) -> Callable[[int], float]:
    """Linear warm-up, then a cosine down to a tenth of the peak, as a function of the step (from
    0).

    The first step already learns and the last still does. (DeepSpeed's WarmupCosineLR, which a JSON
    with a "scheduler" gets, takes its first steps with a learning rate of 0: two of a short run's
    twenty.)
    """
    warmup, steps = train.warmup, train.steps

    def share_of_peak(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup + 1) / max(1, steps - warmup))
        return 0.1 + 0.9 * (1.0 + math.cos(math.pi * progress)) / 2.0

    return share_of_peak


def build_balance(distil: DistilConfig) -> LevelBalance | None:
    """The balance of the levels, or None where the weights are fixed."""
    if distil.weights == "fixed":
        return None
    balance = distil.balance
    shares = {"matrix": balance.matrix, "layer": balance.layer, "model": balance.model}
    return LevelBalance(shares, balance.every)


def staged_shares(distil: DistilConfig) -> dict[str, float] | None:
    """The levels' shares of the steps, or None where all are learnt at once."""
    schedule = distil.schedule
    if schedule.kind == "joint":
        return None
    return {"matrix": schedule.matrix, "layer": schedule.layer, "model": schedule.model}


def _check_schedule(distil: DistilConfig, objectives: Objectives) -> None:
    for level, share in (staged_shares(distil) or {}).items():
        if share > 0 and level not in objectives.levels:
            raise UserError(
                f"distil.schedule.{level} is {share} but no objective of that level is on; "
                "set it to 0, or give one a weight"
            )


def _turns(distil: DistilConfig, objectives: Objectives) -> list[list[str]]:
    """The levels that learn together, turn by turn."""
    turns = [[level] for level, share in (staged_shares(distil) or {}).items() if share > 0]
    return turns or [objectives.levels]


def _check_balance(distil: DistilConfig, objectives: Objectives) -> None:
    """Of the levels that learn together, one at least has to have a share."""
    for levels in _turns(distil, objectives):
        if not any(getattr(distil.balance, level) for level in levels):
            raise UserError(
                f"distil.balance: the share of {' and '.join(levels)} is 0, so nothing would be "
                "learnt; give it one, or set distil.weights=fixed"
            )


def _check_every_step(distil: DistilConfig, objectives: Objectives) -> None:
    """Something has to be learnt on every step, or the optimizer would move by its momentum."""
    for levels in _turns(distil, objectives):
        names = [name for name in objectives.names if objectives.level_of(name) in levels]
        own = distil.sequences.student is not None
        taught = [n for n in names if not own or n not in distil.of(CrossEntropyConfig)]
        if not taught:
            raise UserError(
                "distil.sequences.student: cross-entropy learns nothing from the student's own "
                "words; give an objective a weight that compares with the teacher on every turn"
            )
        if all(distil.objectives[name].every > 1 for name in taught):
            raise UserError(
                f"distil.objectives: {', '.join(names)} skip steps, and nothing else of that turn "
                "is learnt on those; set the `every` of one of them to 1"
            )
