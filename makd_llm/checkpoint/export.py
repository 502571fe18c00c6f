"""Students as Hugging Face folders: factored, or merged into dense weights; and what they count.

`write_model` writes the factored form: every factorized matrix as `down` and `up`, a config that
names the ranks, and a copy of modeling_lowrank.py. It loads with `AutoModelForCausalLM` after
`import makd_llm`, and elsewhere with `trust_remote_code=True`. `merge` multiplies the factors out,
one matrix at a time, into the teacher's own architecture, which needs no code of ours: it is as
large as the teacher and equals the student up to rounding.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from makd_llm.checkpoint.expert_names import mixtral_name
from makd_llm.checkpoint.folder import (
    INDEX_FILE,
    TensorReader,
    TensorWriter,
    belongs_to_model_folder,
    read_config,
    write_config,
)
from makd_llm.errors import UserError
from makd_llm.models.families import Family, family_of, matrices_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from makd_llm.models.modeling_lowrank import Fused


@dataclass(frozen=True)
class ParameterCount:
    """Stored parameters of a model, tied weights counted once.

    Attributes:
        blocks: everything inside the decoder layers.
        total: the whole model, embeddings and head included.
        factorized: the weights of the matrices that the family names, dense or as factors, without
            their biases: what `keep_ratio` is a ratio of.
    """

    blocks: int
    total: int
    factorized: int


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that the model of this config stores, tied ones once;
    experts have tensors of their own, also a dense model's.
    """
    from makd_llm.models.modeling_lowrank import model_class_for, unstack_experts

    with torch.device("meta"):
        model = model_class_for(config)(copy.deepcopy(config))
        unstack_experts(model)
    # An untied head is a parameter of its own, a tied one a second name of the embedding.
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def name_in_file(config: PreTrainedConfig, name: str) -> str:
    """The name under which a tensor of `expected_shapes` is written: what transformers reads."""
    return mixtral_name(name) if config.model_type == "mixtral" else name


