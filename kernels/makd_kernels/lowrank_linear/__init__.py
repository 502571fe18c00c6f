"""A linear layer kept as two thin factors, and the way that is fastest for its shape.

    y = x @ down^T @ up^T + bias        down (R, K), up (M, R)

Two matmuls through the narrow middle cost R (K + M) multiplications a row against K M for the dense
matrix. Three ways exist, and `explain` says which one a shape takes and why:

* "pair": the two matmuls. An ideal fused kernel would be 1 to 12 % faster, no more: the narrow
  product is small beside what is read and written.
* "dense": where the rank is so high that the factors cost more than their product, the product is
  made first.
* "chain": one Triton kernel that keeps the narrow product of a tile of rows on the chip.

`lowrank_linear_packed` is for several matrices that read one input (q, k and v; gate and up): with
their `down`s stacked, x is read once.
"""

# N rows, K inputs, R rank, P the sum of the ranks of packed matrices, M outputs

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from makd_kernels.dispatch import choose
from makd_kernels.lean import note_of, product_of_noted
from makd_kernels.lowrank_linear.op import lowrank_chain_op
from makd_kernels.lowrank_linear.reference import lowrank_linear_reference

IMPLEMENTATIONS = ("reference", "torch", "triton")
LARGEST_CHAIN_RANK = 256  # beyond it the narrow product of a tile does not fit the chip
FEWEST_CHAIN_ROWS = 2**14  # a tile of 128 rows for each multiprocessor of an H100; not measured yet


class Path(NamedTuple):
    """How a low-rank product is computed, and why so."""

    name: str
    why: str


