"""The main job as a person runs it: two ranks under the deepspeed launcher, killed, resumed,
exported, refused.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from makd_llm import distributed
from makd_llm.models.origin import origin_of
from makd_llm.testing import environment_alone

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[1]


def command(tiny: Path, run_dir: Path, *more: str) -> list[str]:
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        str(distributed.free_port()),
    ]
    return [
        *launcher,
        str(CHECKOUT / "train.py"),
        "--ds",
        str(CHECKOUT / "ds_configs" / "zero3.json"),
        "--config",
        str(tiny / "run.yaml"),
        f"run_dir={run_dir}",
        *more,
    ]


def environment() -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    # Of a process group that an earlier test of this process made, nothing is handed on.
    ours = environment_alone()
    return ours | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}


def run(tiny: Path, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(tiny, run_dir, *more),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )


def steps_done(run_dir: Path, stage: str) -> int:
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.endswith("}")]
    except OSError:
        return 0
    return max((e["step"] for e in entries if e["stage"] == stage), default=0)


def kill_in_the_middle(tiny: Path, run_dir: Path, step: int, *more: str) -> None:
    """Starts the run, and ends every process of it with SIGKILL once distillation has passed
    `step`.
    """
    process = subprocess.Popen(
        command(tiny, run_dir, *more),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_step(process, run_dir, step)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_step(process: subprocess.Popen[Any], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while steps_done(run_dir, "distil") < step:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, "the run does not come to its steps"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def config(tiny: Path) -> Path:
    (tiny / "run.yaml").write_text(f"""
teacher: {{model: {tiny}/teacher}}
data: {{source: {tiny}, max_length: 64}}
sft: {{enabled: true, train: {{steps: 3, batch_size: 4, checkpoint_every: 2}}}}
student: {{rank_multiple: 4, calibration_records: 8, calibration_batch: 4}}
distil:
  weights: balanced
  balance: {{every: 3}}
  train: {{steps: 8, batch_size: 4, learning_rate: 1.0e-3, checkpoint_every: 3}}
