"""Rows of a table, each with its place: the line of a JSONL file, the row of anything else.

A table is read in order with `read(position)`, which yields every row together with the position
after it. Reading from a position that was kept gives the same rows again, which is how a stream
resumes. Where a table is `Indexed`, a kept position also serves to fetch its one row later, so
nothing but positions is held in memory.

`datasets` reads CSV, Parquet and the Hub. Its JSON reader does not say on which line a fault is,
and stops at the first, so JSON is read here: bytes → UTF-8 → JSON → a row.

Columns come out of Arrow as bytes and are decoded row by row: one row that is not UTF-8 is then
that row's fault, and not the end of the file.
"""

import copy
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError
from httpx import HTTPError

from makd_llm.data.schema import BadRecord, Row, decoded, kind_of
from makd_llm.errors import UserError

Position: TypeAlias = Any
"""Where a table is read from next: plain JSON values, only meaningful to the table they are of."""

READING_FAILS = (OSError, ValueError, RuntimeError, HTTPError, DatasetsError)
"""What `datasets` raises for what it cannot read; Arrow's and pandas' errors are among them."""


class Table(Protocol):
    """Rows that can be read in order from any position."""

    @property
    def start(self) -> Position:
        """The position of the first row."""

    def read(self, position: Position) -> Iterator[tuple[Row | BadRecord, Position]]:
        """Every row from `position` on (or why it cannot be read), and the position after it."""


class Indexed(Table, Protocol):
    """A table that can fetch one row by the position before it."""

    def row(self, position: Position) -> Row:
        """The row at `position`. Raises BadRecord if it cannot be read."""


class JsonLines:
    """A file with one JSON object per line. A position is (byte offset, line number from 1).

    Lines of white space alone hold no record and are passed over.
    """

    start = (0, 1)

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, position: Position) -> Iterator[tuple[Row | BadRecord, Position]]:
        offset, number = position
        with self._path.open("rb") as file:
            file.seek(offset)
            for line in file:
                here, offset, number = (offset, number), offset + len(line), number + 1
                if line.strip():
                    yield self._parsed_or_bad(line, here), (offset, number)

    def row(self, position: Position) -> Row:
        found, _ = next(self.read(position), (None, None))
        if isinstance(found, BadRecord):
            raise found
        if found is None:
            raise UserError(f"{self._path} has become shorter while it was read; begin again")
        return found

    def _parsed_or_bad(self, line: bytes, position: Position) -> Row | BadRecord:
        try:
            return self._parsed(line, position)
        except BadRecord as bad:
            return bad

    def _parsed(self, line: bytes, position: Position) -> Row:
        offset, number = position
        where = f"{self._path.name}, line {number}"
        text = decoded(where, line).strip()
        if offset == 0:
            text = text.removeprefix("\ufeff")
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise malformed_json(where, error) from None
        return json_row(where, value)


class JsonArray:
    """A file with one JSON array of objects. It is read whole; a position is an index into it."""

    start = 0

    def __init__(self, path: Path) -> None:
        self._rows = list(_array_elements(path))

    def read(self, position: Position) -> Iterator[tuple[Row | BadRecord, Position]]:
        for index in range(position, len(self._rows)):
            yield self._rows[index], index + 1

    def row(self, position: Position) -> Row:
        row = self._rows[position]
        if isinstance(row, BadRecord):
            raise row
        return row


class ArrowTable:
    """A data set of the `datasets` library on disk. A position is a row's index.

    `place` names the source in errors; `latin1` says that the text was read byte by byte (CSV).
    """

    start = 0

    def __init__(self, dataset: Dataset, place: str, *, latin1: bool = False) -> None:
        self._rows, self._place, self._latin1 = dataset.with_format("arrow"), place, latin1

    def read(self, position: Position) -> Iterator[tuple[Row | BadRecord, Position]]:
        for index in range(position, len(self._rows)):
            try:
                yield self.row(index), index + 1
            except BadRecord as bad:
                yield bad, index + 1

    def row(self, position: Position) -> Row:
        return _arrow_row(self._rows[position], f"{self._place}, row {position + 1}", self._latin1)


class ArrowStream:
    """A streamed data set of the `datasets` library. A position is its state and a row number."""

    def __init__(self, dataset: IterableDataset, place: str, *, latin1: bool = False) -> None:
        self._rows, self._place, self._latin1 = dataset.with_format("arrow"), place, latin1
        self.start: Position = {"row": 0, "state": copy.deepcopy(self._rows.state_dict())}

    def read(self, position: Position) -> Iterator[tuple[Row | BadRecord, Position]]:
        number = position["row"]
        self._rows.load_state_dict(copy.deepcopy(position["state"]))
        tables = iter(self._rows)
        while True:
            try:
                table = next(tables, None)
            except READING_FAILS as error:
                raise unreadable(self._place, error) from error
            if table is None:
                return
            number += 1
            after = {"row": number, "state": copy.deepcopy(self._rows.state_dict())}
            try:
                row = _arrow_row(table, f"{self._place}, row {number}", self._latin1)
            except BadRecord as bad:
                yield bad, after
            else:
                yield row, after


def open_json(path: Path) -> Indexed:
    """A .json file is an array of objects, or one object per line: its first byte says which."""
    with path.open("rb") as file:
        first = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return JsonArray(path) if first == b"[" else JsonLines(path)


