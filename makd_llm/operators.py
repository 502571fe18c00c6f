"""DeepSpeed's compiled operators: where they are built, and by one process at a time.

torch compiles them behind a lock that is a file, and a process that is killed leaves it: every
later one would wait for it without end and without a word. Here the operating system holds the
lock, and it goes with its process.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from filelock import FileLock, Timeout
from torch.utils.file_baton import FileBaton


def prepare() -> None:
    """Sets the environment in which operators are built, and the lock. Before any is loaded."""
    os.environ.update(compiler_environment())
    from torch.utils import cpp_extension  # takes a while, and a command may build nothing

    cpp_extension.FileBaton = HeldBaton  # type: ignore[misc]


class HeldBaton(FileBaton):
    """torch's lock, with one of the operating system around it."""

    def __init__(self, lock_file_path: str, *arguments: object, **named: object) -> None:
        super().__init__(lock_file_path, *arguments, **named)
        self._held = FileLock(f"{lock_file_path}.held")

    def try_acquire(self) -> bool:
        """Whether this process is the one that builds."""
        try:
            self._held.acquire(timeout=0)
        except Timeout:
            return False
        # Nobody builds: what stands there was left by a process that was killed.
        Path(self.lock_file_path).unlink(missing_ok=True)
        return bool(super().try_acquire())

    def wait(self) -> None:
        """Until the process that builds has ended, in one way or another."""
        with self._held:
            pass

    def release(self) -> None:
        super().release()
        self._held.release()


def compiler_environment() -> dict[str, str]:
    """Environment variables with which DeepSpeed compiles its operators where they belong.

    It takes the `ninja` that was installed with it, also where the environment is not activated:
    another version would reject the first one's records and compile all over again. And what it
    compiles is kept in the virtual environment: in the cache that all environments share by
    default, they would recompile each other's operators in turn.
    """
    variables = {}
    scripts = sysconfig.get_path("scripts")
    installed = shutil.which("ninja", path=scripts)
    if installed is not None and shutil.which("ninja") != installed:
        variables["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    in_virtual_environment = sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK)
    if in_virtual_environment and "TORCH_EXTENSIONS_DIR" not in os.environ:
        variables["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
    return variables
