"""What the commands share: options, and how a signal ends them."""

import signal
from typing import Annotated

import typer

from makd_llm.errors import Interrupted

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def stop_at_signals() -> None:
    """SIGINT too: click would turn it into an end like any other."""
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, _stop)


def _stop(number: int, frame: object) -> None:
    raise Interrupted("stopped; the same command goes on from what is finished")
