"""Every JSON of ds_configs/ trains, and to the same losses as the others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from makd_llm.testing import launch_ranks

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "ds_configs"
SHIPPED = sorted(path.name for path in FOLDER.glob("*.json"))
STEPS = 3
COMPILING_SECONDS = 900.0
"""DeepSpeed compiles its CPU's Adam where an optimizer is offloaded, once."""


def losses_under(folder: Path, name: str) -> list[float]:
    """The loss of each of some steps of a small distillation, over all ranks."""
    from makd_llm import distributed
    from makd_llm.checkpoint.folder import read_config
    from makd_llm.config import DistilConfig, TrainConfig
    from makd_llm.data.batch import counts_of
    from makd_llm.models.pairing import pair
    from makd_llm.models.sharded import load_sharded
    from makd_llm.testing.training import BATCH, factorized, small_loader
    from makd_llm.train.build import build_objectives
    from makd_llm.train.deepspeed_config import (
        dtype_of,
        frozen_config,
        read_deepspeed_config,
        training_config,
    )
    from makd_llm.train.engine import Frozen, Trained
    from makd_llm.train.step import distill_step

    student = factorized(folder)
    world = distributed.world_size()
    given = read_deepspeed_config(FOLDER / name)
    zero = given["zero_optimization"]
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = world  # it is to be the ranks of one machine
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme":
            zero[key]["nvme_path"] = str(folder / "nvme")
    train = TrainConfig(batch_size=BATCH, learning_rate=1e-3)
    ds = training_config(given, train, world_size=world, ds_path=FOLDER / name, section="train")
    dtype = dtype_of(given)
    model = load_sharded(student, ds, dtype)
    config = read_config(student)
    pairing = pair(config, read_config(folder / "teacher"))
    objectives = build_objectives(
        DistilConfig.model_validate({}), model.family, config.num_hidden_layers, pairing
    )
    trained = Trained(model, ds)
    frozen = frozen_config(given, micro_batch_size=BATCH // world)
    teacher = Frozen(load_sharded(folder / "teacher", frozen, dtype), frozen)
    loader = small_loader(folder, student, BATCH // world)
    found = []
    for _ in range(STEPS):
        (batch,) = loader.next_step()
        counts = counts_of([batch])
        totals = distributed.sum_over_ranks(torch.tensor(list(counts.values()))).tolist()
        denominators = dict(zip(counts, totals, strict=True))
        losses = distill_step(trained, teacher, objectives, batch, denominators)
        trained.step()
        assert trained.step_applied
        found.append(float(distributed.sum_over_ranks(losses.total.double())))
    trained.close()
    teacher.close()
    return found


@pytest.fixture(scope="module")
def under_zero3(tiny: Path) -> list[float]:
    found: list[float] = launch_ranks(2, losses_under, tiny, "zero3.json")[0]
    return found


def why_not(name: str) -> str | None:
    """What this machine lacks for a JSON, by name."""
    given: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    places = [given["zero_optimization"].get(key, {}) for key in _OFFLOADED]
    if any(place.get("device") == "nvme" for place in places):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible():
            return "needs libaio and its headers (Debian, Ubuntu: libaio-dev)"
    return None


_OFFLOADED = ("offload_optimizer", "offload_param")


@pytest.mark.timeout(COMPILING_SECONDS + 60)
@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "zero3.json"])
def test_a_shipped_config_trains_as_zero3_does(
    tiny: Path, under_zero3: list[float], name: str
) -> None:
    lacks = why_not(name)
    if lacks is not None:
        pytest.skip(f"{name}: {lacks}")
    found = launch_ranks(2, losses_under, tiny, name, timeout=COMPILING_SECONDS)[0]
    assert found[-1] < found[0]
    # bf16 sums in other orders, and the CPU's Adam of DeepSpeed rounds in its own way
    assert found == pytest.approx(under_zero3, rel=0.02)
