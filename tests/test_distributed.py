"""Reductions, and work on one rank: what happens on one rank happens to all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from makd_llm import distributed
from makd_llm.errors import UserError
from makd_llm.testing import launch_ranks, run_on_ranks


def fail(message: str) -> None:
    raise UserError(message)


@run_on_ranks(2)
def test_reductions_leave_their_argument_alone() -> None:
    rank = distributed.rank()
    mine = torch.tensor([1.0, 10.0], dtype=torch.float64) * (rank + 1)
    assert distributed.sum_over_ranks(mine).tolist() == [3.0, 30.0]
    assert distributed.max_over_ranks(mine[::2]).tolist() == [2.0]
    assert mine.tolist() == [1.0 * (rank + 1), 10.0 * (rank + 1)]
    big = torch.tensor(2**53 + rank)
    assert distributed.sum_over_ranks(big).item() == 2**54 + 1
    assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.broadcast_object(f"from {rank}") == "from 0"
    assert distributed.device() == torch.device("cpu")
    distributed.barrier()


@run_on_ranks(2)
def test_on_main_runs_once_and_tells_everybody(tmp_path: Path) -> None:
    def count() -> int:
        (tmp_path / f"{distributed.rank()}").touch()
        return len(list(tmp_path.iterdir()))

    assert distributed.on_main(count) == 1
    distributed.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def failures_seen() -> tuple[str, list[str]]:
    with pytest.raises(UserError, match="no such file") as caught:
        distributed.on_main(fail, "no such file")
    distributed.barrier()
    return str(caught.value), getattr(caught.value, "__notes__", [])


def test_on_main_raises_the_same_everywhere() -> None:
    (text0, notes0), (text1, notes1) = launch_ranks(2, failures_seen)
    assert text0 == text1 == "no such file"
    assert notes0 == []
    assert notes1 == ["raised on rank 0, and so on every rank"]


@run_on_ranks(2)
def test_on_main_refuses_a_result_that_cannot_travel() -> None:
    with pytest.raises((TypeError, AttributeError), match=r"pickle|local"):
        distributed.on_main(lambda: lambda: None)
    distributed.barrier()


@run_on_ranks(2)
def test_main_first_lets_the_others_find_the_result(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with distributed.main_first():
        if not cache.exists():
            time.sleep(0.3)
            cache.write_text(f"made by {distributed.rank()}")
    assert cache.read_text() == "made by 0"


@pytest.mark.parametrize("failing_rank", [0, 1])
@run_on_ranks(2)
def test_main_first_raises_on_every_rank(failing_rank: int) -> None:
    with pytest.raises(UserError, match="rank"), distributed.main_first():
        if distributed.rank() == failing_rank:
            fail(f"rank {failing_rank} cannot")
    assert distributed.gather_objects(distributed.rank()) == [0, 1]


def test_everything_works_without_a_process_group() -> None:
    value = torch.tensor([2.0])
    assert distributed.sum_over_ranks(value) is not value
    assert distributed.sum_over_ranks(value).item() == 2.0
    assert distributed.max_over_ranks(value).item() == 2.0
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.broadcast_object("a") == "a"
    assert distributed.on_main(max, 1, 2) == 2
    with pytest.raises(UserError, match="alone"):
        distributed.on_main(fail, "alone")
    with pytest.raises(UserError, match="alone"), distributed.main_first():
        fail("alone")
    distributed.barrier()


def test_init_makes_a_group_of_one_for_a_plain_python() -> None:
    program = (
        "from makd_llm import distributed as d\n"
        "import torch.distributed as dist, torch\n"
        "d.init(); d.init()\n"
        "assert dist.is_initialized() and (d.rank(), d.world_size()) == (0, 1)\n"
        "dist.all_reduce(torch.ones(1, device=d.device()))\n"
        "d.shutdown(); print('well')\n"
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
