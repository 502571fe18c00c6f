"""The host side of the Triton kernel: `Rows` does for a chunk of logits what `tile.Tile` does."""

# N tokens, n tokens of a chunk, V vocabulary

import torch
from torch import Tensor

from makd_kernels.launching import INTERPRETED, where_it_is
from makd_kernels.linear_divergence import kernel
from makd_kernels.linear_divergence.settings import RowWeights, Settings

CODES = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "jsd": 2,
    "skew_forward_kl": 3,
    "skew_reverse_kl": 4,
    "tvd": 5,
}
WARPS = 8


def tile_size(dtype: torch.dtype) -> int:
    """How much of a row a program holds at a time."""
    if INTERPRETED:
        return 64
    return 2048 if dtype == torch.float32 else 4096


class Rows:
    """Reduces chunks of logits; `cross_entropy_N` and `divergence_N` fill up row by row."""

    def __init__(
        self,
        student_ND: Tensor,
        teacher_NE: Tensor | None,
        labels_N: Tensor | None,
        vocab: int,
        settings: Settings,
        weights: RowWeights | None,
    ) -> None:
        self.labels_N, self.vocab, self.settings, self.weights = labels_N, vocab, settings, weights
        zeros_N = torch.zeros(student_ND.shape[0], dtype=torch.float32, device=student_ND.device)
        self.cross_entropy_N, self.divergence_N = zeros_N, torch.zeros_like(zeros_N)
        if weights is not None:
            self.weights = RowWeights(*(weight_N.float().contiguous() for weight_N in weights))

    def reduce(self, chunk: slice, student_nV: Tensor, teacher_nV: Tensor | None) -> None:
        """Values of the chunk's rows; with weights, `student_nV` becomes its own gradient."""
        rows = student_nV.shape[0]
        if rows == 0:
            return
        cross_entropy_n, divergence_n = self.cross_entropy_N[chunk], self.divergence_N[chunk]
        weights = self.weights or RowWeights(self.cross_entropy_N, self.divergence_N)
        code = -1 if teacher_nV is None else CODES[self.settings.divergence]
        with where_it_is(student_nV):
            kernel._rows_kernel[(rows,)](
                student_nV,
                student_nV if teacher_nV is None else teacher_nV,
                student_nV if self.labels_N is None else self.labels_N[chunk],
                weights.cross_entropy_N[chunk],
                weights.divergence_N[chunk],
                cross_entropy_n,
                divergence_n,
                student_nV.stride(0),
                0 if teacher_nV is None else teacher_nV.stride(0),
                self.vocab,
                self.settings.temperature,
                self.settings.beta,
                self.settings.alpha,
                DIVERGENCE=code,
                LABELS=self.labels_N is not None,
                HEATED=self.settings.temperature != 1.0,
                GRADIENT=self.weights is not None,
                TILE_V=tile_size(student_nV.dtype),
                num_warps=WARPS,
            )
