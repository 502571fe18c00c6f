"""What a chart draws stays on it, and says in words and numbers what it draws."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makd_llm.report.charts import (
    BOTTOM,
    LEFT,
    MOST_POINTS,
    MOST_ROWS,
    RIGHT,
    TOP,
    HeatMap,
    IntervalChart,
    LineChart,
    Series,
    alike,
    short,
    ticks,
)
from makd_llm.report.palette import STEPS

VALUES = st.floats(-1e9, 1e9, allow_nan=False) | st.sampled_from([math.nan, math.inf, 0.0, 1e-300])


def chart(values: list[float], **settings: bool) -> LineChart:
    points = [(float(step), value) for step, value in enumerate(values, start=1)]
    return LineChart("loss", "step", [Series("run", points)], **settings)


@given(st.lists(VALUES, min_size=1, max_size=400), st.booleans())
def test_everything_is_drawn_within_the_chart(values: list[float], from_zero: bool) -> None:
    made = chart(values, from_zero=from_zero)
    for line in made.lines:
        places = [tuple(map(float, p.split())) for p in re.split("[ML]", line.path) if p]
        assert 0 < len(places) <= MOST_POINTS
        for x, y in places:
            assert LEFT - 0.1 <= x <= RIGHT + 0.1 and TOP - 0.1 <= y <= BOTTOM + 0.1
    assert all(LEFT - 0.1 <= tick.at <= RIGHT + 0.1 for tick in made.x_ticks)
    assert all(TOP - 0.1 <= tick.at <= BOTTOM + 0.1 for tick in made.y_ticks)
    assert len(made.table) <= MOST_ROWS
    assert bool(made.lines) == any(map(math.isfinite, values))
    assert "nan" not in made.said


def test_a_falling_line_falls() -> None:
    made = chart([4.0, 3.0, 2.0])
    (line,) = made.lines
    assert line.path.startswith("M48 ")
    heights = [float(y) for y in re.findall(r" ([\d.]+)", line.path)]
    assert heights == sorted(heights) and heights[0] < heights[-1], "down is larger in an SVG"
    assert line.end[0] == RIGHT
    assert made.said == "loss. run: 4 at step 1, 2 at 3, between 2 and 4."
    assert made.table == [("1", ["4"]), ("2", ["3"]), ("3", ["2"])] and made.left_out == 0


def test_long_lines_are_averaged_and_their_tables_cut() -> None:
    made = chart([math.sin(n / 50) for n in range(5000)])
    assert made.averaged and made.left_out == 5000 - MOST_ROWS
    assert [row[0] for row in made.table][:1] == ["1"] and made.table[-1][0] == "5000"
    assert not chart([1.0, 2.0]).averaged


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 6))
def test_ticks_are_round_and_few(low: float, width: float, most: int) -> None:
    found = ticks(low, low + width, most)
    assert len(found) <= most + 1
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in found)


def test_labels_of_an_axis_are_alike() -> None:
    assert alike([0.0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert alike([0, 50, 100]) == ["0", "50", "100"]
    assert alike([0, 20_000]) == ["0", "20 k"]
    assert alike([1e-6, 2e-6]) == ["1e-6", "2e-6"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (3.14159, "3.142"), (12_345, "12.35 k"), (2.5e6, "2.5 M"), (1.5e-5, "1.50e-5")],
)
def test_short_numbers(value: float, said: str) -> None:
    assert short(value) == said


def test_a_heat_map_colours_by_share_of_the_highest() -> None:
    rows = [("0", [0.0, 0.5]), ("1", [1.0, None]), ("2", [math.nan, 0.25])]
    found = HeatMap("residual", "layer", ["q", "k"], rows)
    cells = [[(c.text, c.step) for c in row] for _, row in found.cells]
    assert cells == [
        [("0.000", 0), ("0.500", STEPS // 2)],
        [("1.000", STEPS - 1), ("", None)],
        [("nan", None), ("0.250", STEPS // 4)],
    ]
    assert found.said == (
        "residual. Most: 1.000 (layer 1, q); least: 0.000 (layer 0, q); mean 0.438."
    )
    assert HeatMap("residual", "layer", ["q"], [("0", [None])]).said.endswith("measured.")


def test_intervals_keep_their_order_and_stay_on_the_chart() -> None:
    rows = [("makd", 18.5, 17.0, 20.0, False), ("kd", 18.0, 16.5, 19.5, False)]
    found = IntervalChart("ROUGE-Lsum", rows)
    assert [bar.label for bar in found.bars] == ["makd", "kd"]
    for bar in found.bars:
        assert found.labels <= bar.low < bar.at < bar.high <= RIGHT
    assert "makd: 18.50 (17.00 to 20.00)" in found.said
    assert IntervalChart("x", []).bars == []
