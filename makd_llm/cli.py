"""The command line: `makd …`, and `train.py` for the deepspeed launcher.

Whatever a person can get wrong ends in one line and exit code 2; `--debug` shows the traceback.
Other exit codes: 75 after SIGTERM or SIGINT (the state is saved), 65 where training diverged, 69
where a server did not answer, 74 where another rank did not, 71 where memory was missing.
"""

import json
import logging
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from makd_llm.cli_compare import compare
from makd_llm.cli_doctor import doctor
from makd_llm.cli_generate import generate
from makd_llm.cli_options import Debug, Overrides, presets, stages
from makd_llm.cli_plan import plan
from makd_llm.cli_report import report
from makd_llm.cli_slurm import slurm
from makd_llm.cluster.slurm import rendezvous
from makd_llm.errors import RunEnded, UserError
from makd_llm.files import FULL
from makd_llm.redaction import without_secrets
from makd_llm.signals import stop_at_signals
from makd_llm.stages import STAGES

# typer brings its own copy of click; this is the base of its usage errors, whichever click that is.
UsageError: Any = typer.BadParameter.__bases__[0]

# In a checkout; an installed wheel has no configs, and there --config must be given.
DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distils a large language model into a small low-rank student.",
    no_args_is_help=True,
)

Ds = Annotated[
    Path, typer.Option("--ds", help="DeepSpeed's JSON, for example ds_configs/zero3.json.")
]
Config = Annotated[
    Path | None, typer.Option("--config", help="The run's YAML; without it, the demo.")
]
LocalRank = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]


def _run(ds: Path, config: Path | None, overrides: list[str], until: str) -> None:
    from makd_llm.config import load_config

    if config is None and not DEFAULT_CONFIG.is_file():
        raise UserError("--config is missing; the demo's config lies in a checkout, not in a wheel")
    checked = load_config(config or DEFAULT_CONFIG, overrides)
    from makd_llm import distributed
    from makd_llm.pipeline import Run

    distributed.quiet()
    # While a stage trains, the loop takes these over: it finishes the step and saves.
    stop_at_signals()
    run = Run(checked, ds)
    with distributed.joined():
        run.execute(until)


@app.command()
def train(
    ds: Ds,
    config: Config = None,
    overrides: Overrides = None,
    until: Annotated[
        str,
        typer.Option(
            "--until", help=f"The last stage: {', '.join(STAGES)}.", autocompletion=stages
        ),
    ] = "evaluate",
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="What is learnt: distil.preset; configs/presets has them.",
            autocompletion=presets,
        ),
    ] = None,
    local_rank: LocalRank = 0,
    debug: Debug = False,
) -> None:
    """The whole run: sft, shape, factorize, write, teach, distil, export, evaluate. Stages whose
    result stands are skipped.
    """
    if until not in STAGES:
        raise UserError(f"--until {until}: not one of {', '.join(STAGES)}")
    named = [] if preset is None else [f"distil.preset={preset}"]
    _run(ds, config, [*named, *(overrides or [])], until)


@app.command()
def sft(
    ds: Ds,
    config: Config = None,
    overrides: Overrides = None,
    local_rank: LocalRank = 0,
    debug: Debug = False,
) -> None:
    """Tunes the teacher on the task, and stops there: `train --until sft`."""
    _run(ds, config, overrides or [], "sft")


