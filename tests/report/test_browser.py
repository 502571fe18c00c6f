"""The report as Chromium shows it: wide and on a phone, in light and dark, by hand and by keyboard.

`make test-report` installs Chromium where it is missing and says where the screenshots lie.
"""

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from makd_llm.report.page import read, write

pytestmark = pytest.mark.browser

SIZES = {"wide": (1280, 900), "phone": (390, 844)}
looks = pytest.mark.parametrize(
    ("size", "scheme"), [(size, scheme) for size in SIZES for scheme in ("light", "dark")]
)
KINDS = ("run", "runs", "comparison")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    assert found, "no chromium; `make test-report` installs Debian's"
    with sync_playwright() as playwright:
        # Without a sandbox only where there is none to be had: as root in a container.
        alone = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=found, args=alone)
        yield started
        started.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: $MAKD_SHOTS, or a temporary folder."""
    given = os.environ.get("MAKD_SHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def reports(make_run: Any, make_comparison: Any, tmp_path: Path) -> dict[str, Path]:
    """A page of each kind."""
    run = make_run("one", layers=12, heads=9, steps=60, documents=12)
    found = {
        "run": [run],
        "runs": [run, make_run("two", worse=1.0, documents=12)],
        "comparison": [make_comparison()],
    }
    for kind, folders in found.items():
        write(read(folders), tmp_path / f"{kind}.html")
    return {kind: tmp_path / f"{kind}.html" for kind in found}


class Shown:
    """A page in the browser, and everything that it asked for or complained of."""

    def __init__(self, browser: Any, path: Path, size: str, scheme: str, **more: Any) -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **more
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@looks
@pytest.mark.parametrize("kind", KINDS)
def test_it_fits_and_is_silent(
    browser: Any, reports: dict[str, Path], shots: Path, kind: str, size: str, scheme: str
) -> None:
    with Shown(browser, reports[kind], size, scheme) as shown:
        page = shown.page
        page.screenshot(path=shots / f"{kind}-{size}-{scheme}.png", full_page=True)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= SIZES[size][0], "nothing sticks out to the side"
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        charts = page.locator("svg[role=img]:visible").all()
        assert len(charts) >= 8
        for chart in charts:
            box = chart.bounding_box()
            assert box["width"] >= 250 and box["height"] >= 40
            assert box["x"] >= 0 and box["x"] + box["width"] <= SIZES[size][0]
        text = page.locator("svg[role=img] text").first
        assert text.bounding_box()["height"] >= 9, "a chart's text can be read"
        assert shown.said == []
        assert shown.asked == [reports[kind].as_uri()], "it loads nothing"


@looks
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing(
    browser: Any, reports: dict[str, Path], kind: str, size: str, scheme: str
) -> None:
    """axe-core: names, roles, structure, and contrast as it is drawn (WCAG 2.2 A and AA)."""
    from axe_playwright_python.sync_playwright import Axe

    # The page's policy would keep axe's own script out.
    with Shown(browser, reports[kind], size, scheme, bypass_csp=True) as shown:
        shown.page.evaluate(
            "document.querySelectorAll('details').forEach((d) => { d.open = true })"
        )
        found = Axe().run(shown.page)
    assert found.response["passes"], "it looked"
    assert found.violations_count == 0, found.generate_report()


def test_the_theme_is_the_readers(browser: Any, reports: dict[str, Path]) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with Shown(browser, reports["run"], "wide", scheme) as shown:
            script = "getComputedStyle(document.body).backgroundColor"
            grounds.append(shown.page.evaluate(script))
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 29)"]


def test_it_works_without_scripts(browser: Any, reports: dict[str, Path]) -> None:
    with Shown(browser, reports["runs"], "phone", "light", java_script_enabled=False) as shown:
        page = shown.page
        assert page.locator("svg[role=img]:visible").count() >= 8
        second = page.locator("details.sample").nth(1)
        assert not second.locator("article").first.is_visible()
        second.locator("summary").click()
        assert second.locator("article").first.is_visible()
        assert page.locator("#filter").is_hidden(), "what needs a script is not there"
        line = page.locator("path.line").locator("xpath=..").and_(page.locator(".run-1")).first
        assert line.is_visible()
        page.get_by_role("checkbox", name="two").uncheck()
        assert not line.is_visible(), "a run that is not chosen is taken off the charts"


def test_marks_follow_the_choice(browser: Any, reports: dict[str, Path]) -> None:
    with Shown(browser, reports["run"], "wide", "light") as shown:
        page = shown.page
        student = page.locator("details.sample[open] article", has_text="whale")
        assert student.locator(".not-reference").count() > 0
        page.get_by_label("no marks").check()
        script = "(e) => getComputedStyle(e).textDecorationLine"
        assert student.locator(".not-reference").first.evaluate(script) == "none"
        page.locator("#against-document").check()
        assert student.locator(".not-document").first.evaluate(script) == "underline"


def test_the_keyboard_reaches_everything_in_order(browser: Any, reports: dict[str, Path]) -> None:
    with Shown(browser, reports["run"], "wide", "light") as shown:
        page = shown.page
        seen: list[tuple[str, float]] = []
        for _ in range(80):
            page.keyboard.press("Tab")
            name, top, outline = page.evaluate(
                """() => { const e = document.activeElement, s = getComputedStyle(e);
                return [e.tagName + (e.id || e.textContent.trim().slice(0, 20)),
                        e.getBoundingClientRect().top + scrollY, s.outlineStyle] }"""
            )
            if name.startswith("BODY"):
                break
            assert outline != "none", f"{name} shows that it has the focus"
            seen.append((name, top))
        assert seen[0][0] == "ATo the content"
        assert [name for name, _ in seen[1:8]] == [
            "ASummary",
            "ATraining",
            "ASpeed and memory",
            "ARanks and residuals",
            "AAttention",
            "ASummaries",
            "ASettings",
        ]
        tops = [top for _, top in seen[8:]]
        assert all(b >= a - 300 for a, b in pairwise(tops)), "down the page"
        assert len(seen) > 30


def test_tables_are_sorted_by_a_click_and_by_enter(browser: Any, reports: dict[str, Path]) -> None:
    with Shown(browser, reports["run"], "wide", "light") as shown:
        page = shown.page
        table = page.locator("#summary table.sortable")

        def models() -> list[str]:
            return list(table.locator("tbody th").all_text_contents())

        assert models() == ["teacher", "factorized", "student", "lead-3"]
        head = table.get_by_role("button", name="perplexity")
        head.click()
        assert models() == ["factorized", "student", "teacher", "lead-3"], "without one: last"
        assert table.locator("th[aria-sort=descending]").text_content() == "perplexity"
        head.press("Enter")
        assert models() == ["teacher", "student", "factorized", "lead-3"]


def test_documents_are_found_by_their_words(browser: Any, reports: dict[str, Path]) -> None:
    with Shown(browser, reports["run"], "phone", "dark") as shown:
        page = shown.page
        page.get_by_label("Only documents with").fill("town 7 ")
        assert page.locator("details.sample:visible").count() == 1
        assert page.locator("#matches").text_content() == "1 of 12"
