"""The balance of the levels and the turns they take."""

from typing import Any

import pytest

from makd_llm.config import DistilConfig
from makd_llm.errors import UserError
from makd_llm.models.families import FAMILIES
from makd_llm.train.build import build_objectives
from makd_llm.train.levels import LevelBalance, staged_turn


def test_balance_brings_the_levels_to_their_shares_and_leaves_the_model_level_alone() -> None:
    balance = LevelBalance({"matrix": 1.0, "layer": 2.0, "model": 4.0}, every=5)
    losses = {"matrix": 30.0, "layer": 0.01, "model": 2.0}
    balance.measure(losses)
    assert balance.multiplier["model"] == 1.0
    weighted = {level: balance.multiplier[level] * loss for level, loss in losses.items()}
    assert weighted["matrix"] / weighted["model"] == pytest.approx(1 / 4)
    assert weighted["layer"] / weighted["model"] == pytest.approx(2 / 4)


def test_a_level_without_share_is_off_and_losses_that_tell_nothing_change_nothing() -> None:
    balance = LevelBalance({"matrix": 1.0, "layer": 0.0, "model": 1.0}, every=1)
    balance.measure({"matrix": 0.0, "layer": 3.0, "model": float("inf")})
    assert balance.multiplier == {"layer": 0.0}
    balance.measure({"matrix": float("nan"), "model": 2.0})
    assert balance.multiplier == {"layer": 0.0, "model": 1.0}


def test_it_is_due_at_the_first_step_and_every_n_after() -> None:
    balance = LevelBalance({}, every=3)
    assert [step for step in range(1, 9) if balance.due(step)] == [1, 4, 7]


def test_stages_follow_their_shares() -> None:
    shares = {"matrix": 0.25, "layer": 0.25, "model": 0.5}
    turns = [staged_turn(step, 8, shares) for step in range(1, 9)]
    assert turns == [("matrix", 0)] * 2 + [("layer", 2)] * 2 + [("model", 4)] * 4
    shares = {"matrix": 0.0, "layer": 1.0, "model": 2.0}
    turns = [staged_turn(step, 3, shares) for step in (1, 2, 3)]
    assert turns == [("layer", 0), ("model", 1), ("model", 1)]


def test_the_schedule_learns_from_the_first_step_to_the_last() -> None:
    from makd_llm.config import TrainConfig
    from makd_llm.train.build import build_schedule

    share = build_schedule(TrainConfig(steps=20, warmup_steps=4))
    values = [share(step) for step in range(20)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "asked",
    [
        {"balance": {"matrix": 0, "layer": 0, "model": 0}},
        {"balance": {"layer": 0}, "schedule": {"kind": "staged"}},
    ],
)
def test_levels_that_learn_together_need_a_share(asked: dict[str, Any]) -> None:
    distil = DistilConfig.model_validate({"weights": "balanced", **asked})
    with pytest.raises(UserError, match=r"the share of .*layer.* is 0"):
        build_objectives(distil, FAMILIES["llama"], 4)
