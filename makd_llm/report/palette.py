"""The report's colours, in light and dark, and how far they stand apart.

Series are told apart by colours after Okabe and Ito (Color Universal Design, 2008), darkened or
lightened until they stand out from the page, and by their dashes. Cells of a heat map go through
one hue from the page's own lightness to its opposite, so that more is further from the page for
everybody; their text is dark or light, whichever is read more easily. Contrast is WCAG 2.2's.
"""

from dataclasses import dataclass

STEPS = 12
"""Classes of a heat map's cells."""


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb. text, muted, link stand on page and panel; series and marks too."""

    page: str
    panel: str
    line: str
    text: str
    muted: str
    link: str
    focus: str
    good: str
    bad: str
    mark: str
    series: tuple[str, ...]
    heat: tuple[str, str, str]
    """From the least through the middle to the most."""

    def cells(self) -> list[tuple[str, str]]:
        """(background, text) of every class of a heat map's cells."""
        low, middle, high = self.heat
        found = []
        for step in range(STEPS):
            place = 2 * step / (STEPS - 1)
            ends = (low, middle) if place <= 1 else (middle, high)
            back = _between(*ends, place if place <= 1 else place - 1)
            found.append((back, max(("#000000", "#ffffff"), key=lambda c: contrast(c, back))))
        return found


LIGHT = Theme(
    page="#ffffff",
    panel="#f6f7f9",
    line="#d5d9e0",
    text="#1b1f27",
    muted="#565d6b",
    link="#0b5cad",
    focus="#0b5cad",
    good="#00694a",
    bad="#a83200",
    mark="#fdeec9",
    series=("#0066b3", "#e16c16", "#037e5b", "#a13e81", "#7b6502", "#444b5a"),
    heat=("#f2f6fb", "#5fa3d6", "#08306b"),
)
DARK = Theme(
    page="#14171d",
    panel="#1c2028",
    line="#353b47",
    text="#e7eaf0",
    muted="#a6aebc",
    link="#83bdf5",
    focus="#83bdf5",
    good="#5fd0a8",
    bad="#ff9a6b",
    mark="#45360f",
    series=("#66b5f6", "#f59a55", "#41cc9e", "#e08cc3", "#dec445", "#c5cdd9"),
    heat=("#1b212b", "#2f74ad", "#d6ebff"),
)
DASHES = ("", "6 3", "2 2.5")
"""Of lines: with the colours, as many series as there are pairs of them."""


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, from 1 to 21."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    linear = []
    for value in _rgb(colour):
        share = value / 255
        linear.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _between(low: str, high: str, share: float) -> str:
    mixed = (round(a + (b - a) * share) for a, b in zip(_rgb(low), _rgb(high), strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
