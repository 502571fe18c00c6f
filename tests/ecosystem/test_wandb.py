"""A run with W&B, offline: what a later `wandb sync` would send."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb", reason="needs wandb; `make test-ecosystem` installs it")

from makd_llm.cli import main

ZERO3 = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3.json"
VARIABLES = ("WANDB_DIR", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_API_KEY")


def logged(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, kind,
    data) after W&B's own seven bytes.
    """
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


def read(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, float]], int]:
    """What a run is called, its values by step, and its exit code."""
    from wandb.proto import wandb_internal_pb2

    about: dict[str, Any] = {}
    history: dict[int, dict[str, float]] = {}
    code = -1
    for content in logged(path):
        record = wandb_internal_pb2.Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            about |= {"project": run.project, "group": run.run_group, "name": run.display_name}
        elif kind == "history":
            values = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            history[int(values.pop("_step"))] = values
        elif kind == "exit":
            code = record.exit.exit_code
    return about, history, code


@pytest.fixture
def ds(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    block = {"wandb": {"enabled": True, "project": "students"}}
    path.write_text(json.dumps(json.loads(ZERO3.read_text()) | block))
    return path


def call(tiny: Path, ds: Path, run_dir: Path) -> list[str]:
    return [
        *("train", "--ds", str(ds), "--preset", "kd", "--until", "distil", f"run_dir={run_dir}"),
        *(f"teacher.model={tiny}/teacher", f"data.source={tiny}", "data.max_length=48"),
        *("sft.train.steps=2", "sft.train.batch_size=4", "sft.train.checkpoint_every=2"),
        *("distil.train.steps=3", "distil.train.batch_size=4", "evaluation.max_new_tokens=8"),
        *("student.rank_multiple=4", "student.calibration_records=8"),
    ]


def test_every_stage_is_a_run_of_one_group(
    tiny: Path, ds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    main(call(tiny, ds, tmp_path / "mine"))
    found = {}
    for path in (tmp_path / "mine" / "wandb").glob("offline-run-*/*.wandb"):
        about, history, code = read(path)
        assert (about["project"], about["group"], code) == ("students", "mine", 0)
        found[about["name"]] = history
    assert set(found) == {"mine-sft", "mine-distil"}
    for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        stage = entry["stage"]
        at = found[f"mine-{stage}"][4 * entry["step"]]  # records seen
        for name in ("loss", "gradient_norm", "tokens_per_second"):
            assert at[f"{stage}/{name}"] == pytest.approx(entry[name])
        assert "Train/Samples/lr" in at  # DeepSpeed's own


def test_without_a_key_it_is_one_line(
    tiny: Path,
    ds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in (*VARIABLES, "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("wandb.login", lambda prompt: False)  # whoever runs this may have a key
    with pytest.raises(SystemExit) as caught:
        main(call(tiny, ds, tmp_path / "mine"))
    assert caught.value.code == 2
    assert "no key of W&B is known here; `wandb login`" in capsys.readouterr().err
    assert not (tmp_path / "mine" / "checkpoints").exists()
