"""What a training run says of itself: metrics.jsonl and TensorBoard always, DeepSpeed's monitors as
asked for (monitors.py), a progress bar where somebody looks.

Only rank 0 writes. On a terminal it shows a bar (step, losses, tokens/s, time left), elsewhere one
line per logged step. A resumed run drops what the file says of steps after the checkpoint, so every
step stands in it once.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.progress import Progress
from torch.utils.tensorboard import SummaryWriter

from makd_llm import distributed
from makd_llm.files import write_whole
from makd_llm.report.progress import bar_if_watched


class Metrics:
    """Writer of one training stage. On ranks other than 0 every method does nothing.

    tell: takes the values of each step as well.
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        *,
        steps: int,
        start: int,
        tell: Callable[[Mapping[str, Any]], None] = lambda values: None,
    ) -> None:
        self.stage, self.steps, self._tell = stage, steps, tell
        self._started, self._start = time.monotonic(), start
        self._bar: Progress | None = None
        if not distributed.is_main():
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _forget_after(path, stage, start)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard" / stage), purge_step=start + 1)
        self._bar = bar_if_watched()
        if self._bar:
            self._task = self._bar.add_task(stage, total=steps, completed=start, said="")
            self._bar.start()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Records the values of one step."""
        if not distributed.is_main():
            return
        print(
            json.dumps({"stage": self.stage, "step": step, **values}), file=self._file, flush=True
        )
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)
        self._tell(values)
        said = self._line(values)
        if self._bar:
            self._bar.update(self._task, completed=step, said=said)
        else:
            left = (time.monotonic() - self._started) / (step - self._start) * (self.steps - step)
            print(f"{self.stage} {step}/{self.steps}  {said}  left {left:.0f} s", flush=True)

    def note(self, text: str) -> None:
        """A sentence for the person who looks."""
        if distributed.is_main():
            print(text, file=sys.stderr, flush=True)

    @staticmethod
    def _line(values: dict[str, Any]) -> str:
        losses = "  ".join(
            f"{n.removeprefix('loss/')} {v:.3f}" for n, v in values.items() if n.startswith("loss")
        )
        return f"{losses}  {values['tokens_per_second']:.0f} tokens/s"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not distributed.is_main():
            return
        if self._bar:
            self._bar.stop()
        self._file.close()
        self._board.close()


def _forget_after(path: Path, stage: str, step: int) -> None:
    """Drops lines of this stage after `step` (and half a line that a crash left behind)."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("stage") != stage or entry.get("step", 0) <= step:
            kept.append(line)
    write_whole(path, "".join(f"{line}\n" for line in kept))
