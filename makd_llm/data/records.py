"""`load_records`: whatever the source is, records come out, and none is lost without being counted.

Two kinds of source. `RecordList` has a length and an index; it looks at every row once when it is
made, so a bad record shows before anything is trained. `RecordStream` reads as it goes and never
holds the table; its place can be kept and taken up again exactly. Both count what they skip.
"""

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, overload

from makd_llm.data.builtin import fetch_builtin_dataset
from makd_llm.data.schema import (
    BadRecord,
    Columns,
    OnBadRecord,
    Record,
    Row,
    counted,
    record_from_row,
)
from makd_llm.data.tables import (
    Indexed,
    JsonLines,
    Position,
    Table,
    open_arrow,
    open_csv,
    open_json,
)
from makd_llm.errors import UserError
from makd_llm.files import is_plain_name, sample_of, sha256_of

__all__ = [
    "BadRecord",
    "Columns",
    "Record",
    "RecordList",
    "RecordSource",
    "RecordStream",
    "load_records",
]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


class RecordSource(ABC):
    """Records in a fixed order. `skipped` counts the rows that were no good, by reason."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()

    @abstractmethod
    def __iter__(self) -> Iterator[Record]:
        """The good records in the source's order."""

    def describe_skipped(self) -> str | None:
        """One phrase such as "skipped 3 records: 2 malformed JSON, 1 empty summary", or None."""
        return describe_skipped(self.skipped)


