"""How much each level counts, step by step: the balance of the levels and the schedule.

Levels differ by orders of magnitude and change at different speeds. `LevelBalance` keeps each
level's share of the loss at a given ratio; `staged_turn` says which level learns when levels take
turns.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class LevelBalance:
    """Multipliers m_l such that m_l L_l are in the ratio of the shares; the reference level keeps m
    = 1.

    Reconstruction (ours: the ratio of gradient norms would do as well, that of losses is cheaper).
    The reference is `model` where it is on, otherwise the first level.
    """

    shares: Mapping[str, float]
    every: int
    multiplier: dict[str, float] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """Whether the levels are to be measured after this step (counted from 1)."""
        return (step - 1) % self.every == 0

    def measure(self, losses: Mapping[str, float]) -> None:
        """losses: each active level's weighted loss without its multiplier, over all ranks."""
        self.multiplier.update({level: 0.0 for level in losses if self.shares[level] == 0})
        usable = {
            level: loss
            for level, loss in losses.items()
            if 0 < loss < math.inf and self.shares[level] > 0
        }
        if not usable:
            return
        reference = "model" if "model" in usable else next(iter(usable))
        unit = self.shares[reference] / usable[reference]
        for level, loss in usable.items():
            self.multiplier[level] = self.shares[level] / loss / unit


def staged_turn(step: int, steps: int, shares: Mapping[str, float]) -> tuple[str, int]:
    """The level that learns at `step` (from 1 to `steps`) where matrix, layer and model take turns,
    as TinyBERT's two stages do, and the steps before its turn. shares: of the steps, in that order;
    levels with share 0 never come.
    """
    total = sum(shares.values())
    reached, before = 0.0, 0
    for level, share in shares.items():
        reached += share / total * steps
        if share > 0 and step <= round(reached):
            return level, before
        before = round(reached)
    raise ValueError(f"step {step} is not one of {steps}")
