"""The runs of a comparison one after another on this machine, each through the launcher in
processes of its own.

A run that fails does not stop the others; what needs it is failed too. Whoever ends this process,
by whatever signal, ends the run that it has started, which saves first where it can.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from makd_llm.comparison.eta import Clock, in_words
from makd_llm.comparison.grid import Grid, Item
from makd_llm.comparison.record import Record, Stamps, read_record, write_record
from makd_llm.comparison.running import CLAIM
from makd_llm.errors import Interrupted
from makd_llm.report.progress import bar_if_watched

LOG = "output.log"
SECONDS_BETWEEN_LINES = 60.0
_C, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


def make(
    grid: Grid,
    items: Sequence[Item],
    command: Callable[[Item], list[str]],
    tell: Callable[[str], None],
) -> dict[str, str]:
    """Makes the runs that do not stand yet, in order. command: what makes one of them, in its
    ranks. Returns the errors of those that failed, by place.

    Raises Interrupted after a signal; the run that was under way has saved then.
    """
    stamps, clock, failed = Stamps(grid), Clock(grid), dict[str, str]()
    for number, item in enumerate(items, 1):
        name = f"[{number}/{len(items)}] {item.place}"
        if stamps.stands(item):
            tell(f"{name}: stands")
            continue
        folder = grid.folder / item.place
        folder.mkdir(parents=True, exist_ok=True)
        if item.needs in failed:
            failed[item.place] = f"{item.needs} failed, which it needs"
            write_record(folder, Record("failed", stamps.of(item), failed[item.place]))
            tell(f"{name}: {failed[item.place]}")
            continue
        _wait_for_others(folder, name, tell)
        tell(f"{name}: begins")
        left = [i for i in items[number - 1 :] if not stamps.stands(i)]
        before, said = read_record(folder), _size(folder / LOG)
        code = _run(command(item), folder, _Watch(name, item, left, clock, folder, tell))
        record = read_record(folder)
        if code == 0 and record is not None and record.state == "done":
            clock.finished(item, record.seconds or 0.0)
            later = clock.left(left[1:])
            more = f"; {len(left) - 1} to go" + (f", about {in_words(later)}" if later else "")
            tell(f"{name}: done in {in_words(record.seconds or 0.0)}" + (more if left[1:] else ""))
            continue
        if record is None or record.state != "failed" or record == before:
            record = Record("failed", stamps.of(item), _last_words(folder / LOG, said, code))
            write_record(folder, record)
        failed[item.place] = record.why
        tell(f"{name}: FAILED: {record.why} (all it said: {folder / LOG})")
    return failed


def launcher(ranks: int, arguments: Sequence[str]) -> list[str]:
    """The command line of `makd ARGUMENTS` on so many ranks of this machine."""
    if ranks == 1:
        return [sys.executable, "-m", "makd_llm.cli", *arguments]
    group = ["--standalone", "--nproc-per-node", str(ranks)]
    run = ["-m", "torch.distributed.run", *group, "-m", "makd_llm.cli"]
    return [sys.executable, *run, *arguments]


def _run(command: list[str], folder: Path, watch: "_Watch") -> int:
    """Runs a command to its end, its output in the folder's log; its exit code."""
    with (folder / LOG).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            # Signals of a terminal come to this process, which hands on one of them.
            start_new_session=True,
            preexec_fn=_end_with_the_parent,
        )
        with watch:
            try:
                while True:
                    try:
                        return process.wait(timeout=1.0)
                    except subprocess.TimeoutExpired:
                        watch.look()
            except Interrupted:
                process.send_signal(signal.SIGTERM)
                watch.tell(f"{watch.name}: is told to stop, and saves")
                process.wait()
                raise Interrupted(
                    f"{watch.name}: stopped; the same command goes on from what is saved"
                ) from None


def _end_with_the_parent() -> None:
    """In the child, before it is another program: SIGTERM when the process that started it is gone,
    even by SIGKILL. One call into the C library, as little as can be between fork and exec.
    """
    _C.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for_others(folder: Path, name: str, tell: Callable[[str], None]) -> None:
    """Until no other process is at work on this run: one that an earlier command left is saving."""
    lock = FileLock(folder / CLAIM, timeout=0)
    told = False
    while True:
        try:
            with lock:
                return
        except TimeoutError:
            if not told:
                tell(f"{name}: another process is at work on it; waiting for its end")
            told = True
            time.sleep(1.0)


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _last_words(log: Path, start: int, code: int) -> str:
    """Of a run that could not leave a record itself: its line, or the last that it printed. start:
    where in the log it began; what stands before is of earlier attempts.
    """
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    own = [line.removeprefix("makd: ") for line in lines if line.startswith("makd: ")]
    died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{died}: {(own or lines or ['no word'])[-1].strip()}"


class _Watch:
    """Shows how far a run is, and all of them: a bar on a terminal, a line a minute elsewhere."""

    def __init__(
        self,
        name: str,
        item: Item,
        left: Sequence[Item],
        clock: Clock,
        folder: Path,
        tell: Callable[[str], None],
    ) -> None:
        self.name, self.item, self.left, self.clock = name, item, left, clock
        self.folder, self.tell = folder, tell
        self._started = self._spoken = time.monotonic()
        self._bar = bar_if_watched(refreshing=False)

    def __enter__(self) -> "_Watch":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=None, said="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def look(self) -> None:
        """Shows what there is to be seen now."""
        now = time.monotonic()
        left = self.clock.left(self.left, now - self._started)
        said = "left in all: " + (in_words(left) if left is not None else "known after a row")
        if self._bar:
            step, steps = self._step()
            self._bar.update(self._task, completed=step, total=steps or None, said=said)
            self._bar.refresh()
        elif now - self._spoken >= SECONDS_BETWEEN_LINES:
            self._spoken = now
            self.tell(f"{self.name}: {_last_line(self.folder / LOG)[:70]}; {said}")

    def _step(self) -> tuple[int, int]:
        """The newest step of the stage that trains, and its number of steps; 0: none yet."""
        try:
            line = json.loads(_last_line(self.folder / "metrics.jsonl"))
        except ValueError:  # none yet, or half a line
            return 0, 0
        config = self.item.config
        train = {"sft": config.sft.train, "distil": config.distil.train}[line["stage"]]
        return line["step"], train.steps


def _last_line(path: Path) -> str:
    """Of a text file that is being written; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            return file.read().decode(errors="replace").rstrip().rpartition("\n")[2]
    except FileNotFoundError:
        return ""
