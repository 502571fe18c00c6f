"""Checkpoints are plain values, whichever Python wrote them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from makd_llm.checkpoint.plain import plain_values_only
from makd_llm.errors import UserError


class Reduced:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def read(path: Path) -> Any:
    with plain_values_only(path):
        return torch.load(path, weights_only=False)  # as DeepSpeed calls it


@pytest.mark.parametrize("call", [(getattr, ZeroStageEnum, "weights"), (ZeroStageEnum, 3)])
def test_a_zero_stage_is_read_as_any_python_writes_it(
    call: tuple[Any, ...], tmp_path: Path
) -> None:
    """3.11.0 to 3.11.3 write getattr(class, name), the others class(value)."""
    path = tmp_path / "file.pt"
    torch.save({"zero_stage": Reduced(*call), "tensor": torch.ones(2)}, path)
    assert read(path)["zero_stage"] is ZeroStageEnum.weights


@pytest.mark.parametrize(
    "call",
    [
        (getattr, LossScaler, "__init__"),
        (getattr, ZeroStageEnum, "__class__"),
        (getattr, ZeroStageEnum, "nothing"),
        (print, "run"),
    ],
    ids=["class", "attribute", "no member", "function"],
)
def test_nothing_else_is(
    call: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.pt"
    torch.save(Reduced(*call), path)
    capsys.readouterr()
    with pytest.raises(UserError, match="no tensor and no plain value"):
        read(path)
    assert capsys.readouterr().out == ""
