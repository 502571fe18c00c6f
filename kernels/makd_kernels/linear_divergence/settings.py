"""What the implementations of the linear divergence agree on."""

from typing import NamedTuple

IGNORED_LABEL = -100  # as torch and transformers have it


class Settings(NamedTuple):
    """The choices of a call that are not tensors; `vocab_size` is filled in once checked."""

    divergence: str
    beta: float
    temperature: float
    vocab_size: int | None
    chunk_bytes: int | None
