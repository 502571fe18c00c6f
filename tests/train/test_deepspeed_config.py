"""The DeepSpeed JSON and the run's config together: what fills what, and what contradicts."""

import json
from pathlib import Path
from typing import Any

import pytest

from makd_llm.config import TrainConfig
from makd_llm.errors import UserError
from makd_llm.train.deepspeed_config import (
    frozen_config,
    left_to_json,
    read_deepspeed_config,
    training_config,
)

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
ZERO3 = next(path for path in SHIPPED if path.name == "zero3.json")


def joined(ds: dict[str, Any], world_size: int = 2, **train: Any) -> dict[str, Any]:
    return training_config(
        ds,
        TrainConfig(**train),
        world_size=world_size,
        ds_path=Path("ds.json"),
        section="distil.train",
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_files_are_completed_without_a_contradiction(path: Path) -> None:
    done = joined(read_deepspeed_config(path), steps=50, batch_size=8, learning_rate=2e-4)
    assert "auto" not in json.dumps(done)
    assert done["optimizer"]["params"]["lr"] == 2e-4


@pytest.mark.parametrize(
    ("world_size", "train", "expected"),
    [(2, {"batch_size": 8}, (8, 4, 1)), (1, {"batch_size": 8, "micro_batch_size": 2}, (8, 2, 4)),
     (4, {"batch_size": 8, "micro_batch_size": 1}, (8, 1, 2))],
)  # fmt: skip
def test_batch_sizes_are_multiplied_out(
    world_size: int, train: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    done = joined(read_deepspeed_config(ZERO3), world_size, **train)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(done[key] for key in keys) == expected


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="3 ranks"):
        joined(read_deepspeed_config(ZERO3), 3, batch_size=8)


def test_two_different_values_are_an_error_that_names_both_places() -> None:
    ds = read_deepspeed_config(ZERO3)
    ds["gradient_clipping"] = 0.5
    with pytest.raises(UserError) as caught:
        joined(ds, gradient_clipping=1.0)
    assert "ds.json: gradient_clipping is 0.5 but distil.train.gradient_clipping is 1.0" in str(
        caught.value
    )
    assert joined(ds)["gradient_clipping"] == 0.5, "the run config's default gives way"


def test_a_scheduler_of_the_json_gets_the_steps_of_the_run() -> None:
    ds = read_deepspeed_config(ZERO3)
    params = {"total_num_steps": "auto", "warmup_num_steps": "auto"}
    done = joined(ds | {"scheduler": {"type": "WarmupCosineLR", "params": params}}, steps=50)
    assert done["scheduler"]["params"] == {"total_num_steps": 50, "warmup_num_steps": 5}


def test_auto_without_a_value_is_an_error() -> None:
    with pytest.raises(UserError, match=r'"auto" but distil.train.learning_rate is null'):
        joined(read_deepspeed_config(ZERO3), learning_rate=None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"zero_optimisation": {}}',
            "unknown key zero_optimisation; did you mean zero_optimization?",
        ),
        ('{"bf16": {"enabled": true},\n', "line 2: not JSON"),
        ('{"optimizer": {}, "bf16": true}', "bf16 is True; expected an object"),
        ('{"optimizer": {"params": 3}}', "optimizer.params: expected an object"),
        ('{"optimizer": {}, "train_batch_size": "eight"}', "train_batch_size is 'eight'"),
        ('{"optimizer": {}, "zero_optimization": {"stage": 7}}', "stage is 7; expected 0, 1, 2"),
        ('{"optimizer": {"params": {"lr": "1e-4"}}}', "lr is '1e-4'; expected a number"),
        ("[1]", "expected a JSON object, found a list"),
        ('{"bf16": {"enabled": true}}', "no optimizer"),
        ('{"optimizer": {"type": "AdamW"}, "fp16": {"enabled": true}}', "only bf16 or fp32"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_deepspeed_config(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such DeepSpeed config"):
        read_deepspeed_config(tmp_path / "none.json")
    (tmp_path / "a_file").touch()
    with pytest.raises(UserError, match=r"a_file/x: cannot be read \(Not a directory\)"):
        read_deepspeed_config(tmp_path / "a_file" / "x")


def test_the_frozen_engine_keeps_sharding_and_precision_and_has_no_optimizer() -> None:
    frozen = frozen_config(read_deepspeed_config(ZERO3), micro_batch_size=2)
    assert frozen["zero_optimization"]["stage"] == 3 and frozen["bf16"] == {"enabled": True}
    assert "optimizer" not in frozen and "scheduler" not in frozen


def test_what_the_json_states_is_left_to_it_so_that_a_kept_config_contradicts_nothing() -> None:
    ds = read_deepspeed_config(ZERO3)
    ds["optimizer"]["params"]["lr"] = 7e-5
    kept = left_to_json(ds, TrainConfig(steps=50, learning_rate=2e-4, batch_size=8))
    assert kept.learning_rate is None and (kept.steps, kept.batch_size) == (50, 8)
    assert joined(ds, **kept.model_dump())["optimizer"]["params"]["lr"] == 7e-5
