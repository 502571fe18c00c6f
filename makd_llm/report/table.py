"""The tables that a run prints, as rich tables made from its JSON files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from makd_llm.evaluation.significance import METHODS, Difference, p_in_words

COLUMNS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def show(table: Table) -> None:
    """Prints a table; where nobody looks (a file, a pipe) it is as wide as it needs."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


def show_evaluation(evaluation: Mapping[str, Any]) -> None:
    """Prints what evaluation.json says: the models, and the steps where they were measured."""
    show(evaluation_table(evaluation))
    if "stages" in evaluation:
        show(stages_table(evaluation["stages"]))


def show_differences(found: Mapping[str, Difference], run: str, other: str) -> None:
    """Prints how far a run's student is above another's, by metric."""
    table = Table(
        title=f"{run}, above {other}",
        caption=f"interval: {METHODS['intervals']}; p: {METHODS['p']}",
    )
    for column in ("metric", "difference", "95 % interval", "p"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, one in found.items():
        interval = f"{one.low:+.3f} to {one.high:+.3f}"
        table.add_row(name, f"{one.difference:+.3f}", interval, p_in_words(one.p))
    show(table)


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """evaluation.json as the table that ends a run: what was kept, and at what size."""
    records = evaluation["records"]
    table = Table(
        title=f"perplexity over {records['perplexity']} references, "
        f"ROUGE over {records['rouge']} summaries",
        caption=f"{evaluation['prompt']}\nROUGE: {evaluation['rouge_settings']}",
    )
    for column in (
        "model",
        "parameters",
        "in blocks",
        "perplexity",
        "ROUGE-1",
        "ROUGE-2",
        "ROUGE-L",
        "ROUGE-Lsum",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in evaluation["models"].items():
        size = row.get("parameters")
        table.add_row(
            name,
            _millions(size["total"]) if size else "",
            _millions(size["blocks"]) if size else "",
            f"{row['perplexity']['value']:.2f}" if "perplexity" in row else "",
            *(f"{row['rouge'][key]:.2f}" for key in COLUMNS),
        )
    return table


def factorization_table(report: Mapping[str, Any]) -> Table:
    """factorization.json by role: ranks, what they lose, and the parameters before and after."""
    matrices, parameters = report["matrices"], report["parameters"]
    blocks = {name: count["blocks"] for name, count in parameters.items()}
    total = {name: count["total"] for name, count in parameters.items()}
    caption = (
        f"parameters: blocks {_millions(blocks['teacher'])} -> {_millions(blocks['student'])}, "
        f"whole model {_millions(total['teacher'])} -> {_millions(total['student'])} "
        f"({total['student']:,} stored)"
    )
    held_out = report.get("held_out")
    if held_out:
        found = held_out["perplexity"]
        caption += (
            f"\nheld-out perplexity: {found['teacher']:.2f} -> {found['student']:.2f} over "
            f"{held_out['tokens']:,} tokens of {held_out['data']}"
        )
    table = Table(title="factorized matrices", caption=caption)
    columns = ["role", "matrices", "dense", "shape", "rank", "residual min", "mean", "max"]
    for column in [*columns, "held-out mean"] if held_out else columns:
        table.add_column(column, justify="left" if column == "role" else "right")
    for role in dict.fromkeys(m["role"] for m in matrices):
        places = [i for i, m in enumerate(matrices) if m["role"] == role]
        those = [matrices[i] for i in places]
        ranks = [m["rank"] for m in those if m["rank"] is not None]
        residuals = [m["residual"] for m in those]
        cells = [
            role,
            str(len(those)),
            str(len(those) - len(ranks)),
            ", ".join(dict.fromkeys(f"{m['rows']} x {m['columns']}" for m in those)),
            _range(ranks),
            f"{min(residuals):.3f}",
            f"{sum(residuals) / len(residuals):.3f}",
            f"{max(residuals):.3f}",
        ]
        if held_out:
            measured = [held_out["matrix_residuals"][i] for i in places]
            measured = [residual for residual in measured if residual is not None]
            cells.append(f"{sum(measured) / len(measured):.3f}" if measured else "-")
        table.add_row(*cells)
    return table


@dataclass(frozen=True)
class Step:
    """One stage on the way from plain SVD to a finished student.

    above_teacher: mean nats per token more than the teacher's. recovered: the share of what the
    first cut lost that this one has won back from the stage before; None up to that cut, and where
    nothing was lost.
    """

    stage: str
    perplexity: float
    above_teacher: float
    recovered: float | None


def steps_of(stages: Mapping[str, float]) -> list[Step]:
    """stages: name -> perplexity; the teacher, then the students in order."""
    (_, teacher), *students = stages.items()
    above = [math.log(value / teacher) for _, value in students]
    steps = [Step(next(iter(stages)), teacher, 0.0, None)]
    first = 1 if students and students[0][0] == "shaped" else 0  # what is cut, and no cut yet
    for place, (name, value) in enumerate(students):
        won = None
        if place > first and above[first] > 0:
            won = (above[place - 1] - above[place]) / above[first]
        steps.append(Step(name, value, above[place], won))
    return steps


def stages_table(stages: Mapping[str, float]) -> Table:
    """What each step from plain SVD on is worth."""
    table = Table(
        title="what each step is worth",
        caption="won back: share of the nats that the first cut lost",
    )
    for column in ("stage", "perplexity", "nats above teacher", "won back"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for step in steps_of(stages):
        won = "" if step.recovered is None else f"{step.recovered:.1%}"
        table.add_row(step.stage, f"{step.perplexity:,.2f}", f"{step.above_teacher:.3f}", won)
    return table


def rank_table(report: Mapping[str, Any]) -> Table:
    """The rank of every matrix, a row for each layer; the colour says what share of it is kept.
    Experts of a layer stand together: from the least rank to the largest.
    """
    matrices = [m for m in report["matrices"] if m["layer"] is not None]
    roles = list(dict.fromkeys(m["role"] for m in matrices))
    places: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for matrix in matrices:
        places.setdefault((matrix["layer"], matrix["role"]), []).append(matrix)
    cells = {place: _rank_cell(those) for place, those in places.items()}
    table = Table(title="ranks (dense: -)", caption="kept: red little, blue much")
    for column in ("layer", *roles):
        table.add_column(column, justify="right")
    for layer in dict.fromkeys(m["layer"] for m in matrices):
        table.add_row(str(layer), *(cells.get((layer, role), "") for role in roles))
    return table


def _rank_cell(matrices: Sequence[Mapping[str, Any]]) -> str:
    share = sum(kept_share(matrix) for matrix in matrices) / len(matrices)
    blue = round(255 * share)
    rank = _range([matrix["rank"] for matrix in matrices if matrix["rank"] is not None])
    return f"[white on rgb({255 - blue},60,{blue})] {rank:>4} [/]"


def kept_share(matrix: Mapping[str, Any]) -> float:
    """The share of a matrix's numbers that its factors have; 1 where it is dense."""
    if matrix["rank"] is None:
        return 1.0
    rows, columns = matrix["rows"], matrix["columns"]
    return float(matrix["rank"] * (rows + columns) / (rows * columns))


def _range(ranks: Sequence[int]) -> str:
    if not ranks:
        return "-"
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}-{max(ranks)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
