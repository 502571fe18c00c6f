"""Operators are built by one process at a time, and one that is killed keeps nobody waiting."""

import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from makd_llm import operators
from makd_llm.operators import HeldBaton
from makd_llm.testing import environment_alone

BUILD = """
import sys, time
from makd_llm.operators import HeldBaton
baton = HeldBaton(sys.argv[1])
assert baton.try_acquire()
print("builds", flush=True)
time.sleep(60)
"""


def test_they_are_compiled_by_the_environments_own_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    for name, value in operators.compiler_environment().items():
        monkeypatch.setenv(name, value)
    ninja = shutil.which("ninja")
    assert ninja is not None
    assert Path(ninja).parent == Path(sysconfig.get_path("scripts"))
    assert operators.compiler_environment() == {}, "what is set is kept"


def test_torch_takes_this_lock() -> None:
    from torch.utils import cpp_extension

    operators.prepare()
    assert cpp_extension.FileBaton is HeldBaton


def test_who_is_killed_while_it_builds_keeps_nobody_waiting(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    builder = subprocess.Popen(
        [sys.executable, "-c", BUILD, lock],
        env=environment_alone(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert builder.stdout is not None and builder.stdout.readline() == "builds\n"
    other = HeldBaton(lock)
    assert not other.try_acquire()
    builder.send_signal(signal.SIGKILL)
    other.wait()  # as torch does; comes back though torch's own file stays
    assert Path(lock).exists()
    builder.wait()
    assert other.try_acquire(), "and the next one builds"
    other.release()
    assert not Path(lock).exists()
    assert other.try_acquire()
    other.release()
