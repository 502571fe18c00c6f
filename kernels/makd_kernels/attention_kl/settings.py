"""What the implementations of the attention divergence agree on."""

from typing import NamedTuple

import torch

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "probability_mse", "logit_mse")

LARGEST_HEAD = 256  # of the Triton kernels
HIDDEN = -1e30  # finite: the difference of two hidden scores is 0, never NaN


class Settings(NamedTuple):
    """The choices of a call that are not tensors."""

    scale_teacher: float
    scale_student: float
    causal: bool
    window: int | None
    divergence: str
    beta: float


def in_one_sweep(divergence: str, dtype: torch.dtype) -> bool:
    """Are values and the student's dq made together where log-sum-exps are given?

    Not in fp16: dq is kept before the upstream gradient, and with it the loss scale, is known.
    """
    return divergence == "forward_kl" and dtype != torch.float16


def statistics_of(divergence: str) -> int:
    """How many numbers the Triton backward needs of each pair's query.

    Maximum and log-sum of the teacher's scores, then of the student's, then the divergence's own.
    """
    return {"forward_kl": 4, "logit_mse": 0}.get(divergence, 5)
