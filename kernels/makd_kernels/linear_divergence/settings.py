"""What the implementations of the linear divergence agree on."""

from typing import NamedTuple

from torch import Tensor

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
)
IGNORED_LABEL = -100  # as torch and transformers have it


class Settings(NamedTuple):
    """The choices of a call that are not tensors; `vocab_size` is filled in once checked."""

    divergence: str
    beta: float
    alpha: float
    temperature: float
    vocab_size: int | None
    chunk_bytes: int | None


class RowWeights(NamedTuple):
    """The gradient that flows into each row's cross-entropy and divergence."""

    cross_entropy_N: Tensor
    divergence_N: Tensor
