"""All operations of a suite in one process and one table, with the machine's ceilings first.

python benchmarks/run.py --suite cpu                 # benchmarks/results/cpu.csv, and plots
python benchmarks/run.py --suite gpu --out gpu.csv
"""

import argparse
from pathlib import Path

import torch

import attention_kl
import linear_divergence
import lowrank
import plots
from measure import RESULTS, copy_rate, matmul_peak, print_header, say, write

REPEATS = {"attention_kl": 7, "linear_divergence": 3, "lowrank": 15}
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
    parser.add_argument("--only", choices=list(SUITES), action="append", help="one operation")
    arguments = parser.parse_args()
    device = "cpu" if arguments.suite == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--suite gpu needs a CUDA device, and torch sees none here")
    target = arguments.out or RESULTS / f"{arguments.suite}.csv"
    for dtype in (torch.bfloat16, torch.float32):
        say(f"ceiling: matmul in {dtype}: {matmul_peak(device, dtype):.3g} TFLOP/s")
    say(f"ceiling: copy: {copy_rate(device):.3g} GB/s")
    print_header()
    rows = []
    for name in arguments.only or SUITES:
        rows += SUITES[name](device, REPEATS[name])
        write(rows, target)  # what is measured stays, whatever comes after
    plots.draw(target)


if __name__ == "__main__":
    main()
