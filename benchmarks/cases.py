"""The shapes that the benchmarks run, each named once.

Every case says what it stands for. The small ones are what a CPU run trains with; the large ones
are for an accelerator and are left out on a CPU.
"""

from typing import NamedTuple


class AttentionCase(NamedTuple):
    """Attention of teacher and student; both sides have the same shape here."""

    name: str
    batch: int
    heads: int
    groups: int
    tokens: int
    size: int


class LinearCase(NamedTuple):
    """Hidden states of `tokens` tokens before two heads over one vocabulary."""

    name: str
    tokens: int
    vocab: int
    student_size: int
    teacher_size: int
    divergences: tuple[str, ...] = ("forward_kl",)


ATTENTION_CPU = (
    AttentionCase("demo step", 4, 9, 3, 256, 64),
    AttentionCase("longer", 4, 9, 3, 512, 64),
    AttentionCase("long", 1, 9, 3, 2048, 64),
)
ATTENTION_ACCELERATOR = (
    *ATTENTION_CPU,
    AttentionCase("7B layer", 4, 32, 8, 2048, 128),
    AttentionCase("7B layer, long", 1, 32, 8, 8192, 128),
)
LINEAR_CPU = (
    LinearCase("demo step", 256, 49152, 576, 576, ("forward_kl", "reverse_kl", "jsd")),
    LinearCase("large batch", 4096, 49152, 576, 576),
)
LINEAR_ACCELERATOR = (
    *LINEAR_CPU,
    LinearCase("8B head", 8192, 128256, 4096, 4096),
)
