"""Charts as plain data that a template draws: lines over steps or layers, intervals by row, and
heat maps that are tables.

A chart is 360 units wide, which is a phone's width: it is drawn at about its own size everywhere,
several beside each other where there is room, so that its text stays legible. Every chart has a
sentence that says what it shows, and its numbers as a table.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from makd_llm.report.palette import DASHES, LIGHT, STEPS

LEFT, RIGHT, TOP, BOTTOM = 48, 352, 8, 162
MOST_POINTS = 160
MOST_ROWS = 24
"""Of the table beside a chart."""


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in order of x; `number` is its run's, and chooses colour and dash."""

    label: str
    points: Sequence[tuple[float, float]]
    number: int = 0

    @property
    def colour(self) -> int:
        return self.number % len(LIGHT.series)

    @property
    def dash(self) -> str:
        return DASHES[self.number // len(LIGHT.series) % len(DASHES)]

    @property
    def finite(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Line:
    """A series as it is drawn."""

    series: Series
    path: str
    end: tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, and what it says."""

    at: float
    label: str


@dataclass
class LineChart:
    """Lines over x. by_run: the lines are runs, which a reader can take off the page."""

    title: str
    x_label: str
    series: list[Series]
    unit: str = ""
    from_zero: bool = False
    by_run: bool = True
    lines: list[Line] = field(init=False)
    x_ticks: list[Tick] = field(init=False)
    y_ticks: list[Tick] = field(init=False)
    averaged: bool = field(init=False)

    def __post_init__(self) -> None:
        self.series = [s for s in self.series if s.finite]
        points = [point for s in self.series for point in s.finite]
        self.averaged = any(len(s.finite) > MOST_POINTS for s in self.series)
        drawn = {s.number: thinned(s.finite) for s in self.series}
        shown = [point for found in drawn.values() for point in found] or [(0.0, 0.0)]
        x_low, x_high = _span([x for x, _ in points or shown], room=0.0)
        y_values = [y for _, y in shown] + ([0.0] if self.from_zero else [])
        y_low, y_high = _span(y_values, room=0.06, floor=self.from_zero)
        across, up = _scale(x_low, x_high, LEFT, RIGHT), _scale(y_low, y_high, BOTTOM, TOP)
        self.lines = []
        for s in self.series:
            places = [(round(across(x), 1), round(up(y), 1)) for x, y in drawn[s.number]]
            path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
            self.lines.append(Line(s, path, places[-1]))
        whole = all(float(x).is_integer() for x, _ in points)
        x_marks = ticks(x_low, x_high, 5, whole=whole)
        self.x_ticks = [Tick(across(x), short(x)) for x in x_marks]
        y_marks = ticks(y_low, y_high, 5)
        self.y_ticks = [
            Tick(up(y), label) for y, label in zip(y_marks, alike(y_marks), strict=True)
        ]

    @property
    def said(self) -> str:
        """The chart in words."""
        parts = []
        for s in self.series[:6]:
            values = s.finite
            (x0, first), (x1, last) = values[0], values[-1]
            least, most = min(y for _, y in values), max(y for _, y in values)
            parts.append(
                f"{s.label}: {short(first)} at {self.x_label} {short(x0)}, {short(last)} at "
                f"{short(x1)}, between {short(least)} and {short(most)}"
            )
        more = len(self.series) - len(parts)
        parts += [f"and {more} more"] if more > 0 else []
        return f"{self.title}{f' ({self.unit})' if self.unit else ''}. " + "; ".join(parts) + "."

    @property
    def table(self) -> list[tuple[str, list[str]]]:
        """(x, one value for each series), at most MOST_ROWS of them, the first and last among."""
        values = [dict(s.finite) for s in self.series]
        every = sorted({x for found in values for x in found})
        chosen = [every[i] for i in spread(len(every), MOST_ROWS)]
        return [(short(x), [short(v[x]) if x in v else "" for v in values]) for x in chosen]

    @property
    def left_out(self) -> int:
        """Points that the table has no row for."""
        every = {x for s in self.series for x, _ in s.finite}
        return max(0, len(every) - MOST_ROWS)


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: its text, and its class from 0 (least) to STEPS - 1; None: nothing."""

    text: str
    step: int | None


@dataclass
class HeatMap:
    """A table whose cells are coloured by their value. rows: (name, values); texts: what stands in
    the cells, where that is another thing than what colours them.
    """

    title: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]
    texts: Sequence[Sequence[str]] | None = None
    most: float | None = None
    say: Callable[[float], str] = "{:.3f}".format
    note: str = ""

    @property
    def values(self) -> list[float]:
        return [v for _, row in self.rows for v in row if v is not None and math.isfinite(v)]

    @property
    def highest(self) -> float:
        """The value that the last class stands for; the first stands for 0."""
        return self.most if self.most is not None else max(self.values, default=0.0)

    @property
    def cells(self) -> list[tuple[str, list[Cell]]]:
        found = []
        for place, (name, row) in enumerate(self.rows):
            texts = self.texts[place] if self.texts else [self._text(v) for v in row]
            cells = [Cell(t, self._step(v)) for t, v in zip(texts, row, strict=True)]
            found.append((name, cells))
        return found

    def _text(self, value: float | None) -> str:
        return "" if value is None else self.say(value) if math.isfinite(value) else str(value)

    def _step(self, value: float | None) -> int | None:
        if value is None or not math.isfinite(value):
            return None
        share = max(0.0, value / self.highest) if self.highest > 0 else 0.0
        return int(min(STEPS - 1.0, share * STEPS))

    @property
    def said(self) -> str:
        """The map in words: where the most and the least are."""
        placed = [
            (value, name, column)
            for name, row in self.rows
            for column, value in zip(self.columns, row, strict=True)
            if value is not None and math.isfinite(value)
        ]
        if not placed:
            return f"{self.title}: nothing was measured."
        most, least = max(placed), min(placed)
        return (
            f"{self.title}. Most: {self.say(most[0])} ({self.corner} {most[1]}, {most[2]}); "
            f"least: {self.say(least[0])} ({self.corner} {least[1]}, {least[2]}); "
            f"mean {self.say(fmean(v for v, _, _ in placed))}."
        )


@dataclass(frozen=True)
class Bar:
    """A row of an interval chart, as it is drawn."""

    label: str
    y: float
    low: float
    high: float
    at: float
    said: str
    strong: bool


@dataclass
class IntervalChart:
    """Means with their intervals, a row each: (label, value, low, high, strong)."""

    title: str
    rows: Sequence[tuple[str, float, float, float, bool]]
    labels: int = 150
    bars: list[Bar] = field(init=False)
    ticks: list[Tick] = field(init=False)
    height: int = field(init=False)

    def __post_init__(self) -> None:
        low, high = _span([v for _, _, a, b, _ in self.rows for v in (a, b)] or [0.0], room=0.04)
        across = _scale(low, high, self.labels, RIGHT)
        self.height = 18 * len(self.rows) + 30
        self.bars = [
            Bar(
                _cut(label, 24),
                18 * place + 14,
                round(across(a), 1),
                round(across(b), 1),
                round(across(value), 1),
                f"{label}: {value:.2f} ({a:.2f} to {b:.2f})",
                strong,
            )
            for place, (label, value, a, b, strong) in enumerate(self.rows)
        ]
        marks = ticks(low, high, 4)
        self.ticks = [Tick(across(x), label) for x, label in zip(marks, alike(marks), strict=True)]

    @property
    def said(self) -> str:
        """The chart in words."""
        return f"{self.title}, best first. " + "; ".join(bar.said for bar in self.bars) + "."


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means of as many neighbours each."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(x for x, _ in g), fmean(y for _, y in g)) for g in groups]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below count, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers from low to high, at most about `most`."""
    size = (high - low) / most
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= size * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def alike(values: Sequence[float]) -> list[str]:
    """Numbers of one axis with as many decimals each as the finest needs."""
    if any(abs(v) >= 10_000 for v in values):
        return [short(v) for v in values]
    gap = min((b - a for a, b in pairwise(values)), default=1.0)
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 0
    if decimals > 4:
        return [f"{v:.0e}".replace("e-0", "e-") for v in values]
    return [f"{v:.{decimals}f}" for v in values]


def short(value: float) -> str:
    """A number in three or four digits."""
    if not math.isfinite(value):
        return str(value)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g} {letter}"
    if value and abs(value) < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:.4g}"


def _span(values: Sequence[float], *, room: float, floor: bool = False) -> tuple[float, float]:
    """The least and the largest, with some room; never of no width."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    wide = (high - low) * room
    return (0.0 if floor and low >= 0 else low - wide), high + wide


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
