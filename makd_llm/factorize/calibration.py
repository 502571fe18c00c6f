"""The first walk: the teacher's layers over the calibration batches, every matrix decomposed.

What the matrices read is summed layer by layer; a window of layers at a time, the sums are joined
over ranks and the matrices decomposed, each rank a share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.factorize import decompose, parallel
from makd_llm.factorize.decompose import Components
from makd_llm.factorize.gradients import backward_walk
from makd_llm.factorize.matrices import Job, dense_matrix
from makd_llm.factorize.parts import Parts
from makd_llm.factorize.ranks import Shape
from makd_llm.factorize.statistics import InputStatistics, group_of, inputs_of, real_rows
from makd_llm.factorize.walk import Stream, Walk
from makd_llm.models.families import Matrix
from makd_llm.report.progress import progress

WINDOW_BYTES = 2 * 1024**3
"""Of covariances that a rank holds before their matrices are decomposed: more, and the work spreads
more evenly over ranks."""

Method = Callable[[torch.Tensor, InputStatistics], Components]
"""(weight_MK, statistics of its inputs) -> components."""

METHODS: dict[str, Method] = {
    "asvd": lambda weight_MK, seen: decompose.asvd(weight_MK, seen.mean_abs_K),
    "whitened": lambda weight_MK, seen: decompose.whitened(weight_MK, seen.covariance_KK),
}


def part_of(job: Job) -> str:
    """The name under which a matrix's components are kept."""
    return f"{job.layer:04d}.{job.matrix.role}.components"


@dataclass
class Calibration:
    """Decomposes the matrices of a teacher and keeps their components."""

    walk: Walk
    parts: Parts
    method: str

    def run(self, left: Sequence[Job]) -> None:
        """Decomposes these matrices. Collective."""
        layers = {job.layer for job in left}
        stream = self.walk.embedded()
        pending: dict[tuple[int, str], InputStatistics] = {}
        with progress("factorize: layers", max(layers) + 1) as advance:
            for index in range(max(layers) + 1):
                layer = self.walk.layer(index)
                if index in layers:
                    stream = self._gather(index, layer, stream, pending)
                else:
                    stream = self.walk.advanced(index, layer, stream)
                held = sum(seen.covariance_KK.nbytes for seen in pending.values())
                if held > WINDOW_BYTES or index == max(layers):
                    self._decompose(left, pending)
                    pending = {}
                advance()

    def _gather(
        self,
        index: int,
        layer: nn.Module,
        stream: Stream,
        into: dict[tuple[int, str], InputStatistics],
    ) -> Stream:
        """One layer over all batches: its outputs; the statistics of its inputs go into `into`."""
        walk, after = self.walk, []
        firsts = tuple(group[0] for group in walk.family.shared_inputs)
        with inputs_of(layer, walk.family, firsts) as inputs, torch.no_grad():
            for batch, before in zip(walk.batches, stream, strict=True):
                after.append(walk.step(index, layer, batch, before).to("cpu"))
                for role, x_BTK in inputs.items():
                    x_NK = real_rows(x_BTK, batch)
                    if (index, role) not in into:
                        into[index, role] = InputStatistics.zeros(x_NK.shape[1], walk.device)
                    into[index, role].add(x_NK)
        return after

    def _decompose(
        self, left: Sequence[Job], pending: dict[tuple[int, str], InputStatistics]
    ) -> None:
        """This rank's share of the matrices whose inputs are known."""
        summed = {key: seen.over_ranks(*key) for key, seen in pending.items()}
        group = group_of(self.walk.family)

        def components_of(job: Job) -> Components:
            weight_MK = dense_matrix(self.walk.reader, job).to(self.walk.device)
            seen = summed[job.layer, group[job.matrix.role]]
            return METHODS[self.method](weight_MK, seen)

        ready = [job for job in left if (job.layer, group[job.matrix.role]) in summed]
        decompose_share(self.parts, ready, components_of)


def calibrate_by_gradients(walk: Walk, parts: Parts, left: Sequence[Job]) -> None:
    """The components of `fisher`, on one walk back: both sides' statistics, layer by layer."""
    group, groups = group_of(walk.family), walk.family.shared_inputs
    inputs: dict[str, InputStatistics] = {}
    outputs: dict[str, Tensor] = {}

    def visit(
        layer: int, matrix: Matrix, batch: Batch, x_BTK: Tensor, gradient_BTM: Tensor
    ) -> None:
        gradient_NM = real_rows(gradient_BTM, batch, torch.float32)
        if matrix.role not in outputs:
            width = gradient_NM.shape[1]
            outputs[matrix.role] = gradient_NM.new_zeros(width, width, dtype=torch.float64)
        outputs[matrix.role] += gradient_NM.T @ gradient_NM
        if group[matrix.role] == matrix.role:
            x_NK = real_rows(x_BTK, batch)
            if matrix.role not in inputs:
                inputs[matrix.role] = InputStatistics.zeros(x_NK.shape[1], walk.device)
            inputs[matrix.role].add(x_NK)

    def after_layer(layer: int) -> None:
        summed = {role: inputs[role].over_ranks(layer, role) for role, *_ in groups}
        asked = {role: distributed.sum_over_ranks(outputs[role]) for role in sorted(outputs)}
        inputs.clear()
        outputs.clear()

        def components_of(job: Job) -> Components:
            weight_MK = dense_matrix(walk.reader, job).to(walk.device)
            role = job.matrix.role
            return decompose.fisher(weight_MK, summed[group[role]].covariance_KK, asked[role])

        decompose_share(parts, [job for job in left if job.layer == layer], components_of)

    backward_walk(walk, visit, after_layer)


def decompose_share(
    parts: Parts, jobs: Sequence[Job], components_of: Callable[[Job], Components]
) -> None:
    """Decomposes this rank's share of the jobs and keeps what comes of it."""
    costs = [parallel.decomposition_cost(job.shape.rows, job.shape.columns) for job in jobs]
    for number in parallel.mine(costs):
        keep(parts, jobs[number], components_of(jobs[number]))


def components_kept(shape: Shape) -> int:
    """Break-even: with that many, a factor pair is as large as the matrix."""
    return -(-shape.dense // (shape.rows + shape.columns))


def keep(parts: Parts, job: Job, components: Components) -> None:
    """Writes as many components as the matrix may get, and what each rank loses."""
    most = components_kept(job.shape)
    tensors = {
        "down": components.down_JK[:most].float(),
        "up": components.up_MJ[:, :most].float(),
        "discarded": components.discarded,
    }
    parts.write(part_of(job), tensors)
