"""One run of a comparison, in the ranks that some launcher has started. Collective."""

import shutil
import time

from makd_llm import distributed
from makd_llm.comparison.grid import Grid, Item
from makd_llm.comparison.left import damage
from makd_llm.comparison.record import Record, Stamps, write_record
from makd_llm.comparison.results import publish
from makd_llm.comparison.sharing import same_cut, take_measured, take_over
from makd_llm.errors import Interrupted, RunEnded, UserError
from makd_llm.files import claimed
from makd_llm.pipeline import Run
from makd_llm.stages import Stages

CLAIM = ".row.lock"
"""Held while a run of a comparison is at work, from before it takes anything over."""


def item_named(grid: Grid, name: str) -> Item:
    """A run by its place, its row's name, or its row's number. Raises UserError."""
    runs = grid.runs
    if name.isdecimal() and int(name) < len(runs):
        return runs[int(name)]
    for item in (*runs, *grid.shared.values()):
        if name in (item.place, item.place.removeprefix("rows/")):
            return item
    raise UserError(
        f"--row {name}: no run of this comparison; 0 to {len(runs) - 1}, or a name that --dry-run "
        "prints"
    )


def run_item(grid: Grid, item: Item) -> None:
    """Makes one run, or goes on with it, and writes down how it ended.

    Raises UserError where another process is at work on it, or what it needs is not there;
    otherwise as a run does.
    """
    folder = grid.folder / item.place
    with claimed(folder, "folder", CLAIM):
        stamp, stands = distributed.on_main(_prepare, grid, item)
        if stands:
            Run.tell(f"{item.place}: stands")
            return
        started = time.monotonic()
        try:
            Run(item.config, grid.config.ds).execute(item.until)
        except Interrupted:
            raise
        except Exception as error:
            if distributed.is_main():
                said = (
                    str(error)
                    if isinstance(error, RunEnded)
                    else f"{type(error).__name__}: {error}"
                )
                write_record(folder, Record("failed", stamp, said))
                publish(grid)
            raise
        seconds = time.monotonic() - started
        distributed.on_main(_finish, grid, item, Record("done", stamp, seconds=seconds))


def run_shared(grid: Grid) -> None:
    """Makes all that rows share, one after the other."""
    for item in grid.with_needs(list(grid.shared.values())):
        Run.tell(f"{item.place}:")
        run_item(grid, item)


def _prepare(grid: Grid, item: Item) -> tuple[str, bool]:
    """The stamp of the item, and whether it stands already."""
    stamps = Stamps(grid)
    folder = grid.folder / item.place
    if stamps.stands(item):
        return stamps.of(item), True
    damaged = damage(grid, item)
    if damaged is not None and Stages(folder).forget(damaged.stages):
        Run.tell(f"{damaged}; it is made again")
    if item.needs is not None:
        needs = grid.shared[item.needs]
        if not stamps.stands(needs):
            raise UserError(
                f"{item.place} needs {grid.folder / needs.place}, which is not made yet, or was "
                "made otherwise; run `makd compare` with --prepare first"
            )
        if needs.until == "baselines":
            take_over(grid.folder / needs.place, folder)
    if item.until == "baselines":  # the teacher is the same at every keep ratio
        for other in grid.shared.values():
            if other.until == item.until and other is not item and stamps.stands(other):
                folder.mkdir(parents=True, exist_ok=True)
                take_measured(grid.folder / other.place, folder, "teacher.json")
                break
    write_record(folder, Record("running", stamps.of(item)))
    return stamps.of(item), False


def _finish(grid: Grid, item: Item, record: Record) -> None:
    folder = grid.folder / item.place
    if item.needs is not None and item.until == "evaluate":
        assert same_cut(grid.folder / item.needs, folder), f"{folder}: cut anew"
    # Nothing of a finished run is gone on with, and two of them are twelve times the student.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    write_record(folder, record)
    publish(grid)
