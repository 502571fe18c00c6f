"""`makd compare`: rows that differ in what the student learns, and a table of what came of it."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from makd_llm.cli_options import Debug, Overrides
from makd_llm.errors import RowsFailed, UserError
from makd_llm.signals import stop_at_signals

if TYPE_CHECKING:
    from makd_llm.comparison.grid import Grid

T = TypeVar("T")


Config = Annotated[Path, typer.Argument(help="The comparison's YAML, as configs/compare/*.")]
Rows = Annotated[str | None, typer.Option("--rows", help="Only these rows: kd,makd; default: all.")]
Keep = Annotated[str | None, typer.Option("--keep", help="Only these keep ratios: 0.5,0.3.")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Only these seeds: 0,1.")]
Folder = Annotated[
    Path | None, typer.Option("--folder", help="Where it is made, instead of `folder`.")
]
Ds = Annotated[Path | None, typer.Option("--ds", help="DeepSpeed's JSON, instead of `ds`.")]


class Asked:
    """A comparison as the options ask for it. Raises UserError where it is wrong."""

    def __init__(
        self,
        config: Path,
        overrides: list[str],
        ranks: int | None = None,
        folder: Path | None = None,
        ds: Path | None = None,
    ) -> None:
        from makd_llm.comparison.grid import build_grid
        from makd_llm.config import load_comparison
        from makd_llm.files import nearest

        given = {"folder": folder, "ds": ds}
        changed = {name: value for name, value in given.items() if value is not None}
        self.arguments = [
            str(config),
            *(f"--{name}={value}" for name, value in changed.items()),
            *overrides,
        ]
        """Of the command that makes one of its rows."""
        checked = load_comparison(config, overrides)
        self.grid = build_grid(
            checked.model_copy(update=changed | ({"ranks": ranks} if ranks else {}))
        )
        if not (there := nearest(self.grid.folder)).is_dir():
            raise UserError(f"folder {self.grid.folder}: {there} is no folder; name another")

    def part(self, rows: str | None, keep: str | None, seeds: str | None) -> "Grid":
        """What of it was chosen."""
        return self.grid.chosen(
            _listed("--rows", rows, str),
            _listed("--keep", keep, float),
            _listed("--seeds", seeds, int),
        )

    def todo(self, rows: str | None, keep: str | None, seeds: str | None) -> "Todo":
        """What of it is not there yet, checked."""
        from makd_llm.comparison.checks import check
        from makd_llm.comparison.record import Stamps

        part, stamps = self.part(rows, keep, seeds), Stamps(self.grid)
        for sentence in check(part, stamps):
            _tell(sentence)
        numbers = {item.place: number for number, item in enumerate(self.grid.runs)}
        left = [item.place for item in part.needed() if not stamps.stands(item)]
        return Todo(
            any(place not in numbers for place in left),
            tuple(sorted(numbers[place] for place in left if place in numbers)),
        )


@dataclass(frozen=True)
class Todo:
    """Whether something that rows share is to be made, and the numbers of the rows that are."""

    shared: bool
    rows: tuple[int, ...]


def compare(
    config: Config,
    overrides: Overrides = None,
    rows: Rows = None,
    keep: Keep = None,
    seeds: Seeds = None,
    folder: Folder = None,
    ds: Ds = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Processes of a row, instead of `ranks`.")
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
    alone = {
        "--row": row is not None,
        "--prepare": prepare,
        "--collect": collect,
        "--dry-run": dry_run,
    }
    if len(asked := [name for name, given in alone.items() if given]) > 1:
        raise UserError(f"{' and '.join(asked)}: each is all that a call does; give one of them")
    wanted = Asked(config, overrides or [], ranks, folder, ds)
    grid, part = wanted.grid, wanted.part(rows, keep, seeds)
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
    if collect and not grid.folder.is_dir():
        raise UserError(f"folder {grid.folder}: not there, so nothing is to be collected; name it")
    if not collect:
        _make(grid, part, ["compare", *wanted.arguments])
    found = publish(grid)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        show_comparison(found)
    _say_failures(grid, part, found)


def _say_failures(grid: "Grid", part: "Grid", found: dict[str, Any]) -> None:
    """Raises RowsFailed where one of the part's rows could not be made."""
    asked = {row.words for row in part.rows}
    failed = {
        row.words: value["error"]
        for row, value in zip(grid.rows, found["rows"], strict=True)
        if row.words in asked and value["state"] == "failed"
    }
    if failed:
        name, error = next(iter(failed.items()))
        raise RowsFailed(
            f"{len(failed)} of {len(asked)} rows failed, first {name}: {error}; the others stand, "
            "and makd compare tries these again"
        )


def _make(grid: "Grid", part: "Grid", arguments: list[str]) -> None:
    """Makes the rows of a part of the grid."""
    from makd_llm.comparison.checks import check
    from makd_llm.comparison.launching import launcher, make
    from makd_llm.comparison.record import Stamps
    from makd_llm.files import claimed

    with claimed(grid.folder, "folder"):
        for sentence in check(part, Stamps(grid)):
            _tell(sentence)
        ranks = grid.config.ranks
        make(
            grid,
            part.needed(),
            lambda item: launcher(ranks, [*arguments, "--row", item.place]),
            _tell,
        )


def _tell(text: str) -> None:
    """Beside the table, which goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def _listed(option: str, given: str | None, kind: Callable[[str], T]) -> list[T] | None:
    """The values of an option, which commas part."""
    if given is None:
        return None
    try:
        return [kind(value) for value in given.split(",")]
    except ValueError:
        example = "0,1" if kind is int else "0.5,0.3"
        raise UserError(
            f"{option} {given}: expected numbers that commas part, as {example}"
        ) from None
