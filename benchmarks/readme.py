"""Write the READMEs' tables from the committed measurements, so that no figure is typed by hand.

    python benchmarks/readme.py            # rewrite them
    python benchmarks/readme.py --check    # exit code 1 if one differs from its measurements

A table stands between the lines `<!-- measured: NAME -->` and `<!-- end -->`.
"""

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READMES = (ROOT / "kernels" / "README.md",)
RESULTS = Path(__file__).parent / "results"
Row = dict[str, str]


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


TABLES = {"attention_kl": attention, "linear_divergence": linear, "lowrank": lowrank}


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


def filled(text: str, rows: list[Row]) -> str:
    """`text` with every marked table made anew."""

    def replaced(found: re.Match) -> str:
        return f"{found[1]}\n{TABLES[found[2]](rows)}\n<!-- end -->"

    return re.sub(r"(<!-- measured: (\w+) -->)\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    with (RESULTS / "cpu.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = 0
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        new = filled(text, rows)
        if arguments.check and new != text:
            wrong += 1
            print(f"{path.relative_to(ROOT)}: a table differs; run python benchmarks/readme.py")
        elif new != text:
            path.write_text(new, encoding="utf-8")
            print(f"written {path.relative_to(ROOT)}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
