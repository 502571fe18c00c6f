"""Messages of an optimizer step, by collective.

`payload` is the size of the whole tensor that a collective brings together or reduces. Over the
wire every rank sends (W - 1) / W of it for an all-gather or a reduce-scatter, and twice that for an
all-reduce (rings; W ranks). DeepSpeed's comms logger counts the tensor that a rank hands over: the
shard of an all-gather, the whole of the others.
"""

from dataclasses import dataclass
from typing import Literal

from makd_llm.cluster.job import Job
from makd_llm.cluster.sizes import Sizes

Collective = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True)
class Message:
    """One kind of traffic of a rank in an optimizer step.

    Attributes:
        what, moment: what travels, and in which part of the step.
        collective: how.
        payload: bytes of the whole tensors.
        ranks: among how many ranks.
        beside: how many of those are on one machine.
    """

    what: str
    moment: Literal["teacher", "forward", "backward", "update"]
    collective: Collective
    payload: int
    ranks: int
    beside: int

    @property
    def near(self) -> bool:
        """Within a machine."""
        return self.beside == self.ranks

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        times = 2 if self.collective == "all_reduce" else 1
        return times * self.payload * (self.ranks - 1) / self.ranks

    @property
    def logged(self) -> int:
        """Bytes as DeepSpeed's comms logger counts them on a rank."""
        return self.payload // self.ranks if self.collective == "all_gather" else self.payload


def traffic_of(job: Job) -> list[Message]:
    """What a rank sends in one optimizer step; nothing where it is alone.

    ZeRO-3: the teacher's weights come together once in each forward, its head for the student's
    (also where it is the embedding, which has come once before); the student's in the forward, and
    in the backward again but for what was kept at the turn (`Sharding.kept`); gradients are reduced
    to their owners once per micro-batch; small tensors, which stay whole, come together after each
    step. ZeRO++'s second copy, made in the first forward after an update, serves the rest of the
    step, and all forwards of the teacher, whose weights do not change; but not the teacher's head,
    which is asked for by itself.

    ZeRO-1 and 2: gradients are all-reduced (ZeRO-1 once per step), and weights come together after
    it.
    """
    if job.ranks == 1:
        return []
    sharding, student = job.sharding, job.student
    everywhere = (job.ranks, job.gpus)
    if sharding.stage < 3:
        times = job.accumulation if sharding.stage == 2 else 1
        gradients, weights = student.numbers * sharding.message, student.numbers * sharding.weight
        return [
            Message("gradients", "backward", "all_reduce", times * gradients, *everywhere),
            Message("student weights", "update", "all_gather", weights, *everywhere),
        ]
    second = everywhere
    if sharding.secondary > 1:
        second = (sharding.secondary, min(sharding.secondary, job.gpus))
    found = []
    times = job.accumulation
    if job.teacher is not None:
        head = times * job.teacher.table * sharding.weight
        weights = times * _large(job, job.teacher) - (0 if job.teacher.tied else head)
        found.append(Message("teacher weights", "teacher", "all_gather", weights, *second))
        if job.compared:
            found.append(Message("teacher head", "forward", "all_gather", head, *everywhere))
    weights = _large(job, student)
    again = max(0, weights - sharding.kept(student.table) * sharding.weight)
    gradients = job.ranks * student.shard(job.ranks) * sharding.message
    small = student.small(sharding.persist) * sharding.weight
    found += [
        *_forwards(weights, times, everywhere, second),
        Message("student weights again", "backward", "all_gather", times * again, *second),
        Message("gradients", "backward", "reduce_scatter", times * gradients, *everywhere),
        Message("small weights", "update", "all_gather", small, *everywhere),
    ]
    return [message for message in found if message.payload]


def _forwards(
    weights: int, times: int, everywhere: tuple[int, int], second: tuple[int, int]
) -> list[Message]:
    """The student's weights in a step's forwards; ZeRO++ has its second copy from the first on."""
    if second == everywhere:
        return [Message("student weights", "forward", "all_gather", times * weights, *everywhere)]
    rest = (times - 1) * weights
    return [
        Message("student weights", "forward", "all_gather", weights, *everywhere),
        Message("student weights, second copy", "forward", "all_gather", rest, *second),
    ]


def _large(job: Job, sizes: Sizes) -> int:
    """Bytes of the tensors that are gathered when they are used, padded to the ranks."""
    large = (n for n in sizes.tensors if n > job.sharding.persist)
    return sum(-(-n // job.ranks) for n in large) * job.ranks * job.sharding.weight
