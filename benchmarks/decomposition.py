"""Seconds to decompose a teacher's matrices, whitened: one rank against several, in turns.

    python benchmarks/decomposition.py --calibrate valid.txt [--ranks 1 2]

Each turn starts the ranks anew, one thread each, and every rank decomposes its share of what the
same calibration text gave; the slowest rank's time counts. Also shown: one rank with as many
threads as there are ranks, the walk that gathers the statistics, and the peak memory of a rank.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from makd_llm import distributed
from makd_llm.data.batch import batches_of, pad_id_of
from makd_llm.data.text import read_tokens, spread_windows
from makd_llm.factorize import calibration
from makd_llm.factorize.student import Recipe, factorize
from makd_llm.models.source import load_tokenizer, resolve_model
from measure import RESULTS, say, where, write


def main() -> None:
    """Runs every number of ranks in turns and writes a row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--calibrate", type=Path, required=True, help="a .txt file")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=8, help="windows")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--rank-multiple", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "decomposition_cpu.csv")
    asked = parser.parse_args()
    if "RANK" in os.environ:
        _rank(asked)
        return
    ways = [(ranks, 1) for ranks in asked.ranks] + [(1, max(asked.ranks))]
    found: dict[tuple[int, int], list[dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(asked.turns):
        for ranks, threads in ways:
            say(f"turn {turn + 1}: {ranks} ranks, {threads} threads each")
            found[ranks, threads].append(_turn(ranks, threads))
    rows = []
    for (ranks, threads), turns in found.items():
        seconds = statistics.median(t["decompose"] for t in turns)
        alone = statistics.median(t["decompose"] for t in found[asked.ranks[0], 1])
        row = {
            "ranks": ranks,
            "threads_each": threads,
            "decompose_s": f"{seconds:.2f}",
            "times_faster": f"{alone / seconds:.2f}",
            "whole_s": f"{statistics.median(t['whole'] for t in turns):.2f}",
            "peak_MB_of_a_rank": f"{max(t['peak_MB'] for t in turns):.0f}",
        }
        rows.append(row | where("cpu"))
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    write(rows, asked.out)


def _turn(ranks: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [f"--master-port={distributed.free_port()}", *sys.argv]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"decompose"')]
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _rank(asked: argparse.Namespace) -> None:
    """One rank of one turn."""
    distributed.quiet()
    distributed.init()
    teacher = resolve_model(asked.teacher)
    tokenizer = load_tokenizer(teacher)
    tokens, _ = read_tokens(asked.calibrate, tokenizer, "--calibrate")
    windows = spread_windows(tokens, window=asked.window, count=asked.samples)
    mine = windows[distributed.rank() :: distributed.world_size()]
    seconds = [0.0]
    share = calibration.decompose_share

    def timed(*given: Any) -> None:
        distributed.barrier()
        began = time.perf_counter()
        share(*given)
        distributed.barrier()
        seconds[0] += time.perf_counter() - began

    calibration.decompose_share = timed  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        out = distributed.broadcast_object(scratch)
        began = time.perf_counter()
        factorize(
            teacher,
            Path(out) / "student",
            Recipe(0.5, rank_multiple=asked.rank_multiple),
            batches_of(mine, 2, pad_id_of(tokenizer)),
            tokenizer=tokenizer,
            dtype=torch.bfloat16,
        )
        whole = time.perf_counter() - began
        distributed.barrier()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peaks = distributed.gather_objects(peak)
    if distributed.is_main():
        print(json.dumps({"decompose": seconds[0], "whole": whole, "peak_MB": max(peaks)}))
    distributed.shutdown()


if __name__ == "__main__":
    main()
