"""How the ranks of a run end together where one of them fails alone.

What fails on all ranks, or through `distributed.on_main` and its like, is known to all of them.
What fails on one (its memory is full, say) is not: the others wait for it in a collective and learn
no more than that the connection broke. So a rank that fails leaves word in the run folder before it
ends, and the others say the same; where there is no word, the rank was killed or its machine is
gone, and the same command goes on from the last checkpoint.

(gloo tells the others at once that a connection broke. nccl does not: there the launcher ends them,
some 30 seconds later.)
"""

import errno
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from makd_llm import distributed
from makd_llm.errors import OutOfMemory, RankFailed, RunEnded
from makd_llm.redaction import without_secrets

WORD = "failure.json"
PATIENCE = 2.0
"""Seconds until a word that another rank has written is seen here, on a shared file system too."""

_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",  # C++
    "_status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER and cuSPARSE
)


@contextmanager
def one_ending(run_dir: Path) -> Iterator[None]:
    """Inside, what one rank fails of ends every rank with the same words. Collective on entering.

    Raises RankFailed, Disconnected, OutOfMemory, or what was raised inside.
    """
    distributed.on_main((run_dir / WORD).unlink, missing_ok=True)
    try:
        yield
    except Exception as error:
        ended = _ending(error, run_dir)
        if ended is error:
            raise
        raise ended from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was missing, of the accelerator or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | OSError) and any(
        words in str(error).lower() for words in _OUT_OF_MEMORY
    )


def _ending(error: Exception, run_dir: Path) -> Exception:
    rank = distributed.rank()
    if is_out_of_memory(error):
        error = OutOfMemory(
            f"rank {rank} ran out of memory: {_first_line(error)}; use smaller batches, more ranks "
            "or more sharding (ds_configs/README.md)"
        )
    if distributed.world_size() == 1:
        return error
    if isinstance(error, RuntimeError) and distributed.is_of_the_network(error):
        return _word_of_another(run_dir) or distributed.disconnected(error)
    if isinstance(error, RunEnded):
        _leave_word(run_dir, str(error), error.exit_code)
    else:
        said = f"rank {rank} failed, its traceback says where: {type(error).__name__}: "
        _leave_word(run_dir, said + _first_line(error), RankFailed.exit_code)
    return error


def _leave_word(run_dir: Path, text: str, exit_code: int) -> None:
    """The first word stays; a disk that takes none is no reason to fail otherwise."""
    try:
        with (run_dir / WORD).open("x", encoding="utf-8") as file:
            word = {"rank": distributed.rank(), "says": without_secrets(text)}
            json.dump({**word, "exit_code": exit_code}, file)
    except OSError:
        return


def _word_of_another(run_dir: Path) -> RankFailed | None:
    for kind in (signal.SIGTERM, signal.SIGINT):  # the launcher's: this rank ends in any case
        signal.signal(kind, signal.SIG_IGN)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            found = json.loads((run_dir / WORD).read_text(encoding="utf-8"))
            return RankFailed(found["says"], int(found["exit_code"]))
        except (OSError, ValueError):  # not there yet, or not yet whole
            if time.monotonic() > deadline:
                return None
        time.sleep(0.05)


def _first_line(error: BaseException) -> str:
    """Without secrets, of which half might be left where it is cut."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return without_secrets(line)[:300]
