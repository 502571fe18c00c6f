"""Whatever is interrupted, the joined file has every document once, in order, or is not there."""

import json
from pathlib import Path
from typing import Any

import pytest

from makd_llm.errors import UserError
from makd_llm.generation.pieces import Pieces

COUNT, SIZE = 4, 3


def pieces_in(folder: Path, **made_from: Any) -> Pieces:
    return Pieces(folder, "train", made_from or {"seed": 1}, count=COUNT, expected=lambda n: SIZE)


def lines_of(number: int) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "ended": i % 5 != 0, "empty": i == 7, "row": {"id": f"r{i}", "text": "ä\n"}}
        for i in range(number * SIZE, (number + 1) * SIZE)
    ]


def write(pieces: Pieces, numbers: list[int]) -> None:
    for number in numbers:
        pieces.save(number, lines_of(number))


def joined(folder: Path) -> list[str]:
    text = (folder / "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["id"] for line in text.splitlines()]


def test_pieces_in_any_order_become_one_file_in_order(tmp_path: Path) -> None:
    pieces = pieces_in(tmp_path)
    assert pieces.begin() == [0, 1, 2, 3]
    write(pieces, [2, 0, 3, 1])
    pieces.join({"documents": 12})
    assert joined(tmp_path) == [f"r{i}" for i in range(12) if i != 7]
    manifest = pieces.manifest()
    assert manifest is not None
    assert (manifest["done"], manifest["summaries"], manifest["documents"]) == (True, 11, 12)
    assert (manifest["cut"], manifest["empty"]) == (["r0", "r5", "r10"], ["r7"])
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "manifest.json"}
    assert pieces_in(tmp_path).begin() is None


@pytest.mark.parametrize("lost", [9, 1 + len(json.dumps(lines_of(1)[2], ensure_ascii=False))])
def test_only_whole_pieces_count_after_an_interruption(tmp_path: Path, lost: int) -> None:
    """Torn within a line, or between two."""
    pieces = pieces_in(tmp_path)
    pieces.begin()
    write(pieces, [0, 1, 3])
    (tmp_path / "pieces" / ".writing-000002.jsonl").write_text('{"id": "r6"')
    torn = tmp_path / "pieces" / "000001.jsonl"
    torn.write_text(torn.read_text(encoding="utf-8")[:-lost], encoding="utf-8")
    again = pieces_in(tmp_path)
    assert again.begin() == [1, 2]
    write(again, [1, 2])
    again.join({})
    assert joined(tmp_path) == [f"r{i}" for i in range(12) if i != 7]


@pytest.mark.parametrize("at", ["joined file", "manifest"])
def test_joining_can_be_interrupted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Killed before the manifest says so, or before the pieces are gone."""
    pieces = pieces_in(tmp_path)
    pieces.begin()
    write(pieces, [0, 1, 2, 3])

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pieces, "_remove_pieces" if at == "manifest" else "_write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            pieces.join({})
    expected = joined(tmp_path)
    again = pieces_in(tmp_path)
    missing = again.begin()
    if at == "manifest":
        assert missing is None and not (tmp_path / "pieces").exists()
    else:
        assert missing == []
        again.join({})
    assert joined(tmp_path) == expected == [f"r{i}" for i in range(12) if i != 7]


def test_a_finished_file_without_a_text_is_written_again(tmp_path: Path) -> None:
    pieces = pieces_in(tmp_path)
    pieces.begin()
    write(pieces, [0, 1, 2, 3])
    pieces.join({})
    told = {"made_from": {"seed": 1}, "done": True, "summaries": 0, "cut": [], "empty": ["r0"]}
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    assert pieces_in(tmp_path).begin() == [0, 1, 2, 3]


def test_other_settings_are_refused_and_named_or_replaced_where_asked(tmp_path: Path) -> None:
    before = pieces_in(tmp_path, generation={"beams": 4})
    before.begin()
    write(before, [0, 1])
    other = pieces_in(tmp_path, generation={"beams": 5})
    with pytest.raises(UserError, match=r"generation\.beams changed from 4 to 5") as caught:
        other.begin()
    assert str(tmp_path) in str(caught.value)
    assert before.begin() == [2, 3], "and nothing is lost"
    said: list[str] = []
    assert other.begin(said.append) == [0, 1, 2, 3]
    assert said == [f"{tmp_path}: written anew, as generation.beams changed from 4 to 5"]


def test_a_file_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"train\.jsonl is there already"):
        pieces_in(tmp_path).begin()
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_a_finished_file_that_went_is_written_again(tmp_path: Path) -> None:
    pieces = pieces_in(tmp_path)
    pieces.begin()
    write(pieces, [0, 1, 2, 3])
    pieces.join({})
    (tmp_path / "train.jsonl").unlink()
    assert pieces_in(tmp_path).begin() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "foreign",
    [
        '{"name": "an extension", "version": 3}',
        "[1, 2]",
        "null",
        '{"made_from": "wool", "done": false}',
        '{"made_from": {}, "done": true}',
    ],
)
def test_a_manifest_of_something_else_is_left_alone(tmp_path: Path, foreign: str) -> None:
    (tmp_path / "manifest.json").write_text(foreign)
    for replacing in (None, print):
        with pytest.raises(UserError, match=r"manifest\.json: no manifest of summaries; name"):
            pieces_in(tmp_path).begin(replacing)
    assert (tmp_path / "manifest.json").read_text() == foreign


def test_what_cannot_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        pieces_in(tmp_path).begin()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="cannot be written"):
        pieces_in(file / "folder").begin()
    (tmp_path / "other" / "manifest.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read \(Is a directory"):
        pieces_in(tmp_path / "other").begin()
