"""Hugging Face folders, read and written tensor by tensor, so that no process holds a model whole.

A model folder holds `config.json` and its weights: one `model.safetensors`, or several shards
`model-00001-of-00003.safetensors` with `model.safetensors.index.json`, which says for every tensor
in which shard it lies. A safetensors file starts with a table of its tensors, so one tensor can be
read without the rest: `TensorReader` does that, and `TensorWriter` fills such a folder with never
more than one shard in memory.

A written folder appears whole or not at all: everything goes into a sibling folder first, which
takes the target's place at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from makd_llm.checkpoint.expert_names import Stacked, mixtral_name, stacked_place
from makd_llm.errors import UserError
from makd_llm.files import FULL, is_plain_name

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What a model folder may hold; a folder with anything else in it is never replaced.
_MODEL_SUFFIXES = {".json", ".safetensors", ".model", ".jinja"}
_MODEL_FILES = {
    "modeling_lowrank.py",
    "merges.txt",
    "vocab.txt",
    "README.md",
    "report.html",
    *("factorization.png", "stages.png"),  # of versions before the report
}
_MODEL_FOLDERS = {"additional_chat_templates"}


def read_config(folder: str | Path) -> PreTrainedConfig:
    """The config of a model folder, a low-rank one's included.

    Raises:
        UserError: the folder or its config.json is missing or unreadable.
    """
    from transformers import AutoConfig

    from makd_llm.models.modeling_lowrank import register

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no model folder: config.json is missing; check the path")
    register()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a model's config: {reason}") from error
    return config


class TensorReader:
    """The tensors of a model folder by name; a file is opened when its first tensor is asked for.

    Names may be the model's (`transformer.h.0.ln_1.weight`) where the file leaves the backbone's
    prefix out (`h.0.ln_1.weight`), as GPT-2's files on the Hub do, or has another name for the head
    (`embed_out`), as GPT-NeoX's do, or for the matrices of experts (expert_names.py). One of these
    that is stored stacked with others is read out of the stack alone.

    Raises:
        UserError: no safetensors in the folder, or a file or tensor is missing, cut short or
            damaged; the message names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open_files: dict[str, safe_open] = {}
        self._file_of = self._table_of_contents()

    def names(self) -> set[str]:
        """The names of all tensors, as the files have them."""
        return set(self._file_of)

    def __contains__(self, name: str) -> bool:
        return self._in_file(name, None) is not None

    def resolve(self, name: str, prefix: str | None = None) -> str:
        """The name in the files of the tensor that the model calls `name`, or of the stack of
        tensors in which it lies.

        Args:
            name: the name in the model.
            prefix: the backbone's name, which the files may leave out (`transformer`); None stands
                for the first part of `name`.
        """
        found = self._in_file(name, prefix)
        if found is None:
            raise UserError(
                f"{self.folder} lacks the tensor {name!r}; the folder is incomplete or belongs to "
                "another architecture than its config.json says"
            )
        return found

    def get(self, name: str) -> torch.Tensor:
        """The tensor of this name (the file's or the model's), on the CPU, in the file's dtype."""
        in_file = self.resolve(name)
        file = self._file_of[in_file]
        try:
            stack = self._stack_of(name, in_file)
            if stack is not None:
                rows = self._opened(file).get_slice(in_file)
                part: torch.Tensor = rows[stack.expert, stack.rows(tuple(rows.get_shape()))]
                return part
            tensor: torch.Tensor = self._opened(file).get_tensor(in_file)
        except SafetensorError as error:
            raise self._damaged(file, error) from error
        return tensor

    def release(self) -> None:
        """Close the files: what was read from them stops counting as this process's memory."""
        self._open_files.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, read without its values."""
        in_file = self.resolve(name)
        stored = self._stored_shape(in_file)
        stack = self._stack_of(name, in_file)
        if stack is None:
            return stored
        rows = stack.rows(stored)
        return (rows.stop - rows.start, stored[2])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files, their tables of contents not counted."""
        total = 0
        for name in sorted(set(self._file_of.values())):
            path = self.folder / name
            with path.open("rb") as file:
                # The file: 8 bytes with the length of the table, the table, the tensors.
                table = int.from_bytes(file.read(8), "little")
            total += path.stat().st_size - 8 - table
        return total

    def _table_of_contents(self) -> dict[str, str]:
        """Tensor name to file name, from the index or the single file."""
        single, index = self.folder / SINGLE_FILE, self.folder / INDEX_FILE
        if single.is_file():
            return dict.fromkeys(self._opened(SINGLE_FILE).keys(), SINGLE_FILE)
        if not index.is_file():
            raise UserError(
                f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; give a model folder "
                "with safetensors weights (save_pretrained of transformers writes one)"
            )
        try:
            file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(file_of.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error}); fetch or write it again") from error
        for name in names:
            if not is_plain_name(name):
                raise UserError(
                    f"{index} names {name!r}, which is no file of this folder; fetch it again"
                )
            if not (self.folder / name).is_file():
                raise UserError(
                    f"{self.folder / name} is missing, but {INDEX_FILE} names it; "
                    "fetch or write the folder again"
                )
        return file_of

    def _in_file(self, name: str, prefix: str | None) -> str | None:
        if name in self._file_of:
            return name
        bare = name.removeprefix(f"{prefix}.") if prefix else name.partition(".")[2]
        names = [bare, mixtral_name(name)]
        if name == "lm_head.weight":
            names.append("embed_out.weight")
        found = next((n for n in names if n in self._file_of), None)
        stack = stacked_place(name) if found is None else None
        if stack is None or stack.name not in self._file_of:
            return found
        return stack.name if stack.expert < self._stored_shape(stack.name)[0] else None

    def _stored_shape(self, in_file: str) -> tuple[int, ...]:
        file = self._file_of[in_file]
        try:
            return tuple(self._opened(file).get_slice(in_file).get_shape())
        except SafetensorError as error:
            raise self._damaged(file, error) from error

    def _stack_of(self, name: str, in_file: str) -> Stacked | None:
        """The place of a tensor in the stored one, where that is a stack of several."""
        stack = stacked_place(name)
        return stack if stack is not None and stack.name == in_file else None

    def _opened(self, file: str) -> safe_open:
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._damaged(file, error) from error
        return self._open_files[file]

    def _damaged(self, file: str, error: Exception) -> UserError:
        return UserError(
            f"{self.folder / file} is cut short or damaged ({error}); fetch or write it again"
        )


