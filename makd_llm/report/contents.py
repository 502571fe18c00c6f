"""What a run folder holds, read for people to look at.

A report is asked of runs that are finished, under way, killed or damaged. So nothing here fails on
what a folder lacks: every file is checked against what this version writes, and one that is not
there, or is not so, becomes a note in words. Numbers that are no numbers stay what they are.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from makd_llm.errors import UserError
from makd_llm.stages import STAGES

KNOWN = ("config.yaml", "metrics.jsonl", "factorization.json", "evaluation.json", "stages.json")
"""What a folder is known by: one of these makes it a run, or a student cut without one."""
COMPARISON = "comparison.json"
MOST = 10**300
"""What a number in a file may be, if it is one at all: sums of some such are still floats."""

T = TypeVar("T")


class _Read(BaseModel):
    """Base of what is read: what a later version adds is left alone."""

    model_config = ConfigDict(extra="ignore")


class Size(_Read):
    """Parameters: of the decoder blocks, and in all."""

    blocks: int
    total: int


class Perplexity(_Read):
    """exp of the mean nats per token."""

    value: float


class ModelRow(_Read):
    """What evaluation.json says of one model; a baseline has no size and no perplexity."""

    parameters: Size | None = None
    perplexity: Perplexity | None = None
    rouge: dict[str, float] = {}


class Evaluation(_Read):
    """evaluation.json."""

    models: dict[str, ModelRow]
    records: dict[str, int] = {}
    skipped_in_words: str | None = None
    prompt: str = ""
    perplexity_rule: str = ""
    generation: str = ""
    rouge_settings: dict[str, Any] | str = ""
    stages: dict[str, float] | None = None


class Matrix(_Read):
    """One factorized matrix; rank null where it stayed dense, layer null outside the layers."""

    role: str
    layer: int | None
    rows: int = Field(gt=0)
    columns: int = Field(gt=0)
    rank: int | None
    residual: float


class HeldOut(_Read):
    """What a factorization lost on text that it was not calibrated on."""

    matrix_residuals: list[float | None]
    layer_residuals: list[float] = []
    perplexity: dict[str, float] = {}
    tokens: int = 0
    data: str | None = ""
    stages: dict[str, float] | None = None


class Factorization(_Read):
    """factorization.json."""

    matrices: list[Matrix] = Field(min_length=1)
    teacher: str = ""
    recipe: dict[str, Any] = {}
    parameters: dict[str, Size] = {}
    held_out: HeldOut | None = None

    @model_validator(mode="after")
    def _one_for_each(self) -> Self:
        if self.held_out and len(self.held_out.matrix_residuals) != len(self.matrices):
            raise ValueError("held_out has not one residual for each matrix")
        return self


class PairedLayer(_Read):
    """A layer of the student, the teacher's that it is compared with, and for each of its query
    heads the teacher's.
    """

    student: int
    teacher: int
    heads: list[int]


class Attention(_Read):
    """attention.json: mean divergence per query by model, layer and head, or why there is none."""

    models: dict[str, list[list[float]]] = {}
    layers: list[PairedLayer] = []
    divergence: str = ""
    records: int = 0
    tokens: int = 0
    seed: int = 0
    not_measured: str | None = None

    @model_validator(mode="after")
    def _one_for_each(self) -> Self:
        heads = [len(layer.heads) for layer in self.layers]
        if any([len(layer) for layer in found] != heads for found in self.models.values()):
            raise ValueError("a model has not one number for each head of each layer")
        if self.models and (not heads or 0 in heads):
            raise ValueError("a layer without heads")
        return self


class StageEntry(_Read):
    """One stage in stages.json."""

    done: bool = False
    key: dict[str, Any] = {}


class Sample(BaseModel):
    """A line of samples.jsonl: what stands beside the fields named here are models' texts."""

    model_config = ConfigDict(extra="allow")

    id: str | int | None = None
    document: str
    references: list[str] = []

    @property
    def texts(self) -> dict[str, str]:
        """What each model wrote."""
        more = self.model_extra or {}
        return {name: text for name, text in more.items() if isinstance(text, str)}


class Interval(_Read):
    """A mean and its 95 % interval, on ROUGE's scale of 0 to 100."""

    model_config = ConfigDict(allow_inf_nan=False)

    value: float
    low: float
    high: float


class Difference(_Read):
    """A paired difference from another row, its 95 % interval, and its p."""

    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


class Row(_Read):
    """A row of a comparison, or the mean of some that differ in their seed.

    share_of_teacher: null where the teacher's own is 0. spread: the standard deviation between
    seeds, null for one.
    """

    name: str
    label: str = ""
    keep_ratio: float | None = None
    seed: int | None = None
    seeds: list[int] | None = None
    run: str | None = None
    state: str = "done"
    error: str | None = None
    parameters: float | None = None
    tokens: float | None = None
    seconds: float | None = None
    peak_memory_MB: float | None = None
    perplexity: float | None = None
    rouge1: Interval | None = None
    rouge2: Interval | None = None
    rougeLsum: Interval | None = None
    share_of_teacher: dict[str, float | None] | None = None
    against: dict[str, dict[str, Difference]] | None = None
    spread: dict[str, float | None] | None = None

    @property
    def is_there(self) -> bool:
        """Whether there is anything to show of it, if only that it failed."""
        return self.state != "waiting" or bool(self.seeds)


class Comparison(_Read):
    """comparison.json."""

    rows: list[Row]
    name: str = ""
    teacher: str = ""
    data: str = ""
    settings: dict[str, Any] = {}
    groups: list[Row] = []
    analysis: str = ""


