"""Every preset on DeepSpeed's engines: what a step learns does not depend on the split into ranks
and micro-batches, every term is there, and nothing reaches the teacher.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from makd_llm.config.presets import preset_names
from makd_llm.testing import launch_ranks
from makd_llm.testing.training import factorized, gradients, parts, run_loop, sizes

pytestmark = pytest.mark.slow

ALL = preset_names()
WRITING = ("distillm", "gkd", "minillm")
"""Presets whose student writes: here also with a step that learns from nothing else."""
NO_GRADIENT = {"minilm": 0.6, "lillama": 0.1}
"""The most of a student's tensors that a preset may leave without a gradient; 0 for the others."""


def of_every_preset(
    folder: Path, student: Path, world: int, micro: int, copies: int = 1
) -> dict[str, dict[str, torch.Tensor]]:
    ds = sizes(world, micro)
    always = {"lmbda": 1.0, "max_new_tokens": 6, "replay": 0, "adaptive": None}
    never = {**always, "lmbda": 0.0}
    asked: dict[str, dict[str, Any]] = {name: {"preset": name} for name in ALL}
    for name in WRITING:
        asked[name] = {"preset": name, "sequences": {"student": never}}
        asked[f"{name}, own words"] = {"preset": name, "sequences": {"student": always}}
    return {
        name: gradients(folder, student, ds, copies=copies, distil=distil)
        for name, distil in asked.items()
        if copies == 1 or "own words" not in name  # each copy would have a text of its own
    }


def on_one_rank(folder: str) -> dict[str, Any]:
    student = factorized(Path(folder))
    return {
        "whole": of_every_preset(Path(folder), student, 1, 4),
        "accumulated": of_every_preset(Path(folder), student, 1, 1),
        "twice": of_every_preset(Path(folder), student, 1, 4, copies=2),
    }


def on_two_ranks(folder: str) -> dict[str, Any]:
    student = factorized(Path(folder))
    return {
        "gradients": of_every_preset(Path(folder), student, 2, 2),
        "trained": {name: trained(Path(folder), student, name) for name in ALL},
    }


def trained(folder: Path, student: Path, name: str) -> dict[str, Any]:
    """Four steps: the losses of each, and whether the teacher was touched."""
    import json

    distil = {"preset": name}
    made = parts(folder, student, sizes(2, 2), distil=distil)
    run_dir = folder / f"run-{name}"
    run_loop(made, run_dir, 4, distil=distil)
    touched = any(p.grad is not None or p.requires_grad for p in made.teacher.model.parameters())
    names = made.objectives.names
    made.close()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {"touched": touched, "names": names, "lines": lines}


@pytest.fixture(scope="module")
def one_rank(tiny: Path) -> dict[str, Any]:
    return launch_ranks(1, on_one_rank, str(tiny), timeout=600)[0]


@pytest.fixture(scope="module")
def two_ranks(tiny: Path) -> list[dict[str, Any]]:
    return launch_ranks(2, on_two_ranks, str(tiny), timeout=600)


def assert_same(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], may_be_zero: float
) -> None:
    assert set(actual) == set(expected)
    without = [name for name, gradient in expected.items() if not gradient.any()]
    assert len(without) <= may_be_zero * len(expected), without
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-3, atol=2e-6, msg=f"{name}: {{}}".format
        )


@pytest.mark.parametrize("name", [*ALL, *(f"{name}, own words" for name in WRITING)])
@pytest.mark.timeout(900)
def test_the_gradient_is_the_same_for_every_split(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]], name: str
) -> None:
    whole, may_be_zero = one_rank["whole"][name], NO_GRADIENT.get(name, 0.0)
    assert_same(one_rank["accumulated"][name], whole, may_be_zero)
    if name in ALL:  # every objective is a mean: records that are there twice change nothing
        assert_same(one_rank["twice"][name], whole, may_be_zero)
    for rank in two_ranks:
        assert_same(rank["gradients"][name], whole, may_be_zero)


@pytest.mark.parametrize("name", ALL)
def test_a_run_measures_every_objective_and_leaves_the_teacher_alone(
    two_ranks: list[dict[str, Any]], name: str
) -> None:
    for rank in two_ranks:
        assert not rank["trained"][name]["touched"]
    found = two_ranks[0]["trained"][name]
    assert len(found["lines"]) == 4
    measured = {key.removeprefix("loss/") for line in found["lines"] for key in line}
    assert set(found["names"]) <= measured
    assert all(line["skipped_steps"] == 0 for line in found["lines"])
