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
