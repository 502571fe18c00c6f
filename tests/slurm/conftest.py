"""A SLURM of the tests' own: two nodes on this machine, in a temporary folder, with a munged of its
own; and a small run, which takes seconds.

`make test-slurm` installs what this needs.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from makd_llm import distributed
from makd_llm.testing import environment_alone

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Slurm:
    """A running SLURM, and the environment in which its commands find it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment | more,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def ask(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def makd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "makd_llm.cli", *arguments)

    def submit(self, *arguments: str) -> str:
        """`makd slurm submit ...`; the job's number."""
        done = self.makd("slurm", "submit", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[2].rstrip(",")

    def about(self, job: str) -> dict[str, str]:
        """What SLURM says of a job; of an array's, give its tasks' numbers: 7_0."""
        words = self.ask("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, job: str) -> str:
        (found,) = self.folder.glob(f"*-{job}.log")
        return found.read_text()

    def wait_for(self, job: str, state: str, timeout: float = 600) -> dict[str, str]:
        """Until a job is in this state. Fails where it ends in another."""
        deadline = time.monotonic() + timeout
        while (about := self.about(job))["JobState"] != state:
            ended = about["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert not ended and time.monotonic() < deadline, f"{about}\n{self.log(job)}"
            time.sleep(0.2)
        return about


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="makd-slurm-"))
    folder.chmod(0o755)  # munged is another user
    environment = environment_alone() | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'kernels'}",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",  # the nodes are one machine, whose name may not resolve
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    slurm = Slurm(folder, environment)
    started: list[subprocess.Popen[bytes]] = []
    try:
        _start_munge(folder, started)
        (folder / "slurm.conf").write_text(_conf(folder))
        for name, command in {
            "slurmctld": ["slurmctld", "-D", "-i"],
            "n1": ["slurmd", "-D", "-N", "n1"],
            "n2": ["slurmd", "-D", "-N", "n2"],
        }.items():
            started.append(_start(command, folder / f"{name}.out", environment))
        _wait(lambda: slurm.run("sinfo", "-h", "-o", "%T %D").stdout == "idle 2\n", folder)
        yield slurm
    finally:
        try:
            if slurm.run("scancel", "--full", "--user=root").returncode == 0:
                with_jobs = ("squeue", "-h", "-t", "running,completing,pending")
                _wait(lambda: slurm.run(*with_jobs).stdout == "", folder)
        finally:
            _stop(started)
            shutil.rmtree(folder)


def _start_munge(folder: Path, started: list[subprocess.Popen[bytes]]) -> None:
    own = folder / "munge"
    own.mkdir()
    key = own / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    for path in (own, key):
        shutil.chown(path, "munge", "munge")
    files = {
        "socket": "socket",
        "key-file": "munge.key",
        "pid-file": "pid",
        "log-file": "log",
        "seed-file": "seed",
    }
    options = [f"--{option}={own / name}" for option, name in files.items()]
    as_munge = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
    command = [*as_munge, "munged", "--foreground", *options]
    started.append(_start(command, folder / "munged.out", dict(os.environ)))
    _wait(lambda: (own / "socket").exists(), folder)


def _conf(folder: Path) -> str:
    host = socket.gethostname().split(".")[0]
    ports = [distributed.free_port() for _ in range(3)]
    return f"""
ClusterName=makd
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
# A requeued job waits for as long as its credentials could still be used.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
SwitchType=switch/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def _start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )


def _stop(started: list[subprocess.Popen[bytes]]) -> None:
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
    for process in started:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(condition: Callable[[], bool], folder: Path, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            logs = [*folder.glob("*.out"), *folder.glob("*.log"), folder / "munge" / "log"]
            told = "\n".join(
                f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}"
                for log in logs
                if log.exists()
            )
            raise TimeoutError(f"SLURM does not come up:\n{told}")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def config(tiny: Path) -> Path:
    """A run of seconds, its steps enough to be stopped in their midst."""
    path = tiny / "several.yaml"
    path.write_text(f"""
teacher: {{model: {tiny}/teacher}}
data: {{source: {tiny}, max_length: 64}}
sft: {{enabled: true, train: {{steps: 3, batch_size: 4, checkpoint_every: 2}}}}
student: {{rank_multiple: 4, calibration_records: 8, calibration_batch: 4}}
distil:
  weights: balanced
  balance: {{every: 3}}
  train: {{steps: 20, batch_size: 4, learning_rate: 1.0e-3, checkpoint_every: 4}}
evaluation: {{records: 8, generate_records: 4, max_new_tokens: 4, batch_size: 2}}
""")
    return path
