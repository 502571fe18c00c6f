"""Memory of a rank, part by part, at the moments of a step at which it may be largest.

A step has these moments; the largest of them is the peak:

- *teacher*: the end of the teacher's forward: what was captured is all there;
- *student*: the end of the student's forward, before its head: a bucket of weights is there twice;
- *head*: the head compares both models' logits, while all that the forward keeps is there;
- *backward*: the backward begins;
- *reduction*: the last gradients are reduced, after all that was kept is gone;
- *update*: the optimizer's step.

All numbers are bytes of one rank, of tensors that are alive; an allocator's gaps are not among
them. docs/plan.md has each formula with what it assumes.
"""
# N tokens of a rank and forward, n tokens whose logits are made together, V vocabulary, D width

from collections.abc import Mapping
from dataclasses import dataclass

from makd_llm.cluster.activations import layer_keeps, layer_works, model_keeps
from makd_llm.cluster.job import Job
from makd_llm.cluster.sizes import Sizes

MASTER, MOMENTS_OF_ADAM = 4, 8
"""Bytes of a parameter's fp32 copy, and of its two fp32 moments."""

# As makd_kernels.linear_divergence has them: logits of both models that are held at once, and the
# tiles in which torch reduces them (Triton needs none).
CHUNK_CPU, CHUNK_OTHER, TILES_CPU = 2**27, 2**30, 4 * 2**20

Parts = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: on its device by moment and part, in host memory, and on NVMe."""

    device: Mapping[str, Parts]
    host: Parts
    disk: Parts

    @property
    def moment(self) -> str:
        """When the device's memory is largest."""
        return max(self.device, key=self.at)

    def at(self, moment: str) -> int:
        """On the device at a moment."""
        return sum(self.device[moment].values())

    @property
    def peak(self) -> int:
        """On the device at the largest moment."""
        return self.at(self.moment)


def memory_of(job: Job) -> Memory:
    """The memory of a rank of a job."""
    held, host, disk = _held(job)
    moments: dict[str, Parts] = {}
    student, captured, tokens = job.student, job.captured, job.tokens
    weight = job.sharding.weight
    kept = _kept(job)
    rows = 3 * job.rows * student.width * weight
    if job.teacher is not None:
        moments["teacher"] = {
            "teacher gathered": _gathered(job, job.teacher, prefetching=True, learns=False),
            "captured states": captured.teacher * tokens,
            "activations": (
                job.teacher.width * weight + layer_works(job.teacher, weight, job.length)
            )
            * tokens,
        }
    teacher_states = captured.teacher * tokens
    if job.teacher is not None:
        teacher_states += job.teacher.width * weight * tokens  # its last hidden states
    of_student = captured.student_whole if job.checkpointing else captured.student
    shown = {"captured states": teacher_states + of_student * tokens}
    moments["student"] = {
        "teacher gathered": _teacher_head(job),
        "student gathered": _gathered(job, student, prefetching=True),
        **shown,
        "activations": kept + layer_works(student, weight, job.length) * tokens,
    }
    moments["head"] = {
        "teacher gathered": _teacher_head(job),
        "student gathered": _gathered(job, student),
        **shown,
        "activations": kept,
        "logits": _logits(job) + rows,
        "head gradient": _head_gradient(job, largest=True),
    }
    layers = (
        layer_keeps(student, weight, layer, job.length, noted=False)
        for layer in range(student.layers)
    )
    again = max(layers) if job.checkpointing else 0
    last_states = teacher_states - captured.teacher * tokens
    reduced = min(job.sharding.reduce_bucket, student.numbers) * job.sharding.message
    fills = student.numbers > job.sharding.reduce_bucket
    again_gathered = student.numbers > job.sharding.kept(student.table)
    moments["backward"] = {
        "student gathered": _gathered(job, student, prefetching=again_gathered),
        "captured states": last_states + captured.compared * tokens,
        "activations": kept + (again + layer_works(student, weight, job.length)) * tokens,
        "logits": rows // 3,
        "head gradient": _head_gradient(job, largest=False),
        "gradient messages": reduced if fills else 0,
    }
    moments["reduction"] = {"captured states": last_states, "gradient messages": reduced}
    moments["update"] = {"optimizer's work": _update(job)}
    whole = {name: held | _gradients(job, name) | parts for name, parts in moments.items()}
    return Memory(whole, host, disk)


