"""Training from a teacher's cache on DeepSpeed's engines: the gradient is the same for every split
into ranks and micro-batches, two ranks write what one writes, and what is learnt comes near to the
online loss as k grows.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from makd_llm import distributed
from makd_llm.checkpoint.folder import read_config
from makd_llm.config import RunConfig
from makd_llm.models.sharded import load_sharded
from makd_llm.offline.read import TeacherCache
from makd_llm.teaching import Teaching
from makd_llm.testing import launch_ranks
from makd_llm.testing.training import (
    assert_same_gradient,
    factorized,
    named_parameters,
    parts,
    sizes,
)
from makd_llm.train.deepspeed_config import frozen_config
from makd_llm.train.engine import Frozen
from makd_llm.train.step import distill_step, offline_step

pytestmark = pytest.mark.slow

OBJECTIVES: dict[str, Any] = {
    "hidden": {"layers": [1, 3]},
    "soft": {"objective": "logits", "divergence": "jsd", "temperature": 2.0},
}
Step = dict[str, dict[str, torch.Tensor]]


def offline(top_k: int) -> dict[str, Any]:
    return {
        "preset": "kd",
        "objectives": OBJECTIVES,
        "offline": {"top_k": top_k, "batch_size": 2},
    }


def cache_of(folder: Path, student: Path, distil: dict[str, Any]) -> TeacherCache:
    """Written by all ranks together, under ZeRO-3."""
    data = {"source": str(folder / "train.jsonl"), "max_length": 64}
    named = {"teacher": {"model": "tiny"}, "data": data, "distil": distil}
    config = RunConfig.model_validate(named)
    teaching = Teaching(config, config.data, torch.float32, lambda text: None)
    top_k = distil["offline"]["top_k"]
    out = folder / f"cache-{distributed.world_size()}-{top_k}"
    ds = frozen_config(sizes(distributed.world_size(), 1), micro_batch_size=2)

    def frozen(teacher: Path, size: int) -> Frozen:
        return Frozen(load_sharded(teacher, ds, torch.float32), ds)

    teaching.write(folder / "teacher", (1, 3), out, frozen)
    return teaching.open(out, folder / "teacher", student, (1, 3))


def step(
    folder: Path,
    student: Path,
    ds: dict[str, Any],
    distil: dict[str, Any],
    cache: TeacherCache | None,
    **trained: Any,
) -> Step:
    """The gradient of one optimizer step, and each objective's mean over it."""
    made = parts(folder, student, ds, distil, **trained)
    batches = made.loader.next_step()
    counts = torch.tensor([[float(b.n_targets), float(b.n_tokens)] for b in batches]).sum(0)
    targets, tokens = distributed.sum_over_ranks(counts).tolist()
    share = {"targets": targets, "tokens": tokens}
    sums: dict[str, torch.Tensor] = {}
    for index, batch in enumerate(batches):
        if cache is None:
            losses = distill_step(made.trained, made.teacher, made.objectives, batch, share)
        else:
            losses = offline_step(made.trained, cache, made.objectives, batch, share)
        for name, value in losses.sums.items():
            sums[name] = sums.get(name, 0.0) + value
        if index < len(batches) - 1:
            made.trained.step()
    means = {
        name: distributed.sum_over_ranks(value.double()) / share[made.objectives.unit_of(name)]
        for name, value in sums.items()
    }
    parameters = named_parameters(made.trained)
    gradient = {name: safe_get_full_grad(p).clone() for name, p in parameters.items()}
    made.close()
    return {"gradient": gradient, "means": means}


def on_one_rank(folder: str) -> dict[str, Any]:
    path = Path(folder)
    student = factorized(path)
    everything = read_config(path / "teacher").vocab_size
    caches = {k: cache_of(path, student, offline(k)) for k in (4, 16, 64, everything)}
    found = {
        f"k {'all' if k == everything else k}": step(path, student, sizes(1, 4), offline(k), cache)
        for k, cache in caches.items()
    }
    distil, cache = offline(16), caches[16]
    online = {"preset": "kd", "objectives": OBJECTIVES}
    left = {"data": {"padding_side": "left"}}
    return {
        **found,
        "online": step(path, student, sizes(1, 4), online, None),
        "accumulated": step(path, student, sizes(1, 1), distil, cache),
        "stage 1": step(path, student, sizes(1, 4, stage=1), distil, cache),
        "left padding": step(path, student, sizes(1, 4), distil, cache, **left),
        "checkpointing": step(
            path, student, sizes(1, 4), distil, cache, gradient_checkpointing=True
        ),
    }


def on_two_ranks(folder: str) -> Step:
    student = factorized(Path(folder))
    cache = cache_of(Path(folder), student, offline(16))
    return step(Path(folder), student, sizes(2, 2), offline(16), cache)


@pytest.fixture(scope="module")
def one_rank(tiny: Path) -> dict[str, Any]:
    return launch_ranks(1, on_one_rank, str(tiny), timeout=400)[0]


@pytest.fixture(scope="module")
def two_ranks(tiny: Path) -> list[Step]:
    return launch_ranks(2, on_two_ranks, str(tiny), timeout=400)


@pytest.mark.parametrize("split", ["accumulated", "stage 1", "left padding", "checkpointing"])
def test_the_gradient_is_the_same_for_every_split(one_rank: dict[str, Any], split: str) -> None:
    assert_same_gradient(one_rank[split]["gradient"], one_rank["k 16"]["gradient"])


def test_the_gradient_is_the_same_on_two_ranks(
    one_rank: dict[str, Any], two_ranks: list[Step]
) -> None:
    for rank in two_ranks:
        assert_same_gradient(rank["gradient"], one_rank["k 16"]["gradient"])


def test_two_ranks_write_what_one_writes(
    tiny: Path, one_rank: dict[str, Any], two_ranks: list[Step]
) -> None:
    one, two = (tiny / f"cache-{world}-16" for world in (1, 2))
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all tensors together."""
    squares = [
        (sum(float((a - b).square().sum()) for a, b in pairs))
        for pairs in (
            [(one[name], other[name]) for name in other],
            [(torch.zeros_like(b), b) for b in other.values()],
        )
    ]
    return (squares[0] / squares[1]) ** 0.5


def test_what_is_learnt_comes_near_to_the_online_loss_as_k_grows(one_rank: dict[str, Any]) -> None:
    online = one_rank["online"]
    steps = ["k 4", "k 16", "k 64", "k all"]
    for name in ("logits", "soft"):
        losses = [float(one_rank[k]["means"][name]) for k in steps]
        exact = float(online["means"][name])
        gaps = [exact - loss for loss in losses]
        assert gaps[0] > gaps[1] > gaps[2] > abs(gaps[3]), (name, gaps)
        assert abs(gaps[3]) < 2**-8 * exact, (name, gaps)
    distances = [distance(one_rank[k]["gradient"], online["gradient"]) for k in steps]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 2**-6


def test_hidden_states_and_references_are_learnt_as_online(one_rank: dict[str, Any]) -> None:
    online = one_rank["online"]["means"]
    for k in ("k 4", "k all"):
        found = one_rank[k]["means"]
        assert found.keys() == online.keys()
        torch.testing.assert_close(found["hidden"], online["hidden"], rtol=2**-8, atol=0)
        torch.testing.assert_close(
            found["cross_entropy"], online["cross_entropy"], rtol=1e-6, atol=0
        )
