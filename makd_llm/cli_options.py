"""Options that the commands share, and what the shell completes of them."""

from pathlib import Path
from typing import Annotated

import typer

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
