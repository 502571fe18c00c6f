"""Calibration: the covariance X X^T of every matrix's inputs over real prompts.

Matrices that read the same stream (q k v; gate up) share one covariance. Products and sums are in
float64: in float32 the Cholesky factorization that follows fails. Held on every rank: one K x K
float64 matrix per layer and shared input.
"""
# N tokens, K inputs

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.models.causal import CausalModel
from makd_llm.models.families import Family

Covariances = dict[tuple[int, str], Tensor]
"""(layer, role of the first matrix that reads the input) -> X X^T (K, K), float64."""


def input_groups(family: Family) -> dict[str, str]:
    """Role -> the role under which its input's covariance is kept."""
    return {role: group[0] for group in family.shared_inputs for role in group}


def covariances(
    model: CausalModel, forward: Callable[[Batch], Any], batches: Iterable[Batch], n_layers: int
) -> Covariances:
    """Runs the batches of this rank through `forward` and sums X X^T over real tokens and over
    ranks.

    forward: the engine of `model`. Every rank must have the same number of batches. Raises
    ValueError where an input holds values that are not finite.
    """
    found: Covariances = {}
    real_N: list[Tensor] = []
    layers: nn.ModuleList = model.model.get_submodule(model.family.layers)  # type: ignore[assignment]
    firsts = set(input_groups(model.family).values())
    with ExitStack() as stack:
        for layer in range(n_layers):
            for matrix in model.family.matrices:
                if matrix.role in firsts:
                    hook = _accumulate(found, (layer, matrix.role), real_N)
                    module = layers[layer].get_submodule(matrix.module)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
        for batch in batches:
            real_N[:] = [batch.token_mask_BT.flatten()]
            forward(batch)
    for key in found:
        found[key] = distributed.sum_over_ranks(found[key])
        if not bool(found[key].isfinite().all()):
            raise ValueError(
                f"calibration: inputs of layer {key[0]}, matrix {key[1]} are not finite"
            )
    return found


def _accumulate(
    found: Covariances, key: tuple[int, str], real_N: list[Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_NK = inputs[0].detach().flatten(0, -2)[real_N[0]].to(torch.float64)
        if key in found:
            found[key].addmm_(x_NK.T, x_NK)
        else:
            found[key] = x_NK.T @ x_NK

    return hook