class RecordList(RecordSource):
    """Records by index. Every row is checked here; only positions are kept, rows are read again.

    `limit` keeps the first so many good records and reads no further. Raises the first BadRecord
    unless bad ones are to be skipped, and UserError where no good record is found.
    """

    def __init__(
        self,
        table: Indexed,
        columns: Columns,
        place: str,
        *,
        on_bad_record: OnBadRecord,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self._table, self._columns = table, columns
        self._positions: list[Position] = []
        here = table.start
        for row, after in table.read(here):
            try:
                _record(row, columns)
            except BadRecord as bad:
                if on_bad_record == "error":
                    raise
                self.skipped[bad.reason] += 1
            else:
                self._positions.append(here)
            here = after
            if len(self._positions) == limit:
                break
        if not self._positions:
            raise nothing_usable(place, self.skipped)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Record:
        return record_from_row(self._table.row(self._positions[index]), self._columns)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


class RecordStream(RecordSource):
    """Records in order, as they are read, over and over.

    Iterating begins at the first record, or once where `load_state_dict` says; `state_dict` tells
    where the newest iteration stands, in JSON values. A bad row is counted when it is first met
    and not again in later passes. `limit` ends a pass after so many good records. Raises the
    first BadRecord unless bad ones are to be skipped, and UserError after a pass without a record.
    """

    def __init__(
        self,
        table: Table,
        columns: Columns,
        place: str,
        *,
        on_bad_record: OnBadRecord,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self._table, self._columns, self._place = table, columns, place
        self._on_bad_record, self._limit = on_bad_record, limit
        self._position = table.start
        self._given = 0
        self._read = 0
        self._furthest = 0
        self._resuming = False

    def __iter__(self) -> Iterator[Record]:
        if not self._resuming:
            self._position, self._given, self._read = self._table.start, 0, 0
        self._resuming = False
        if self._given == self._limit:
            return
        for row, after in self._table.read(self._position):
            self._position, self._read = after, self._read + 1
            record = self._good(row)
            self._furthest = max(self._furthest, self._read)
            if record is None:
                continue
            self._given += 1
            yield record
            if self._given == self._limit:
                return
        if self._given == 0:
            raise nothing_usable(self._place, self.skipped)

    def _good(self, row: Row | BadRecord) -> Record | None:
        try:
            return _record(row, self._columns)
        except BadRecord as bad:
            if self._on_bad_record == "error":
                raise
            if self._read > self._furthest:
                self.skipped[bad.reason] += 1
            return None

    def state_dict(self) -> dict[str, Any]:
        """Where the newest iteration stands and what has been skipped, in JSON values."""
        return {
            "position": copy.deepcopy(self._position),
            "given": self._given,
            "read": self._read,
            "furthest": self._furthest,
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration begins where `state` was taken; the counts are as they were then."""
        self._position = copy.deepcopy(state["position"])
        self._given, self._read = state["given"], state["read"]
        self._furthest = state["furthest"]
        self.skipped = Counter(state["skipped"])
        self._resuming = True


@overload
def load_records(
    source: str,
    split: str,
    columns: Columns,
    *,
    on_bad_record: OnBadRecord,
    streaming: Literal[False] = False,
    limit: int | None = None,
) -> RecordList: ...


@overload
def load_records(
    source: str,
    split: str,
    columns: Columns,
    *,
    on_bad_record: OnBadRecord,
    streaming: bool,
    limit: int | None = None,
) -> RecordList | RecordStream: ...


def load_records(
    source: str,
    split: str,
    columns: Columns,
    *,
    on_bad_record: OnBadRecord,
    streaming: bool = False,
    limit: int | None = None,
) -> RecordList | RecordStream:
    """The records of one split of `source`.

    `source` is `builtin:NAME`, a .jsonl, .json, .csv or .parquet file (then `split` has no say), a
    folder with one such file per split (`valid`, `val` and `dev` are the validation split), or a
    Hub data set's id, with its configuration after a colon. Streaming gives a RecordStream,
    otherwise a RecordList comes back, every row of which has been checked.

    Raises UserError where the source is not there, cannot be fetched or holds no usable record,
    and BadRecord with file and line at the first bad one unless `on_bad_record` is "skip".
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit} records; it is at least 1, or null for all of them")
    _check_split(split)
    table, place = _open(source, split, streaming)
    if streaming:
        return RecordStream(table, columns, place, on_bad_record=on_bad_record, limit=limit)
    return RecordList(table, columns, place, on_bad_record=on_bad_record, limit=limit)


def content_of(source: str, split: str, *, streaming: bool = False) -> str | None:
    """What tells one content of a local file from another: its SHA-256; of a stream, which may be
    too large to be read for this, its size and a sample.

    None for `builtin:` (its content is fixed) and for Hub data sets. Raises UserError as
    `load_records` does where a folder has no file for the split.
    """
    _check_split(split)
    path = _local_file(source, split)
    if path is None or not path.is_file():
        return None
    _check_readable(path)
    if streaming:
        return f"{path.stat().st_size} bytes, sample {sample_of(path)}"
    return f"sha256 {sha256_of(path)}"


def describe_skipped(skipped: Counter[str]) -> str | None:
    """One phrase such as "skipped 3 records: 2 malformed JSON, 1 empty summary", or None."""
    if not skipped.total():
        return None
    noun = "record" if skipped.total() == 1 else "records"
    return f"skipped {skipped.total()} {noun}: {counted(skipped.items())}"


def nothing_usable(place: str, skipped: Counter[str]) -> UserError:
    """The error for a source without one good record."""
    what = describe_skipped(skipped) or "it is empty"
    return UserError(f"{place} holds no usable record ({what}); check the file and data.columns")


def _record(row: Row | BadRecord, columns: Columns) -> Record:
    if isinstance(row, BadRecord):
        raise row
    return record_from_row(row, columns)


def _open(source: str, split: str, streaming: bool) -> tuple[Any, str]:
    """The table behind `source`, and what to call it."""
    if source.startswith("builtin:"):
        files = fetch_builtin_dataset(source.removeprefix("builtin:"))
        name = _split_name(split)
        if name not in files:
            raise UserError(f"{source} has no split {split!r}; it has {', '.join(files)}")
        return JsonLines(files[name]), f"{source}[{name}]"
    path = _local_file(source, split) or Path(source).expanduser()
    if path.is_file():
        return _open_file(path, streaming), path.name
    if path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise UserError(f"{source}: there is no such file or folder; check data.source")
    name, _, config = source.partition(":")
    place = f"dataset {source}[{split}]"
    table = open_arrow(place, streaming=streaming, path=name, name=config or None, split=split)
    return table, place


def _local_file(source: str, split: str) -> Path | None:
    """The local file that holds a split; None where the source is no local one."""
    if source.startswith("builtin:"):
        return None
    path = Path(source).expanduser()
    if path.is_dir():
        return _file_of_split(path, split)
    return path if path.is_file() else None


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}; check its rights") from error


def _open_file(path: Path, streaming: bool) -> Table:
    _check_readable(path)
    match path.suffix:
        case ".jsonl":
            return JsonLines(path)
        case ".json":
            return open_json(path)
        case ".csv":
            return open_csv(path, streaming=streaming)
        case ".parquet":
            return open_arrow(
                path.name,
                streaming=streaming,
                path="parquet",
                data_files=str(path),
                split="train",
            )
        case _:
            raise UserError(f"{path} is of no known kind; expected one of {', '.join(SUFFIXES)}")


def _check_split(split: str) -> None:
    """It becomes a file's name, here and where summaries are written."""
    if not is_plain_name(split):
        raise UserError(
            f"the split {split!r} is no name of one; expected a word such as train or validation"
        )


def _split_name(split: str) -> str:
    """The one name of a split that goes by several."""
    return next((name for name, others in SPLIT_NAMES.items() if split in others), split)


def _file_of_split(folder: Path, split: str) -> Path:
    stems = SPLIT_NAMES.get(_split_name(split), (split,))
    found = [
        folder / f"{stem}{suffix}"
        for stem in stems
        for suffix in SUFFIXES
        if (folder / f"{stem}{suffix}").is_file()
    ]
    if not found:
        raise UserError(
            f"{folder} has no file for the split {split!r}; expected {' or '.join(stems)} with one "
            f"of the endings {', '.join(SUFFIXES)}"
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{folder} has {names} for the split {split!r}; keep one, or name the file")
    return found[0]
