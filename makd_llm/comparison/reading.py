"""What the runs of a comparison have left behind, row by row."""

from collections import Counter
from dataclasses import dataclass, field

from makd_llm.comparison.grid import Grid, Item, Row, student_place
from makd_llm.comparison.left import Damaged, measured_of, steps_of
from makd_llm.comparison.record import Stamps
from makd_llm.evaluation.measured import Measured

STATES = ("done", "failed", "waiting")


@dataclass(frozen=True)
class Found:
    """What there is of a row.

    Attributes:
        state, error: one of STATES, and where it failed the run's last words, or what is damaged.
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
    return _comparable([_read(grid, stamps, row) for row in grid.rows])


def _read(grid: Grid, stamps: Stamps, row: Row) -> Found:
    if row.item is not None:
        return _of_run(grid, stamps, row, row.item, "student")
    name = grid.lead if row.baseline == "lead" else str(row.baseline)
    keeps = [k for k in grid.config.keep_ratios if row.keep_ratio in (None, k)]
    found = [_of_run(grid, stamps, row, grid.shared[student_place(k)], name) for k in keeps]
    return min(found, key=lambda one: STATES.index(one.state))


def _of_run(grid: Grid, stamps: Stamps, row: Row, item: Item, name: str) -> Found:
    """What a run has left of a model, and of its learning where it is the row's own. A run that is
    done and has left something else than that has failed the row.
    """
    record = stamps.record_of(item)
    if record is None or record.state == "running":
        return Found(row, "waiting")
    if record.state == "failed":
        return Found(row, "failed", record.why)
    try:
        measured = measured_of(grid, item, name)
        steps = steps_of(grid, item) if item is row.item else []
    except Damaged as damaged:
        return Found(row, "failed", str(damaged))
    return Found(
        row,
        "done",
        None,
        measured,
        tokens=[step.tokens for step in steps],
        seconds=[step.seconds for step in steps],
        peak_memory_MB=max(
            (step.peak_memory_MB for step in steps if step.peak_memory_MB is not None),
            default=None,
        ),
    )


def _comparable(rows: list[Found]) -> list[Found]:
    """The rows, of which those that were measured on fewer or more documents than most have failed:
    tests are of pairs.
    """
    for name in ("rougeLsum", "nats"):
        sizes = Counter(
            len(one.measured.scores[name])
            for one in rows
            if one.measured and name in one.measured.scores
        )
        usual = max(sizes, key=sizes.__getitem__, default=0)
        rows = [
            Found(
                one.row,
                "failed",
                f"its measurement is of {size} documents, that of others of {usual}; delete its "
                "folder, or theirs",
            )
            if one.measured and (size := len(one.measured.scores.get(name, ()))) not in (0, usual)
            else one
            for one in rows
        ]
    return rows
