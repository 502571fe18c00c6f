"""What the tests of faults share: a run that is broken on purpose and started again, how to break
it at a chosen place, and a row of the table of what came of it.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from makd_llm.testing.forked import Break, Ranks, start

CHECKOUT = Path(__file__).resolve().parents[2]
STEPS = 12
"""Of a run that one fault is injected into; a checkpoint every EVERY of them."""
MANY = 61
"""Of the run that is killed again and again."""
EVERY = 2


@dataclass
class Row:
    """What came of a fault. lost: steps that were saved in a sound checkpoint and had to be done
    again. then: what the next start did. same: whether the student is that of the undisturbed run.
    """

    fault: str
    times: int
    lost: int
    then: str
    same: str


class Case:
    """A run folder whose student has been cut and is still to learn."""

    def __init__(self, tiny: Path, run_dir: Path, logs: Path, steps: int) -> None:
        self.tiny, self.dir, self.logs, self.steps = tiny, run_dir, logs, steps
        self.starts = 0

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints" / "distil"

    def start(self, *more: str, ranks: int = 2, breaking: Break = lambda rank: None) -> Ranks:
        """Starts the run on forked ranks."""
        self.starts += 1
        arguments = [
            *("train", "--ds", str(CHECKOUT / "ds_configs" / "zero3.json")),
            *("--config", str(self.tiny / "run.yaml"), f"run_dir={self.dir}"),
            *(f"distil.train.steps={self.steps}", "--until", "distil", *more),
        ]
        logs = self.logs / f"{self.dir.name}-{self.starts}"
        return start(arguments, logs, ranks=ranks, breaking=breaking)

    def finish(self, *more: str) -> str:
        """The same command once more, which has to come to the end; what rank 0 said."""
        ranks = self.start(*more).wait()
        said = ranks.said()
        assert list(ranks.codes.values()) == [0, 0], said + ranks.said(1)
        return said

    def saved(self) -> int:
        """The step of the newest checkpoint that the pointer names; 0: none."""
        pointer = self.checkpoints / "latest"
        return int(pointer.read_text().removeprefix("step-")) if pointer.exists() else 0

    def student(self) -> dict[str, torch.Tensor]:
        return load_file(self.dir / "student" / "model.safetensors")

    def equals(self, other: "Case") -> bool:
        """Whether the students are the same to the last bit."""
        ours, theirs = self.student(), other.student()
        return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def resumed(said: str) -> int:
    """The step that a start went on from; 0: it began anew."""
    for line in said.splitlines():
        if "distil: resumed at step" in line:
            return int(line.split("resumed at step ")[1].split()[0])
    return 0


def at_step(step: int, act: Callable[[], None]) -> None:
    """Has this rank do something when it comes to a step of the training loop."""
    from makd_llm.train.loop import Loop

    loop: Any = Loop
    original = loop._one_step

    def one_step(self: Loop, *arguments: Any) -> Any:
        if self.step + 1 == step:
            act()
        return original(self, *arguments)

    loop._one_step = one_step


def before(module: Any, name: str, act: Callable[[int], None]) -> None:
    """Calls `act` with a number, from 1, before each call of a function of a module or class."""
    original, calls = getattr(module, name), 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        act(calls)
        return original(*arguments, **named)

    setattr(module, name, wrapped)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
