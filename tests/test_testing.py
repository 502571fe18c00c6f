"""The helpers of `makd_llm.testing` do what the tests rely on: they report what went wrong."""

import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from makd_llm.errors import UserError
from makd_llm.testing import assert_no_worse_than_eager, launch_ranks, run_on_ranks


@dataclass
class Parcel:
    """A class that only this file defines."""

    number: int


class Unpicklable(Exception):
    def __init__(self, first: str, second: str):
        super().__init__(f"{first} and {second}")


def whoami(parcel: Parcel) -> tuple[Parcel, str, str]:
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    number = parcel.number + dist.get_rank()
    return Parcel(number), f"{total.item()} of {dist.get_world_size()}", os.environ["LOCAL_RANK"]


def raise_on_last(kind: str) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        if kind == "user":
            raise UserError("the last rank objects")
        if kind == "unpicklable":
            raise Unpicklable("salt", "pepper")
        if kind == "skip":
            pytest.skip("not here")
        if kind == "death":
            print("last words", flush=True)
            os._exit(7)
    dist.barrier()


def sleep_forever() -> None:
    time.sleep(3600)


def test_results_come_back_by_rank_with_classes_of_the_test_file() -> None:
    assert launch_ranks(2, whoami, Parcel(10)) == [
        (Parcel(10), "3 of 2", "0"),
        (Parcel(11), "3 of 2", "1"),
    ]


def test_the_failing_ranks_exception_arrives_although_another_waits_for_it() -> None:
    with pytest.raises(UserError, match="the last rank objects") as caught:
        launch_ranks(2, raise_on_last, "user")
    assert "on rank 1 of 2" in caught.value.__notes__[0]
    assert "raise_on_last" in caught.value.__notes__[0]


def test_an_exception_that_pickle_cannot_rebuild_arrives_as_its_text() -> None:
    with pytest.raises(RuntimeError, match="Unpicklable: salt and pepper"):
        launch_ranks(1, raise_on_last, "unpicklable")


def test_a_skip_is_a_skip() -> None:
    with pytest.raises(pytest.skip.Exception, match="not here"):
        launch_ranks(1, raise_on_last, "skip")


def test_a_rank_that_dies_is_reported_with_its_output() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with code 7.*last words"):
        launch_ranks(1, raise_on_last, "death")


def test_a_timeout_says_where_the_ranks_stood() -> None:
    stood = r"(?s)sleep_forever took over 3 s.*rank 0.*most recent call first"
    with pytest.raises(TimeoutError, match=stood):
        launch_ranks(1, sleep_forever, timeout=3)


def test_a_nested_function_is_refused() -> None:
    with pytest.raises(ValueError, match="top of its module"):
        launch_ranks(1, lambda: None)


@pytest.mark.parametrize("number", [3])
@run_on_ranks(2)
def test_decorated_tests_take_parameters(number: int) -> None:
    gathered: list[int] = [0, 0]
    dist.all_gather_object(gathered, number + dist.get_rank())
    assert gathered == [3, 4]


@pytest.mark.xfail(raises=AssertionError, strict=True)
@run_on_ranks(2)
def test_decorated_tests_can_fail() -> None:
    assert dist.get_rank() == 0


def rounded(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16)


def test_tolerance_is_the_eager_error() -> None:
    exact = torch.linspace(-3, 5, 1001, dtype=torch.float64)
    eager = rounded(exact)
    assert_no_worse_than_eager(eager, eager, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse_than_eager(rounded(exact * 1.03), eager, exact)
    bad = eager.clone()
    bad[17] = torch.nan
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse_than_eager(bad, eager, exact)


def test_tolerance_of_infinities_is_nothing() -> None:
    exact = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    assert_no_worse_than_eager(exact.float(), exact.float(), exact)
    with pytest.raises(AssertionError):
        assert_no_worse_than_eager(torch.tensor([1.0, -1e30]), exact.float(), exact)


def test_exact_means_float64() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="float64"):
        assert_no_worse_than_eager(one, one, one)
