"""SLURM, from both sides: what a rank that srun has started learns from SLURM's variables, and the
batch script that `makd slurm submit` renders.

The script is one file, `distil.sbatch` (slurm/ in a checkout has a link to it), that works as it
stands. Rendering puts other lines in place of two of its parts: the `#SBATCH` lines, and what
stands between `# settings` and `# end of settings`.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from makd_llm.errors import UserError

SCRIPT = Path(__file__).parent / "distil.sbatch"

RUNNERS = ("apptainer", "singularity", "pyxis")
"""What starts a container: a command before Python, or (pyxis) options of srun."""

FIRST_PORT, PORTS = 20000, 12000
"""Below the range out of which Linux serves outgoing connections (32768 and up)."""


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables by which a launcher tells a process of its group, made from srun's.

    Empty where a launcher has set them already (deepspeed or torchrun, started by srun), and where
    srun has started no second task. MASTER_ADDR and MASTER_PORT are kept where they are given.
    Raises UserError where one of SLURM's variables is missing or no number.
    """
    if "RANK" in environment or environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return {}
    try:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        # A task that is bound to one GPU sees it as number 0, whichever it is.
        local = "0" if len(visible) == 1 and visible[0] else environment["SLURM_LOCALID"]
        found = {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": local,
            "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(
                port_of(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"]))
            ),
        }
    except (KeyError, ValueError) as error:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS is set, but srun's other variables cannot be read ({error}); "
            "start the ranks with srun, deepspeed or torchrun"
        ) from None
    given = ("MASTER_ADDR", "MASTER_PORT")
    return found | {name: environment[name] for name in given if name in environment}


def port_of(job: int, step: int) -> int:
    """A TCP port for a job's step: another one for each of 12,000 jobs in a row, which may share a
    node, and for a job's other steps.
    """
    return FIRST_PORT + (job + 1009 * step) % PORTS


def first_host(nodes: str) -> str:
    """The first name of a list as SLURM writes it: gpu[003,005-007]-ib,login1 begins with
    gpu003-ib.
    """
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


@dataclass(frozen=True)
class Job:
    """What `makd slurm submit` asks of SLURM, and what it runs."""

    arguments: tuple[str, ...]
    """Of the command; without --config, seed and run_dir where a sweep has them."""
    command: str = "train"
    """Of makd: train, or compare."""
    nodes: int = 1
    ranks: int = 1
    """On each node, as are the GPUs."""
    gpus: int = 0
    notice: int = 120
    """Seconds before the time limit at which the ranks are told to save."""
    name: str = "makd"
    output: str | None = None
    options: tuple[str, ...] = ()
    """Of sbatch, as on its command line: --time=1:00:00."""
    modules: tuple[str, ...] = ()
    venv: str = ""
    container: str = ""
    runner: str = RUNNERS[0]
    python: str = "python"
    variables: tuple[tuple[str, str], ...] = ()
    configs: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    runs: str = "runs"
    """The folder of a sweep's run folders."""
    rows: tuple[int, ...] = ()
    """Of a comparison, by number: an array task for each."""
    at_once: int | None = None
    """Of a sweep's runs or a comparison's rows, at most."""

    @property
    def tasks(self) -> tuple[int, ...]:
        """The numbers of the array's tasks; none: it is no array."""
        return self.rows or tuple(range(len(self.configs) * len(self.seeds)))


def render(job: Job) -> str:
    """The batch script. Raises UserError for what an #SBATCH line cannot carry."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    directives = [index for index, line in enumerate(lines) if line.startswith("#SBATCH")]
    start, end = lines.index("# settings"), lines.index("# end of settings")
    return "\n".join(
        [
            *lines[: directives[0]],
            *(_directive(option) for option in _options(job)),
            *lines[directives[-1] + 1 : start + 1],
            *_settings(job),
            *lines[end:],
            "",
        ]
    )


def submit(script: str) -> str:
    """Hands a script to sbatch; the job's number. Raises UserError where there is no sbatch, or
    with its words where it refuses.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError("no sbatch found; run this where SLURM's commands are, or add --dry-run")
    done = subprocess.run([sbatch, "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise UserError(f"sbatch refused the job: {words}")
    return done.stdout.strip().split(";")[0]


def _options(job: Job) -> list[str]:
    """Of sbatch; the caller's own come last, where they win."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        "--requeue",
        f"--signal=TERM@{job.notice}",
        "--open-mode=append",
        f"--output={job.output or ('%x-%A_%a.log' if job.tasks else '%x-%j.log')}",
    ]
    if job.tasks:
        limit = f"%{job.at_once}" if job.at_once else ""
        options.append(f"--array={_ranges(job.tasks)}{limit}")
    return [*options, *job.options]


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as SLURM writes them: 0-3,7,9-10."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(str(end) for end in part) for part in parts)


def _directive(option: str) -> str:
    """sbatch has its own rules for quotes in these lines; what would need any is refused."""
    if not re.fullmatch(r"--?[a-zA-Z][\w.,:@=/%+*&|()\[\]~^-]*", option, re.ASCII):
        raise UserError(
            f"{option!r}: no option that an #SBATCH line can carry; it looks like --name=value, "
            "without spaces and quotes"
        )
    return f"#SBATCH {option}"


def _settings(job: Job) -> list[str]:
    """The shell's variables, quoted. Raises UserError for a wrong name of a variable."""
    for name, value in job.variables:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
            raise UserError(f"--env {name}={value}: {name!r} is no name of a variable")
    return [
        f"modules={_array(job.modules)}",
        f"venv={shlex.quote(job.venv)}",
        f"container={shlex.quote(job.container)}",
        f"runner={shlex.quote(job.runner)}",
        f"python={shlex.quote(job.python)}",
        f"configs={_array(job.configs)}",
        f"seeds={_array([str(seed) for seed in job.seeds])}",
        f"runs={shlex.quote(job.runs)}",
        f"command={shlex.quote(job.command)}",
        f"variables={_array([f'{name}={value}' for name, value in job.variables])}",
        f"arguments={_array(job.arguments)}",
    ]


def _array(values: Sequence[str]) -> str:
    return f"({shlex.join(values)})"
