"""The host side of the Triton kernel: narrow products by plain matmuls, wide ones fused."""

# N rows, K inputs, R and S the ranks of gate and up, M outputs

import torch
import triton
from torch import Tensor

from makd_kernels.launching import INTERPRETED, Tiles
from makd_kernels.lowrank_swiglu import kernel

RANK_TILE = 64


def tiles(dtype: torch.dtype, *, backward: bool) -> Tiles:
    """Tile sizes, on any architecture."""
    if INTERPRETED:
        return Tiles(16, 16, 1, 1)
    if dtype == torch.float32:
        return Tiles(64, 64, 8, 2)
    return Tiles(128, 64 if backward else 128, 8, 3)


def forward(
    x_NK: Tensor, gate_down_RK: Tensor, gate_up_MR: Tensor, up_down_SK: Tensor, up_up_MS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_NM, and the narrow products (N, R) of the gate and (N, S) of the up side)."""
    gate_NR, up_NS = x_NK @ gate_down_RK.T, x_NK @ up_down_SK.T
    y_NM = x_NK.new_empty(x_NK.shape[0], gate_up_MR.shape[0])
    _launch(gate_NR, gate_up_MR, up_NS, up_up_MS, y_NM, y_NM, y_NM, backward=False)
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
    grad_NM = grad_NM.contiguous()
    grad_gate_NM, grad_up_NM = torch.empty_like(grad_NM), torch.empty_like(grad_NM)
    _launch(gate_NR, gate_up_MR, up_NS, up_up_MS, grad_NM, grad_gate_NM, grad_up_NM, backward=True)
    grad_gate_NR, grad_up_NS = grad_gate_NM @ gate_up_MR, grad_up_NM @ up_up_MS
    grad_x_NK = torch.addmm(grad_gate_NR @ gate_down_RK, grad_up_NS, up_down_SK)
    return (
        grad_x_NK,
        grad_gate_NR.T @ x_NK,
        grad_gate_NM.T @ gate_NR,
        grad_up_NS.T @ x_NK,
        grad_up_NM.T @ up_NS,
    )


def _launch(
    gate_NR: Tensor,
    gate_up_MR: Tensor,
    up_NS: Tensor,
    up_up_MS: Tensor,
    grad_NM: Tensor,
    out_NM: Tensor,
    grad_up_NM: Tensor,
    *,
    backward: bool,
) -> None:
    rows, outputs = out_NM.shape
    if rows == 0:
        return
    gate_up_MR, up_up_MS = gate_up_MR.contiguous(), up_up_MS.contiguous()
    tile = tiles(out_NM.dtype, backward=backward)
    grid = (triton.cdiv(rows, tile.m) * triton.cdiv(outputs, tile.n),)
    kernel._swiglu_kernel[grid](
        gate_NR, gate_up_MR, up_NS, up_up_MS, grad_NM, out_NM, grad_up_NM,
        rows, outputs, gate_NR.shape[1], up_NS.shape[1],
        gate_NR.stride(0), gate_up_MR.stride(0), up_NS.stride(0), up_up_MS.stride(0),
        BACKWARD=backward, TILE_N=tile.m, TILE_M=tile.n,
        TILE_R=16 if INTERPRETED else RANK_TILE,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
