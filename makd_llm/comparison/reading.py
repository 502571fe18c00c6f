"""What the runs of a comparison have left behind, row by row."""

import json
from dataclasses import dataclass, field
from typing import Any

from makd_llm.comparison.grid import Grid, Item, Row, student_place
from makd_llm.comparison.record import Stamps, read_record
from makd_llm.evaluation.measured import Measured, read_measured

STATES = ("done", "failed", "waiting")


@dataclass(frozen=True)
class Found:
    """What there is of a row.

    Attributes:
        state, error: one of STATES, and the run's last words where it failed.
        measured: of the student, or of the baseline; None unless it is done.
        tokens, seconds: of every step of its distil stage, over all ranks.
        peak_memory_MB: of that stage, of the rank that needed most; None where it is not known.
    """

    row: Row
    state: str
    error: str | None = None
    measured: Measured | None = None
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_memory_MB: float | None = None


def read_rows(grid: Grid) -> list[Found]:
    """All rows of the grid, in its order. What was made under another config is not done."""
    stamps = Stamps(grid)
    return [_read(grid, stamps, row) for row in grid.rows]


def _read(grid: Grid, stamps: Stamps, row: Row) -> Found:
    if row.item is not None:
        state, error, measured = _state(grid, stamps, row.item, "student")
        trained = _trained(grid, row.item) if measured is not None else {}
        return Found(row, state, error, measured, **trained)
    name = grid.lead if row.baseline == "lead" else str(row.baseline)
    keeps = [k for k in grid.config.keep_ratios if row.keep_ratio in (None, k)]
    found = [_state(grid, stamps, grid.shared[student_place(k)], name) for k in keeps]
    return Found(row, *min(found, key=lambda one: STATES.index(one[0])))


def _state(
    grid: Grid, stamps: Stamps, item: Item, name: str
) -> tuple[str, str | None, Measured | None]:
    """How far a run is, the error, and what it has measured of a model."""
    folder = grid.folder / item.place
    if stamps.stands(item):
        measured = read_measured(folder / "measured" / f"{name}.json")
        return ("waiting", None, None) if measured is None else ("done", None, measured)
    record = read_record(folder)
    if record is not None and record.state == "failed" and record.stamp == stamps.of(item):
        return "failed", record.error, None
    return "waiting", None, None


def _trained(grid: Grid, item: Item) -> dict[str, Any]:
    """What the distil stage took, by metrics.jsonl."""
    path = grid.folder / item.place / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["stage"] == "distil"]
    peaks = [line["peak_memory_MB"] for line in steps if "peak_memory_MB" in line]
    return {
        "tokens": [line["tokens"] for line in steps],
        "seconds": [line["seconds"] for line in steps],
        "peak_memory_MB": max(peaks, default=None),
    }
