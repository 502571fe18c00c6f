"""`makd compare`: rows that differ in what the student learns, and a table of what came of it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from makd_llm.cli_options import Debug, Overrides, stop_at_signals
from makd_llm.errors import RowsFailed, UserError

if TYPE_CHECKING:
    from makd_llm.comparison.grid import Grid

T = TypeVar("T")


def compare(
    config: Annotated[Path, typer.Argument(help="The comparison's YAML, as configs/compare/*.")],
    overrides: Overrides = None,
    rows: Annotated[
        str | None, typer.Option("--rows", help="Only these rows: kd,makd; default: all.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option("--keep", help="Only these keep ratios: 0.5,0.3.")
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Only these seeds: 0,1.")] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Processes of a row, instead of `ranks`.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where it is made, instead of `folder`.")
    ] = None,
    ds: Annotated[
        Path | None, typer.Option("--ds", help="DeepSpeed's JSON, instead of `ds`.")
    ] = None,
    row: Annotated[
        str | None,
        typer.Option("--row", help="Make this one, by name or number, in the ranks of this job."),
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Make what rows share, in the ranks of this job.")
    ] = False,
    collect: Annotated[
        bool, typer.Option("--collect", help="Make nothing: the table of what there is.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the grid and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print comparison.json instead of the table.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compares what a student can learn from one teacher, at equal tokens. Killed at any moment,
    the same command goes on. KEY.PATH=VALUE are settings of all rows, as of `makd train`.
    """
    from makd_llm.comparison.grid import build_grid
    from makd_llm.config import load_comparison

    checked = load_comparison(config, overrides or [])
    given = {"ranks": ranks, "folder": folder, "ds": ds}
    changed = {name: value for name, value in given.items() if value is not None}
    grid = build_grid(checked.model_copy(update=changed))
    part = grid.chosen(_listed(rows, str), _listed(keep, float), _listed(seeds, int))
    stop_at_signals()
    from makd_llm import distributed

    distributed.quiet()
    if row is not None or prepare:
        from makd_llm.comparison.running import item_named, run_item, run_shared

        with distributed.joined():
            if prepare:
                run_shared(grid)
            else:
                run_item(grid, item_named(grid, row or ""))
        return
    from makd_llm.comparison.results import publish, results
    from makd_llm.comparison.tables import show_comparison, show_grid

    if dry_run:
        show_grid(part, results(part))
        return
    failed: dict[str, str] = {}
    if not collect:
        # What a row's own process is started with; it knows by its name which one it is.
        own = [f"--{name}={value}" for name, value in changed.items()]
        arguments = ["compare", str(config), *own, *(overrides or [])]
        failed = _make(grid, part, arguments)
    found = publish(grid)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        show_comparison(found)
    if failed:
        place, error = next(iter(failed.items()))
        raise RowsFailed(
            f"{len(failed)} of the runs failed, first {place}: {error}; the others stand, and the "
            "same command tries these again"
        )


def _make(grid: "Grid", part: "Grid", arguments: list[str]) -> dict[str, str]:
    """Makes the rows of a part of the grid; the errors of those that failed, by place."""
    from makd_llm.comparison.checks import check
    from makd_llm.comparison.launching import launcher, make
    from makd_llm.comparison.record import Stamps
    from makd_llm.files import claimed

    with claimed(grid.folder, "folder"):
        for sentence in check(part, Stamps(grid)):
            _tell(sentence)
        ranks = grid.config.ranks
        return make(
            grid,
            part.needed(),
            lambda item: launcher(ranks, [*arguments, "--row", item.place]),
            _tell,
        )


def _tell(text: str) -> None:
    """Beside the table, which goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def _listed(given: str | None, kind: Callable[[str], T]) -> list[T] | None:
    """The values of an option, which commas part."""
    if given is None:
        return None
    try:
        return [kind(value) for value in given.split(",")]
    except ValueError:
        raise UserError(f"{given}: expected numbers that commas part, as 0.5,0.3") from None