def write_model(
    folder: str | Path,
    config: PreTrainedConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    generation_config: GenerationConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_shard_bytes: int = 2 * 1024**3,
) -> None:
    """Write a model, factored or dense, as a Hugging Face folder, which appears whole or not at
    all.

    Args: folder: the target; a model folder that stands there is replaced. config: the model's
    config, low-rank (`modeling_lowrank.lowrank_config`) or plain. Its dtype becomes that of the
    first tensor. tensors: (name in the model, tensor) pairs, taken one by one. A second name of a
    tied weight is left out. max_shard_bytes: the largest shard, and so about the memory that this
    takes.

    Raises:
        UserError: the target holds something that is no part of a model folder.
        ValueError: a tensor of the model is missing, unknown, or of the wrong shape.
    """
    config = copy.deepcopy(config)
    missing = expected_shapes(config)
    config.dtype = None
    tied = _second_names(config)
    with TensorWriter(folder, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors:
            if name in tied:
                continue
            expected = missing.pop(name, None)
            if expected != tuple(tensor.shape):
                raise ValueError(
                    f"tensor {name!r} has shape {tuple(tensor.shape)}, the model's is {expected}"
                )
            writer.add(name_in_file(config, name), tensor)
            config.dtype = config.dtype or tensor.dtype
        if missing:
            raise ValueError(
                f"{len(missing)} tensors were not given, {next(iter(missing))!r} first"
            )
        write_config(writer.staging, config, generation_config, tokenizer)


def merge(
    lowrank_folder: str | Path, out_folder: str | Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write a factored student as a dense model of the teacher's architecture, matrix by matrix.

    Each product is taken in fp32 (float64 where the factors are) and then cast. Tokenizer and
    generation settings are copied.

    Args:
        lowrank_folder: what `write_model` or `save_pretrained` wrote.
        out_folder: the target; stock transformers loads it.
        dtype: of the written floating-point tensors; None keeps that of the folder's.

    Raises:
        UserError: a folder is missing, damaged, not factored, or the target is unfit.
    """
    from makd_llm.models.modeling_lowrank import base_config, is_lowrank
    from makd_llm.report.card import merged_card

    source, target = Path(lowrank_folder), Path(out_folder)
    config = read_config(source)
    if not is_lowrank(config):
        raise UserError(
            f"{source} is not a factored student (model_type {config.model_type!r}); "
            "nothing is to be merged, use the folder as it is"
        )
    if source.resolve() == target.resolve():
        raise UserError(f"{target} is the folder to be merged itself; choose another one to write")
    merged = base_config(config)
    if dtype is not None:
        merged.dtype = dtype
    reader = TensorReader(source)
    with TensorWriter(target) as writer:
        for name, tensor in _merged_tensors(reader, config):
            cast = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            writer.add(name_in_file(merged, name), cast)
        write_config(writer.staging, merged)
        _copy_companions(source, writer.staging, but=_OF_THE_FACTORED)
        if (source / "README.md").is_file():
            card = merged_card((source / "README.md").read_text(encoding="utf-8"))
            (writer.staging / "README.md").write_text(card, encoding="utf-8")


def rewrite(
    folder: str | Path, out_folder: str | Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write a model folder anew, factored as it is, tensor by tensor; arguments and errors as
    `merge`.
    """
    source, target = Path(folder), Path(out_folder)
    config = read_config(source)
    if source.resolve() == target.resolve():
        raise UserError(f"{target} is the folder to be copied itself; choose another one to write")
    reader = TensorReader(source)
    with TensorWriter(target) as writer:
        for name in expected_shapes(config):
            tensor = reader.get(name)
            cast = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            writer.add(name_in_file(config, name), cast)
        config.dtype = dtype or config.dtype
        write_config(writer.staging, config)
        _copy_companions(source, writer.staging)


def count_parameters(
    source: str | Path | TensorReader, family: Family, config: PreTrainedConfig
) -> ParameterCount:
    """Count what a teacher or student folder stores, from the shapes in its files.

    Raises:
        UserError: the folder lacks a tensor of the config's model.
    """
    reader = source if isinstance(source, TensorReader) else TensorReader(source)
    matrices = {name for _, _, name in matrices_of(config)}
    blocks = total = factorized = 0
    # The names come from the model, because old files also hold buffers (GPT-2's causal mask).
    for name in expected_shapes(config):
        count = math.prod(reader.shape(name))
        total += count
        if name.startswith(f"{family.layers}."):
            blocks += count
        owner, _, leaf = name.rpartition(".")
        if leaf != "bias" and owner.partition(".parts.")[0] in matrices:
            factorized += count
    return ParameterCount(blocks=blocks, total=total, factorized=factorized)


def counts_of_folders(folders: Mapping[str, Path]) -> dict[str, ParameterCount]:
    """The counts of several model folders, by the names they are given under."""
    configs = {name: read_config(folder) for name, folder in folders.items()}
    return {n: count_parameters(folders[n], family_of(c), c) for n, c in configs.items()}


def _second_names(config: PreTrainedConfig) -> set[str]:
    """Names of weights that are only another name for a stored one (a tied head)."""
    from makd_llm.models.modeling_lowrank import model_class_for

    tied = model_class_for(config)._tied_weights_keys or {}
    return set(tied) if config.tie_word_embeddings else set()


def _merged_tensors(
    reader: TensorReader, config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the dense model, the factored ones multiplied out."""
    from makd_llm.models.modeling_lowrank import fused_layout

    lowrank = config.lowrank or {}
    for name in expected_shapes(config):
        module = name.rpartition(".")[0].partition(".parts.")[0]
        if module not in lowrank:
            yield name, reader.get(name)
    transposed = {name: matrix.transposed for _, matrix, name in matrices_of(config)}
    for module in lowrank:
        parts, layout = [module], fused_layout(config, module)
        if layout is not None:
            parts = [f"{module}.parts.{part}" for part in range(len(layout.widths))]
        weight = _joined(layout, [_dense(reader, part) for part in parts])
        yield f"{module}.weight", weight.T if transposed.get(module, False) else weight
        if f"{parts[0]}.bias" in reader:
            yield f"{module}.bias", _joined(layout, [reader.get(f"{p}.bias") for p in parts])


def _joined(layout: Fused | None, parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if layout is None else layout.join(parts, 0)


def _dense(reader: TensorReader, module: str) -> torch.Tensor:
    """up @ down of one matrix, (out, in), in the factors' dtype; a dense part as it is."""
    from makd_llm.models.modeling_lowrank import multiply_factors

    if f"{module}.weight" in reader:
        return reader.get(f"{module}.weight")
    up = reader.get(f"{module}.up")
    return multiply_factors(up, reader.get(f"{module}.down")).to(up.dtype)


_OF_THE_FACTORED = ("README.md", "factorization.json", "report.html")


def _copy_companions(source: Path, target: Path, but: tuple[str, ...] = ()) -> None:
    """Copy what belongs to a model but depends on no weight: tokenizer, generation settings."""
    written_anew = {"config.json", INDEX_FILE, "modeling_lowrank.py", *but}
    for entry in source.iterdir():
        if entry.is_dir() and belongs_to_model_folder(entry):
            shutil.copytree(entry, target / entry.name)
        elif (
            belongs_to_model_folder(entry)
            and entry.name not in written_anew
            and entry.suffix != ".safetensors"
        ):
            shutil.copy2(entry, target / entry.name)
