"""Batch jobs on a real SLURM with two nodes: pre-empted and queued again, many at a time, sweeps,
refusals.
"""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

CHECKOUT = Path(__file__).resolve().parents[2]
ZERO3 = str(CHECKOUT / "ds_configs" / "zero3.json")


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    """Of every step that is written down."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return {}
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return {(entry["stage"], entry["step"]): entry["loss"] for entry in entries}


def assert_equal_runs(first: Path, second: Path) -> None:
    """To the last bit: every model, every step's loss, every figure of the evaluation."""
    for name in ("teacher", "factorized", "student"):
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (first, second))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert losses(first) == losses(second)
    for name in ("evaluation.json", "samples.jsonl"):
        assert (first / name).read_text() == (second / name).read_text()


def wait_for_step(run_dir: Path, step: int, timeout: float = 400) -> None:
    deadline = time.monotonic() + timeout
    while ("distil", step) not in losses(run_dir):
        assert time.monotonic() < deadline, "the run does not come to its steps"
        time.sleep(0.05)


def test_a_pre_empted_job_goes_on_and_ends_as_an_uninterrupted_one(
    cluster: Any, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both at once on the same nodes, so their ports are different ones too."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    call = ("--ds", ZERO3, "--config", str(config), "--nodes", "2")
    undisturbed = cluster.submit(*call, "--name", "whole", f"run_dir={whole}")
    job = cluster.submit(*call, "--name", "broken", f"run_dir={broken}")
    wait_for_step(broken, 7)
    cluster.ask("scancel", "--signal=TERM", job)
    about = cluster.wait_for(job, "COMPLETED", timeout=800)
    assert about["Restarts"] == "1" and about["NumNodes"] == "2"
    log = cluster.log(job)
    with capsys.disabled():
        print(f"\n--- the log of the job that was pre-empted\n{log}---")
    told = log.splitlines()
    assert sum("makd: distil: stopped at step" in line for line in told) == 2, "each rank says so"
    assert f"makd: stopped by a signal (exit code 75); job {job} goes back into the queue" in told
    assert f"makd: job {job} on n[1-2], start 1" in told
    assert "sft: stands in" in log and "distil: resumed at step" in log
    assert "Traceback" not in log
    cluster.wait_for(undisturbed, "COMPLETED")
    assert "stopped" not in cluster.log(undisturbed)
    assert_equal_runs(whole, broken)


def test_a_job_that_nears_its_time_limit_saves_and_goes_on(
    cluster: Any, config: Path, tmp_path: Path
) -> None:
    """The signal is SLURM's own, a time before the limit."""
    run_dir = tmp_path / "run"
    job = cluster.submit(
        *("--ds", ZERO3, "--config", str(config), f"run_dir={run_dir}", "--until", "distil"),
        *("distil.train.steps=100000", "--notice", "10", "--sbatch=--time=1"),
    )
    deadline = time.monotonic() + 400
    while "distil: resumed at step" not in (log := cluster.log(job)):
        assert time.monotonic() < deadline, log
        time.sleep(0.5)
    cluster.ask("scancel", job)
    (stopped,) = re.findall(r"stopped at step (\d+) of 100000, state saved", log)
    assert f"makd: stopped by a signal (exit code 75); job {job} goes back into the queue" in log
    assert f"distil: resumed at step {stopped} of 100000" in log


def test_a_cancelled_job_is_not_queued_again(cluster: Any, config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(
        *("--ds", ZERO3, "--config", str(config), f"run_dir={run_dir}", "--until", "distil"),
        "distil.train.steps=100000",
    )
    wait_for_step(run_dir, 2)
    cluster.ask("scancel", job)
    assert cluster.wait_for(job, "CANCELLED")["Restarts"] == "0"
    assert "into the queue" not in cluster.log(job)


def test_a_sweep_is_an_array_with_a_folder_for_each_run(
    cluster: Any, config: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text())
    job = cluster.submit(
        *("--ds", ZERO3, "--config", str(config), "--config", str(other)),
        *("--seed", "3", "--seed", "5", "--runs", str(tmp_path / "runs"), "--at-once", "2"),
        *("--until", "factorize", "sft.enabled=false", "--name", "sweep"),
    )
    for task in range(4):
        cluster.wait_for(f"{job}_{task}", "COMPLETED")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        f"{name}-seed{seed}" for name in ("several", "other") for seed in (3, 5)
    }
    for path in (tmp_path / "runs").iterdir():
        assert (path / "factorized" / "model.safetensors").exists()
        assert f"seed: {path.name[-1]}\n" in (path / "config.yaml").read_text()


def test_a_pre_empted_run_of_a_sweep_leaves_the_others_alone(
    cluster: Any, config: Path, tmp_path: Path
) -> None:
    """The last one, whose number is also that of the whole array."""
    runs = tmp_path / "runs"
    job = cluster.submit(
        *("--ds", ZERO3, "--config", str(config), "--seed", "3", "--seed", "5"),
        *("--runs", str(runs), "--until", "distil", "distil.train.steps=100000"),
    )
    for seed in (3, 5):
        wait_for_step(runs / f"several-seed{seed}", 2)
    cluster.ask("scancel", "--signal=TERM", f"{job}_1")
    deadline = time.monotonic() + 120
    while cluster.about(f"{job}_1")["Restarts"] == "0":
        assert time.monotonic() < deadline, cluster.log(f"{job}_1")
        time.sleep(0.2)
    other = cluster.about(f"{job}_0")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    assert f"job {job}_1 goes back into the queue" in cluster.log(f"{job}_1")
    cluster.ask("scancel", job)


def test_the_script_by_hand_in_a_container(cluster: Any, config: Path, tmp_path: Path) -> None:
    """The container's runner is a stand-in that runs what it is given; the rest is real."""
    runner = tmp_path / "apptainer"
    runner.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/ran\nshift 7\nexec "$@"\n')
    runner.chmod(0o755)
    done = cluster.run(
        *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--job-name=hand"),
        *(str(CHECKOUT / "slurm" / "distil.sbatch"), "--ds", ZERO3, "--config", str(config)),
        *(f"run_dir={tmp_path / 'run'}", "--until", "factorize", "sft.enabled=false"),
        MAKD_CONTAINER="image.sif",
        PATH=f"{tmp_path}{os.pathsep}{cluster.environment['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    cluster.wait_for(done.stdout.strip(), "COMPLETED")
    ran = (tmp_path / "ran").read_text().splitlines()
    assert len(ran) == 2 and all(" image.sif python -m makd_llm.cli train" in line for line in ran)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["ranks"] == 2


def test_deepspeeds_own_slurm_launcher(cluster: Any, config: Path, tmp_path: Path) -> None:
    """`deepspeed --launcher slurm` inside an allocation: its srun sets no RANK, ours is read."""
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    done = cluster.run(
        *("salloc", "--nodes=2", "--ntasks-per-node=1", "--quiet"),
        *("deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--launcher", "slurm"),
        *("--no_ssh_check", "--master_addr", "127.0.0.1", str(CHECKOUT / "train.py")),
        *("--ds", ZERO3, "--config", str(config), f"run_dir={tmp_path / 'run'}"),
        *("--until", "factorize", "sft.enabled=false"),
        MASTER_ADDR="127.0.0.1",  # the nodes' names are SLURM's only
    )
    assert done.returncode == 0, done.stdout + done.stderr
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["ranks"] == 2


def test_what_sbatch_refuses_is_said_in_its_words(cluster: Any, config: Path) -> None:
    done = cluster.makd(
        *("slurm", "submit", "--ds", ZERO3, "--config", str(config)), "--sbatch=--partition=night"
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("makd: sbatch refused the job:") and "night" in line
