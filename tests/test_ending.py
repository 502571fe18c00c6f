"""What one rank fails of ends all of them with the same words."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from makd_llm import distributed
from makd_llm.ending import WORD, is_out_of_memory, one_ending
from makd_llm.errors import Disconnected, OutOfMemory, RankFailed, RunEnded, UserError
from makd_llm.testing import launch_ranks

SECRET = "s3cret-v4lue"


def one_fails(folder: Path, kind: str) -> tuple[str, str, int]:
    """What a rank ends with where rank 1 fails alone and rank 0 waits for it."""
    try:
        with one_ending(folder):
            if distributed.rank() == 0:
                distributed.barrier()
            elif kind == "memory":
                torch.empty(2**55, dtype=torch.uint8)
            elif kind == "defect":
                raise ValueError("a defect\nwith a second line")
            elif kind == "wrong":
                raise UserError("the seed is wrong; set another")
            elif kind == "secret":
                raise ValueError(f"http://me:{SECRET}@proxy:1".ljust(285) + f" token={SECRET}")
            else:
                raise ConnectionError("as if it had been killed")
    except Exception as error:  # noqa: BLE001 - it is what is looked at
        if kind == "killed" and distributed.rank() == 1:
            (folder / WORD).unlink()
        return type(error).__name__, str(error), getattr(error, "exit_code", 1)
    return "nothing", "", 0


@pytest.mark.parametrize(
    ("kind", "own", "words", "code"),
    [
        ("memory", "OutOfMemory", "rank 1 ran out of memory", 71),
        (
            "defect",
            "ValueError",
            "rank 1 failed, its traceback says where: ValueError: a defect",
            1,
        ),
        ("wrong", "UserError", "the seed is wrong; set another", 2),
    ],
)
def test_the_others_end_with_the_words_of_the_one_that_failed(
    tmp_path: Path, kind: str, own: str, words: str, code: int
) -> None:
    waiting, failed = launch_ranks(2, one_fails, tmp_path, kind)
    assert failed[0] == own
    assert waiting[0] == "RankFailed" and words in waiting[1] and waiting[2] == code
    assert "\n" not in waiting[1] and "second line" not in waiting[1]


def test_no_secret_is_left_in_the_run_folder(tmp_path: Path) -> None:
    """Nor half of one, where the line is cut."""
    waiting, _ = launch_ranks(2, one_fails, tmp_path, "secret")
    written = (tmp_path / WORD).read_text()
    assert "http://***@proxy:1" in written and SECRET[:3] not in written + waiting[1]


def test_without_a_word_the_other_was_killed(tmp_path: Path) -> None:
    waiting, _ = launch_ranks(2, one_fails, tmp_path, "killed")
    assert waiting[0] == "Disconnected" and waiting[2] == 74
    assert "the same command goes on" in waiting[1]


def test_alone_an_error_stays_what_it_is_but_for_memory(tmp_path: Path) -> None:
    error = ValueError("a defect")
    with pytest.raises(ValueError) as caught, one_ending(tmp_path):
        raise error
    assert caught.value is error
    with pytest.raises(OutOfMemory, match="more ranks or more sharding"), one_ending(tmp_path):
        torch.empty(2**55, dtype=torch.uint8)
    assert not os.listdir(tmp_path), "words are for others"


def test_a_word_of_an_earlier_run_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / WORD).write_text(json.dumps({"says": "old", "exit_code": 2}))
    with one_ending(tmp_path):
        assert not (tmp_path / WORD).exists()


def test_kinds_of_failures_are_told_apart() -> None:
    memory = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 960 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError("Cannot allocate memory (os error 12)"),  # as libraries in Rust say it
    ]
    assert all(map(is_out_of_memory, memory))
    others = [
        ValueError("out of memory"),
        OSError(),
        OSError(errno.ENOENT, "No such file or directory", "out of memory.txt"),
        RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"),
    ]
    assert not any(map(is_out_of_memory, others))
    lost = ["[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"]
    assert all(distributed.is_of_the_network(RuntimeError(text)) for text in lost)
    assert not distributed.is_of_the_network(RuntimeError("shapes differ"))


def test_endings_that_others_do_not_know_of_are_marked() -> None:
    alone = (OutOfMemory("x"), Disconnected("x"), RankFailed("x", 71))
    assert all(e.alone for e in alone) and [e.exit_code for e in alone] == [71, 74, 71]
    assert not RunEnded("x").alone and not UserError("x").alone
