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
        """Over the tokens that count."""
        return torch.where(self.tokens_BT, values_BT, 0.0).sum()

    def seen_by(self, window: int | None) -> Tensor:
        """How many keys each token sees, itself among them, (B, T) int64: at least 1. window: the
        last so many.
        """
        keys_BT = torch.ones_like(self.tokens_BT) if self.keys_BT is None else self.keys_BT
        seen_BT = keys_BT.long().cumsum(1)
        if window is not None and window < seen_BT.shape[1]:
            seen_BT[:, window:] -= seen_BT[:, :-window].clone()
        return seen_BT.clamp_min(1)
