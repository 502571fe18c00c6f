"""A signal ends a command with 75, whatever it is doing."""

import signal
import subprocess
import sys
import time

import pytest

from makd_llm.testing import environment_alone

COMMAND = """
import ctypes, sys, time
from makd_llm import signals
from makd_llm.errors import Interrupted
signals.PATIENCE = float(sys.argv[2])
signals.stop_at_signals()
print("ready", flush=True)
try:
    if sys.argv[1] == "in a call":  # that no signal interrupts: a mutex that is locked already
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    time.sleep(60)
except Interrupted:
    time.sleep(2 * signals.PATIENCE)  # what is in the way of the end is waited for
    print("cleared up")
    sys.exit(75)
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("place", "printed", "said"),
    [("in Python", "cleared up", ""), ("in a call", "", "makd: stopped, in a call that did not")],
)
def test_the_exit_code_is_that_of_a_stopped_run(
    kind: signal.Signals, place: str, printed: str, said: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, place, "0.3"],
        env=environment_alone(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(kind)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert output.strip() == printed and errors.startswith(said)
