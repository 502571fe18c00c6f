"""Runs one after another in processes of their own: what fails, what waits, how long it takes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from makd_llm.comparison.eta import Clock, in_words
from makd_llm.comparison.grid import Grid, Item, build_grid
from makd_llm.comparison.launching import LOG, launcher, make
from makd_llm.comparison.record import Record, Stamps, read_record, write_record
from makd_llm.comparison.results import results
from makd_llm.config import load_comparison


def stand_in(grid: Grid, item: Item, ending: str) -> list[str]:
    """A command that leaves the record of a finished run, unless it ends otherwise before."""
    record = {"state": "done", "stamp": Stamps(grid).of(item), "seconds": 60.0}
    path = grid.folder / item.place / "row.json"
    code = (
        f"import os, signal, sys\n{ending}\nopen({str(path)!r}, 'w').write({json.dumps(record)!r})"
    )
    return [sys.executable, "-c", code]


def test_a_run_that_fails_does_not_stop_the_others(grid: Grid, leave: Callable[..., None]) -> None:
    said: list[str] = []
    endings = {
        "rows/kd-keep0.5-seed0": "print('makd: the disk is full; token=abcdef', file=sys.stderr)\n"
        "sys.exit(2)"
    }
    items = grid.needed()
    failed = make(grid, items, lambda i: stand_in(grid, i, endings.get(i.place, "")), said.append)
    assert list(failed) == ["rows/kd-keep0.5-seed0"]
    assert read_record(grid.folder / "rows/kd-keep0.5-seed0") == Record(
        "failed", Stamps(grid).of(items[2]), "exit code 2: the disk is full; token=***"
    )
    assert "token" in (grid.folder / "rows/kd-keep0.5-seed0" / LOG).read_text()
    assert [line for line in said if "done in 60 s" in line][-1].startswith("[4/4] rows/makd")
    assert any("FAILED: exit code 2" in line for line in said)
    states = {row["name"]: row["state"] for row in results(grid)["rows"]}
    # It says that it is done, but nothing was measured.
    assert states == {"kd": "failed", "makd": "failed"}
    for item in items[:2]:
        leave(grid, item)
    said.clear()
    make(grid, items, lambda i: stand_in(grid, i, ""), said.append)
    stand = [line.split()[1] for line in said if line.endswith(": stands")]
    assert stand == ["shared/teacher:", "shared/keep0.5:"], "what failed is tried again"


def test_the_last_words_are_those_of_the_last_attempt(grid: Grid) -> None:
    item = grid.needed()[0]
    told: list[dict[str, str]] = []
    for ending in (
        "print('makd: no memory left')\nsys.exit(71)",
        "os.kill(os.getpid(), signal.SIGKILL)",
    ):
        told.append(make(grid, [item], lambda i, e=ending: stand_in(grid, i, e), lambda _: None))
    assert [list(errors.values()) for errors in told] == [
        ["exit code 71: no memory left"],
        ["killed by SIGKILL: no word"],
    ]
    record = read_record(grid.folder / item.place)
    assert record is not None and record.error == "killed by SIGKILL: no word"


def test_a_failure_without_words_says_that_it_left_none(grid: Grid) -> None:
    item, said = grid.needed()[0], list[str]()
    failed = {"state": "failed", "stamp": Stamps(grid).of(item)}
    path = grid.folder / item.place / "row.json"
    ending = f"open({str(path)!r}, 'w').write({json.dumps(failed)!r})\nsys.exit(1)"
    errors = make(grid, [item], lambda i: stand_in(grid, i, ending), said.append)
    assert errors == {item.place: "it left no word of why"}
    assert "FAILED: it left no word of why (all it said: " in said[-1]


def test_what_needs_a_run_that_failed_is_failed_too(grid: Grid) -> None:
    said: list[str] = []
    killed = {"shared/keep0.5": "os.kill(os.getpid(), signal.SIGKILL)"}
    failed = make(
        grid, grid.needed(), lambda i: stand_in(grid, i, killed.get(i.place, "")), said.append
    )
    assert failed == {
        "shared/keep0.5": "killed by SIGKILL: no word",
        **{
            f"rows/{name}-keep0.5-seed0": "shared/keep0.5 failed, which it needs"
            for name in ("kd", "makd")
        },
    }
    assert results(grid)["rows"][0]["error"] == "shared/keep0.5 failed, which it needs"


def test_a_result_under_another_setting_does_not_stand(grid: Grid, config: Path) -> None:
    item = grid.needed()[0]
    folder = grid.folder / item.place
    write_record(folder, Record("done", Stamps(grid).of(item), seconds=1.0))
    assert Stamps(grid).stands(item)
    for change, stands in (("sft.train.steps=2", False), ("distil.train.steps=9", True)):
        other = load_comparison(config, [change]).model_copy(update={"folder": grid.folder})
        changed = build_grid(other)
        assert Stamps(changed).stands(changed.shared["shared/teacher"]) is stands
    (folder / "row.json").write_text("{")
    assert read_record(folder) is None and not Stamps(grid).stands(item)


def test_the_time_that_is_left_is_known_from_what_was_measured(grid: Grid) -> None:
    teacher, student, kd, makd = grid.needed()
    clock = Clock(grid)
    assert clock.left([kd, makd]) is None
    clock.finished(kd, 100.0)
    assert clock.left([kd, makd]) == 200.0
    assert clock.left([kd, makd], elapsed=30.0) == 170.0
    assert clock.left([makd], elapsed=500.0) == 0.0
    assert clock.left([student, makd]) is None, "a row's time says nothing of what rows share"
    clock.finished(makd, 140.0)
    assert clock.left([kd, makd]) == 240.0
    write_record(grid.folder / teacher.place, Record("done", Stamps(grid).of(teacher), seconds=9.0))
    assert Clock(grid).left([teacher]) == 9.0
    assert [in_words(s) for s in (40, 89, 90, 3600, 11_100)] == [
        *("40 s", "89 s", "2 min", "60 min", "3 h 05 min"),
    ]


def test_several_ranks_go_through_torchrun() -> None:
    assert launcher(1, ["compare"]) == [sys.executable, "-m", "makd_llm.cli", "compare"]
    several = launcher(4, ["compare", "--row", "x"])
    assert several[several.index("--nproc-per-node") + 1] == "4"
    assert several[-5:] == ["-m", "makd_llm.cli", "compare", "--row", "x"]
