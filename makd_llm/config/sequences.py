"""Which summaries a distillation learns from."""

from typing import Annotated

from pydantic import Field

from makd_llm.config.section import Fraction, NotNegative, Positive, Section


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
    """Whose summaries are learnt from."""

    student: OnPolicyConfig | None = None
