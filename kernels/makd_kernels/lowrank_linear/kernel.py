"""The low-rank chain in Triton: the narrow product of a tile of rows never leaves the chip.

out = (x @ first) @ second for x (N, K), first (K, R), second (R, M), any strides; the narrow
product, which the backward's matmuls need, is written once on the side. The gradient of x is the
same chain with the factors transposed and in the other order.
"""

# N rows, K inputs, R rank, M outputs

import triton
import triton.language as tl


@triton.jit
def _chain_kernel(
    x, first, second, bias, narrow, out, row_count, inputs, outputs,
    stride_xn, stride_xk, stride_fk, stride_fr, stride_sr, stride_sm,
    BIAS: tl.constexpr, RANK: tl.constexpr, PADDED_R: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """All outputs of one tile of rows."""
    rows = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    ranks = tl.arange(0, PADDED_R)
    inside = (rows < row_count)[:, None]
    real = ranks < RANK
    x_rows = x + rows.to(tl.int64)[:, None] * stride_xn
    total = tl.zeros([TILE_N, PADDED_R], tl.float32)
    for start in range(0, inputs, TILE_K):
        columns = start + tl.arange(0, TILE_K)
        left = tl.load(
            x_rows + columns[None, :] * stride_xk,
            mask=inside & (columns < inputs)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            first + columns[:, None] * stride_fk + ranks[None, :] * stride_fr,
            mask=(columns < inputs)[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        total += tl.dot(left, right, input_precision="ieee")
    middle = total.to(out.dtype.element_ty)
    narrow += rows.to(tl.int64)[:, None] * RANK + ranks[None, :]
    tl.store(narrow, middle, mask=inside & real[None, :])
    for start in range(0, outputs, TILE_M):
        columns = start + tl.arange(0, TILE_M)
        right = tl.load(
            second + ranks[:, None] * stride_sr + columns[None, :] * stride_sm,
            mask=real[:, None] & (columns < outputs)[None, :], other=0.0,
        )  # fmt: skip
        product = tl.dot(middle, right, input_precision="ieee")
        if BIAS:
            product += tl.load(bias + columns, mask=columns < outputs, other=0.0)[None, :]
        at = rows.to(tl.int64)[:, None] * outputs + columns[None, :]
        tl.store(
            out + at, product.to(out.dtype.element_ty), mask=inside & (columns < outputs)[None, :]
        )