def _held(job: Job) -> tuple[Parts, Parts, Parts]:
    """What stays between steps: on the device, in host memory, on NVMe."""
    sharding, student = job.sharding, job.student
    device: Parts = {}
    host: Parts = {}
    disk: Parts = {}
    places = {"none": device, "cpu": device if job.on_cpu else host, "nvme": disk}
    for name, sizes in (("teacher", job.teacher), ("student", student)):
        if sizes is None:
            continue
        if sharding.stage < 3:
            device[f"{name} weights"] = sizes.numbers * sharding.weight
            continue
        shard = sizes.shard(job.ranks) * sharding.weight
        places[sharding.parameters][f"{name} weights"] = shard
        if job.gathers:
            device[f"{name} gathered"] = sizes.small(sharding.persist) * sharding.weight
        if sharding.secondary > 1 and name == "teacher":
            device[f"{name} second copy"] = sizes.shard(sharding.secondary) * sharding.weight
        if sharding.parameters == "nvme":
            swapped = sharding.swap_buffers * sharding.swap_buffer * sharding.weight
            host[f"{name} swap buffers"] = swapped
    if sharding.secondary > 1:
        device["student second copy"] = student.shard(sharding.secondary) * sharding.weight
    part = student.shard(job.ranks) if sharding.stage == 3 else -(-student.numbers // job.ranks)
    place = places[sharding.optimizer]
    place["fp32 weights"] = part * MASTER
    place["Adam's moments"] = part * MOMENTS_OF_ADAM
    near = device if sharding.optimizer == "none" or job.on_cpu else host
    if near is host:
        host["gradients"] = part * sharding.gradient
    if sharding.optimizer == "cpu":
        place["fp32 gradients"] = part * 4
    if sharding.optimizer == "nvme":
        disk["fp32 gradients"] = part * 4
        # a sub-group's weights, gradients and two moments at a time
        near["swap buffers"] = near.get("swap buffers", 0) + 16 * min(part, sharding.sub_group)
    return device, host, disk


def _gradients(job: Job, moment: str) -> Parts:
    """Of the student, on the device at a moment: what is accumulated, and the bucket that is filled
    in the backward.

    ZeRO-3 has room for both at all times. ZeRO-1 and 2 make them in the backward and let them go at
    the update; ZeRO-1 adds whole gradients up before it reduces them, ZeRO-2 its part of them.
    """
    sharding, student = job.sharding, job.student
    if sharding.stage == 3:
        part, bucket = student.shard(job.ranks), True
    else:
        part = -(-student.numbers // job.ranks)
        between = moment not in ("reduction", "update")
        if between:
            whole = student.numbers if sharding.stage == 1 else part
            part = whole if job.accumulation > 1 else 0
        elif moment == "update":
            part = 0
        bucket = moment == "reduction" or (moment == "backward" and not job.on_cpu)
    if sharding.optimizer != "none" and not job.on_cpu:
        part = 0  # in the host's memory
    size = sharding.reduce_bucket * sharding.buckets
    if job.on_cpu:  # memory that nobody has written to is no memory there
        size = min(sharding.reduce_bucket, student.numbers) if sharding.buckets else 0
    return {
        "gradients": part * sharding.gradient,
        "gradient bucket": size * sharding.message if bucket else 0,
    }


def _gathered(job: Job, sizes: Sizes, *, prefetching: bool = False, learns: bool = True) -> int:
    """Whole weights beside the shards. learns: the student; a teacher only runs forward, and its
    head is asked for by itself.

    DeepSpeed gathers ahead, a prefetch bucket more with every module, until `live` numbers are
    whole, one tensor too many included. What runs is gathered in any case: the head of a student,
    and its embedding at the end of the backward, come on top; a teacher's embedding comes first,
    when nothing else is there. What is used again within `reuse` numbers stays, the head among it.
    A bucket is there twice, as it came and cut into tensors, until the last of its tensors has been
    used.
    """
    if not job.gathers:
        return 0
    sharding = job.sharding
    small = sizes.small(sharding.persist)
    large = sizes.numbers - small - (0 if learns else sizes.own_head)
    ahead = sharding.live + sizes.largest_inside
    if learns:
        whole = min(large, max(ahead + sizes.table, sharding.reuse // 2))
    else:
        whole = min(large, max(ahead, sizes.table))
    twice = min(large, sharding.prefetch) if prefetching else 0
    return (small + whole + twice) * sharding.weight


def _teacher_head(job: Job) -> int:
    """Whole while the student's head runs, and a copy also where a rank is alone."""
    if job.teacher is None or job.sharding.stage < 3 or not job.compared:
        return 0
    sharding = job.sharding
    small = job.teacher.small(sharding.persist) if job.gathers else 0
    return (small + job.teacher.table) * sharding.weight


def _kept(job: Job) -> int:
    """What the student's forward keeps for its backward, captured states apart."""
    sizes, weight = job.student, job.sharding.weight
    final = sizes.width * (4 + 2 * weight)  # the last norm, and its result
    if job.checkpointing:
        return (sizes.layers * sizes.width * weight + final) * job.tokens
    return (
        model_keeps(sizes, weight, job.length, whole=job.sharding.stage < 3) + final
    ) * job.tokens


def chunk_rows(job: Job) -> int:
    """Tokens whose logits are made together: as many as the budget holds, spread evenly."""
    row = job.student.vocabulary * job.sharding.weight * (2 if job.compared else 1)
    most = max(1, (CHUNK_CPU if job.on_cpu else CHUNK_OTHER) // row)
    return -(-job.rows // -(-job.rows // most))


def _logits(job: Job) -> int:
    logits = chunk_rows(job) * job.student.vocabulary * job.sharding.weight
    return logits * (2 if job.compared else 1) + (TILES_CPU if job.on_cpu else 0)


def _head_gradient(job: Job, *, largest: bool) -> int:
    """V D of it: in the weights' dtype when it is done; while several chunks of half precision add
    up, also a sum in fp32 and a chunk's share.
    """
    numbers, weight = job.student.table, job.sharding.weight
    several = weight < 4 and chunk_rows(job) < job.rows
    return numbers * (4 + 2 * weight if largest and several else weight)


def _update(job: Job) -> int:
    """Temporaries of the optimizer: fp32 gradients, and what torch's Adam makes of the moments."""
    sharding = job.sharding
    if sharding.optimizer != "none":
        return 0
    part = -(-job.student.numbers // job.ranks)
    if sharding.stage == 3:
        part = min(job.student.shard(job.ranks), sharding.sub_group)
    work = 0 if sharding.fused else 8 if job.on_cpu else 4
    return part * (4 + work)
