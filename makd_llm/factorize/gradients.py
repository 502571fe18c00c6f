"""What the loss says of every matrix, by one walk forward and one back.

The forward walk keeps what every layer reads; the backward walk calls the layers again from the
last to the first, each with the gradient that the one after it left. So no more than one layer is
held here either, beside the hidden states of all layers on the CPU.
"""
# B batch, T tokens, N real tokens, M outputs, K inputs, J components

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.factorize.walk import Walk
from makd_llm.models.families import Matrix, part_of
from makd_llm.report.progress import progress

Visit = Callable[[int, Matrix, Batch, Tensor, Tensor], None]
"""(layer, matrix, batch, its inputs (B, T, K), the gradient of its outputs (B, T, M))."""

Known = tuple[Tensor, Tensor, Tensor]
"""A matrix's weight (M, K) and components: down (J, K), up (M, J)."""

PerMatrix = dict[tuple[int, str], Tensor]
"""(layer, role) -> a float64 vector."""


def row_fisher(walk: Walk) -> PerMatrix:
    """(M,) each: squared gradients of the weights summed over every row and over sequences.

    Of the summed cross-entropy of a sequence's targets. Source: FWSVD (Hsu et al. 2022), with a
    sequence as the unit. Collective: summed over all ranks.
    """
    found: PerMatrix = {}

    def visit(
        layer: int, matrix: Matrix, batch: Batch, x_BTK: Tensor, gradient_BTM: Tensor
    ) -> None:
        for x_TK, gradient_TM in zip(x_BTK, gradient_BTM, strict=True):
            gradient_MK = gradient_TM.T.float() @ x_TK.float()
            _add(found, (layer, matrix.role), gradient_MK.double().square().sum(1))

    backward_walk(walk, visit)
    return _over_ranks(found)


def sensitivity(walk: Walk, known_of: Callable[[int, str], Known]) -> PerMatrix:
    """(J + 1,) each: the expected rise of the loss when the first r components are kept.

    To second order in the outputs' error d, with the empirical Fisher matrix of the outputs in
    place of the Hessian and tokens as if independent: sum over tokens of (g . d)^2 / 2, for all
    ranks at once, because g . d is g . W x less the components that are kept. Source: ours, after
    the Fisher approximation that FWSVD and others make for weights.

    known_of: (layer, role) -> weight and components. Collective.
    """
    found: PerMatrix = {}

    def visit(
        layer: int, matrix: Matrix, batch: Batch, x_BTK: Tensor, gradient_BTM: Tensor
    ) -> None:
        weight_MK, down_JK, up_MJ = (
            t.to(x_BTK.device).float() for t in known_of(layer, matrix.role)
        )
        mask_N = batch.token_mask_BT.flatten().to(x_BTK.device)
        x_NK = x_BTK.flatten(0, 1)[mask_N].float()
        gradient_NM = gradient_BTM.flatten(0, 1)[mask_N].float()
        whole_N = (gradient_NM * (x_NK @ weight_MK.T)).double().sum(1)
        shares_NJ = (gradient_NM @ up_MJ) * (x_NK @ down_JK.T)
        kept_NR = torch.nn.functional.pad(shares_NJ.double().cumsum(1), (1, 0))
        rise_R = 0.5 * (whole_N[:, None] - kept_NR).square().sum(0)
        _add(found, (layer, matrix.role), rise_R)

    backward_walk(walk, visit)
    return _over_ranks(found)


def _add(found: PerMatrix, key: tuple[int, str], more: Tensor) -> None:
    found[key] = found[key] + more if key in found else more


def _over_ranks(found: PerMatrix) -> PerMatrix:
    return {key: distributed.sum_over_ranks(found[key]) for key in sorted(found)}


def backward_walk(
    walk: Walk, visit: Visit, after_layer: Callable[[int], None] = lambda layer: None
) -> None:
    """Calls `visit` for every matrix and batch with the gradient of the batch's summed loss; and
    `after_layer` when a layer is done, the last first.
    """
    streams = [walk.embedded()]
    with progress("gradients: forward", len(walk)) as advance:
        for index in range(len(walk)):
            streams.append(walk.advanced(index, walk.layer(index), streams[-1]))
            advance()
    gradients = _of_last_states(walk, streams.pop())
    with progress("gradients: backward", len(walk)) as advance:
        for index in reversed(range(len(walk))):
            layer, stream = walk.layer(index), streams.pop()
            for number, batch in enumerate(walk.batches):
                before_BTD = stream[number].to(walk.device).requires_grad_(True)
                with ExitStack() as stack:
                    for matrix in walk.family.matrices:
                        module = layer.get_submodule(matrix.module)
                        hook = _hook(walk, visit, index, matrix, batch)
                        stack.callback(module.register_forward_hook(hook).remove)
                    after_BTD = walk.step(index, layer, batch, before_BTD)
                after_BTD.backward(gradients[number].to(walk.device))
                assert before_BTD.grad is not None
                gradients[number] = before_BTD.grad.to("cpu")
            after_layer(index)
            advance()


def _of_last_states(walk: Walk, stream: list[Tensor]) -> list[Tensor]:
    """The gradient of each batch's loss with regard to what the last layer put out."""
    weight_VD = walk.output_weight()
    leaves = [last.to(walk.device).requires_grad_(True) for last in stream]
    gradients = []
    for batch, last, hidden_BTD in zip(walk.batches, leaves, walk.finished(leaves), strict=True):
        walk.nats(hidden_BTD, batch, weight_VD).sum().backward()
        assert last.grad is not None
        gradients.append(last.grad.to("cpu"))
    return gradients


def _hook(
    walk: Walk, visit: Visit, index: int, matrix: Matrix, batch: Batch
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = batch.input_ids_BT.shape  # OPT's feed-forward reads (B T, K)
        x_BTK = inputs[0].detach().view(*rows, -1)

        def on_gradient(gradient: Tensor) -> None:
            own = part_of(walk.config, matrix, gradient)
            visit(index, matrix, batch, x_BTK, own.view(*rows, -1))

        output.register_hook(on_gradient)

    return hook
