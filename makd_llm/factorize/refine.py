"""Local refinement: a layer's factor pairs are fitted to the teacher's layer by steps of Adam.

Only the factors of one decoder layer learn, from the hidden states that the walk holds anyway; no
gradient leaves the layer. What closed form there is (methods `refitted`) has been used before it:
that is the optimum for one matrix, this is for what the matrices of a layer do together.
"""
# B batch, T tokens, D width, N real tokens

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.errors import UserError
from makd_llm.layerwise.walk import Stream, Walk


def least_squares(output_ND: Tensor, target_ND: Tensor) -> Tensor:
    """Mean over tokens of |a - y|^2 / |y|^2; of |a - y|^2 where y is all zero.

    Token by token, because the few with huge activations (the first of a text) would otherwise be
    all that is fitted.
    """
    size_N = target_ND.square().sum(-1)
    error_N = (output_ND - target_ND).square().sum(-1)
    return (error_N / torch.where(size_N > 0, size_N, 1.0)).mean()


def lillama(output_ND: Tensor, target_ND: Tensor) -> Tensor:
    """mean|a - y| - mean log sigmoid(cos(a, y)). Source: Lillama (Sy et al. 2024)."""
    cosine_N = F.cosine_similarity(output_ND, target_ND, dim=-1)
    return (output_ND - target_ND).abs().mean() - F.logsigmoid(cosine_N).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "least_squares": least_squares,
    "lillama": lillama,
}


@dataclass(frozen=True)
class Refinement:
    """epochs: over the calibration batches, per layer. learning_rate: of the factors in units of
    their own typical size. inputs: `student` (what the layers before it really feed it), `teacher`,
    or `both`, as Lillama does.
    """

    epochs: int = 2
    learning_rate: float = 3e-3
    loss: str = "least_squares"
    inputs: str = "student"


def refine_block(
    walk: Walk,
    index: int,
    layer: nn.Module,
    streams: dict[str, Stream],
    targets: Stream,
    refinement: Refinement,
    start: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[float]]:
    """Trains the factors of one layer in place; returns them in float32, by their names in the
    layer, and the loss of every step.

    layer: the student's, on the device. start: what its factors are before they are rounded to the
    layer's dtype, by name. streams: `student` and `teacher`, what either reads.
    targets: what the teacher's layer made of the teacher's stream. Each rank has batches of its
    own, the same number of them; gradients are averaged. Where the last pass over the batches is no
    better than the first, or than the start, the layer keeps the factors that it came with.
    Collective.

    Raises UserError where a loss is not finite.
    """
    if not start:
        return {}, []
    kept_dtype = next(layer.parameters()).dtype
    layer.float()  # what bf16 stores is too coarse for small steps
    named = {name: layer.get_parameter(name) for name in start}
    learning = list(named.values())
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
    sizes = [typical_size(parameter.detach()) for parameter in learning]
    # What Adam sees: factors in units of their own size.
    relative = [p.detach() / size for p, size in zip(learning, sizes, strict=True)]
    for parameter in learning:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(relative, lr=refinement.learning_rate)
    steps = refinement.epochs * len(walk.batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    used = ("student", "teacher") if refinement.inputs == "both" else (refinement.inputs,)
    losses = []
    half = walk.dtype in (torch.bfloat16, torch.float16)
    for step in range(steps):
        number = step % len(walk.batches)
        batch = walk.batches[number]
        target_ND = _rows(targets[number], batch).to(walk.device).float()
        loss = torch.zeros((), device=walk.device)
        # Anew for every step: autocast keeps what it made of the factors until it ends.
        with torch.autocast(walk.device.type, walk.dtype, enabled=half):
            for name in used:
                output_BTD = walk.step(index, layer, batch, streams[name][number].float())
                loss = loss + LOSSES[refinement.loss](_rows(output_BTD, batch).float(), target_ND)
        for parameter in learning:
            parameter.grad = None
        if loss.requires_grad:  # else no token came to an expert that learns
            (loss / len(used)).backward()
        for parameter, size, asked in zip(learning, sizes, relative, strict=True):
            # Which experts this rank's tokens reach, other ranks cannot know.
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            asked.grad = distributed.sum_over_ranks(own * size) / distributed.world_size()
        optimizer.step()
        with torch.no_grad():
            for parameter, size, asked in zip(learning, sizes, relative, strict=True):
                parameter.copy_(asked * size)
        schedule.step()
        losses.append(float(loss.detach()) / len(used))
    layer.requires_grad_(False)
    if not _is_better(losses, len(walk.batches), index):
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(start[name])
    refined = {name: parameter.detach().cpu().clone() for name, parameter in named.items()}
    layer.to(kept_dtype)
    return refined, losses


def typical_size(factor_RK: Tensor) -> Tensor:
    """Of each entry of a factor, from its row's and its column's root mean squares: their product
    over that of all. (R, K), never 0.

    An input with huge values has a small column, a component of little weight a small row; steps of
    one size for all entries would change both beyond measure. Source: ours, with Adafactor's way of
    estimating squares.
    """
    square_RK = factor_RK.square()
    whole = square_RK.mean().clamp_min(1e-30)
    size_RK = (square_RK.mean(1, keepdim=True) * square_RK.mean(0, keepdim=True) / whole).sqrt()
    return size_RK.clamp_min(1e-6 * whole.sqrt())


def _is_better(losses: list[float], count: int, index: int) -> bool:
    """Whether the last pass over so many batches lost less than the first, and less than what the
    layer came with on the batch that was first of all; over all ranks. Of one pass nothing can be
    said.
    """
    passes = sum(losses[:count]), sum(losses[-count:])
    ends = torch.tensor([*passes, losses[0], losses[-count]], dtype=torch.float64)
    first, last, start, end = distributed.sum_over_ranks(ends).tolist()
    if not math.isfinite(first + last):
        raise UserError(
            f"student.refine: the loss of layer {index} is not finite; lower its learning_rate "
            f"({count} batches a pass), or leave refine out"
        )
    return len(losses) == count or (last < first and end < start)


def _rows(x_BTD: Tensor, batch: Batch) -> Tensor:
    """(N, D): the rows that stand for real tokens."""
    return x_BTD.flatten(0, 1)[batch.token_mask_BT.flatten().to(x_BTD.device)]
