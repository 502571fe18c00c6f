"""Low-rank SwiGLU in Triton: both wide products of a tile are made, combined, and written once.

The forward writes silu(g) u and nothing else that is wide. The backward makes g and u of a tile
again from the narrow products and writes the gradients of both; four plain matmuls take it from
there. g and u stay in fp32 until they are combined.
"""

# N rows, R and S the ranks of gate and up, M outputs

import triton
import triton.language as tl


@triton.jit
def _wide(
    narrow, factor, rows, columns, row_count, column_count, rank, stride_n, stride_m,
    TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """rows of `narrow` (N, R) times columns of `factor` (M, R), transposed; fp32."""
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    for start in range(0, rank, TILE_R):
        middle = start + tl.arange(0, TILE_R)
        left = tl.load(
            narrow + rows[:, None] * stride_n + middle[None, :],
            mask=(rows < row_count)[:, None] & (middle < rank)[None, :],
            other=0.0,
        )
        right = tl.load(
            factor + columns[:, None] * stride_m + middle[None, :],
            mask=(columns < column_count)[:, None] & (middle < rank)[None, :],
            other=0.0,
        )
        total += tl.dot(left, tl.trans(right), input_precision="ieee")
    return total


@triton.jit
def _swiglu_kernel(
    gate, gate_factor, up, up_factor, grad, out, grad_up,
    row_count, column_count, gate_rank, up_rank,
    stride_gate, stride_gate_factor, stride_up, stride_up_factor,
    BACKWARD: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """One tile of silu(g) u into `out`, or of their gradients into `out` (g) and `grad_up` (u)."""
    row_tiles = tl.cdiv(row_count, TILE_N)
    rows = tl.program_id(0) % row_tiles * TILE_N + tl.arange(0, TILE_N)
    columns = tl.program_id(0) // row_tiles * TILE_M + tl.arange(0, TILE_M)
    g = _wide(
        gate, gate_factor, rows, columns, row_count, column_count, gate_rank, stride_gate,
        stride_gate_factor, TILE_N, TILE_M, TILE_R,
    )  # fmt: skip
    u = _wide(
        up, up_factor, rows, columns, row_count, column_count, up_rank, stride_up,
        stride_up_factor, TILE_N, TILE_M, TILE_R,
    )  # fmt: skip
    at = rows.to(tl.int64)[:, None] * column_count + columns[None, :]
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    if BACKWARD:
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        dg = dy * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
        tl.store(out + at, dg.to(out.dtype.element_ty), mask=inside)
        tl.store(grad_up + at, (dy * g * sigmoid).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + at, (g * sigmoid * u).to(out.dtype.element_ty), mask=inside)
