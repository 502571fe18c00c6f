"""Checkpoint files are read as tensors and plain values; nothing that is in them is run.

torch.save writes pickles, and a pickle may name any function to be called while it is read. torch
reads them without that (`weights_only`), but DeepSpeed's own calls say `weights_only=False`. torch
has a switch in the environment that outrules them; inside `plain_values_only` it is on, and of all
classes only those few are known that DeepSpeed puts into its files, none of which does anything
when it is made.
"""

import errno
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch

from makd_llm.ending import is_out_of_memory
from makd_llm.errors import UserError

ON, OFF = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def _known() -> list[Any]:
    """What DeepSpeed's files hold besides tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: Any, name: str) -> object:
        if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError("GLOBAL builtins.getattr")
        found: object = ZeroStageEnum[name]
        return found

    # Python 3.11.0 to 3.11.3 write a member of an enumeration as getattr(its class, its name)
    return [LossScaler, ZeroStageEnum, fragment_address, (member, "builtins.getattr")]


@contextmanager
def plain_values_only(what: Path) -> Iterator[None]:
    """Inside, every torch.load of this process refuses whatever is not a tensor or a plain value.
    what: the checkpoint, for the message. Raises UserError where there is something else in it, or
    what torch cannot read at all.
    """
    before = {name: os.environ.pop(name, None) for name in (ON, OFF)}
    os.environ[ON] = "1"
    try:
        with torch.serialization.safe_globals(_known()):
            yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {what}: holds something that is no tensor and no plain value, and is not "
            f"loaded ({_named(error)}); take a checkpoint that this program wrote"
        ) from error
    except Exception as error:
        # What the disk says stays as it is, but for a seek outside of a file that was cut.
        disk = isinstance(error, OSError) and error.errno != errno.EINVAL
        if disk or is_out_of_memory(error) or not _of_a_file(error):
            raise
        words = (str(error).splitlines() or [""])[0][:100]
        raise UserError(
            f"checkpoint {what}: holds a file that cannot be read as tensors and plain values "
            f"({type(error).__name__}: {words}); take a checkpoint that this program wrote"
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _of_a_file(error: Exception) -> bool:
    """Whether torch.load has raised it, on whatever is in the file. What DeepSpeed makes of the
    values afterwards is another matter.
    """
    return any(frame.f_code is torch.load.__code__ for frame, _ in walk_tb(error.__traceback__))


def _named(error: pickle.UnpicklingError) -> str:
    """What it was, out of torch's long message."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it names {found[1]}" if found else str(error).splitlines()[0][:100]
