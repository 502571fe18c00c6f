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
from makd_llm.errors import UserError
from makd_llm.factorize import decompose, parallel
from makd_llm.factorize.decompose import Components
from makd_llm.factorize.gradients import backward_walk
from makd_llm.factorize.matrices import Job, dense_matrix
from makd_llm.factorize.statistics import InputStatistics, Read, group_of, inputs_of
from makd_llm.layerwise.parts import Parts
from makd_llm.layerwise.walk import Stream, Walk
from makd_llm.models.families import Matrix
from makd_llm.report.progress import progress

WINDOW_BYTES = 2 * 1024**3
"""Of covariances that a rank holds before their matrices are decomposed: more, and the work spreads
more evenly over ranks."""

Method = Callable[[torch.Tensor, InputStatistics, int], Components]
"""(weight_MK, statistics of its inputs, how many are wanted) -> components."""

METHODS: dict[str, Method] = {
    "asvd": lambda weight_MK, seen, most: decompose.asvd(weight_MK, seen.mean_abs_K, most),
    "whitened": lambda weight_MK, seen, most: decompose.whitened(
        weight_MK, seen.covariance_KK, most
    ),
}


def part_of(job: Job) -> str:
    """The name under which a matrix's components are kept."""
    return f"{job.layer:04d}.{job.matrix.key}.components"


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
                    own = [job for job in left if job.layer == index]
                    stream = self._gather(index, layer, stream, own, pending)
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
        own: Sequence[Job],
        into: dict[tuple[int, str], InputStatistics],
    ) -> Stream:
        """One layer over all batches: its outputs; the statistics of what these of its matrices
        read go into `into`.
        """
        walk, after = self.walk, []
        matrices = walk.matrices(index)
        widths = widths_of_inputs(matrices, own)
        for key, width in widths.items():  # on every rank, whichever experts its tokens reach
            into[index, key] = InputStatistics.zeros(width, walk.device)
        with torch.no_grad():
            for batch, before in zip(walk.batches, stream, strict=True):
                with inputs_of(layer, matrices, widths.keys(), batch) as inputs:
                    after.append(walk.step(index, layer, batch, before).to("cpu"))
                for key, read in inputs.items():
                    into[index, key].add(read.x_NK.double())
        return after

    def _decompose(
        self, left: Sequence[Job], pending: dict[tuple[int, str], InputStatistics]
    ) -> None:
        """This rank's share of the matrices whose inputs are known."""
        summed = {key: seen.over_ranks(*key) for key, seen in pending.items()}
        group = {layer: group_of(self.walk.matrices(layer)) for layer, _ in summed}

        def components_of(job: Job) -> Components:
            weight_MK = dense_matrix(self.walk.reader, job).to(self.walk.device)
            seen = summed[job.layer, group[job.layer][job.matrix.key]]
            return METHODS[self.method](weight_MK, seen, job.most)

        ready = [job for job in left if job.layer in group]
        decompose_share(self.parts, ready, components_of)


def widths_of_inputs(matrices: Sequence[Matrix], jobs: Sequence[Job]) -> dict[str, int]:
    """Key of each input that these of a layer's matrices read -> how wide it is; in their order."""
    group = group_of(matrices)
    return {group[job.matrix.key]: job.shape.columns for job in jobs}


def calibrate_by_gradients(walk: Walk, parts: Parts, left: Sequence[Job]) -> None:
    """The components of `fisher`, on one walk back: both sides' statistics, a window of layers at a
    time. Collective.
    """
    jobs: dict[int, list[Job]] = {}
    for job in left:
        jobs.setdefault(job.layer, []).append(job)
    inputs: dict[tuple[int, str], InputStatistics] = {}
    outputs: dict[tuple[int, str], Tensor] = {}

    def before_layer(layer: int) -> None:
        own = jobs.get(layer, [])
        for key, width in widths_of_inputs(walk.matrices(layer), own).items():
            inputs[layer, key] = InputStatistics.zeros(width, walk.device)
        for job in own:
            shape = (job.shape.rows, job.shape.rows)
            total_MM = torch.zeros(shape, dtype=torch.float64, device=walk.device)
            outputs[layer, job.matrix.key] = total_MM

    def visit(layer: int, matrix: Matrix, batch: Batch, read: Read, gradient_NM: Tensor) -> None:
        place = layer, matrix.key
        if place in outputs:
            gradient_NM = gradient_NM.float()
            outputs[place] += gradient_NM.T @ gradient_NM
        if place in inputs:
            inputs[place].add(read.x_NK.double())

    def after_layer(layer: int) -> None:
        held = sum(seen.covariance_KK.nbytes for seen in inputs.values())
        held += sum(total.nbytes for total in outputs.values())
        if held <= WINDOW_BYTES and layer != min(jobs):
            return
        summed = {place: seen.over_ranks(*place) for place, seen in inputs.items()}
        for total in outputs.values():
            distributed.sum_in_place(total)

        def components_of(job: Job) -> Components:
            weight_MK = dense_matrix(walk.reader, job).to(walk.device)
            seen = summed[job.layer, group_of(walk.matrices(job.layer))[job.matrix.key]]
            return decompose.fisher(
                weight_MK,
                seen.covariance_KK,
                outputs[job.layer, job.matrix.key],
                seen.tokens,
                job.most,
            )

        layers = sorted({number for number, _ in outputs})
        decompose_share(parts, [job for number in layers for job in jobs[number]], components_of)
        inputs.clear()
        outputs.clear()

    backward_walk(walk, visit, before_layer, after_layer)


def decompose_share(
    parts: Parts, jobs: Sequence[Job], components_of: Callable[[Job], Components]
) -> None:
    """Decomposes this rank's share of the jobs and keeps what comes of it. Raises UserError, with
    the matrix, where its weights or what calibration gave are not finite.
    """
    costs = [parallel.decomposition_cost(job.shape.rows, job.shape.columns) for job in jobs]
    for number in parallel.mine(costs):
        try:
            found = components_of(jobs[number])
        except ValueError as error:
            raise UserError(f"{jobs[number].name}: {error}; look at the model") from error
        keep(parts, jobs[number], found)


def keep(parts: Parts, job: Job, components: Components) -> None:
    """Writes as many components as are wanted of the matrix, and what each rank loses."""
    tensors = {
        "down": components.down_JK.float(),
        "up": components.up_MJ.float(),
        "discarded": components.discarded,
        "added": torch.tensor(components.added, dtype=torch.float64),
    }
    parts.write(part_of(job), tensors)
