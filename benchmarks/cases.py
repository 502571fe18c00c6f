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

    @property
    def shape(self) -> str:
        """B2 H8 G8 T512 D64"""
        return f"B{self.batch} H{self.heads} G{self.groups} T{self.tokens} D{self.size}"


class LinearCase(NamedTuple):
    """Hidden states of `tokens` tokens before two heads over one vocabulary."""

    name: str
    tokens: int
    vocab: int
    student_size: int
    teacher_size: int
    divergences: tuple[str, ...] = ("forward_kl",)

    @property
    def shape(self) -> str:
        """N4096 V49152 D576 E576"""
        return f"N{self.tokens} V{self.vocab} D{self.student_size} E{self.teacher_size}"


class LowRankCase(NamedTuple):
    """A factored matrix, and how many rows go through it."""

    name: str
    rows: int
    inputs: int
    rank: int
    outputs: int

    @property
    def shape(self) -> str:
        """N2048 K576 R208 M1536"""
        return f"N{self.rows} K{self.inputs} R{self.rank} M{self.outputs}"


ATTENTION_CPU = (
    AttentionCase("demo step", 4, 9, 3, 256, 64),
    *(AttentionCase(f"T {tokens}", 2, 8, 8, tokens, 64) for tokens in (512, 1024, 2048, 4096)),
)
ATTENTION_GPU = (
    *(AttentionCase(f"T {tokens}", 4, 32, 32, tokens, 128) for tokens in (512, 1024, 2048, 4096)),
    AttentionCase("8B layer", 4, 32, 8, 2048, 128),
    AttentionCase("small heads", 4, 32, 32, 2048, 64),
    AttentionCase("8B layer, long", 1, 32, 8, 8192, 128),
)
LINEAR_CPU = (
    LinearCase("demo step", 256, 49152, 576, 576, ("forward_kl", "jsd")),
    LinearCase("large batch", 4096, 49152, 576, 576),
)
LINEAR_GPU = (
    LinearCase("large batch", 4096, 49152, 576, 576, ("forward_kl", "reverse_kl", "jsd")),
    LinearCase("8B head", 8192, 128256, 4096, 4096, ("forward_kl", "jsd")),
)
LOWRANK_CPU = (
    LowRankCase("135M q", 2048, 576, 144, 576),
    LowRankCase("135M gate", 2048, 576, 208, 1536),
    LowRankCase("1B gate", 1024, 2048, 752, 5632),
)
LOWRANK_GPU = tuple(
    LowRankCase(f"8B gate, rank {rank}", 8192, 4096, rank, 14336)
    for rank in (64, 128, 256, 512, 1024)
)
LOWRANK_MAP_CPU = tuple(
    LowRankCase("map", rows, 576, rank, 1536)
    for rank in (32, 64, 128, 208, 384)
    for rows in (64, 256, 1024, 4096)
)
LOWRANK_MAP_GPU = tuple(
    LowRankCase("map", rows, 4096, rank, 14336)
    for rank in (32, 64, 128, 256, 512, 1024)
    for rows in (512, 2048, 8192, 32768)
)
