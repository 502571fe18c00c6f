"""The planner against what runs: predicted and measured memory and messages of training steps.

    python benchmarks/plan.py            (CPU processes; about 20 minutes on 2 cores)
    ... --only "smollm2 2 ranks"         (some cases, by a part of their names)
    ... --replan                         (what was measured against the planner as it is now)

Every case is a distillation on DeepSpeed's engines with random weights, in processes of its own: a
step that makes the optimizer's states, then one that is measured (on several ranks two: ZeRO-3
gathers ahead from the second step on), the optimizer's part included. Memory is the resident memory
of the process at its largest, less a baseline: the same process after two steps of a tiny model on
the same engines, so that code and libraries are in it. Freed buffers are given back at once
(MALLOC_MMAP_THRESHOLD_), as the planner counts tensors that are alive and not what glibc keeps for
later. Messages are the bytes that DeepSpeed's comms logger counts on a rank in a step.

Writes results/plan_cpu.csv and results/plan_traffic_cpu.csv.
"""

import argparse
import csv
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.comm.comm import comms_logger

from makd_llm import distributed
from makd_llm.cluster.memory import memory_of
from makd_llm.cluster.traffic import traffic_of
from makd_llm.memory import Peak
from makd_llm.planning import build_job
from measure import RESULTS, where, write
from training import Case, Training, deepspeed_json, folders, launch, leave

HERE = Path(__file__).resolve()
MB = 10**6
"""As `makd plan` prints its GB; makd_llm.memory counts 2^20."""

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")


CASES = (
    Case("smollm2", 1, 512),
    Case("wide", 1, 256),
    Case("smollm2", 2, 256, records=1),
    Case("wide", 2, 1024, records=1),
    Case("smollm2", 1, 512, checkpointing=True),
    Case("wide", 2, 1024, checkpointing=True, records=1),
    Case("smollm2", 2, 512, records=1),
    Case("wide", 2, 256, ds="zero2.json"),
    Case("wide", 2, 256, ds="zero1.json"),
    Case("wide", 2, 256, ds="zero3_hpz.json"),
    Case("wide", 2, 256, limit=5_000_000),
    Case("wide", 1, 1024),
    Case("smollm2", 1, 512, preset="kd"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the names of the cases to run")
    parser.add_argument("--replan", action="store_true", help="measure nothing, plan anew")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Case(**json.loads(arguments.measure)), arguments.folder)
        return
    with tempfile.TemporaryDirectory(prefix="makd-plan-") as scratch:
        for case in CASES:
            if arguments.only not in case.name:
                continue
            predicted = planned(case, Path(scratch))
            if arguments.replan:
                measured = measured_before(case)
            else:
                measured = measured_now(case, Path(scratch))
            for path, names, rows in zip((MEMORY, TRAFFIC), NAMES, measured, strict=True):
                for row in rows:
                    told = predicted[row[names]]
                    row["predicted_MB"] = f"{told:.2f}" if path == TRAFFIC else f"{told:.0f}"
                    row["ratio"] = f"{told / float(row['measured_MB']):.3f}"
                    print({key: row[key] for key in list(row)[:7]}, flush=True)
                merge(rows, path)


MEMORY, TRAFFIC = RESULTS / "plan_cpu.csv", RESULTS / "plan_traffic_cpu.csv"
NAMES = ("case", "collective")
Rows = list[dict[str, Any]]


def merge(rows: Rows, path: Path) -> None:
    """Puts rows into a table, in the place of what it has of the same case."""
    kept: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            kept = list(csv.DictReader(file))
    names = {row["case"] for row in rows}
    kept = [row for row in kept if row["case"] not in names] + rows
    order = [case.name for case in CASES]
    kept.sort(key=lambda row: order.index(row["case"]) if row["case"] in order else len(order))
    if kept:
        write(kept, path)


def planned(case: Case, scratch: Path) -> dict[str, float]:
    """MB of the peak under the case's name, and by collective."""
    teacher, student = folders(case, scratch)
    path = scratch / case.ds
    path.write_text(json.dumps(deepspeed_json(case)), encoding="utf-8")
    job, _ = build_job(
        teacher,
        path,
        preset=case.preset,
        student=student,
        gpus=case.ranks,
        batch=case.ranks * case.records,
        length=case.length,
        checkpointing=case.checkpointing,
        on_cpu=True,
    )
    found = dict.fromkeys(COLLECTIVES, 0.0)
    for message in traffic_of(job):
        found[message.collective] += message.logged / MB
    return {**found, case.name: memory_of(job).peak / MB}


def measured_before(case: Case) -> tuple[Rows, Rows]:
    """The rows of a case that are in the tables."""
    found = []
    for path in (MEMORY, TRAFFIC):
        rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        found.append([dict(row) for row in rows if row["case"] == case.name])
    return found[0], found[1]


def measured_now(case: Case, scratch: Path) -> tuple[Rows, Rows]:
    """Runs a case: its row, and one for each collective that carries more than counts and means."""
    folders(Case("tiny", 1, 64), scratch)  # the baseline's; the case's own were made to plan it
    found = launch(HERE, case, scratch / "ranks", MALLOC_MMAP_THRESHOLD_="65536").results()
    row = {
        "case": case.name,
        "predicted_MB": "",
        "measured_MB": f"{max(rank['peak_MB'] - rank['baseline_MB'] for rank in found):.0f}",
        "ratio": "",
        "baseline_MB": f"{max(rank['baseline_MB'] for rank in found):.0f}",
        "in_all_MB": f"{max(rank['peak_MB'] for rank in found):.0f}",
        **where("cpu"),
    }
    messages = [
        {
            "case": case.name,
            "collective": collective,
            "predicted_MB": "",
            "measured_MB": f"{logged / MB:.2f}",
            "ratio": "",
            **where("cpu"),
        }
        for collective, logged in sorted(found[0]["logged"].items())
        if case.ranks > 1 and logged >= 2**16
    ]
    return [row], messages


def measure(case: Case, folder: Path) -> None:
    """One rank of a case: the baseline, then the steps."""
    torch.set_num_threads(1)
    distributed.quiet()
    distributed.init()
    steps(replace(case, model="tiny", length=64, records=2), folder.parent, 2)
    baseline = Peak(distributed.device()).before
    found = steps(case, folder.parent, 3 if case.ranks > 1 else 2)
    leave({**found, "baseline_MB": _decimal(baseline)}, folder)
    distributed.shutdown()


def steps(case: Case, scratch: Path, count: int) -> dict[str, Any]:
    """Trains so many steps; the peak from the second on, and the messages of the last."""
    training = Training(case, scratch, log_messages=True)
    training.step()
    peak = Peak(distributed.device())
    for step in range(1, count):
        if step == count - 1:
            comms_logger.reset_data()
        training.step()
    logged: dict[str, int] = {}
    for name, sizes in comms_logger.get_raw_data().items():
        total = sum(size * found[0] for size, found in sizes.items())
        key = next((known for known in COLLECTIVES if name.startswith(known)), name)
        logged[key] = logged.get(key, 0) + total
    found = {"peak_MB": _decimal(peak.megabytes()), "logged": logged}
    training.close()
    return found


def _decimal(mebibytes: float | None) -> float:
    """In MB."""
    if mebibytes is None:
        raise SystemExit("this system does not say how much memory a process takes")
    return mebibytes * 2**20 / MB


if __name__ == "__main__":
    main()
