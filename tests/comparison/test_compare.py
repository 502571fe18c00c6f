"""`makd compare` as a person runs it, on a tiny teacher: every row; killed in the midst."""

import csv
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from makd_llm.cli import main
from makd_llm.evaluation import rouge
from makd_llm.testing import environment_alone

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RUNS = (
    *("finetune", "kd", "tinybert", "makd-matrix", "makd-layer", "makd-model", "makd"),
    *("makd-reverse", "makd-flat", "feature_alignment", "adkd", "makd_attribution"),
)


@pytest.fixture(scope="module")
def made(config: Path) -> Path:
    """The comparison's folder with all rows of seed 0, each made as an array task makes it."""
    main(["compare", str(config), "--prepare"])
    for name in RUNS:
        main(["compare", str(config), "--row", f"{name}-keep0.5-seed0"])
    return config.parent / "made"


def comparison(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    return found


def row_of(found: dict[str, Any], name: str, seed: int | None = 0) -> dict[str, Any]:
    return next(r for r in found["rows"] if r["name"] == name and r["seed"] in (seed, None))


def test_every_row_is_made_and_told(
    made: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", str(config), "--collect"])
    printed = capsys.readouterr().out
    found = comparison(made)
    assert {r["name"] for r in found["rows"] if r["state"] == "done"} == {
        *("lead-3", "teacher", "factorized"),
        *RUNS,
    }
    assert f"tiny: keep ratio 0.5 ({len(RUNS)} rows not made yet)" in printed  # of seed 1
    for name in RUNS:
        row = row_of(found, name)
        evaluation = json.loads((made / row["run"] / "evaluation.json").read_text())
        student = evaluation["models"]["student"]
        assert row["perplexity"] == student["perplexity"]["value"]
        assert row["rougeLsum"]["value"] == pytest.approx(student["rouge"]["rougeLsum"])
        assert row["parameters"] == student["parameters"]["total"]
        steps = [json.loads(line) for line in (made / row["run"] / "metrics.jsonl").open()]
        assert [step["stage"] for step in steps] == ["distil"] * 2
        assert row["tokens"] == sum(step["tokens"] for step in steps)
        assert row["seconds"] == pytest.approx(sum(step["seconds"] for step in steps))
        assert row["peak_memory_MB"] == max(step["peak_memory_MB"] for step in steps)
        assert not (made / row["run"] / "checkpoints").exists()
    assert len({r["tokens"] for r in found["rows"] if r["tokens"]}) == 1
    assert found["equal_tokens"]["equal"] is True
    assert row_of(found, "kd")["against"].keys() == {"tinybert"}
    assert row_of(found, "makd")["against"].keys() == {"kd", "tinybert"}
    assert f"perplexity {row_of(found, 'makd')['perplexity']:.2f}" in found["analysis"]
    assert len((made / "comparison.csv").read_text().splitlines()) == 1 + 2 * len(RUNS) + 3 + 15
    assert found["analysis"] in (made / "comparison.md").read_text()


def test_the_readme_makes_the_same_table_of_the_csv(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with (made / "comparison.csv").open(newline="") as file:
        said = importlib.import_module("readme").comparison(list(csv.DictReader(file)))
    (table,) = said.split("\n\n")[1:]
    assert len(table.splitlines()) == 2 + 3 + len(RUNS)
    assert f"\n\n{table}\n\n" in (made / "comparison.md").read_text()


def test_what_rows_share_is_made_once(made: Path) -> None:
    shared = made / "shared" / "keep0.5"
    for name in RUNS:
        row = made / "rows" / f"{name}-keep0.5-seed0"
        for file in ("factorized/model.safetensors", "factorization.json", "measured/teacher.json"):
            assert (row / file).samefile(shared / file), file
        said = [line for line in (row / "evaluation.json").read_text().splitlines() if line]
        assert said and not (row / "teacher").exists()
    assert (made / "shared/teacher/teacher/model.safetensors").is_file()


def test_scores_are_those_of_the_samples(made: Path) -> None:
    """What is tested is what the students wrote, document by document."""
    row = made / "rows" / "kd-keep0.5-seed0"
    samples = [json.loads(line) for line in (row / "samples.jsonl").open()]
    scored = rouge.score([s["student"] for s in samples], [s["references"] for s in samples])
    kept = json.loads((row / "measured" / "student.json").read_text())
    nats = kept["scores"].pop("nats")
    assert kept["scores"] == {metric: list(values) for metric, values in scored.pairs.items()}
    perplexity = kept["row"]["perplexity"]
    assert len(nats) == 8 and sum(nats) == pytest.approx(perplexity["nats"])
    others = json.loads((made / "rows/makd-keep0.5-seed0/measured/student.json").read_text())
    difference = (sum(others["scores"]["nats"]) - sum(nats)) / perplexity["tokens"]
    tested = row_of(comparison(made), "makd")["against"]["kd"]["nats_per_token"]
    assert tested["difference"] == pytest.approx(difference)


def test_what_stands_is_not_made_again_and_a_changed_setting_is(
    made: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", str(config), "--row", "kd-keep0.5-seed0"])
    assert "rows/kd-keep0.5-seed0: stands" in capsys.readouterr().out
    main(["compare", str(config), "--dry-run", "--rows", "kd", "distil.train.steps=3"])
    printed = capsys.readouterr().out
    assert "kd-keep0.5-seed0" in printed and "waiting" in printed and "done" not in printed


def test_a_row_over_its_seeds_and_one_that_fails(
    made: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", str(config), "--row", "kd-keep0.5-seed1"])
    blocked = made / "rows/finetune-keep0.5-seed1"
    blocked.mkdir(parents=True)
    (blocked / "student").write_text("no folder of a model")
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(config), "--row", "finetune-keep0.5-seed1"])
    assert ended.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(config), "--collect", "--json"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found == comparison(made)
    assert "1 of 27 rows failed, first finetune-keep0.5-seed1: " in printed.err
    failed = row_of(found, "finetune", 1)
    assert failed["state"] == "failed" and str(blocked / "student") in failed["error"]
    group = next(g for g in found["groups"] if g["name"] == "kd")
    each = [row_of(found, "kd", seed)["perplexity"] for seed in (0, 1)]
    assert group["seeds"] == [0, 1] and group["perplexity"] == pytest.approx(sum(each) / 2)
    assert group["spread"]["perplexity"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    makd = next(g for g in found["groups"] if g["name"] == "makd")
    assert makd["seeds"] == [0] and makd["against"].keys() == {"tinybert"}, "kd has two seeds"
    assert row_of(found, "makd", 0)["against"].keys() == {"kd", "tinybert"}
    assert row_of(found, "kd", 1)["against"] == {} == group["against"]
    shutil.rmtree(blocked)


def test_the_report_says_what_the_table_says(
    made: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`makd report` of what `makd compare` has written: two seeds of kd, one of the others, and
    rows that wait.
    """
    main(["compare", str(config), "--row", "kd-keep0.5-seed1"])
    main(["compare", str(config), "--collect"])
    found = comparison(made)
    capsys.readouterr()
    main(["report", str(made), "--json"])
    read = json.loads(capsys.readouterr().out)
    for kind in ("rows", "groups"):
        for own, theirs in zip(read["comparison"][kind], found[kind], strict=True):
            shared = own.keys() & theirs.keys() - {"against"}
            assert len(shared) >= 15
            assert {key: own[key] for key in shared} == {key: theirs[key] for key in shared}
            for name, tests in theirs["against"].items():
                for metric, test in tests.items():
                    assert own["against"][name][metric].items() <= test.items()
    assert [run["state"] for run in read["runs"]] == ["finished"] * (len(RUNS) + 1)

    main(["report", str(made)])
    html = (made / "report.html").read_text()
    head, *lines = table_of(html, "The rows of the comparison")
    groups = [g for g in found["groups"] if g["seeds"] or g["state"] == "done"]
    assert [line[0][0] for line in lines] == [group["label"] for group in groups]
    assert [column for column, *_ in head[-2:]] == ["above kd", "above layer-wise"]
    for group, line in zip(groups, lines, strict=True):
        assert line == [[group["label"], *line[0][1:]], *cells_of(group)]
    (kd,) = (line for line in lines if line[0][0] == "kd")
    assert kd[0] == ["kd", "mean of 2 seeds"] and any("±" in text for text in kd[6])
    (makd,) = (line for line in lines if line[0][0] == "makd")
    assert makd[0] == ["makd", "seed 0", "more seeds waiting"]
    assert len(table_of(html, "Every seed by itself")) == 1 + len(found["rows"])
    for paragraph in found["analysis"].split("\n\n"):
        assert paragraph in unescape(html)


def test_what_was_lost_of_a_row_is_made_again_and_no_more(
    made: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "makd-model-keep0.5-seed0"
    row, own = made / "rows" / name, ["compare", str(config), "--row", name]
    timed = {"seconds", "tokens_per_second", "peak_memory_MB"}

    def steps() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (row / "metrics.jsonl").open()]
        return [{k: v for k, v in line.items() if k not in timed} for line in lines]

    before, learnt = json.loads((row / "measured" / "student.json").read_text()), steps()
    (row / "measured" / "student.json").write_text("{")
    main(own)
    said = capsys.readouterr().out
    assert f"rows/{name}/measured/student.json: not there, or damaged; it is made again" in said
    assert "distil: stands" in said and "evaluate: teacher stands in" in said
    assert json.loads((row / "measured" / "student.json").read_text()) == before

    # What the steps took is known to that file alone, so it is the student that learns again.
    (row / "metrics.jsonl").write_bytes((row / "metrics.jsonl").read_bytes()[:-9] + b"\xff")
    main(own)
    said = capsys.readouterr().out
    assert f"rows/{name}/metrics.jsonl: damaged; it is made again" in said
    assert "factorize: stands" in said and "evaluate: student stands in" in said
    assert steps() == learnt
    main(own)
    assert f"rows/{name}: stands" in capsys.readouterr().out

    (made / "shared/keep0.5/measured/teacher.json").unlink()
    main(["compare", str(config), "--prepare"])
    said = capsys.readouterr().out
    assert "shared/keep0.5/measured/teacher.json: not there, or damaged; it is made again" in said
    assert "evaluate: factorized stands in" in said
    main(own)
    assert f"rows/{name}: stands" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_killed_and_resumed(made: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL to the command while a row learns: its processes save and end, and the same command
    goes on from there.
    """
    row = made / "rows/kd-keep0.5-seed1"
    command = ["compare", str(config), "--rows", "kd", "--seeds", "1", "distil.train.steps=30"]
    process = subprocess.Popen(
        [sys.executable, "-m", "makd_llm.cli", *command],
        env=environment_alone() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(process, row / "metrics.jsonl", '"step": 4,')
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    main(command)
    assert "rows/kd-keep0.5-seed1: done in" in capsys.readouterr().err
    assert "distil: resumed at step" in (row / "output.log").read_text()
    steps = [json.loads(line)["step"] for line in (row / "metrics.jsonl").open()]
    assert steps == list(range(1, 31))
    found = row_of(comparison(made), "kd", 1)
    assert found["state"] == "done" and found["tokens"] > 0


def _wait_for(process: subprocess.Popen[bytes], path: Path, text: str) -> None:
    deadline = time.monotonic() + 200
    while not (path.is_file() and text in path.read_text()):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, f"{path} does not come to {text}"
        time.sleep(0.02)


def cells_of(group: dict[str, Any]) -> list[list[str]]:
    """What the page has to show of a group, beside its label: for each column its lines."""

    def say(form: str, value: float | None) -> list[str]:
        return [] if value is None else [form.format(value)]

    def spread(name: str) -> list[str]:
        return say("± {:,.2f}", group["spread"][name])

    millions = None if group["parameters"] is None else group["parameters"] / 1e6
    cells = [
        say("{:g}", group["keep_ratio"]),
        say("{:,.2f} M", millions),
        *(say("{:,.0f}", group[name]) for name in ("tokens", "seconds", "peak_memory_MB")),
        say("{:,.2f}", group["perplexity"]) + spread("perplexity"),
    ]
    for metric in ("rouge1", "rouge2", "rougeLsum"):
        value = group[metric]
        interval = f"{value['low']:.2f}–{value['high']:.2f}"
        cells.append([f"{value['value']:.2f}", interval, *spread(metric)])
    cells.append(say("{:.1%}", group["share_of_teacher"]["rougeLsum"]))
    for name in ("kd", "tinybert"):
        if name not in group["against"]:
            cells.append([])
            continue
        test, nats = (group["against"][name][metric] for metric in ("rougeLsum", "nats_per_token"))
        p, p_of_nats = (
            "p <.001" if found["p"] < 0.001 else f"p {found['p']:.3f}" for found in (test, nats)
        )
        interval = f"{test['low']:+.2f} to {test['high']:+.2f}"
        per_token = f"{nats['difference']:+.3f} nats, {p_of_nats}"
        cells.append([f"{test['difference']:+.2f}", interval, p, per_token])
    return cells


def table_of(html: str, name: str) -> list[list[list[str]]]:
    """A table of a page: its rows, each cell as the lines of text that it shows."""
    (table,) = re.findall(rf'<table aria-label="{name}".*?</table>', html, re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[[unescape(t) for t in re.findall(r"[^<>]+(?=<|$)", c)] for c in row] for row in cells]
