"""Perplexity: of the reference summaries given their documents, and of plain text by a sliding
window.

Both come from hidden states and the head's weight, a chunk of tokens at a time, on all ranks: every
rank runs the same number of forwards, as sharded weights demand, and a rank that has run out
repeats a batch that counts nothing.
"""
# N predicted tokens, V vocabulary, D width, B records, T tokens of the longest

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from makd_kernels.linear_divergence import linear_cross_entropy_divergence
from makd_llm import distributed
from makd_llm.data.batch import Batch, collate
from makd_llm.data.schema import Example

Forward = Callable[[Batch, Callable[[Tensor, Tensor], Any]], Any]


@dataclass(frozen=True)
class Perplexity:
    """nats: summed over the predicted tokens of all ranks. utf8_bytes: of the text they stand for,
    0 if unknown. each: the nats of every example, in the order given.
    """

    nats: float
    tokens: int
    utf8_bytes: int = 0
    each: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        """exp of the mean nats per token."""
        return math.exp(self.nats / self.tokens) if self.tokens else float("nan")

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; None where the bytes are unknown."""
        return self.nats / math.log(2) / self.utf8_bytes if self.utf8_bytes else None


def perplexity(
    forward: Forward,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    utf8_bytes: int = 0,
) -> Perplexity:
    """Over the targets of all examples; every rank passes the same examples and works on its share.
    Collective.

    Examples are sorted by length (the sum does not depend on it), so that little is padded.
    """
    ordered = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
    share_of = batch_size * distributed.world_size()
    # The last is the number of tokens.
    sums = torch.zeros(len(examples) + 1, dtype=torch.float64)
    for start in range(0, len(ordered), share_of):
        group = ordered[start : start + share_of]
        mine = group[distributed.rank() :: distributed.world_size()]
        batch = collate([examples[place] for place in mine or group[:1]], pad_id)
        batch = batch.to(distributed.device())
        nats_B = forward(batch, partial(_nats, batch))
        if mine:
            sums[mine] = nats_B.cpu()
            sums[-1] += float(batch.n_targets)
    *each, tokens = distributed.sum_over_ranks(sums).tolist()
    return Perplexity(math.fsum(each), int(tokens), utf8_bytes, tuple(each))


def _nats(batch: Batch, hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
    """(B,) float64: of each record's targets."""
    hidden_ND = hidden_BTD.flatten(0, 1)[batch.targets_N]
    labels_N = batch.labels_BT.flatten()[batch.targets_N]
    cross_entropy_N, _ = linear_cross_entropy_divergence(hidden_ND, weight_VD, labels_N)
    records, length = batch.labels_BT.shape
    nats_B = cross_entropy_N.new_zeros(records, dtype=torch.float64)
    return nats_B.index_add(0, batch.targets_N // length, cross_entropy_N.double())