@app.command()
def factorize(
    teacher: Annotated[
        str, typer.Argument(help="The model: builtin:NAME, a folder, a .gguf file or a Hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The student's folder.")],
    keep: Annotated[
        float, typer.Option("--keep", help="Share of the factorized matrices' parameters to keep.")
    ] = 0.5,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="svd, fwsvd, asvd, whitened, fisher, sequential or refitted."
        ),
    ] = "fisher",
    data: Annotated[
        str | None, typer.Option("--data", help="To calibrate on: a .txt file, or records.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="To measure the loss on: likewise.")
    ] = None,
    budget: Annotated[
        str,
        typer.Option("--budget", help="uniform, greedy (least error) or sensitivity (least loss)."),
    ] = "greedy",
    rank_multiple: Annotated[int, typer.Option(help="All ranks are multiples of it.")] = 16,
    refine: Annotated[
        int, typer.Option("--refine", help="Epochs of local training of each layer afterwards.")
    ] = 0,
    embedding: Annotated[
        float | None,
        typer.Option(help="Share of the embedding (and head) to keep; default: all, dense."),
    ] = None,
    stages: Annotated[
        bool,
        typer.Option(
            "--stages", help="Also measure plain SVD, whitening, ... on the way; needs --held-out."
        ),
    ] = False,
    samples: Annotated[int, typer.Option(help="Windows or records to calibrate on.")] = 256,
    window: Annotated[
        int | None, typer.Option(help="Tokens of a window or record; default: 2048, or all it has.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows that go through a layer together.")] = 4,
    dtype: Annotated[str, typer.Option(help="In which the layers run: bfloat16 or float32.")] = (
        "bfloat16"
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print factorization.json instead of the table.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Cuts a low-rank student from a teacher and a text. For several ranks: `torchrun
    --nproc-per-node N -m makd_llm.cli factorize ...`.
    """
    import torch

    from makd_llm import distributed
    from makd_llm.config import StudentConfig, checked
    from makd_llm.factorization import TextSettings, factorize_model
    from makd_llm.report.table import factorization_table, rank_table, show, stages_table
    from makd_llm.train.build import build_recipe

    settings = checked(
        StudentConfig,
        {
            "keep_ratio": keep,
            "method": method,
            "budget": budget,
            "rank_multiple": rank_multiple,
            "refine": {"epochs": refine} if refine else None,
            "embedding": embedding,
        },
    )
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in known:
        raise UserError(f"--dtype {dtype}: not one of {', '.join(known)}")
    if min(samples, batch) < 1 or (window is not None and window < 2):
        raise UserError("--samples and --batch are at least 1, --window at least 2")
    distributed.quiet()
    stop_at_signals()
    with distributed.joined():
        text = TextSettings(data, held_out, samples, window, batch)
        report = factorize_model(
            teacher, out, build_recipe(settings), text, dtype=known[dtype], stages=stages
        )
        if distributed.is_main():
            if as_json:
                print(json.dumps(report, indent=1))
            else:
                show(rank_table(report))
                show(factorization_table(report))
                if stages:
                    show(stages_table(report["held_out"]["stages"]))


app.command()(compare)
app.command()(generate)
app.command()(plan)
app.command()(doctor)
app.command()(report)
app.add_typer(slurm, name="slurm")


@app.command()
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    against: Annotated[
        Path | None,
        typer.Option(help="Another run: the students' differences, paired by document."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Shows the table of a finished run, or (`--against`) whether its student differs from that of
    another run, and how sure that is.
    """
    from makd_llm.report.table import show_differences, show_evaluation

    if against is not None:
        from makd_llm.evaluation.against import students_apart

        apart = students_apart(run_dir, against)
        if as_json:
            print(json.dumps({name: asdict(one) for name, one in apart.items()}, indent=1))
        else:
            show_differences(apart, str(run_dir), str(against))
        return
    path = run_dir / "evaluation.json"
    if not path.is_file():
        raise UserError(
            f"{path}: missing; run `makd train` with run_dir={run_dir} to the end first"
        )
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: damaged; delete it, and `makd train` measures again") from None
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        show_evaluation(found)


@app.command()
def export(
    student: Annotated[Path, typer.Argument(help="A factored student's folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Dense weights in the teacher's architecture.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; default: as it is.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Writes a student anew: factored, or (`--merge`) as a dense model that stock transformers
    loads.
    """
    import torch

    from makd_llm.checkpoint import export as exporting

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype is not None and dtype not in known:
        raise UserError(f"--dtype {dtype}: not one of {', '.join(known)}")
    write = exporting.merge if merge else exporting.rewrite
    write(student, out, dtype=known[dtype] if dtype else None)
    print(f"written: {out}")


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; every expected end of a run becomes one line and its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = typer.main.get_command(app)
    debug = "--debug" in arguments
    # Where it finds no GPU it says so on standard output, which is a table's or JSON's.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    try:
        os.environ.update(rendezvous(os.environ))
        command.main(arguments, prog_name="makd", standalone_mode=False)
    except RunEnded as ended:
        if debug:
            raise
        _end(str(ended), ended.exit_code, alone=ended.alone)
    except UsageError as wrong:
        _end(f"{wrong.format_message()} (makd --help shows what there is)", 2)
    except typer.Abort:
        _end("interrupted; run the same command again to go on", 75)
    except OSError as error:
        if debug or error.errno not in FULL:
            _fail(debug=debug)
        where = error.filename or "a file of the run"
        _end(
            f"{where}: {error.strerror}; free some space or mend its rights, and the same command "
            "goes on",
            2,
        )
    except Exception:  # noqa: BLE001 - whatever it is, it ends this rank
        _fail(debug=debug)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _fail(*, debug: bool) -> NoReturn:
    """What is raised is a defect of the program: its traceback, and the end of this rank. One of
    several ends at once: to leave the group in good order it would wait for the others.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if debug and not several:
        raise
    sys.stdout.flush()
    print(without_secrets(traceback.format_exc()), file=sys.stderr, flush=True)
    if several:
        os._exit(1)
    sys.exit(1)


def _end(message: str, code: int, *, alone: bool = False) -> None:
    """One line, from one rank: the launcher ends the others as soon as one exits, and rank 0 speaks
    first. alone: the others may not know, so this one does not wait.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and int(os.environ.get("RANK", "0")) != 0 and not alone:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
        time.sleep(5)
    print(f"makd: {without_secrets(' '.join(message.split()))}", file=sys.stderr, flush=True)
    if several:
        sys.stdout.flush()
        os._exit(code)  # a peer that waits in a collective must not keep this rank from ending
    sys.exit(code)


if __name__ == "__main__":
    main()
