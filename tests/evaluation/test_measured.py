"""What was measured is found again under its own key, and under no other."""

from pathlib import Path

import pytest

from makd_llm.evaluation.measured import Measured, read_measured, write_measured

MEASURED = Measured({"perplexity": {"value": 3.0}}, ["a text"], {"rouge1": [40.0]})


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "measured" / "student.json"
    write_measured(path, {"model": "abc", "file": Path("x")}, MEASURED)
    assert read_measured(path, {"model": "abc", "file": Path("x")}) == MEASURED
    assert read_measured(path) == MEASURED
    assert read_measured(path, {"model": "abd", "file": Path("x")}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}'])
def test_a_damaged_file_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "student.json"
    assert read_measured(path) is None
    path.write_text(text)
    assert read_measured(path, {}) is None
