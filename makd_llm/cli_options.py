"""What the commands share: options, and how a signal ends them."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from makd_llm.errors import Interrupted
from makd_llm.stages import STAGES

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def presets() -> list[str]:
    """Their names, for the shell to complete: by the files, since the shell waits."""
    return sorted(path.stem for path in (Path(__file__).parent / "config/presets").glob("*.yaml"))


def stages() -> list[str]:
    """Likewise those of a run."""
    return list(STAGES)


def stop_at_signals() -> None:
    """SIGINT too: click would turn it into an end like any other."""
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, _stop)


def _stop(number: int, frame: object) -> None:
    raise Interrupted("stopped; the same command goes on from what is finished")
