"""Pictures of a suite's table: rate and memory against length, with the ceilings drawn.

python benchmarks/plots.py benchmarks/results/cpu.csv
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MARKERS = "osD^vP*X<>"
LOSS = 1.03
FUSED = "fused"


def draw(table: Path) -> list[Path]:
    """Write the PNGs that the table has rows for, beside it; returns their paths."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [path for path in (_attention(rows, table), _lowrank(rows, table)) if path is not None]


def _attention(rows: list[dict[str, str]], table: Path) -> Path | None:
    """attention_kl, forward and backward in bf16: useful TFLOP/s and peak MB against T."""
    series: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    ceiling, best = 0.0, 0.0
    for row in rows:
        by_length = row["case"].startswith("T ") and row["case"].endswith("forward_kl")
        if row["op"] == "attention_kl" and by_length and row["mode"] == "full":
            if row["dtype"] != "bfloat16":
                continue
            tokens = int(row["case"].removeprefix("T ").split(",")[0])
            rate, memory = float(row["useful_TFLOP/s"]), float(row["peak_MB"] or "nan")
            series[row["provider"]].append((tokens, rate, memory))
            share = float(row["of_matmul_peak"].rstrip("%")) / 100
            if share > best:  # the share is rounded, least so where it is large
                best, ceiling = share, rate / share
    if not series:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speed, memory_axes = figure.subplots(1, 2)
    for marker, (name, points) in zip(itertools.cycle(MARKERS), series.items(), strict=False):
        lengths, rates, memories = zip(*sorted(points), strict=True)
        speed.plot(lengths, rates, marker=marker, label=name)
        memory_axes.plot(lengths, memories, marker=marker, label=name)
    speed.axhline(ceiling, color="black", linestyle="--", linewidth=1)
    speed.annotate("matmul here", (min(lengths), ceiling), va="bottom", fontsize=8)
    speed.set(ylabel="useful TFLOP/s")
    memory_axes.set(ylabel="peak MB beyond the inputs")
    for axes in (speed, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, map(str, lengths))
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
    speed.legend(fontsize=8)
    figure.suptitle(f"attention_kl, bf16, forward and backward: {rows[0]['device']}", fontsize=10)
    target = table.with_name(f"{table.stem}_attention_kl.png")
    figure.savefig(target, dpi=120)
    return target


def _lowrank(rows: list[dict[str, str]], table: Path) -> Path | None:
    """Maps of rank and rows, bf16, forward and backward; ours against its rivals."""
    times: dict[tuple[str, str], dict[tuple[int, int], float]] = defaultdict(dict)
    for row in rows:
        if row["case"] == "map":
            size = dict(re.findall(r"([A-Z])(\d+)", row["shape"]))
            cell = (int(size["R"]), int(size["N"]))
            times[row["op"], row["provider"]][cell] = float(row["ms_50"])
    if not times:
        return None
    from matplotlib.figure import Figure

    ways = [("ours", "two matmuls"), ("ours", "dense"), (FUSED, "two matmuls")]
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    axes = figure.subplots(2, len(ways))
    for line, op in enumerate(("lowrank_linear", "lowrank_swiglu")):
        for column, (way, rival) in enumerate(ways):
            # on a GPU the fused way is Triton's, elsewhere the blocks of rows
            names = (way,) if way != FUSED else ("ours, Triton", "ours, blockwise")
            found = next((times[op, name] for name in names if (op, name) in times), {})
            if not found:
                axes[line][column].set_axis_off()
                continue
            ratios = {cell: median / times[op, rival][cell] for cell, median in found.items()}
            image = _map(axes[line][column], ratios)
            axes[line][column].set_title(f"{op}: {way} / {rival}", fontsize=9)
    bar = figure.colorbar(image, ax=axes, label="time against the rival", shrink=0.6)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "equal", "2", "4"])
    figure.suptitle(
        f"{rows[0]['device']}: low-rank ops, bf16, forward and backward; underlined: more than "
        f"{LOSS - 1:.0%} slower",
        fontsize=10,
    )
    target = table.with_name(f"{table.stem}_lowrank.png")
    figure.savefig(target, dpi=120)
    return target


def _map(axes: Axes, ratios: dict[tuple[int, int], float]) -> AxesImage:
    """One map: ranks upwards, rows to the right."""
    ranks, counts = (sorted({cell[axis] for cell in ratios}) for axis in (0, 1))
    grid = [[math.log2(ratios.get((rank, count), math.nan)) for count in counts] for rank in ranks]
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2)
    for (rank, count), ratio in ratios.items():
        place = counts.index(count), ranks.index(rank)
        dark = abs(math.log2(ratio)) > 1.2
        axes.text(
            *place, f"{ratio:.2f}", ha="center", va="center", fontsize=9,
            color="white" if dark else "black", weight="bold" if ratio > LOSS else "normal",
        )  # fmt: skip
        if ratio > LOSS:
            axes.plot([place[0] - 0.25, place[0] + 0.25], [place[1] - 0.2] * 2, color="black")
    axes.set_xticks(range(len(counts)), map(str, counts))
    axes.set_yticks(range(len(ranks)), map(str, ranks))
    axes.set(xlabel="rows", ylabel="rank")
    return image


def main() -> None:
    """Draw for the tables that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", type=Path, nargs="+")
    for table in parser.parse_args().tables:
        for path in draw(table):
            print(path)


if __name__ == "__main__":
    main()
