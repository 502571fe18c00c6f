"""The teacher's folder becomes the student's.

1. Every matrix is decomposed (calibration.py: a walk over the teacher's layers, and for `fisher`
   and `fwsvd` one back, gradients.py), and its components are kept.
2. The budget is spent on what each rank of each matrix would lose (ranks.py).
3. Where the student's own hidden states matter (`sequential`, `refitted`, refinement), a second
   walk builds it layer by layer (student_stream.py).
4. Rank 0 puts the folder together, tensor by tensor.

Every matrix is written when it is done, so an interrupted factorization goes on where it was. A
rank holds one layer, the statistics of a window of layers, and its share of the calibration
batches' hidden states; never a model. The ranks must see the same file system, as they must for
checkpoints.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from makd_llm import distributed
from makd_llm.checkpoint.export import expected_shapes, write_model
from makd_llm.checkpoint.folder import (
    TensorReader,
    check_target,
    read_config,
    read_generation_config,
)
from makd_llm.data.batch import Batch, digest_of
from makd_llm.errors import UserError
from makd_llm.factorize import decompose
from makd_llm.factorize.calibration import (
    METHODS,
    Calibration,
    calibrate_by_gradients,
    decompose_share,
    part_of,
)
from makd_llm.factorize.decompose import Components
from makd_llm.factorize.gradients import Known, PerMatrix, row_fisher, sensitivity
from makd_llm.factorize.matrices import (
    Job,
    dense_matrix,
    jobs_of,
    lowrank_of,
    student_tensors,
)
from makd_llm.factorize.ranks import Limits, Rank, greedy_ranks, uniform_ranks
from makd_llm.factorize.refine import Refinement
from makd_llm.factorize.student_stream import (
    STUDENT_STREAM_METHODS,
    StudentStream,
    as_tensors,
    factors_part,
    read_factors,
    refined_part,
)
from makd_llm.factorize.vocabulary import (
    hidden_covariance,
    token_counts,
    vocabulary_factors,
    vocabulary_modules,
    vocabulary_ranks,
)
from makd_llm.files import sample_of_folder
from makd_llm.layerwise.parts import Parts
from makd_llm.layerwise.walk import Walk
from makd_llm.models.families import family_of
from makd_llm.models.modeling_lowrank import is_lowrank, lowrank_config
from makd_llm.models.origin import clear_origin


@dataclass(frozen=True)
class Recipe:
    """How a student is cut.

    Attributes:
        keep_ratio: share of the factorized matrices' numbers that is kept.
        method: svd, fwsvd, asvd, whitened, fisher, sequential or refitted (decompose.py,
            student_stream.py).
        budget: uniform, greedy or sensitivity (ranks.py).
        rank_multiple: ranks are multiples of it.
        limits: role -> the least and the largest share of a matrix that may be kept.
        refine: training of each layer after its truncation, or None.
        embedding: share of the embedding's numbers that is kept, and of an untied head's; None:
            they stay dense.
    """

    keep_ratio: float
    method: str = "whitened"
    budget: str = "uniform"
    rank_multiple: int = 16
    limits: Limits = field(default_factory=dict)
    refine: Refinement | None = None
    embedding: float | None = None

    @property
    def on_stream(self) -> bool:
        """Whether the student is built on its own hidden states."""
        return self.method in STUDENT_STREAM_METHODS or self.refine is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether anything has to be known beside the weights."""
        return self.on_stream or self.method != "svd" or self.budget == "sensitivity"

    @property
    def calibrated_as(self) -> str:
        """The method of the first walk: what is known of each matrix before the student exists."""
        return "whitened" if self.method in STUDENT_STREAM_METHODS else self.method


@dataclass(frozen=True)
class MatrixReport:
    """What became of one matrix.

    key: its name within its layer; the role, with an expert's number behind it. layer: None for the
    embedding and the head.
    rank: None where it stayed dense. residual: the relative error of the truncation, by the
    method's own measure; for `whitened` that of the outputs on the calibration text. added: how
    much of that a full decomposition in the place of a randomized one would have avoided, at most.
    """

    name: str
    role: str
    key: str
    layer: int | None
    rows: int
    columns: int
    rank: Rank
    residual: float
    added: float


