"""What the loss says of every matrix, by one walk forward and one back.

The forward walk keeps what every layer reads; the backward walk calls the layers again from the
last to the first, each with the gradient that the one after it left. So no more than one layer is
held here either, beside hidden states on the CPU: of all layers where that is little, else of every
so-many-th, and those between are made again.
"""
# B batch, T tokens, D width, N real tokens, M outputs, K inputs, J components

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.factorize.matrices import jobs_of
from makd_llm.factorize.statistics import Read, read_by
from makd_llm.layerwise.walk import Stream, Walk
from makd_llm.models.families import Matrix, part_of
from makd_llm.report.progress import progress

HELD_BYTES = 4 * 1024**3
"""Of hidden states that a rank holds between forward and backward, if it can."""

Visit = Callable[[int, Matrix, Batch, Read, Tensor], None]
"""(layer, matrix, batch, what it read, the gradient of its outputs (N, M)), over real tokens. Not
called for an expert that no token of the batch came to."""

Known = tuple[Tensor, Tensor, Tensor]
"""A matrix's weight (M, K) and components: down (J, K), up (M, J)."""

PerMatrix = dict[tuple[int, str], Tensor]
"""(layer, key) -> a float64 vector."""


def row_fisher(walk: Walk) -> PerMatrix:
    """(M,) each: squared gradients of the weights summed over every row and over sequences.

    Of the summed cross-entropy of a sequence's targets. Source: FWSVD (Hsu et al. 2022), with a
    sequence as the unit. 0 for an expert that no token came to. Collective: summed over all ranks.
    """
    found: PerMatrix = {}
    for job in jobs_of(walk.reader, walk.config):
        rows_M = torch.zeros(job.shape.rows, dtype=torch.float64, device=walk.device)
        found[job.layer, job.matrix.key] = rows_M

    def visit(layer: int, matrix: Matrix, batch: Batch, read: Read, gradient_NM: Tensor) -> None:
        sequence_N = read.token_N // batch.input_ids_BT.shape[1]
        for sequence in range(len(batch.input_ids_BT)):
            own_N = sequence_N == sequence
            gradient_MK = gradient_NM[own_N].T.float() @ read.x_NK[own_N].float()
            found[layer, matrix.key] += gradient_MK.double().square().sum(1)

    backward_walk(walk, visit)
    return _over_ranks(found)


def sensitivity(walk: Walk, known_of: Callable[[int, str], Known]) -> PerMatrix:
    """(J + 1,) each: the expected rise of the loss when the first r components are kept.

    To second order in the outputs' error d, with the empirical Fisher matrix of the outputs in
    place of the Hessian and tokens as if independent: sum over tokens of (g . d)^2 / 2, for all
    ranks at once, because g . d is g . W x less the components that are kept. 0 for an expert that
    no token came to. Source: ours, after the Fisher approximation that FWSVD and others make for
    weights.

    known_of: (layer, key) -> weight and components. Collective.
    """
    found: PerMatrix = {}

    def before_layer(layer: int) -> None:
        for matrix in walk.matrices(layer):
            _, down_JK, _ = known_of(layer, matrix.key)
            rise_R = torch.zeros(len(down_JK) + 1, dtype=torch.float64, device=walk.device)
            found[layer, matrix.key] = rise_R

    def visit(layer: int, matrix: Matrix, batch: Batch, read: Read, gradient_NM: Tensor) -> None:
        weight_MK, down_JK, up_MJ = (t.to(walk.device).float() for t in known_of(layer, matrix.key))
        x_NK, gradient_NM = read.x_NK.float(), gradient_NM.float()
        whole_N = (gradient_NM * (x_NK @ weight_MK.T)).double().sum(1)
        shares_NJ = (gradient_NM @ up_MJ) * (x_NK @ down_JK.T)
        kept_NR = torch.nn.functional.pad(shares_NJ.double().cumsum(1), (1, 0))
        found[layer, matrix.key] += 0.5 * (whole_N[:, None] - kept_NR).square().sum(0)

    backward_walk(walk, visit, before_layer)
    return _over_ranks(found)


