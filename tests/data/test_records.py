"""Records from every kind of source, and bad ones with file and line."""

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from makd_llm.data.records import (
    BadRecord,
    Columns,
    RecordList,
    RecordStream,
    content_of,
    load_records,
)
from makd_llm.errors import UserError

Load = Callable[..., Any]
Jsonl = Callable[..., Path]
GOOD = {"id": "g", "document": "A dog sleeps.", "summary": "Sleep."}

BAD = {
    "malformed JSON": (b'{"id": "b", "document": ', "malformed JSON .*expected one JSON object"),
    "not an object": (b"[1, 2]", "holds a list; expected an object"),
    "missing column": (
        {"id": "b", "text": "x", "summary": "y"},
        "there is no column 'document'; expected the columns 'id', 'document', 'summary' "
        r"\(found 'id', 'text', 'summary'",
    ),
    "empty document": ({**GOOD, "document": " \n"}, "'document' is empty; expected a document"),
    "empty summary": ({**GOOD, "summary": ""}, "'summary' is empty; expected a summary"),
    "empty list": ({**GOOD, "summary": []}, "'summary' is an empty list; expected a summary"),
    "not UTF-8": (b'{"id": "b", "document": "caf\xe9"}', "byte 0xe9 at position 28 is not UTF-8"),
    "surrogate": ({**GOOD, "document": "\ud800"}, "unpaired surrogate"),
    "surrogate in an id": ({**GOOD, "id": "\udfff"}, "'id' holds an unpaired surrogate"),
    "surrogate in any column": (
        {**GOOD, "note": "a\ud83d"},
        "'note' holds an unpaired surrogate escape .*expected text that can be written as UTF-8",
    ),
    "surrogate in a name": ({**GOOD, "\ud800": "a"}, r"'\\ud800' holds an unpaired"),
    "wrong type": ({**GOOD, "document": 5}, "'document' holds a number; expected the document as"),
    "null": (
        {**GOOD, "summary": None},
        "'summary' holds null; expected the summary as a string or",
    ),
    "list of numbers": ({**GOOD, "summary": ["a", 1]}, "'summary' holds a number"),
    "wrong id": ({**GOOD, "id": {}}, "'id' holds an object; expected an id"),
}
REASONS = {
    "not an object": "malformed JSON",
    "empty list": "empty summary",
    "surrogate": "not UTF-8",
    "surrogate in an id": "not UTF-8",
    "surrogate in any column": "not UTF-8",
    "surrogate in a name": "not UTF-8",
    "null": "wrong type",
    "list of numbers": "wrong type",
    "wrong id": "wrong type",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_line_is_named_or_counted(
    fault: str, streaming: bool, jsonl: Jsonl, load: Load
) -> None:
    line, message = BAD[fault]
    path = jsonl([GOOD, b"", line, GOOD])
    with pytest.raises(BadRecord, match=rf"^train\.jsonl, line 3: .*{message}") as raised:
        list(load(path, streaming=streaming))
    assert "\n" not in str(raised.value)
    source = load(path, streaming=streaming, on_bad_record="skip")
    assert [record.where for record in source] == ["train.jsonl, line 1", "train.jsonl, line 4"]
    reason = REASONS.get(fault, fault)
    assert source.skipped == {reason: 1}
    assert source.describe_skipped() == f"skipped 1 record: 1 {reason}"


def test_nothing_is_lost_without_being_counted(jsonl: Jsonl, load: Load) -> None:
    lines = [GOOD, *(line for line, _ in BAD.values()), GOOD]
    source = load(jsonl(lines), on_bad_record="skip")
    assert len(source) + source.skipped.total() == len(lines)
    assert source.describe_skipped() == (
        "skipped 15 records: 5 not UTF-8, 4 wrong type, 2 empty summary, 2 malformed JSON, "
        "1 empty document, 1 missing column"
    )
    assert load(jsonl([GOOD])).describe_skipped() is None


def test_a_bad_record_survives_pickling() -> None:
    bad = BadRecord("a.jsonl, line 3", "wrong type", "is a number", "a string")
    copied = pickle.loads(pickle.dumps(bad))
    assert (str(copied), copied.reason) == (str(bad), bad.reason)


def test_a_source_without_one_good_record_is_an_error(jsonl: Jsonl, load: Load) -> None:
    path = jsonl([{"text": "x"}] * 3)
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"no usable record \(skipped 3 records: 3 missing col"):
            list(load(path, on_bad_record="skip", streaming=streaming))
    with pytest.raises(UserError, match=r"no usable record \(it is empty"):
        load(jsonl([]))


