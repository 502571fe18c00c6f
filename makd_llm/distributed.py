"""Ranks, reductions, and the one door for rank-0 work.

A run is one process (a *rank*) per accelerator, or several CPU processes that talk over gloo. Two
rules keep such a run from hanging, and this module is where both are kept:

1. A collective is called by every rank or by none, so it never stands under `if rank() == 0`.
2. Work that one rank does for all (a download, a file) goes through `on_main`, or `drain_on_main`
   where all ranks make what one works on, or `on_all` where each does its own part: when it fails
   there, the same exception is raised on every rank, so nobody waits for a message that will not
   come. (A rank that fails elsewhere leaves word in the run folder and ends with its process, and
   the launcher ends the others: ending.py.)

Everything here works without a process group as well: a plain `python` is a run of one rank.
"""

import gc
import io
import logging
import os
import pickle
import secrets
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from makd_llm import operators
from makd_llm.errors import Disconnected, UserError

TIMEOUT_VARIABLE = "MAKD_COLLECTIVE_TIMEOUT"
DEFAULT_TIMEOUT = 3600.0
"""Seconds. Rank 0 may fetch a model or write a checkpoint while the others wait for it."""

T = TypeVar("T")


_GROUP_OF_ONE: dict[str, str] = {}
"""What `init` has put into the environment, where no launcher had."""


def init() -> None:
    """Join the process group that the launcher's environment describes, or make a group of one.

    The backend is the accelerator's (nccl on CUDA, gloo on CPU). Calling it again changes nothing.
    Raises UserError where $MAKD_COLLECTIVE_TIMEOUT is no time.
    """
    timeout = collective_timeout()
    operators.prepare()
    from deepspeed import init_distributed
    from deepspeed.accelerator import get_accelerator

    if "RANK" not in os.environ and not dist.is_initialized():
        _GROUP_OF_ONE.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
        os.environ.update(_GROUP_OF_ONE)
    first = not dist.is_initialized()
    accelerator = get_accelerator()
    accelerator.set_device(local_rank())
    # By this variable DeepSpeed learns that all CPU ranks share a machine, and then lays 66 MiB of
    # shared memory per rank, for a reduction that only tensor-parallel inference uses, and leaves
    # it in /dev/shm for good. Some hundred runs of it filled a machine's memory.
    local_size = os.environ.pop("LOCAL_SIZE", None)
    try:
        with redirect_stdout(io.StringIO()):  # it says what it built, where a report goes
            init_distributed(
                dist_backend=accelerator.communication_backend_name(),
                auto_mpi_discovery=False,
                timeout=timeout,
                verbose=False,
            )
    finally:
        if local_size is not None:
            os.environ["LOCAL_SIZE"] = local_size
    # DeepSpeed has Python look for garbage several times while it makes an engine, each time
    # through all that was ever imported (0.6 s); what is there by now is not looked at again.
    if first:
        gc.freeze()


@contextmanager
def joined() -> Iterator[None]:
    """`init`, and `shutdown` after the work of all ranks. One of several that fails does not leave
    the group: to do so in good order it would wait for the others, which wait for it. What is
    raised inside because another rank is gone or does not answer becomes Disconnected.
    """
    try:
        init()
        yield
    except BaseException as error:
        if world_size() == 1:
            shutdown()
        elif isinstance(error, RuntimeError) and is_of_the_network(error):
            raise disconnected(error) from error
        raise
    shutdown()


def disconnected(error: RuntimeError) -> Disconnected:
    """What this rank says where a collective has failed for want of another."""
    return Disconnected(
        f"rank {rank()} of {world_size()} has lost the others: no answer within "
        f"{collective_timeout().total_seconds():g} s ({TIMEOUT_VARIABLE}), or a connection that "
        "broke, as where a rank is killed; what was saved stands, and the same command goes on "
        f"from it ({str(error).splitlines()[0]})"
    )


def collective_timeout() -> timedelta:
    """How long a rank waits for another: $MAKD_COLLECTIVE_TIMEOUT in seconds, or an hour. Raises
    UserError where that is no time.
    """
    given = os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT)
    try:
        seconds = float(given)
        if not 1 <= seconds <= 1e6:
            raise ValueError
    except ValueError:
        raise UserError(
            f"{TIMEOUT_VARIABLE}={given}: not a number of seconds from 1 to 1000000"
        ) from None
    return timedelta(seconds=seconds)


def quiet() -> None:
    """Let this program speak (rank 0), and of the libraries only what is an error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("DeepSpeed", "transformers", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch deprecates collectives that DeepSpeed still calls, at every step anew.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    own = logging.getLogger("makd_llm")
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        own.addHandler(handler)
    own.setLevel(logging.INFO if is_main() else logging.ERROR)


def shutdown() -> None:
    """Leave the process group, if there is one. To be called by every rank at a run's end."""
    if dist.is_initialized():
        dist.destroy_process_group()
    groups: Any = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:  # it would hand the old group to the next run of this process
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        groups._ALL_TO_ALL_GROUP = {}
    for name in _GROUP_OF_ONE:  # its port is free again, and may soon be somebody else's
        os.environ.pop(name, None)
    _GROUP_OF_ONE.clear()


