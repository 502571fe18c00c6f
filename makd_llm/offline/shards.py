"""One file of a teacher cache: safetensors, written whole and memory-mapped on reading.

keys           (R, 16) uint8   the records' names
first_target   (R + 1) int64   where each record's summary tokens begin, and where the last end
first_byte     (R + 1) int64   the same of its bytes in `ids`
first_token    (R + 1) int64   the same of its rows in `hidden.L`
ids            (bytes) uint8   offline.codec, k to a summary token
log_p          (N, k)  bf16    log-probabilities of these tokens
log_rest       (N, S)  fp32    of all others together, for each temperature
hidden.L       (T, D)  bf16    outputs of the teacher's layer L, of all real tokens
"""
# R records, N summary tokens, T tokens, K likeliest tokens, S temperatures, D width

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from makd_llm.files import replacing
from makd_llm.offline.codec import decode_ids, encode_ids


@dataclass(frozen=True)
class Answer:
    """What the teacher says of one record, on the CPU and in the types that are kept: int32, bf16,
    fp32, and bf16.
    """

    key: bytes
    ids_NK: Tensor
    log_p_NK: Tensor
    log_rest_NS: Tensor
    hidden: dict[int, Tensor]
    """By layer, (T, D)."""
    tokens: int


def name_of(number: int) -> str:
    """The file's name."""
    return f"shard-{number:06d}.safetensors"


def write_shard(path: Path, answers: Sequence[Answer], contents: str) -> None:
    """One file, whole or not at all. contents: the name that the manifest gives them."""
    ids = [encode_ids(answer.ids_NK.numpy()) for answer in answers]
    tensors = {
        "keys": torch.tensor([list(answer.key) for answer in answers], dtype=torch.uint8),
        "first_target": _firsts(len(answer.ids_NK) for answer in answers),
        "first_byte": _firsts(len(data) for data in ids),
        "first_token": _firsts(answer.tokens for answer in answers),
        "ids": torch.from_numpy(np.concatenate(ids)),
        "log_p": torch.cat([answer.log_p_NK for answer in answers]),
        "log_rest": torch.cat([answer.log_rest_NS for answer in answers]),
    }
    for layer in answers[0].hidden:
        tensors[f"hidden.{layer}"] = torch.cat([answer.hidden[layer] for answer in answers])
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata=_named(path, contents))


def is_whole(path: Path, contents: str) -> bool:
    """Whether the file is there, in full, and of these contents."""
    try:
        with safe_open(path, framework="pt") as file:  # its length is compared with its table
            return bool(file.metadata() == _named(path, contents))
    except (SafetensorError, OSError):
        return False


def _named(path: Path, contents: str) -> dict[str, str]:
    """One entry: of several, safetensors writes now this first and now that."""
    return {"contents": f"{contents}, {path.stem}"}


class Shard:
    """A file for reading: its table is held, everything else stays on the disk until it is asked
    for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            self.keys = file.get_tensor("keys").numpy().copy()
            self._first = {
                kind: file.get_tensor(f"first_{kind}").clone()
                for kind in ("target", "byte", "token")
            }

    def opened(self) -> Any:
        """The file, mapped into memory."""
        return safe_open(self.path, framework="pt")

    def top(self, file: Any, row: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a record: ids (N, K) int64, log-probabilities (N, K) bf16, log of the rest (N, S)."""
        targets, data = self._range("target", row), self._range("byte", row)
        ids_NK = decode_ids(file.get_slice("ids")[data].numpy(), top_k)
        log_p_NK, log_rest_NS = (file.get_slice(name)[targets] for name in ("log_p", "log_rest"))
        return torch.from_numpy(ids_NK), log_p_NK, log_rest_NS

    def hidden(self, file: Any, row: int, layer: int) -> Tensor:
        """Of a record: the layer's outputs (T, D) bf16."""
        states_TD: Tensor = file.get_slice(f"hidden.{layer}")[self._range("token", row)]
        return states_TD

    def _range(self, kind: str, row: int) -> slice:
        first = self._first[kind]
        return slice(int(first[row]), int(first[row + 1]))


def _firsts(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