evaluation: {{records: 8, generate_records: 4, max_new_tokens: 4, batch_size: 2, stages: true}}
merge: true
""")
    return tiny


@pytest.fixture(scope="module")
def finished(config: Path) -> tuple[Path, str]:
    """An uninterrupted run, and what it printed."""
    done = run(config, config / "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    return config / "whole", done.stdout


def test_a_run_leaves_what_the_readme_promises(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    expected = {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "teacher",
        "factorized",
        "student",
        "student-merged",
        "evaluation.json",
        "attention.json",
        "samples.jsonl",
        "report.html",
    }
    assert expected <= {path.name for path in folder.iterdir()}
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert list(evaluation["models"]) == ["teacher", "factorized", "student", "lead-3"]
    stages = evaluation["stages"]
    assert [*stages] == ["teacher", "svd", "whitened", "fisher, greedy", "distilled"]
    measured = ("teacher", "fisher, greedy", "distilled")  # as teacher, factorized, student
    for stage, model in zip(measured, list(evaluation["models"].values())[:3], strict=True):
        assert stages[stage] == model["perplexity"]["value"]
    attention = json.loads((folder / "attention.json").read_text())
    assert attention["not_measured"] is None and attention["records"] == 8
    assert {name: len(layers) for name, layers in attention["models"].items()} == {
        "factorized": 4,
        "student": 4,
    }
    assert "what each step is worth" in printed and not (folder / "before").exists()
    student = evaluation["models"]["student"]
    stored = load_file(folder / "student" / "model.safetensors")
    assert student["parameters"]["total"] == sum(tensor.numel() for tensor in stored.values())
    assert f"{student['perplexity']['value']:.2f}" in printed, (
        "the tables are what the run ends with"
    )
    card = (folder / "student" / "README.md").read_text()
    total, perplexity = student["parameters"]["total"], student["perplexity"]["value"]
    assert f"| student | {total:,} | {perplexity:.2f} |" in card
    assert "| distilled | preset makd, steps 8 of 4 records |" in card
    merged = (folder / "student-merged" / "README.md").read_text()
    assert "multiplied out" in merged and f"{perplexity:.2f}" in merged
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and {"id", "document", "references", "teacher", "student"} <= set(
        samples[0]
    )
    page = (folder / "report.html").read_text()
    assert samples[0]["document"] in page and "Not measured" not in page
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if s["stage"] == "distil"] == list(range(1, 9))
    state = torch.load(folder / "checkpoints/distil/step-00000008/rank-0.pt", weights_only=True)
    multiplier = state["multiplier"]
    assert multiplier["model"] == 1.0 and multiplier["matrix"] != 1.0 != multiplier["layer"]


def test_the_exported_student_loads_and_its_merged_form_agrees(finished: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM

    import makd_llm  # noqa: F401  (makes the Auto classes know the student)

    folder, _ = finished
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(folder / "student-merged", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = student(ids).logits, merged(ids).logits
    assert type(merged).__name__ == "LlamaForCausalLM"
    # The merged weights are the product rounded to bf16: one part in 256.
    assert (ours - theirs).norm() < 0.02 * ours.norm()


def test_killed_and_resumed_equals_uninterrupted_to_the_last_bit(
    config: Path, finished: tuple[Path, str]
) -> None:
    whole, _ = finished
    broken = config / "broken"
    kill_in_the_middle(config, broken, step=5)
    again = run(config, broken)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "sft: stands in" in again.stdout and "resumed at step" in again.stderr
    for name in ("teacher", "factorized", "student"):
        first, second = (
            load_file(folder / name / "model.safetensors") for folder in (whole, broken)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    losses = [
        {
            e["step"]: e["loss"]
            for e in map(json.loads, (f / "metrics.jsonl").open())
            if e["stage"] == "distil"
        }
        for f in (whole, broken)
    ]
    assert losses[0] == losses[1]


def test_a_changed_config_makes_its_stage_and_the_later_ones_run_again(
    config: Path, finished: tuple[Path, str]
) -> None:
    folder = config / "changed"
    shutil.copytree(finished[0], folder)
    done = run(config, folder, "student.keep_ratio=0.4", "merge=false", "distil.preset=finetune")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sft: stands in" in done.stdout
    assert (
        "factorize: runs again, because student.keep_ratio changed from 0.5 to 0.4" in done.stdout
    )
    assert "distil: runs again, because distil.preset changed" in done.stdout
    assert "evaluate: runs again, because the stage before it changed" in done.stdout
    assert "objectives: cross_entropy;" in done.stdout
    assert not (folder / "student-merged").exists(), "it was of another student"


def alone(tiny: Path, run_dir: Path) -> subprocess.Popen[str]:
    """A run in one process, without the launcher: the output only, data read as a stream."""
    stream = ("data.streaming=true", "data.shuffle_buffer=8")
    launched = command(tiny, run_dir, "distil.preset=kd", "distil.train.steps=40", *stream)
    single = [sys.executable, *launched[launched.index(str(CHECKOUT / "train.py")) :]]
    return subprocess.Popen(
        single, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_sigterm_saves_exits_with_its_code_and_the_same_command_goes_on(config: Path) -> None:
    whole, run_dir = config / "alone", config / "terminated"
    process = alone(config, run_dir)
    try:
        wait_for_step(process, run_dir, 4)
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "state saved" in errors.strip().splitlines()[-1]
    pointer = (run_dir / "checkpoints" / "distil" / "latest").read_text()
    assert 4 <= int(pointer.removeprefix("step-")) < 40
    for folder in (run_dir, whole):
        process = alone(config, folder)
        printed, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert "objectives: cross_entropy, logits;" in printed
    first, second = (load_file(f / "student" / "model.safetensors") for f in (whole, run_dir))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.timeout(900)
def test_an_over_parameterized_student_is_resumed_and_exported_as_a_plain_one(
    config: Path,
) -> None:
    """Killed and resumed, it is the same to the last bit as uninterrupted; its files are those of
    the student that it started from.
    """
    more = ("distil.preset=opdf", "sft.enabled=false", "evaluation.stages=false")
    whole, broken = config / "chains", config / "chains-broken"
    done = run(config, whole, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "objectives: auxiliary, cross_entropy, logits;" in done.stdout
    assert "in tensors; contracted for the export" in done.stdout
    kill_in_the_middle(config, broken, 5, *more)
    again = run(config, broken, *more)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed at step" in again.stderr
    first, second, start = (
        load_file(folder / "model.safetensors")
        for folder in (whole / "student", broken / "student", whole / "factorized")
    )
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in start.items()}
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [
        json.loads((whole / n / "config.json").read_text()) for n in ("student", "factorized")
    ]
    assert [c.pop("dtype") for c in configs] == ["bfloat16", "float32"], "trained, and as stored"
    assert configs[0] == configs[1]
    student = AutoModelForCausalLM.from_pretrained(whole / "student", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(whole / "student-merged", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = student(ids).logits, merged(ids).logits
    assert (ours - theirs).norm() < 0.02 * ours.norm()
    counted = json.loads((whole / "evaluation.json").read_text())["models"]
    assert counted["student"]["parameters"] == counted["factorized"]["parameters"]
    losses = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(loss["loss/auxiliary"] > 0 for loss in losses)


def test_a_student_of_another_shape_goes_through_the_whole_run(config: Path) -> None:
    """Fewer layers, narrower, fewer key-value heads, the embedding factored too; compared at every
    level through maps and projections, and exported without them.
    """
    run_dir = config / "shaped"
    shape = ("depth.layers=3", "width.hidden=24", "width.feed_forward=32", "heads.key_value=1")
    more = ("sft.enabled=false", "evaluation.stages=false", "distil.train.steps=3")
    wanted = [f"student.{setting}" for setting in (*shape, "embedding=0.5", "keep_ratio=0.8")]
    launched = command(config, run_dir, *more, *wanted)
    single = [sys.executable, *launched[launched.index(str(CHECKOUT / "train.py")) :]]
    done = subprocess.run(
        single, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "objectives: matrix, attention, hidden, cross_entropy, logits;" in done.stdout
    assert "projections to the teacher's widths" in done.stdout
    student = AutoModelForCausalLM.from_pretrained(run_dir / "student")
    sizes = student.config
    assert (sizes.num_hidden_layers, sizes.hidden_size, sizes.num_key_value_heads) == (3, 24, 1)
    origin = origin_of(sizes)
    assert origin is not None and origin.layers == (0, 2, 3) and origin.teacher_layers == 4
    stored = load_file(run_dir / "student" / "model.safetensors")
    assert not any("projection" in name for name in stored)
    assert stored["model.embed_tokens.up"].shape[1] < 24
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "student-merged")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        close = (student(ids).logits.float() - merged(ids).logits.float()).abs().max()
    assert float(close) < 0.2  # both are rounded to bf16
    losses = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(loss["loss/matrix"] > 0 and loss["loss/hidden"] > 0 for loss in losses)
