"""What the loop writes down and balances, with models and losses that are only numbers."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from makd_llm.data.batch import collate
from makd_llm.data.schema import Example
from makd_llm.errors import Interrupted
from makd_llm.objectives.combine import Losses, Objectives
from makd_llm.objectives.head import CrossEntropy, Timing
from makd_llm.objectives.terms import hidden_term
from makd_llm.train.levels import LevelBalance
from makd_llm.train.loop import Loop, LoopSettings

BATCH = collate([Example("a", [1, 2, 3, 4], 2)], pad_id=0)
SUMS = {"hidden": 12.0, "output": 6.0}  # over 4 tokens and 2 targets: means of 3


def run(
    tmp_path: Path,
    objectives: Objectives,
    steps: int,
    *,
    during: Callable[[], None] = lambda: None,
    **more: Any,
) -> list[dict[str, Any]]:
    """The steps that are logged. during: called in each of them."""
    model = SimpleNamespace(
        engine=SimpleNamespace(monitor=SimpleNamespace(enabled=False)),
        step=lambda: None,
        step_applied=True,
        gradient_norm=1.0,
        learning_rate=0.1,
    )
    loader = SimpleNamespace(next_step=lambda: [BATCH], epoch=0, state_dict=dict)
    checkpoints = SimpleNamespace(load=lambda engine: None, save=lambda *state: None)
    settings = LoopSettings("distil", steps, 10**9, more.pop("log_every", 1))
    loop = Loop(model, objectives, loader, checkpoints, settings, tmp_path, **more)  # type: ignore[arg-type]

    def step(batch: Any, counts: dict[str, float]) -> Losses:
        during()
        counted = [name for name in objectives.names if objectives.scale_of(name) > 0]
        return Losses(torch.zeros(()), {name: torch.tensor(SUMS[name]) for name in counted})

    loop.run(step)
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def made(**hidden: int) -> Objectives:
    term = replace(hidden_term([0], weight=0.5), timing=Timing(**hidden))
    return Objectives({"hidden": term}, {"output": CrossEntropy(1.0)})


def test_what_was_learnt_between_two_logs_is_logged(tmp_path: Path) -> None:
    lines = run(tmp_path, made(every=3), 8, log_every=5)
    assert [line["step"] for line in lines] == [5, 8]
    for line in lines:  # learnt on 1, 4 and 7
        assert line["loss/hidden"] == 3.0 and line["loss/output"] == 3.0
        assert line["loss"] == 3.0, "of this step: the hidden states did not count on it"


def test_a_signal_in_a_step_stops_after_that_step(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped at step 1 of 8"):
        run(tmp_path, made(), 8, during=lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize("timing", [{"warmup_steps": 6}, {"every": 2}])
def test_balance_does_not_make_up_for_what_is_warming_up_or_skips_steps(
    tmp_path: Path, timing: dict[str, int]
) -> None:
    balance = LevelBalance({"matrix": 1.0, "layer": 2.0, "model": 4.0}, every=2)
    found = []
    objectives = made(**timing)
    for steps in (3, 5, 8):
        run(tmp_path / str(steps), objectives, steps, balance=balance)
        found.append(dict(balance.multiplier))
    # half the model level's loss, which is 3: at full weight 0.5 * 3 becomes 1.5
    assert all(multiplier == {"layer": 1.0, "model": 1.0} for multiplier in found)
