"""Reductions, and work on one rank: what happens on one rank happens to all."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from makd_llm import distributed
from makd_llm.errors import Disconnected, UserError
from makd_llm.testing import launch_ranks, run_on_ranks


def fail(message: str) -> None:
    raise UserError(message)


@run_on_ranks(2)
def test_reductions_leave_their_argument_alone() -> None:
    rank = distributed.rank()
    mine = torch.tensor([1.0, 10.0], dtype=torch.float64) * (rank + 1)
    assert distributed.sum_over_ranks(mine).tolist() == [3.0, 30.0]
    assert mine.tolist() == [1.0 * (rank + 1), 10.0 * (rank + 1)]
    big = torch.tensor(2**53 + rank)
    assert distributed.sum_over_ranks(big).item() == 2**54 + 1
    assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.broadcast_object(f"from {rank}") == "from 0"
    assert distributed.device() == torch.device("cpu")
    distributed.barrier()


def on_main_tells_everybody(folder: Path) -> tuple[str, list[str]]:
    def count() -> int:
        (folder / f"{distributed.rank()}").touch()
        return len(list(folder.iterdir()))

    assert distributed.on_main(count) == 1
    distributed.barrier()
    assert [path.name for path in folder.iterdir()] == ["0"]

    with pytest.raises((TypeError, AttributeError), match=r"pickle|local"):
        distributed.on_main(lambda: lambda: "a result that cannot travel")

    with pytest.raises(UserError, match="no such file") as caught:
        distributed.on_main(fail, "no such file")
    distributed.barrier()
    return str(caught.value), getattr(caught.value, "__notes__", [])


def test_on_main_runs_once_and_its_result_or_failure_is_everybodys(tmp_path: Path) -> None:
    (text0, notes0), (text1, notes1) = launch_ranks(2, on_main_tells_everybody, tmp_path)
    assert text0 == text1 == "no such file"
    assert notes0 == []
    assert notes1 == ["raised on rank 0, and so on every rank"]


@run_on_ranks(2)
def test_on_all_fails_everywhere_where_it_fails_on_one() -> None:
    assert distributed.on_all(lambda: distributed.rank() + 1) == distributed.rank() + 1

    def only_one() -> None:
        if distributed.rank() == 1:
            fail("no room")

    with pytest.raises(UserError, match="no room") as caught:
        distributed.on_all(only_one)
    said = getattr(caught.value, "__notes__", [])
    assert said == (["raised on rank 1, and so on every rank"] if distributed.is_main() else [])
    distributed.barrier()


@run_on_ranks(2)
def test_one_rank_that_fails_alone_does_not_leave_the_group() -> None:
    with pytest.raises(UserError), distributed.joined():
        fail("alone")
    assert distributed.gather_objects(1) == [1, 1]
    with distributed.joined():
        pass
    assert not torch.distributed.is_initialized()


@run_on_ranks(2)
def test_drain_on_main_goes_through_all_items_on_every_rank() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield distributed.gather_objects(number)[0]

    assert distributed.drain_on_main(sum, items()) == 6
    with pytest.raises(UserError, match="full after 0"):
        distributed.drain_on_main(lambda each: fail(f"full after {next(each)}"), items())
    assert made == [0, 1, 2, 3] * 2


def test_everything_works_without_a_process_group() -> None:
    value = torch.tensor([2.0])
    assert distributed.sum_over_ranks(value) is not value
    assert distributed.sum_over_ranks(value).item() == 2.0
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.broadcast_object("a") == "a"
    assert distributed.on_main(max, 1, 2) == 2
    with pytest.raises(UserError, match="alone"):
        distributed.on_main(fail, "alone")
    distributed.barrier()


def test_init_makes_a_group_of_one_for_a_plain_python() -> None:
    program = (
        "from makd_llm import distributed as d\n"
        "import os, torch.distributed as dist, torch\n"
        "d.init(); d.init()\n"
        "assert dist.is_initialized() and (d.rank(), d.world_size()) == (0, 1)\n"
        "dist.all_reduce(torch.ones(1, device=d.device()))\n"
        "d.shutdown(); assert 'MASTER_PORT' not in os.environ; print('well')\n"
    )
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    # An environment that is not activated has its own tools off the PATH.
    environment["PATH"] = "/usr/bin:/bin"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "well"


@run_on_ranks(2)
def test_init_leaves_no_shared_memory_behind() -> None:
    os.environ["LOCAL_SIZE"] = "2"  # as DeepSpeed's launcher sets it
    distributed.init()
    distributed.barrier()
    assert os.environ["LOCAL_SIZE"] == "2"
    port = os.environ["MASTER_PORT"]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_{distributed.rank()}"))


def test_the_time_a_rank_waits_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAKD_COLLECTIVE_TIMEOUT", raising=False)
    assert distributed.collective_timeout().total_seconds() == 3600
    monkeypatch.setenv("MAKD_COLLECTIVE_TIMEOUT", "90.5")
    assert distributed.collective_timeout().total_seconds() == 90.5
    for wrong in ("soon", "0", "-3", "nan", "inf", ""):
        monkeypatch.setenv("MAKD_COLLECTIVE_TIMEOUT", wrong)
        with pytest.raises(UserError, match="not a number of seconds from 1 to 1000000"):
            distributed.collective_timeout()


def goes_away() -> str:
    """Rank 1 ends without a word; rank 0 waits for it."""
    if distributed.rank() == 1:
        return "gone"
    try:
        with distributed.joined():
            for _ in range(1000):
                distributed.barrier()
    except Disconnected as lost:
        return str(lost)
    return "not noticed"


def test_who_waits_for_a_rank_that_is_gone_says_so() -> None:
    told, _ = launch_ranks(2, goes_away)
    assert told.startswith("rank 0 of 2 has lost the others: no answer within 3600 s")
    assert "\n" not in told


def test_our_own_mistake_is_no_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's exceptions have no type of their own; tensors of different sizes are found by it too,
    and are a defect, whose traceback is wanted.
    """
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "init", lambda: None)
    where = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:534] "
    for words, expected in (
        (where + "Connection closed by peer [10.0.0.2]:3022", Disconnected),
        ("[enforce fail at /src/gloo/transport/tcp/pair.cc:446] op.nbytes. 8 vs 4", RuntimeError),
        ("shape '[2]' is invalid for input of size 3", RuntimeError),
    ):
        with pytest.raises(expected) as caught, distributed.joined():
            raise RuntimeError(words)
        assert type(caught.value) is expected
    with pytest.raises(Disconnected), distributed.joined():
        raise torch.distributed.DistNetworkError("the server socket cannot listen")
