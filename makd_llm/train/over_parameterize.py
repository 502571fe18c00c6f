"""A student's matrices as chains of tensors while it learns (OPDF), made before DeepSpeed takes it.

Every rank decomposes its share of them, from the student's files, and of the teacher's matrices
those that theirs are compared with. Under ZeRO-3 the tensors are partitioned as they are made.
"""
# M outputs, K inputs, R rank

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from makd_llm import distributed
from makd_llm.checkpoint.folder import TensorReader, read_config
from makd_llm.errors import UserError
from makd_llm.factorize.matrices import dense_matrix, jobs_of
from makd_llm.memory import return_freed_memory
from makd_llm.models.causal import CausalModel
from makd_llm.models.families import Matrix
from makd_llm.models.modeling_lowrank import LowRankLinear, LowRankParts, fused_layout
from makd_llm.models.pairing import Pairing, Places
from makd_llm.models.tensor_train import (
    Kind,
    OverParameterized,
    Split,
    TensorTrain,
    decompose,
    ends_of,
    split_of,
)


@dataclass(frozen=True)
class Chains:
    """How many tensors each matrix of these roles becomes, and the layers whose are compared."""

    tensors: int
    roles: tuple[str, ...]
    compared: frozenset[int] = frozenset()


class Counts(NamedTuple):
    """Matrices that became chains, the numbers in them, and those in their tensors."""

    matrices: int
    numbers: int
    in_tensors: int


class _Chain(NamedTuple):
    """One matrix. name: in the student's files. members: the family's matrices that it is, or is a
    factor of; several where they are stored as one.
    """

    train: TensorTrain
    name: str
    kind: Kind
    layer: int
    members: tuple[Matrix, ...]


def over_parameterize(
    model: CausalModel,
    chains: Chains,
    start: Path,
    teacher: Path,
    pairing: Pairing,
    deepspeed_config: dict[str, Any],
    dtype: torch.dtype,
) -> Counts:
    """Replaces linear modules of the student in place. start, teacher: the folders of both models.

    Collective. Raises UserError where a layer has nothing to be split, or to be compared.
    """
    sharded = deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3

    def empty(split: Split, transposed: bool) -> TensorTrain:
        with ExitStack() as stack:
            if sharded:
                import deepspeed

                stack.enter_context(
                    deepspeed.zero.Init(config_dict_or_path=deepspeed_config, dtype=dtype)
                )
            train = TensorTrain(split, dtype, transposed=transposed, recompute=sharded)
        return train if sharded else train.to(distributed.device())

    made = list(_replaced(model, chains, empty))
    if not made:
        raise UserError(
            f"distil.over_parameterize: the student has no matrix of the roles "
            f"{', '.join(chains.roles)} whose sizes have divisors; name other roles, or set "
            "distil.over_parameterize=null"
        )
    gc.collect()  # under zero.Init parameters refer to themselves, and so do those that are gone
    model.compared = _compared(made, chains)
    everything = [chain for _, found in made for chain in found]
    decomposed = _Decomposer(model, chains, start, teacher, pairing)
    ranks, own = distributed.world_size(), distributed.rank()
    for first in range(0, len(everything), ranks):
        window = everything[first : first + ranks]
        shares = distributed.gather_objects([decomposed(c, dtype) for c in window[own : own + 1]])
        found = [pair for share in shares for pair in share]
        for chain, (tensors, targets) in zip(window, found, strict=True):
            chain.train.set_targets({k: t.to(distributed.device()) for k, t in targets.items()})
            _fill(chain.train, tensors, sharded=sharded)
    return_freed_memory()
    splits = [chain.train.split for chain in everything]
    numbers = sum(math.prod(split.rows) * math.prod(split.columns) for split in splits)
    return Counts(len(splits), numbers, sum(split.parameters for split in splits))


def _replaced(
    model: CausalModel, chains: Chains, empty: Callable[[Split, bool], TensorTrain]
) -> Iterator[tuple[OverParameterized, list[_Chain]]]:
    """Puts modules with empty chains in the place of the linear ones; these, with their chains."""
    config = model.model.config
    for index in range(config.num_hidden_layers):
        layer = model.model.get_submodule(f"{model.family.layers}.{index}")
        by_module: dict[str, list[Matrix]] = {}
        for matrix in model.family.matrices(config, index):
            by_module.setdefault(matrix.module, []).append(matrix)
        for path, matrices in by_module.items():
            for place, members in _places(layer.get_submodule(path), path, matrices, chains.roles):
                name = f"{model.family.layers}.{index}.{place}"
                replaced = _replace(layer, place, name, index, members, chains.tensors, empty)
                if replaced is not None:
                    yield replaced


def _places(
    module: nn.Module, path: str, matrices: list[Matrix], roles: tuple[str, ...]
) -> Iterator[tuple[str, tuple[Matrix, ...]]]:
    """What of a module is asked for: it, or parts of it, with the matrices that are there."""
    asked = [matrix for matrix in matrices if matrix.role in roles]
    if isinstance(module, LowRankParts):
        for matrix in asked:
            yield f"{path}.parts.{matrix.part}", (matrix,)
    elif asked:
        if len(asked) < len(matrices):
            raise UserError(
                f"distil.over_parameterize.roles: {', '.join(m.role for m in matrices)} are one "
                f"matrix in {path}; name all of them or none"
            )
        yield path, tuple(matrices)


