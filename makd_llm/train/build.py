"""From the run's config to objects: the only place where `train` reads the config."""

import math
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from makd_llm import distributed
from makd_llm.config import (
    DataConfig,
    DistilConfig,
    Layers,
    MatrixConfig,
    Role,
    StudentConfig,
    TrainConfig,
)
from makd_llm.data.loader import TrainLoader
from makd_llm.data.prompt import PromptBuilder
from makd_llm.data.records import RecordList, RecordStream, load_records
from makd_llm.data.schema import Columns
from makd_llm.errors import UserError
from makd_llm.factorize.refine import Refinement
from makd_llm.factorize.student import Recipe
from makd_llm.models.families import Family
from makd_llm.models.pairing import HIDDEN, Pairing
from makd_llm.models.projections import Point, Projection
from makd_llm.objectives.combine import ModelLevel, Objectives
from makd_llm.objectives.selection import Selection
from makd_llm.objectives.terms import Term, attention_term, hidden_term, matrix_term
from makd_llm.reshape.reshape import Depth, Heads, Shape, Width
from makd_llm.train.levels import LevelBalance


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
    data: DataConfig, *, validation: bool = False, limit: int | None = None
) -> RecordList | RecordStream:
    """Training records (as a stream where asked for), or the validation split (always a list)."""
    source = data.validation_source if validation and data.validation_source else data.source
    return load_records(
        source,
        data.validation_split if validation else data.train_split,
        Columns(data.columns.id, data.columns.document, data.columns.summary),
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
    logits = distil.objectives.logits
    model_level = ModelLevel(
        cross_entropy=distil.objectives.cross_entropy.weight,
        logits=logits.weight,
        divergence=logits.divergence,
        beta=logits.beta,
        alpha=logits.alpha,
        temperature=logits.temperature,
        impl=distil.kernels,
    )
    terms = _terms(distil, family, n_layers, pairing or Pairing.one_to_one(n_layers))
    objectives = Objectives(model_level, terms)
    if not objectives.levels:
        raise UserError(
            "distil.objectives: every weight is 0; give at least one objective a weight"
        )
    if distil.schedule.kind == "staged":
        _check_schedule(distil, objectives)
    if distil.weights == "balanced":
        _check_balance(distil, objectives)
    return objectives


def build_projections(objectives: Objectives, pairing: Pairing) -> dict[Point, Projection]:
    """The learned projections that the objectives' terms need; empty where the widths agree."""
    points: set[Point] = set()
    for term in objectives.terms.values():
        points |= term.needs.matrix | {(layer, HIDDEN) for layer in term.needs.hidden}
    found = {point: pairing.projection(*point) for point in sorted(points)}
    return {point: projection for point, projection in found.items() if projection is not None}


def _terms(
    distil: DistilConfig, family: Family, n_layers: int, pairing: Pairing
) -> dict[str, Term]:
    asked, split = distil.objectives, round(distil.split * n_layers)
    terms: dict[str, Term] = {}
    if asked.matrix.weight > 0:
        layers = _layers(asked.matrix.layers, split, n_layers, "matrix")
        known = family.roles
        roles = [role for role in asked.matrix.roles if role in known]
        if layers and roles:
            terms["matrix"] = _matrix_term(asked.matrix, layers, roles, pairing)
    if asked.attention.weight > 0 and (
        layers := _layers(asked.attention.layers, split, n_layers, "attention")
    ):
        pairing.check_windows(layers)
        heads = {layer: pairing.heads(layer) for layer in layers}
        terms["attention"] = attention_term(
            layers,
            weight=asked.attention.weight,
            divergence=asked.attention.divergence,
            beta=asked.attention.beta,
            impl=distil.kernels,
            teacher_layers=pairing.teacher_layers(layers),
            heads={layer: kept for layer, kept in heads.items() if kept is not None},
        )
    if asked.hidden.weight > 0 and (
        layers := _layers(asked.hidden.layers, split, n_layers, "hidden")
    ):
        channels = pairing.selection(layers[0], HIDDEN)
        terms["hidden"] = hidden_term(
            layers,
            weight=asked.hidden.weight,
            normalize=asked.hidden.normalize,
            teacher_layers=pairing.teacher_layers(layers, hidden=True),
            channels=None if channels is None else Selection(channels),
        )
    return terms


def _matrix_term(
    asked: MatrixConfig, layers: list[int], roles: list[Role], pairing: Pairing
) -> Term:
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


def _check_balance(distil: DistilConfig, objectives: Objectives) -> None:
    """Of the levels that learn together, one at least has to have a share."""
    turns = [[level] for level, share in (staged_shares(distil) or {}).items() if share > 0]
    for levels in turns or [objectives.levels]:
        if not any(getattr(distil.balance, level) for level in levels):
            raise UserError(
                f"distil.balance: the share of {' and '.join(levels)} is 0, so nothing would be "
                "learnt; give it one, or set distil.weights=fixed"
            )


def _layers(asked: Layers, split: int, n_layers: int, name: str) -> list[int]:
    if asked == "all":
        return list(range(n_layers))
    if asked == "shallow":
        return list(range(split))
    if asked == "deep":
        return list(range(split, n_layers))
    wrong = [index for index in asked if not 0 <= int(index) < n_layers]
    if wrong:
        raise UserError(
            f"distil.objectives.{name}.layers: there is no layer {wrong[0]}; "
            f"the student has layers 0 to "
            f"{n_layers - 1}"
        )
    return [int(index) for index in asked]
