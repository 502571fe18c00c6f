"""The teacher's folder becomes a dense one of another shape: with fewer layers, then narrower, then
with fewer key-value heads.

Each of the three reads a folder and writes a folder, tensor by tensor, so the second sees what the
first has left. The last one's is the result; those before it, and each round of the choice of
layers, are kept beside it until then, and an interrupted call goes on from them. Where every part
comes from stands in the config (models/origin.py).
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from makd_llm import distributed
from makd_llm.checkpoint.export import write_model
from makd_llm.checkpoint.folder import (
    TensorReader,
    check_target,
    read_config,
    read_generation_config,
)
from makd_llm.data.batch import Batch, digest_of
from makd_llm.errors import UserError
from makd_llm.files import sample_of_folder
from makd_llm.layerwise.parts import Parts
from makd_llm.layerwise.walk import Walk
from makd_llm.models.families import family_of
from makd_llm.models.origin import Origin, origin_of, set_origin
from makd_llm.reshape.depth import depth_config, depth_tensors, even_layers, ild_layers
from makd_llm.reshape.heads import (
    HEADS_FAMILIES,
    heads_config,
    heads_tensors,
    merged_heads,
    query_order,
)
from makd_llm.reshape.width import (
    WIDTH_FAMILIES,
    chosen_cut,
    measured_activity,
    width_config,
    width_tensors,
)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Depth:
    """So many layers, chosen in one of two ways (depth.py)."""

    layers: int
    choose: Literal["even", "ild"] = "even"


@dataclass(frozen=True)
class Width:
    """So many hidden channels and feed-forward neurons (width.py); None: as many as there are."""

    hidden: int | None = None
    feed_forward: int | None = None


@dataclass(frozen=True)
class Heads:
    """So many key-value heads (heads.py)."""

    key_value: int


@dataclass(frozen=True)
class Shape:
    """The shape that is asked for; None: the teacher's. At least one is given."""

    depth: Depth | None = None
    width: Width | None = None
    heads: Heads | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether anything has to be known beside the weights."""
        return self.width is not None or (self.depth is not None and self.depth.choose == "ild")


def check_shape(config: PreTrainedConfig, shape: Shape) -> None:
    """Raises UserError for what cannot be made of a model of this config."""
    if shape.depth is not None:
        _check_depth(config, shape.depth)
    if shape.width is not None:
        _check_width(config, shape.width)
    if shape.heads is not None:
        _check_heads(config, shape.heads)


def _check_depth(config: PreTrainedConfig, depth: Depth) -> None:
    _at_most("student.depth.layers", depth.layers, config, "num_hidden_layers")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            "student.depth: the teacher's layers depend on their place "
            "(scale_attn_by_inverse_layer_idx), so none can be left out; leave student.depth out"
        )


def _check_width(config: PreTrainedConfig, width: Width) -> None:
    if config.model_type not in WIDTH_FAMILIES:
        raise UserError(
            f"student.width: model_type {config.model_type!r} cannot be made narrower; choose a "
            f"teacher of one of these: {', '.join(WIDTH_FAMILIES)}, or leave student.width out"
        )
    if width.hidden is not None:
        _at_most("student.width.hidden", width.hidden, config, "hidden_size")
        if width.hidden % config.num_attention_heads:
            raise UserError(
                f"student.width.hidden is {width.hidden}, no multiple of the teacher's "
                f"{config.num_attention_heads} heads (num_attention_heads), as transformers wants "
                "it; choose one"
            )
    if width.feed_forward is not None:
        _at_most("student.width.feed_forward", width.feed_forward, config, "intermediate_size")


def _check_heads(config: PreTrainedConfig, heads: Heads) -> None:
    groups: int | None = getattr(config, "num_key_value_heads", None)
    if config.model_type not in HEADS_FAMILIES or groups is None:
        raise UserError(
            f"student.heads: key-value heads of model_type {config.model_type!r} cannot be shared; "
            f"choose a teacher of one of these: {', '.join(HEADS_FAMILIES)}, or leave "
            "student.heads out"
        )
    _at_most("student.heads.key_value", heads.key_value, config, "num_key_value_heads")
    if groups % heads.key_value:
        raise UserError(
            f"student.heads.key_value is {heads.key_value}, which does not divide the teacher's "
            f"{groups} key-value heads (num_key_value_heads); choose a divisor"
        )


def _at_most(path: str, asked: int, config: PreTrainedConfig, field: str) -> None:
    there: int = getattr(config, field)
    if not 1 <= asked <= there:
        raise UserError(
            f"{path} is {asked}, but the teacher has {there} ({field}); choose 1 to {there}"
        )


Cut = tuple[PreTrainedConfig, Callable[[], Iterator[tuple[str, Tensor]]]]
"""The config, with its origin, and the tensors of a model that is to be written."""


def reshape(
    teacher: Path,
    result: Path,
    shape: Shape,
    batches: Sequence[Batch],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    tell: Tell = lambda text: None,
) -> Origin:
    """Writes a dense folder of that shape, of the teacher's own architecture.

    batches: this rank's calibration batches; none are needed where `shape.needs_calibration` says
    so. dtype: in which the layers run; the tensors keep the teacher's own. Collective. Raises
    UserError for a shape that the teacher cannot get, a damaged folder, or too little calibration
    text.
    """
    check_shape(read_config(teacher), shape)
    if teacher.resolve() == result.resolve():
        raise UserError(f"{result} is the teacher itself; choose another folder to write")
    check_target(result)
    _check_calibration(shape, batches)
    key = {
        "shape": asdict(shape),
        "teacher": distributed.on_main(sample_of_folder, teacher),
        "batches": distributed.gather_objects(digest_of(batches)),
        "dtype": str(dtype),
    }
    scratch = result.with_name(f".{result.name}.parts")
    parts = Parts(scratch, json.dumps(key, indent=1), tell, "shape")
    reshaping = _Reshaping(teacher, shape, batches, dtype, parts, tell)
    source, cuts = teacher, reshaping.cuts()
    for number, (name, make) in enumerate(cuts):
        last = number == len(cuts) - 1
        target = result if last else scratch / name
        if last or not distributed.on_main(target.is_dir):
            config, tensors = make(source)
            distributed.on_main(_write, target, config, tensors, source, tokenizer)
        source = target
    distributed.on_main(shutil.rmtree, scratch, ignore_errors=True)
    origin = origin_of(read_config(result))
    assert origin is not None
    return origin


def _check_calibration(shape: Shape, batches: Sequence[Batch]) -> None:
    if not shape.needs_calibration:
        return
    mine = sum(len(batch.targets_N) for batch in batches)
    if sum(distributed.gather_objects(mine)) == 0:
        raise UserError("student.depth, student.width: there is no calibration text; give records")


def _write(
    folder: Path,
    config: PreTrainedConfig,
    tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    source: Path,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    write_model(folder, config, tensors(), read_generation_config(source), tokenizer)


class _Reshaping:
    """The cuts of one call, each from the folder that the one before it left."""

    def __init__(
        self,
        teacher: Path,
        shape: Shape,
        batches: Sequence[Batch],
        dtype: torch.dtype,
        parts: Parts,
        tell: Tell,
    ) -> None:
        self.teacher, self.shape, self.batches = teacher, shape, batches
        self.dtype, self.parts, self.tell = dtype, parts, tell

    def cuts(self) -> list[tuple[str, Callable[[Path], Cut]]]:
        """What is asked for, by name, in its order."""
        asked = {
            "depth": (self.shape.depth, self._depth),
            "width": (self.shape.width, self._width),
            "heads": (self.shape.heads, self._heads),
        }
        return [(name, make) for name, (wanted, make) in asked.items() if wanted is not None]

    def _walk(self, source: Path) -> Walk:
        return Walk(source, self.batches, dtype=self.dtype, device=distributed.device())

    def _read(self, source: Path) -> tuple[TensorReader, PreTrainedConfig, Origin]:
        """A folder, and where it comes from: the teacher, whatever it was made of, from itself."""
        config = read_config(source)
        n_layers = config.num_hidden_layers
        origin = None if source == self.teacher else origin_of(config)
        return TensorReader(source), config, origin or Origin(tuple(range(n_layers)), n_layers)

    def _depth(self, source: Path) -> Cut:
        depth = self.shape.depth
        assert depth is not None
        reader, config, origin = self._read(source)
        if depth.choose == "even":
            layers = even_layers(config.num_hidden_layers, depth.layers)
        else:
            layers = ild_layers(self._walk(source), depth.layers, self.parts, self.tell)
        self.tell(f"shape: layers {', '.join(map(str, layers))} of {origin.teacher_layers}")
        cut = depth_config(config, layers)
        set_origin(cut, replace(origin, layers=layers))
        return cut, lambda: depth_tensors(reader, family_of(config), cut, layers)

    def _width(self, source: Path) -> Cut:
        width = self.shape.width
        assert width is not None
        reader, config, origin = self._read(source)
        chosen = chosen_cut(measured_activity(self._walk(source)), width.hidden, width.feed_forward)
        narrow = width_config(config, chosen)
        self.tell(
            f"shape: {narrow.hidden_size} of {config.hidden_size} hidden channels, "
            f"{narrow.intermediate_size} of {config.intermediate_size} feed-forward neurons"
        )
        set_origin(narrow, replace(origin, channels=chosen.channels, neurons=chosen.neurons))
        return narrow, lambda: width_tensors(reader, config, narrow, chosen)

    def _heads(self, source: Path) -> Cut:
        heads = self.shape.heads
        assert heads is not None
        reader, config, origin = self._read(source)
        merged = distributed.on_main(merged_heads, reader, config, heads.key_value)
        shared = heads_config(config, heads.key_value)
        queries = config.num_attention_heads // config.num_key_value_heads
        self.tell(f"shape: {heads.key_value} of {config.num_key_value_heads} key-value heads")
        set_origin(
            shared,
            replace(
                origin,
                query_heads=tuple(query_order(groups, queries) for groups in merged),
                key_value_heads=merged,
            ),
        )
        return shared, lambda: heads_tensors(reader, config, shared, merged)
