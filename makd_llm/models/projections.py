"""Learned projections of a narrower student's captured tensors to its teacher's width.

They belong to the trained module, so DeepSpeed's optimizer trains them, ZeRO shards them and
checkpoints keep them; they are no part of the Hugging Face model, so an export has none of them.
"""
# B batch, T tokens, D width, M, N a student's and its teacher's outputs

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from makd_llm import distributed
from makd_llm.shown import Shown

Point = tuple[int, str]
"""A layer, and the role of a matrix in it or "hidden" for the layer's output."""


@dataclass(frozen=True)
class Projection:
    """One projection at its start: ones at (rows, columns), zeros elsewhere.

    width, teacher_width: features of the student and of the teacher. rows: the teacher's features;
    columns: the student's that are put there.
    """

    width: int
    teacher_width: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]


class Projections(nn.Module):
    """One linear map without bias, (teacher's width, student's width), for each point.

    Never called itself: `project` calls the maps, each of which ZeRO-3 gathers for its own forward.
    """

    def __init__(
        self,
        at: Mapping[Point, Projection],
        deepspeed_config: dict[str, Any],
        dtype: torch.dtype,
    ) -> None:
        """Collective under stage 3 of deepspeed_config, which shards each map as it is made."""
        super().__init__()
        sharded = deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3
        self.points = list(at)
        self.maps = nn.ModuleList()
        for projection in at.values():
            with ExitStack() as stack:
                stack.enter_context(no_init_weights())
                if sharded:
                    import deepspeed

                    stack.enter_context(
                        deepspeed.zero.Init(config_dict_or_path=deepspeed_config, dtype=dtype)
                    )
                linear = nn.Linear(
                    projection.width, projection.teacher_width, bias=False, dtype=dtype
                )
            if not sharded:
                linear.to(distributed.device())
            _fill(linear.weight, projection, sharded=sharded)
            self.maps.append(linear)

    def project(self, shown: Shown, hidden_BTD: Tensor) -> None:
        """Puts the projected tensors in the place of the captured ones, (B, T, M) to (B, T, N).

        A map whose point was not captured, because its level is switched off, gets a zero made of
        hidden_BTD, and its result is in `shown.idle`: DeepSpeed has to see the backward of every
        module, and would otherwise apply the gradient of an earlier step again.
        """
        for (layer, role), linear in zip(self.points, self.maps, strict=True):
            key: Any = layer if role == "hidden" else (layer, role)
            kinds = [shown.hidden] if role == "hidden" else [shown.matrix, shown.fed]
            captured = [shown_there for shown_there in kinds if key in shown_there]
            for shown_there in captured:
                shown_there[key] = linear(shown_there[key])
            if captured:
                continue
            width = linear.in_features
            assert isinstance(width, int)
            silence = linear((hidden_BTD[0, 0, :1] * 0.0).expand(width)).sum() * 0.0
            shown.idle = silence if shown.idle is None else shown.idle + silence


def _fill(weight_NM: Tensor, projection: Projection, *, sharded: bool) -> None:
    def write() -> None:
        weight_NM.data.zero_()
        weight_NM.data[list(projection.rows), list(projection.columns)] = 1.0

    if not sharded:
        write()
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight_NM], modifier_rank=0):
        if distributed.is_main():
            write()
