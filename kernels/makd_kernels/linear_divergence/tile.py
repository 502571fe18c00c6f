"""A few rows of logits at a time: their cross-entropy, their divergence, their gradient.

A tile of logits is copied to buffers in fp32 that all tiles share and that fit a core's cache, so
the many elementwise passes never reach main memory.
"""

# N tokens, n tokens of a chunk, R rows of a tile, V vocabulary

from typing import NamedTuple

import torch
from torch import Tensor

from makd_kernels.divergences import DIVERGENCES, Rows, Weights, exponentials
from makd_kernels.linear_divergence.settings import IGNORED_LABEL, RowWeights, Settings

TILE_BYTES_CPU = 2**20  # of one buffer, per thread; a tile has four
TILE_BYTES_OTHER = 2**27


class _Labels(NamedTuple):
    """Each row's label (0 where ignored), and 1 where it counts, 0 where it is ignored."""

    index_N1: Tensor
    counted_N1: Tensor


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
        self.formula = DIVERGENCES[settings.divergence](settings.beta, settings.alpha)
        self.tile_rows = _tile_rows(vocab, dtype, student_ND.device)

        zeros_N = torch.zeros(student_ND.shape[0], dtype=dtype, device=student_ND.device)
        self.cross_entropy_N, self.divergence_N = zeros_N, torch.zeros_like(zeros_N)
        self.labels = None
        if labels_N is not None:
            counted_N1 = (labels_N != IGNORED_LABEL).to(dtype)[:, None]
            self.labels = _Labels(labels_N.clamp_min(0)[:, None], counted_N1)
        self.weights = None
        if weights is not None:
            cross_entropy_N1 = weights.cross_entropy_N.to(dtype)[:, None]
            if self.labels is not None:
                cross_entropy_N1 = cross_entropy_N1 * self.labels.counted_N1
            # d/ds of temperature^2 D(s / temperature) is temperature times D's gradient
            divergence_N1 = weights.divergence_N.to(dtype)[:, None] * self.temperature
            self.weights = RowWeights(cross_entropy_N1, divergence_N1)

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
            if self.weights is not None:
                student_nV[part].copy_(gradient_RV)

    def _tile(self, rows: slice, student_RV: Tensor, teacher_RV: Tensor | None) -> Tensor:
        """Write the rows' values; returns their gradient (meaningless without weights)."""
        logits = self._buffer("student", student_RV).copy_(student_RV)
        exp = self._buffer("student exp", student_RV)
        weights = None
        if self.weights is not None:
            weights = RowWeights(*(weight_N1[rows] for weight_N1 in self.weights))
        if self.labels is None:
            assert teacher_RV is not None, "neither labels nor a teacher"
            s = exponentials(self._heat(logits), exp)
            return self._divergence(rows, teacher_RV, s, weights and Weights(weights.divergence_N))

        s = exponentials(logits, exp)
        label_R1, counted_R1 = self.labels.index_N1[rows], self.labels.counted_N1[rows]
        value_R1 = (s.sum.log() - logits.gather(-1, label_R1)) * counted_R1
        self.cross_entropy_N[rows] = value_R1.squeeze(-1)
        if teacher_RV is None:
            gradient = exp if weights is None else exp.mul_(weights.cross_entropy_N / s.sum)
        elif self.temperature == 1.0:
            both = weights and Weights(weights.divergence_N, weights.cross_entropy_N)
            gradient = self._divergence(rows, teacher_RV, s, both)
        else:
            gradient = self._two_temperatures(rows, teacher_RV, s, weights)
        if weights is not None:
            gradient.scatter_add_(-1, label_R1, -weights.cross_entropy_N)
        return gradient

    def _two_temperatures(
        self, rows: slice, teacher_RV: Tensor, s: Rows, weights: RowWeights | None
    ) -> Tensor:
        """As `_divergence`, where the cross-entropy's softmax `s` is not the divergence's."""
        kept = None
        if weights is not None:
            kept = self._buffer("cross-entropy gradient", s.exp)
            torch.mul(s.exp, weights.cross_entropy_N / s.sum, out=kept)
        heated = exponentials(self._heat(s.logits), s.exp)
        alone = weights and Weights(weights.divergence_N)
        gradient = self._divergence(rows, teacher_RV, heated, alone)
        return gradient if kept is None else gradient.add_(kept)

    def _divergence(
        self, rows: slice, teacher_RV: Tensor, s: Rows, weights: Weights | None
    ) -> Tensor:
        """Write the rows' divergence; returns the student's exponentials, now their gradient."""
        logits = self._heat(self._buffer("teacher", teacher_RV).copy_(teacher_RV))
        t = exponentials(logits, self._buffer("teacher exp", teacher_RV))
        value_R1 = self.formula(t, s, weights, True)
        assert value_R1 is not None, "the value was asked for"
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
