"""`makd plan`: from configs on disk to a plan. Nothing but config.json files and JSON is read."""

from pathlib import Path
from typing import Any

from makd_llm.checks import check_positions
from makd_llm.cluster.activations import captured
from makd_llm.cluster.job import Job
from makd_llm.cluster.plan import Plan, room
from makd_llm.cluster.sharding import sharding_of
from makd_llm.cluster.sizes import read_model_config, sizes_of, student_config
from makd_llm.config import DistilConfig, TrainConfig, checked
from makd_llm.errors import UserError
from makd_llm.models.families import family_of
from makd_llm.models.pairing import pair
from makd_llm.objectives.combine import Objectives
from makd_llm.objectives.head import Compared, Divergence
from makd_llm.train.build import build_objectives
from makd_llm.train.deepspeed_config import read_deepspeed_config, training_config


def build_job(
    teacher: Path,
    ds: Path,
    *,
    preset: str = "makd",
    keep: float | None = None,
    rank_multiple: int | None = None,
    student: Path | None = None,
    nodes: int = 1,
    gpus: int = 1,
    batch: int = 8,
    micro_batch: int | None = None,
    length: int = 1024,
    targets: int | None = None,
    checkpointing: bool = False,
    on_cpu: bool = False,
) -> tuple[Job, list[str]]:
    """The job, and what of it is not counted, in sentences.

    teacher, student: a model's folder or config.json; without a student's, it is one that keeps
    `keep` (None: half) of every matrix in multiples of `rank_multiple` (None: 16). batch: records
    of an optimizer step over all ranks; micro_batch: of a rank and forward (None: the ranks'
    shares). length, targets: tokens of a record, and of its summary (None: a quarter). Raises
    UserError for what cannot be, or is not planned.
    """
    if min(nodes, gpus, batch, length) < 1 or min(micro_batch or 1, targets or 1) < 1:
        raise UserError("--nodes, --gpus, --batch, --micro-batch, --seq and --targets start at 1")
    if student is not None and (keep is not None or rank_multiple is not None):
        raise UserError(
            "--student names a student as it is; --keep and --rank-multiple would cut one from the "
            "teacher: leave them out, or --student"
        )
    if rank_multiple is not None and rank_multiple < 1:
        raise UserError(f"--rank-multiple {rank_multiple}: expected 1 or more")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"--keep {keep:g}: expected a share, more than 0 and at most 1")
    if targets is not None and targets >= length:
        raise UserError(f"--targets {targets}: a record of --seq {length} has no room for them")
    deepspeed = read_deepspeed_config(ds)
    sharding = sharding_of(deepspeed, str(ds))
    if sharding.stage == 0:
        raise UserError(f"{ds}: ZeRO stage 0 is not planned; take stage 1, 2 or 3")
    train = TrainConfig(batch_size=batch)
    if micro_batch is not None:
        train = TrainConfig(batch_size=batch, micro_batch_size=micro_batch)
    ranks = nodes * gpus
    joined = training_config(deepspeed, train, world_size=ranks, ds_path=ds, section="distil.train")
    if sharding.secondary > 1 and ranks % sharding.secondary:
        raise UserError(
            f"{ds}: zero_hpz_partition_size is {sharding.secondary}, which does not divide "
            f"{ranks} ranks"
        )
    distil = checked(DistilConfig, {"preset": preset})
    taught = read_model_config(teacher)
    check_positions(taught, str(teacher), {"--seq": length})
    if student is not None:
        learning = read_model_config(student)
    else:
        learning = student_config(taught, keep or 0.5, rank_multiple or 16)
    objectives = build_objectives(
        distil, family_of(learning), learning.num_hidden_layers, pair(learning, taught)
    )
    small, large = sizes_of(learning), sizes_of(taught)
    looked_at = captured(
        objectives.needs_of_student,
        objectives.needs_of_teacher,
        small,
        large,
        sharding.weight,
        length,
        whole=sharding.stage < 3,
    )
    job = Job(
        student=small,
        teacher=large if objectives.needs_teacher else None,
        sharding=sharding,
        captured=looked_at,
        nodes=nodes,
        gpus=gpus,
        micro_batch=joined["train_micro_batch_size_per_gpu"],
        accumulation=joined["gradient_accumulation_steps"],
        length=length,
        targets=targets or max(1, length // 4),
        checkpointing=checkpointing,
        compared=any(isinstance(term, Divergence) for term in objectives.head.values()),
        on_cpu=on_cpu,
    )
    if not job.swaps:
        raise UserError(
            f"{ds}: zero_optimization.offload_param.buffer_size is {sharding.swap_buffer}, but the "
            f"largest tensor's shard is {job.largest_shard} numbers; set it to that at least, or "
            "take more ranks"
        )
    notes = _not_counted(distil, objectives)
    if large.family == "falcon" and (taught.alibi or not taught.new_decoder_architecture):
        notes.append("a Falcon with alibi, or of the first kind, keeps more than is counted")
    return job, notes


def _not_counted(distil: DistilConfig, objectives: Objectives) -> list[str]:
    """What of a preset the planner leaves out."""
    found = []
    for name in objectives.attributions:
        found.append(f"{name} runs both models again on some steps, which is not counted")
    for name, term in objectives.head.items():
        if isinstance(term, Compared):
            found.append(f"{name} makes logits of its own, which are not counted")
    if distil.sequences.student is not None:
        found.append("the student's writing (a whole copy of it, and its cache) is not counted")
    if distil.over_parameterize is not None:
        found.append("over_parameterize makes the student larger while it learns: not counted")
    return found


def as_json(found: Plan, notes: list[str], scaling: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that a plan says; bytes and seconds."""
    job, memory, timing = found.job, found.memory, found.timing
    return {
        "job": {
            "sharding": job.sharding.name,
            "nodes": job.nodes,
            "gpus": job.gpus,
            "batch": job.batch,
            "micro_batch": job.micro_batch,
            "accumulation": job.accumulation,
            "length": job.length,
            "targets": job.targets,
            "checkpointing": job.checkpointing,
            "teacher_parameters": job.teacher.numbers if job.teacher else 0,
            "student_parameters": job.student.numbers,
        },
        "machine": found.machine.name,
        "memory": {
            "peak": memory.peak,
            "moment": memory.moment,
            "room": room(found.machine),
            "fits": found.fits,
            "device": memory.device,
            "host": memory.host,
            "disk": memory.disk,
        },
        "traffic": [
            {
                "what": message.what,
                "moment": message.moment,
                "collective": message.collective,
                "payload": message.payload,
                "sent": message.sent,
                "logged": message.logged,
                "within_a_machine": message.near,
            }
            for message in found.traffic
        ],
        "time": {
            "seconds": timing.seconds,
            "compute": timing.compute,
            "messages": timing.messages,
            "flops": timing.flops,
            "tokens_per_second": timing.tokens_per_second,
            "tokens_per_day": timing.tokens_per_second * 86400,
        },
        "largest_micro_batch": found.largest,
        "advice": found.advice,
        "not_counted": notes,
        "scaling": scaling,
    }
