"""A run, described by frozen pydantic models.

One YAML file (`--config`) and any number of `key.path=value` overrides become one `RunConfig`;
OmegaConf merges them, pydantic checks them. Unknown keys are refused by path, with the nearest
known key. What DeepSpeed's own JSON (`--ds`) rules is not here: ds_configs/README.md says which
side owns which key, `train/deepspeed_config.py` joins the two.

Only the pipeline, the command line and `build_*` functions read this; classes below them take plain
arguments.
"""

import difflib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from makd_llm.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Layers = Literal["shallow", "deep", "all"] | tuple[int, ...]
Role = Literal["q", "k", "v", "o", "gate", "up", "down"]


class Section(BaseModel):
    """Base of every section: immutable, and strict about the names of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ColumnsConfig(Section):
    """Which columns of the data hold what; `id: null` numbers the records."""

    id: str | None = "id"
    document: str = "document"
    summary: str = "summary"


class PromptConfig(Section):
    """How a record becomes a prompt. Templates may name any column of the record."""

    chat: bool | None = None
    """True: the tokenizer's chat template; False: `template`; null: chat where the tokenizer has
    it.
    """
    system: str | None = None
    instruction: str = "Summarize the following text."
    user_template: str = "{instruction}\n\n{document}"
    template: str = "{document}\n\nSummary:"
    bos: Literal["auto", "always", "never"] = "auto"


class DataConfig(Section):
    """Records for training and validation, and how they are cut to the window."""

    source: str = "builtin:aclsum"
    """`builtin:NAME`, a .jsonl/.csv/.parquet file, a folder of such files, or a Hub id."""
    validation_source: str | None = None
    """Where the validation split lies, if not in `source`."""
    train_split: str = "train"
    validation_split: str = "validation"
    columns: ColumnsConfig = ColumnsConfig()
    prompt: PromptConfig = PromptConfig()
    max_length: Positive = 1024
    max_prompt_length: Positive | None = None
    """Of the prompt alone, where every summary is to see the same cut; null: what remains."""
    padding_side: Literal["left", "right"] = "right"
    on_bad_record: Literal["error", "skip"] = "error"
    streaming: bool = False
    shuffle_buffer: Positive = 1024
    limit: Positive | None = None


class TeacherConfig(Section):
    """The model that teaches: `builtin:NAME`, a Hub id, a local folder, or a .gguf file."""

    model: str = "builtin:smollm2-135m-instruct"


class TrainConfig(Section):
    """One training stage. Fills the "auto" entries of the DeepSpeed JSON; null leaves a key to the
    JSON.
    """

    steps: Positive = 100
    batch_size: Positive | None = 8
    """Records per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: Positive | None = None
    """Records per rank and forward; null: as many as the batch has for each rank."""
    learning_rate: Annotated[float, Field(gt=0.0)] | None = 1.5e-4
    weight_decay: NotNegative | None = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """null: a tenth of `steps`."""
    gradient_clipping: NotNegative | None = 1.0
    gradient_checkpointing: bool = False
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2
    log_every: Positive = 1
    max_bad_steps: Positive = 10
    """Stop after so many steps in a row whose loss or gradient was not finite."""

    @property
    def warmup(self) -> int:
        """Warm-up steps, at least 1 (DeepSpeed's schedule divides by it)."""
        asked = self.steps // 10 if self.warmup_steps is None else self.warmup_steps
        return max(1, asked)


class SftConfig(Section):
    """Optional tuning of the teacher on the task before it teaches."""

    enabled: bool = False
    train: TrainConfig = TrainConfig(learning_rate=1e-4)


class RefineConfig(Section):
    """Training of each layer by itself after its truncation, on the calibration text."""

    epochs: Positive = 2
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    loss: Literal["least_squares", "lillama"] = "least_squares"
    inputs: Literal["student", "teacher", "both"] = "student"


class DepthConfig(Section):
    """Fewer layers than the teacher has."""

    layers: Positive
    choose: Literal["even", "ild"] = "even"
    """Spread evenly; or what is left when the layer that the calibration text misses least is
    dropped, again and again."""


class WidthConfig(Section):
    """Narrower than the teacher; null: as wide as it is."""

    hidden: Positive | None = None
    feed_forward: Positive | None = None

    @model_validator(mode="after")
    def _something(self) -> "WidthConfig":
        if self.hidden is None and self.feed_forward is None:
            raise ValueError("both hidden and feed_forward are null: give one, or leave width out")
        return self


class HeadsConfig(Section):
    """Fewer key-value heads than the teacher has: similar ones are merged."""

    key_value: Positive


