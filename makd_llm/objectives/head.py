"""The objectives at the output: each compares next-token distributions at the summary's tokens.

Logits of the whole vocabulary are not made for them: cross-entropy and divergences run fused with
the head's product (makd_kernels.linear_divergence), others pick the tokens or positions they need.
"""
# N summary tokens, V vocabulary, D and E widths of student and teacher

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from makd_llm.shown import TopTokens


@dataclass(frozen=True)
class Timing:
    """When an objective is learnt: on every n-th step, with a weight that rises from 0 over its
    first steps.
    """

    every: int = 1
    warmup_steps: int = 0

    def share(self, step: int) -> float:
        """Of its weight, at a step counted from 1."""
        if (step - 1) % self.every:
            return 0.0
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0


ALWAYS = Timing()


@dataclass(frozen=True)
class Outputs:
    """What both models say at the summary's tokens. record_N: which record each is of; top: what a
    teacher that is read from a cache says.
    """

    student_ND: Tensor
    student_weight_VD: Tensor
    teacher_NE: Tensor
    teacher_weight_VE: Tensor
    record_N: Tensor
    top: TopTokens | None = None


@dataclass(frozen=True)
class CrossEntropy:
    """On the references."""

    weight: float
    timing: Timing = ALWAYS


@dataclass(frozen=True)
class Divergence:
    """tau² D(teacher, student), see makd_kernels.divergences."""

    weight: float
    divergence: str = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    temperature: float = 1.0
    timing: Timing = ALWAYS


@dataclass(frozen=True)
class Compared:
    """Any other: `compare` returns one value per summary token, (N,)."""

    weight: float
    compare: Callable[[Outputs], Tensor]
    timing: Timing = ALWAYS


HeadTerm = CrossEntropy | Divergence | Compared
