"""A whole copy of a student that is being trained, to write with: its weights are gathered once,
and generation is then an ordinary one of this rank alone, with a KV cache and no collectives.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.models.causal import CausalModel
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.models.packing import pack
from makd_llm.train.engine import whole_tensors


class Consolidated:
    """Makes such copies of one model, round after round. Memory: one student whole, on every rank,
    inside the `with`.
    """

    def __init__(self, model: CausalModel, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype

    @contextmanager
    def writer(self, rows: int) -> Iterator[Callable[..., Tensor]]:
        """`generate` of the copy as the model is now, packed for batches of so many rows.
        Collective on entering, and only there.
        """
        copy = self._copied()
        pack(copy, rows=rows, call=0.0)  # measured, it would not be the same on every rank

        @torch.no_grad()
        def generate(batch: Batch, **arguments: Any) -> Tensor:
            ids_BT: Tensor = copy.generate(  # type: ignore[operator]
                batch.input_ids_BT, attention_mask=batch.attention_mask_BT, **arguments
            )
            return ids_BT

        yield generate

    def _copied(self) -> PreTrainedModel:
        trained = self._model.model
        config = deepcopy(trained.config)  # which attention it runs with is written into it
        with no_init_weights():
            copy = model_class_for(config)._from_config(
                config, dtype=self._dtype, attn_implementation="sdpa"
            )
        copy.tie_weights()
        own: dict[str, nn.Parameter] = dict(copy.named_parameters())
        for name, tensor in whole_tensors(self._model):
            own.pop(name).data.copy_(tensor)
        if own:
            raise RuntimeError(f"{next(iter(own))}: the trained model has no such tensor")
        copy.generation_config = trained.generation_config
        copy.to(distributed.device())
        evaluated: PreTrainedModel = copy.eval()
        return evaluated
