"""Linear divergence chunk by chunk in plain torch: any device, memory for one chunk of logits.

A *chunk* of tokens gives student and teacher logits by two matmuls in the precision of the inputs.
The chunk is then walked in *tiles* of a few rows: a tile is copied to fp32 buffers that stay in the
cache, reduced to its cross-entropy and divergence, and, where a gradient is wanted, turned into the
gradient of its logits, which overwrites the student's logits. Two more matmuls turn the chunk's
gradient into that of the hidden states and of the head. So logits exist once, for one chunk, and
everything elementwise happens in the cache.
"""

# N tokens, n tokens of a chunk, R rows of a tile, D and E hidden sizes, V vocabulary

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from makd_kernels.linear_divergence.settings import RowWeights, Settings
from makd_kernels.linear_divergence.tile import Tile

if TYPE_CHECKING:
    from makd_kernels.linear_divergence.launch import Rows

CHUNK_BYTES_CPU = 2**27
CHUNK_BYTES_OTHER = 2**30


class Inputs(NamedTuple):
    """The tensors of a call; labels or the teacher may be absent."""

    student_ND: Tensor
    student_head_VD: Tensor
    labels_N: Tensor | None
    teacher_NE: Tensor | None
    teacher_head_VE: Tensor | None


class Result(NamedTuple):
    """Values per row, and the gradients that were needed."""

    cross_entropy_N: Tensor
    divergence_N: Tensor | None
    grad_student_ND: Tensor | None
    grad_head_VD: Tensor | None


def sweep(
    inputs: Inputs,
    settings: Settings,
    impl: str,
    weights: RowWeights | None = None,
    needed: tuple[bool, bool] = (False, False),
) -> Result:
    """Values of all rows and, for the `needed` student inputs, the gradient under `weights`.

    `impl` says what reduces a chunk's logits: "torch" tile by tile, "triton" one kernel.
    """
    student_ND, student_head_VD, _, teacher_NE, teacher_head_VE = inputs
    vocab = settings.vocab_size
    head_VD = student_head_VD[:vocab]
    tokens = student_ND.shape[0]
    if not any(needed):
        weights = None
    chunks = _reducer(impl)(
        student_ND, teacher_NE, inputs.labels_N, head_VD.shape[0], settings, weights
    )
    chunk = _chunk_rows(inputs, settings)
    student_logits_nV = head_VD.new_empty(chunk, head_VD.shape[0])
    teacher_logits_nV = None
    if teacher_head_VE is not None:
        teacher_logits_nV = teacher_head_VE.new_empty(chunk, head_VD.shape[0])
    grad_student_ND = torch.empty_like(student_ND) if needed[0] else None
    grad_head = (
        _HeadGradient(student_head_VD, head_VD.shape[0], tokens > chunk) if needed[1] else None
    )

    for start in range(0, tokens, chunk):
        chunk_rows = slice(start, min(tokens, start + chunk))
        x_nD = student_ND[chunk_rows]
        s_nV = torch.mm(x_nD, head_VD.T, out=student_logits_nV[: x_nD.shape[0]])
        t_nV = None
        if teacher_logits_nV is not None and teacher_NE is not None and teacher_head_VE is not None:
            y_nE = teacher_NE[chunk_rows]
            t_nV = torch.mm(y_nE, teacher_head_VE[:vocab].T, out=teacher_logits_nV[: y_nE.shape[0]])
        chunks.reduce(chunk_rows, s_nV, t_nV)
        if grad_student_ND is not None:
            torch.mm(s_nV, head_VD, out=grad_student_ND[chunk_rows])
        if grad_head is not None:
            grad_head.add(s_nV, x_nD)

    return Result(
        chunks.cross_entropy_N,
        None if teacher_NE is None else chunks.divergence_N,
        grad_student_ND,
        None if grad_head is None else grad_head.total(),
    )


def _reducer(impl: str) -> "type[Tile] | type[Rows]":
    """What reduces the logits of a chunk; Triton is imported where it is asked for."""
    if impl == "torch":
        return Tile
    from makd_kernels.linear_divergence.launch import Rows

    return Rows


class _HeadGradient:
    """Sum over chunks of gradient^T @ hidden; in fp32 where half precision chunks add up."""

    def __init__(self, head_VD: Tensor, vocab: int, several: bool) -> None:
        self.dtype = head_VD.dtype
        sum_dtype = torch.promote_types(self.dtype, torch.float32) if several else self.dtype
        self.sum_VD = torch.empty_like(head_VD, dtype=sum_dtype)
        self.sum_VD[vocab:] = 0
        self.real_VD = self.sum_VD[:vocab]
        self.part_VD = None
        if sum_dtype != self.dtype:
            self.part_VD = torch.empty_like(self.real_VD, dtype=self.dtype)
        self.empty = True

    def add(self, grad_logits_nV: Tensor, hidden_nD: Tensor) -> None:
        if self.part_VD is not None:
            torch.mm(grad_logits_nV.T, hidden_nD, out=self.part_VD)
            if self.empty:
                self.real_VD.copy_(self.part_VD)
            else:
                self.real_VD.add_(self.part_VD)
        elif self.empty:
            torch.mm(grad_logits_nV.T, hidden_nD, out=self.real_VD)
        else:
            self.real_VD.addmm_(grad_logits_nV.T, hidden_nD)
        self.empty = False

    def total(self) -> Tensor:
        if self.empty:
            self.real_VD.zero_()
        return self.sum_VD.to(self.dtype)


def _chunk_rows(inputs: Inputs, settings: Settings) -> int:
    """Tokens of a chunk: as many as the budget holds, spread evenly over the chunks."""
    student_ND, student_head_VD, _, _, teacher_head_VE = inputs
    budget = settings.chunk_bytes
    if budget is None:
        budget = CHUNK_BYTES_CPU if student_ND.device.type == "cpu" else CHUNK_BYTES_OTHER
    vocab = settings.vocab_size or student_head_VD.shape[0]
    row_bytes = vocab * student_head_VD.element_size()
    if teacher_head_VE is not None:
        row_bytes += vocab * teacher_head_VE.element_size()
    most = max(1, budget // row_bytes)
    chunks = max(1, -(-student_ND.shape[0] // most))
    return max(1, -(-student_ND.shape[0] // chunks))