class StudentConfig(Section):
    """How the student is cut from the teacher: its shape, in this order, then its ranks (methods.md
    sections 4 and 5).
    """

    depth: DepthConfig | None = None
    width: WidthConfig | None = None
    heads: HeadsConfig | None = None
    method: Literal["svd", "fwsvd", "asvd", "whitened", "fisher", "sequential", "refitted"] = (
        "fisher"
    )
    keep_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Parameters kept in the factorized matrices."""
    budget: Literal["uniform", "greedy", "sensitivity"] = "greedy"
    """The same share of every matrix, or ranks where they save most: of the outputs' error
    (greedy), or of the model's loss (sensitivity)."""
    rank_multiple: Positive = 16
    limits: dict[Role, tuple[Fraction, Fraction]] = {}
    """Role -> the least and the largest share of such a matrix that may be kept."""
    refine: RefineConfig | None = None
    embedding: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Parameters kept in the embedding, and in a head that is not tied to it; null: all."""
    calibration_records: Positive = 256
    calibration_batch: Positive = 8


class ObjectiveConfig(Section):
    """What every objective has: its weight; 0 switches it off and nothing is captured for it."""

    weight: NotNegative = 1.0


class CrossEntropyConfig(ObjectiveConfig):
    """Model level: cross-entropy on the reference summaries."""


class LogitsConfig(ObjectiveConfig):
    """Model level: divergence of next-token distributions, times temperature squared."""

    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"
    ] = "forward_kl"
    beta: Fraction = 0.5
    """Of the mixture in jsd: 0 is the forward KL, 1 the reverse KL."""
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Of the mixture in the skewed KLs: 0 is the plain KL."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0


class MatrixConfig(ObjectiveConfig):
    """Matrix level: outputs of q k v o (L_MHA) and gate up down (L_FNN)."""

    layers: Layers = "shallow"
    roles: tuple[Role, ...] = (
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    )
    input: Literal["student", "teacher"] = "student"
    normalize: Literal["relative", "mean"] = "relative"


class AttentionConfig(ObjectiveConfig):
    """Layer level: divergence of attention distributions, mean over heads."""

    layers: Layers = "deep"
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "probability_mse", "logit_mse"] = (
        "forward_kl"
    )
    beta: Fraction = 0.5
    """Of the mixture in jsd: 0 is the forward KL, 1 the reverse KL."""


class HiddenConfig(ObjectiveConfig):
    """Layer level: squared error of the layers' hidden states."""

    layers: Layers = "deep"
    normalize: Literal["relative", "mean"] = "relative"


class ObjectivesConfig(Section):
    """The losses of a run, by name."""

    cross_entropy: CrossEntropyConfig = CrossEntropyConfig(weight=0.3)
    logits: LogitsConfig = LogitsConfig()
    matrix: MatrixConfig = MatrixConfig()
    attention: AttentionConfig = AttentionConfig()
    hidden: HiddenConfig = HiddenConfig()


class BalanceConfig(Section):
    """`balanced` keeps each level's share of the loss at these ratios, measured every n steps."""

    every: Positive = 10
    matrix: NotNegative = 1.0
    layer: NotNegative = 1.0
    model: NotNegative = 1.0


class ScheduleConfig(Section):
    """`joint`: all levels at once. `staged`: matrix, then layer, then model, with these shares of
    the steps.
    """

    kind: Literal["joint", "staged"] = "joint"
    matrix: NotNegative = 0.25
    layer: NotNegative = 0.25
    model: NotNegative = 0.5

    @model_validator(mode="after")
    def _some_steps(self) -> "ScheduleConfig":
        if self.kind == "staged" and self.matrix + self.layer + self.model <= 0:
            raise ValueError("the shares of matrix, layer and model are all 0: give at least one")
        return self


class DistilConfig(Section):
    """The distillation stage. `preset` sets weights; single objectives may still be changed after
    it.
    """

    preset: Literal["makd", "kd", "finetune"] = "makd"
    objectives: ObjectivesConfig = ObjectivesConfig()
    split: Fraction = 0.5
    """Layers below split x depth are shallow, the rest deep (the hierarchy)."""
    layer_map: Literal["origin", "uniform"] | tuple[int, ...] = "origin"
    """Which teacher layer each of the student's is compared with: the one that it was copied from
    (for hidden states, the last before the next one that was kept), TinyBERT's even spread, or a
    list of the teacher's layers.
    """
    weights: Literal["fixed", "balanced"] = "fixed"
    balance: BalanceConfig = BalanceConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    """What computes attention_kl, the head's losses and low-rank products; auto takes Triton on a
    GPU where the shape suits it."""
    train: TrainConfig = TrainConfig()


