"""The table of a comparison, from comparison.json: printed, as Markdown, and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from makd_llm.comparison.grid import Grid
from makd_llm.config.objectives import ObjectiveConfig
from makd_llm.evaluation.significance import p_in_words

WIDTH = 170
"""Of the printed table where nobody looks (a file, a pipe)."""
Values = Mapping[str, Any]


def show_comparison(found: Values) -> None:
    """Prints a table for each keep ratio, then what has to be known of them, and the analysis."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for keep in _keep_ratios(found):
        table = Table(title=_title(found, keep))
        for column in _columns(found):
            justify: Literal["left", "right"] = "left" if column == "row" else "right"
            table.add_column(column, justify=justify, no_wrap=column == "ROUGE-Lsum")
        for group in _groups(found, keep):
            table.add_row(*_cells(found, group))
        console.print(table)
    for text in (_legend(found), found["equal_tokens"]["said"], found["analysis"]):
        console.print(text, highlight=False, markup=False)


def show_grid(grid: Grid, found: Values) -> None:
    """Prints what would be made: every row, its number for `--row`, what it learns, its state."""
    numbers = {item.place: str(number) for number, item in enumerate(grid.runs)}
    table = Table(title=f"{grid.config.name}: {len(found['rows'])} rows in {grid.folder}")
    for column in ("number", "row", "learns", "steps", "state"):
        table.add_column(column, justify="right" if column in ("number", "steps") else "left")
    for row, value in zip(grid.rows, found["rows"], strict=True):
        distil = row.item.config.distil if row.item is not None else None
        learnt = distil.of(ObjectiveConfig) if distil is not None else {}
        table.add_row(
            numbers.get(value["run"], ""),
            row.words,
            ", ".join(f"{o.weight:g} {name}" for name, o in learnt.items()),
            str(distil.train.steps) if distil is not None else "",
            value["state"],
        )
    Console(width=None if Console().is_terminal else WIDTH).print(table)


def as_markdown(found: Values) -> str:
    """The same tables, with what was asked for and the analysis."""
    parts = [f"# {found['name']}", found["analysis"]]
    for title, table in markdown_tables(found).items():
        parts += [f"## {title}", table]
    parts += [_legend(found), found["equal_tokens"]["said"]]
    settings = {"teacher": found["teacher"], "data": found["data"], **found["settings"]}
    parts.append("\n".join(f"- {name}: {value}" for name, value in settings.items()))
    return "\n\n".join(parts) + "\n"


def markdown_tables(found: Values) -> dict[str, str]:
    """One for each keep ratio, by their titles. found: at least name, rows and groups."""
    tables = {}
    for keep in _keep_ratios(found):
        columns = _columns(found)
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
        lines += [_cells(found, group) for group in _groups(found, keep)]
        table = "\n".join(f"| {' | '.join(_escaped(line))} |" for line in lines)
        tables[_title(found, keep)] = table
    return tables


def as_csv(found: Values) -> str:
    """All rows, then all groups, with every number of comparison.json in a column of its own."""
    lines = [{"line": kind, **_flat(row)} for kind in ("row", "group") for row in found[f"{kind}s"]]
    columns = dict.fromkeys(name for line in lines for name in line)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(value: Values, path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{path}{key}"
        if isinstance(inner, Mapping):
            flat |= _flat(inner, f"{name}.")
        else:
            flat[name] = " ".join(map(str, inner)) if isinstance(inner, list) else inner
    return flat


def _keep_ratios(found: Values) -> list[float]:
    """Those of which there is anything."""
    there = [g["keep_ratio"] for g in found["groups"] if _is_there(g) and g["keep_ratio"]]
    return list(dict.fromkeys(there))


def _groups(found: Values, keep: float) -> list[Values]:
    """Those of a keep ratio, and the baselines that have none; what waits is left out."""
    return [g for g in found["groups"] if g["keep_ratio"] in (None, keep) and _is_there(g)]


def _is_there(group: Values) -> bool:
    return bool(group["seeds"]) or group["state"] != "waiting"


def _failed(found: Values, group: Values) -> int:
    """How many of a row's seeds failed."""
    place = (group["name"], group["keep_ratio"])
    states = [r["state"] for r in found["rows"] if (r["name"], r["keep_ratio"]) == place]
    return states.count("failed")


def _title(found: Values, keep: float) -> str:
    waiting = [r for r in found["rows"] if r["keep_ratio"] == keep and r["state"] == "waiting"]
    more = f" ({len(waiting)} rows not made yet)" if waiting else ""
    return f"{found['name']}: keep ratio {keep:g}{more}"


def _legend(found: Values) -> str:
    settings = found["settings"]
    return (
        f"In brackets: {settings['intervals']}. Above another row: difference of ROUGE-Lsum and p, "
        f"and of nats per token (less is better) and p ({settings['p']}; not adjusted for the "
        "number of tests), where both have the same seeds. Seconds and memory are of the distil "
        "stage."
    )


def references(found: Values) -> list[str]:
    """The rows that others are tested against, in the order of the table."""
    named = {name for group in found["groups"] for name in group["against"]}
    return [name for name in dict.fromkeys(g["name"] for g in found["groups"]) if name in named]


def _columns(found: Values) -> list[str]:
    labels = {group["name"]: group["label"] for group in found["groups"]}
    return [
        *("row", "seeds", "parameters", "tokens", "seconds", "peak MB", "perplexity"),
        *("ROUGE-1", "ROUGE-2", "ROUGE-Lsum", "of teacher's"),
        *(f"above {labels[name]}" for name in references(found)),
    ]


def _cells(found: Values, group: Values) -> list[str]:
    if group["state"] == "failed" and not group["seeds"]:
        return [group["label"], "failed", *[""] * (len(_columns(found)) - 2)]
    share, failed = group["share_of_teacher"] or {}, _failed(found, group)
    return [
        group["label"],
        str(len(group["seeds"]) or "") + (f" ({failed} failed)" if failed else ""),
        _number(group["parameters"], "{:.2f} M", 1e-6),
        _number(group["tokens"], "{:,.0f}"),
        _number(group["seconds"], "{:,.0f}"),
        _number(group["peak_memory_MB"], "{:,.0f}"),
        _number(group["perplexity"], "{:.2f}"),
        _number((group["rouge1"] or {}).get("value"), "{:.2f}"),
        _number((group["rouge2"] or {}).get("value"), "{:.2f}"),
        _interval(group["rougeLsum"]),
        _number(share.get("rougeLsum"), "{:.1%}"),
        *(_difference(group["against"].get(name)) for name in references(found)),
    ]


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)


def _interval(value: Values | None) -> str:
    if value is None:
        return ""
    return f"{value['value']:.2f} ({value['low']:.1f}-{value['high']:.1f})"


def _difference(value: Values | None) -> str:
    if value is None:
        return ""
    found, per_token = value["rougeLsum"], value.get("nats_per_token")
    said = f"{found['difference']:+.2f}, {p_in_words(found['p'])}"
    if per_token is None:
        return said
    return f"{said}; {per_token['difference']:+.3f} nats, {p_in_words(per_token['p'])}"


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]
