"""What a factorized student lost, measured on text that it was not cut on.

Matrix by matrix: the relative error of the outputs, |(W - up down) X| / |W X|, on the inputs X that
the teacher's layers really see. Layer by layer: how far the student's own hidden states have come
from the teacher's. And as a whole: the perplexity.
"""
# N real tokens, M outputs, K inputs

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.factorize.matrices import Job, dense_matrix, jobs_of
from makd_llm.factorize.statistics import group_of, inputs_of, real_rows
from makd_llm.layerwise.walk import Stream, Walk
from makd_llm.models.modeling_lowrank import LowRankLinear, LowRankParts
from makd_llm.report.progress import progress


@dataclass(frozen=True)
class Residuals:
    """matrix: (layer, key) -> |(W - up down) X| / |W X|; 0 where dense, None where nothing was
    measured: an expert that no token came to. layer: per layer |h_S - h_T| / |h_T| of its output,
    each model on its own stream. teacher, student: perplexity.
    """

    matrix: dict[tuple[int, str], float | None]
    layer: list[float]
    teacher: float
    student: float


def residuals(
    teacher: Path, student: Path, batches: Sequence[Batch], *, dtype: torch.dtype
) -> Residuals:
    """Walks teacher and student side by side over this rank's batches. Collective."""
    device = distributed.device()
    walk = Walk(teacher, batches, dtype=dtype, device=device)
    low = Walk(student, batches, dtype=dtype, device=device)
    jobs = jobs_of(walk.reader, walk.config)
    at_teacher, at_student = walk.embedded(), low.embedded()
    wrong: dict[tuple[int, str], Tensor] = {}
    drift = torch.zeros(len(walk), 2, dtype=torch.float64)
    with progress("residuals: layers", len(walk)) as advance, torch.no_grad():
        for index in range(len(walk)):
            original, layer = walk.layer(index), low.layer(index)
            own = [job for job in jobs if job.layer == index]
            weights = {j.matrix.key: dense_matrix(walk.reader, j).to(device).double() for j in own}
            factors = {j.matrix.key: factors_in(layer, j) for j in own}
            matrices = walk.matrices(index)
            group = group_of(matrices)
            for key in weights:
                wrong[index, key] = torch.zeros(2, dtype=torch.float64)
            for number, batch in enumerate(batches):
                with inputs_of(original, matrices, set(group.values()), batch) as inputs:
                    after = walk.step(index, original, batch, at_teacher[number])
                for key, weight_MK in weights.items():
                    if group[key] in inputs:
                        x_NK = inputs[group[key]].x_NK.double()
                        wrong[index, key] += _error(x_NK, weight_MK, factors[key])
                own_after = low.step(index, layer, batch, at_student[number])
                want_ND, have_ND = real_rows(after, batch), real_rows(own_after, batch)
                drift[index, 0] += float((have_ND - want_ND).square().sum())
                drift[index, 1] += float(want_ND.square().sum())
                at_teacher[number], at_student[number] = after.to("cpu"), own_after.to("cpu")
            advance()
    drift = distributed.sum_over_ranks(drift)
    summed = {place: distributed.sum_over_ranks(wrong[place]) for place in sorted(wrong)}
    matrix = {place: _ratio(sums) if bool(sums[1] > 0) else None for place, sums in summed.items()}
    perplexities = (_perplexity(walk, at_teacher), _perplexity(low, at_student))
    return Residuals(matrix, [_ratio(row) for row in drift], *perplexities)


def _error(x_NK: Tensor, weight_MK: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    """(2,) on the CPU: squared error of the outputs, and their squared norm."""
    right_NM = x_NK @ weight_MK.T
    if factors is None:
        return torch.tensor([0.0, float(right_NM.square().sum())], dtype=torch.float64)
    down_RK, up_MR = factors
    error_NM = right_NM - (x_NK @ down_RK.T) @ up_MR.T
    sums = [float(error_NM.square().sum()), float(right_NM.square().sum())]
    return torch.tensor(sums, dtype=torch.float64)


def _ratio(sums: Tensor) -> float:
    wrong, whole = sums.tolist()
    return float((wrong / whole) ** 0.5) if whole > 0 else 0.0


def factors_in(layer: nn.Module, job: Job) -> tuple[Tensor, Tensor] | None:
    """(down_RK, up_MR) in float64 of a matrix of a student's layer; None where it is dense."""
    module = layer.get_submodule(job.matrix.module)
    if isinstance(module, LowRankParts):
        module = module.parts[job.matrix.part]
    if not isinstance(module, LowRankLinear):
        return None
    return module.down.detach().double(), module.up.detach().double()


def perplexity(folder: Path, batches: Sequence[Batch], *, dtype: torch.dtype) -> float:
    """exp of the mean nats of the batches' targets, over all ranks; layer by layer, so that the
    model need not fit into memory. Collective.
    """
    walk = Walk(folder, batches, dtype=dtype, device=distributed.device())
    stream = walk.embedded()
    with progress(f"perplexity: {folder.name}", len(walk)) as advance:
        for index in range(len(walk)):
            stream = walk.advanced(index, walk.layer(index), stream)
            advance()
    return _perplexity(walk, stream)


def _perplexity(walk: Walk, stream: Stream) -> float:
    """For what the last layer put out."""
    weight_VD = walk.output_weight()
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch, hidden_BTD in zip(walk.batches, walk.finished(stream), strict=True):
            nats_N = walk.nats(hidden_BTD, batch, weight_VD).double()
            sums += torch.tensor([float(nats_N.sum()), len(nats_N)], dtype=torch.float64)
    nats, tokens = distributed.sum_over_ranks(sums).tolist()
    return math.exp(nats / tokens)