def rank() -> int:
    """This process's number among all; before `init`, what the launcher's environment says."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes share the run; before `init`, what the launcher's environment says."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its own machine, which is also its accelerator's number."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """True on rank 0. For words and progress bars; work belongs in `on_main`."""
    return rank() == 0


def device() -> torch.device:
    """The accelerator of this rank, as DeepSpeed sees it (`DS_ACCELERATOR=cpu` forces the CPU)."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().device_name(local_rank()))


def barrier() -> None:
    """Return once every rank has come here."""
    if world_size() > 1:
        # An all-gather of nothing: unlike `dist.barrier` it needs no device to be guessed.
        gather_objects(None)


def sum_in_place(tensor: torch.Tensor) -> None:
    """Adds all ranks' tensors up into each rank's own: for what is too large to be held twice."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over all ranks, in the tensor's own dtype and device; a new tensor."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def max_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum over all ranks, in the tensor's own dtype and device; a new one."""
    return _reduced(tensor, dist.ReduceOp.MAX)


def gather_objects(obj: T) -> list[T]:
    """Every rank's object, in the order of ranks, on every rank. Objects must be picklable."""
    if world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: T) -> T:
    """Rank 0's object on every rank; what the other ranks pass is ignored. Must be picklable."""
    if world_size() == 1:
        return obj
    box: list[Any] = [obj if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def on_main(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `fn(*args, **kwargs)` on rank 0 alone and return its result on every rank.

    Every rank calls this. The result must be picklable. What `fn` raises is raised on every rank.
    """
    if world_size() == 1:
        return fn(*args, **kwargs)
    result: Any = None
    failure: BaseException | None = None
    if is_main():
        try:
            result = fn(*args, **kwargs)
            pickle.dumps(result)  # what cannot travel must fail here and not inside the broadcast
        except BaseException as error:  # noqa: BLE001 - whatever it is, the others must hear it
            result, failure = None, error
    told, result = broadcast_object((portable(failure), result))
    _raise_together([told], failure)
    return result  # type: ignore[no-any-return]


def on_all(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `fn(*args, **kwargs)` on every rank and return each rank's own result. Where it fails on
    one, that is raised on all of them. `fn` itself must not be collective.
    """
    result: Any = None
    failure: BaseException | None = None
    try:
        result = fn(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the others must hear it
        failure = error
    _raise_together(gather_objects(portable(failure)), failure)
    return result  # type: ignore[no-any-return]


def drain_on_main(fn: Callable[[Iterator[Any]], T], items: Iterator[Any]) -> T:
    """`on_main` for work on items that all ranks make together (each item costs a collective).

    Rank 0 calls `fn(items)`; the others go through the items and drop them. Where `fn` fails or
    stops early, rank 0 goes through the rest as well, so nobody waits; then the failure is raised
    on every rank. The result must be picklable.
    """
    failure: BaseException | None = None
    result: Any = None
    if is_main():
        try:
            result = fn(items)
            pickle.dumps(result)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the others must hear it
            failure = error
    for _ in items:
        pass
    told = broadcast_object(portable(failure))
    _raise_together([told], failure)
    return broadcast_object(result)  # type: ignore[no-any-return]


def free_port() -> int:
    """A TCP port of this machine that nobody uses at the moment.

    From below the range out of which Linux serves outgoing connections (32768 and up): one of those
    may take a port of that range in the seconds until a rank listens on it.
    """
    for _ in range(100):
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError("no TCP port of 127.0.0.1 between 20000 and 32000 can be bound")


def portable(error: BaseException | None) -> BaseException | None:
    """The exception as it can travel: itself where pickle brings it back whole, its text if not."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PickleError, TypeError, AttributeError, ValueError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _reduced(tensor: torch.Tensor, operation: Any) -> torch.Tensor:
    if world_size() == 1:
        return tensor.detach().clone()
    # nccl sees only its own device, so a tensor of the host makes the journey there and back.
    where = device() if dist.get_backend() == "nccl" else tensor.device
    buffer = tensor.detach().to(where, copy=True).contiguous()
    dist.all_reduce(buffer, op=operation)
    return buffer.to(tensor.device)


def is_of_the_network(error: RuntimeError) -> bool:
    """Whether a collective failed for want of another rank. gloo has no exception of its own, but
    its words begin with where in its sources they come from; what it enforces is our own mistake,
    such as tensors of different sizes.
    """
    words = str(error)
    return isinstance(error, dist.DistError) or ("gloo/" in words and "enforce fail" not in words)


def _raise_together(failures: list[BaseException | None], own: BaseException | None = None) -> None:
    """Raise this rank's own failure, or else the first of the others' with a note of its rank."""
    if own is not None:
        raise own
    for failed_rank, failure in enumerate(failures):
        if failure is not None:
            failure.add_note(f"raised on rank {failed_rank}, and so on every rank")
            raise failure