def test_columns_fields_and_references(jsonl: Jsonl, load: Load) -> None:
    row = {"key": 7, "text": "d", "refs": ["a", "b"], "aspect": "outcome", "n": 3, "none": None}
    columns = Columns(id="key", document="text", summary="refs")
    for streaming in (False, True):
        record = next(iter(load(jsonl([row]), columns=columns, streaming=streaming)))
        assert (record.id, record.document, record.references) == ("7", "d", ("a", "b"))
        assert record.fields == {"aspect": "outcome"}


def test_without_an_id_column_the_place_is_the_name(jsonl: Jsonl, load: Load) -> None:
    path = jsonl([{"document": "d", "summary": "s"}])
    with pytest.raises(BadRecord, match=r"no column 'id'.*`id: null` means"):
        load(path)
    assert load(path, columns=Columns(id=None))[0].id == "train.jsonl, line 1"


def test_crlf_and_a_byte_order_mark_are_no_fault(jsonl: Jsonl, load: Load) -> None:
    line = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r"
    assert [r.where for r in load(jsonl([line, b"\r", line[3:]]))] == [
        "train.jsonl, line 1",
        "train.jsonl, line 3",
    ]


def test_limit_keeps_the_first_good_ones(jsonl: Jsonl, make_rows: Load, load: Load) -> None:
    path = jsonl([b"broken", *make_rows(5), b"not read"])
    for streaming in (False, True):
        source = load(path, limit=5, streaming=streaming, on_bad_record="skip")
        for _ in range(2):
            assert [record.id for record in source] == list("01234")
        assert source.skipped == {"malformed JSON": 1}
    with pytest.raises(UserError, match="at least 1"):
        load(path, limit=0)


class TestJson:
    def test_an_array_names_lines(self, tmp_path: Path, load: Load) -> None:
        path = tmp_path / "a.json"
        path.write_text("[\n" + json.dumps(GOOD) + ",\n\n 5,\n" + json.dumps(GOOD) + "\n]")
        with pytest.raises(BadRecord, match=r"^a\.json, line 4: .*holds a number"):
            load(path)
        source = load(path, on_bad_record="skip")
        assert [record.where for record in source] == ["a.json, line 2", "a.json, line 5"]
        assert [r.where for r in load(path, on_bad_record="skip", streaming=True)] == [
            record.where for record in source
        ]

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            (b'[{"id": 1},\n{"id": }]', 2),
            (b'[{"id": 1}\n{"id": 2},\n', 2),
            (b'[{"id": 1}\n', 1),
            (b'[\n\n{"id": "\xff"}]', 3),
            (b"[" * 200_000, 1),
        ],
    )
    def test_broken_syntax_names_its_line(
        self, text: bytes, line: int, tmp_path: Path, load: Load
    ) -> None:
        (tmp_path / "a.json").write_bytes(text)
        with pytest.raises(BadRecord, match=rf"^a\.json, line {line}:"):
            load(tmp_path / "a.json", on_bad_record="skip", columns=Columns(None, "id", "id"))

    def test_lines_are_lines_also_in_a_json_file(self, jsonl: Jsonl, load: Load) -> None:
        assert len(load(jsonl([GOOD, GOOD], name="a.json"))) == 2


class TestCsv:
    def write(self, folder: Path, content: bytes) -> Path:
        (folder / "a.csv").write_bytes(b"id,document,summary,kind\n" + content)
        return folder / "a.csv"

    @pytest.mark.parametrize("streaming", [False, True])
    def test_text_stays_text(self, tmp_path: Path, load: Load, streaming: bool) -> None:
        path = self.write(tmp_path, '007,"héllo,\n漢字",None,NA\n'.encode())
        (record,) = load(path, streaming=streaming)
        assert (record.id, record.document) == ("007", "héllo,\n漢字")
        assert record.references == ("None",)
        assert record.fields == {"kind": "NA"}
        assert record.where == "a.csv, row 1"

    @pytest.mark.parametrize("streaming", [False, True])
    def test_bad_rows_are_named_or_counted(
        self, tmp_path: Path, load: Load, streaming: bool
    ) -> None:
        path = self.write(tmp_path, b"1,a,b,\n2,caf\xe9,b,\n3,,b,\n4,a\n5,c,d,\n")
        with pytest.raises(BadRecord, match=r"^a\.csv, row 2: byte 0xe9 at position 3 is not UTF"):
            list(load(path, streaming=streaming))
        source = load(path, streaming=streaming, on_bad_record="skip")
        assert [record.id for record in source] == ["1", "5"]
        assert source.skipped["not UTF-8"] == source.skipped["empty document"] == 1
        assert source.skipped.total() == 3

    @pytest.mark.parametrize("streaming", [False, True])
    def test_broken_syntax_is_one_line(self, tmp_path: Path, load: Load, streaming: bool) -> None:
        path = self.write(tmp_path, b"1,a,b,c\n2,a,b,c,d,e\n")
        with pytest.raises(UserError, match=r"^a\.csv cannot be read: .*line 3, saw 6") as raised:
            list(load(path, streaming=streaming, on_bad_record="skip"))
        assert "\n" not in str(raised.value)

    def test_a_header_must_be_there_and_be_plain(self, tmp_path: Path, load: Load) -> None:
        path = tmp_path / "a.csv"
        for content, message in [
            (b"", "no header line"),
            (b"id,id,document\n", "comes twice"),
            (b"id,docum\xe9nt\n1,a\n", "line 1: byte 0xe9"),
            ("id,document,summary\n".encode("utf-16"), "line 1: byte 0xff"),
            (b"id,text,summary\n1,a,b\n", "row 1: there is no column 'document'.*'text'"),
        ]:
            path.write_bytes(content)
            with pytest.raises(UserError, match=message):
                load(path)
        path.write_bytes("id,document,summary\n1,a,b\n".encode("utf-8-sig"))
        assert load(path)[0].id == "1"


