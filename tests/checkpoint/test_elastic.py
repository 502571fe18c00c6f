"""A checkpoint of two ranks goes on with one and with four: the same records in the same order, the
same losses to rounding.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from makd_llm import distributed
from makd_llm.testing import launch_ranks
from makd_llm.testing.training import Parts, factorized, parts, run_loop, sizes

pytestmark = pytest.mark.slow

STEPS, SAVED = 6, 3
STAGES = (0, 1, 2, 3)


def trained(made: Parts, run_dir: Path, said: list[str] | None = None) -> dict[str, Any]:
    """Trains to the end; the losses, and which records each step was of, in the global order."""
    records: list[list[str]] = []
    next_step = made.loader.next_step

    def noted() -> Any:
        batches = next_step()
        shares = distributed.gather_objects([batch.record_ids for batch in batches])
        # Micro-batch by micro-batch, rank by rank: the order of the global batch.
        records.append([i for micro in zip(*shares, strict=True) for ids in micro for i in ids])
        return batches

    made.loader.next_step = noted  # type: ignore[method-assign]
    words = run_loop(made, run_dir, STEPS, save_every=SAVED)
    if said is not None:
        said += words
    made.close()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {"losses": {line["step"]: line["loss"] for line in lines}, "records": records}


def on_two_ranks(folder: str) -> dict[int, Any]:
    path = Path(folder)
    student = factorized(path)
    found = {}
    for stage in STAGES:
        run_dir = path / f"two-{stage}"
        found[stage] = trained(parts(path, student, sizes(2, 2, stage)), run_dir)
    distributed.barrier()
    return found


def on_other_ranks(folder: str, world: int) -> dict[int, Any]:
    path = Path(folder)
    distributed.init()
    found = {}
    for stage in STAGES:
        run_dir = path / f"{world}-{stage}"
        distributed.on_main(shutil.copytree, path / f"at-{SAVED}-{stage}", run_dir)
        said: list[str] = []
        made = parts(path, path / "student-2", sizes(world, 4 // world, stage))
        found[stage] = {**trained(made, run_dir, said), "said": said}
        distributed.barrier()
        found[stage]["left"] = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    return found


@pytest.fixture(scope="module")
def folder(tiny: Path) -> Path:
    return tiny


@pytest.fixture(scope="module")
def by_two(folder: Path) -> dict[int, Any]:
    """An undisturbed run of two ranks; beside it lies its checkpoint of the middle."""
    found: dict[int, Any] = launch_ranks(2, on_two_ranks, str(folder), timeout=280)[0]
    for stage in STAGES:
        copy = folder / f"at-{SAVED}-{stage}"
        shutil.copytree(folder / f"two-{stage}", copy)
        shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}")
        (copy / "checkpoints" / "latest").write_text(f"step-{SAVED:08d}")
    return found


@pytest.mark.parametrize("world", [1, 4])
def test_other_ranks_go_on_where_two_have_stopped(
    folder: Path, by_two: dict[int, Any], world: int
) -> None:
    found = launch_ranks(world, on_other_ranks, str(folder), world, timeout=280)[0]
    for stage in STAGES:
        whole, resumed = by_two[stage], found[stage]
        assert resumed["records"] == whole["records"][SAVED:], "the same data in the same order"
        assert sorted(resumed["losses"]) == sorted(whole["losses"]) == list(range(1, STEPS + 1))
        for step, loss in whole["losses"].items():
            torch.testing.assert_close(
                resumed["losses"][step], loss, rtol=1e-5, atol=0, msg=f"{stage} {step}: {{}}".format
            )
        assert f"written by 2 ranks, goes on with {world}" in resumed["said"][0]
        assert not any("universal" in name for name in resumed["left"]), "dropped after loading"
