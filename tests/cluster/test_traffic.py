"""The messages of a step."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from makd_llm.cluster.activations import Captured
from makd_llm.cluster.job import Job
from makd_llm.cluster.sharding import Sharding
from makd_llm.cluster.sizes import sizes_of, student_config
from makd_llm.cluster.traffic import traffic_of


def test_messages(job: Job) -> None:
    assert traffic_of(replace(job, nodes=1, gpus=1)) == []
    messages = {message.what: message for message in traffic_of(job)}
    assert messages["teacher weights"].payload == pytest.approx(
        2 * (70_553_706_496 - job.student.vocabulary * job.student.width), rel=1e-4
    )
    weights, again = messages["student weights"], messages["student weights again"]
    assert weights.payload - again.payload == 2 * job.sharding.kept(job.student.table)
    assert not any(message.near for message in messages.values())
    twice = {m.what: m for m in traffic_of(replace(job, accumulation=2))}
    assert twice["gradients"].payload == 2 * messages["gradients"].payload
    assert twice["small weights"].payload == messages["small weights"].payload


def test_a_second_copy_serves_all_but_first_forwards_and_heads(job: Job) -> None:
    hpz = replace(job, accumulation=3, sharding=replace(job.sharding, secondary=8))
    messages = {message.what: message for message in traffic_of(hpz)}
    assert {what for what, message in messages.items() if message.near} == {
        "teacher weights",
        "student weights, second copy",
        "student weights again",
    }
    first, rest = messages["student weights"], messages["student weights, second copy"]
    assert rest.payload == 2 * first.payload


def test_hpz_sends_what_was_measured() -> None:
    """DeepSpeed 0.19 on four ranks, hpZ over two, three micro-batches: bytes by size of group."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=2004,
        tie_word_embeddings=False,
    )
    job = Job(
        student=sizes_of(student_config(config, 0.4, 4)),
        teacher=sizes_of(config),
        sharding=Sharding(secondary=2, persist=500, live=250_000, reuse=250_000),
        captured=Captured(),
        gpus=4,
        accumulation=3,
    )
    by_group = {2: 0, 4: 0}
    for message in traffic_of(job):
        if message.collective == "all_gather":
            by_group[message.ranks] += message.payload
    assert by_group[4] == 4_614_912
    assert by_group[2] == pytest.approx(30_590_464, rel=0.01)
