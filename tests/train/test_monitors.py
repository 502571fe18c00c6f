"""The metrics of a run also go where DeepSpeed's JSON says."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from makd_llm.cli import main
from makd_llm.errors import UserError
from makd_llm.train.monitors import prepare, starting

ZERO3 = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3.json"


def with_blocks(folder: Path, **blocks: dict[str, Any]) -> Path:
    """zero3.json with blocks of monitors, in a folder."""
    path = folder / "ds.json"
    path.write_text(json.dumps(json.loads(ZERO3.read_text()) | blocks))
    return path


def tuned(tiny: Path, ds: Path, run_dir: Path) -> list[dict[str, Any]]:
    """Tunes a teacher for three steps of 4 records; the lines of metrics.jsonl."""
    main(
        [
            *("sft", "--ds", str(ds), f"teacher.model={tiny}/teacher", f"data.source={tiny}"),
            *(f"run_dir={run_dir}", "data.max_length=48", "sft.train.steps=3"),
            *("sft.train.batch_size=4", "sft.train.checkpoint_every=3"),
            "evaluation.max_new_tokens=8",
        ]
    )
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_blocks_of_the_json_get_what_metrics_jsonl_says(tiny: Path, tmp_path: Path) -> None:
    board = {"enabled": True, "output_path": str(tmp_path / "board"), "job_name": "b"}
    table = {"enabled": True, "output_path": str(tmp_path / "table"), "job_name": "t"}
    lines = tuned(tiny, with_blocks(tmp_path, tensorboard=board, csv_monitor=table), tmp_path / "r")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for name in ("loss", "loss/cross_entropy", "gradient_norm", "tokens_per_second"):
        path = tmp_path / "table" / "t" / f"sft_{name.replace('/', '_')}.csv"
        header, *rows = csv.reader(path.open())
        assert header[0] == "step"
        assert [(int(at), float(v)) for at, v in rows] == [(4 * e["step"], e[name]) for e in lines]
    events = EventAccumulator(str(tmp_path / "board" / "b"))
    events.Reload()
    assert [e.step for e in events.Scalars("sft/loss")] == [4, 8, 12]  # records seen
    assert [e.step for e in events.Scalars("Train/Samples/lr")] == [4, 8, 12]  # DeepSpeed's own
    own = EventAccumulator(str(tmp_path / "r" / "tensorboard" / "sft"))
    own.Reload()
    assert [e.step for e in own.Scalars("loss")] == [1, 2, 3]


def test_a_monitor_without_its_package_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("makd_llm.train.monitors.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        tuned(tiny, with_blocks(tmp_path, wandb={"enabled": True}), tmp_path / "r")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "ds.json: wandb.enabled: the package wandb is not installed; `pip install wandb`" in line


def test_a_block_that_is_no_object_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tuned(tiny, with_blocks(tmp_path, wandb=True), tmp_path / "r")  # type: ignore[arg-type]
    assert "wandb is True; expected an object in braces" in capsys.readouterr().err


def test_a_block_that_is_off_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("makd_llm.train.monitors.find_spec", lambda name: None)
    prepare({"wandb": {"enabled": False}, "tensorboard": {}}, Path("ds.json"), Path("run"))


def test_only_errors_of_wandb_are_taken_for_such() -> None:
    class CommError(Exception):
        __module__ = "wandb.errors.errors"

    with pytest.raises(UserError, match="wandb: no such host; set WANDB_MODE=offline"), starting():
        raise CommError("no such host\nConsider increasing the timeout")
    with pytest.raises(ValueError, match="else"), starting():
        raise ValueError("else")