class TensorWriter:
    """Writes the tensors of a model folder, at most `max_shard_bytes` (and one tensor) in memory.

    Use it as a context manager: the folder appears when the body ends, and nothing of it when the
    body raises. Other files of the folder (config, tokenizer) are written into `staging` before
    that, and appear with the weights. A model folder that stood there before is replaced by the new
    one; between the two renames of that moment it stands as `.NAME.replaced` beside the target, and
    the next writer puts it back if the process was killed just there.

    Raises:
        UserError: the target holds something that is no part of a model folder, or cannot be
            written.
        ValueError: a tensor's name is given twice.
    """

    def __init__(self, folder: str | Path, *, max_shard_bytes: int = 2 * 1024**3) -> None:
        self.folder = Path(folder).absolute()
        self.staging = self.folder.with_name(f".{self.folder.name}.writing")
        self.total_bytes = 0
        self.total_parameters = 0
        self._replaced = self.folder.with_name(f".{self.folder.name}.replaced")
        self._max_shard_bytes = max_shard_bytes
        self._buffer: dict[str, torch.Tensor] = {}
        self._buffer_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._prepare()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a copy of the tensor; the caller may free or overwrite its own at once."""
        if name in self._names:
            raise ValueError(f"the tensor {name!r} is added twice")
        nbytes = tensor.numel() * tensor.element_size()
        if self._buffer and self._buffer_bytes + nbytes > self._max_shard_bytes:
            self._write_shard()
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        copy.copy_(tensor.detach())
        self._buffer[name] = copy
        self._buffer_bytes += nbytes
        self._names.add(name)
        self.total_bytes += nbytes
        self.total_parameters += tensor.numel()

    def close(self) -> None:
        """Write what is left, name the files, and put the folder in its place."""
        if self._buffer or not self._shards:
            self._write_shard()
        if len(self._shards) == 1:
            os.replace(self._part(1), self.staging / SINGLE_FILE)
        else:
            self._write_index()
        if self.folder.exists():
            os.replace(self.folder, self._replaced)
        os.replace(self.staging, self.folder)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def discard(self) -> None:
        """Drop everything that was written; the target stays as it was."""
        self._buffer.clear()
        shutil.rmtree(self.staging, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.close()
        except BaseException as late:  # noqa: BLE001 - looked at below
            error = late
        if error is None:
            return
        self.discard()
        if isinstance(error, SafetensorError) or (
            isinstance(error, OSError) and error.errno in FULL
        ):
            raise unwritable(self.folder, error) from error
        raise error

    def _prepare(self) -> None:
        if self._replaced.exists() and not self.folder.exists():
            os.replace(self._replaced, self.folder)
        check_target(self.folder)
        for leftover in (self.staging, self._replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        try:
            self.staging.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror}); choose another folder"
            ) from None

    def _part(self, number: int) -> Path:
        return self.staging / f"part-{number:05d}"

    def _write_shard(self) -> None:
        self._shards.append(list(self._buffer))
        save_file(self._buffer, self._part(len(self._shards)), metadata={"format": "pt"})
        self._buffer = {}
        self._buffer_bytes = 0

    def _write_index(self) -> None:
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            shard = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            os.replace(self._part(number), self.staging / shard)
            weight_map.update(dict.fromkeys(names, shard))
        metadata = {"total_parameters": self.total_parameters, "total_size": self.total_bytes}
        index = {"metadata": metadata, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.staging / INDEX_FILE).write_text(text, encoding="utf-8")


def check_target(folder: Path) -> None:
    """Raises UserError where a model folder would overwrite something that is none."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder that is new or empty")
    for entry in sorted(folder.iterdir()) if folder.exists() else ():
        if not belongs_to_model_folder(entry):
            raise UserError(
                f"{folder} holds {entry.name!r}, which is no part of a model folder, and "
                "would be lost; choose a folder that is new or empty"
            )


def unwritable(what: Path, error: Exception) -> UserError:
    """What is said where a disk is full or a folder cannot be written."""
    return UserError(f"{what} cannot be written ({error}); free space, or choose another folder")


def belongs_to_model_folder(entry: Path) -> bool:
    """Whether a file or folder is one that model folders hold: config, weights, tokenizer."""
    if entry.is_dir():
        return entry.name in _MODEL_FOLDERS
    return entry.suffix in _MODEL_SUFFIXES or entry.name in _MODEL_FILES


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """A model folder's settings for generation, where it has any."""
    if not (folder / "generation_config.json").is_file():
        return None
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder, local_files_only=True)


def write_config(
    folder: str | Path,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write everything of a model folder but the weights.

    That is config.json, generation_config.json and the tokenizer's files; for a low-rank config
    also modeling_lowrank.py and the `auto_map` that makes `trust_remote_code=True` find it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    if generation_config is not None:
        # Not save_pretrained: it refuses contradictory sampling settings, which many published
        # models carry, and a copy need not judge them.
        generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises OSError where it cannot be written; the tokenizers library has a bare Exception."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error
