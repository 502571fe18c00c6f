"""Write the documents' tables from the committed measurements, so that no figure is typed by hand.

    python benchmarks/readme.py            # rewrite them
    python benchmarks/readme.py --check    # exit code 1 if one differs from its measurements

A table stands between the lines `<!-- measured: NAME -->` and `<!-- end -->`.
"""

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from makd_llm.comparison.tables import markdown_tables

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "kernels" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
RESULTS = Path(__file__).parent / "results"
Row = dict[str, str]
LINES = ("row", "group")
"""What the lines of a comparison.csv are of."""


def attention(rows: list[Row]) -> str:
    """attention_kl by length."""
    chosen = [
        row
        for row in rows
        if row["op"] == "attention_kl" and row["mode"] == "full" and row["dtype"] == "bfloat16"
        and row["case"].startswith("T ") and row["case"].endswith(", forward_kl")
    ]  # fmt: skip
    return table("T", chosen, lambda row: row["case"].removeprefix("T ").split(",")[0])


def linear(rows: list[Row]) -> str:
    """linear_divergence at its large case."""
    chosen = [
        row
        for row in rows
        if row["op"] == "linear_divergence" and row["mode"] == "full"
        and row["case"].startswith("large batch")
    ]  # fmt: skip
    return table("dtype", chosen, lambda row: row["dtype"])


def lowrank(rows: list[Row]) -> str:
    """The low-rank ops at the shapes of real models."""
    chosen = [
        row
        for row in rows
        if row["op"].startswith("lowrank") and row["case"] != "map" and row["mode"] == "full"
        and row["dtype"] == "bfloat16"
    ]  # fmt: skip
    return table("op, shape", chosen, lambda row: f"{row['op']}, {row['shape']}", paired=True)


def factorization(rows: list[Row]) -> str:
    """Perplexity by method and keep_ratio."""
    rows = [row for row in rows if row["settings"] == rows[0]["settings"]]
    keeps = sorted({row["keep_ratio"] for row in rows} - {"1.0"}, key=float, reverse=True)
    found = {(row["method"], row["keep_ratio"]): float(row["perplexity"]) for row in rows}
    lines = [f"| method | {' | '.join(f'keep {keep}' for keep in keeps)} |"]
    lines.append("|---" * (len(keeps) + 1) + "|")
    for name in dict.fromkeys(row["method"] for row in rows if row["method"] != "teacher"):
        cells = [_perplexity(found[name, keep]) if (name, keep) in found else "" for keep in keeps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    teacher = next(row for row in rows if row["method"] == "teacher")
    said = f"(teacher {float(teacher['perplexity']):.2f}; {teacher['settings']}; one run each)"
    return "\n".join([*lines, "", said])


def _perplexity(value: float) -> str:
    return f"{value:,.1f}" if value < 1e5 else f"{value:.1e}"


def comparison(rows: list[Row]) -> str:
    """`makd compare`'s comparison.csv: its own tables."""
    lines = [_nested(row) for row in rows]
    found = {f"{kind}s": [line for line in lines if line["line"] == kind] for kind in LINES}
    tables = markdown_tables({"name": "DialogSum", **found})
    return "\n\n".join(f"{title}\n\n{table}" for title, table in tables.items())


def _nested(row: Row) -> dict[str, Any]:
    """A line of comparison.csv as comparison.json has it: `a.b` is b of a, an empty cell null."""
    nested: dict[str, Any] = {"against": {}}
    for column, cell in row.items():
        *path, last = column.split(".")
        place = nested
        for name in path if cell else ():
            place[name] = place = place.get(name) or {}
        if cell or not path:
            place.setdefault(last, _value(last, cell))
    return nested


def _value(column: str, cell: str) -> Any:
    if column == "seeds":
        return cell.split()
    try:
        return float(cell)
    except ValueError:
        return cell or None


def columns(of: dict[str, str], said: str = "medians") -> Callable[[list[Row]], str]:
    """A table of some columns, under their headings. said: of all figures, below it."""
    return lambda rows: _plain(rows, of, said)


def _plain(rows: list[Row], columns: dict[str, str], figures: str) -> str:
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows]
    first = rows[0]
    said = f"({first['device']}, torch {first['torch']}, commit {first['commit']}; {figures})"
    return "\n".join([*lines, "", said])


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "attention_kl": ("cpu.csv", attention),
    "linear_divergence": ("cpu.csv", linear),
    "lowrank": ("cpu.csv", lowrank),
    "factorization": ("factorization.csv", factorization),
    "decomposition": (
        "decomposition_cpu.csv",
        columns(
            {
                "ranks": "ranks",
                "threads_each": "threads each",
                "decompose_s": "decomposition, s",
                "times_faster": "times faster",
                "whole_s": "all of it, s",
                "peak_MB_of_a_rank": "peak of a rank, MB",
            }
        ),
    ),
    "generation": (
        "generation_cpu.csv",
        columns(
            {
                "batch": "batch",
                "model": "model",
                "tokens_per_second": "tokens/s",
                "of_teachers_time": "of the teacher's time",
                "weights_MB": "weights, MB",
                "peak_MB": "peak beyond them, MB",
            }
        ),
    ),
    "step": (
        "step_cpu.csv",
        columns(
            {
                "objectives": "objectives",
                "seconds_50": "seconds",
                "ratio_to_kd": "of kd's time",
                "in_all_MB": "memory in all, MB",
                "memory_to_kd": "of kd's memory",
            }
        ),
    ),
    "compare": ("compare_dialogsum_cpu.csv", comparison),
    "peers": (
        "peers_cpu.csv",
        columns(
            {
                "batch": "batch",
                "dtype": "dtype",
                "rounds": "rounds",
                "contestant": "",
                "tokens_per_second": "tokens/s",
                "times_trl": "of TRL's",
                "peak_MB": "memory in all, MB",
                "memory_of_trl": "of TRL's",
                "of_matmul": "of the matmul rate",
                "teacher_s": "teacher, s",
                "student_s": "student, s",
                "loss_s": "loss, s",
                "backward_s": "backward, s",
                "optimizer_s": "optimizer, s",
            }
        ),
    ),
    "presets": (
        "presets_cpu.csv",
        columns(
            {
                "preset": "preset",
                "step_median_s": "seconds a step, median",
                "step_mean_s": "mean",
                "step_most_s": "most",
                "time_to_kd": "mean, of kd's",
                "peak_MB": "memory of a rank, MB",
                "memory_to_kd": "of kd's",
                "command_s": "seconds of the command",
            }
        ),
    ),
    "plan": (
        "plan_cpu.csv",
        columns(
            {
                "case": "model, ranks, records x tokens of a rank",
                "predicted_MB": "predicted, MB",
                "measured_MB": "measured, MB",
                "ratio": "ratio",
            },
            said="one run each",
        ),
    ),
    "plan_traffic": (
        "plan_traffic_cpu.csv",
        columns(
            {
                "case": "model, ranks, records x tokens of a rank",
                "collective": "collective",
                "predicted_MB": "predicted, MB",
                "measured_MB": "DeepSpeed's comms logger, MB",
                "ratio": "ratio",
            },
            said="one run each",
        ),
    ),
    "scaling": (
        "scaling_cpu.csv",
        columns(
            {
                "way": "",
                "step_s": "seconds a step",
                "tokens_per_second": "tokens/s",
                "times_1_rank": "of 1 rank",
                "waiting_share": "share of waiting",
                "beyond_twice_share": "share beyond 1 rank, twice",
                "peak_MB": "peak of a rank, MB",
            }
        ),
    ),
    "offline": (
        "offline_cpu.csv",
        columns(
            {
                "k": "k",
                "bytes_per_token": "bytes a summary token",
                "online": "loss online",
                "difference": "offline, difference",
                "difference_by_token": "mean of the differences token by token",
            }
        ),
    ),
}


