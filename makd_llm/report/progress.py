"""How far long work has come, and how long it will take: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from makd_llm import distributed

SECONDS_BETWEEN_LINES = 20.0


def bar_if_watched(*, refreshing: bool = True) -> Progress | None:
    """A bar on standard error, whose tasks have a field `said`; None where that is no terminal.
    refreshing: by a thread of its own; else where `refresh` is called.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
        console=console,
        auto_refresh=refreshing,
    )


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[..., None]]:
    """Gives a function to be called after each of `total` units, or with a number of them. Only
    rank 0 shows anything.
    """
    if not distributed.is_main():
        yield lambda units=1: None
        return
    if shown := bar_if_watched():
        with shown as bar:
            task = bar.add_task(label, total=total, said="")
            yield lambda units=1: bar.advance(task, units)
        return
    started = spoken = time.monotonic()
    done = 0

    def advance(units: int = 1) -> None:
        nonlocal done, spoken
        done += units
        now = time.monotonic()
        if now - spoken >= SECONDS_BETWEEN_LINES and done < total:
            spoken = now
            left = (now - started) / done * (total - done)
            print(f"{label} {done}/{total}  left {left:.0f} s", file=sys.stderr, flush=True)

    yield advance
