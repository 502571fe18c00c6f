"""Pictures of a suite's table: rate and memory against length, with the ceilings drawn.

python -m benchmarks.plots benchmarks/results/cpu.csv
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

MARKERS = "osD^vP*X"


def draw(table: Path) -> list[Path]:
    """Write the PNGs that the table has rows for, beside it; returns their paths."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [path for path in (_attention(rows, table), _lowrank(rows, table)) if path is not None]


def _attention(rows: list[dict[str, str]], table: Path) -> Path | None:
    """attention_kl, forward and backward in bf16: useful TFLOP/s and peak MB against T."""
    series: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    ceiling = 0.0
    for row in rows:
        by_length = row["case"].startswith("T ") and row["case"].endswith("forward_kl")
        if row["op"] == "attention_kl" and by_length and row["mode"] == "full":
            if row["dtype"] != "bfloat16":
                continue
            tokens = int(row["case"].removeprefix("T ").split(",")[0])
            rate, memory = float(row["useful_TFLOP/s"]), float(row["peak_MB"] or "nan")
            series[row["provider"]].append((tokens, rate, memory))
            ceiling = rate / float(row["of_matmul_peak"].rstrip("%")) * 100
    if not series:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speed, memory_axes = figure.subplots(1, 2)
    for marker, (name, points) in zip(MARKERS, sorted(series.items()), strict=False):
        lengths, rates, memories = zip(*sorted(points), strict=True)
        speed.plot(lengths, rates, marker=marker, label=name)
        memory_axes.plot(lengths, memories, marker=marker, label=name)
    speed.axhline(ceiling, color="black", linestyle="--", linewidth=1)
    speed.annotate("matmul here", (min(lengths), ceiling), va="bottom", fontsize=8)
    speed.set(ylabel="useful TFLOP/s")
    memory_axes.set(ylabel="peak MB beyond the inputs")
    for axes in (speed, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
    speed.legend(fontsize=8)
    figure.suptitle(f"attention_kl, bf16, forward and backward: {rows[0]['device']}", fontsize=10)
    target = table.with_name(f"{table.stem}_attention_kl.png")
    figure.savefig(target, dpi=120)
    return target


def _lowrank(rows: list[dict[str, str]], table: Path) -> Path | None:
    """Time of the low-rank ops relative to two matmuls; above 1 is the losing region."""
    medians: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["op"].startswith("lowrank") and row["mode"] == "full" and row["dtype"] == "bfloat16":
            medians[row["op"], row["case"]][row["provider"]] = float(row["ms_50"])
    if not medians:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    labels = [f"{op.removeprefix('lowrank_')}\n{case}" for op, case in medians]
    names = [name for name in next(iter(medians.values())) if name != "two matmuls"]
    for index, name in enumerate(names):
        ratios = [found[name] / found["two matmuls"] for found in medians.values()]
        places = [place + 0.8 * index / len(names) for place in range(len(labels))]
        axes.bar(places, ratios, width=0.8 / len(names), label=name)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel("time, two matmuls = 1")
    axes.legend(fontsize=8)
    figure.suptitle(
        f"low-rank products, bf16, forward and backward: {rows[0]['device']}", fontsize=10
    )
    target = table.with_name(f"{table.stem}_lowrank.png")
    figure.savefig(target, dpi=120)
    return target


def main() -> None:
    """Draw for the tables that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", type=Path, nargs="+")
    for table in parser.parse_args().tables:
        for path in draw(table):
            print(path)


if __name__ == "__main__":
    main()
