"""What is gathered of the inputs of a layer's matrices, over real tokens.

Matrices that read the same stream (q k v; gate up) share their inputs and so one statistic, kept
under the role of the first of them. Products and sums are in float64: in float32 the Cholesky
factorization that follows fails.
"""
# N real tokens, K inputs

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.factorize.walk import Reached
from makd_llm.models.families import Family

Inputs = dict[str, Tensor]
"""Role of the first matrix that reads an input -> that input (B, T, K)."""


def group_of(family: Family) -> dict[str, str]:
    """Role -> the role under which its input's statistic is kept."""
    return {role: group[0] for group in family.shared_inputs for role in group}


@contextmanager
def inputs_of(layer: nn.Module, family: Family, roles: tuple[str, ...]) -> Iterator[Inputs]:
    """Inside the `with`, holds what the matrices of these roles read in the layer's last forward.

    The layer may be the teacher's, or a student's whose modules are factored.
    """
    seen: Inputs = {}

    def remember(role: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[role] = inputs[0].detach()

        return hook

    with ExitStack() as stack:
        for matrix in family.matrices:
            if matrix.role in roles:
                module = layer.get_submodule(matrix.module)
                handle = module.register_forward_pre_hook(remember(matrix.role))
                stack.callback(handle.remove)
        yield seen


@contextmanager
def only_input_of(layer: nn.Module, family: Family, role: str) -> Iterator[None]:
    """Inside the `with`, a walk's step through the layer ends at this matrix and returns its
    input.
    """

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise Reached(inputs[0])

    name = next(matrix.module for matrix in family.matrices if matrix.role == role)
    handle = layer.get_submodule(name).register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


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

    def over_ranks(self, layer: int, role: str) -> "InputStatistics":
        """The sums of all ranks, on every rank. Collective.

        Raises ValueError, with the place, where they are not finite.
        """
        tokens = torch.tensor([self.tokens], device=self.sum_abs_K.device)
        summed = InputStatistics(
            distributed.sum_over_ranks(self.covariance_KK),
            distributed.sum_over_ranks(self.sum_abs_K),
            int(distributed.sum_over_ranks(tokens)),
        )
        if not bool(summed.covariance_KK.isfinite().all()):
            raise ValueError(f"calibration: inputs of layer {layer}, matrix {role} are not finite")
        return summed
