"""What a row takes over: the same files, where the keys are those that the shared run has."""

from pathlib import Path

import pytest

from makd_llm.comparison.sharing import link, same_cut, take_over
from makd_llm.files import write_whole
from makd_llm.stages import Stages


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    (folder / "factorized").mkdir(parents=True)
    (folder / "measured").mkdir()
    (folder / "factorized" / "model.safetensors").write_text("weights")
    (folder / "factorization.json").write_text("{}")
    (folder / "measured" / "teacher.json").write_text("{}")
    Stages(folder).mark("factorize", {"keep": 0.5}, done=True)
    return folder


def test_files_are_linked_and_the_stage_stands(shared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    take_over(shared, run)
    for file in ("factorized/model.safetensors", "factorization.json", "measured/teacher.json"):
        assert (run / file).samefile(shared / file)
    assert Stages(run).stands("factorize", {"keep": 0.5}) and same_cut(shared, run)
    write_whole(run / "factorization.json", "other")  # as a run writes
    assert (shared / "factorization.json").read_text() == "{}"


def test_another_cut_is_replaced_and_the_same_is_left_alone(shared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "factorized").mkdir(parents=True)
    (run / "factorized" / "old.safetensors").touch()
    Stages(run).mark("factorize", {"keep": 0.3}, done=True)
    assert not same_cut(shared, run)
    take_over(shared, run)
    assert [path.name for path in (run / "factorized").iterdir()] == ["model.safetensors"]
    (run / "factorized" / "README.md").touch()
    take_over(shared, run)
    assert (run / "factorized" / "README.md").exists()


def test_a_cut_that_is_not_finished_is_not_taken(shared: Path, tmp_path: Path) -> None:
    Stages(shared).mark("factorize", {"keep": 0.5}, done=False)
    take_over(shared, tmp_path / "run")
    assert not (tmp_path / "run" / "factorized").exists()


def test_where_there_are_no_hard_links_it_is_a_copy(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: object, target: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refused)
    link(shared / "factorized", tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_text() == "weights"
