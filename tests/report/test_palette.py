"""Every colour of the report can be read and told apart, in light and dark: computed, not looked
at.
"""

from itertools import combinations, pairwise

import numpy as np
import pytest

from makd_llm.report.palette import DARK, LIGHT, STEPS, Theme, contrast

TEXT, GRAPHICS = 4.5, 3.0
"""WCAG 2.2 at level AA: for text, and for what is drawn."""

# Severity 1.0 of Machado, Oliveira and Fernandes (2009), on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deutan": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritan": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}

both = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])


def test_contrast_is_wcags() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)
    assert contrast("#ffffff", "#777777") == contrast("#777777", "#ffffff")


@both
def test_text_stands_out(theme: Theme) -> None:
    for ground in (theme.page, theme.panel):
        for colour in (theme.text, theme.muted, theme.link):
            assert contrast(colour, ground) >= TEXT, (colour, ground)
    assert contrast(theme.text, theme.mark) >= TEXT
    for back, text in theme.cells():
        assert contrast(text, back) >= TEXT, (text, back)


@both
def test_what_is_drawn_stands_out(theme: Theme) -> None:
    for colour in (*theme.series, theme.focus):
        assert contrast(colour, theme.page) >= GRAPHICS, colour


@both
def test_cells_go_one_way(theme: Theme) -> None:
    cells = [back for back, _ in theme.cells()]
    assert len(cells) == STEPS
    distances = [contrast(back, theme.page) for back in cells]
    assert all(b > a for a, b in pairwise(distances)), "more is further from the page"


def lab(colour: str, deficiency: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of a colour as it is seen with a deficiency."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(deficiency @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    t = to_xyz @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@both
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_series_are_told_apart_by_the_colour_blind_too(theme: Theme, deficiency: str) -> None:
    for one, other in combinations(theme.series, 2):
        matrix = DEFICIENCIES[deficiency]
        distance = np.linalg.norm(lab(one, matrix) - lab(other, matrix))
        assert distance >= 12, (one, other, distance)
