"""Whether a job fits a machine, how fast it can be, and what to change where it does not fit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from makd_llm.cluster.job import Job
from makd_llm.cluster.machines import Machine
from makd_llm.cluster.memory import Memory, memory_of
from makd_llm.cluster.sharding import Sharding
from makd_llm.cluster.timing import Timing, timing_of
from makd_llm.cluster.traffic import Message, traffic_of

RESERVE = 0.08
"""Share of a device's memory that no tensor gets: the context, the libraries' own buffers, and the
gaps between tensors (an assumption; docs/plan.md)."""
MOST_RANKS = 1024


@dataclass(frozen=True)
class Plan:
    """What was found for a job on a machine.

    Attributes:
        largest: records of a micro-batch that fit; 0: not even one.
        advice: one change with which it fits; empty where it does.
    """

    job: Job
    machine: Machine
    memory: Memory
    traffic: list[Message]
    timing: Timing
    largest: int
    advice: str

    @property
    def room(self) -> float:
        """Bytes that tensors may take."""
        return room(self.machine)

    @property
    def fits(self) -> bool:
        return fits(self.job, self.machine)


def plan(job: Job, machine: Machine) -> Plan:
    """Plans a job."""
    return Plan(
        job=job,
        machine=machine,
        memory=memory_of(job),
        traffic=traffic_of(job),
        timing=timing_of(job, machine),
        largest=largest_batch(job, machine),
        advice="" if fits(job, machine) else advice(job, machine),
    )


def room(machine: Machine) -> float:
    """Bytes of a device that tensors may take."""
    return machine.memory * (1 - RESERVE)


def fits(job: Job, machine: Machine) -> bool:
    """On the device, and in the buffers that DeepSpeed has for what lies on NVMe."""
    return job.swaps and memory_of(job).peak <= room(machine)


def largest_batch(job: Job, machine: Machine) -> int:
    """The most records of a micro-batch that fit; 0 where not even one does."""
    if not fits(replace(job, micro_batch=1), machine):
        return 0
    low, high = 1, 2
    while fits(replace(job, micro_batch=high), machine) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(replace(job, micro_batch=middle), machine):
            low = middle
        else:
            high = middle
    return low


def advice(job: Job, machine: Machine) -> str:
    """The first of some changes, the least costly first, with which a job fits."""
    changes = list(_changes(job))
    for file, changed in changes:
        if fits(changed, machine):
            return _said(file, job, changed)
    least = min(memory_of(changed).peak for _, changed in [("", job), *changes]) / 1e9
    return (
        f"nothing that is known here is enough: {least:.0f} GB of {room(machine) / 1e9:.0f} GB at "
        "the least; take a smaller teacher, shorter records, or larger devices"
    )


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    """Changes to a job, the least costly first: the file of ds_configs/ to take ("": the same), and
    what is planned then.
    """
    share = job.micro_batch * job.accumulation
    for micro in range(job.micro_batch - 1, 0, -1):
        if share % micro == 0:
            yield "", replace(job, micro_batch=micro, accumulation=share // micro)
    if not job.checkpointing:
        yield "", replace(job, checkpointing=True)
    lean = replace(job, micro_batch=1, accumulation=share, checkpointing=True)
    yield "", lean
    sharding = job.sharding
    plain = "zero3.json" if sharding.stage < 3 or sharding.secondary > 1 else ""
    if plain:
        yield plain, _with(plain, lean)
    if plain or sharding.optimizer == "none":
        yield "zero3_offload_optimizer.json", _with("zero3_offload_optimizer.json", lean)
    nodes = job.nodes
    while 2 * nodes * job.gpus <= MOST_RANKS:
        nodes *= 2
        accumulation = math.ceil(job.batch / (nodes * job.gpus))
        yield plain, replace(_with(plain, lean), nodes=nodes, accumulation=accumulation)
    if plain or sharding.parameters == "none":
        yield "zero3_offload.json", _with("zero3_offload.json", lean)


SHIPPED = {
    "zero3.json": Sharding(),
    "zero3_offload_optimizer.json": Sharding(optimizer="cpu", fused=True),
    "zero3_offload.json": Sharding(optimizer="cpu", parameters="cpu", fused=True),
}
"""Files of ds_configs/ as `sharding_of` reads them."""


def _with(file: str, job: Job) -> Job:
    """The job with a file's sharding, in its own precision; "": as it is."""
    if not file:
        return job
    own, taken = job.sharding, SHIPPED[file]
    own = replace(taken, weight=own.weight, gradient=own.gradient, message=own.message)
    return replace(job, sharding=own)


def _said(file: str, job: Job, changed: Job) -> str:
    """Everything that tells a changed job from the one that was asked for."""
    takes = [f"ds_configs/{file}"] if file else []
    if changed.nodes != job.nodes:
        takes.append(f"{changed.nodes} nodes")
    sets = []
    if changed.batch != job.batch:
        sets.append(f"batch_size={changed.batch}")
    if changed.micro_batch != job.micro_batch:
        sets.append(f"micro_batch_size={changed.micro_batch}")
    if changed.checkpointing != job.checkpointing:
        sets.append("gradient_checkpointing=true")
    said = [f"take {' and '.join(takes)}"] if takes else []
    if sets:
        said.append("set " + " ".join(f"distil.train.{what}" for what in sets))
    return ", ".join(said)


def scaled(job: Job, machine: Machine) -> list[dict[str, Any]]:
    """The same micro-batch on 1 to 1,024 devices and on as many as the job has: memory and speed.

    Up to a machine by powers of two, then by whole machines. hpZ's copy is kept among as many ranks
    as divide both.
    """
    rows = []
    for ranks in _counts(job):
        nodes, gpus = (1, ranks) if ranks <= job.gpus else (ranks // job.gpus, job.gpus)
        sharding = replace(job.sharding, secondary=math.gcd(job.sharding.secondary, ranks))
        one = replace(job, nodes=nodes, gpus=gpus, sharding=sharding)
        memory, timing = memory_of(one), timing_of(one, machine)
        rows.append(
            {
                "ranks": ranks,
                "bytes": memory.peak,
                "parts": memory.device[memory.moment],
                "tokens_per_second": timing.tokens_per_second,
                "fits": fits(one, machine),
            }
        )
    return rows


def _counts(job: Job) -> list[int]:
    counts = {job.ranks}
    count = 1
    while count < job.gpus:
        counts.add(count)
        count *= 2
    count = job.gpus
    while count <= MOST_RANKS:
        counts.add(count)
        count *= 2
    return sorted(counts)
