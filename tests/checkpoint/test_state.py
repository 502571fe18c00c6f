"""Checkpoints: whole or not there, newest first, and never silently a damaged one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from makd_llm.checkpoint.state import Checkpoints
from makd_llm.errors import UserError


class Engine:
    """Saves one tensor where DeepSpeed would save its files."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = torch.tensor(value)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest, "the pointer is ours to move"
        torch.save(self.value, Path(folder) / tag / "weights.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        self.value = torch.load(Path(folder) / tag / "weights.pt")
        return tag, {}


class Case:
    """A folder of checkpoints of steps 1 to 3, whose weights are their steps."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.said: list[str] = []
        self.folder = folder
        self.checkpoints = Checkpoints(folder, keep=keep, tell=self.said.append)
        for step in (1, 2, 3):
            self.checkpoints.save(Engine(float(step)), step, {"step": step})  # type: ignore[arg-type]

    def loaded(self) -> tuple[float, Any]:
        engine = Engine(-1.0)
        state = self.checkpoints.load(engine)  # type: ignore[arg-type]
        return engine.value.item(), state


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "checkpoints")


def step_folder(case: Case, step: int) -> Path:
    return case.folder / f"step-{step:08d}"


def test_the_newest_is_loaded_with_its_state_and_random_numbers(case: Case) -> None:
    torch.manual_seed(5)
    case.checkpoints.save(Engine(4.0), 4, {"step": 4})  # type: ignore[arg-type]
    expected = torch.rand(3)
    torch.manual_seed(99)
    assert case.loaded() == (4.0, {"step": 4})
    assert torch.equal(torch.rand(3), expected)
    assert (case.folder / "latest").read_text() == step_folder(case, 4).name


def test_an_empty_folder_gives_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=1, tell=print).load(Engine()) is None  # type: ignore[arg-type]


def test_only_the_newest_few_are_kept(tmp_path: Path) -> None:
    case = Case(tmp_path / "few", keep=2)
    assert sorted(p.name for p in case.folder.glob("step-*")) == [
        step_folder(case, s).name for s in (2, 3)
    ]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: (f / "weights.pt").write_bytes((f / "weights.pt").read_bytes()[:-7]),
            "weights.pt is truncated",
        ),
        (lambda f: (f / "weights.pt").unlink(), "weights.pt is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest is missing"),
        (lambda f: _flip(f / "weights.pt"), "SHA-256 differs"),
    ],
)
def test_a_damaged_one_is_reported_and_the_one_before_it_is_used(
    case: Case, damage: Any, words: str
) -> None:
    damage(step_folder(case, 3))
    assert case.loaded() == (2.0, {"step": 2})
    assert (
        len(case.said) == 1 and words in case.said[0] and str(step_folder(case, 3)) in case.said[0]
    )


def test_a_missing_newest_is_reported_too(case: Case) -> None:
    import shutil

    shutil.rmtree(step_folder(case, 3))
    assert case.loaded()[0] == 2.0
    assert "missing" in case.said[0]


def test_when_all_are_damaged_it_says_that_the_stage_starts_anew(case: Case) -> None:
    for step in (1, 2, 3):
        (step_folder(case, step) / "weights.pt").unlink()
    assert case.loaded() == (-1.0, None)
    assert "no sound one is left" in case.said[-1]


def test_a_newer_leftover_never_pushes_out_what_was_just_written(tmp_path: Path) -> None:
    case = Case(tmp_path / "leftover", keep=1)
    (case.folder / "latest").write_text(step_folder(case, 2).name)  # killed before it moved to 3
    case.checkpoints.save(Engine(2.5), 2, {"step": 2})  # type: ignore[arg-type]
    assert case.loaded() == (2.5, {"step": 2})


def test_an_unfinished_one_is_not_looked_at(case: Case) -> None:
    unfinished = case.folder / "step-00000004.writing"
    unfinished.mkdir()
    (unfinished / "weights.pt").write_text("half")
    assert case.loaded()[0] == 3.0
    assert not unfinished.exists()


def test_another_number_of_ranks_is_refused_with_advice(case: Case) -> None:
    folder = step_folder(case, 3)
    (folder / "rank-1.pt").write_bytes((folder / "rank-0.pt").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["rank-1.pt"] = manifest["rank-0.pt"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="written by 2 ranks, this run has 1"):
        case.loaded()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