class TestParquet:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        # Arrow does not check that text is UTF-8 when a file is written by other programs.
        text = pa.array([b"ok", b"caf\xe9", b"z", b"last"], pa.binary())
        table = pa.table(
            {
                "id": pa.array([1, 2, 3, 4]),
                "document": pa.Array.from_buffers(pa.string(), 4, text.buffers()),
                "summary": pa.array([["a", "b"], ["c"], [], ["d"]]),
                "kind": pa.array(["k", "k", "k", None]),
                "when": pa.array([0, 0, 0, 0], pa.timestamp("s")),
            }
        )
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        return tmp_path / "a.parquet"

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_and_their_faults(self, path: Path, load: Load, streaming: bool) -> None:
        with pytest.raises(BadRecord, match=r"^a\.parquet, row 2: byte 0xe9"):
            list(load(path, streaming=streaming))
        source = load(path, streaming=streaming, on_bad_record="skip")
        first, last = source
        assert (first.id, first.references, dict(first.fields)) == ("1", ("a", "b"), {"kind": "k"})
        assert (last.where, dict(last.fields)) == ("a.parquet, row 4", {})
        assert source.skipped == {"not UTF-8": 1, "empty summary": 1}

    def test_a_column_of_another_type(self, path: Path, load: Load) -> None:
        with pytest.raises(BadRecord, match=r"row 1: 'when' holds .*; expected the document as"):
            load(path, columns=Columns(document="when"))

    def test_a_damaged_file_is_one_line(self, tmp_path: Path, load: Load) -> None:
        (tmp_path / "a.parquet").write_bytes(b"no parquet")
        for streaming in (False, True):
            with pytest.raises(UserError, match=r"^a\.parquet cannot be read: Parquet"):
                list(load(tmp_path / "a.parquet", streaming=streaming))


