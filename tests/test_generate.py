"""`makd generate` as a person runs it: killed with SIGKILL at several moments and started again,
every document comes once, in order, as if nothing had happened.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from makd_llm import distributed
from makd_llm.cli import main
from makd_llm.testing import environment_alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DOCUMENTS = 40
FINISHED = "[0-9]*.jsonl"  # and not one that was being written


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ZeRO-3 in float32."""
    path = tmp_path_factory.mktemp("ds") / "zero3.json"
    zero3 = json.loads((Path(__file__).parents[1] / "ds_configs" / "zero3.json").read_text())
    path.write_text(json.dumps({**zero3, "bf16": {"enabled": False}}))
    return path


def command(tiny: Path, out: Path, *more: str) -> list[str]:
    """In pieces of one document, so that there are many moments to be killed at."""
    return [
        *(sys.executable, "-m", "makd_llm.cli", "generate", str(tiny / "teacher")),
        *("--data", str(tiny / "train.jsonl"), "--out", str(out), "--max-new-tokens", "12"),
        *("--piece", "1", "--batch", "4", "data.max_length=64", "seed=5", *more),
    ]


def start(call: list[str], ranks: int = 1) -> list[subprocess.Popen[str]]:
    """The processes of a run; without a launcher, so that a kill meets all of them at once."""
    port = str(distributed.free_port())
    clean = environment_alone()
    clean |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    clean["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            call,
            env=clean | (group | {"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> str:
    """What the run printed; it has to end well."""
    printed = [process.communicate(timeout=600) for process in processes]
    assert all(p.returncode == 0 for p in processes), [errors for _, errors in printed]
    return printed[0][0]


def kill_at(processes: list[subprocess.Popen[str]], out: Path, pieces: int) -> None:
    """SIGKILL as soon as so many pieces are on the disk; 0: as soon as there is a manifest."""
    deadline = time.monotonic() + 400
    seen = out / "pieces" if pieces else out
    wanted = (max(1, pieces), FINISHED if pieces else "manifest.json")
    try:
        while len(list(seen.glob(wanted[1]))) < wanted[0]:
            assert all(p.poll() is None for p in processes), "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate()
    assert not (out / "train.jsonl").exists()


def rows_of(out: Path) -> list[dict[str, Any]]:
    text = (out / "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


SAMPLING = ("--method", "sample", "--per-document", "2")


@pytest.fixture(scope="module")
def whole(tiny: Path, ds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes, on one rank."""
    out = tmp_path_factory.mktemp("whole")
    finish(start(command(tiny, out, *SAMPLING, "--ds", str(ds))))
    return out


@pytest.mark.parametrize(("ranks", "moments"), [(1, (0, 3, 17)), (2, (5, 17))])
def test_killed_again_and_again_and_resumed(
    tiny: Path, tmp_path: Path, ds: Path, whole: Path, ranks: int, moments: tuple[int, ...]
) -> None:
    broken = tmp_path / "broken"
    call = command(tiny, broken, *SAMPLING, "--ds", str(ds))
    for pieces in moments:
        kill_at(start(call, ranks), broken, pieces)
    kept = len(list((broken / "pieces").glob(FINISHED)))
    assert 17 <= kept < DOCUMENTS
    printed = finish(start(call, ranks))
    assert f"{kept} of {DOCUMENTS} documents are summarized already" in printed
    assert (broken / "train.jsonl").read_bytes() == (whole / "train.jsonl").read_bytes()
    manifest = json.loads((broken / "manifest.json").read_text())
    assert manifest == json.loads((whole / "manifest.json").read_text())
    ids = [f"r{i}" for i in range(DOCUMENTS) for _ in range(2)]
    for id_ in manifest["empty"]:
        ids.remove(id_)
    assert [row["id"] for row in rows_of(broken)] == ids
    assert not (broken / "pieces").exists()


def ended(capsys: pytest.CaptureFixture[str], call: list[str]) -> str:
    """The one line of a call that is refused."""
    with pytest.raises(SystemExit) as caught:
        main(call)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_other_settings_are_refused_and_a_finished_folder_stands(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call = command(tiny, out, "data.limit=3")
    finish(start(call))
    before = (out / "train.jsonl").read_bytes()
    arguments = call[call.index("generate") :]
    for change, words in (
        (["--method", "beam"], "generation.method changed from 'greedy' to 'beam'"),
        (["--max-new-tokens", "13"], "generation.max_new_tokens changed from 12 to 13"),
        (["data.limit=4"], "data.limit changed from 3 to 4"),
        (["data.prompt.template='{document} tl;dr'"], "data.prompt.template changed"),
    ):
        assert words in ended(capsys, [*arguments, *change])
    main([*arguments, "--batch", "2"])
    assert f"{out / 'train.jsonl'} stands" in capsys.readouterr().out
    assert (out / "train.jsonl").read_bytes() == before


def test_a_split_names_no_file_elsewhere(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = command(tiny, tmp_path / "a" / "out", "--endpoint", "http://127.0.0.1:9")
    for split in ("../x", "/x", "..", "a\\b", ""):
        line = ended(capsys, [*call[call.index("generate") :], "--split", split])
        assert "train_split: files are named after it: give a name without / and" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_the_client_of_an_endpoint_is_ended_and_goes_on(
    tiny: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("fake", Path(__file__).parent / "generation" / "conftest.py")
    assert spec is not None and spec.loader is not None
    fake = module_from_spec(spec)
    spec.loader.exec_module(fake)
    server, out = fake.FakeServer(), tmp_path / "out"

    def slow(server: Any, body: dict[str, Any], before: int) -> Any:
        time.sleep(0.05)
        return server.answer(body)

    server.fault = slow
    try:
        call = command(tiny, out, "--endpoint", server.url, "--concurrency", "3")
        (process,) = start(call)
        deadline = time.monotonic() + 400
        while len(list((out / "pieces").glob(FINISHED))) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(kind)
        _, errors = process.communicate(timeout=200)
        if kind == signal.SIGTERM:
            assert process.returncode == 75, errors
            assert "goes on from what is finished" in errors
        kept = {int(path.stem) for path in (out / "pieces").glob(FINISHED)}
        assert 5 <= len(kept) < DOCUMENTS
        server.bodies.clear()
        finish(start(call))
    finally:
        server.close()
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    expected = ["-".join(row["document"].split()[:3]) for row in rows]
    assert [row["summary"] for row in rows_of(out)] == expected
    assert [row["id"] for row in rows_of(out)] == [row["id"] for row in rows]
    assert len(server.bodies) == DOCUMENTS - len(kept), "nothing is asked for twice"