def open_csv(path: Path, *, streaming: bool) -> Table:
    """A CSV file with a header line, through `datasets`; every column is text, nothing is guessed.

    It is read as Latin-1, where each byte is one character and none is invalid, and turned back
    into bytes cell by cell, so that a cell which is not UTF-8 is the fault of its own row.
    """
    names = _csv_header(path)
    return open_arrow(
        path.name,
        streaming=streaming,
        latin1=True,
        path="csv",
        data_files=str(path),
        split="train",
        encoding="latin-1",
        header=0,
        column_names=names,
        features=Features({name: Value("string") for name in names}),
        keep_default_na=False,
    )


def open_arrow(place: str, *, streaming: bool, latin1: bool = False, **arguments: Any) -> Table:
    """What `load_dataset` makes of `arguments`, as a table that names `place` in its errors."""
    try:
        dataset = load_dataset(streaming=streaming, **arguments)
        if streaming:
            return ArrowStream(dataset, place, latin1=latin1)
        return ArrowTable(dataset, place, latin1=latin1)
    except READING_FAILS as error:
        raise unreadable(place, error) from error


def unreadable(place: str, error: BaseException) -> UserError:
    """A UserError in one line for what `datasets` raised, with the first cause it gives."""
    cause = error
    while isinstance(cause, DatasetsError) and cause.__cause__ is not None:
        cause = cause.__cause__
    reason = " ".join((str(cause).strip() or type(cause).__name__).splitlines()[0].split())
    if isinstance(error, ConnectionError | HTTPError):
        return UserError(
            f"{place} cannot be fetched ({reason}); name a local .jsonl, .csv or .parquet file "
            "instead, set HF_HOME to a cache that holds it, or HF_ENDPOINT to a mirror"
        )
    return UserError(f"{place} cannot be read: {reason}; repair it or name another source")


def malformed_json(where: str, error: json.JSONDecodeError | RecursionError) -> BadRecord:
    """BadRecord for what Python's JSON reader refused."""
    detail = (
        f"malformed JSON ({error.msg}, column {error.colno})"
        if isinstance(error, json.JSONDecodeError)
        else "malformed JSON (nested too deeply)"
    )
    return BadRecord(where, "malformed JSON", detail, "one JSON object")


def json_row(where: str, value: Any) -> Row:
    """`value` as a row. Raises BadRecord if it is not an object."""
    if not isinstance(value, dict):
        raise BadRecord(
            where, "malformed JSON", f"the line holds {kind_of(value)}", "an object with columns"
        )
    return Row(where, value)


def _array_elements(path: Path) -> Iterator[Row | BadRecord]:
    """The elements of a JSON array, each with the line on which it begins.

    Raises BadRecord where the array's own syntax breaks: what follows cannot be told apart.
    """
    lines = path.read_bytes().split(b"\n")
    text = "\n".join(decoded(f"{path.name}, line {n}", line) for n, line in enumerate(lines, 1))
    text = text.removeprefix("\ufeff")
    decoder, position, line, counted_to = json.JSONDecoder(), text.index("[") + 1, 1, 0
    position = _skip(text, position, "")
    while text[position : position + 1] != "]":
        line, counted_to = line + text.count("\n", counted_to, position), position
        where = f"{path.name}, line {line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                where = f"{path.name}, line {error.lineno}"
            raise malformed_json(where, error) from None
        try:
            yield json_row(where, value)
        except BadRecord as bad:
            yield bad
        position = _skip(text, position, ",")
        if position == len(text):
            raise BadRecord(where, "malformed JSON", "the array does not end", "a closing ']'")


def _skip(text: str, position: int, separator: str) -> int:
    """The next position that is neither white space nor the one `separator`."""
    allowed = " \t\r\n" + separator
    while position < len(text) and text[position] in allowed:
        if text[position] == separator:
            allowed = " \t\r\n"
        position += 1
    return position


def _csv_header(path: Path) -> list[str]:
    """The column names of a CSV file. Raises UserError if there are none, or one comes twice."""
    with path.open("rb") as file:
        first = file.readline()
    header = decoded(f"{path.name}, line 1", first).removeprefix("\ufeff")
    names = next(csv.reader([header]), [])
    if not names:
        raise UserError(f"{path.name} has no header line; expected the names of its columns there")
    if len(set(names)) < len(names):
        raise UserError(f"{path.name}, line 1: a column name comes twice; expected different names")
    return names


def _arrow_row(table: pa.Table, where: str, latin1: bool) -> Row:
    """The only row of `table` as Python values: text, lists of text, and numbers."""
    cells: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        if _is_text(kind):
            cells[name] = _cell(column.cast(pa.large_binary())[0].as_py(), where, latin1)
        elif _is_list(kind) and _is_text(kind.value_type):
            values = column.cast(pa.large_list(pa.large_binary()))[0].as_py()
            cells[name] = values and [_cell(value, where, latin1) for value in values]
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            cells[name] = column[0].as_py()
        else:
            cells[name] = kind
    return Row(where, cells)


def _cell(raw: bytes | None, where: str, latin1: bool) -> str | None:
    if raw is None:
        return None
    # What was read as Latin-1 is held by Arrow as UTF-8: undo the one, then read the other.
    return decoded(where, raw.decode("utf-8").encode("latin-1") if latin1 else raw)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