def explain(
    rows: int,
    inputs: int,
    rank: int,
    outputs: int,
    impl: str = "torch",
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """The way that `lowrank_linear` takes for (rows, inputs) to (rows, outputs).

    `impl` is "torch" or "triton", what impl="auto" chose by the device.
    """
    name = _way(rows, inputs, rank, outputs, impl, dtype)
    factors, product = _multiplications(rows, inputs, rank, outputs)
    counts = f"{factors:.2e} multiplications through the factors, {product:.2e} through the product"
    return Path(
        name,
        {
            "dense": f"rank {rank} is too high to save anything: {counts}",
            "chain": f"rank {rank} fits the chip, and {rows} rows give every part of it a tile",
            "pair": counts,
        }[name],
    )


def _way(rows: int, inputs: int, rank: int, outputs: int, impl: str, dtype: torch.dtype) -> str:
    through_factors, through_product = _multiplications(rows, inputs, rank, outputs)
    if through_product < through_factors:
        return "dense"
    if impl != "triton":
        return "pair"
    fits = rank <= LARGEST_CHAIN_RANK and dtype != torch.float32  # fp32 has no fast tiles
    return "chain" if fits and rows >= FEWEST_CHAIN_ROWS else "pair"


def _multiplications(rows: int, inputs: int, rank: int, outputs: int) -> tuple[int, int]:
    """(through the factors, through their product)"""
    return rows * rank * (inputs + outputs), inputs * outputs * (rank + rows)


def lowrank_linear(
    x_NK: Tensor,
    down_RK: Tensor,
    up_MR: Tensor,
    bias_M: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """x @ down^T @ up^T + bias, for any number of leading dimensions of x.

    Args:
        x_NK: inputs, (..., K).
        down_RK, up_MR: the factors of a dense (M, K) matrix.
        bias_M: added to every row.
        impl: "torch" ("pair" or "dense", as `explain` says), "triton" (the chain kernel),
            "reference" (always two matmuls), or "auto": as `explain` says for the device.

    Returns:
        (..., M) in the inputs' dtype, or autocast's. Gradients reach x, both factors and the bias.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown impl, a rank beyond the chain's.
        RuntimeError: impl="triton" where Triton cannot run.
    """
    if (
        impl == "auto"
        and x_NK.is_cpu
        and down_RK.dim() == up_MR.dim() == 2
        and (x_NK.is_floating_point())
    ):
        # The most usual way first: of a small batch's two matmuls, choosing takes as long as 5 %.
        rank, inputs = down_RK.shape
        outputs = up_MR.shape[0]
        saves = rank * (inputs + outputs) <= inputs * outputs
        if saves and (bias_M is None or bias_M.shape[0] == outputs):
            try:
                return _pair(x_NK, down_RK, up_MR, bias_M)
            except RuntimeError:  # torch's words for shapes and dtypes are its own
                check_factors("the matrix", x_NK, down_RK, up_MR)
                raise
    chosen = choose(impl, IMPLEMENTATIONS, x_NK.device.type)
    if impl == "auto" and x_NK.dtype == torch.float64:
        chosen = "torch"
    if torch.is_autocast_enabled(x_NK.device.type):
        x_NK, down_RK, up_MR, bias_M = _cast(x_NK, down_RK, up_MR, bias_M)
    check_factors("the matrix", x_NK, down_RK, up_MR)
    if bias_M is not None and bias_M.shape != up_MR.shape[:1]:
        raise ValueError(f"bias is {tuple(bias_M.shape)}; it must be ({up_MR.shape[0]},)")
    if chosen == "reference":
        return lowrank_linear_reference(x_NK, down_RK, up_MR, bias_M)
    rank, inputs = down_RK.shape
    rows = x_NK.numel() // max(inputs, 1)
    path = _way(rows, inputs, rank, up_MR.shape[0], chosen, x_NK.dtype)
    if impl == "triton":
        if rank > LARGEST_CHAIN_RANK or x_NK.dtype == torch.float64:
            raise ValueError(
                f"impl='triton' takes ranks up to {LARGEST_CHAIN_RANK} and computes in fp32; this "
                f"is rank {rank} in {x_NK.dtype}; impl='torch' takes it"
            )
        path = "chain"
    if path == "chain":
        flat_NK = x_NK.reshape(rows, inputs)
        y_NM: Tensor = lowrank_chain_op(flat_NK, down_RK, up_MR, bias_M)[0]
        return y_NM.view(*x_NK.shape[:-1], up_MR.shape[0])
    if path == "dense":
        return F.linear(x_NK, up_MR @ down_RK, bias_M)
    return _pair(x_NK, down_RK, up_MR, bias_M)


def _pair(x_NK: Tensor, down_RK: Tensor, up_MR: Tensor, bias_M: Tensor | None) -> Tensor:
    note = note_of(x_NK)
    if note is not None and not torch.is_autocast_enabled(x_NK.device.type):
        return product_of_noted(x_NK, note, down_RK, up_MR, bias_M)
    return F.linear(F.linear(x_NK, down_RK), up_MR, bias_M)


def _cast(
    x_NK: Tensor, down_RK: Tensor, up_MR: Tensor, bias_M: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What autocast does to a linear layer's inputs."""
    dtype = torch.get_autocast_dtype(x_NK.device.type)
    bias_M = None if bias_M is None else bias_M.to(dtype)
    return x_NK.to(dtype), down_RK.to(dtype), up_MR.to(dtype), bias_M


def lowrank_linear_packed(
    x_NK: Tensor,
    down_PK: Tensor,
    ups: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """`lowrank_linear` of several matrices that read one input, their `down`s stacked in `down_PK`.

    Args:
        x_NK: inputs, (..., K).
        down_PK: torch.cat of the matrices' (R_i, K) factors, best kept so.
        ups: their (M_i, R_i) factors, in the same order.
        biases: (M_i,) or None for each; None for none at all.

    Returns:
        One (..., M_i) each.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    ranks = [up.shape[1] for up in ups]
    if sum(ranks) != down_PK.shape[0]:
        raise ValueError(
            f"down_PK has {down_PK.shape[0]} rows, but the ranks of ups are {ranks}, together "
            f"{sum(ranks)}"
        )
    biases = [None] * len(ups) if biases is None else biases
    if len(biases) != len(ups):
        raise ValueError(f"{len(biases)} biases for {len(ups)} matrices")
    for index, (down_RK, up_MR) in enumerate(zip(down_PK.split(ranks), ups, strict=True)):
        check_factors(f"matrix {index}", x_NK, down_RK, up_MR)
    narrow = F.linear(x_NK, down_PK).split(ranks, dim=-1)
    return tuple(
        F.linear(narrow_NR, up_MR, bias_M)
        for narrow_NR, up_MR, bias_M in zip(narrow, ups, biases, strict=True)
    )


def check_factors(name: str, x_NK: Tensor, down_RK: Tensor, up_MR: Tensor) -> None:
    """ValueError unless the factors fit each other and the input, in one float dtype."""
    if down_RK.dim() == 2 and up_MR.dim() == 2 and x_NK.dim() > 0:
        rank, inputs = down_RK.shape
        dtype = x_NK.dtype
        if (
            up_MR.shape[1] == rank
            and x_NK.shape[-1] == inputs
            and dtype == down_RK.dtype == up_MR.dtype
            and dtype.is_floating_point
        ):
            return  # before anything is said: this runs in every layer of every step
    if down_RK.dim() != 2 or up_MR.dim() != 2 or down_RK.shape[0] != up_MR.shape[1]:
        raise ValueError(
            f"{name}: down {tuple(down_RK.shape)} and up {tuple(up_MR.shape)} must be (rank, "
            "inputs) and (outputs, rank)"
        )
    if x_NK.dim() < 1 or x_NK.shape[-1] != down_RK.shape[1]:
        raise ValueError(f"{name}: x {tuple(x_NK.shape)} does not end in {down_RK.shape[1]} inputs")
    dtypes = {x_NK.dtype, down_RK.dtype, up_MR.dtype}
    if len(dtypes) > 1 or not x_NK.is_floating_point():
        raise ValueError(f"{name}: dtypes {sorted(map(str, dtypes))}; need one float dtype")
