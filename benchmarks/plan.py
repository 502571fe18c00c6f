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
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, say, where, write

HERE = Path(__file__).resolve()
CHECKOUT = HERE.parents[1]

# SmolLM2-135M's shape, a wider and shallower one with its own head, and one for the baseline.
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "wide": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 16000,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}


COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")


@dataclass(frozen=True)
class Case:
    """One configuration that is planned and run."""

    model: str
    ranks: int
    length: int
    checkpointing: bool = False
    ds: str = "zero3.json"
    preset: str = "makd"
    records: int = 2
    keep: float = 0.5

    @property
    def name(self) -> str:
        tokens = f"{self.records} x {self.length}"
        said = f"{self.model} {self.ranks} ranks {tokens} {self.ds} {self.preset}"
        return said + (" checkpointed" if self.checkpointing else "")


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
    from makd_llm.cluster.memory import memory_of
    from makd_llm.cluster.traffic import traffic_of
    from makd_llm.planning import build_job

    teacher, student = folders(case, scratch)
    path = scratch / case.ds
    path.write_text(json.dumps(deepspeed(case)), encoding="utf-8")
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
        found[message.collective] += message.logged / 2**20
    return {**found, case.name: memory_of(job).peak / 2**20}


def measured_before(case: Case) -> tuple[Rows, Rows]:
    """The rows of a case that are in the tables."""
    found = []
    for path in (MEMORY, TRAFFIC):
        rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        found.append([dict(row) for row in rows if row["case"] == case.name])
    return found[0], found[1]


def measured_now(case: Case, scratch: Path) -> tuple[Rows, Rows]:
    """Runs a case: its row, and one for each collective that carries more than counts and means."""
    found = launched(case, scratch)
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
            "measured_MB": f"{logged / 2**20:.2f}",
            "ratio": "",
            **where("cpu"),
        }
        for collective, logged in sorted(found[0]["logged"].items())
        if case.ranks > 1 and logged >= 2**16
    ]
    return [row], messages


def deepspeed(case: Case) -> dict[str, Any]:
    """The JSON of a case; ZeRO++'s second copy is spread over as many ranks as there are."""
    given: dict[str, Any] = json.loads(
        (CHECKOUT / "ds_configs" / case.ds).read_text(encoding="utf-8")
    )
    if "zero_hpz_partition_size" in given["zero_optimization"]:
        given["zero_optimization"]["zero_hpz_partition_size"] = case.ranks
    return given


def folders(case: Case, scratch: Path) -> tuple[Path, Path]:
    """Teacher and student of a case, made of random numbers, on disk."""
    import torch
    from transformers import LlamaConfig

    from makd_llm.cluster.sizes import student_config
    from makd_llm.models.modeling_lowrank import model_class_for

    made = []
    for name in ("teacher", "student"):
        folder = scratch / f"{case.model}-{name}"
        if not (folder / "config.json").exists():
            config: Any = LlamaConfig(**MODELS[case.model], max_position_embeddings=4096)
            if name == "student":
                config = student_config(config, case.keep, 16)
            torch.manual_seed(0)
            model_class_for(config)._from_config(config, dtype=torch.bfloat16).save_pretrained(
                folder
            )
        made.append(folder)
    return made[0], made[1]


def launched(case: Case, scratch: Path) -> list[dict[str, Any]]:
    """What each rank measured."""
    folders(Case("tiny", 1, 64), scratch)
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = os.environ | own
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(case.ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(HERE)]
    command += ["--measure", json.dumps(asdict(case)), "--folder", str(scratch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        say(done.stderr[-4000:])
        raise SystemExit(f"{case.name}: failed")
    return [
        json.loads((scratch / f"rank{rank}.json").read_text(encoding="utf-8"))
        for rank in range(case.ranks)
    ]


def measure(case: Case, scratch: Path) -> None:
    """One rank of a case: the baseline, then the steps."""
    import torch

    from makd_llm import distributed
    from makd_llm.memory import Peak

    torch.set_num_threads(1)
    distributed.quiet()
    distributed.init()
    steps(Case("tiny", case.ranks, 64, case.checkpointing, case.ds, case.preset), scratch, 2)
    baseline = Peak(distributed.device()).before
    found = steps(case, scratch, 3 if case.ranks > 1 else 2)
    found["baseline_MB"] = baseline
    path = scratch / f"rank{distributed.rank()}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    distributed.shutdown()


def steps(case: Case, scratch: Path, count: int) -> dict[str, Any]:
    """Trains so many steps; the peak from the second on, and the messages of the last."""
    import torch
    from deepspeed.comm.comm import comms_logger

    from makd_llm import distributed
    from makd_llm.checkpoint.folder import read_config
    from makd_llm.config import DistilConfig
    from makd_llm.data.batch import collate, counts_of
    from makd_llm.data.schema import Example
    from makd_llm.memory import Peak
    from makd_llm.models.families import family_of
    from makd_llm.models.pairing import pair
    from makd_llm.models.sharded import load_sharded
    from makd_llm.train.build import build_objectives
    from makd_llm.train.deepspeed_config import frozen_config
    from makd_llm.train.engine import Frozen, Trained
    from makd_llm.train.step import distill_step

    teacher, student = folders(case, scratch)
    given = deepspeed(case)
    given["train_micro_batch_size_per_gpu"] = case.records
    given["train_batch_size"] = case.records * case.ranks
    given["gradient_accumulation_steps"], given["gradient_clipping"] = 1, 1.0
    given["optimizer"]["params"] |= {"lr": 1e-5, "weight_decay": 0.0}
    given["steps_per_print"] = 10**9
    given["comms_logger"] = {"enabled": True, "prof_all": True, "verbose": False, "debug": False}
    dtype = torch.bfloat16
    trained = Trained(
        load_sharded(student, given, dtype), given, gradient_checkpointing=case.checkpointing
    )
    frozen = frozen_config(given, micro_batch_size=case.records)
    taught = Frozen(load_sharded(teacher, frozen, dtype), frozen)
    shape = read_config(student)
    objectives = build_objectives(
        DistilConfig.model_validate({"preset": case.preset}),
        family_of(shape),
        shape.num_hidden_layers,
        pair(shape, read_config(teacher)),
    )
    torch.manual_seed(distributed.rank())
    peak = None
    for step in range(count):
        if step == 1:
            peak = Peak(distributed.device())
        if step == count - 1:
            comms_logger.reset_data()
        ids = torch.randint(3, shape.vocab_size, (case.records, case.length)).tolist()
        cut = case.length - case.length // 4
        batch = collate([Example(str(i), row, cut) for i, row in enumerate(ids)], pad_id=0)
        distill_step(trained, taught, objectives, batch, counts_of([batch]))
        trained.step()
    logged: dict[str, int] = {}
    for name, sizes in comms_logger.get_raw_data().items():
        total = sum(size * found[0] for size, found in sizes.items())
        key = next((known for known in COLLECTIVES if name.startswith(known)), name)
        logged[key] = logged.get(key, 0) + total
    assert peak is not None
    found = {"peak_MB": peak.megabytes(), "logged": logged}
    trained.close()
    taught.close()
    return found


if __name__ == "__main__":
    main()
