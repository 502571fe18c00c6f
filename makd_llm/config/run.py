"""The sections of a run's config, from the data to the evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from makd_llm.config.objectives import (
    AuxiliaryConfig,
    Objective,
    ObjectiveConfig,
    by_name,
    with_kinds,
)
from makd_llm.config.presets import merged, preset
from makd_llm.config.section import (
    FileName,
    Fraction,
    NotNegative,
    Place,
    Positive,
    Role,
    Section,
)
from makd_llm.config.sequences import SequencesConfig

Kind = TypeVar("Kind", bound=ObjectiveConfig)
DEFAULT_PRESET = "makd"


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
    train_split: FileName = "train"
    validation_split: FileName = "validation"
    columns: ColumnsConfig = ColumnsConfig()
    prompt: PromptConfig = PromptConfig()
    max_length: Positive = 1024
    max_prompt_length: Positive | None = None
    """Of the prompt alone, where every summary is to see the same cut; null: what remains."""
    padding_side: Literal["left", "right"] = "right"
    """Padding on the right is left out of the computation; on the left it is computed."""
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
    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-3
    """Of the factors in units of their own typical size."""
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
    """How the student is cut from the teacher: its shape, in this order, then its ranks.
    docs/students.md has the choices.
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
    limits: dict[Role, tuple[Fraction, Fraction]] = Field(default_factory=dict)
    """Role -> the least and the largest share of such a matrix that may be kept."""
    refine: RefineConfig | None = None
    embedding: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Parameters kept in the embedding, and in a head that is not tied to it; null: all."""
    calibration_records: Positive = 256
    calibration_batch: Positive = 8


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


class OfflineConfig(Section):
    """The teacher runs once, before the student learns; what it says of the training split is read
    from files (docs/methods/offline.md).
    """

    top_k: Positive = 64
    """Tokens whose log-probabilities are kept, at every summary token; all others share one."""
    batch_size: Positive = 8
    """Records per rank and forward of the teacher."""
    cache: Place | None = None
    """The folder that another run has written; null: the run writes its own, teacher-cache/."""


class OverParameterizeConfig(Section):
    """Matrices that are chains of tensors while they learn, and are contracted for the export
    (OPDF).
    """

    tensors: Literal[3, 5, 7, 9] = 5
    """Of each matrix: one in the middle, as many on either side."""
    roles: tuple[Role, ...] = Field(
        default=("q", "k", "v", "o", "gate", "up", "down"), min_length=1
    )


class DistilConfig(Section):
    """The distillation stage. `preset` gives the objectives and what belongs to them; what is given
    beside it wins, and a list of objectives takes the place of the preset's.
    """

    preset: str = DEFAULT_PRESET
    objectives: dict[str, Objective] = Field(min_length=1)
    split: Fraction = 0.5
    """Layers below split x depth are shallow, the rest deep (the hierarchy)."""
    layer_map: Literal["origin", "uniform"] | tuple[int, ...] = "origin"
    """Which teacher layer each of the student's is compared with: the one that it was copied from
    (for hidden states, the last before the next one that was kept), TinyBERT's even spread, or a
    list of the teacher's layers.
    """
    over_parameterize: OverParameterizeConfig | None = None
    weights: Literal["fixed", "balanced"] = "fixed"
    balance: BalanceConfig = BalanceConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    sequences: SequencesConfig = SequencesConfig()
    """The targets: the data's own, the teacher's, or the student's."""
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    """What computes attention_kl, the head's losses and low-rank products; auto takes Triton on a
    GPU where the shape suits it."""
    offline: OfflineConfig | None = None
    train: TrainConfig = TrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _over_the_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        values = dict(given)
        name = values.get("preset", DEFAULT_PRESET)
        below = preset(name) if isinstance(name, str) else {}
        if isinstance(values.get("objectives"), list | tuple):
            off = {key: {**one, "weight": 0.0} for key, one in below.pop("objectives").items()}
            values["objectives"] = {**off, **by_name(values["objectives"])}
        return merged(below, values)

    @field_validator("objectives", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return with_kinds(by_name(given))

    @model_validator(mode="after")
    def _something_auxiliary(self) -> "DistilConfig":
        if self.over_parameterize is None:
            for name in self.of(AuxiliaryConfig):
                raise ValueError(
                    f"objectives.{name} compares the tensors of over_parameterize, which is null; "
                    "set that, as {tensors: 5}, or the weight to 0"
                )
        return self

    def of(self, kind: type[Kind]) -> dict[str, Kind]:
        """The objectives of a kind that are switched on, by name."""
        found = self.objectives.items()
        return {name: o for name, o in found if isinstance(o, kind) and o.weight > 0}


class EvaluationConfig(Section):
    """What is measured at the end, on the validation split."""

    records: Positive | None = 500
    """For perplexity; null: all."""
    generate_records: Positive | None = 500
    """For ROUGE; null: all."""
    attention_records: Annotated[int, Field(ge=0)] = 16
    """Those, drawn by the seed, on which the students' attention is compared with the teacher's, by
    layer and head; 0: not measured."""
    batch_size: Positive = 16
    max_new_tokens: Positive = 96
    lead_k: Positive = 3
    stages: bool = False
    """Also cut the students on the way (plain SVD, whitened, ...), and show what each step and the
    distillation is worth; a factorization each."""
    text: Place | None = None
    """A plain text file for perplexity by sliding window."""
    text_window: Positive = 1024
    text_stride: Positive = 512


class RunConfig(Section):
    """Everything about one run but what the DeepSpeed JSON rules."""

    run_dir: Place = Path("runs/demo")
    seed: Annotated[int, Field(ge=0)] = 0
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    sft: SftConfig = SftConfig()
    student: StudentConfig = StudentConfig()
    distil: DistilConfig = Field(default_factory=lambda: DistilConfig.model_validate({}))
    evaluation: EvaluationConfig = EvaluationConfig()
    merge: bool = False
    """Also export dense weights in the teacher's own architecture (student-merged/)."""
