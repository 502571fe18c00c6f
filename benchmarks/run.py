"""All operations of a suite in one process and one table, with the machine's ceilings first.

python benchmarks/run.py --suite cpu                 # benchmarks/results/cpu.csv, and plots
python benchmarks/run.py --suite gpu --out gpu.csv
"""

import argparse
import csv
from pathlib import Path

import torch

import attention_kl
import linear_divergence
import lowrank
import plots
from measure import RESULTS, Rows, collect, copy_rate, matmul_peak, print_header, say

REPEATS = {"attention_kl": 7, "linear_divergence": 3, "lowrank": 25}
SUITES = {
    "attention_kl": attention_kl.run,
    "linear_divergence": linear_divergence.run,
    "lowrank": lowrank.run,
}


def main() -> None:
    """Measure the suite, write its table and its plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", required=True, choices=["cpu", "gpu"])
    parser.add_argument("--out", type=Path, help="a .csv; the plots lie beside it")
    parser.add_argument(
        "--only",
        choices=list(SUITES),
        action="append",
        help="one operation; the rows of the others stay",
    )
    arguments = parser.parse_args()
    device = "cpu" if arguments.suite == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--suite gpu needs a CUDA device, and torch sees none here")
    target = arguments.out or RESULTS / f"{arguments.suite}.csv"
    for dtype in (torch.bfloat16, torch.float32):
        say(f"ceiling: matmul in {dtype}: {matmul_peak(device, dtype):.3g} TFLOP/s")
    say(f"ceiling: copy: {copy_rate(device):.3g} GB/s")
    print_header()
    chosen = arguments.only or list(SUITES)
    rows = [] if chosen == list(SUITES) else others(target, chosen)
    for name in chosen:
        collect(rows, SUITES[name](device, REPEATS[name]), target)
    for path in (target, *plots.draw(target)):
        say(f"written {path}")


def others(table: Path, chosen: list[str]) -> Rows:
    """The table's rows of operations that are not measured now."""
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if not row["op"].startswith(tuple(chosen))]


if __name__ == "__main__":
    main()