def table(
    first: str, rows: Sequence[Row], label: Callable[[Row], str], *, paired: bool = False
) -> str:
    """A line for each label, a column for each provider: median time and peak memory.

    paired: with the ratio to the first provider, turn by turn, and its 95 % interval.
    """
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [f"| {first} | {' | '.join(providers)} |", "|---" * (len(providers) + 1) + "|"]
    for one in dict.fromkeys(map(label, rows)):
        cells = {row["provider"]: row for row in rows if label(row) == one}
        shown = [_cell(cells[name], paired) if name in cells else "" for name in providers]
        lines.append(f"| {one} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", _source(rows[0])])


def _cell(row: Row, paired: bool) -> str:
    milliseconds = float(row["ms_50"])
    digits = 0 if milliseconds >= 100 else 1
    cell = f"{milliseconds:,.{digits}f} ms, {float(row['peak_MB']):,.0f} MB"
    if paired and float(row["of_plain"]) != 1:
        cell += f", × {row['of_plain']} ({row['of_plain_low']} to {row['of_plain_high']})"
    return cell


def _source(row: Row) -> str:
    return (
        f"(`python benchmarks/run.py --suite cpu`: {row['device']}, {row['threads']} threads, "
        f"torch {row['torch']}, commit {row['commit']}; median time, peak memory beyond the inputs)"
    )


def rows_of(file: str) -> list[Row]:
    """The committed measurements of this name."""
    with (RESULTS / file).open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def filled(text: str) -> str:
    """`text` with every marked table made anew."""

    def replaced(found: re.Match) -> str:
        file, table_of = TABLES[found[2]]
        return f"{found[1]}\n{table_of(rows_of(file))}\n<!-- end -->"

    return re.sub(r"(<!-- measured: (\w+) -->)\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    wrong = 0
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if arguments.check and new != text:
            wrong += 1
            print(f"{path.relative_to(ROOT)}: a table differs; run python benchmarks/readme.py")
        elif new != text:
            path.write_text(new, encoding="utf-8")
            print(f"written {path.relative_to(ROOT)}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
