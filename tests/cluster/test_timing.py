"""The time of a step."""

from dataclasses import replace

import pytest

from makd_llm.cluster.job import Job
from makd_llm.cluster.machines import MACHINES
from makd_llm.cluster.timing import message_seconds, timing_of
from makd_llm.cluster.traffic import Message, traffic_of

H100 = MACHINES["h100"]


def test_time_is_that_of_the_slowest(job: Job) -> None:
    found = timing_of(job, H100)
    fast = timing_of(job, replace(H100, far=1e15))
    assert found.seconds >= fast.seconds >= fast.flops / H100.flops
    apart = replace(job, sharding=replace(job.sharding, overlap=False))
    assert timing_of(apart, H100).seconds > found.seconds
    assert found.tokens == job.batch * job.length


def test_every_device_has_an_adapter_to_other_machines(job: Job) -> None:
    # a machine receives seven eighths of the teacher at least, through eight adapters of 50 GB/s
    (weights,) = (m for m in traffic_of(job) if m.what == "teacher weights")
    least = 7 / 8 * weights.payload / (8 * 50e9)
    assert least < message_seconds(weights, H100) < 1.2 * least


def test_a_link_is_no_faster_than_what_feeds_it() -> None:
    def seconds(beside: int, machine: str = "h100") -> float:
        return message_seconds(
            Message("weights", "forward", "all_gather", 10**12, 64, beside), MACHINES[machine]
        )

    assert seconds(1) == pytest.approx(8 * seconds(8))
    assert seconds(16) == pytest.approx(10**12 * 63 / 64 / H100.near)
    assert seconds(2, "cpu") == seconds(1, "cpu")  # whose processes share one


def test_offloaded_weights_are_fetched_for_every_pass(job: Job) -> None:
    slow = replace(H100, host=1e6)
    offloaded = replace(job, sharding=replace(job.sharding, parameters="cpu"))
    found = timing_of(offloaded, slow).compute
    again = 1 - job.sharding.kept(job.student.table) / job.student.numbers
    assert found["backward"] == pytest.approx(again * found["forward"])
