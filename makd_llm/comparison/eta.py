"""How long the rest of a comparison will take, by what its finished runs took."""

from collections.abc import Sequence
from statistics import fmean

from makd_llm.comparison.grid import Grid, Item
from makd_llm.comparison.record import read_record


class Clock:
    """Knows the seconds of every finished run of a grid, by its kind."""

    def __init__(self, grid: Grid) -> None:
        self._seconds: dict[tuple[str, str], list[float]] = {}
        for item in (*grid.runs, *grid.shared.values()):
            record = read_record(grid.folder / item.place)
            if record is not None and record.state == "done" and record.seconds:
                self.finished(item, record.seconds)

    def finished(self, item: Item, seconds: float) -> None:
        """Takes in what a run took."""
        self._seconds.setdefault((item.until, item.kind), []).append(seconds)

    def left(self, items: Sequence[Item], elapsed: float = 0.0) -> float | None:
        """Seconds for these runs, of which the first has been at work for `elapsed`. None: nothing
        like one of them has been measured yet.

        A row takes as long as the same with another student or seed; one of which there is none, as
        long as the mean row.
        """
        estimates = [self._estimate(item) for item in items]
        known = [estimate for estimate in estimates if estimate is not None]
        if len(known) < len(estimates):
            return None
        done = min(elapsed, known[0]) if known else 0.0
        return sum(known) - done

    def _estimate(self, item: Item) -> float | None:
        own = self._seconds.get((item.until, item.kind))
        if own:
            return fmean(own)
        like = [fmean(taken) for (until, _), taken in self._seconds.items() if until == item.until]
        return fmean(like) if like else None


def in_words(seconds: float) -> str:
    """3 h 05 min, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
