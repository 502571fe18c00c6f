"""Which summaries a distillation learns from, and how they are written."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from makd_llm.config.section import Fraction, NotNegative, Positive, Section


class GenerationConfig(Section):
    """How a model writes. Settings of another method than the chosen one have no say."""

    method: Literal["greedy", "beam", "sample"] = "greedy"
    max_new_tokens: Positive = 96
    beams: Positive = 4
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Positive | None = None
    """null: all of the vocabulary."""
    per_document: Positive = 1
    """Summaries of each document: samples, or the best of the beams."""
    batch_size: Positive = 16
    """Texts that are written together, on each rank."""

    @model_validator(mode="after")
    def _so_many(self) -> "GenerationConfig":
        if self.method == "greedy" and self.per_document > 1:
            raise ValueError(
                f"greedy decoding has one summary of a document, not {self.per_document} "
                "(per_document); choose the method sample or beam"
            )
        if self.method == "beam" and self.per_document > self.beams:
            raise ValueError(
                f"{self.beams} beams do not give {self.per_document} summaries of a document "
                "(per_document); give more beams"
            )
        return self


class AdaptiveConfig(Section):
    """More of the student's own texts when the validation loss rises (DistiLLM)."""

    every: Positive = 50
    """Steps between two measurements of the validation loss."""
    records: Positive = 64
    """Of the validation split."""
    increment: Fraction = 0.1
    tolerance: NotNegative = 0.1
    """Nats per token that the loss may rise for nothing to happen."""


class OnPolicyConfig(Section):
    """The student writes summaries while it learns, and is corrected on them."""

    lmbda: Fraction = 0.5
    """Share of the steps that learn from what the student writes; with `adaptive`, at first."""
    temperature: NotNegative = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Positive | None = None
    max_new_tokens: Positive = 96
    batch_size: Positive = 32
    """Texts that a rank writes together."""
    replay: Annotated[int, Field(ge=0)] = 0
    """Texts that are kept and used again, while fewer are written from step to step; 0: none."""
    adaptive: AdaptiveConfig | None = None


class SequencesConfig(Section):
    """The targets of the distillation stage."""

    source: Literal["data", "teacher"] = "data"
    """The references of the data; or what the teacher writes for the same documents, once, before
    the distillation (the stage `write`)."""
    generation: GenerationConfig = GenerationConfig()
    """Of the teacher."""
    student: OnPolicyConfig | None = None
    """Where it writes too, while it learns; its steps take the prompts of the source's records."""
