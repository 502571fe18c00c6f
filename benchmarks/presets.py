"""Every preset as a user runs it: `makd train --preset X` for a few steps, and what they took.

    python benchmarks/presets.py                    (the demo's SmolLM2-135M and data; two ranks)
    python benchmarks/presets.py --presets kd makd --steps 20 -- data.max_length=512

One run folder: the teacher is tuned and the student is cut once, and the stage distil runs again
for each preset, in a process of its own, optimizer and writing of texts included. What stands after
`--` goes to every command. Columns: seconds of a step without the first (median, mean and most:
they differ where some steps do more than others), the mean's ratio to kd's; the peak memory of the
rank that needed most while it learnt, all that a process holds, and its ratio; the loss at the
first and the last step (of different objectives: not to be compared with each other); the seconds
of the whole command, with loading, the teacher's writing, saving. Presets run one after the other,
so ratios of a few per cent are the machine's; benchmarks/step.py takes turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from makd_llm import distributed
from makd_llm.config.presets import preset_names
from measure import RESULTS, say, where, write

CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Runs the presets, says a line for each, and writes results/presets_<device>.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=preset_names(), help="kd is added")
    parser.add_argument("--ds", type=Path, default=CHECKOUT / "ds_configs" / "zero3.json")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="records of a step, over all ranks")
    parser.add_argument("--run", type=Path, default=CHECKOUT / "runs" / "presets")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    parser.add_argument("overrides", nargs="*", help="key.path=value, for every preset")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = asked.results / f"presets_{device}.csv"
    _run(asked, "kd", until="factorize")  # or the first preset's process would hold its leavings
    rows: list[dict[str, Any]] = []
    for preset in dict.fromkeys(["kd", *asked.presets]):
        row = row_of(preset, asked, rows[0] if rows else None)
        rows.append({**row, "ranks": asked.ranks, "batch": asked.batch, **where(device)})
        say("  ".join(f"{name} {value}" for name, value in row.items()))
        write(rows, target)  # after each: they take long
    print(f"written {target}", file=sys.stderr)


def row_of(preset: str, asked: argparse.Namespace, kd: dict[str, Any] | None) -> dict[str, object]:
    """One preset, run and read back. kd: the row that ratios are taken to; None: this one."""
    took = _run(asked, preset, until="distil")
    lines = (asked.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, lines) if entry["stage"] == "distil"]
    seconds = [entry["seconds"] for entry in steps[1:]]
    mean = statistics.mean(seconds)
    peak = steps[-1].get("peak_memory_MB")
    return {
        "preset": preset,
        "steps": len(steps),
        "step_median_s": f"{statistics.median(seconds):.2f}",
        "step_mean_s": f"{mean:.2f}",
        "step_most_s": f"{max(seconds):.2f}",
        "time_to_kd": f"{mean / float(kd['step_mean_s']) if kd else 1.0:.2f}",
        "peak_MB": "" if peak is None else f"{peak:.0f}",
        "memory_to_kd": "" if peak is None else f"{peak / float(kd['peak_MB']) if kd else 1.0:.2f}",
        "loss_first": f"{steps[0]['loss']:.3f}",
        "loss_last": f"{steps[-1]['loss']:.3f}",
        "command_s": f"{took:.0f}",
    }


def _run(asked: argparse.Namespace, preset: str, *, until: str) -> float:
    """Seconds of the command."""
    # fmt: off
    command = [
        "deepspeed", "--num_accelerators", str(asked.ranks),
        "--master_port", str(distributed.free_port()), str(CHECKOUT / "train.py"),
        "--ds", str(asked.ds), "--preset", preset, "--until", until,
        f"run_dir={asked.run}", f"distil.train.steps={asked.steps}",
        f"distil.train.batch_size={asked.batch}", *asked.overrides,
    ]
    # fmt: on
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"presets: {preset} failed\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return time.monotonic() - began


if __name__ == "__main__":
    main()
