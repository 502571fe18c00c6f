"""A run whose student writes: through the command, with a validation loss that sets its share."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from makd_llm.cli import main

pytestmark = pytest.mark.slow

ZERO3 = str(Path(__file__).resolve().parents[1] / "ds_configs" / "zero3.json")


def call(tiny: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("train", "--ds", ZERO3, "--preset", "distillm", "--until", "distil"),
        *(f"teacher.model={tiny / 'teacher'}", f"data.source={tiny}", f"run_dir={run_dir}"),
        *("sft.enabled=false", "data.max_length=48", "evaluation.max_new_tokens=8"),
        *("student.rank_multiple=4", "student.calibration_records=8"),
        *("distil.train.steps=6", "distil.train.batch_size=4"),
        *(f"distil.sequences.student.{setting}" for setting in more),
    ]


@pytest.mark.timeout(600)
def test_the_share_follows_the_validation_loss(tiny: Path, tmp_path: Path) -> None:
    adaptive = "adaptive={every: 2, records: 4, increment: 1.0, tolerance: 0.0}"
    main(call(tiny, tmp_path, "lmbda=0.5", "max_new_tokens=6", "replay=8", adaptive))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    measured = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(measured) == 3
    rose = [b >= a for a, b in pairwise(measured)]
    expected = [0.5, 0.5, 0.5, 1.0 if rose[0] else 0.5, 1.0 if rose[0] else 0.5]
    assert [line["own_share"] for line in lines[:5]] == expected
    assert {line["own_words"] for line in lines} == {0.0, 1.0}
    assert all(("loss/own_words" in line) == bool(line["own_words"]) for line in lines)
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("factorized", "student")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_validation_split_that_is_missing_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*call(tiny, tmp_path, "max_new_tokens=6"), "data.validation_split=none"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "'none'" in line


def test_texts_that_would_run_past_the_models_positions_are_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*call(tiny, tmp_path, "max_new_tokens=40"), "data.max_length=96"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "distil.sequences.student.max_new_tokens is 136, but" in line
