"""The documents that are to be summarized, in pieces, and the lines that come of them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from makd_llm.data.prompt import PromptBuilder
from makd_llm.data.records import RecordList, describe_skipped
from makd_llm.data.schema import BadRecord, Columns, OnBadRecord, Record
from makd_llm.errors import UserError


@dataclass(frozen=True)
class Text:
    """What was written, stripped. ended: by the model, and not by the limit of new tokens."""

    text: str
    ended: bool


class Documents:
    """The records of a list that fit the window, in order, in pieces of so many.

    Every record is looked at here. Raises the first BadRecord unless bad ones are to be skipped,
    and UserError where none remains.
    """

    def __init__(
        self,
        records: RecordList,
        prompts: PromptBuilder,
        columns: Columns,
        *,
        max_new_tokens: int,
        per_document: int,
        piece: int,
        on_bad_record: OnBadRecord,
    ) -> None:
        self.prompts, self.per_document = prompts, per_document
        self.skipped: Counter[str] = Counter(records.skipped)
        self._records, self._columns, self._piece = records, columns, piece
        self._room = max_new_tokens
        self._indices: list[int] = []
        for index, record in enumerate(records):
            try:
                prompts.check_prompt(record, max_new_tokens)
            except BadRecord as bad:
                if on_bad_record == "error":
                    raise
                self.skipped[bad.reason] += 1
            else:
                self._indices.append(index)
        if not self._indices:
            raise UserError(
                f"no record leaves room for {max_new_tokens} new tokens "
                f"({describe_skipped(self.skipped)}); make data.max_length larger"
            )

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def n_pieces(self) -> int:
        """How many pieces there are; the last may be smaller."""
        return -(-len(self) // self._piece)

    def places(self, piece: int) -> range:
        """The places of a piece's documents."""
        return range(len(self))[piece * self._piece : (piece + 1) * self._piece]

    def prompt_ids(self, place: int) -> list[int]:
        """The document's prompt, cut so that the new tokens fit."""
        return self.prompts.prompt_ids(self._record(place), self._room)

    def request(self, place: int) -> str | list[dict[str, str]]:
        """The same for a server that tokenizes by itself."""
        return self.prompts.request(self._record(place), self._room)

    def lines(self, place: int, texts: list[Text]) -> list[dict[str, Any]]:
        """A line for each text: a row as the data has them, with the text in the place of the
        reference; and what is to be known of the text.
        """
        record, columns = self._record(place), self._columns
        named = {} if columns.id is None else {columns.id: record.id}
        row = {**named, columns.document: record.document, **record.fields}
        return [
            {
                "id": record.id,
                "ended": text.ended,
                "empty": not text.text,
                "row": {**row, columns.summary: text.text},
            }
            for text in texts
        ]

    def _record(self, place: int) -> Record:
        return self._records[self._indices[place]]
