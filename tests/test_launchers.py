"""Several nodes by the launchers of others: torchrun, and `deepspeed --hostfile`. Two launchers on
one machine stand for two nodes.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from makd_llm import distributed
from makd_llm.testing import environment_alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CHECKOUT = Path(__file__).resolve().parents[1]


def started(*command: str, path: str = "") -> subprocess.Popen[str]:
    scripts = str(Path(sys.executable).parent)
    found = os.pathsep.join([*([path] if path else []), scripts, os.environ.get("PATH", "")])
    ours = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "PATH": found}
    return subprocess.Popen(
        command,
        env=environment_alone() | ours,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def assert_two_ranks_ran(launchers: list[subprocess.Popen[str]], run_dir: Path) -> None:
    try:
        printed = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)  # its ranks too
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), printed
    assert json.loads((run_dir / "environment.json").read_text())["ranks"] == 2
    assert (run_dir / "factorized" / "model.safetensors").exists()


def job(tiny: Path, run_dir: Path) -> list[str]:
    return [
        *("--ds", str(CHECKOUT / "ds_configs" / "zero3.json"), f"teacher.model={tiny / 'teacher'}"),
        *(f"data.source={tiny}", "data.max_length=64", "evaluation.max_new_tokens=8"),
        *("sft.enabled=false", "student.rank_multiple=4", "student.calibration_records=8"),
        *(f"run_dir={run_dir}", "--until", "factorize"),
    ]


def test_torchrun_on_two_nodes(tiny: Path, tmp_path: Path) -> None:
    port = str(distributed.free_port())
    launchers = [
        started(
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--node-rank", str(node), "--nproc-per-node", "1"),
            *("--master-addr", "127.0.0.1", "--master-port", port),
            *(str(CHECKOUT / "train.py"), *job(tiny, tmp_path / "run")),
        )
        for node in range(2)
    ]
    assert_two_ranks_ran(launchers, tmp_path / "run")


@pytest.mark.parametrize("by", ["pdsh", "hand"])
def test_deepspeed_with_a_hostfile(tiny: Path, tmp_path: Path, by: str) -> None:
    """pdsh is a stand-in that runs every host's command here; by hand (`--no_ssh`) is the real
    thing, with a launcher started on each node.
    """
    (tmp_path / "hostfile").write_text("host1 slots=1\nhost2 slots=1\n")
    port = str(distributed.free_port())
    call = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", str(tmp_path / "hostfile")),
        *("--master_addr", "127.0.0.1", "--master_port", port),
    ]
    rest = [str(CHECKOUT / "train.py"), *job(tiny, tmp_path / "run")]
    if by == "hand":
        launchers = [
            started(*call, "--no_ssh", "--node_rank", str(node), *rest) for node in range(2)
        ]
    else:
        pdsh = tmp_path / "pdsh"
        pdsh.write_text(f"#!{sys.executable}\n{PDSH}")
        pdsh.chmod(0o755)
        launchers = [started(*call, "--no_ssh_check", *rest, path=str(tmp_path))]
    assert_two_ranks_ran(launchers, tmp_path / "run")


PDSH = """
import subprocess, sys

at = sys.argv.index("-w")
hosts, command = sys.argv[at + 1].split(","), " ".join(sys.argv[at + 2 :])
started = [
    subprocess.Popen(["sh", "-c", command.replace("%n", str(number)).replace("%h", host)])
    for number, host in enumerate(hosts)
]
sys.exit(max(process.wait() for process in started))
"""
