"""The teacher's folder becomes the student's: every matrix decomposed, the work spread over ranks.

Each rank reads, decomposes and writes its share of the matrices one at a time, straight from and to
safetensors, so no rank ever holds more of either model than the matrix it works on. Rank 0 then
puts the student's folder together. The ranks must see the same file system, as they must for
checkpoints.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from makd_llm import distributed
from makd_llm.checkpoint.export import expected_shapes, write_model
from makd_llm.checkpoint.folder import TensorReader, read_config
from makd_llm.factorize.decompose import Factors, svd, whitened
from makd_llm.factorize.ranks import uniform_rank
from makd_llm.factorize.statistics import Covariances, input_groups
from makd_llm.models.families import Family, Matrix, family_of, matrices_of
from makd_llm.models.modeling_lowrank import lowrank_config


@dataclass(frozen=True)
class MatrixReport:
    """What became of one matrix."""

    name: str
    role: str
    layer: int
    rows: int
    columns: int
    rank: int
    residual: float


def factorize(
    teacher: Path,
    student: Path,
    *,
    keep_ratio: float,
    covariances: Covariances | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[MatrixReport]:
    """Writes the factorized student's folder; returns a report per matrix, the same on every rank.

    covariances: of the matrices' inputs, for whitened SVD; None: plain SVD. progress: called after
    each matrix. Collective. Raises UserError for an unknown architecture or a damaged folder.
    """
    config = read_config(teacher)
    family = family_of(config)
    parts = student.with_name(f".{student.name}.parts")
    distributed.on_main(_fresh_folder, parts)
    matrices = matrices_of(family, config.num_hidden_layers)
    mine = matrices[distributed.rank() :: distributed.world_size()]
    reports = [
        _decompose(
            TensorReader(teacher), parts, family, layer, matrix, name, keep_ratio, covariances
        )
        for layer, matrix, name in mine
    ]
    everything = [r for share in distributed.gather_objects(reports) for r in share]
    by_name = {(r.name, r.role): r for r in everything}
    ordered = [by_name[name, matrix.role] for _, matrix, name in matrices]
    distributed.on_main(_assemble, teacher, student, parts, config, family, ordered, tokenizer)
    return ordered


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def dense_matrix(reader: TensorReader, matrix: Matrix, name: str) -> Tensor:
    """The (out, in) weight that a matrix of a family stands for, cut out of a fused or transposed
    module.
    """
    weight = reader.get(f"{name}.weight")
    if matrix.transposed:
        weight = weight.T
    return weight.chunk(matrix.parts)[matrix.part] if matrix.parts > 1 else weight


def _decompose(
    reader: TensorReader,
    parts: Path,
    family: Family,
    layer: int,
    matrix: Matrix,
    name: str,
    keep_ratio: float,
    covariances: Covariances | None,
) -> MatrixReport:
    weight_MK = dense_matrix(reader, matrix, name)
    rows, columns = weight_MK.shape
    rank = uniform_rank(rows, columns, keep_ratio)
    on_device = weight_MK.to(distributed.device())
    factors: Factors
    if covariances is None:
        factors = svd(on_device, rank)
    else:
        covariance = covariances[layer, input_groups(family)[matrix.role]]
        factors = whitened(on_device, covariance, rank)
    target = _prefix(matrix, name)
    tensors = {f"{target}.down": factors.down_RK, f"{target}.up": factors.up_MR}
    bias = f"{name}.bias"
    if bias in reader:
        whole = reader.get(bias)
        tensors[f"{target}.bias"] = whole.chunk(matrix.parts)[matrix.part]
    stored = {n: t.to("cpu", weight_MK.dtype).contiguous() for n, t in tensors.items()}
    save_file(stored, parts / f"{target}.safetensors")
    return MatrixReport(name, matrix.role, layer, rows, columns, rank, factors.residual)


def _prefix(matrix: Matrix, name: str) -> str:
    return name if matrix.parts == 1 else f"{name}.parts.{matrix.part}"


def _assemble(
    teacher: Path,
    student: Path,
    parts: Path,
    config: PreTrainedConfig,
    family: Family,
    reports: list[MatrixReport],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ranks: dict[str, int | list[int]] = {}
    for report in reports:
        if any(m.role == report.role and m.parts > 1 for m in family.matrices):
            fused = ranks.setdefault(report.name, [])
            assert isinstance(fused, list)
            fused.append(report.rank)
        else:
            ranks[report.name] = report.rank
    generation = None
    if (teacher / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(teacher, local_files_only=True)
    tensors = _student_tensors(
        TensorReader(teacher), parts, set(ranks), lowrank_config(config, ranks)
    )
    write_model(student, lowrank_config(config, ranks), tensors, generation, tokenizer)
    shutil.rmtree(parts)


def _student_tensors(
    reader: TensorReader, parts: Path, factorized: set[str], config: PreTrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    for name in expected_shapes(config):
        if name.rpartition(".")[0].partition(".parts.")[0] not in factorized:
            yield name, reader.get(name)
    for file in sorted(parts.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)