class EvaluationConfig(Section):
    """What is measured at the end, on the validation split."""

    records: Positive | None = 500
    """For perplexity; null: all."""
    generate_records: Positive | None = 500
    """For ROUGE; null: all."""
    batch_size: Positive = 16
    max_new_tokens: Positive = 96
    lead_k: Positive = 3
    stages: bool = False
    """Also cut the students on the way (plain SVD, whitened, ...), and show what each step and the
    distillation is worth; a factorization each."""
    text: Path | None = None
    """A plain text file for perplexity by sliding window."""
    text_window: Positive = 1024
    text_stride: Positive = 512


class RunConfig(Section):
    """Everything about one run but what the DeepSpeed JSON rules."""

    run_dir: Path = Path("runs/demo")
    seed: Annotated[int, Field(ge=0)] = 0
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    sft: SftConfig = SftConfig()
    student: StudentConfig = StudentConfig()
    distil: DistilConfig = DistilConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    merge: bool = False
    """Also export dense weights in the teacher's own architecture (student-merged/)."""


def _weights(**weights: float) -> dict[str, Any]:
    return {name: {"weight": weight} for name, weight in weights.items()}


PRESETS: dict[str, dict[str, Any]] = {
    # methods.md section 1: all three levels; section 4: the two controls every claim needs.
    "makd": _weights(cross_entropy=0.3, logits=1.0, matrix=1.0, attention=1.0, hidden=1.0),
    "kd": _weights(cross_entropy=0.3, logits=1.0, matrix=0.0, attention=0.0, hidden=0.0),
    "finetune": _weights(cross_entropy=1.0, logits=0.0, matrix=0.0, attention=0.0, hidden=0.0),
}


def load_config(path: Path | None, overrides: list[str]) -> RunConfig:
    """Reads a YAML file (or none: all defaults), applies `key.path=value` overrides, and checks the
    result.

    Raises UserError: missing or malformed file, unknown key, wrong type, value out of range.
    """
    for override in overrides:
        if "=" not in override:
            raise UserError(
                f"{override!r}: not of the form key.path=value; example: distil.train.steps=50"
            )
    where = str(path) if path else "defaults"
    try:
        from_file = OmegaConf.load(path) if path else OmegaConf.create({})
        if not OmegaConf.is_dict(from_file):
            raise UserError(
                f"{where}: expected keys and values at the top level, "
                "found a list or a single value"
            )
        typed = OmegaConf.from_dotlist(overrides)
        given = OmegaConf.merge(_preset_of(from_file), from_file, _preset_of(typed), typed)
        plain = OmegaConf.to_container(given, resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; configs/ holds examples") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a config file; name a .yaml file in it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected a YAML config file") from None
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        first_line = " ".join(str(error).split())
        raise UserError(f"{where}: not readable as a config: {first_line}") from None
    if not isinstance(plain, dict):
        raise UserError(
            f"{where}: expected keys and values at the top level, found a {type(plain).__name__}"
        )
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise UserError(_first_line(error, where, overrides)) from None


SomeSection = TypeVar("SomeSection", bound=Section)


def checked(section: type[SomeSection], values: dict[str, Any]) -> SomeSection:
    """A section from plain values, as a command's options give them. Raises UserError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_first_line(error, "command line", [])) from None


def _preset_of(given: Any) -> dict[str, Any]:
    """The weights of the preset that a file or the command line names. They lie below what is given
    in the same place, so that single keys win, and above what a file gives to the command line's.
    """
    distil = given.get("distil")
    name = distil.get("preset") if OmegaConf.is_dict(distil) else None
    weights = PRESETS.get(name) if isinstance(name, str) else None
    return {"distil": {"objectives": weights}} if weights else {}


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, as a run folder keeps it."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _first_line(error: ValidationError, where: str, overrides: list[str]) -> str:
    """One line for the first problem: path, what is wrong, what to do."""
    problem = error.errors()[0]
    location = [part for part in problem["loc"] if not _is_union_tag(part)]
    path = ".".join(str(part) for part in location)
    if any(override.partition("=")[0].startswith(path) for override in overrides):
        where = "command line"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys([str(part) for part in location[:-1]])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        advice = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(known)
        return f"{where}: unknown key {path}; {advice}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {path}: {message[0].lower() + message[1:]}, found {problem['input']!r}{more}"


def _is_union_tag(part: int | str) -> bool:
    """Pydantic names the branch of a union in the path; a person never wrote that."""
    return isinstance(part, str) and ("[" in part or "(" in part)


def _known_keys(path: list[str]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for name in path:
        field = section.model_fields.get(name)
        found = _section_type(field.annotation) if field else None
        if found is None:
            return []
        section = found
    return list(section.model_fields)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((s for a in get_args(annotation) if (s := _section_type(a))), None)
    return None
