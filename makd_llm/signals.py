"""How SIGTERM and SIGINT end a command; the training loop has handlers of its own.

Python hears a signal only between its own instructions. A rank that is inside a long call (a
decomposition, a collective whose other side has ended already) would be killed by the launcher some
time later, and its exit code would not say that the same command goes on. So a thread waits beside
it, and ends the process where the call does not come back in time.
"""

import functools
import os
import signal
import socket
import sys
import threading

from makd_llm.errors import Interrupted

KINDS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 20.0
"""Seconds that a call may take to come back; deepspeed's launcher kills after 30, SLURM's
srun (distil.sbatch) 60 after the first rank has ended."""

_heard = threading.Event()


def stop_at_signals() -> None:
    """From now on a signal raises Interrupted (exit code 75) in the main thread, or ends the
    process with that code where the main thread is in a call that does not return. SIGINT too:
    click would turn it into an end like any other.
    """
    for kind in KINDS:
        signal.signal(kind, _stop)
    _start_watching(os.getpid())


@functools.cache
def _start_watching(process: int) -> None:
    """Once in a process; one that was forked has no threads of the other's."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _stop(number: int, frame: object) -> None:
    _heard.set()
    raise Interrupted("stopped; the same command goes on from what is finished")


def _watch(signals: socket.socket) -> None:
    """Reads the numbers of signals, which arrive here also while the main thread hears nothing."""
    while received := signals.recv(1):
        if signal.getsignal(received[0]) is not _stop:  # the training loop's, or nobody's
            continue
        if not _heard.wait(PATIENCE):
            print(
                "makd: stopped, in a call that did not come back; the same command goes on from "
                "what is finished",
                file=sys.stderr,
                flush=True,
            )
            os._exit(Interrupted.exit_code)
