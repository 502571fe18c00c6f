"""`makd train --preset seqkd`: the teacher writes, and the student learns from that."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from makd_llm.config import load_config
from makd_llm.errors import UserError
from makd_llm.testing import environment_alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config(tiny: Path) -> Path:
    path = tiny / "seqkd.yaml"
    path.write_text(f"""
teacher: {{model: {tiny}/teacher}}
data: {{source: {tiny}, max_length: 64}}
student: {{method: svd, budget: uniform, rank_multiple: 4}}
distil:
  preset: seqkd
  sequences: {{generation: {{max_new_tokens: 6, beams: 2, batch_size: 8}}}}
  train: {{steps: 6, batch_size: 4, learning_rate: 1.0e-3, checkpoint_every: 3}}
evaluation: {{records: 4, generate_records: 2, max_new_tokens: 4, batch_size: 2}}
""")
    return path


def start(config: Path, run_dir: Path, *more: str) -> subprocess.Popen[str]:
    clean = environment_alone()
    ds = str(CHECKOUT / "ds_configs" / "zero3.json")
    call = ["train", "--ds", ds, "--config", str(config), f"run_dir={run_dir}", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "makd_llm.cli", *call],
        env=clean
        | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(config: Path, run_dir: Path, *more: str) -> str:
    process = start(config, run_dir, *more)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return printed


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    printed = run(config, config.parent / "seqkd")
    assert "summaries of 40 documents" in printed
    assert "objectives: cross_entropy;" in printed
    return config.parent / "seqkd"


def test_the_teacher_writes_and_the_student_learns_just_that(config: Path, finished: Path) -> None:
    """The same as a fine-tuning on a data set that holds the teacher's summaries."""
    manifest = json.loads((finished / "teacher-summaries" / "manifest.json").read_text())
    assert manifest["made_from"]["generation"] == {
        "method": "beam", "beams": 2, "max_new_tokens": 6, "per_document": 1,
    }  # fmt: skip
    data = config.parent / "as-data"
    shutil.copytree(finished / "teacher-summaries", data)
    shutil.copy(config.parent / "validation.jsonl", data)
    other = config.parent / "finetuned"
    run(config, other, "distil.preset=finetune", f"data.source={data}", "--until", "distil")
    assert not (other / "teacher-summaries").exists()
    first, second = (load_file(f / "student" / "model.safetensors") for f in (finished, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = load_file(finished / "factorized" / "model.safetensors")
    assert any(not torch.equal(first[name], start[name]) for name in first), "it has learnt"
    written, given = (
        {row["id"]: row["summary"] for row in map(json.loads, path.open())}
        for path in (data / "train.jsonl", config.parent / "train.jsonl")
    )
    assert list(written) == [f"r{i}" for i in range(40)]
    assert all(written[id_] != given[id_] for id_ in written)
    assert "teacher's own summaries (beam)" in (finished / "student" / "README.md").read_text()


def test_summaries_stand_until_what_they_depend_on_changes(config: Path, finished: Path) -> None:
    folder = config.parent / "changed"
    shutil.copytree(finished, folder)
    printed = run(config, folder, "distil.sequences.generation.batch_size=4")
    for stage in ("factorize", "write", "distil", "evaluate"):
        assert f"{stage}: stands in" in printed
    printed = run(config, folder, "student.keep_ratio=0.4", "--until", "write")
    assert "factorize: runs again" in printed and "write: stands in" in printed
    more = ("distil.sequences.generation.beams=3", "--until", "distil")
    printed = run(config, folder, *more)
    assert "write: runs again, because generation.beams changed from 2 to 3" in printed
    assert "distil: runs again, because the stage before it changed" in printed
    manifest = json.loads((folder / "teacher-summaries" / "manifest.json").read_text())
    assert manifest["made_from"]["generation"]["beams"] == 3


def test_killed_while_the_teacher_writes(config: Path, finished: Path) -> None:
    folder = config.parent / "killed"
    process = start(config, folder)
    pieces = folder / "teacher-summaries" / "pieces"
    deadline = time.monotonic() + 500
    try:
        while not any(pieces.glob("[0-9]*.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    printed = run(config, folder, "--until", "write")
    assert "factorize: stands in" in printed and "are summarized already" in printed
    written = "teacher-summaries/train.jsonl"
    assert (folder / written).read_bytes() == (finished / written).read_bytes()


def test_the_documents_need_no_references(config: Path, finished: Path, tmp_path: Path) -> None:
    """The student's start needs no calibration here, so that only the evaluation asks for them."""
    rows = [json.loads(line) for line in (config.parent / "train.jsonl").read_text().splitlines()]
    bare = [{key: row[key] for key in ("id", "document")} for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    shutil.copy(config.parent / "validation.jsonl", tmp_path)
    run(config, tmp_path / "run", f"data.source={tmp_path}", "--until", "distil")
    for name in ("teacher-summaries/train.jsonl", "student/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_settings_that_cannot_be(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="greedy decoding has one summary"):
        load_config(config, ["distil.sequences.generation={method: greedy, per_document: 2}"])
    with pytest.raises(UserError, match="2 beams do not give 3 summaries"):
        load_config(config, ["distil.sequences.generation.per_document=3"])
    for more, words in (
        (("distil.sequences.generation.max_new_tokens=32",), "half the window"),
        (("distil.preset=kd", "--until", "write"), "there is nothing to write"),
    ):
        process = start(config, tmp_path / "run", *more)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2 and words in errors
        assert len(errors.strip().splitlines()) == 1
