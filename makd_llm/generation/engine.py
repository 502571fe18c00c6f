"""Pieces written with the training engine's own model, a piece to each rank at a time.

Under ZeRO-3 a forward is for all ranks together, so they go through their pieces in step; a rank
that has none left goes along with a prompt of one token and drops what comes of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from makd_llm import distributed
from makd_llm.generation.decoding import Decoding, Generates, continuations
from makd_llm.generation.documents import Documents, Text

Save = Callable[[int, list[dict[str, Any]]], None]
"""Keeps the lines of a finished piece."""


class EngineWriter:
    """Writes pieces in batches of `batch_size` texts, those of like length together.

    The batches of a piece depend on the piece and on `batch_size` alone, so its texts are the same
    to the last bit on whatever rank, and after whatever interruption; with another batch size they
    are the same but for rounding.
    """

    def __init__(
        self,
        generate: Generates,
        tokenizer: PreTrainedTokenizerBase,
        documents: Documents,
        decoding: Decoding,
        *,
        batch_size: int,
        pad_id: int,
    ) -> None:
        self._generate, self._tokenizer, self._documents = generate, tokenizer, documents
        self._decoding, self._batch_size, self._pad_id = decoding, batch_size, pad_id
        self._eos_ids = documents.prompts.eos_ids

    def write(self, pieces: Sequence[int], save: Save, advance: Callable[[int], None]) -> None:
        """Writes the pieces; each rank saves its own. advance: is told how many more documents are
        finished, over all ranks. Collective.
        """
        world = distributed.world_size()
        for start in range(0, len(pieces), world):
            turn = pieces[start : start + world]
            sizes = [len(self._documents.places(piece)) * self._decoding.copies for piece in turn]
            own = turn[distributed.rank()] if distributed.rank() < len(turn) else None
            texts = self._write_one(own, steps=-(-max(sizes) // self._batch_size))
            if own is not None:
                lines = [self._documents.lines(place, found) for place, found in texts.items()]
                save(own, [line for group in lines for line in group])
            # What is said to be finished is on the disk, on every rank.
            distributed.barrier()
            advance(sum(len(self._documents.places(piece)) for piece in turn))

    def _write_one(self, piece: int | None, steps: int) -> dict[int, list[Text]]:
        """The texts of each place of a piece, in so many steps; None: only goes along."""
        places = range(0) if piece is None else self._documents.places(piece)
        prompts = {place: self._documents.prompt_ids(place) for place in places}
        rows = [(place, copy) for place in places for copy in range(self._decoding.copies)]
        rows.sort(key=lambda row: len(prompts[row[0]]))
        texts: dict[tuple[int, int], list[Text]] = {}
        for step in range(steps):
            batch = rows[step * self._batch_size : (step + 1) * self._batch_size]
            found = self._continued([prompts[place] for place, _ in batch], batch)
            texts.update(zip(batch, found, strict=True))
        return {
            place: [t for copy in range(self._decoding.copies) for t in texts[place, copy]]
            for place in places
        }

    def _continued(self, prompts: list[list[int]], rows: list[tuple[int, int]]) -> list[list[Text]]:
        draws_BN = None
        if self._decoding.method == "sample":
            draws_BN = np.stack([self._decoding.draws_of(*row) for row in rows or [(0, 0)]])
        found = continuations(
            self._generate,
            prompts or [list(self._eos_ids[:1])],
            self._decoding,
            eos_ids=self._eos_ids,
            pad_id=self._pad_id,
            draws_BN=draws_BN,
        )
        return [[self._text(ids) for ids in texts] for texts in found[: len(rows)]]

    def _text(self, ids: list[int]) -> Text:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Text(str(text).strip(), ended=bool(ids) and ids[-1] in self._eos_ids)
