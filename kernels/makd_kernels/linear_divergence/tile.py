"""A few rows of logits at a time: their cross-entropy, their divergence, their gradient.

A tile of logits is copied to buffers in fp32 that all tiles share and that fit a core's cache, so
the many elementwise passes never reach main memory.
"""

# N tokens, n tokens of a chunk, R rows of a tile, V vocabulary

from typing import NamedTuple

import torch
from torch import Tensor

from makd_kernels.divergences import DIVERGENCES, Rows, Weights, exponentials
from makd_kernels.linear_divergence.settings import IGNORED_LABEL, Settings

TILE_BYTES_CPU = 2**19  # of one buffer, per thread; a tile has four
TILE_BYTES_OTHER = 2**27


class RowWeights(NamedTuple):
    """The gradient that flows into each row's cross-entropy and divergence."""

    cross_entropy_N: Tensor
    divergence_N: Tensor


class Tile:
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
        dtype = torch.promote_types(student_ND.dtype, torch.float32)
        if teacher_NE is not None:
            dtype = torch.promote_types(dtype, teacher_NE.dtype)
        self.temperature = settings.temperature
        self.formula = DIVERGENCES[settings.divergence](settings.beta)
        self.tile_rows = _tile_rows(vocab, dtype, student_ND.device)

        zeros_N = torch.zeros(student_ND.shape[0], dtype=dtype, device=student_ND.device)
        self.cross_entropy_N = zeros_N
        self.divergence_N = None if teacher_NE is None else torch.zeros_like(zeros_N)
        self.label_N1 = self.counted_N1 = None
        if labels_N is not None:
            self.counted_N1 = (labels_N != IGNORED_LABEL).to(dtype)[:, None]
            self.label_N1 = labels_N.clamp_min(0)[:, None]
        self.weights_N1 = None
        if weights is not None:
            # d/ds of temperature^2 D(s / temperature) is temperature times D's gradient
            divergence_N1 = weights.divergence_N.to(dtype)[:, None] * self.temperature
            cross_entropy_N1 = weights.cross_entropy_N.to(dtype)[:, None]
            if self.counted_N1 is not None:
                cross_entropy_N1 = cross_entropy_N1 * self.counted_N1
            self.weights_N1 = Weights(divergence_N1, cross_entropy_N1)

        rows = min(self.tile_rows, student_ND.shape[0])
        two_temperatures = self.temperature != 1.0 and None not in (teacher_NE, labels_N)
        self.buffers = {
            name: torch.empty(rows, vocab, dtype=dtype, device=student_ND.device)
            for name, used in (
                ("student", True),
                ("student exp", True),
                ("teacher", teacher_NE is not None),
                ("teacher exp", teacher_NE is not None),
                ("cross-entropy gradient", two_temperatures and weights is not None),
            )
            if used
        }

    def reduce(self, chunk: slice, student_nV: Tensor, teacher_nV: Tensor | None) -> None:
        """Values of the chunk's rows; with weights, `student_nV` becomes its own gradient."""
        for first in range(0, student_nV.shape[0], self.tile_rows):
            part = slice(first, min(student_nV.shape[0], first + self.tile_rows))
            rows = slice(chunk.start + part.start, chunk.start + part.stop)
            teacher_RV = None if teacher_nV is None else teacher_nV[part]
            gradient_RV = self._tile(rows, student_nV[part], teacher_RV)
            if self.weights_N1 is not None:
                student_nV[part].copy_(gradient_RV)

    def _tile(self, rows: slice, student_RV: Tensor, teacher_RV: Tensor | None) -> Tensor:
        """Write the rows' values; returns their gradient (meaningless without weights)."""
        logits = self._buffer("student", student_RV).copy_(student_RV)
        exp = self._buffer("student exp", student_RV)
        weights = None
        if self.weights_N1 is not None:
            weights = Weights(self.weights_N1.divergence[rows], self.weights_N1.student[rows])
        if self.label_N1 is None:
            assert teacher_RV is not None, "neither labels nor a teacher"
            s = exponentials(self._heat(logits), exp)
            return self._divergence(rows, teacher_RV, s, weights and Weights(weights.divergence))

        s = exponentials(logits, exp)
        label_R1, counted_R1 = self.label_N1[rows], self.counted_N1[rows]
        value_R1 = (s.sum.log() - logits.gather(-1, label_R1)) * counted_R1
        self.cross_entropy_N[rows] = value_R1.squeeze(-1)
        if teacher_RV is None:
            gradient = exp if weights is None else exp.mul_(weights.student / s.sum)
        elif self.temperature == 1.0:
            gradient = self._divergence(rows, teacher_RV, s, weights)
        else:
            gradient = self._two_temperatures(rows, teacher_RV, s, weights)
        if weights is not None:
            gradient.scatter_add_(-1, label_R1, -weights.student)
        return gradient

    def _two_temperatures(
        self, rows: slice, teacher_RV: Tensor, s: Rows, weights: Weights | None
    ) -> Tensor:
        """As `_divergence`, where the cross-entropy's softmax `s` is not the divergence's."""
        kept = None
        if weights is not None:
            kept = self._buffer("cross-entropy gradient", s.exp)
            torch.mul(s.exp, weights.student / s.sum, out=kept)
            weights = Weights(weights.divergence)
        heated = exponentials(self._heat(s.logits), s.exp)
        gradient = self._divergence(rows, teacher_RV, heated, weights)
        return gradient if kept is None else gradient.add_(kept)

    def _divergence(
        self, rows: slice, teacher_RV: Tensor, s: Rows, weights: Weights | None
    ) -> Tensor:
        logits = self._heat(self._buffer("teacher", teacher_RV).copy_(teacher_RV))
        t = exponentials(logits, self._buffer("teacher exp", teacher_RV))
        value_R1 = self.formula(t, s, weights, True)
        self.divergence_N[rows] = value_R1.squeeze(-1) * self.temperature**2
        return s.exp

    def _heat(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1.0 else logits.mul_(1.0 / self.temperature)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        return self.buffers[name][: like.shape[0]]


def _tile_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    tile_bytes = TILE_BYTES_OTHER
    if device.type == "cpu":
        tile_bytes = TILE_BYTES_CPU * torch.get_num_threads()
    return max(1, tile_bytes // (vocab * dtype.itemsize))
