"""Which tokens of a batch are compared, and which a token may look at."""
# B batch, T tokens

from typing import NamedTuple

import torch
from torch import Tensor

from makd_llm.shown import RECORDS_APART, padded_rows


class Masks(NamedTuple):
    """tokens_BT: True where a token is real, and counts. keys_BT: what attention has to be told, as
    `Batch.key_mask_BT`. tokens_N: the real tokens' places, as `Batch.tokens_N`: what is compared
    may be of these alone, (1, N, ...).
    """

    tokens_BT: Tensor
    keys_BT: Tensor | None = None
    tokens_N: Tensor | None = None

    def summed(self, values_BT: Tensor) -> Tensor:
        """Over the tokens that count; of (1, N), which has no others, over all."""
        if values_BT.shape != self.tokens_BT.shape:
            return values_BT.sum()
        return torch.where(self.tokens_BT, values_BT, 0.0).sum()

    def padded(self, x: Tensor) -> Tensor:
        """(B, T, ...) of that or of (1, N, ...), with zeros where there is no token."""
        if x.shape[:2] == self.tokens_BT.shape:
            return x
        assert self.tokens_N is not None
        return padded_rows(x, self.tokens_N, *self.tokens_BT.shape)

    def by_record(self, x: Tensor) -> list[Tensor] | None:
        """(1, T, ...) of every record, T its own tokens, of (B, T, ...) or (1, N, ...); None where
        records rather stay together. Apart they are on the devices of `RECORDS_APART`, if some are
        padded (on the right).
        """
        if self.tokens_BT.device.type not in RECORDS_APART or self.keys_BT is not None:
            return None
        if bool(self.tokens_BT.all()):
            return None
        lengths: list[int] = self.tokens_BT.sum(1).tolist()
        if x.shape[:2] != self.tokens_BT.shape:
            return list(x.split(lengths, dim=1))
        return [row[:, :length] for row, length in zip(x.split(1), lengths, strict=True)]

    def of_records(self) -> list["Masks"]:
        """Of each record by itself: all of its tokens count."""
        return [Masks(row[row][None]) for row in self.tokens_BT]

    def seen_by(self, window: int | None) -> Tensor:
        """How many keys each token sees, itself among them, (B, T) int64: at least 1. window: the
        last so many.
        """
        keys_BT = torch.ones_like(self.tokens_BT) if self.keys_BT is None else self.keys_BT
        seen_BT = keys_BT.long().cumsum(1)
        if window is not None and window < seen_BT.shape[1]:
            seen_BT[:, window:] -= seen_BT[:, :-window].clone()
        return seen_BT.clamp_min(1)
