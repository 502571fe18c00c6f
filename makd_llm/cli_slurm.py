"""`makd slurm submit` and `makd slurm compare`: a run, a sweep or a comparison as batch jobs."""

import io
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from makd_llm import cli_compare as compared
from makd_llm.cli_options import Debug, Overrides
from makd_llm.cluster.slurm import RUNNERS, Job, render
from makd_llm.cluster.slurm import submit as hand_to_sbatch
from makd_llm.errors import UserError
from makd_llm.redaction import names_a_secret, without_secrets
from makd_llm.stages import STAGES

slurm = typer.Typer(help="Runs as batch jobs of SLURM.", no_args_is_help=True)

AtOnce = Annotated[
    int | None, typer.Option("--at-once", min=1, help="Of an array's runs, at most.")
]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="How many.")]
Gpus = Annotated[int, typer.Option("--gpus", min=0, help="Of each node.")]
Ranks = Annotated[
    int | None, typer.Option("--ranks", min=1, help="On each node; default: its GPUs, or 1.")
]
Notice = Annotated[
    int,
    typer.Option("--notice", min=0, help="Seconds before the time limit for a step and saving."),
]
Name = Annotated[str, typer.Option("--name", help="The job's.")]
Output = Annotated[
    str | None, typer.Option("--output", help="The log file, with sbatch's % patterns.")
]
Sbatch = Annotated[
    list[str] | None,
    typer.Option("--sbatch", help="Any option of sbatch: --sbatch=--time=1:00:00; repeatable."),
]
Modules = Annotated[
    list[str] | None, typer.Option("--module", help="For `module load`; repeatable.")
]
Venv = Annotated[str, typer.Option("--venv", help="A virtual environment; default: this Python.")]
Container = Annotated[str, typer.Option("--container", help="An image to run in.")]
Runner = Annotated[str, typer.Option("--runner", help=f"Of the container: {', '.join(RUNNERS)}.")]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", help="NAME=VALUE for the ranks, e.g. NCCL_SOCKET_IFNAME=ib0."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the script and submit nothing.")]


