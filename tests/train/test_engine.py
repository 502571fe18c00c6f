"""What the student's engine does around a forward."""

from pathlib import Path

import torch

from makd_kernels import lean
from makd_llm.testing import run_on_ranks
from makd_llm.testing.training import factorized, parts, sizes


@run_on_ranks(2)
def test_the_students_forward_keeps_less(tiny: Path) -> None:
    made = parts(tiny, factorized(tiny), sizes(2, 2))
    batch = made.loader.next_step()[0]
    noted: list[int] = []

    def at_head(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        assert lean._notes is not None
        noted.append(len(lean._notes))
        return hidden_BTD.sum()

    loss = made.trained(batch, at_head)
    assert noted[0] > 0
    assert lean._notes is None
    made.trained.backward(loss)
    made.close()
