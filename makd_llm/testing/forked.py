"""Ranks of the main job that are forked from this process, which has imported everything already.

A start of the real launcher costs ten seconds of imports; here it costs a tenth of one, so a run
can be killed twenty times in a test. A rank is otherwise what the launcher would start: a process
of its own session that runs `makd …` in the launcher's environment. As the launcher does,
`Ranks.wait` ends the others when one has failed. And as it is a fork, a test can hand in a function
that is called in each rank before it starts, to break something there.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from makd_llm import distributed
from makd_llm.testing import GROUP

Break = Callable[[int], None]
"""Is called with the rank, in that rank, before anything else."""

AFTER_A_FAILURE = 1.0
"""Seconds until the others are sent SIGTERM, as by the launcher."""
PATIENCE = 30.0
"""Seconds until those that still run are killed, which counts as a hang."""


@dataclass
class Ranks:
    """Started ranks. After `wait`: exit codes (negative: by this signal), what each has said, which
    had to be killed.
    """

    pids: list[int]
    logs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)
    hung: list[int] = field(default_factory=list)
    seconds_to_end: float = 0.0
    """From the first failure until the last rank had ended."""

    def wait(self, timeout: float = 120.0) -> "Ranks":
        """Returns when all have ended. Raises TimeoutError where they do not, none having failed;
        they are killed then.
        """
        deadline = time.monotonic() + timeout
        failed: float | None = None
        while len(self.codes) < len(self.pids):
            self._collect()
            now = time.monotonic()
            if failed is None and any(self.codes.values()):
                failed = now
            if failed is not None and now > failed + AFTER_A_FAILURE:
                self._send(signal.SIGTERM if now < failed + PATIENCE else signal.SIGKILL)
                if now > failed + PATIENCE:
                    self.hung = [r for r in range(len(self.pids)) if r not in self.codes]
                    deadline = now + 5
            if now > deadline:
                self._send(signal.SIGKILL)
                raise TimeoutError("\n".join(self.said(r) for r in range(len(self.pids))))
            time.sleep(0.01)
        self.seconds_to_end = 0.0 if failed is None else time.monotonic() - failed
        return self

    def said(self, rank: int = 0) -> str:
        """Everything that a rank has printed."""
        return self.logs[rank].read_text(encoding="utf-8", errors="replace")

    def last_words(self, rank: int = 0) -> str:
        """The last line of it."""
        return (self.said(rank).strip().splitlines() or [""])[-1]

    def _collect(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)

    def _send(self, kind: signal.Signals) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, kind)


def start(
    arguments: Sequence[str],
    logs: Path,
    *,
    ranks: int = 2,
    breaking: Break = lambda rank: None,
) -> Ranks:
    """Starts `makd ARGUMENTS` on so many CPU ranks."""
    logs.mkdir(parents=True, exist_ok=True)
    port = distributed.free_port()
    started = Ranks([], [logs / f"rank{rank}.log" for rank in range(ranks)])
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _live(arguments, started.logs[rank], rank, ranks, port, breaking)
        started.pids.append(pid)
    return started


def _live(
    arguments: Sequence[str], log: Path, rank: int, ranks: int, port: int, breaking: Break
) -> NoReturn:
    """The life of one rank; never returns into the parent's code."""
    code = 1
    try:
        os.setsid()
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(kind, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        values = (rank, ranks, rank, ranks, "127.0.0.1", port)
        os.environ.update(dict(zip(GROUP, map(str, values), strict=True)))
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        from makd_llm.cli import main

        breaking(rank)
        main(list(arguments))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this process only
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