@slurm.command()
def submit(
    ds: Annotated[Path, typer.Option("--ds", help="DeepSpeed's JSON, as of `makd train`.")],
    overrides: Overrides = None,
    config: Annotated[
        list[str] | None, typer.Option("--config", help="The run's YAML; several: a sweep.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="A sweep over seeds: --seed 0 --seed 1 ...")
    ] = None,
    runs: Annotated[str, typer.Option("--runs", help="The folder of a sweep's runs.")] = "runs",
    at_once: AtOnce = None,
    until: Annotated[str, typer.Option("--until", help="The last stage.")] = STAGES[-1],
    preset: Annotated[
        str | None, typer.Option("--preset", help="What is learnt: distil.preset.")
    ] = None,
    nodes: Nodes = 1,
    gpus: Gpus = 0,
    ranks: Ranks = None,
    notice: Notice = 120,
    name: Name = "makd",
    output: Output = None,
    sbatch: Sbatch = None,
    module: Modules = None,
    venv: Venv = "",
    container: Container = "",
    runner: Runner = RUNNERS[0],
    env: Env = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Renders slurm/distil.sbatch for a run and hands it to sbatch. What is pre-empted, or comes
    near its time limit, saves, is queued again and goes on.
    """
    if until not in STAGES:
        raise UserError(f"--until {until}: not one of {', '.join(STAGES)}")
    configs, seeds = tuple(config or ()), tuple(seed or ())
    sweep = len(configs) > 1 or bool(seeds)
    arguments = ["--ds", str(ds), "--until", until]
    if preset is not None:
        arguments += ["--preset", preset]
    if sweep:
        _check_sweep(configs, overrides or [])
    elif configs:
        arguments += ["--config", configs[0]]
    job = _job(
        (*arguments, *(overrides or [])),
        nodes=nodes,
        gpus=gpus,
        ranks=ranks,
        notice=notice,
        name=name,
        output=output,
        options=tuple(sbatch or ()),
        modules=tuple(module or ()),
        venv=venv,
        container=container,
        runner=runner,
        variables=env or [],
        at_once=at_once,
    )
    if sweep:
        job = replace(job, configs=configs, seeds=seeds or (0,), runs=runs)
    script = render(job)
    # DeepSpeed says that a login node has no GPU, and says it where the script is to go.
    with redirect_stdout(io.StringIO()):
        _check_runs(ds, configs, overrides or [], preset, nodes * job.ranks)
    if dry_run:
        print(script, end="")
        return
    number = hand_to_sbatch(script)
    print(f"submitted: job {number}" + (f", {len(job.tasks)} runs" if job.tasks else ""))


@slurm.command()
def compare(
    config: compared.Config,
    overrides: Overrides = None,
    rows: compared.Rows = None,
    keep: compared.Keep = None,
    seeds: compared.Seeds = None,
    folder: compared.Folder = None,
    ds: compared.Ds = None,
    at_once: AtOnce = None,
    nodes: Nodes = 1,
    gpus: Gpus = 0,
    ranks: Ranks = None,
    notice: Notice = 120,
    name: Name = "makd-compare",
    output: Output = None,
    sbatch: Sbatch = None,
    module: Modules = None,
    venv: Venv = "",
    container: Container = "",
    runner: Runner = RUNNERS[0],
    env: Env = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """A comparison as two jobs: what its rows share, and an array with a task for each row, which
    waits for the first. Rows that stand are left out.
    """
    job = _job(
        (),
        nodes=nodes,
        gpus=gpus,
        ranks=ranks,
        notice=notice,
        name=name,
        output=output,
        options=tuple(sbatch or ()),
        modules=tuple(module or ()),
        venv=venv,
        container=container,
        runner=runner,
        variables=env or [],
        at_once=at_once,
        command="compare",
    )
    # What DeepSpeed says of a login node without a GPU is not to be in the script's place.
    with redirect_stdout(io.StringIO()):
        asked = compared.Asked(config, overrides or [], nodes * job.ranks, folder, ds)
        todo = asked.todo(rows, keep, seeds)
    job = replace(job, arguments=tuple(asked.arguments))
    jobs = {}
    if todo.shared:
        jobs["what the rows share"] = replace(job, arguments=(*job.arguments, "--prepare"))
    if todo.rows:
        jobs[f"{len(todo.rows)} rows"] = replace(job, rows=todo.rows)
    if not jobs:
        print("nothing to submit: every row stands")
    waits: tuple[str, ...] = ()
    for words, one in jobs.items():
        script = render(replace(one, options=(*one.options, *waits)))
        if dry_run:
            print(script, end="")
            continue
        number = hand_to_sbatch(script)
        print(f"submitted: job {number}, {words}")
        waits = (f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes")


def _job(
    arguments: tuple[str, ...],
    *,
    gpus: int,
    ranks: int | None,
    venv: str,
    container: str,
    runner: str,
    variables: list[str],
    options: tuple[str, ...],
    **more: Any,
) -> Job:
    """A job as the options ask for it. Raises UserError."""
    for option in options:
        if (shown := without_secrets(option)) != option:
            raise _secret(f"--sbatch={shown}")
    if runner not in RUNNERS:
        raise UserError(f"--runner {runner}: not one of {', '.join(RUNNERS)}")
    if container and venv:
        raise UserError("--container and --venv: the Python is the container's own; name one")
    return Job(
        arguments,
        ranks=ranks or gpus or 1,
        gpus=gpus,
        venv=venv,
        container=container,
        runner=runner,
        # With modules too: what they load is for this Python to find.
        python="python" if container or venv else sys.executable,
        variables=tuple(_pair(given) for given in variables),
        options=options,
        **more,
    )


def _check_sweep(configs: tuple[str, ...], overrides: list[str]) -> None:
    if not configs:
        raise UserError("--config is missing; a sweep's run folders have its name")
    names = [Path(config).stem for config in configs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two --config are called {twice}, and so would be their run folders")
    for override in overrides:
        if override.partition("=")[0] in ("seed", "run_dir"):
            raise UserError(f"{override}: a sweep has its own; see --seed and --runs")


def _check_runs(
    ds: Path, configs: tuple[str, ...], overrides: list[str], preset: str | None, ranks: int
) -> None:
    """What is wrong with a run is said here, and not after a night in the queue."""
    from makd_llm.checks import check_settings
    from makd_llm.config import load_config
    from makd_llm.train.build import build_shape
    from makd_llm.train.deepspeed_config import read_deepspeed_config, training_config

    deepspeed = read_deepspeed_config(ds)
    named = [] if preset is None else [f"distil.preset={preset}"]
    for config in configs or (None,):
        run = load_config(Path(config) if config else None, [*named, *overrides])
        build_shape(run.student)
        check_settings(run, deepspeed, ds)
        for section, stage in (("sft", run.sft), ("distil", run.distil)):
            if section == "distil" or run.sft.enabled:
                training_config(
                    deepspeed, stage.train, world_size=ranks, ds_path=ds, section=f"{section}.train"
                )


def _pair(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not equals:
        raise UserError(f"--env {shlex.quote(given)}: not of the form NAME=VALUE")
    if names_a_secret(name) or without_secrets(value) != value:
        raise _secret(f"--env {name}")
    return name, value


def _secret(given: str) -> UserError:
    return UserError(
        f"{given} looks like a secret, which would stand in the script that SLURM keeps; leave it "
        "out and set it in the environment, which sbatch hands on by itself"
    )
