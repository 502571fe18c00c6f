"""The planner's arithmetic: what grows with what, and what is refused. benchmarks/plan.py holds it
against what runs.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from makd_llm.cli import main
from makd_llm.cluster.job import Job
from makd_llm.cluster.machines import MACHINES
from makd_llm.cluster.memory import memory_of
from makd_llm.cluster.plan import advice, fits, largest_batch, plan
from makd_llm.cluster.sharding import Sharding, sharding_of
from makd_llm.cluster.sizes import sizes_of, student_config
from makd_llm.cluster.timing import timing_of
from makd_llm.cluster.traffic import traffic_of
from makd_llm.errors import UserError
from makd_llm.planning import build_job
from makd_llm.testing import tiny_config

DS = Path(__file__).parents[2] / "ds_configs"
ZERO3 = DS / "zero3.json"
H100 = MACHINES["h100"]


def large_config() -> LlamaConfig:
    """Llama 3's 70B."""
    return LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "config.json"
    large_config().to_json_file(path, use_diff=False)
    return path


@pytest.fixture(scope="module")
def job(large: Path) -> Job:
    """On 64 H100, with gradient checkpointing."""
    found, notes = build_job(
        large, ZERO3, keep=0.4, nodes=8, gpus=8, batch=64, length=2048, checkpointing=True
    )
    assert notes == []
    return found


def test_sizes_are_the_models_own() -> None:
    large = sizes_of(large_config())
    assert large.numbers == 70_553_706_496
    assert (large.query, large.key_value, large.neurons) == (8192, 1024, 28672)
    tied = sizes_of(tiny_config("llama", tied=True))
    untied = sizes_of(tiny_config("llama"))
    assert untied.numbers - tied.numbers == tied.vocabulary * tied.width


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon"])
def test_a_student_keeps_its_share(family: str) -> None:
    config = tiny_config(family)
    dense, student = sizes_of(config), sizes_of(student_config(config, 0.5, 1))
    assert 0.45 < sum(student.products) / sum(dense.products) <= 0.5
    outside = dense.numbers - sum(dense.products)
    assert student.numbers - sum(student.products) == outside


def test_defaults_are_deepspeeds_own() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(stage=3), Sharding()
    assert ours.reduce_bucket == theirs.reduce_bucket_size
    assert ours.prefetch == theirs.prefetch_bucket_size
    assert ours.live == theirs.max_live_parameters
    assert ours.reuse == theirs.max_reuse_distance
    assert ours.persist == theirs.param_persistence_threshold
    assert ours.sub_group == theirs.sub_group_size
    assert ours.overlap == theirs.overlap_comm
    assert sharding_of({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}) == replace(
        ours, fused=True
    )


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
    assert "gradient_checkpointing" in advice(replace(job, checkpointing=False), H100)
    assert plan(job, H100).advice == ""
    hopeless = replace(H100, memory=1e9)
    assert "nothing that is known here" in plan(job, hopeless).advice


def test_messages(job: Job) -> None:
    assert traffic_of(replace(job, nodes=1, gpus=1)) == []
    messages = {message.what: message for message in traffic_of(job)}
    assert messages["teacher weights"].payload == pytest.approx(
        2 * (70_553_706_496 - job.student.vocabulary * job.student.width), rel=1e-4
    )
    weights, again = messages["student weights"], messages["student weights again"]
    assert weights.payload - again.payload == 2 * job.sharding.reuse // 2
    assert not any(message.near for message in messages.values())
    second = replace(job, sharding=replace(job.sharding, secondary=8))
    near = {message.what for message in traffic_of(second) if message.near}
    assert near == {"teacher weights", "teacher head", "student weights again"}
    twice = {m.what: m for m in traffic_of(replace(job, accumulation=2))}
    assert twice["gradients"].payload == 2 * messages["gradients"].payload
    assert twice["small weights"].payload == messages["small weights"].payload


def test_time_is_that_of_the_slowest(job: Job) -> None:
    found = timing_of(job, H100)
    fast = timing_of(job, replace(H100, far=1e15))
    assert found.seconds >= fast.seconds >= fast.flops / H100.flops
    apart = replace(job, sharding=replace(job.sharding, overlap=False))
    assert timing_of(apart, H100).seconds > found.seconds
    assert found.tokens == job.batch * job.length


def test_what_is_not_planned_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    tiny_config("mixtral").to_json_file(config, use_diff=False)
    with pytest.raises(UserError, match="a mixture of experts"):
        build_job(config, ZERO3, rank_multiple=1)
    tiny_config("llama").to_json_file(config, use_diff=False)
    given = json.loads(ZERO3.read_text())
    given["zero_optimization"]["zero_quantized_weights"] = True
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps(given))
    with pytest.raises(UserError, match="quantized weights are not planned"):
        build_job(config, ds, rank_multiple=1)


@pytest.mark.parametrize("name", sorted(path.name for path in DS.glob("*.json")))
def test_every_shipped_config_is_planned(name: str, large: Path) -> None:
    found, _ = build_job(large, DS / name, nodes=2, batch=16, gpus=8)
    assert memory_of(found).peak > 0
    assert timing_of(found, H100).seconds > 0


def test_the_command(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    call = ["plan", "--teacher", str(large), "--ds", str(ZERO3), "--nodes", "8", "--gpus", "8"]
    call += ["--batch", "64", "--seq", "2048", "--keep", "0.4"]
    main([*call, "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert "teacher weights" in printed and "tokens a day" in printed
    assert picture.stat().st_size > 1000
    main([*call, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["memory"]["peak"] == sum(
        found["memory"]["device"][found["memory"]["moment"]].values()
    )
    assert [row["ranks"] for row in found["scaling"]] == [2**power for power in range(11)]
    main([*call, "--preset", "adkd"])
    assert "runs both models again on some steps" in capsys.readouterr().out
