"""A file is whole or as it was; a model folder whose weights changed is told apart."""

import shutil
from pathlib import Path

import pytest

from makd_llm.errors import UserError
from makd_llm.files import claimed, replacing, sample_of_folder, write_whole


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"


def test_a_folder_is_claimed_by_one_run_and_freed_at_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with claimed(folder, "run_dir"):
        with pytest.raises(UserError, match="another run is at work"), claimed(folder, "run_dir"):
            pass
        (folder / "file").touch()
    with claimed(folder, "run_dir"):
        pass
    with pytest.raises(UserError, match="cannot be written"), claimed(folder / "file", "--out"):
        pass


def test_what_is_durable_is_synced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, named = tmp_path / "a", []
    monkeypatch.setattr("os.fsync", lambda handle: named.append(path.exists()))
    with replacing(path, durable=True) as scratch:
        scratch.write_text("x")
    assert named == [False, True]


@pytest.mark.parametrize("at", [0, 1_000_000, 2_999_999])
def test_one_changed_stretch_of_weights_is_seen(tmp_path: Path, at: int) -> None:
    weights = bytearray(3_000_000)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = sample_of_folder(tmp_path)
    assert sample_of_folder(tmp_path) == before
    weights[max(0, at - 200_000) : at + 1] = b"x" * (at + 1 - max(0, at - 200_000))
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert sample_of_folder(tmp_path) != before


def test_whatever_a_model_is_loaded_from_is_seen_and_nothing_else(tmp_path: Path) -> None:
    loaded = {
        "config.json": False,
        "tokenizer.json": False,
        "merges.txt": False,
        "tokenizer.model": False,
        "chat_template.jinja": False,
        "additional_chat_templates/tool_use.jinja": False,
        "model.safetensors": True,
        "model.safetensors.index.json": True,
    }
    for name in reversed(loaded):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a" * 2_000_000)
    for name in ("README.md", "README.txt", "report.html"):
        (tmp_path / name).write_text("a")
    other = tmp_path.with_name("other")
    shutil.copytree(tmp_path, other)
    for name in ("README.md", "README.txt", "report.html"):
        (other / name).write_text("b")
    whole, tokenizer = sample_of_folder(tmp_path), sample_of_folder(tmp_path, weights=False)
    assert (sample_of_folder(other), sample_of_folder(other, weights=False)) == (whole, tokenizer)
    for name, of_weights in loaded.items():
        content = (other / name).read_bytes()
        (other / name).write_bytes(b"b" + content[1:])
        assert sample_of_folder(other) != whole, name
        assert (sample_of_folder(other, weights=False) == tokenizer) == of_weights, name
        (other / name).write_bytes(content)
    text = bytearray(b"a" * 2_000_000)
    text[70_000:70_001] = b"b"  # between the places where weights are read
    (other / "tokenizer.json").write_bytes(text)
    assert sample_of_folder(other) != whole
