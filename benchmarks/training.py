"""A distillation with random weights and random tokens, on DeepSpeed's engines: what is measured
where no model and no data are at hand, and the processes it runs in.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig

from makd_llm import distributed
from makd_llm.checkpoint.folder import read_config
from makd_llm.cluster.sizes import student_config
from makd_llm.config import DistilConfig
from makd_llm.data.batch import Batch, collate, counts_of
from makd_llm.data.schema import Example
from makd_llm.models.families import family_of
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.models.pairing import pair
from makd_llm.models.sharded import load_sharded
from makd_llm.train.build import build_objectives
from makd_llm.train.deepspeed_config import frozen_config
from makd_llm.train.engine import Frozen, Trained
from makd_llm.train.step import distill_step

CHECKOUT = Path(__file__).resolve().parents[1]

FinishedRun = Annotated[Path, typer.Option("--run", help="A finished run's folder.")]
RandomRows = Annotated[
    int | None,
    typer.Option("--length", help="Of rows of random tokens, a quarter of them to be learnt."),
]
Results = Annotated[Path, typer.Option("--results", help="Folder of the table.")]

# SmolLM2-135M's shape, a wider and shallower one with its own head, and one for baselines.
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


@dataclass(frozen=True)
class Case:
    """One configuration: on each rank `records` rows of `length` tokens."""

    model: str
    ranks: int
    length: int
    checkpointing: bool = False
    ds: str = "zero3.json"
    preset: str = "makd"
    records: int = 2
    keep: float = 0.5
    limit: int = 0
    """Numbers of a model that ZeRO-3 may leave whole (max_live_parameters, and as the distance of
    max_reuse_distance), a tenth of them fetched ahead at a time; 0: DeepSpeed's own limits."""

    @property
    def name(self) -> str:
        tokens = f"{self.records} x {self.length}"
        said = f"{self.model} {self.ranks} ranks {tokens} {self.ds} {self.preset}"
        said += f" limit {self.limit / 1e6:g} M" if self.limit else ""
        return said + (" checkpointed" if self.checkpointing else "")


def deepspeed_json(case: Case) -> dict[str, Any]:
    """The shipped JSON of a case; ZeRO++'s second copy is spread over all of its ranks."""
    given: dict[str, Any] = json.loads(
        (CHECKOUT / "ds_configs" / case.ds).read_text(encoding="utf-8")
    )
    if "zero_hpz_partition_size" in given["zero_optimization"]:
        given["zero_optimization"]["zero_hpz_partition_size"] = case.ranks
    if case.limit:
        given["zero_optimization"] |= {
            "stage3_max_live_parameters": case.limit,
            "stage3_max_reuse_distance": case.limit,
            "stage3_prefetch_bucket_size": case.limit // 10,
        }
    return given


def folders(case: Case, scratch: Path) -> tuple[Path, Path]:
    """Teacher and student of a case, made of random numbers, on disk."""
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


class Training:
    """Teacher and student of a case on their engines; every rank makes one."""

    def __init__(self, case: Case, scratch: Path, *, log_messages: bool = False) -> None:
        teacher, student = folders(case, scratch)
        given = deepspeed_json(case)
        given["train_micro_batch_size_per_gpu"] = case.records
        given["train_batch_size"] = case.records * case.ranks
        given["gradient_accumulation_steps"], given["gradient_clipping"] = 1, 1.0
        given["optimizer"]["params"] |= {"lr": 1e-5, "weight_decay": 0.0}
        given["steps_per_print"] = 10**9
        given["comms_logger"] = {"enabled": log_messages, "prof_all": True, "verbose": False}
        dtype = torch.bfloat16
        self.case = case
        self.student = Trained(
            load_sharded(student, given, dtype), given, gradient_checkpointing=case.checkpointing
        )
        frozen = frozen_config(given, micro_batch_size=case.records)
        self.teacher = Frozen(load_sharded(teacher, frozen, dtype), frozen)
        shape = read_config(student)
        self.vocabulary: int = shape.vocab_size
        self.objectives = build_objectives(
            DistilConfig.model_validate({"preset": case.preset}),
            family_of(shape),
            shape.num_hidden_layers,
            pair(shape, read_config(teacher)),
        )
        torch.manual_seed(distributed.rank())

    def step(self) -> None:
        """One optimizer step on random rows."""
        batch = random_rows(self.case.records, self.case.length, self.vocabulary)
        distill_step(self.student, self.teacher, self.objectives, batch, counts_of([batch]))
        self.student.step()

    def close(self) -> None:
        self.student.close()
        self.teacher.close()


def random_rows(records: int, length: int, vocabulary: int) -> Batch:
    """Rows of one length, of which the last quarter is to be learnt."""
    ids = torch.randint(3, vocabulary, (records, length)).tolist()
    examples = [Example(str(i), row, length - length // 4) for i, row in enumerate(ids)]
    return collate(examples, pad_id=0)


def launch(
    script: Path, case: Case, folder: Path, *arguments: str, **environment: str
) -> "Launched":
    """Starts the ranks of a case: `script --measure CASE --folder FOLDER ARGUMENTS` in each.
    environment: variables for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(case.ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script)]
    command += ["--measure", json.dumps(asdict(case)), "--folder", str(folder), *arguments]
    process = subprocess.Popen(
        command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return Launched(case, folder, process)


@dataclass(frozen=True)
class Launched:
    """The ranks of a case, under way."""

    case: Case
    folder: Path
    process: "subprocess.Popen[str]"

    def results(self) -> list[dict[str, Any]]:
        """What each rank left by `leave`. Ends the benchmark where they failed."""
        _, errors = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(f"{errors[-4000:]}\n{self.case.name}: failed")
        return [
            json.loads((self.folder / f"rank{rank}.json").read_text(encoding="utf-8"))
            for rank in range(self.case.ranks)
        ]


def leave(found: dict[str, Any], folder: Path) -> None:
    """A rank's measurements, for `Launched.results`."""
    path = folder / f"rank{distributed.rank()}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
