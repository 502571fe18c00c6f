"""What is gathered of the inputs of a layer's matrices, over real tokens.

Matrices that read the same stream (q k v; gate up) share their inputs and so one statistic, kept
under the key of the first of them. An expert reads the tokens that the router sends it, which may
be none; its statistics are then zero. Products and sums are in float64: in float32 the Cholesky
factorization that follows fails.
"""
# N real tokens, M outputs, K inputs; n rows that a module is given

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.errors import UserError
from makd_llm.layerwise.walk import Reached
from makd_llm.models.families import Matrix, shared_inputs
from makd_llm.models.modeling_lowrank import Expert


class Read(NamedTuple):
    """What a matrix has read in one forward. x_NK: its inputs for real tokens. token_N: the places
    of these tokens in the batch (B T), each at most once.
    """

    x_NK: Tensor
    token_N: Tensor


Inputs = dict[str, Read]
"""Key of the first matrix that reads an input -> that input. Without the experts that no token came
to."""


def group_of(matrices: Sequence[Matrix]) -> dict[str, str]:
    """Key -> the key under which its input's statistic is kept, in one layer."""
    return {m.key: group[0].key for group in shared_inputs(matrices) for m in group}


def read_by(layer: nn.Module, matrix: Matrix, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(N,) each: which of the (n, K) rows that a matrix is given just now stand for real tokens,
    and the places of these tokens in the batch (B T).

    x: what its module is given, (B, T, K) or (n, K). For hooks: an expert knows its tokens only
    while it works.
    """
    real = batch.token_mask_BT.flatten().to(x.device)
    owner = layer.get_submodule(matrix.module.rpartition(".")[0])
    if not isinstance(owner, Expert):
        token_N = real.nonzero().flatten()
        return token_N, token_N
    assert owner.token_n is not None
    row_N = real[owner.token_n].nonzero().flatten()
    return row_N, owner.token_n[row_N]


@contextmanager
def inputs_of(
    layer: nn.Module,
    matrices: Sequence[Matrix],
    keys: Collection[str],
    batch: Batch,
    *,
    only: bool = False,
) -> Iterator[Inputs]:
    """Inside the `with`, holds what those matrices of these keys read in the layer's forward.

    For one forward of this batch: an expert that no token comes to is absent. The layer may be the
    teacher's, or a student's whose modules are factored. only: the forward ends (and a walk's step
    returns) as soon as all of them are known.
    """
    seen: Inputs = {}

    def remember(matrix: Matrix) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            row_N, token_N = read_by(layer, matrix, x, batch)
            seen[matrix.key] = Read(x.flatten(0, -2)[row_N], token_N)
            if only and len(seen) == len(keys):
                raise Reached(x)

        return hook

    with ExitStack() as stack:
        for matrix in matrices:
            if matrix.key in keys:
                module = layer.get_submodule(matrix.module)
                stack.callback(module.register_forward_pre_hook(remember(matrix)).remove)
        yield seen


def paired(one: Read, other: Read) -> tuple[Tensor, Tensor]:
    """(N, K) each: the rows of two inputs for the tokens that both hold, in the same order.

    Two models may send a token to different experts.
    """
    last = max(int(r.token_N.max()) if len(r.token_N) else -1 for r in (one, other))
    row_of = torch.full((last + 1,), -1, device=other.token_N.device)
    row_of[other.token_N] = torch.arange(len(other.token_N), device=row_of.device)
    row_n = row_of[one.token_N]
    return one.x_NK[row_n >= 0], other.x_NK[row_n[row_n >= 0]]


def real_rows(x_BTK: Tensor, batch: Batch, dtype: torch.dtype = torch.float64) -> Tensor:
    """(N, K): the rows that stand for real tokens."""
    mask_N = batch.token_mask_BT.flatten().to(x_BTK.device)
    return x_BTK.flatten(0, -2)[mask_N].to(dtype)


@dataclass
class InputStatistics:
    """Sums over the real tokens that one rank has seen of one input.

    covariance_KK: X X^T. sum_abs_K: of |x|. tokens: how many. float64.
    """

    covariance_KK: Tensor
    sum_abs_K: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> "InputStatistics":
        return cls(
            torch.zeros(width, width, dtype=torch.float64, device=device),
            torch.zeros(width, dtype=torch.float64, device=device),
        )

    def add(self, x_NK: Tensor) -> None:
        """Counts (N, K) rows in."""
        self.covariance_KK.addmm_(x_NK.T, x_NK)
        self.sum_abs_K += x_NK.abs().sum(0)
        self.tokens += len(x_NK)

    @property
    def mean_abs_K(self) -> Tensor:
        """Mean |x| per input."""
        return self.sum_abs_K / max(self.tokens, 1)

    def over_ranks(self, layer: int, key: str) -> "InputStatistics":
        """The sums of all ranks, on every rank, in the place of its own. Collective.

        Raises UserError, with the place, where they are not finite.
        """
        tokens = torch.tensor([self.tokens], device=self.sum_abs_K.device)
        distributed.sum_in_place(self.covariance_KK)
        distributed.sum_in_place(self.sum_abs_K)
        self.tokens = int(distributed.sum_over_ranks(tokens))
        if not bool(self.covariance_KK.isfinite().all()):
            raise UserError(
                f"calibration: what layer {layer}, matrix {key} reads is not finite; "
                "try --dtype float32, or look at the model"
            )
        return self
