"""Checkpoints: whole or not there, newest first, and never silently a damaged one."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from makd_llm.checkpoint import state
from makd_llm.checkpoint.state import Checkpoints
from makd_llm.errors import UserError
from makd_llm.files import sha256_of


class Engine:
    """Saves one tensor where DeepSpeed would save its files."""

    checkpoint_engine: Any = None

    def __init__(self, value: float = 0.0) -> None:
        self.value = torch.tensor(value)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest, "the pointer is ours to move"
        torch.save(self.value, Path(folder) / tag / "weights.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        # As DeepSpeed does it.
        self.value = torch.load(Path(folder) / tag / "weights.pt", weights_only=False)
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
        saved = self.checkpoints.load(engine)  # type: ignore[arg-type]
        return engine.value.item(), saved and saved.state


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
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest does not name 'about.json'"),
        (lambda f: (f / "more.pt").write_text("x"), "manifest does not name 'more.pt'"),
        (lambda f: (f / "rank-0.pt").rename(f / "rank-1.pt") and sign(f), "not name 'rank-0.pt'"),
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


def test_another_number_of_ranks_goes_on_with_what_all_of_them_had(tmp_path: Path) -> None:
    """The state that all share is taken over, shares are added up, and random numbers are drawn
    anew, the same whenever it is tried again.
    """
    checkpoints = Checkpoints(tmp_path / "c", keep=1, tell=(said := []).append)
    checkpoints.save(Engine(3.0), 3, {"step": 3}, {"logits": 0.5})  # type: ignore[arg-type]
    folder = tmp_path / "c" / "step-00000003"
    other = torch.load(folder / "rank-0.pt", weights_only=True)
    torch.save({**other, "shares": {"logits": 0.25}}, folder / "rank-1.pt")
    sign(folder)
    drawn = []
    for _ in range(2):
        torch.manual_seed(77)
        engine = Engine(-1.0)
        saved = checkpoints.load(engine)  # type: ignore[arg-type]
        assert saved is not None and engine.value == 3.0
        assert saved.state == {"step": 3} and saved.shares == {"logits": 0.75}
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    torch.set_rng_state(other["rng"]["cpu"])
    assert not torch.equal(torch.rand(3), drawn[0])
    assert "written by 2 ranks, goes on with 1" in said[0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
)
def test_a_full_disk_while_it_is_cut_for_other_ranks_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=1, tell=[].append)
    checkpoints.save(Engine(3.0), 3, {"step": 3})  # type: ignore[arg-type]
    folder = tmp_path / "c" / "step-00000003"
    torch.save({}, folder / "zero_pp_rank_0_optim_states.pt")
    torch.save(torch.load(folder / "rank-0.pt", weights_only=True), folder / "rank-1.pt")
    sign(folder)

    def full(checkpoint: Path, out: Path) -> None:
        out.mkdir(parents=True)
        raise error

    monkeypatch.setattr(state, "write_universal", full)
    with pytest.raises(UserError, match=r"cannot be written .* step-00000003 stands; free some"):
        checkpoints.load(Engine())  # type: ignore[arg-type]
    assert [p.name for p in (tmp_path / "c").glob("step-*")] == [folder.name]


class Full(Engine):
    """The disk takes no more."""

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_what_was_saved_and_says_what_stands(case: Case) -> None:
    with pytest.raises(UserError) as caught:
        case.checkpoints.save(Full(4.0), 4, {"step": 4})  # type: ignore[arg-type]
    words = str(caught.value)
    assert "step-00000004: cannot be written (No space left on device" in words
    assert "MiB are free there); step-00000003 stands" in words and "\n" not in words
    assert not list(case.folder.glob("*.writing")), "its space is given back"
    assert case.loaded() == (3.0, {"step": 3})


def test_a_write_that_torch_gives_up_is_a_full_disk_too(case: Case) -> None:
    class Short(Engine):
        def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
            self.checkpoint_engine.save({}, f"{folder}/{tag}/x.pt")

    class Writer:
        def save(self, state: Any, path: str) -> None:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    engine = Short(4.0)
    engine.checkpoint_engine = Writer()
    with pytest.raises(UserError, match="took only a part"):
        case.checkpoints.save(engine, 4, {"step": 4})  # type: ignore[arg-type]
    assert isinstance(engine.checkpoint_engine, Writer)


@pytest.mark.parametrize("content", ["", "step-1", "../../elsewhere", "\udcff"])
def test_a_pointer_that_points_nowhere_is_told_and_the_newest_is_taken(
    case: Case, content: str
) -> None:
    (case.folder / "latest").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert case.loaded() == (3.0, {"step": 3})
    assert "latest: damaged" in case.said[0]


def test_without_a_pointer_the_newest_is_taken(case: Case) -> None:
    (case.folder / "latest").unlink()
    assert case.loaded() == (3.0, {"step": 3})
    assert "no pointer" in case.said[0]


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights.pt", "rank-0.pt"])
def test_what_another_put_into_a_checkpoint_is_not_run(
    case: Case, tmp_path: Path, name: str
) -> None:
    """The manifest fits: whoever writes a checkpoint also writes that."""
    folder = step_folder(case, 3)
    torch.save({"step": 3, "harm": Payload(tmp_path / "done")}, folder / name)
    sign(folder)
    with pytest.raises(
        UserError, match=r"no tensor and no plain value.*it names posix.mkdir"
    ) as caught:
        case.loaded()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "done").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def scripted(path: Path) -> None:
    """TorchScript: a file with code in it."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


