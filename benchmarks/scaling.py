"""From one rank to two on one machine: what a step of a distillation takes, each rank on a core of
its own.

    python benchmarks/scaling.py                                (CPU processes; some 15 minutes)
    ... --model wide --ds zero2.json --preset kd --length 256

Three ways take turns, round after round, in processes of their own:

- *1 rank*: on the first core, the second one idle;
- *1 rank, twice*: two such trainings at the same time, one on each core, that know nothing of each
  other: what two cores of this machine lose to each other with no message sent;
- *2 ranks*: one training, sharded, with as many records on each rank as before.

Columns: seconds per optimizer step (median of all rounds and ranks); tokens/s of all ranks
together, and how many times those of 1 rank; seconds of a step in which a rank does nothing but
wait for messages (the main thread inside a collective or a handle's wait), and their share of the
step; what the step takes beyond that of *1 rank, twice*: waiting, and the copies that gathering and
reducing make on the ranks' own cores; peak memory of a rank (of the process, code and libraries
among it).

Writes results/scaling_cpu.csv.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from makd_llm import distributed
from makd_llm.memory import Peak
from measure import RESULTS, where, write
from training import Case, Training, folders, launch, leave

HERE = Path(__file__).resolve()
WAYS = {"1 rank": (1, 1), "1 rank, twice": (1, 2), "2 ranks": (2, 1)}
"""Ranks of a training, and trainings at the same time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="of benchmarks/training.py")
    parser.add_argument("--ds", default="zero3.json", help="a file of ds_configs/")
    parser.add_argument("--preset", default="makd")
    parser.add_argument("--records", type=int, default=2, help="of a rank and step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a record")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a round, after two to warm up")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        case = Case(**json.loads(arguments.measure))
        measure(case, arguments.folder, arguments.core, arguments.steps)
        return
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed, one for each rank")
    cases = {
        way: Case(
            arguments.model,
            ranks,
            arguments.length,
            ds=arguments.ds,
            preset=arguments.preset,
            records=arguments.records,
        )
        for way, (ranks, _) in WAYS.items()
    }
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="makd-scaling-") as scratch:
        folders(cases["1 rank"], Path(scratch))
        for count in range(arguments.rounds):
            for way, (_, times) in WAYS.items():
                started = [
                    launch(
                        *(HERE, cases[way], Path(scratch) / f"ranks{core}"),
                        *("--core", str(core), "--steps", str(arguments.steps)),
                    )
                    for core in range(times)
                ]
                ranks = [rank for one in started for rank in one.results()]
                found[way] += ranks
                shown = [f"{statistics.median(rank['seconds']):.2f}" for rank in ranks]
                print(f"round {count + 1}: {way}: {', '.join(shown)} s a step", flush=True)
    rows = table(cases, found)
    write(rows, RESULTS / "scaling_cpu.csv")
    for row in rows:
        print({key: row[key] for key in list(row)[:10]})


def table(cases: dict[str, Case], found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each way."""
    step = {
        way: statistics.median(s for rank in ranks for s in rank["seconds"])
        for way, ranks in found.items()
    }
    rows = []
    for way, ranks in found.items():
        case, cores = cases[way], WAYS[way][0] * WAYS[way][1]
        waited = statistics.median(w for rank in ranks for w in rank["waited"])
        beyond = step[way] - step["1 rank, twice"] if case.ranks > 1 else None
        speed = cores * case.records * case.length / step[way]
        alone = case.records * case.length / step["1 rank"]
        rows.append(
            {
                "way": way,
                "case": case.name.replace(f" {case.ranks} ranks", ""),
                "step_s": f"{step[way]:.2f}",
                "tokens_per_second": f"{speed:.0f}",
                "times_1_rank": f"{speed / alone:.2f}",
                "waiting_s": f"{waited:.2f}" if case.ranks > 1 else "",
                "waiting_share": f"{waited / step[way]:.3f}" if case.ranks > 1 else "",
                "beyond_twice_s": "" if beyond is None else f"{beyond:.2f}",
                "beyond_twice_share": "" if beyond is None else f"{beyond / step[way]:.3f}",
                "peak_MB": f"{max(rank['peak_MB'] for rank in ranks):.0f}",
                "steps": len(ranks[0]["seconds"]) * len(ranks),
                **where("cpu"),
            }
        )
    return rows


def measure(case: Case, folder: Path, core: int, steps: int) -> None:
    """One rank of a case, on one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core + int(os.environ["LOCAL_RANK"])]})
    torch.set_num_threads(1)
    distributed.quiet()
    distributed.init()
    training = Training(case, folder.parent)
    waiting = Waiting()
    for _ in range(2):  # ZeRO-3 gathers ahead from the second step on
        training.step()
    peak = Peak(distributed.device())
    seconds, waited = [], []
    for _ in range(steps):
        distributed.barrier()
        before, began = waiting.seconds, time.perf_counter()
        training.step()
        seconds.append(time.perf_counter() - began)
        waited.append(waiting.seconds - before)
    leave({"seconds": seconds, "waited": waited, "peak_MB": peak.megabytes()}, folder)
    distributed.shutdown()


class Waiting:
    """Seconds that this thread spends until messages have come, from now on.

    Every collective of torch.distributed, asked for by whomever, ends in the wait of its Work.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        wait: Callable[..., object] = dist.Work.wait

        def timed(*arguments: Any, **named: Any) -> object:
            began = time.perf_counter()
            try:
                return wait(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began

        dist.Work.wait = timed  # type: ignore[assignment]


if __name__ == "__main__":
    main()
