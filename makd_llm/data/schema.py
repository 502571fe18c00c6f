"""What a record is, and how one row of a table becomes one, or an error with its file and line.

A table is other people's work: a line is cut short, a column has another name, a document is empty,
bytes are not UTF-8. Each such row becomes a `BadRecord` that says where it is and what was expected
there. Whether that ends the run or is counted is the caller's choice (`on_bad_record`); nothing is
dropped without being counted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from makd_llm.errors import UserError

OnBadRecord = Literal["error", "skip"]


class BadRecord(UserError):
    """One record that cannot be used: where it is, what is wrong, what was expected instead.

    `reason` is the kind of fault in a few words, by which skipped records are counted.
    """

    def __init__(self, where: str, reason: str, detail: str, expected: str) -> None:
        super().__init__(f"{where}: {detail}; expected {expected}")
        self.where, self.reason, self.detail, self.expected = where, reason, detail, expected

    def __reduce__(self) -> tuple[type["BadRecord"], tuple[str, str, str, str]]:
        """By its four parts: how an exception travels from one rank to another."""
        return type(self), (self.where, self.reason, self.detail, self.expected)


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read. `id` may be None: records are then named by place.

    The summary column holds a string, or a list of strings where a document has several reference
    summaries; training learns from the first, evaluation compares with all. summarized: False where
    the summaries are yet to be written; that column is then not looked at, and need not be there.
    """

    id: str | None = "id"
    document: str = "document"
    summary: str = "summary"
    summarized: bool = True


@dataclass(frozen=True)
class Row:
    """A row as it was read: its place, and its cells that hold text, numbers or lists of text."""

    where: str
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """A document with its reference summaries (at least one, or none where they are yet to be
    written), and its place in its source.

    `fields` holds every other column with text, for templates such as "Name the {aspect}".
    `where` reads "train.jsonl, line 17" or "dataset cnn_dailymail[train], row 17", from 1.
    """

    id: str
    document: str
    references: tuple[str, ...]
    fields: Mapping[str, str]
    where: str


@dataclass(frozen=True)
class Example:
    """A record as token ids: `input_ids[:prompt_length]` is given, the rest is to be learnt.

    `document` says where in the prompt the document's own tokens begin and end; None: the whole
    prompt is one.
    """

    record_id: str
    input_ids: list[int]
    prompt_length: int
    document: tuple[int, int] | None = None


def record_from_row(row: Row, columns: Columns) -> Record:
    """Check the named columns of `row` and make a record of it.

    Raises BadRecord for a missing column, a wrong type, an empty document or summary, and for text
    that has no UTF-8 form (half of a surrogate pair, which JSON can spell as an escape), also in a
    column that no template uses: records are written out again, and other readers refuse it.
    """
    known = [name for name in (columns.id, columns.document, columns.summary) if name is not None]
    wanted = known if columns.summarized else known[:-1]
    for name in wanted:
        if name not in row.cells:
            raise _missing(name, wanted, row)
    document = _text(row, columns.document, row.cells[columns.document], "document")
    references: tuple[str, ...] = ()
    if columns.summarized:
        references = tuple(
            _text(row, columns.summary, value, "summary")
            for value in _as_list(row, columns.summary, row.cells[columns.summary])
        )
    fields = {
        name: _encodable(row, name, value)
        for name, value in row.cells.items()
        if isinstance(value, str) and name not in known
    }
    return Record(_record_id(row, columns.id), document, references, fields, row.where)


def decoded(where: str, raw: bytes) -> str:
    """`raw` as text. Raises BadRecord naming the first byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            where,
            "not UTF-8",
            f"byte 0x{raw[error.start]:02x} at position {error.start} is not UTF-8",
            "text in UTF-8 (convert the file, for example with `iconv -f latin1 -t utf-8`)",
        ) from None


def counted(reasons: Iterable[tuple[str, int]]) -> str:
    """Reasons and counts, most frequent first: "2 malformed JSON, 1 empty summary"."""
    ordered = sorted(reasons, key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def _missing(name: str, wanted: list[str], row: Row) -> BadRecord:
    found = ", ".join(map(repr, row.cells)) or "none"
    return BadRecord(
        row.where,
        "missing column",
        f"there is no column {name!r}",
        f"the columns {', '.join(map(repr, wanted))} (found {found}; name yours under data.columns,"
        " where `id: null` means that there is none)",
    )


def _as_list(row: Row, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if not value:
        raise BadRecord(row.where, "empty summary", f"{name!r} is an empty list", "a summary")
    return value


def _text(row: Row, name: str, value: Any, role: Literal["document", "summary"]) -> str:
    if not isinstance(value, str):
        many = " or a list of strings" if role == "summary" else ""
        raise BadRecord(
            row.where,
            "wrong type",
            f"{name!r} holds {kind_of(value)}",
            f"the {role} as a string{many}",
        )
    if not value.strip():
        raise BadRecord(row.where, f"empty {role}", f"{name!r} is empty", f"a {role}")
    return _encodable(row, name, value)


def _encodable(row: Row, name: str, value: str) -> str:
    """The text of a column, if it and the column's name can be written."""
    try:
        f"{name}{value}".encode()
    except UnicodeEncodeError:
        raise BadRecord(
            row.where,
            "not UTF-8",
            f"{name!r} holds an unpaired surrogate escape such as \\ud800",
            "text that can be written as UTF-8",
        ) from None
    return value


def _record_id(row: Row, name: str | None) -> str:
    if name is None:
        return row.where
    value = row.cells[name]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRecord(
            row.where,
            "wrong type",
            f"{name!r} holds {kind_of(value)}",
            "an id: a string or an integer",
        )
    return _encodable(row, name, str(value))


def kind_of(value: Any) -> str:
    """A value's type in JSON's words."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"a value of type {type(value).__name__}"