def _replace(
    layer: nn.Module,
    place: str,
    name: str,
    index: int,
    members: tuple[Matrix, ...],
    tensors: int,
    empty: Callable[[Split, bool], TensorTrain],
) -> tuple[OverParameterized, list[_Chain]] | None:
    """None: none of the module's matrices can be split, and it stays as it is."""
    module: Any = layer.get_submodule(place)
    shapes: dict[Kind, tuple[int, int]]
    if isinstance(module, LowRankLinear):
        rank = module.rank
        shapes = {"down": (rank, module.in_features), "up": (module.out_features, rank)}
    elif isinstance(module, Conv1D):
        shapes = {"weight": (module.nf, module.nx)}
    else:
        shapes = {"weight": (module.out_features, module.in_features)}
    matrices: dict[str, TensorTrain | nn.Parameter] = {}
    found = []
    for kind, shape in shapes.items():
        split = split_of(shape, kind, tensors)
        if split is None:
            matrices[kind] = getattr(module, kind)
            continue
        matrices[kind] = train = empty(split, isinstance(module, Conv1D))
        found.append(_Chain(train, f"{name}.{kind}", kind, index, members))
    if not found:
        return None
    owner, _, child = place.rpartition(".")
    made = OverParameterized(matrices, module.bias)
    setattr(layer.get_submodule(owner), child, made)
    return made, found


def _compared(
    made: list[tuple[OverParameterized, list[_Chain]]], chains: Chains
) -> dict[int, list[OverParameterized]]:
    """By layer, the modules that have something to be compared."""
    compared: dict[int, list[OverParameterized]] = {index: [] for index in chains.compared}
    for module, found in made:
        if found[0].layer in compared and any(chain.train.split.compared for chain in found):
            compared[found[0].layer].append(module)
    nothing = [index for index, modules in compared.items() if not modules]
    if nothing:
        raise UserError(
            f"distil.objectives: layer {nothing[0]} has no auxiliary tensors to be compared, as "
            "its sizes have no divisors; name other layers for auxiliary"
        )
    return compared


class _Decomposer:
    """Tensors of chains, and the teacher's that they are compared with, from both models' files."""

    def __init__(
        self, model: CausalModel, chains: Chains, start: Path, teacher: Path, pairing: Pairing
    ) -> None:
        self.config = model.model.config
        self.compared, self.pairing = chains.compared, pairing
        self.student = TensorReader(start)
        if self.compared:
            self.teacher = TensorReader(teacher)
            jobs = jobs_of(self.teacher, read_config(teacher))
            self.jobs = {(job.layer, job.matrix.key): job for job in jobs}

    def __call__(self, chain: _Chain, dtype: torch.dtype) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Both on the CPU, the latter by their places; rounded only at the end."""
        matrix = self.student.get(chain.name).to(distributed.device())
        split = chain.train.split
        tensors = decompose(matrix.T if chain.train.transposed else matrix, split)
        targets: dict[int, Tensor] = {}
        if chain.layer in self.compared and split.compared:
            like = {place: tensors[place] for place in split.compared}
            targets = ends_of(self._taught(chain).to(matrix.device), split, like)
        return (
            [tensor.to("cpu", dtype) for tensor in tensors],
            {place: tensor.to("cpu", dtype) for place, tensor in targets.items()},
        )

    def _taught(self, chain: _Chain) -> Tensor:
        """The teacher's matrix; of the dimensions that are compared, the student's features."""
        (layer,) = self.pairing.teacher_layers([chain.layer])
        parts = []
        for member in chain.members:
            matrix = dense_matrix(self.teacher, self.jobs[layer, member.key])
            if chain.kind != "down":
                matrix = _picked(matrix, self.pairing.features(chain.layer, member.role), 0)
            if chain.kind != "up":
                inputs = self.pairing.features(chain.layer, member.role, of_input=True)
                matrix = _picked(matrix, inputs, 1)
            parts.append(matrix)
        layout = fused_layout(self.config, chain.members[0].module)
        return parts[0] if layout is None or len(parts) == 1 else layout.join(parts, 0)


def _picked(matrix_MK: Tensor, places: Places | None, dim: int) -> Tensor:
    """The features that the student kept; where several were merged into one, their mean."""
    if places is None:
        return matrix_MK
    picked = [matrix_MK.index_select(dim, torch.tensor(place)).mean(dim) for place in places]
    return torch.stack(picked, dim)


def _fill(train: TensorTrain, tensors: list[Tensor], *, sharded: bool) -> None:
    def write() -> None:
        for parameter, tensor in zip(train.tensors, tensors, strict=True):
            parameter.data.copy_(tensor)

    if not sharded:
        write()
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(train.tensors, modifier_rank=0):
        if distributed.is_main():
            write()
