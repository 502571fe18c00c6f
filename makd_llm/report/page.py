"""`makd report`: runs, or a comparison, as one HTML page that needs nothing else.

contents.py reads the folders, numbers.py, charts.py and texts.py make of them what is shown, and
templates/ hold all the HTML. Texts of data are escaped by the template engine; settings and
environment pass the filter for secrets; the page's own policy forbids it to load anything.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import makd_llm
from makd_llm.evaluation.significance import p_in_words
from makd_llm.files import write_whole
from makd_llm.redaction import HIDDEN, names_a_secret, without_secrets
from makd_llm.report import panels
from makd_llm.report.charts import short
from makd_llm.report.contents import (
    COMPARISON,
    Comparison,
    Run,
    read_comparison,
    read_run,
    title_of,
)
from makd_llm.report.numbers import numbers_of
from makd_llm.report.palette import DARK, DASHES, LIGHT, STEPS, Theme
from makd_llm.report.texts import AGAINST, side_by_side

SHOWN_AT_FIRST = 8
"""Of several runs; a reader can show the others."""
SAMPLES = 40
REPORT = "report.html"
SECTIONS = {
    "summary": "Summary",
    "training": "Training",
    "speed": "Speed and memory",
    "student": "Ranks and residuals",
    "attention": "Attention",
    "summaries": "Summaries",
    "settings": "Settings",
}
"""By their templates' names, in the order of the page."""


@dataclass
class Subject:
    """What a report is about."""

    title: str
    runs: list[Run]
    comparison: Comparison | None = None


def read(folders: Sequence[Path]) -> Subject:
    """Reads run folders, or one folder of a comparison. Raises UserError where one is neither."""
    if len(folders) == 1 and (folders[0] / COMPARISON).is_file():
        comparison, runs = read_comparison(folders[0])
        return Subject(comparison.name or folders[0].resolve().name, runs, comparison)
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    return Subject(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", runs)


def write_report(folder: Path) -> None:
    """Writes report.html into a run's folder, or a student's that was cut without a run."""
    write(read([folder]), folder / REPORT)


def write(subject: Subject, out: Path, *, samples: int = SAMPLES) -> None:
    """Writes the page, whole or not at all. samples: documents that are shown with their texts."""
    write_whole(out, render(subject, samples=samples))


def render(subject: Subject, *, samples: int = SAMPLES) -> str:
    """The page as HTML."""
    runs = subject.runs
    found = [numbers_of(run) for run in runs]
    sides, documents = side_by_side(runs, samples)
    script = _template("script.js")
    html = (
        _environment()
        .get_template("page.html")
        .render(
            title=subject.title,
            version=makd_llm.__version__,
            runs=runs,
            found=found,
            several=len(runs) > 1,
            sections=_sections(subject),
            comparison=subject.comparison,
            evaluation=next((run.evaluation for run in runs if run.evaluation), None),
            measured=next((r.attention for r in runs if r.attention and r.attention.models), None),
            title_of=title_of,
            interval_charts=panels.intervals(subject.comparison) if subject.comparison else [],
            rivals=panels.rivals(subject.comparison) if subject.comparison else {},
            totals=panels.totals(runs),
            objectives=panels.objectives(runs),
            speeds=panels.speeds(runs),
            others=panels.others(runs),
            students=panels.students(runs),
            attention_overview=panels.attention_overview(runs),
            attentions=panels.attentions(runs),
            sides=sides,
            documents=documents,
            against=AGAINST,
            environments=[_environment_of(run) for run in runs],
            configs=[without_secrets(run.config_text) for run in runs],
            deepspeeds=[_deepspeed_of(run) for run in runs],
            differences=_differences(runs),
            shown_at_first=SHOWN_AT_FIRST,
            themes={"light": LIGHT, "dark": DARK},
            variables=_variables,
            styles=_template("style.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            steps=STEPS,
            dashes=DASHES,
            colours=len(LIGHT.series),
        )
    )
    # A lone surrogate, which JSON can hold, has no place in a file.
    return html.encode("utf-8", "replace").decode("utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("makd_llm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "short": _unless_none(short),
        "fixed": _unless_none(lambda value, digits=2: f"{value:,.{digits}f}"),
        "millions": _unless_none(lambda value: f"{value / 1e6:,.2f} M"),
        "percent": _unless_none(lambda value: f"{value:.1%}"),
        "whole": _unless_none(lambda value: f"{value:,.0f}"),
        "signed": _unless_none(lambda value: f"{value:+.2f}"),
        "nats": _unless_none(lambda value: f"{value:+.3f} nats"),
        "p_value": _unless_none(p_in_words),
    }
    return environment


def _unless_none(say: Callable[..., str]) -> Callable[..., str]:
    """What is missing is an empty cell."""
    return lambda value, *more: "" if value is None else say(value, *more)


def _sections(subject: Subject) -> dict[str, str]:
    """What the page has: of a student that was cut without a run, no training and what follows."""
    if len(subject.runs) == 1 and subject.runs[0].is_bare:
        return {name: SECTIONS[name] for name in ("summary", "student")}
    return SECTIONS


def _template(name: str) -> str:
    """A file that goes into the page as it is."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _variables(theme: Theme) -> str:
    """A theme as CSS variables."""
    plain = ("page", "panel", "line", "text", "muted", "link", "focus", "good", "bad", "mark")
    pairs = [(name, getattr(theme, name)) for name in plain]
    pairs += [(f"s{i}", colour) for i, colour in enumerate(theme.series)]
    for i, (back, text) in enumerate(theme.cells()):
        pairs += [(f"c{i}", back), (f"t{i}", text)]
    return "".join(f"--{name}:{value};" for name, value in pairs)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names; with as many of the names above them as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({place})" for place, path in enumerate(paths, start=1)]


def _environment_of(run: Run) -> dict[str, str]:
    """What it ran on, in words."""
    shown = {}
    for name, value in run.environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        shown[str(name)] = without_secrets(str(value))
    return shown


def _deepspeed_of(run: Run) -> str:
    """DeepSpeed's JSON under which the student learnt, or the teacher was tuned."""
    for stage in ("distil", "sft"):
        ds = run.stages[stage].key.get("ds") if stage in run.stages else None
        if ds:
            return without_secrets(json.dumps(_hidden(ds), indent=1, ensure_ascii=False))
    return ""


def _hidden(value: Any) -> Any:
    """With *** for what a setting's name says is secret."""
    if isinstance(value, Mapping):
        return {k: HIDDEN if names_a_secret(str(k)) else _hidden(v) for k, v in value.items()}
    return value


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ: path, and each run's value."""
    flat = [_flat(_hidden(run.config)) for run in runs]
    paths = dict.fromkeys(path for settings in flat for path in settings)
    found = []
    for path in paths:
        values = [without_secrets(str(f[path])) if path in f else "not set" for f in flat]
        if path != "run_dir" and len(set(values)) > 1:
            found.append((path, values))
    return found


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    return {
        p: v
        for key, inner in value.items()
        for p, v in _flat(inner, f"{path}.{key}".lstrip(".")).items()
    }
