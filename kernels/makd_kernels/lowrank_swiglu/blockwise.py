"""Low-rank SwiGLU a few rows at a time: its wide products live only as long as a block of rows.

Eager torch keeps three tensors of N x M for the backward: gate, up and silu(gate). Here a block of
rows makes its gate and up, combines them, and forgets them. What is kept is the narrow x @ down^T
of both sides; the backward makes the wide products again from that, two matmuls of rank R.
"""

# N rows, n rows of a block, K inputs, R and S the ranks of gate and up, M outputs

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS_CPU = 1024  # a factor is packed anew for every matmul, which few rows do not pay for
BLOCK_ELEMENTS_OTHER = 2**26  # of one wide buffer; a block has up to three


def forward(
    x_NK: Tensor, gate_down_RK: Tensor, gate_up_MR: Tensor, up_down_SK: Tensor, up_up_MS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_NM, and the narrow products (N, R) of the gate and (N, S) of the up side)."""
    gate_NR, up_NS = x_NK @ gate_down_RK.T, x_NK @ up_down_SK.T
    y_NM = x_NK.new_empty(x_NK.shape[0], gate_up_MR.shape[0])
    wide = _Wide(y_NM, 2)
    for rows in wide.blocks():
        gate_nM, up_nM = wide.buffers(rows)
        torch.mm(gate_NR[rows], gate_up_MR.T, out=gate_nM)
        torch.mm(up_NS[rows], up_up_MS.T, out=up_nM)
        torch.mul(F.silu(gate_nM, inplace=True), up_nM, out=y_NM[rows])
    return y_NM, gate_NR, up_NS


def backward(
    grad_NM: Tensor,
    x_NK: Tensor,
    gate_down_RK: Tensor,
    gate_up_MR: Tensor,
    up_down_SK: Tensor,
    up_up_MS: Tensor,
    gate_NR: Tensor,
    up_NS: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the gate's down and up, and of the up side's down and up."""
    sum_dtype = torch.promote_types(x_NK.dtype, torch.float32)
    grad_gate_NR, grad_up_NS = torch.empty_like(gate_NR), torch.empty_like(up_NS)
    grad_gate_up_MR = torch.zeros_like(gate_up_MR, dtype=sum_dtype)
    grad_up_up_MS = torch.zeros_like(up_up_MS, dtype=sum_dtype)
    wide = _Wide(grad_NM, 3)
    for rows in wide.blocks():
        gate_nM, up_nM, silu_nM = wide.buffers(rows)
        torch.mm(gate_NR[rows], gate_up_MR.T, out=gate_nM)
        torch.mm(up_NS[rows], up_up_MS.T, out=up_nM)
        torch.ops.aten.silu.out(gate_nM, out=silu_nM)
        grad_nM = grad_NM[rows]
        grad_gate_nM = up_nM.mul_(grad_nM)
        torch.ops.aten.silu_backward.grad_input(grad_gate_nM, gate_nM, grad_input=grad_gate_nM)
        grad_up_nM = silu_nM.mul_(grad_nM)
        torch.mm(grad_gate_nM, gate_up_MR, out=grad_gate_NR[rows])
        torch.mm(grad_up_nM, up_up_MS, out=grad_up_NS[rows])
        _accumulate(grad_gate_up_MR, grad_gate_nM.T, gate_NR[rows])
        _accumulate(grad_up_up_MS, grad_up_nM.T, up_NS[rows])
    grad_x_NK = torch.addmm(grad_gate_NR @ gate_down_RK, grad_up_NS, up_down_SK)
    return (
        grad_x_NK,
        grad_gate_NR.T @ x_NK,
        grad_gate_up_MR.to(gate_up_MR.dtype),
        grad_up_NS.T @ x_NK,
        grad_up_up_MS.to(up_up_MS.dtype),
    )


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _Wide:
    """Blocks of rows of a wide tensor, and the buffers that they share."""

    def __init__(self, like_NM: Tensor, count: int) -> None:
        self.rows, width = like_NM.shape
        most = BLOCK_ROWS_CPU
        if like_NM.device.type != "cpu":
            most = max(1, BLOCK_ELEMENTS_OTHER // width)
        self.block = max(1, min(self.rows, most))
        self.held = [like_NM.new_empty(self.block, width) for _ in range(count)]

    def blocks(self) -> list[slice]:
        """All rows, cut."""
        starts = range(0, self.rows, self.block)
        return [slice(start, min(self.rows, start + self.block)) for start in starts]

    def buffers(self, rows: slice) -> list[Tensor]:
        """One buffer each of the block's size; their old content is lost."""
        return [buffer[: rows.stop - rows.start] for buffer in self.held]
