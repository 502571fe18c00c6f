"""Which rows and runs a comparison has, and what it refuses."""

from pathlib import Path

import pytest

from makd_llm.comparison.grid import Grid, build_grid
from makd_llm.config import load_comparison
from makd_llm.config.objectives import ObjectiveConfig
from makd_llm.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((CHECKOUT / "configs" / "compare").glob("*.yaml"))
BASE = """
name: small
folder: runs/small
keep_ratios: [0.5, 0.3]
seeds: [0, 1]
against: [kd]
run:
  sft: {enabled: true}
  distil: {train: {steps: 7}}
rows:
  lead-3: {baseline: lead}
  teacher: {baseline: teacher}
  factorized: {baseline: factorized}
  kd: {distil: {preset: kd}}
  late: {label: late layers, distil: {objectives: [{objective: hidden, layers: [last]}]}}
"""


def grid_of(tmp_path: Path, text: str = BASE, *overrides: str) -> Grid:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return build_grid(load_comparison(path, list(overrides)))


def test_rows_and_what_they_need(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    assert [row.words for row in grid.rows] == [
        *("lead-3", "teacher", "factorized-keep0.5", "factorized-keep0.3"),
        *(f"{n}-keep{k}-seed{s}" for n in ("kd", "late") for k in (0.5, 0.3) for s in (0, 1)),
    ]
    kd = grid.rows[4].item
    assert kd is not None and kd.config.run_dir == Path("runs/small/rows/kd-keep0.5-seed0")
    assert kd.config.teacher.model == "runs/small/shared/teacher/teacher"
    assert not kd.config.sft.enabled and kd.config.student.keep_ratio == 0.5
    assert set(kd.config.distil.of(ObjectiveConfig)) == {"cross_entropy", "logits"}
    assert [item.place for item in grid.needed()[:4]] == [
        *("shared/teacher", "shared/keep0.5", "shared/keep0.3", "rows/kd-keep0.5-seed0"),
    ]
    seeds = [item.config.seed for item in grid.runs]
    assert seeds == sorted(seeds), "one seed is whole before the next begins"
    data = [(i.config.data, i.config.distil.train) for i in grid.runs]
    assert data.count(data[0]) == len(data)


def test_a_part_needs_no_more_than_its_own(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    part = grid.chosen(["kd", "teacher"], [0.3], [1])
    assert [item.place for item in part.needed()] == [
        *("shared/teacher", "shared/keep0.3", "rows/kd-keep0.3-seed1"),
    ]
    assert [i.place for i in grid.chosen(["lead-3"], None, None).needed()] == [
        *("shared/teacher", "shared/keep0.5"),
    ]
    untuned = grid_of(tmp_path, BASE, "sft.enabled=false").chosen(["kd"], [0.5], [0])
    assert [item.place for item in untuned.needed()] == ["shared/keep0.5", "rows/kd-keep0.5-seed0"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("preset: kd}", "preset: kdd}", "rows.kd: distil.preset: there is no preset 'kdd'"),
        ("steps: 7}", "steps: 7}, preset: kd", "run.distil.preset: rows differ in it"),
        ("sft: {", "run_dir: x\n  sft: {", "a comparison has `folder`"),
        ("sft: {", "student: {keep_ratio: 0.5}\n  sft: {", "a comparison has `keep_ratios`"),
        ("sft: {", "student: fisher\n  sft: {", "run: student: input should be a valid dictionary"),
        ("{train: {steps: 7}}", "fisher", "run: distil: input should be a valid dictionary"),
        ("preset: kd}", "preset: kd, train: {steps: 8}}", "a comparison is at equal tokens"),
        ("preset: kd}", "preset: kd, train: {batch_size: 4}}", "a comparison is at equal tokens"),
        ("steps: 7", "steps: 7, log_every: 2", "so it has to be 1"),
        ("lead-3:", "lead-2:", "rows.lead-2: run.evaluation.lead_k is 3; call the row lead-3"),
        ("against: [kd]", "against: [kdd]", "there is no row kdd that learns"),
        ("against: [kd]", "against: [teacher]", "there is no row teacher that learns"),
        ("[0, 1]", "[0, 0]", "seeds: 0 stands there twice"),
        ("  kd:", "  a/b:", "rows.a/b: folders are named after it"),
        ("{baseline: teacher}", "{}", "rows.teacher: a row has either baseline or distil"),
        ("seeds:", "sedes:", "unknown key sedes; did you mean seeds?"),
        ("sft: {enabled", "sft: {enabeld", "run: unknown key sft.enabeld"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in BASE
    with pytest.raises(UserError) as error:
        grid_of(tmp_path, BASE.replace(old, new))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("found", ["[]", "[1]", "3", "fisher"])
@pytest.mark.parametrize("overrides", [[], ["seed=1"]])
def test_a_run_that_is_no_section_is_refused(
    tmp_path: Path, found: str, overrides: list[str]
) -> None:
    run = BASE[BASE.index("run:") : BASE.index("rows:")]
    with pytest.raises(UserError, match=r"small\.yaml: run: expected keys and values, found"):
        grid_of(tmp_path, BASE.replace(run, f"run: {found}\n"), *overrides)


def test_an_override_that_is_no_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run: student: input should be a valid dictionary"):
        grid_of(tmp_path, BASE, "student=fisher")


@pytest.mark.parametrize(
    ("rows", "keep", "seeds", "words"),
    [
        (["kdd"], None, None, "--rows kdd: the comparison has lead-3, teacher, factorized, kd"),
        (None, [0.4], None, "--keep 0.4: the comparison has 0.5, 0.3"),
        (None, None, [2], "--seeds 2: the comparison has 0, 1"),
    ],
)
def test_a_part_that_is_not_there_is_refused(
    tmp_path: Path,
    rows: list[str] | None,
    keep: list[float] | None,
    seeds: list[int] | None,
    words: str,
) -> None:
    with pytest.raises(UserError) as error:
        grid_of(tmp_path).chosen(rows, keep, seeds)
    assert words in str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_comparisons_that_are_shipped(path: Path) -> None:
    grid = build_grid(load_comparison(path, []))
    assert grid.runs and grid.config.ds.name in {
        p.name for p in (CHECKOUT / "ds_configs").iterdir()
    }
    learnt = {row.name: row.item.config.distil for row in grid.rows if row.item is not None}
    assert {"kd", "tinybert", "makd", "finetune"} <= learnt.keys()
    if path.stem != "dialogsum":
        return
    only = {
        "makd-matrix": {"matrix"},
        "makd-layer": {"attention", "hidden"},
        "makd-model": {"logits"},
    }
    for name, objectives in only.items():
        assert set(learnt[name].of(ObjectiveConfig)) == objectives
    layers = {
        name: {
            n: o.layers for n, o in learnt[name].of(ObjectiveConfig).items() if hasattr(o, "layers")
        }
        for name in ("makd", "makd-reverse", "makd-flat")
    }
    assert layers["makd"] == {"matrix": "shallow", "attention": "deep", "hidden": "deep"}
    assert layers["makd-reverse"] == {"matrix": "deep", "attention": "shallow", "hidden": "shallow"}
    assert layers["makd-flat"] == dict.fromkeys(("matrix", "attention", "hidden"), "all")
