"""Whether a job fits, what to change, and how it scales."""

from dataclasses import replace
from pathlib import Path

import pytest

from makd_llm.cluster.job import Job
from makd_llm.cluster.machines import MACHINES
from makd_llm.cluster.memory import memory_of
from makd_llm.cluster.plan import advice, fits, largest_batch, plan, scaled
from makd_llm.cluster.timing import timing_of
from makd_llm.errors import UserError
from makd_llm.planning import build_job

DS = Path(__file__).parents[2] / "ds_configs"
H100 = MACHINES["h100"]


def just_too_small_for(job: Job) -> float:
    """Memory of a device on which it lacks a byte."""
    return (memory_of(job).peak - 1) / 0.92


def test_the_largest_batch_is_the_largest(job: Job) -> None:
    h200 = MACHINES["h200"]
    most = largest_batch(job, h200)
    assert most > 1
    assert fits(replace(job, micro_batch=most), h200)
    assert not fits(replace(job, micro_batch=most + 1), h200)


def test_advice_is_one_change_that_helps(job: Job) -> None:
    small = replace(H100, memory=30e9)
    tight = replace(job, micro_batch=16)
    found = plan(tight, small)
    assert not found.fits and found.advice
    assert "micro_batch_size" in advice(replace(job, micro_batch=256), H100)
    assert advice(replace(job, checkpointing=False), H100) == (
        "set distil.train.gradient_checkpointing=true"
    )
    assert plan(job, H100).advice == ""
    hopeless = replace(H100, memory=1e9)
    assert "nothing that is known here" in plan(job, hopeless).advice


def test_a_smaller_micro_batch_divides_the_share(job: Job) -> None:
    seven = replace(job, micro_batch=7)
    small = replace(H100, memory=just_too_small_for(seven))
    assert fits(replace(job, micro_batch=6), small)
    assert advice(seven, small) == "set distil.train.micro_batch_size=1"


def test_more_nodes_come_with_a_batch_that_they_can_share(job: Job) -> None:
    sharding = replace(job.sharding, optimizer="cpu", live=10**8, reuse=10**8)
    one = replace(job, nodes=1, micro_batch=1, accumulation=1, sharding=sharding)
    small = replace(H100, memory=just_too_small_for(one))
    said = advice(one, small)
    assert said == "take 2 nodes, set distil.train.batch_size=16"
    assert "checkpointing" not in said  # which was asked for already
    # a batch that they can share stays as it is
    four = replace(one, accumulation=4)
    assert advice(four, small) == "take 2 nodes"


def test_hpz_is_given_up_first(job: Job) -> None:
    hpz = replace(job, sharding=replace(job.sharding, secondary=8))
    small = replace(H100, memory=just_too_small_for(hpz))
    assert advice(hpz, small) == "take ds_configs/zero3.json"


def test_what_does_not_fit_its_buffers_does_not_fit(job: Job) -> None:
    swapped = replace(job, sharding=replace(job.sharding, optimizer="nvme", parameters="nvme"))
    assert fits(swapped, H100)
    assert not fits(replace(swapped, nodes=1), H100)  # 131 M numbers of the embedding


@pytest.mark.parametrize(
    ("gpus", "nodes", "counts"),
    [
        (8, 8, [2**power for power in range(11)]),
        (6, 1, [1, 2, 4, 6, 12, 24, 48, 96, 192, 384, 768]),
        (3, 2, [1, 2, 3, 6, 12, 24, 48, 96, 192, 384, 768]),
        (8, 3, sorted([24, *(2**power for power in range(11))])),
    ],
)
def test_it_scales_by_whole_machines(job: Job, gpus: int, nodes: int, counts: list[int]) -> None:
    rows = scaled(replace(job, gpus=gpus, nodes=nodes), H100)
    assert [row["ranks"] for row in rows] == counts


def test_a_second_copy_is_kept_among_the_ranks_that_there_are(job: Job) -> None:
    rows = scaled(replace(job, sharding=replace(job.sharding, secondary=8)), H100)
    copies = [row["parts"].get("teacher second copy", 0) for row in rows]
    assert job.teacher is not None
    assert copies[:5] == [0, *(2 * job.teacher.shard(ranks) for ranks in (2, 4, 8, 8))]


def test_speed_grows_with_the_machines(job: Job) -> None:
    rows = scaled(job, H100)
    speeds = [row["tokens_per_second"] for row in rows]
    assert speeds == sorted(speeds)


SHARDED = sorted(path.name for path in DS.glob("*.json") if path.name != "zero0_fp32.json")


def test_one_that_shards_nothing_is_refused(large: Path) -> None:
    with pytest.raises(UserError, match=r"zero0_fp32\.json: ZeRO stage 0 is not planned"):
        build_job(large, DS / "zero0_fp32.json", nodes=1, batch=16, gpus=1)


@pytest.mark.parametrize("name", SHARDED)
def test_every_config_that_shards_is_planned(name: str, large: Path) -> None:
    found, _ = build_job(large, DS / name, nodes=2, batch=16, gpus=8)
    assert memory_of(found).peak > 0
    assert timing_of(found, H100).seconds > 0


def test_names_of_devices_mean_gib() -> None:
    assert 79 * 2**30 < H100.memory < 80 * 2**30
    assert 39 * 2**30 < MACHINES["a100-40"].memory < 40 * 2**30
    assert 141e9 < MACHINES["h200"].memory < 141 * 2**30