def factorize(
    teacher: Path,
    student: Path,
    recipe: Recipe,
    batches: Sequence[Batch],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    components: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
    keep_origin: bool = True,
    keep_parts: bool = False,
) -> list[MatrixReport]:
    """Writes the factorized student's folder; returns a report per matrix, the same on every rank.

    batches: this rank's calibration batches, of which every rank has the same number; plain svd
    needs none. dtype: in which the layers run; the student is stored in the teacher's own.
    components: a folder where all components are left, so that other ratios and budgets need no
    new calibration (about twice the teacher's bf16 size); None: they are removed at the end.
    keep_origin: the student inherits what the teacher's config says of an origin; False where it is
    this teacher that the student will be compared with.
    keep_parts: what the student was put together from stays, for a call that goes on after it,
    until `clear_parts`.
    Collective. Raises UserError for an unknown architecture, a damaged folder, too little
    calibration text, or a budget that no ranks meet.
    """
    work = _Work(teacher, student, recipe, batches, dtype, components, tell)
    if not keep_origin:
        clear_origin(work.config)
    ranks = work.ranks()
    if recipe.on_stream:
        walk, parts = work.walk, (work.components, work.factors)
        stream = StudentStream(walk, *parts, recipe.method, recipe.refine, work.embedding())
        stream.run(work.jobs, ranks)
    reports = distributed.on_main(work.reports, ranks)
    distributed.on_main(work.assemble, ranks, tokenizer)
    if not keep_parts:
        distributed.on_main(clear_parts, student)
    return reports


def clear_parts(student: Path) -> None:
    """Removes what a factorization keeps beside the student's folder until it is done."""
    shutil.rmtree(_parts_of(student), ignore_errors=True)


def _parts_of(student: Path) -> Path:
    return student.with_name(f".{student.name}.parts")


def _check_limits(limits: Limits, roles: Sequence[str]) -> None:
    unknown = [role for role in limits if role not in roles]
    if unknown:
        raise UserError(
            f"student.limits.{unknown[0]}: this model has no such matrices; it has "
            f"{', '.join(roles)}"
        )


