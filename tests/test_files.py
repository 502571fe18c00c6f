"""A file is whole or as it was; a model folder whose weights changed is told apart."""

from pathlib import Path

import pytest

from makd_llm.files import sample_of_folder, write_whole


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"


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
