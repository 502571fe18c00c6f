"""Two hosts, each a network namespace with one rank in it, and a cable between them that can be
cut.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from makd_llm import distributed
from makd_llm.testing import environment_alone

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT = 20
"""Seconds that a rank waits for the other."""


@dataclass(frozen=True)
class Hosts:
    """Two namespaces with a veth pair between them: 10.213.0.1 and 10.213.0.2."""

    names: tuple[str, str]

    def start(self, *command: str) -> list[subprocess.Popen[str]]:
        """A rank of the command on each host, with what a launcher would set."""
        scripts = str(Path(sys.executable).parent)
        common = environment_alone() | {
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "10.213.0.1",
            "MASTER_PORT": str(distributed.free_port()),
            "MAKD_COLLECTIVE_TIMEOUT": str(TIMEOUT),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'kernels'}",
            "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        }
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, *command],
                env=common | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": name},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, name in enumerate(self.names)
        ]

    def cable(self, state: str) -> None:
        """up, or down: cut at the first host."""
        ip("-n", self.names[0], "link", "set", self.names[0], state)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Interfaces have the names of their hosts; a name is of this process, and short."""
    first, second = (f"makd{side}{os.getpid()}" for side in "ab")
    try:
        for name in (first, second):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip(
            *("link", "add", first, "netns", first, "type", "veth"),
            *("peer", "name", second, "netns", second),
        )
        for number, name in enumerate((first, second), start=1):
            ip("-n", name, "addr", "add", f"10.213.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
        yield Hosts((first, second))
    finally:
        for name in (first, second):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ended(ranks: list[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str, str]]:
    """Each rank's exit code, output and errors. Fails where one does not end in time."""
    deadline = time.monotonic() + timeout
    try:
        found = [rank.communicate(timeout=deadline - time.monotonic()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, found, strict=True)]


def steps_of(run_dir: Path) -> dict[int, float]:
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return {}
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return {entry["step"]: entry["loss"] for entry in entries if entry["stage"] == "distil"}


def test_a_cut_cable_ends_every_rank_and_the_resumed_run_equals_an_uninterrupted_one(
    hosts: Hosts, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, factorization, generation and evaluation go over the cable."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    call = (str(CHECKOUT / "train.py"), "--ds", str(CHECKOUT / "ds_configs" / "zero3.json"))
    call += ("--config", str(config))
    for code, _, errors in ended(hosts.start(*call, f"run_dir={whole}"), 400):
        assert code == 0, errors

    ranks = hosts.start(*call, f"run_dir={broken}")
    deadline = time.monotonic() + 400
    while 10 not in steps_of(broken):
        assert all(rank.poll() is None for rank in ranks), ended(ranks, 20)
        assert time.monotonic() < deadline, "the run does not come to its steps"
        time.sleep(0.02)
    hosts.cable("down")
    cut = time.monotonic()
    results = ended(ranks, 6 * TIMEOUT)
    took = time.monotonic() - cut
    last = []
    for number, (code, _, errors) in enumerate(results):
        assert code == 74, errors
        assert "Traceback" not in errors, errors
        last.append(errors.strip().splitlines()[-1])
        assert last[-1].startswith(f"makd: rank {number} of 2 has lost the others"), errors
    with capsys.disabled():
        print(f"\nthe cable was cut; all ranks had ended {took:.1f} s later, with exit code 74:")
        print("\n".join(last))
    assert took < TIMEOUT + 15
    assert max(steps_of(broken)) < 20

    hosts.cable("up")
    for number, (code, _, errors) in enumerate(ended(hosts.start(*call, f"run_dir={broken}"), 400)):
        assert code == 0, errors
        assert number or "distil: resumed at step" in errors
    for name in ("teacher", "factorized", "student"):
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (whole, broken))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert steps_of(whole) == steps_of(broken) and len(steps_of(whole)) == 20
    for name in ("evaluation.json", "samples.jsonl"):
        assert (whole / name).read_text() == (broken / name).read_text()


def test_ranks_that_do_not_find_each_other_end_in_one_line(
    hosts: Hosts, config: Path, tmp_path: Path
) -> None:
    hosts.cable("down")
    call = (str(CHECKOUT / "train.py"), "--ds", str(CHECKOUT / "ds_configs" / "zero3.json"))
    ranks = hosts.start(*call, "--config", str(config), f"run_dir={tmp_path / 'run'}")
    for number, (code, _, errors) in enumerate(ended(ranks, 120)):
        assert code == 74 and "Traceback" not in errors, errors
        assert f"makd: rank {number} of 2 has lost the others" in errors
