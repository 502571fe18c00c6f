"""How far a student looks from where its teacher looks: the divergence of their attention, by layer
and head.

Both models see the same records, one at a time on every rank (so nothing is padded), and show their
queries and keys; the maps themselves never exist (makd_kernels.attention_kl).
"""
# B batch, H query heads, T tokens

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from makd_kernels.attention_kl import attention_kl
from makd_llm import distributed
from makd_llm.data.batch import Batch, collate
from makd_llm.data.schema import Example
from makd_llm.errors import UserError
from makd_llm.models.capture import CAPTURING_SDPA, attention_of
from makd_llm.models.pairing import LayerMap, pair
from makd_llm.shown import AttentionShown, Needs, Shown

DIVERGENCE = "forward_kl"


class Showing(Protocol):
    """A model that shows what its forward does inside a `with`."""

    def __call__(self, batch: Batch) -> Any: ...
    def capture(self, needs: Needs) -> AbstractContextManager[Shown]: ...


@dataclass(frozen=True)
class PairedLayer:
    """A layer of the student, the teacher's that it is compared with, and for each of its query
    heads the teacher's.
    """

    student: int
    teacher: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Divergences:
    """by_head: for each layer of the student, the mean over all tokens of each of its heads, in
    nats per query. tokens: of all ranks.
    """

    by_head: list[list[float]]
    tokens: int


def paired_layers(
    student: PreTrainedConfig, teacher: PreTrainedConfig, layer_map: LayerMap = "origin"
) -> list[PairedLayer]:
    """What of a student is compared with what of its teacher, by their configs.

    Raises UserError where nothing says what belongs together, or an attention cannot be looked at.
    """
    for whose, config in (("student", student), ("teacher", teacher)):
        if attention_of(config) != CAPTURING_SDPA:
            raise UserError(
                f"the {whose}'s attention ({config.model_type}) shows no queries and keys"
            )
    pairing = pair(student, teacher, layer_map)
    every = range(pairing.student.layers)
    pairing.check_windows(every)
    found = []
    for ours, theirs in zip(every, pairing.teacher_layers(every), strict=True):
        heads = pairing.heads(ours)
        found.append(PairedLayer(ours, theirs, heads or tuple(range(pairing.student.heads))))
    return found


def drawn(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """So many of the examples, the same for the same seed; all where there are no more. Sorted by
    length, so that ranks that work side by side have as much to do.
    """
    chosen = random.Random(seed).sample(range(len(examples)), min(count, len(examples)))
    return sorted((examples[i] for i in sorted(chosen)), key=lambda e: len(e.input_ids))


def attention_divergence(
    teacher: Showing,
    student: Showing,
    layers: Sequence[PairedLayer],
    examples: Sequence[Example],
    *,
    pad_id: int,
    impl: str = "auto",
) -> Divergences:
    """KL(teacher ‖ student) of the attention over the keys, for every layer and head of a student.
    Every rank passes the same examples and works on its share. Collective.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    of_teacher = Needs(attention=frozenset(layer.teacher for layer in layers))
    of_student = Needs(attention=frozenset(layer.student for layer in layers))
    sums = torch.zeros(sum(len(layer.heads) for layer in layers) + 1, dtype=torch.float64)
    for start in range(0, len(examples), ranks):
        group = examples[start : start + ranks]
        mine = rank < len(group)  # else a forward that counts nothing, as sharded weights demand
        batch = collate([group[rank if mine else 0]], pad_id).to(distributed.device())
        with teacher.capture(of_teacher) as theirs:
            teacher(batch)
        with student.capture(of_student) as ours:
            student(batch)
        if mine:
            by_head = [
                _summed(ours.attention[layer.student], theirs.attention[layer.teacher], layer, impl)
                for layer in layers
            ]
            tokens = torch.tensor([batch.input_ids_BT.numel()], dtype=torch.float64)
            sums += torch.cat([*by_head, tokens])
    *totals, tokens_in_all = distributed.sum_over_ranks(sums).tolist()
    values = iter(totals)
    means = [[next(values) / tokens_in_all for _ in layer.heads] for layer in layers]
    return Divergences(means, int(tokens_in_all))


def _summed(
    student: AttentionShown, teacher: AttentionShown, layer: PairedLayer, impl: str
) -> Tensor:
    """(H,) on the CPU: each head's divergence, summed over the queries."""
    same = layer.heads == tuple(range(teacher.query_BHTD.shape[1]))
    found_BHT = attention_kl(
        teacher.query_BHTD,
        teacher.key_BGTD,
        student.query_BHTD,
        student.key_BGTD,
        scale_teacher=teacher.scale,
        scale_student=student.scale,
        window=student.window,
        head_map=None if same else [[head] for head in layer.heads],
        divergence=DIVERGENCE,
        impl=impl,
    )
    return found_BHT.double().sum((0, 2)).cpu()