class _Work:
    """One factorization: its matrices, and their parts on disk."""

    def __init__(
        self,
        teacher: Path,
        student: Path,
        recipe: Recipe,
        batches: Sequence[Batch],
        dtype: torch.dtype,
        components: Path | None,
        tell: Callable[[str], None],
    ) -> None:
        self.teacher, self.student, self.recipe, self.batches = teacher, student, recipe, batches
        self.dtype = dtype
        if teacher.resolve() == student.resolve():
            raise UserError(f"{student} is the teacher itself; choose another folder to write")
        check_target(student)
        self.config = read_config(teacher)
        if is_lowrank(self.config):
            raise UserError(
                f"{teacher} is a low-rank student; make it dense first (makd export {teacher} OUT "
                "--merge) and name OUT as the teacher"
            )
        _check_limits(recipe.limits, family_of(self.config).roles)
        self.reader = TensorReader(teacher)
        self.jobs = jobs_of(self.reader, self.config)
        # First of all, because a budget that cannot be met is not to be found after the work.
        self.uniform = uniform_ranks(
            [job.shape for job in self.jobs],
            recipe.keep_ratio,
            multiple=recipe.rank_multiple,
            limits=recipe.limits,
        )
        known = recipe.budget == "uniform" and components is None
        if known:  # what no rank will take is not decomposed
            self.jobs = [
                replace(j, most=r or 0) for j, r in zip(self.jobs, self.uniform, strict=True)
            ]
        self.vocabulary: dict[str, int] = {}
        if recipe.embedding is not None:
            self.vocabulary = vocabulary_ranks(
                self.reader, self.config, recipe.embedding, recipe.rank_multiple
            )
        self._check_calibration()
        depends_on = {
            "teacher": distributed.on_main(sample_of_folder, teacher),
            "batches": distributed.gather_objects(digest_of(batches)),
            "dtype": str(dtype),
        }
        scratch = _parts_of(student)
        self.components = Parts(
            components or scratch / "components",
            json.dumps(
                {
                    "method": recipe.calibrated_as,
                    "ranks": self.uniform if known else None,
                    **depends_on,
                },
                indent=1,
            ),
            tell,
        )
        self.factors = Parts(
            scratch / "factors",
            json.dumps({"recipe": asdict(recipe), **depends_on}, indent=1),
            tell,
        )

    @cached_property
    def walk(self) -> Walk:
        """The teacher's layers over the calibration batches."""
        return Walk(self.teacher, self.batches, dtype=self.dtype, device=distributed.device())

    def _check_calibration(self) -> None:
        if not self.recipe.needs_calibration:
            return
        mine = sum(int(batch.n_tokens) for batch in self.batches)
        tokens = sum(distributed.gather_objects(mine))
        width = max(job.shape.columns for job in self.jobs)
        if tokens < width:
            raise UserError(
                f"calibration: {tokens} tokens cannot fill the covariance of {width} inputs; "
                f"give at least {width} tokens, better {10 * width}"
            )

    def ranks(self) -> list[Rank]:
        """The rank of every matrix, in the order of jobs, after what has to be known for it."""
        recipe = self.recipe
        self._decompose_vocabulary()
        if recipe.budget == "uniform" and recipe.method in STUDENT_STREAM_METHODS:
            return self.uniform
        self._decompose()
        if recipe.budget == "uniform":
            return self.uniform
        return greedy_ranks(
            [job.shape for job in self.jobs],
            self._losses(),
            recipe.keep_ratio,
            multiple=recipe.rank_multiple,
            limits=recipe.limits,
        )

    def _losses(self) -> list[list[float]]:
        """What each rank of every matrix loses: of its outputs, or of the model's loss."""
        if self.recipe.budget == "greedy":
            return distributed.on_main(
                lambda: [self.components.read(part_of(j))["discarded"].tolist() for j in self.jobs]
            )
        by_key = {(job.layer, job.matrix.key): job for job in self.jobs}
        layers = [job.layer for job in self.jobs]

        @lru_cache(maxsize=max(map(layers.count, set(layers))))  # a layer's, for all its batches
        def known_of(layer: int, key: str) -> Known:
            job = by_key[layer, key]
            part = self.components.read(part_of(job))
            return dense_matrix(self.reader, job), part["down"], part["up"]

        part = "sensitivity"
        if self.components.missing([part]):
            found = sensitivity(self.walk, known_of)
            tensors = {f"{layer}.{key}": rise for (layer, key), rise in found.items()}
            distributed.on_main(self.components.write, part, tensors)
        kept = distributed.on_main(lambda: self.components.read(part))
        return [kept[f"{job.layer}.{job.matrix.key}"].tolist() for job in self.jobs]

    def _decompose(self) -> None:
        """The components of every matrix that lacks them, by what the method has to know."""
        wanted = [job for job in self.jobs if job.most > 0]
        missing = set(self.components.missing([part_of(job) for job in wanted]))
        left = [job for job in wanted if part_of(job) in missing]
        method = self.recipe.calibrated_as
        if left and method in METHODS:
            Calibration(self.walk, self.components, method).run(left)
        elif left and method == "fisher":
            calibrate_by_gradients(self.walk, self.components, left)
        elif left:
            self._decompose_weights(left, row_fisher(self.walk) if method == "fwsvd" else None)
        distributed.barrier()  # the parts of every rank are read next

    def _decompose_vocabulary(self) -> None:
        """The factors of the embedding and the head, where they are asked for."""
        missing = self.factors.missing([f"{name}.factors" for name in self.vocabulary])
        if not missing:
            return
        hidden_DD = counts_V = None
        if self.recipe.needs_calibration:
            hidden_DD = hidden_covariance(self.walk)
            counts_V = token_counts(self.batches, self.config.vocab_size)
        for number, (name, rank) in enumerate(self.vocabulary.items()):
            if f"{name}.factors" in missing and number % distributed.world_size() == (
                distributed.rank()
            ):
                found = vocabulary_factors(
                    self.reader, self.config, name, rank, hidden_DD, counts_V
                )
                self.factors.write(f"{name}.factors", as_tensors(found))
        distributed.barrier()

    def embedding(self) -> nn.Module | None:
        """The student's embedding, in the layers' dtype; None where it is the teacher's."""
        name = self.walk.family.embedding
        if name not in self.vocabulary:
            return None
        return self.walk.factored_embedding(self.factors.read(f"{name}.factors"))

    def _decompose_weights(self, left: Sequence[Job], fisher: PerMatrix | None) -> None:
        def components_of(job: Job) -> Components:
            weight_MK = dense_matrix(self.reader, job).to(distributed.device())
            if fisher is None:
                return decompose.svd(weight_MK, job.most)
            return decompose.fwsvd(weight_MK, fisher[job.layer, job.matrix.key], job.most)

        decompose_share(self.components, left, components_of)

    def reports(self, ranks: Sequence[Rank]) -> list[MatrixReport]:
        """What became of every matrix."""
        found = []
        for job, rank in zip(self.jobs, ranks, strict=True):
            shape, key = job.shape, job.matrix.key
            lost = (0.0, 0.0) if rank is None else self._residual(job, rank)
            size = (shape.rows, shape.columns, rank)
            found.append(MatrixReport(job.name, shape.role, key, job.layer, *size, *lost))
        return found + self._vocabulary_reports()

    def _vocabulary_reports(self) -> list[MatrixReport]:
        found = []
        for role, name in vocabulary_modules(self.config).items():
            if name in self.vocabulary:
                rows, columns = self.reader.shape(f"{name}.weight")
                lost = self.factors.read(f"{name}.factors")["residual"].tolist()
                size = (rows, columns, self.vocabulary[name])
                found.append(MatrixReport(name, role, role, None, *size, *lost))
        return found

    def _residual(self, job: Job, rank: int) -> tuple[float, float]:
        if self.recipe.method in STUDENT_STREAM_METHODS:
            residual, added = self.factors.read(factors_part(job))["residual"].tolist()
            return residual, added
        part = self.components.read(part_of(job))
        return decompose.residual_of(part["discarded"], float(part["added"]), rank)

    def assemble(self, ranks: Sequence[Rank], tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Writes the student's folder from the teacher's and the parts."""
        generation = read_generation_config(self.teacher)
        lowrank = lowrank_of(self.jobs, ranks) | self.vocabulary
        config = lowrank_config(self.config, lowrank)
        write_model(self.student, config, self._tensors(config, ranks), generation, tokenizer)

    def _tensors(
        self, config: PreTrainedConfig, ranks: Sequence[Rank]
    ) -> Iterator[tuple[str, Tensor]]:
        factored = set(config.lowrank or {})
        for name in expected_shapes(config):
            if name.rpartition(".")[0].partition(".parts.")[0] not in factored:
                yield name, self.reader.get(name)
        for name in self.vocabulary:
            dtype = self.reader.get(f"{name}.weight").dtype
            tensors = self.factors.read(f"{name}.factors")
            yield from ((f"{name}.{leaf}", tensors[leaf].to(dtype)) for leaf in ("down", "up"))
        for job, rank in zip(self.jobs, ranks, strict=True):
            if job.name in factored:
                factors = None if rank is None else self._factors(job, rank)
                yield from student_tensors(self.reader, job, factors).items()

    def _factors(self, job: Job, rank: int) -> tuple[Tensor, Tensor]:
        if self.recipe.refine is None:
            anew = self.recipe.method in STUDENT_STREAM_METHODS
            return read_factors(self.factors if anew else self.components, job, rank, anew=anew)
        refined = self.factors.read(refined_part(job.layer))
        return refined[f"{job.own_name}.down"], refined[f"{job.own_name}.up"]
