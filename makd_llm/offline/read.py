"""A cache for training: what the teacher says of a batch, in the batch's own order and place."""
# B batch, T tokens, N summary tokens, D width, K likeliest tokens, S temperatures

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from makd_llm.data.batch import Batch
from makd_llm.errors import UserError
from makd_llm.offline.manifest import FILE, Manifest
from makd_llm.offline.shards import Shard, is_whole, name_of
from makd_llm.shown import Needs, Shown, TopTokens

OPEN_FILES = 64
"""At most so many are mapped at a time."""


class TeacherCache:
    """A finished cache. Holds the names of its records, and reads from the disk what a batch asks
    for.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, dtype: torch.dtype) -> None:
        """dtype: of the hidden states that are handed out. Raises UserError where a shard is
        missing or damaged.
        """
        self.folder, self.manifest, self.dtype = folder, manifest, dtype
        self._shards: list[Shard] = []
        for number in range(manifest.shards):
            path = folder / name_of(number)
            if not is_whole(path, manifest.contents):
                raise UserError(
                    f"{path}: missing or damaged; delete {folder / FILE}, and the stage teach "
                    "writes what is missing"
                )
            self._shards.append(Shard(path))
        rows = [len(shard.keys) for shard in self._shards]
        keys = np.concatenate([shard.keys for shard in self._shards]).view("S16").ravel()
        self._order = np.argsort(keys)
        self._keys = keys[self._order]
        self._first = np.cumsum([0, *rows])
        self._opened = lru_cache(OPEN_FILES)(lambda number: self._shards[number].opened())

    def missing(self, keys: Iterable[bytes]) -> list[int]:
        """Which of these records, by their number among them, it does not hold."""
        return [number for number, key in enumerate(keys) if self._place(key) is None]

    def shown(self, batch: Batch, needs: Needs) -> Shown:
        """What a forward of the teacher would have shown of it, on the batch's device: the hidden
        states (B, T, D) that are needed, 0 on padding, and the likeliest tokens. States are (1, N,
        D) for a batch whose model leaves the padding out.

        Raises UserError for a record that is not among those the teacher saw.
        """
        device = batch.input_ids_BT.device
        places = [self._known(*pair) for pair in zip(batch.keys, batch.record_ids, strict=True)]
        found = Shown(
            hidden={
                layer: self._hidden(batch, places, layer).to(device, non_blocking=True)
                for layer in sorted(needs.hidden)
            }
        )
        if self.manifest.temperatures:
            k = self.manifest.top_k
            tops = [self._shards[n].top(self._opened(n), row, k) for n, row in places]
            ids_NK, log_p_NK, log_rest_NS = (
                torch.cat(part).to(device, non_blocking=True) for part in zip(*tops, strict=True)
            )
            found.top = TopTokens(ids_NK, log_p_NK, log_rest_NS, self.manifest.temperatures)
        return found

    def _hidden(self, batch: Batch, places: list[tuple[int, int]], layer: int) -> torch.Tensor:
        if batch.tokens_N is not None:
            parts = [self._shards[n].hidden(self._opened(n), row, layer) for n, row in places]
            return torch.cat(parts).to(self.dtype)[None]
        rows, length = batch.input_ids_BT.shape
        states_BTD = torch.zeros(rows, length, self.manifest.width, dtype=self.dtype)
        for index, (number, row) in enumerate(places):
            states_TD = self._shards[number].hidden(self._opened(number), row, layer)
            start = length - len(states_TD) if batch.padded_left else 0
            states_BTD[index, start : start + len(states_TD)] = states_TD
        return states_BTD

    def _known(self, key: bytes, record_id: str) -> tuple[int, int]:
        place = self._place(key)
        if place is None:
            raise UserError(
                f"record {record_id}: the teacher cache {self.folder} has nothing of its tokens; "
                "the data or its cut is not what the teacher saw"
            )
        return place

    def _place(self, key: bytes) -> tuple[int, int] | None:
        """(shard, row)"""
        wanted = np.array([key], self._keys.dtype)
        at = int(np.searchsorted(self._keys, wanted)[0])
        # As arrays: a single item of one has lost the zeros at its end.
        if not np.array_equal(self._keys[at : at + 1], wanted):
            return None
        number = int(self._order[at])
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return shard, number - int(self._first[shard])
