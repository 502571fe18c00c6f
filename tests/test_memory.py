"""The peak is of the stretch of work that was asked about, not of the process."""

import pytest
import torch

from makd_llm.memory import Peak


def fill(megabytes: int) -> None:
    torch.ones(megabytes * 2**20 // 4)


def test_what_was_freed_again_counts_and_what_was_before_does_not() -> None:
    fill(512)
    peak = Peak(torch.device("cpu"))
    before, at_first = peak.before, peak.megabytes()
    if before is None or at_first is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert at_first - before < 64
    fill(256)
    most = peak.megabytes()
    assert most is not None
    assert 240 < most - before < 320
