"""What was measured is found again under its own key, and under no other."""

import json
from pathlib import Path
from typing import Any

import pytest

from makd_llm.evaluation.measured import Measured, read_measured, write_measured
from makd_llm.evaluation.rouge import METRICS

MEASURED = Measured(
    {"parameters": {"total": 7}, "perplexity": {"value": 3.0, "nats": 1.5, "tokens": 4}},
    ["a text"],
    {**{metric: [40.0] for metric in METRICS}, "nats": [1.0, 0.5]},
)


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


@pytest.mark.parametrize(
    "change",
    [
        {"scores": {}},
        {"scores": {**MEASURED.scores, "rougeLsum": []}},
        {"scores": {**MEASURED.scores, "rouge1": ["40"]}},
        {"scores": {**MEASURED.scores, "nats": [1.0]}},
        {"texts": [], "scores": dict.fromkeys(MEASURED.scores, ())},
        {"row": {"parameters": {}, "perplexity": MEASURED.row["perplexity"]}},
        {"row": {**MEASURED.row, "perplexity": {"value": 3.0, "nats": 1.5}}},
        {"row": 3},
    ],
)
def test_parts_that_are_not_of_each_other_are_none(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "measured" / "student.json"
    write_measured(path, {}, MEASURED)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert read_measured(path) is None


def test_a_model_that_has_diverged_is_read(tmp_path: Path) -> None:
    """Its perplexity is no number, and that is its result."""
    path = tmp_path / "measured" / "student.json"
    nan = float("nan")
    row = {"perplexity": {"value": nan, "nats": nan, "tokens": 4}}
    write_measured(path, {}, Measured(row, MEASURED.texts, {**MEASURED.scores, "nats": [nan, 1]}))
    assert read_measured(path) is not None
