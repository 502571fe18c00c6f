"""The memory of a rank: what grows with what. benchmarks/plan.py holds it against what runs."""

from dataclasses import replace

from makd_llm.cluster.job import Job
from makd_llm.cluster.memory import memory_of


def test_more_ranks_need_less(job: Job) -> None:
    peaks = [memory_of(replace(job, nodes=nodes)).peak for nodes in (1, 2, 8, 32, 128)]
    assert peaks == sorted(peaks, reverse=True)
    held = memory_of(job).device["update"]
    shares = {part: held[part] for part in ("fp32 weights", "Adam's moments", "gradients")}
    shard = job.student.shard(64)
    assert shares == {
        "fp32 weights": 4 * shard,
        "Adam's moments": 8 * shard,
        "gradients": 2 * shard,
    }


def test_what_is_sharded_follows_the_stage(job: Job) -> None:
    one, two, three = (
        memory_of(replace(job, sharding=replace(job.sharding, stage=stage))).device["update"]
        for stage in (1, 2, 3)
    )
    assert job.teacher is not None
    assert one["teacher weights"] == two["teacher weights"] == 2 * job.teacher.numbers
    assert three["teacher weights"] == 2 * job.teacher.shard(64)


def test_stage_1_adds_whole_gradients_up(job: Job) -> None:
    several = replace(job, accumulation=4, sharding=replace(job.sharding, stage=1))
    gradients = memory_of(several).device["backward"]["gradients"]
    assert gradients == 2 * job.student.numbers
    second = replace(several, sharding=replace(several.sharding, stage=2))
    assert memory_of(second).device["backward"]["gradients"] == -(-gradients // job.ranks)


def test_checkpointing_and_smaller_batches_need_less(job: Job) -> None:
    fewer = replace(job, micro_batch=4)
    assert memory_of(fewer).peak < memory_of(replace(fewer, checkpointing=False)).peak
    assert memory_of(job).peak < memory_of(fewer).peak


def test_offload_moves_and_loses_nothing(job: Job) -> None:
    near = memory_of(job)
    for place in ("cpu", "nvme"):
        sharding = replace(job.sharding, optimizer=place, parameters=place)
        far = memory_of(replace(job, sharding=sharding))
        assert far.peak < near.peak
        moved = far.host | far.disk
        for part in ("teacher weights", "student weights", "fp32 weights", "Adam's moments"):
            assert moved[part] == near.device["update"][part]


def test_gathered_weights_are_bounded_by_what_runs_too(job: Job) -> None:
    small = replace(job.sharding, live=1, reuse=2, prefetch=0)
    table = job.student.table
    found = memory_of(replace(job, sharding=small)).device
    # whatever the limits, the head is whole while it runs
    assert found["head"]["student gathered"] > 2 * table
    assert found["teacher"]["teacher gathered"] >= 2 * table
    # and half of what is used again within a distance stays on either side of the turn
    far = replace(small, reuse=10**10)
    assert memory_of(replace(job, sharding=far)).device["head"]["student gathered"] > 10**10
    # but never more than there is
    all_of_it = replace(small, live=10**12)
    most = memory_of(replace(job, sharding=all_of_it)).device["head"]["student gathered"]
    assert most == 2 * job.student.numbers
