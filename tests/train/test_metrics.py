"""Every step stands once in metrics.jsonl and TensorBoard, whatever was interrupted."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from makd_llm.train.metrics import Metrics


@pytest.fixture(autouse=True)
def first_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads the files of one second by the number of their writer in its process, as
    text: the tenth before the ninth. A resumed run is another process, and a later second.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def write(run_dir: Path, start: int, stop: int, loss: float, stage: str = "distil") -> None:
    with Metrics(run_dir, stage, steps=8, start=start) as metrics:
        for step in range(start + 1, stop + 1):
            metrics.write(step, {"loss": loss, "loss/hidden": loss / 2, "tokens_per_second": 10.0})


def entries(run_dir: Path) -> list[tuple[str, int, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(e["stage"], e["step"], e["loss"]) for e in map(json.loads, lines)]


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, 9.0, "sft")
    write(tmp_path, 0, 5, 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "distil", "st')  # killed in the middle of a line
    write(tmp_path, 3, 6, 2.0)
    assert entries(tmp_path) == [
        ("sft", 1, 9.0),
        ("sft", 2, 9.0),
        *(("distil", step, 1.0) for step in (1, 2, 3)),
        *(("distil", step, 2.0) for step in (4, 5, 6)),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard" / "distil"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        *((step, 1.0) for step in (1, 2, 3)),
        *((step, 2.0) for step in (4, 5, 6)),
    ]


def test_without_a_terminal_a_line_per_step_says_losses_speed_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 6, 7, 1.5)
    line = capsys.readouterr().out.strip()
    assert line.startswith("distil 7/8  loss 1.500  hidden 0.750  10 tokens/s  left ")
