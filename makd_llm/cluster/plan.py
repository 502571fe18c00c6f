"""Whether a job fits a machine, how fast it can be, and what to change where it does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from makd_llm.cluster.job import Job
from makd_llm.cluster.machines import Machine
from makd_llm.cluster.memory import Memory, memory_of
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
        return self.memory.peak <= self.room


def plan(job: Job, machine: Machine) -> Plan:
    """Plans a job."""
    memory = memory_of(job)
    fits = memory.peak <= room(machine)
    return Plan(
        job=job,
        machine=machine,
        memory=memory,
        traffic=traffic_of(job),
        timing=timing_of(job, machine),
        largest=largest_batch(job, machine),
        advice="" if fits else advice(job, machine),
    )


def room(machine: Machine) -> float:
    """Bytes of a device that tensors may take."""
    return machine.memory * (1 - RESERVE)


def fits(job: Job, machine: Machine) -> bool:
    return memory_of(job).peak <= room(machine)


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
    for said, changed in _changes(job):
        if fits(changed, machine):
            return said
    least = min(memory_of(changed).peak for _, changed in _changes(job)) / 1e9
    return (
        f"nothing that is known here is enough: {least:.0f} GB of {room(machine) / 1e9:.0f} GB at "
        "the least; take a smaller teacher, shorter records, or larger devices"
    )


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    """Changes to a job, the least costly first, each in words."""
    micro = job.micro_batch
    while micro > 1:
        micro //= 2
        accumulation = -(-job.micro_batch * job.accumulation // micro)
        changed = replace(job, micro_batch=micro, accumulation=accumulation)
        yield f"set distil.train.micro_batch_size={micro}", changed
    one = replace(job, micro_batch=1, accumulation=job.micro_batch * job.accumulation)
    small = "" if job.micro_batch == 1 else " and distil.train.micro_batch_size=1"
    lean = replace(one, checkpointing=True)
    if not job.checkpointing:
        same = replace(job, checkpointing=True)
        yield "set distil.train.gradient_checkpointing=true", same
        yield f"set distil.train.gradient_checkpointing=true{small}", lean
    also = f" with gradient_checkpointing=true{small}"
    if job.sharding.stage < 3:
        lean = replace(lean, sharding=replace(lean.sharding, stage=3, buckets=1))
        yield f"take ds_configs/zero3.json{also}", lean
    if lean.sharding.optimizer == "none":
        offloaded = replace(lean, sharding=replace(lean.sharding, optimizer="cpu"))
        yield f"take ds_configs/zero3_offload_optimizer.json{also}", offloaded
    nodes = job.nodes
    while 2 * nodes * job.gpus <= MOST_RANKS:
        nodes *= 2
        yield f"take {nodes} nodes{also}", replace(lean, nodes=nodes)
    both = replace(lean.sharding, optimizer="cpu", parameters="cpu")
    yield f"take ds_configs/zero3_offload.json{also}", replace(lean, sharding=both)


def scaled(job: Job, machine: Machine, gpus: int) -> list[dict[str, Any]]:
    """The same micro-batch on 1 to 1,024 devices, machines of `gpus` each: memory and speed."""
    rows = []
    ranks = 1
    while ranks <= MOST_RANKS:
        nodes, each = (1, ranks) if ranks <= gpus else (ranks // gpus, gpus)
        if nodes * each == ranks:
            one = replace(job, nodes=nodes, gpus=each)
            memory, timing = memory_of(one), timing_of(one, machine)
            rows.append(
                {
                    "ranks": ranks,
                    "bytes": memory.peak,
                    "parts": memory.device[memory.moment],
                    "tokens_per_second": timing.tokens_per_second,
                    "fits": memory.peak <= room(machine),
                }
            )
        ranks *= 2
    return rows
