"""The second walk: the student is built layer by layer beside the teacher, on its own stream.

What an earlier cut has lost is then known to the matrices after it. Inside a layer the stages
follow each other in the order in which they work: q k v, then o on what the factored q k v make,
and so on; in a mixture of experts gate and up of all experts, then down of all of them.
"""
# M outputs, K inputs, R rank

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from makd_llm import distributed
from makd_llm.factorize import decompose, parallel
from makd_llm.factorize.calibration import part_of, widths_of_inputs
from makd_llm.factorize.decompose import Factors
from makd_llm.factorize.matrices import Job, dense_matrix, place
from makd_llm.factorize.ranks import Rank
from makd_llm.factorize.refine import Refinement, refine_block
from makd_llm.factorize.statistics import group_of, inputs_of, paired
from makd_llm.layerwise.parts import Parts
from makd_llm.layerwise.walk import Stream, Walk
from makd_llm.models.families import stages
from makd_llm.report.progress import progress

STUDENT_STREAM_METHODS = ("sequential", "refitted")


def factors_part(job: Job) -> str:
    """The name under which a matrix's factors are kept."""
    return f"{job.layer:04d}.{job.matrix.key}.factors"


def refined_part(layer: int) -> str:
    """The name under which a layer's refined factors are kept."""
    return f"{layer:04d}.refined"


