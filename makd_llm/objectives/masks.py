"""Which tokens of a batch are compared, and which a token may look at."""
# B batch, T tokens

from typing import NamedTuple

import torch
from torch import Tensor


class Masks(NamedTuple):
    """tokens_BT: True where a token is real, and counts. keys_BT: what attention has to be told, as
    `Batch.key_mask_BT`.
    """

    tokens_BT: Tensor
    keys_BT: Tensor | None = None

    def summed(self, values_BT: Tensor) -> Tensor:
        """Over the tokens that count; of (1, N), which has no others, over all."""
        if values_BT.shape != self.tokens_BT.shape:
            return values_BT.sum()
        return torch.where(self.tokens_BT, values_BT, 0.0).sum()

    def lengths(self) -> list[int] | None:
        """How many tokens each record has, where it pays to go through attention record by record:
        on a CPU, which knows it without waiting, and only if some are padded (on the right).
        """
        if not self.tokens_BT.is_cpu or self.keys_BT is not None or bool(self.tokens_BT.all()):
            return None
        found: list[int] = self.tokens_BT.sum(1).tolist()
        return found

    def of_record(self, row: int, length: int) -> "Masks":
        """Of one record's tokens."""
        return Masks(self.tokens_BT[row : row + 1, :length])

    def seen_by(self, window: int | None) -> Tensor:
        """How many keys each token sees, itself among them, (B, T) int64: at least 1. window: the
        last so many.
        """
        keys_BT = torch.ones_like(self.tokens_BT) if self.keys_BT is None else self.keys_BT
        seen_BT = keys_BT.long().cumsum(1)
        if window is not None and window < seen_BT.shape[1]:
            seen_BT[:, window:] -= seen_BT[:, :-window].clone()
        return seen_BT.clamp_min(1)
