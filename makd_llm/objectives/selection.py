"""Features of the teacher in the order of a student that has only some of them, or has them
permuted.
"""
# B batch, T tokens, M features of the teacher, N of the student

from collections.abc import Sequence

import torch
from torch import Tensor


class Selection:
    """Picks features, (B, T, M) to (B, T, N). Calling it again on one device copies nothing to it.

    features: N numbers below M.
    """

    def __init__(self, features: Sequence[int]) -> None:
        self._features_N = torch.tensor(features)

    def __call__(self, x_BTM: Tensor) -> Tensor:
        self._features_N = self._features_N.to(x_BTM.device)
        return x_BTM.index_select(-1, self._features_N)