@dataclass
class StudentStream:
    """Builds a student's layers. method: `sequential` and `refitted` decompose anew; any other
    takes the components that calibration kept, to be refined. factors: where what is made goes.
    embedding: the student's, where it is not the teacher's.
    """

    walk: Walk
    components: Parts
    factors: Parts
    method: str
    refinement: Refinement | None
    embedding: nn.Module | None = None

    def run(self, jobs: Sequence[Job], ranks: Sequence[Rank]) -> None:
        """Every matrix of every layer; what it makes is in `factors`. Collective."""
        walk = self.walk
        teacher = walk.embedded()
        student = list(teacher) if self.embedding is None else walk.embedded(self.embedding)
        with progress("factorize: student's layers", len(walk)) as advance:
            for index in range(len(walk)):
                own = [(j, r) for j, r in zip(jobs, ranks, strict=True) if j.layer == index]
                original = walk.layer(index)
                layer = deepcopy(original)
                after = walk.advanced(index, original, teacher)
                for stage in stages(walk.matrices(index)):
                    keys = {matrix.key for group in stage for matrix in group}
                    members = [(j, r) for j, r in own if j.matrix.key in keys]
                    self._place(index, layer, original, members, student, teacher)
                if self.refinement:
                    self._refine(index, layer, own, student, teacher, after)
                student = walk.advanced(index, layer, student)
                teacher = after
                advance()

    def _place(
        self,
        index: int,
        layer: nn.Module,
        original: nn.Module,
        members: Sequence[tuple[Job, Rank]],
        student: Stream,
        teacher: Stream,
    ) -> None:
        """Factorizes one stage of a layer and puts the factors into the student's layer."""
        cut = [(job, rank) for job, rank in members if rank is not None]
        if self.method in STUDENT_STREAM_METHODS:
            missing = set(self.factors.missing([factors_part(job) for job, _ in cut]))
            todo = [(job, rank) for job, rank in cut if factors_part(job) in missing]
            if todo:
                widths = widths_of_inputs(self.walk.matrices(index), [job for job, _ in todo])
                sums = self._sums(index, layer, original, widths, student, teacher)
                group = group_of(self.walk.matrices(index))
                costs = [
                    parallel.decomposition_cost(j.shape.rows, j.shape.columns) for j, _ in todo
                ]
                for number in parallel.mine(costs):
                    job, rank = todo[number]
                    self._factorize(job, rank, sums[group[job.matrix.key]])
                distributed.barrier()
        anew = self.method in STUDENT_STREAM_METHODS
        parts = self.factors if anew else self.components
        place(
            layer,
            [
                (job, None if rank is None else read_factors(parts, job, rank, anew=anew))
                for job, rank in members
            ],
        )

    def _sums(
        self,
        index: int,
        layer: nn.Module,
        original: nn.Module,
        widths: dict[str, int],
        student: Stream,
        teacher: Stream,
    ) -> dict[str, dict[str, Tensor]]:
        """Per input X' X'^T of the student's and, for refitting, X X'^T and X X^T with the
        teacher's, over the tokens that come to the matrix in both; over all ranks.

        widths: of the inputs, by key.
        """
        walk, refitted = self.walk, self.method == "refitted"
        matrices, keys = walk.matrices(index), widths.keys()
        names = ("student", "cross", "teacher") if refitted else ("student",)
        sums = {
            key: {
                n: torch.zeros(width, width, dtype=torch.float64, device=walk.device) for n in names
            }
            for key, width in widths.items()
        }
        with torch.no_grad():
            for batch, before, teachers in zip(walk.batches, student, teacher, strict=True):
                with inputs_of(layer, matrices, keys, batch, only=True) as seen:
                    walk.step(index, layer, batch, before)
                if not refitted:
                    for key, read in seen.items():
                        x_NK = read.x_NK.double()
                        sums[key]["student"].addmm_(x_NK.T, x_NK)
                    continue
                with inputs_of(original, matrices, keys, batch, only=True) as targets:
                    walk.step(index, original, batch, teachers)
                for key in seen.keys() & targets.keys():
                    x_NK, target_NK = (x.double() for x in paired(seen[key], targets[key]))
                    sums[key]["student"].addmm_(x_NK.T, x_NK)
                    sums[key]["cross"].addmm_(target_NK.T, x_NK)
                    sums[key]["teacher"].addmm_(target_NK.T, target_NK)
        return {
            key: {n: distributed.sum_over_ranks(total) for n, total in own.items()}
            for key, own in sums.items()
        }

    def _factorize(self, job: Job, rank: int, sums: dict[str, Tensor]) -> None:
        weight_MK = dense_matrix(self.walk.reader, job).to(self.walk.device)
        if self.method == "refitted":
            found = decompose.refitted(
                weight_MK, sums["student"], sums["cross"], sums["teacher"], rank
            )
        else:
            found = decompose.whitened(weight_MK, sums["student"], rank)
        factors: Factors = found.first(rank)
        self.factors.write(factors_part(job), as_tensors(factors))

    def _refine(
        self,
        index: int,
        layer: nn.Module,
        own: Sequence[tuple[Job, Rank]],
        student: Stream,
        teacher: Stream,
        after: Stream,
    ) -> None:
        assert self.refinement is not None
        part = refined_part(index)
        if self.factors.missing([part]):
            streams = {"student": student, "teacher": teacher}
            refined, losses = refine_block(
                self.walk, index, layer, streams, after, self.refinement, self._unrounded(own)
            )
            losses_S = torch.tensor(losses, dtype=torch.float64)
            distributed.on_main(self.factors.write, part, refined | {"losses": losses_S})
            return
        refined = self.factors.read(part)
        with torch.no_grad():
            for name in self._unrounded(own):
                layer.get_parameter(name).copy_(refined[name])

    def _unrounded(self, own: Sequence[tuple[Job, Rank]]) -> dict[str, Tensor]:
        """The factors of a layer before refinement, by their names in it."""
        anew = self.method in STUDENT_STREAM_METHODS
        parts = self.factors if anew else self.components
        found: dict[str, Tensor] = {}
        for job, rank in own:
            if rank is not None:
                down_RK, up_MR = read_factors(parts, job, rank, anew=anew)
                found |= {f"{job.own_name}.down": down_RK, f"{job.own_name}.up": up_MR}
        return found


def as_tensors(factors: Factors) -> dict[str, Tensor]:
    """A factor pair as a part keeps it."""
    return {
        "down": factors.down_RK.float(),
        "up": factors.up_MR.float(),
        "residual": torch.tensor([factors.residual, factors.added], dtype=torch.float64),
    }


def read_factors(parts: Parts, job: Job, rank: int, *, anew: bool) -> tuple[Tensor, Tensor]:
    """(down_RK, up_MR) of a matrix before refinement. anew: made on this walk, and not cut from the
    components of calibration.
    """
    tensors = parts.read(factors_part(job) if anew else part_of(job))
    return tensors["down"][:rank], tensors["up"][:, :rank]
