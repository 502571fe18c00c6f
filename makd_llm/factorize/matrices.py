"""The matrices of a model as jobs: what each is, where its weights are, and how a factor pair takes
its place.
"""
# M outputs, K inputs, R rank

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from makd_llm.checkpoint.folder import TensorReader
from makd_llm.errors import UserError
from makd_llm.factorize.ranks import MatrixShape, Rank
from makd_llm.models.families import Matrix, matrices_of
from makd_llm.models.modeling_lowrank import Fused, Ranks, factor_module, fused_layout


@dataclass(frozen=True)
class Job:
    """One matrix to be factorized.

    name: of the module that stores it. layout: of that module, where it stores several. most: how
    many components of it will be wanted.
    """

    layer: int
    matrix: Matrix
    name: str
    shape: MatrixShape
    most: int
    layout: Fused | None = None

    @property
    def prefix(self) -> str:
        """Of the names of its tensors in the student."""
        return self.name if self.layout is None else f"{self.name}.parts.{self.matrix.part}"

    @property
    def own_name(self) -> str:
        """The same within its layer."""
        return self.matrix.module + self.prefix.removeprefix(self.name)

    def own(self, whole: Tensor) -> Tensor:
        """Its share of a tensor whose first dimension is the module's outputs."""
        return whole if self.layout is None else self.layout.split(whole, 0)[self.matrix.part]


def jobs_of(reader: TensorReader, config: PreTrainedConfig) -> list[Job]:
    """All matrices of a model in order, with the shapes that its files have."""
    jobs = []
    for layer, matrix, name in matrices_of(config):
        stored = reader.shape(f"{name}.weight")
        rows, columns = reversed(stored) if matrix.transposed else stored
        layout = fused_layout(config, name)
        rows = rows if layout is None else layout.size(matrix.part)
        shape = MatrixShape(f"layer {layer} {matrix.key}", matrix.role, rows, columns)
        jobs.append(Job(layer, matrix, name, shape, shape.break_even, layout))
    return jobs


def dense_matrix(reader: TensorReader, job: Job) -> Tensor:
    """The (M, K) weight that a job stands for, cut out of a fused or transposed module. Raises
    UserError where it is of a type that is not a weight by itself (quantized ones have scales).
    """
    weight = reader.get(f"{job.name}.weight")
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise UserError(
            f"{job.name}.weight is stored as {str(weight.dtype).removeprefix('torch.')}, not as "
            "bfloat16, float16, float32 or float64; save the model in one of these"
        )
    return job.own(weight.T if job.matrix.transposed else weight)


def lowrank_of(jobs: Sequence[Job], ranks: Sequence[Rank]) -> dict[str, Ranks]:
    """Module name -> rank, or the ranks of a fused module's parts, as a student's config has it.

    Modules that stay dense are left out.
    """
    found: dict[str, Ranks] = {}
    for job, rank in zip(jobs, ranks, strict=True):
        if job.layout is None:
            if rank is not None:
                found[job.name] = rank
        else:
            fused = found.setdefault(job.name, [])
            assert isinstance(fused, list)
            fused.append(rank)
    return {name: r for name, r in found.items() if not isinstance(r, list) or any(r)}


def student_tensors(
    reader: TensorReader, job: Job, factors: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors of one matrix of a factored module under the names that they have in the student.

    factors: (down_RK, up_MR); None: a part of a fused module that stays dense.
    """
    dtype = reader.get(f"{job.name}.weight").dtype
    prefix = job.prefix
    if factors is None:
        tensors = {f"{prefix}.weight": dense_matrix(reader, job)}
    else:
        down_RK, up_MR = factors
        tensors = {f"{prefix}.down": down_RK.to(dtype), f"{prefix}.up": up_MR.to(dtype)}
    if f"{job.name}.bias" in reader:
        tensors[f"{prefix}.bias"] = job.own(reader.get(f"{job.name}.bias"))
    return tensors


def place(layer: nn.Module, found: Sequence[tuple[Job, tuple[Tensor, Tensor] | None]]) -> None:
    """Puts factor pairs in the place of a layer's dense matrices.

    layer: with its dense weights. found: (down_RK, up_MR) of each job, or None where it stays
    dense; all parts of a fused module are given together. The layer's dtype and device are kept.
    """
    modules: dict[str, list[tuple[Job, tuple[Tensor, Tensor] | None]]] = {}
    for job, pair in found:
        modules.setdefault(job.matrix.module, []).append((job, pair))
    for name, members in modules.items():
        if any(pair is not None for _, pair in members):
            _place_in(layer, name, members)


@torch.no_grad()
def _place_in(
    layer: nn.Module, name: str, members: Sequence[tuple[Job, tuple[Tensor, Tensor] | None]]
) -> None:
    dense: Any = layer.get_submodule(name)
    weight, bias = dense.weight, getattr(dense, "bias", None)
    ranks = [None if pair is None else len(pair[0]) for _, pair in members]
    first = members[0][0]
    rank = ranks if first.layout else ranks[0]
    assert rank is not None
    factor_module(layer, name, rank, first.layout)
    factored: Any = layer.get_submodule(name).to(weight.device, weight.dtype)
    for number, (job, pair) in enumerate(members):
        part = factored.parts[number] if job.layout else factored
        if pair is None:
            part.weight.copy_(job.own(weight.T if job.matrix.transposed else weight))
        else:
            part.down.copy_(pair[0])
            part.up.copy_(pair[1])
        if bias is not None:
            part.bias.copy_(job.own(bias))
