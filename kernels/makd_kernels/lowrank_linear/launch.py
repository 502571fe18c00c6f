"""The host side of the chain kernel."""

# N rows, K inputs, R rank, M outputs

import torch
import triton
from torch import Tensor

from makd_kernels.launching import INTERPRETED, Tiles, architecture, padded_size
from makd_kernels.lowrank_linear import kernel


def tiles(rank: int, dtype: torch.dtype, arch: int) -> Tiles:
    """Rows of a tile, and the inputs and outputs that it takes at a time."""
    if INTERPRETED:
        return Tiles(16, 16, 1, 1)
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2) if rank <= 64 else Tiles(16, 32, 4, 2)
    if rank <= 128:
        return Tiles(128, 64, 8, 3)
    return Tiles(64, 64, 8, 3) if arch >= 90 else Tiles(64, 32, 8, 2)


def chain(
    x_NK: Tensor, first_KR: Tensor, second_RM: Tensor, bias_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x @ first @ second + bias, x @ first)."""
    rows, inputs = x_NK.shape
    rank, outputs = second_RM.shape
    out_NM, narrow_NR = x_NK.new_empty(rows, outputs), x_NK.new_empty(rows, rank)
    if rows == 0:
        return out_NM, narrow_NR
    tile = tiles(rank, x_NK.dtype, architecture(x_NK.device))
    kernel._chain_kernel[(triton.cdiv(rows, tile.m),)](
        x_NK, first_KR, second_RM, out_NM if bias_M is None else bias_M, narrow_NR, out_NM,
        rows, inputs, outputs, *x_NK.stride(), *first_KR.stride(), *second_RM.stride(),
        BIAS=bias_M is not None, RANK=rank, PADDED_R=padded_size(rank),
        TILE_N=tile.m, TILE_K=tile.n, TILE_M=tile.n,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_NM, narrow_NR


def forward(
    x_NK: Tensor, down_RK: Tensor, up_MR: Tensor, bias_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y_NM, x @ down^T)."""
    return chain(x_NK, down_RK.T, up_MR.T, bias_M)


def backward(
    grad_NM: Tensor, x_NK: Tensor, down_RK: Tensor, up_MR: Tensor, narrow_NR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, down and up."""
    grad_x_NK, grad_NR = chain(grad_NM, up_MR, down_RK, None)
    return grad_x_NK, torch.mm(grad_NR.T, x_NK), torch.mm(grad_NM.T, narrow_NR)
