"""The tables that a run prints, as rich tables made from its JSON files."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def show(table: Table) -> None:
    """Prints a table; where nobody looks (a file, a pipe) it is as wide as it needs."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


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


def factorization_table(
    matrices: Sequence[Mapping[str, Any]], parameters: Mapping[str, Mapping[str, int]]
) -> Table:
    """Ranks and residuals by role, and the parameters before and after."""
    blocks = {name: count["blocks"] for name, count in parameters.items()}
    total = {name: count["total"] for name, count in parameters.items()}
    table = Table(
        title="factorized matrices",
        caption=f"parameters: blocks {_millions(blocks['teacher'])} -> "
        f"{_millions(blocks['student'])}, "
        f"whole model {_millions(total['teacher'])} -> {_millions(total['student'])} "
        f"({total['student']:,} stored)",
    )
    for column in ("role", "matrices", "shape", "rank", "residual min", "mean", "max"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role in dict.fromkeys(m["role"] for m in matrices):
        those = [m for m in matrices if m["role"] == role]
        residuals = [m["residual"] for m in those]
        table.add_row(
            role,
            str(len(those)),
            f"{those[0]['rows']} x {those[0]['columns']}",
            str(those[0]["rank"]),
            f"{min(residuals):.3f}",
            f"{sum(residuals) / len(residuals):.3f}",
            f"{max(residuals):.3f}",
        )
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