@dataclass
class Run:
    """A folder as it was found. What is None or empty is missing, and `notes` say why."""

    name: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, StageEntry] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    factorization: Factorization | None = None
    evaluation: Evaluation | None = None
    attention: Attention | None = None
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_bare(self) -> bool:
        """Whether this is a student that was cut without a run."""
        return bool(self.factorization) and not (self.stages or self.config or self.metrics)

    def setting(self, path: str) -> Any:
        """A value of the config by its dotted path; None where there is none."""
        found: Any = self.config
        for key in path.split("."):
            if not isinstance(found, Mapping):
                return None
            found = found.get(key)
        return found

    def steps_of(self, stage: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one stage, by step."""
        return sorted(
            (m for m in self.metrics if m.get("stage") == stage), key=lambda m: float(m["step"])
        )

    @property
    def state(self) -> str:
        """How far it has come, in words."""
        if not self.stages:
            return "a student cut without a run" if self.is_bare else "stages unknown"
        if (last := self.stages.get(STAGES[-1])) and last.done:
            return "finished"
        under_way = [name for name, entry in self.stages.items() if not entry.done]
        if not under_way:
            return f"stands after {list(self.stages)[-1]}"
        stage = under_way[-1]
        steps, of = self.steps_of(stage), self.setting(f"{stage}.train.steps")
        where = f", step {steps[-1]['step']}{f' of {of}' if of else ''}" if steps else ""
        return f"in {stage}{where}: still going on, or stopped there"


def read_run(folder: Path, name: str | None = None) -> Run:
    """Reads a run folder, or a student's that `makd factorize` wrote. Raises UserError where it is
    neither.
    """
    if not any((folder / known).is_file() for known in KNOWN):
        what = "no run" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: {what}; name a folder that `makd train` or `makd compare` has written"
        )
    run = Run(name or folder.resolve().name, folder)
    run.config = _read(run, "config.yaml", partial(_config, run)) or {}
    run.environment = _read(run, "environment.json", _as(dict[str, Any])) or {}
    run.stages = _read(run, "stages.json", _as(dict[str, StageEntry])) or {}
    run.metrics = _read(run, "metrics.jsonl", _lines(run, "metrics.jsonl", _metric)) or []
    run.factorization = _read(run, "factorization.json", _as(Factorization))
    run.evaluation = _read(run, "evaluation.json", _as(Evaluation))
    run.attention = _read(run, "attention.json", _as(Attention))
    sample = TypeAdapter(Sample).validate_json
    run.samples = _read(run, "samples.jsonl", _lines(run, "samples.jsonl", sample)) or []
    return run


def read_comparison(folder: Path) -> tuple[Comparison, list[Run]]:
    """A comparison and those of its rows that are runs, as far as they have come. Raises UserError
    where comparison.json is damaged.
    """
    path = folder / COMPARISON
    try:
        comparison = _as(Comparison)(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: {_in_words(error)}; run `makd compare` again, it writes it anew"
        ) from None
    runs = []
    for row in comparison.rows:
        place = folder / row.run if row.run else None
        if place and any((place / known).is_file() for known in KNOWN):
            runs.append(read_run(place, title_of(row)))
    return comparison, runs


def title_of(row: Row) -> str:
    """A row's name among the others: what it is, the share that it keeps, and its seed."""
    keep = "" if row.keep_ratio is None else f", keep {row.keep_ratio:g}"
    seed = "" if row.seed is None else f", seed {row.seed}"
    return f"{row.label or row.name}{keep}{seed}"


def _read(run: Run, name: str, parse: Callable[[str], T]) -> T | None:
    """A file's content; None, and a note, where it is missing or damaged."""
    try:
        return parse((run.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        run.notes.append(f"{name}: not there")
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.notes.append(f"{name}: {_in_words(error)}")
    return None


def _config(run: Run, text: str) -> dict[str, Any]:
    """The settings; the text is kept to be shown, also where it is none."""
    run.config_text = text
    found: dict[str, Any] = _as(dict[str, Any], yaml.safe_load)(text)
    return found


class _Absurd(ValueError):
    """A number that a sum of floats cannot take."""


def _whole(said: str) -> int:
    if abs(found := int(said)) > MOST:
        raise _Absurd(f"has a number of {len(said.lstrip('-'))} digits")
    return found


def _real(said: str) -> float:
    if MOST < abs(found := float(said)) < math.inf:
        raise _Absurd(f"has the number {said}")
    return found


_loads = partial(json.loads, parse_int=_whole, parse_float=_real)


def _as(kind: Any, load: Callable[[str], Any] = _loads) -> Callable[[str], Any]:
    """Checks what a text holds against a type. Raises ValueError where it is not so."""
    adapter = TypeAdapter(kind)
    return lambda text: adapter.validate_python(load(text))


def _lines(run: Run, name: str, parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Every line that is whole; a note says how many are not (a run that goes on writes the last
    of them just now).
    """

    def parsed(text: str) -> list[T]:
        found, damaged = [], 0
        for line in text.split("\n"):
            try:
                found += [parse(line)] if line.strip() else []
            except ValueError:
                damaged += 1
        if damaged:
            run.notes.append(f"{name}: {damaged} of its lines cannot be read")
        return found

    return parsed


def _metric(line: str) -> dict[str, Any]:
    found = _loads(line)
    if not isinstance(found, dict) or not isinstance(found.get("step"), int | float):
        raise ValueError("no step")
    return found


def _in_words(error: Exception) -> str:
    """What is wrong with a file, in a few words."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"not as this version writes it ({place + ': ' if place else ''}{first['msg']})"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    if isinstance(error, _Absurd):
        return str(error)
    return "damaged"
