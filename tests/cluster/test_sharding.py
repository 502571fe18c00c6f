"""What is read from DeepSpeed's JSON, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from makd_llm.cluster.plan import SHIPPED
from makd_llm.cluster.sharding import Sharding, sharding_of
from makd_llm.errors import UserError
from makd_llm.train.deepspeed_config import read_deepspeed_config

DS = Path(__file__).parents[2] / "ds_configs"


def given(**zero: Any) -> dict[str, Any]:
    """A JSON with these in its section `zero_optimization`."""
    return {"zero_optimization": {"stage": 3, **zero}, "bf16": {"enabled": True}}


def test_defaults_are_deepspeeds_own() -> None:
    assert sharding_of(given()) == replace(Sharding(), fused=True)
    # which it takes for "auto" too, and its old names for the new
    assert sharding_of(given(reduce_bucket_size="auto")).reduce_bucket == 5e8
    assert sharding_of(given(max_live_parameters=7)).live == 7
    assert sharding_of(given(cpu_offload=True)).optimizer == "cpu"


def test_what_is_advised_is_what_is_shipped() -> None:
    for name, sharding in SHIPPED.items():
        assert sharding_of(read_deepspeed_config(DS / name)) == sharding, name


def test_what_stays_whole_is_the_larger_of_the_limits_and_the_head() -> None:
    assert Sharding(live=1_000_000, reuse=200_000).kept(7) == 1_000_000
    assert Sharding(live=200_000, reuse=1_000_000).kept(7) == 500_000
    assert Sharding(live=200_000, reuse=200_000).kept(300_000) == 300_000


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"zero_quantized_weights": True}, "quantized weights are not planned"),
        ({"stage3_module_granularity_threshold": 5}, "leaf modules are not planned"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.3}}, "offload_optimizer.ratio"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param does nothing at stage 2"),
        ({"stage": 1, "zero_hpz_partition_size": 2}, "partition_size does nothing at stage 1"),
    ],
)
def test_what_is_not_planned_is_refused(zero: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sharding_of(given(**zero))


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.type SGD is not planned"):
        sharding_of({**given(), "optimizer": {"type": "SGD"}})


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        (
            {"stage3_param_persistance_threshold": 5},
            r"zero_optimization.stage3_param_persistance_threshold: unknown to DeepSpeed; "
            r"did you mean stage3_param_persistence_threshold\?",
        ),
        ({"mics_shard_size": 4}, "mics_shard_size: unknown to DeepSpeed"),
        ({"offload_param": "cpu"}, "zero_optimization.offload_param: "),
        ({"offload_param": {"device": "gpu"}}, "offload_param.device: "),
        ({"reduce_bucket_size": "large"}, "zero_optimization.reduce_bucket_size: "),
    ],
)
def test_what_deepspeed_would_refuse_is_one_line(
    zero: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**given(**zero), "optimizer": {"type": "AdamW"}}))
    with pytest.raises(UserError, match=said) as error:
        read_deepspeed_config(path)
    assert "\n" not in str(error.value)
