"""Time of an optimizer step by a roofline: no part can be faster than its arithmetic at the stated
rate, than its memory traffic, or than its messages. What is found is therefore the least; real
steps take longer, by the share of the stated rates that kernels reach.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from makd_llm.cluster.activations import model_keeps
from makd_llm.cluster.job import Job
from makd_llm.cluster.machines import Machine
from makd_llm.cluster.sizes import Sizes
from makd_llm.cluster.traffic import Message, traffic_of

STEP_MOMENTS = ("teacher", "forward", "backward", "update")


@dataclass(frozen=True)
class Timing:
    """Seconds of an optimizer step.

    Attributes:
        compute: by moment, arithmetic or memory traffic, whichever takes longer.
        messages: by moment.
        seconds: of the step: by moment the longer of the two where messages overlap with the
            computation, else their sum.
        flops: of a rank.
    """

    compute: Mapping[str, float]
    messages: Mapping[str, float]
    seconds: float
    flops: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.tokens / self.seconds


def forward_flops(sizes: Sizes, tokens: int, length: int, rows: int) -> float:
    """Operations of a forward: two for each number of the layers' matrices and token; attention
    over the half of T keys that a token sees on average, twice (scores, values), or over all of
    them where a mask says which count; and the head for the rows whose logits are needed.
    """
    matrices = 2.0 * sum(sizes.products) * tokens
    masked = sum(sizes.masked(layer, length) for layer in range(sizes.layers))
    attention = 2.0 * (sizes.layers + masked) * 2 * sizes.query * tokens * length / 2
    return matrices + attention + 2.0 * sizes.vocabulary * sizes.width * rows


def timing_of(job: Job, machine: Machine) -> Timing:
    """The time of a step of a job."""
    sharding, student, times = job.sharding, job.student, job.accumulation
    rate = machine.flops if sharding.weight == 2 else machine.flops_fp32
    weight = sharding.weight
    flops: dict[str, float] = {}
    moved: dict[str, float] = {}
    if job.teacher is not None:
        flops["teacher"] = times * forward_flops(
            job.teacher, job.tokens, job.length, job.rows if job.compared else 0
        )
        states = model_keeps(job.teacher, weight, job.length) * job.tokens
        moved["teacher"] = times * (job.teacher.numbers * weight + 2 * states)
    forward = forward_flops(student, job.tokens, job.length, job.rows)
    states = model_keeps(student, weight, job.length, whole=sharding.stage < 3) * job.tokens
    flops["forward"] = times * forward
    flops["backward"] = times * forward * (3 if job.checkpointing else 2)
    moved["forward"] = times * (student.numbers * weight + 2 * states)
    moved["backward"] = times * (2 * student.numbers * weight + 3 * states)
    # read gradients, weights and moments; write moments and both copies of the weights
    own = student.shard(job.ranks) if sharding.stage == 3 else -(-student.numbers // job.ranks)
    moved["update"] = own * (sharding.gradient + 12 + 12 + weight)
    compute = {
        moment: max(flops.get(moment, 0.0) / rate, moved.get(moment, 0.0) / machine.bandwidth)
        for moment in STEP_MOMENTS
        if moment in moved
    }
    if sharding.optimizer != "none" and not job.on_cpu:
        # gradients to the host, weights back; the host's memory is taken to be no slower
        compute["update"] = own * (sharding.gradient + weight) / machine.host
    if sharding.parameters != "none" and not job.on_cpu:
        again = max(0, student.numbers - sharding.kept(student.table)) / student.numbers
        shares = (("teacher", job.teacher, 1.0), ("forward", student, 1.0))
        for moment, sizes, share in (*shares, ("backward", student, again)):
            if sizes is not None:
                host = times * share * sizes.shard(job.ranks) * weight / machine.host
                compute[moment] = max(compute[moment], host)
    messages = dict.fromkeys(STEP_MOMENTS, 0.0)
    for message in traffic_of(job):
        messages[message.moment] += message_seconds(message, machine)
    together = max if sharding.overlap else _sum
    seconds = 0.0
    for moment in STEP_MOMENTS:
        hidden = _sum if moment == "update" else together  # nothing runs beside the update
        seconds += hidden(compute.get(moment, 0.0), messages[moment])
    tokens = job.batch * job.length
    return Timing(compute, messages, seconds, sum(flops.values()), tokens)


def message_seconds(message: Message, machine: Machine) -> float:
    """By the slowest link of the rings, without latency.

    Each device has an adapter of its own to other machines, and NCCL lays a ring through each: what
    leaves a machine is shared by as many adapters as ranks of the group stand there, but goes no
    faster than within it. CPU processes share one.
    """
    adapters = 1 if machine.on_cpu else message.beside
    across = min(machine.near, adapters * machine.far)
    return message.sent / (machine.near if message.near else across)


def _sum(a: float, b: float) -> float:
    return a + b