class TestWhichFile:
    @pytest.mark.parametrize(
        ("split", "name"),
        [
            ("train", "train.jsonl"),
            ("validation", "valid.jsonl"),
            ("val", "dev.jsonl"),
            ("dev", "validation.jsonl"),
            ("test", "test.jsonl"),
            ("extra", "extra.jsonl"),
        ],
    )
    def test_split_picks_the_file_of_a_folder(
        self, split: str, name: str, jsonl: Jsonl, load: Load
    ) -> None:
        folder = jsonl([GOOD], name=name).parent
        assert load(folder, split)[0].where == f"{name}, line 1"
        with pytest.raises(UserError, match="no file for the split 'other'; expected other with"):
            load(folder, "other")

    def test_two_files_for_a_split_are_refused(self, jsonl: Jsonl, load: Load) -> None:
        folder = jsonl([GOOD], name="valid.jsonl").parent
        jsonl([GOOD], name="dev.json")
        with pytest.raises(UserError, match=r"valid\.jsonl and dev\.json for the split"):
            load(folder, "validation")

    def test_a_file_that_is_not_there(self, tmp_path: Path, load: Load) -> None:
        for source in (tmp_path / "no.jsonl", tmp_path / "folder", "no.csv", "./no"):
            with pytest.raises(UserError, match="there is no such file or folder"):
                load(source)
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(UserError, match=r"expected one of \.jsonl, \.json, \.csv, \.parquet"):
            load(tmp_path / "a.txt")

    def test_a_file_that_may_not_be_read(
        self, jsonl: Jsonl, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        path = jsonl([GOOD])
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(UserError, match=r"train\.jsonl cannot be opened: Permission denied"):
            load(path)


class TestHub:
    def test_an_unreachable_hub_says_what_to_do(
        self, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = {}

        def unreachable(**arguments: Any) -> None:
            asked.update(arguments)
            raise ConnectionError("Couldn't reach 'org/name' on the Hub (ConnectError)\nmore")

        monkeypatch.setattr("makd_llm.data.tables.load_dataset", unreachable)
        with pytest.raises(
            UserError,
            match=r"^dataset org/name:en\[train\] cannot be fetched .*HF_HOME.*HF_ENDPOINT",
        ) as raised:
            load("org/name:en", streaming=True)
        assert "\n" not in str(raised.value)
        assert asked == {"path": "org/name", "name": "en", "split": "train", "streaming": True}

    def test_an_unknown_split_is_one_line(
        self, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(**arguments: Any) -> None:
            raise ValueError("Unknown split \"tran\". Should be one of ['train'].")

        monkeypatch.setattr("makd_llm.data.tables.load_dataset", refuse)
        with pytest.raises(UserError, match=r"org/name\[tran\] cannot be read: Unknown split"):
            load("org/name", "tran")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_its_rows_are_named(
        self, streaming: bool, make_rows: Load, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = make_rows(4)
        rows[2]["document"] = ""

        def answer(*, streaming: bool, **_: Any) -> Any:
            made = datasets.Dataset.from_list(rows)
            return made.to_iterable_dataset(num_shards=2) if streaming else made

        monkeypatch.setattr("makd_llm.data.tables.load_dataset", answer)
        with pytest.raises(BadRecord, match=r"^dataset org/name\[train\], row 3: 'document' is em"):
            list(load("org/name", streaming=streaming))
        source = load("org/name", streaming=streaming, on_bad_record="skip")
        assert [record.id for record in source] == ["0", "1", "3"]


class TestStream:
    """A stream resumes where it stood, whatever it is made of."""

    @pytest.fixture(params=["jsonl", "json", "csv", "parquet", "hub"])
    def make(
        self,
        request: pytest.FixtureRequest,
        tmp_path: Path,
        make_rows: Load,
        load: Load,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Callable[[], RecordStream]:
        rows = make_rows(9)
        rows[1]["document"] = rows[6]["summary"] = ""
        path = tmp_path / f"a.{request.param}"
        made = datasets.Dataset.from_list(rows)
        if request.param == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        elif request.param == "json":
            path.write_text(json.dumps(rows))
        elif request.param == "csv":
            made.to_csv(str(path))
        elif request.param == "parquet":
            made.to_parquet(str(path), batch_size=2)
        else:
            path = Path("org/name")
            monkeypatch.setattr(
                "makd_llm.data.tables.load_dataset",
                lambda **_: made.to_iterable_dataset(num_shards=3),
            )
        return lambda: load(path, streaming=True, on_bad_record="skip")

    def test_resumed_equals_uninterrupted(self, make: Callable[[], RecordStream]) -> None:
        whole = make()
        expected = list(whole)
        assert [record.id for record in expected] == list("0234578")
        for taken in range(len(expected) + 1):
            first = make()
            records = iter(first)
            begun = list(itertools.islice(records, taken))
            state = json.loads(json.dumps(first.state_dict()))
            next(records, None)  # going on must not change the state that was kept
            second = make()
            second.load_state_dict(state)
            assert begun + list(second) == expected
            assert second.skipped == whole.skipped == {"empty document": 1, "empty summary": 1}
            assert list(second) == expected, "a second pass begins at the beginning"
            assert second.skipped == whole.skipped, "and counts nobody twice"

    def test_rows_are_the_same_without_streaming(
        self, make: Callable[[], RecordStream], load: Load, tmp_path: Path
    ) -> None:
        paths = list(tmp_path.glob("a.*"))
        if paths:
            listed: RecordList = load(paths[0], on_bad_record="skip")
            assert list(listed) == list(make())


def test_what_a_file_holds_is_told_apart(jsonl: Jsonl) -> None:
    path = jsonl([GOOD])
    before, sample = content_of(str(path), "train"), content_of(str(path), "train", streaming=True)
    assert content_of(str(path.parent), "train") == before and str(before).startswith("sha256 ")
    path.write_text(path.read_text().replace("dog", "cat"))
    assert content_of(str(path), "train") != before
    assert content_of(str(path), "train", streaming=True) != sample, "of the same size, though"
    assert content_of("builtin:aclsum", "train") is None
    assert content_of("owner/name", "train") is None


def test_of_a_stream_no_more_than_a_sample_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)  # would take minutes to read
    assert str(content_of(str(path), "train", streaming=True)).startswith("1099511627776 bytes, sa")


@pytest.mark.parametrize("split", ["../other", "a/b", "", ".hidden", "train\n", "..", "a\\b"])
def test_a_split_cannot_name_a_file_elsewhere(tmp_path: Path, split: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other.jsonl").write_text("{}\n")
    for call in (load_records, content_of):
        more = {"columns": Columns(), "on_bad_record": "error"} if call is load_records else {}
        with pytest.raises(UserError, match="is no name of one"):
            call(str(tmp_path / "data"), split, **more)
