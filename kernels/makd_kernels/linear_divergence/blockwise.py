"""Linear divergence chunk by chunk in plain torch: any device, memory for one chunk of logits.

A *chunk* of tokens gives student and teacher logits by two matmuls in the precision of the inputs.
The chunk is then walked in *tiles* of a few rows: a tile is copied to fp32 buffers that stay in the
cache, reduced to its cross-entropy and divergence, and, where a gradient is wanted, turned into the
gradient of its logits, which overwrites the student's logits. Two more matmuls turn the chunk's
gradient into that of the hidden states and of the head. So logits exist once, for one chunk, and
everything elementwise happens in the cache.
"""

# N tokens, n tokens of a chunk, R rows of a tile, D and E hidden sizes, V vocabulary

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from makd_kernels.linear_divergence.settings import Settings
from makd_kernels.linear_divergence.tile import RowWeights, Tile

CHUNK_BYTES_CPU = 2**27
CHUNK_BYTES_OTHER = 2**30


class _Inputs(NamedTuple):
    student_ND: Tensor
    student_head_VD: Tensor
    labels_N: Tensor | None
    teacher_NE: Tensor | None
    teacher_head_VE: Tensor | None


class _Result(NamedTuple):
    cross_entropy_N: Tensor
    divergence_N: Tensor | None
    grad_student_ND: Tensor | None
    grad_head_VD: Tensor | None


def rows(
    student_ND: Tensor,
    student_head_VD: Tensor,
    labels_N: Tensor | None,
    teacher_NE: Tensor | None,
    teacher_head_VE: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor | None]:
    """(cross_entropy_N, divergence_N). See `linear_cross_entropy_divergence`."""
    values: tuple[Tensor, Tensor | None] = _Rows.apply(
        student_ND,
        student_head_VD,
        labels_N,
        _detached(teacher_NE),
        _detached(teacher_head_VE),
        settings,
    )
    return values


def loss(
    student_ND: Tensor,
    student_head_VD: Tensor,
    labels_N: Tensor,
    teacher_NE: Tensor | None,
    teacher_head_VE: Tensor | None,
    weights: tuple[float, float],
    weight_N: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, cross_entropy_N, divergence_N). See `linear_cross_entropy_divergence_loss`."""
    values: tuple[Tensor, Tensor, Tensor | None] = _Loss.apply(
        student_ND,
        student_head_VD,
        labels_N,
        _detached(teacher_NE),
        _detached(teacher_head_VE),
        weights,
        weight_N,
        settings,
        torch.is_grad_enabled(),
    )
    return values


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


class _Rows(torch.autograd.Function):
    """Per-row values; the backward makes the logits again, with the gradients that came in."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        student_head_VD: Tensor,
        labels_N: Tensor | None,
        teacher_NE: Tensor | None,
        teacher_head_VE: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = _Inputs(student_ND, student_head_VD, labels_N, teacher_NE, teacher_head_VE)
        ctx.save_for_backward(*inputs)
        ctx.settings = settings
        result = _sweep(inputs, settings)
        return result.cross_entropy_N, result.divergence_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_cross_entropy_N: Tensor, grad_divergence_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_divergence_N is None:
            grad_divergence_N = torch.zeros_like(grad_cross_entropy_N)
        weights = RowWeights(grad_cross_entropy_N, grad_divergence_N)
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        result = _sweep(_Inputs(*ctx.saved_tensors), ctx.settings, weights, needed)
        labels = teacher = settings = None
        return (
            result.grad_student_ND,
            result.grad_head_VD,
            labels,
            teacher,
            teacher,
            settings,
        )


class _Loss(torch.autograd.Function):
    """The weighted sum; keeps the gradients of hidden states and head, and no weight."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        student_head_VD: Tensor,
        labels_N: Tensor,
        teacher_NE: Tensor | None,
        teacher_head_VE: Tensor | None,
        weights: tuple[float, float],
        weight_N: Tensor | None,
        settings: Settings,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = _Inputs(student_ND, student_head_VD, labels_N, teacher_NE, teacher_head_VE)
        needed = (
            grad_enabled and ctx.needs_input_grad[0],
            grad_enabled and ctx.needs_input_grad[1],
        )
        row_weights = None
        # the weights' common size is left for the backward, so that fp16 does not lose small ones
        ctx.size = max(abs(weights[0]), abs(weights[1])) or 1.0
        if any(needed):
            dtype = torch.promote_types(student_ND.dtype, torch.float32)
            row_N = student_ND.new_ones(student_ND.shape[0], dtype=dtype)
            row_N = row_N if weight_N is None else weight_N.to(dtype)
            row_weights = RowWeights(*(row_N * (weight / ctx.size) for weight in weights))
        result = _sweep(inputs, settings, row_weights, needed)
        ctx.kept = (result.grad_student_ND, result.grad_head_VD)
        cross_entropy_N, divergence_N = result.cross_entropy_N, result.divergence_N
        if weight_N is not None:
            cross_entropy_N.mul_(weight_N)
            if divergence_N is not None:
                divergence_N.mul_(weight_N)
        total = cross_entropy_N.sum() * weights[0]
        if divergence_N is None:
            ctx.mark_non_differentiable(cross_entropy_N)
        else:
            total = total + divergence_N.sum() * weights[1]
            ctx.mark_non_differentiable(cross_entropy_N, divergence_N)
        return total, cross_entropy_N, divergence_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor, __: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.kept is None:
            raise RuntimeError(
                "linear_cross_entropy_divergence_loss hands its gradient over once; to go backward "
                "twice, use linear_cross_entropy_divergence"
            )
        # scaled in place and given away: a copy of the head's gradient would cost a tenth of the op
        grad_student, grad_head = (
            None if kept is None else kept.mul_(grad * ctx.size) for kept in ctx.kept
        )
        ctx.kept = None
        labels = teacher = weights = settings = None
        return (
            grad_student,
            grad_head,
            labels,
            teacher,
            teacher,
            weights,
            weights,
            settings,
            settings,
        )


def _sweep(
    inputs: _Inputs,
    settings: Settings,
    weights: RowWeights | None = None,
    needed: tuple[bool, bool] = (False, False),
) -> _Result:
    """Values of all rows and, for the `needed` student inputs, the gradient under `weights`."""
    student_ND, student_head_VD, _, teacher_NE, teacher_head_VE = inputs
    vocab = settings.vocab_size
    head_VD = student_head_VD[:vocab]
    tokens = student_ND.shape[0]
    tile = Tile(student_ND, teacher_NE, inputs.labels_N, head_VD.shape[0], settings, weights)
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
        tile.reduce(chunk_rows, s_nV, t_nV)
        if grad_student_ND is not None:
            torch.mm(s_nV, head_VD, out=grad_student_ND[chunk_rows])
        if grad_head is not None:
            grad_head.add(s_nV, x_nD)

    return _Result(
        tile.cross_entropy_N,
        None if teacher_NE is None else tile.divergence_N,
        grad_student_ND,
        None if grad_head is None else grad_head.total(),
    )


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


def _chunk_rows(inputs: _Inputs, settings: Settings) -> int:
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
