"""A matrix as a matrix product operator: a chain of small tensors whose contraction it is.

    M[i, j] = sum over all d of A_1[i_1, j_1, d_1] A_2[d_1, i_2, j_2, d_2] ... A_n[d_n-1, i_n, j_n]

where i = (i_1 ... i_n) and j = (j_1 ... j_n) are read as numbers with n digits. At full bonds,
d_k = min(product of the sizes on the left, on the right), every matrix is such a chain exactly. The
tensor in the middle is the central one, the others are auxiliary.

The form is the mixed canonical one: auxiliary tensors are isometries that point to the centre, and
the centre holds the matrix's weight. So every tensor starts at its own natural scale, which Adam's
steps, equally large for all entries, ask for. Source: matrix product operators as in OPDF (Zhan et
al. 2024); the form and the choice of sizes are ours.
"""
# I, J rows and columns of a matrix, N tokens; a tensor is (d, i, j, d')

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Kind = Literal["weight", "up", "down"]
"""Of a matrix: a dense one, or a factor, whose columns (up) or rows (down) are the rank."""


@dataclass(frozen=True)
class Split:
    """The sizes of a matrix, tensor by tensor.

    compared: the auxiliary tensors that a teacher's matrix has too, in the same shape: those at the
    ends, which hold nothing of a rank, unless they are single numbers.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    compared: tuple[int, ...] = ()

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Of the tensors, at full bonds."""
        sizes = [i * j for i, j in zip(self.rows, self.columns, strict=True)]
        bonds = [
            min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in range(len(sizes) + 1)
        ]
        return list(zip(bonds, self.rows, self.columns, bonds[1:], strict=False))

    @property
    def centre(self) -> int:
        """Which tensor is the central one."""
        return len(self.rows) // 2

    @property
    def parameters(self) -> int:
        """Of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)


def split_of(shape: tuple[int, int], kind: Kind, tensors: int) -> Split | None:
    """The sizes for a matrix (I, J) as so many tensors, an odd number; None where neither dimension
    can be split (primes).

    The tensors at the ends take about the square root of a factor's outer dimension each, and of a
    dense matrix the cube root of both. Those next to them, where there are any, take about the
    square root of the rank each, or what is left of the dense matrix: the bonds are then about as
    large as the square root of the matrix, and five tensors together up to three times as large as
    it. Further ones are square.
    """
    if tensors < 3 or tensors % 2 == 0:
        raise ValueError(f"a chain has an odd number of tensors, 3 at least, not {tensors}")
    own = (1 / 3, 1 / 2) if kind == "weight" else (1 / 2, 1 / 2)
    rows = _digits(shape[0], (0.0, 1 / 2) if kind == "down" else own, tensors)
    columns = _digits(shape[1], (0.0, 1 / 2) if kind == "up" else own, tensors)
    columns.reverse()  # so that the larger halves of both do not meet
    sizes = [i * j for i, j in zip(rows, columns, strict=True)]
    if max(sizes) == math.prod(sizes):
        return None
    compared = [end for end in (0, tensors - 1) if 1 < sizes[end] ** 2 <= math.prod(sizes)]
    return Split(tuple(rows), tuple(columns), tuple(compared))


def _digits(size: int, powers: tuple[float, float], tensors: int) -> list[int]:
    """Divisors whose product is the size: those up to the end, and up to the place next to it, make
    about such a power of it on either side; the rest is in the centre, and so are primes.
    """
    found, rest, left, right = [1] * tensors, size, 1, 1
    for place, power in zip(range(tensors // 2), powers, strict=False):
        most = size**power
        found[place] = _divisor(rest, most / left)
        rest, left = rest // found[place], left * found[place]
        found[-1 - place] = _divisor(rest, min(most * most / left, 2 * most) / right)
        rest, right = rest // found[-1 - place], right * found[-1 - place]
    found[tensors // 2] *= rest
    return found


def _divisor(number: int, most: float) -> int:
    """The largest that is not above `most`."""
    return max((d for d in range(1, int(most + 1e-9) + 1) if number % d == 0), default=1)


def decompose(matrix_IJ: Tensor, split: Split) -> list[Tensor]:
    """The tensors of a matrix, in float64: exact up to its rounding."""
    core = _interleaved(matrix_IJ, split)
    shapes, found = split.shapes, [core] * len(split.rows)
    for place in range(split.centre):
        left, i, j, right = shapes[place]
        basis, weights, rest = torch.linalg.svd(core.reshape(left * i * j, -1), full_matrices=False)
        found[place], core = basis.view(left, i, j, right), weights[:, None] * rest
    for place in reversed(range(split.centre + 1, len(shapes))):
        left, i, j, right = shapes[place]
        rest, weights, basis = torch.linalg.svd(
            core.reshape(-1, i * j * right), full_matrices=False
        )
        found[place], core = basis.view(left, i, j, right), rest * weights
    found[split.centre] = core.reshape(shapes[split.centre])
    return found


def ends_of(matrix_IJ: Tensor, split: Split, like: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The tensors of a matrix that are compared, by their places, in float64.

    split: of the other matrix, whose sizes at the ends divide this one's. like: its tensors by
    their places. A singular vector has either sign, and gets the one closer to those (ours).
    """
    found = {}
    for place in split.compared:
        first, i, j = place == 0, split.rows[place], split.columns[place]
        digits = (
            (i, -1, j, matrix_IJ.shape[1] // j) if first else (-1, i, matrix_IJ.shape[1] // j, j)
        )
        core = matrix_IJ.double().reshape(digits).permute((0, 2, 1, 3) if first else (1, 3, 0, 2))
        basis, _, _ = torch.linalg.svd(core.reshape(i * j, -1), full_matrices=False)
        tensor = (basis if first else basis.T).reshape(like[place].shape)
        agreement = (tensor * like[place]).sum((0, 1, 2) if first else (1, 2, 3), keepdim=True)
        found[place] = torch.where(agreement < 0, -tensor, tensor)
    return found


def contract(tensors: Sequence[Tensor]) -> Tensor:
    """The matrix (I, J) of a chain, multiplied in fp32, or in float64 where the tensors are."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    core = tensors[0].to(dtype).flatten(0, 2)
    for tensor in tensors[1:]:
        core = (core @ tensor.to(dtype).flatten(1)).view(-1, tensor.shape[3])
    rows, columns = [t.shape[1] for t in tensors], [t.shape[2] for t in tensors]
    pairs = [size for both in zip(rows, columns, strict=True) for size in both]
    places = range(len(pairs))
    order = [*places[::2], *places[1::2]]
    return core.reshape(pairs).permute(order).reshape(math.prod(rows), math.prod(columns))


def _interleaved(matrix_IJ: Tensor, split: Split) -> Tensor:
    """In float64, its dimensions i_1, j_1, i_2, j_2 ..."""
    count = len(split.rows)
    order = [place for k in range(count) for place in (k, count + k)]
    return matrix_IJ.double().reshape(*split.rows, *split.columns).permute(order)


class TensorTrain(nn.Module):
    """y = M x, where M is the contraction of the module's parameters `tensor_0`, `tensor_1` ...

    targets: what those at the ends are compared with, as buffers `target_0` ...
    """

    def __init__(
        self,
        split: Split,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        recompute: bool = False,
    ) -> None:
        """The tensors are not filled. transposed: the model's files have the matrix as (J, I).
        recompute: contract again in the backward, instead of keeping the matrix from the forward
        on: under ZeRO-3 every rank would keep all of them whole.
        """
        super().__init__()
        self.split, self.transposed, self.recompute = split, transposed, recompute
        for place, shape in enumerate(split.shapes):
            setattr(self, f"tensor_{place}", nn.Parameter(torch.empty(shape, dtype=dtype)))

    @property
    def tensors(self) -> list[nn.Parameter]:
        """In the order of the chain."""
        return [getattr(self, f"tensor_{place}") for place in range(len(self.split.rows))]

    def set_targets(self, targets: Mapping[int, Tensor]) -> None:
        """Gives tensors by their places what they are compared with."""
        for place, target in targets.items():
            self.register_buffer(f"target_{place}", target.detach())

    def matrix(self) -> Tensor:
        """M (I, J), in the tensors' dtype."""
        return contract(self.tensors).to(self.tensors[0].dtype)

    def stored(self) -> Tensor:
        """M as the model's files have it."""
        matrix_IJ = self.matrix()
        return matrix_IJ.T if self.transposed else matrix_IJ

    def distance(self) -> Tensor | None:
        """The mean squared error of each compared tensor, summed over them, in fp32 or wider; None:
        there are no targets. Source: OPDF.
        """
        targets = [
            (place, cast(Tensor, buffer))
            for place in self.split.compared
            if (buffer := getattr(self, f"target_{place}", None)) is not None
        ]
        if not targets:
            return None
        wide = torch.promote_types(self.tensors[0].dtype, torch.float32)
        return torch.stack(
            [
                (self.tensors[at].to(wide) - target.to(wide)).square().mean()
                for at, target in targets
            ]
        ).sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., J) to (..., I), and the distance: here, where ZeRO-3 has the tensors whole."""
        if self.recompute and torch.is_grad_enabled():
            again = checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)
            return cast(Tensor, again), self.distance()
        return self._product(x), self.distance()

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix())

    def extra_repr(self) -> str:
        return f"rows={self.split.rows}, columns={self.split.columns}"


class OverParameterized(nn.Module):
    """In the place of a dense or a factored linear module while it is trained: the same product,
    each matrix that can be split being a TensorTrain under its old name.
    """

    def __init__(
        self, matrices: Mapping[str, TensorTrain | nn.Parameter], bias: nn.Parameter | None
    ) -> None:
        """matrices: by name, in the order in which they are multiplied."""
        super().__init__()
        self.names = tuple(matrices)
        for name, matrix in matrices.items():
            setattr(self, name, matrix)
        self.bias = bias
        self.distance: Tensor | None = None
        """Of the last forward: summed over the matrices; None: nothing is compared."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., M)."""
        distances = []
        for name in self.names:
            matrix = getattr(self, name)
            if isinstance(matrix, TensorTrain):
                x, distance = matrix(x)
                distances += [] if distance is None else [distance]
            else:
                x = F.linear(x, matrix)
        self.distance = torch.stack(distances).sum() if distances else None
        return x if self.bias is None else x + self.bias


def mean_distance(modules: Sequence[OverParameterized]) -> Tensor:
    """How far the auxiliary tensors of these are from their targets, in the last forward."""
    found = [module.distance for module in modules if module.distance is not None]
    assert len(found) == len(modules), "all of them have targets"
    return torch.stack(found).mean()