@pytest.mark.parametrize(
    "put",
    [
        scripted,
        lambda path: path.write_bytes(b"expired, and no checkpoint\n"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
    ],
    ids=["script", "garbage", "empty", "cut"],
)
@pytest.mark.parametrize("name", ["weights.pt", "rank-0.pt"])
def test_what_is_no_checkpoint_is_refused_in_one_line(case: Case, put: Any, name: str) -> None:
    """The manifest fits."""
    folder = step_folder(case, 3)
    put(folder / name)
    sign(folder)
    with pytest.raises(UserError, match="take a checkpoint that this program wrote") as caught:
        case.loaded()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_ranks_file_that_holds_something_else_is_refused(case: Case) -> None:
    folder = step_folder(case, 3)
    torch.save([1, 2], folder / "rank-0.pt")
    sign(folder)
    with pytest.raises(UserError, match=r"rank-0.pt: not the state of a rank"):
        case.loaded()


def test_what_deepspeed_fails_of_is_not_taken_for_the_file(case: Case) -> None:
    class Fails(Engine):
        def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
            super().load_checkpoint(folder, tag)
            raise KeyError("a defect")

    with pytest.raises(KeyError, match="a defect"):
        case.checkpoints.load(Fails())  # type: ignore[arg-type]


def test_hidden_files_that_a_file_system_leaves_are_no_damage(case: Case) -> None:
    (step_folder(case, 3) / ".nfs0001").write_text("x")
    assert case.loaded() == (3.0, {"step": 3}) and not case.said


def test_a_manifest_cannot_name_a_file_elsewhere(case: Case, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (step_folder(case, 3) / "manifest.json").write_text('{"../../secret": [1, "0"]}')
    assert case.loaded()[0] == 2.0
    assert "no file of it" in case.said[0]


def test_one_that_cannot_be_read_is_not_given_up(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("makd_llm.checkpoint.state.sha256_of", refuse)
    with pytest.raises(UserError, match=r"cannot be read .Permission denied.; mend that"):
        case.loaded()


def under(folder: Path, key: str, said: list[str]) -> Checkpoints:
    about = {"under": key, "source": "s", "content": "c"}
    return Checkpoints(folder, keep=2, tell=said.append, about=about)


def test_those_of_another_config_are_set_aside_and_taken_back(tmp_path: Path) -> None:
    folder, said = tmp_path / "distil", []
    first, second = under(folder, "aaa", said), under(folder, "bbb", said)
    first.belong_to("aaa")
    first.save(Engine(1.0), 1, {"step": 1})  # type: ignore[arg-type]
    first.belong_to("aaa")
    assert first.about()["step"] == 1 and first.about()["ranks"] == 1 and not said
    second.belong_to("bbb")
    assert second.load(Engine()) is None  # type: ignore[arg-type]
    assert "of another config, set aside as" in said[-1]
    second.save(Engine(2.0), 2, {"step": 2})  # type: ignore[arg-type]
    first.belong_to("aaa")
    assert "taken back" in said[-1]
    engine = Engine()
    assert first.load(engine) is not None and engine.value == 1.0  # type: ignore[arg-type]
    first.drop_set_aside()
    assert [p.name for p in tmp_path.iterdir()] == ["distil"] and "removed" in said[-1]


def test_what_says_nothing_of_its_config_is_set_aside_inside_the_folder(tmp_path: Path) -> None:
    folder, said = tmp_path / "run" / "distil", []
    checkpoints = under(folder, "aaa", said)
    checkpoints.save(Engine(1.0), 1, {"step": 1})  # type: ignore[arg-type]
    (folder / "step-00000001" / "about.json").write_text('{"under": "../../elsewhere"}')
    sign(folder / "step-00000001")
    checkpoints.belong_to("aaa")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["distil.unknown"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_what_a_damaged_one_says_of_itself_is_not_believed(tmp_path: Path, damage: str) -> None:
    """Nor are sound ones before it thought to be of another config."""
    said: list[str] = []
    checkpoints = under(tmp_path / "distil", "aaa", said)
    for step in (1, 2):
        checkpoints.save(Engine(float(step)), step, {"step": step})  # type: ignore[arg-type]
    about = tmp_path / "distil" / "step-00000002" / "about.json"
    if damage == "flipped":
        about.write_text(about.read_text().replace("aaa", "aab"))
    else:
        about.write_text("{") if damage == "cut" else about.unlink()
    checkpoints.belong_to("aaa")
    assert checkpoints.about()["step"] == 1 and not said
    engine = Engine()
    assert checkpoints.load(engine) is not None and engine.value == 1.0  # type: ignore[arg-type]
    assert "about.json" in said[0] and "trying the one before it" in said[0]


def sign(folder: Path) -> None:
    """A manifest that fits the files as they are."""
    names = [p.name for p in folder.iterdir() if p.name != "manifest.json"]
    entries = {n: [(folder / n).stat().st_size, sha256_of(folder / n)] for n in names}
    (folder / "manifest.json").write_text(json.dumps(entries))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
