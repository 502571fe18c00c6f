"""Whatever a folder lacks, the report is made, and says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from makd_llm.errors import UserError
from makd_llm.report.contents import read_comparison, read_run
from makd_llm.report.numbers import numbers
from makd_llm.report.page import read, render

FILES = (
    "config.yaml",
    "environment.json",
    "stages.json",
    "metrics.jsonl",
    "factorization.json",
    "evaluation.json",
    "attention.json",
    "samples.jsonl",
)
DAMAGED = {
    "empty": b"",
    "cut short": b'{"models": {"teacher": {"roug',
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "of another shape": b'{"models": 3, "matrices": {}, "layers": 1, "step": "x", "distil": 1}',
    "not UTF-8": b"\xff\xfe{}",
    "binary": bytes(range(256)),
}


FINE = {
    ("metrics.jsonl", "empty"),
    ("samples.jsonl", "empty"),
    ("config.yaml", "of another shape"),  # a config of settings that nobody knows
    ("environment.json", "of another shape"),
}


def test_a_whole_folder_lacks_nothing(make_run: Any) -> None:
    run = read_run(make_run())
    assert run.notes == [] and run.state == "finished"
    assert "Not measured" not in render(read([run.folder]))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_named(make_run: Any, name: str) -> None:
    folder = make_run()
    (folder / name).unlink()
    assert read_run(folder).notes == [f"{name}: not there"]
    page = render(read([folder]))
    assert f"{name}: not there" in page
    numbers(read([folder]).runs)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_damaged_is_named(make_run: Any, name: str) -> None:
    folder = make_run()
    for damage, content in DAMAGED.items():
        (folder / name).write_bytes(content)
        run = read_run(folder)
        if (name, damage) in FINE:
            assert run.notes == [], damage
        else:
            (note,) = run.notes  # the other files are read
            assert note.startswith(f"{name}: "), damage
        numbers([run])
    (folder / name).write_bytes(DAMAGED["of another shape"])
    assert render(read([folder])).count("</section>") == 7


def test_nothing_but_what_one_is_known_by(make_run: Any) -> None:
    folder = make_run()
    for name in FILES:
        if name != "config.yaml":
            (folder / name).unlink()
    page = render(read([folder]))
    for what in ("perplexity and ROUGE", "losses", "ranks and residuals", "summaries"):
        assert f"<strong>Not measured:</strong> {what}" in page


def test_a_run_that_goes_on_says_where_it_is(make_run: Any) -> None:
    folder = make_run(steps=50)
    for name in ("evaluation.json", "attention.json", "samples.jsonl"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:20]) + '\n{"stage": "dis')
    (folder / "stages.json").write_text(
        json.dumps({"sft": {"key": {}, "done": True}, "distil": {"key": {}, "done": False}})
    )
    run = read_run(folder)
    assert run.state == "in distil, step 17 of 50: still going on, or stopped there"
    assert "metrics.jsonl: 1 of its lines cannot be read" in run.notes
    page = render(read([folder]))
    assert "17 of 50" in page and "no run has come to its evaluation" in page


def test_numbers_that_are_none_are_shown_and_become_null(make_run: Any) -> None:
    folder = make_run()
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["models"]["student"]["perplexity"]["value"] = float("nan")
    evaluation["models"]["factorized"]["perplexity"]["value"] = float("inf")
    evaluation["stages"]["svd"] = float("inf")
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[5]["loss"] = float("nan")
    lines[6] |= {"loss": float("inf"), "gradient_norm": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    subject = read([folder])
    found = numbers(subject.runs)
    json.dumps(found, allow_nan=False)
    models = found["runs"][0]["models"]
    assert models["student"]["perplexity"] is None and models["factorized"]["perplexity"] is None
    page = render(subject)
    assert "<td>nan</td>" in page and "<td>NaN" not in page


@pytest.mark.parametrize(
    "absurd", [10**400, -(10**400), 1e308], ids=["large", "negative", "a float"]
)
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("evaluation.json", '"total": 110000'),
        ("factorization.json", '"rank": 4'),
        ("attention.json", '"tokens": 6000'),
        ("metrics.jsonl", '"step": 12'),
        ("metrics.jsonl", '"tokens": 1901'),
    ],
)
def test_a_number_that_no_sum_can_take_is_damage(
    make_run: Any, name: str, number: str, absurd: float
) -> None:
    path = make_run() / name
    path.write_text(path.read_text().replace(number, f"{number.split(':')[0]}: {absurd}"))
    run = read_run(path.parent)
    (note,) = run.notes
    lines = "of its lines cannot be read"
    said = "has a number of 401 digits" if isinstance(absurd, int) else "has the number 1e+308"
    assert note.startswith(f"{name}: ") and (lines if name == "metrics.jsonl" else said) in note
    json.dumps(numbers([run]), allow_nan=False)
    assert note in render(read([path.parent]))


def test_a_matrix_of_no_size_is_damage(make_run: Any) -> None:
    path = make_run() / "factorization.json"
    path.write_text(path.read_text().replace('"rows": 16', '"rows": 0'))
    (note,) = read_run(path.parent).notes
    assert note.startswith("factorization.json: not as this version writes it (matrices.1.rows: ")


def test_an_interval_without_an_end_is_damage(make_comparison: Any) -> None:
    path = make_comparison() / "comparison.json"
    found = json.loads(path.read_text())
    found["groups"][0]["rougeLsum"]["high"] = float("inf")
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"comparison\.json: .* \(groups\.0\.rougeLsum\.high: "):
        read_comparison(path.parent)


def test_attention_that_was_not_measured_says_why(make_run: Any) -> None:
    folder = make_run()
    found = json.loads((folder / "attention.json").read_text())
    (folder / "attention.json").write_text(
        json.dumps({**found, "models": {}, "layers": [], "not_measured": "heads differ"})
    )
    assert "attention&#39;s divergence (heads differ)" in render(read([folder]))


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "none")


def test_a_comparison_gives_the_runs_that_are_there(make_comparison: Any) -> None:
    folder = make_comparison()
    comparison, runs = read_comparison(folder)
    assert [run.name for run in runs] == [
        "kd, keep 0.5, seed 0",
        "kd, keep 0.5, seed 1",
        "makd, keep 0.5, seed 0",
        "makd, keep 0.5, seed 1",
    ]
    assert len(comparison.rows) == 8
    waiting = {"rows": [row.model_dump() | {"run": None} for row in comparison.rows]}
    (folder / "comparison.json").write_text(json.dumps(waiting))
    assert "Not measured" in render(read([folder])), "a comparison that has only begun"
    (folder / "comparison.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_comparison(folder)