def _over_ranks(found: PerMatrix) -> PerMatrix:
    return {key: distributed.sum_over_ranks(found[key]) for key in sorted(found)}


def _nothing(layer: int) -> None:
    pass


def backward_walk(
    walk: Walk,
    visit: Visit,
    before_layer: Callable[[int], None] = _nothing,
    after_layer: Callable[[int], None] = _nothing,
) -> None:
    """Calls `visit` for every matrix and batch with the gradient of the batch's summed loss; and
    `before_layer` and `after_layer` around each layer, the last first.
    """
    stream = walk.embedded()
    stride = stride_of(len(walk), sum(hidden.nbytes for hidden in stream))
    kept: dict[int, Stream] = {}
    with progress("gradients: forward", len(walk)) as advance:
        for index in range(len(walk)):
            if index % stride == 0:
                kept[index] = stream
            stream = walk.advanced(index, walk.layer(index), stream)
            advance()
    gradients = _of_last_states(walk, stream)
    del stream
    with progress("gradients: backward", len(walk)) as advance:
        for index in reversed(range(len(walk))):
            for between in range(index - index % stride, index):
                if between + 1 not in kept:
                    kept[between + 1] = walk.advanced(between, walk.layer(between), kept[between])
            layer, stream = walk.layer(index), kept.pop(index)
            before_layer(index)
            for number, batch in enumerate(walk.batches):
                before_BTD = stream[number].to(walk.device).requires_grad_(True)
                with ExitStack() as stack:
                    for matrix in walk.matrices(index):
                        module = layer.get_submodule(matrix.module)
                        hook = _hook(walk, visit, index, layer, matrix, batch)
                        stack.callback(module.register_forward_hook(hook).remove)
                    after_BTD = walk.step(index, layer, batch, before_BTD)
                after_BTD.backward(gradients[number].to(walk.device))
                assert before_BTD.grad is not None
                gradients[number] = before_BTD.grad.to("cpu")
            after_layer(index)
            advance()


def stride_of(n_layers: int, stream_bytes: int) -> int:
    """Every so-many-th layer's inputs are kept: all, where they take no more than `HELD_BYTES`;
    else as few as that needs; at least so many that the fewest are held at all, 2 sqrt(layers).
    """
    most = max(1, round(math.sqrt(n_layers)))
    for stride in range(1, most):
        if (math.ceil(n_layers / stride) + stride - 1) * stream_bytes <= HELD_BYTES:
            return stride
    return most


def _of_last_states(walk: Walk, stream: list[Tensor]) -> list[Tensor]:
    """The gradient of each batch's loss with regard to what the last layer put out."""
    weight_VD = walk.output_weight()
    gradients = []
    leaves: list[Tensor] = []

    def on_the_device() -> Iterator[Tensor]:
        for last in stream:  # one at a time: all of them are for the CPU's memory
            leaves[:] = [last.to(walk.device).requires_grad_(True)]
            yield leaves[0]

    for batch, hidden_BTD in zip(walk.batches, walk.finished(on_the_device()), strict=True):
        walk.nats(hidden_BTD, batch, weight_VD).sum().backward()
        (last,) = leaves
        assert last.grad is not None
        gradients.append(last.grad.to("cpu"))
    return gradients


def _hook(
    walk: Walk, visit: Visit, index: int, layer: nn.Module, matrix: Matrix, batch: Batch
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        row_N, token_N = read_by(layer, matrix, x, batch)  # known only while an expert works

        def on_gradient(gradient: Tensor) -> None:
            own = part_of(walk.config, matrix, gradient)
            read = Read(x.flatten(0, -2)[row_N], token_N)
            visit(index, matrix, batch, read, own.flatten(0, -2)[row_N])

        output.register_hook(on_gradient)

    return hook
