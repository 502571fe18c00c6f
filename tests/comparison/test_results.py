"""What is read from the runs, and whether they may be compared at all."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from makd_llm.comparison.grid import Grid, Row
from makd_llm.comparison.reading import Found
from makd_llm.comparison.record import Record, Stamps, write_record
from makd_llm.comparison.results import equal_tokens, publish


def found(name: str, seed: int, tokens: list[int]) -> Found:
    return Found(Row(name, name, None, 0.5, seed, None), "done", tokens=tokens)


def test_tokens_are_equal_step_by_step_within_a_seed() -> None:
    rows = [found("kd", 0, [10, 12]), found("makd", 0, [10, 12]), found("kd", 1, [11, 9])]
    fair = equal_tokens(rows)
    assert fair["equal"] is True
    assert fair["said"].startswith("Every row saw 20 or 22 tokens in 2 steps")
    lead = Found(Row("lead-3", "lead-3", "lead", None, None, None), "done")
    assert equal_tokens([lead, *rows]) == fair


def test_other_batches_are_told_also_where_the_sums_agree() -> None:
    rows = [found("kd", 0, [10, 12]), found("makd", 0, [12, 10]), found("kd", 1, [1, 1])]
    unfair = equal_tokens(rows)
    assert unfair["equal"] is False
    assert unfair["said"] == "TOKENS DIFFER: makd-keep0.5-seed0 saw 22, kd-keep0.5-seed0 22."
    rows.append(replace(rows[2], row=replace(rows[2].row, name="makd"), tokens=[1, 2]))
    assert equal_tokens(rows)["said"].endswith("22, and 1 more differ.")


def test_nothing_has_learnt_yet() -> None:
    assert equal_tokens([]) == {"equal": None, "said": "No row has learnt yet."}


@pytest.fixture
def finished(grid: Grid, leave: Callable[..., None]) -> Grid:
    """A grid whose runs have all ended well."""
    for item in grid.needed():
        leave(grid, item)
        record = Record("done", Stamps(grid).of(item), seconds=1.0)
        write_record(grid.folder / item.place, record)
    return grid


def changed(path: Path, **values: object) -> str:
    return json.dumps(json.loads(path.read_text()) | values)


def test_a_finished_comparison_is_whole(finished: Grid) -> None:
    found = publish(finished)
    assert {row["state"] for row in found["rows"]} == {"done"}
    assert all(Stamps(finished).stands(item) for item in finished.needed())


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("measured/student.json", None, "not there, or damaged"),
        ("measured/student.json", lambda path: "{", "not there, or damaged"),
        ("measured/student.json", lambda path: changed(path, scores={}), "not there, or damaged"),
        (
            "measured/student.json",
            lambda path: changed(path, texts=["a text"]),
            "not there, or damaged",
        ),
        ("metrics.jsonl", None, "No such file"),
        ("metrics.jsonl", lambda path: path.read_text()[:-9], "damaged"),
        ("metrics.jsonl", lambda path: "", "0 of 2 steps"),
        ("metrics.jsonl", lambda path: path.read_text().replace("5", "null"), "damaged"),
    ],
)
def test_a_damaged_row_is_named_and_does_not_stand(
    finished: Grid, file: str, damage: Callable[[Path], str] | None, words: str
) -> None:
    """The others are in the table all the same."""
    kd, makd = finished.runs
    path = finished.folder / kd.place / file
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path))
    rows = {row["name"]: row for row in publish(finished)["rows"]}
    assert (rows["kd"]["state"], rows["makd"]["state"]) == ("failed", "done")
    assert rows["kd"]["error"].startswith(f"{kd.place}/{file}: ") and words in rows["kd"]["error"]
    assert not Stamps(finished).stands(kd) and Stamps(finished).stands(makd)


def test_a_row_of_other_documents_than_the_others_is_not_compared(
    finished: Grid, leave: Callable[..., None]
) -> None:
    whole = replace(
        finished, rows=(*finished.rows, Row("teacher", "", "teacher", None, None, None))
    )
    leave(finished, finished.runs[1], documents=2)
    rows = {row["name"]: row for row in publish(whole)["rows"]}
    assert [row["state"] for row in rows.values()] == ["done", "failed", "done"]
    assert "of 2 documents, that of others of 3" in rows["makd"]["error"]


def test_a_baselines_measurement_that_is_damaged_is_the_shared_runs(finished: Grid) -> None:
    (finished.folder / "shared/keep0.5/measured/lead-3.json").unlink()
    shared = finished.shared["shared/keep0.5"]
    assert not Stamps(finished).stands(shared)
    assert {row["state"] for row in publish(finished)["rows"]} == {"done"}
