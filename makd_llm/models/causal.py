"""A causal LM as training sees it: a backbone that makes hidden states, and a head that owns its
weight.

Full-vocabulary logits of two models are the largest tensors of distillation, so they are never made
whole: whatever needs them is a function handed to the head, which calls it with the hidden states
and its own weight. The head owns that weight (the very Parameter of the output embedding, tied or
not), so under ZeRO-3 it is gathered for the head's forward and for nothing else.
"""
# B batch, T tokens, V vocabulary, D width

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd_llm.data.batch import Batch
from makd_llm.models.capture import CAPTURING_SDPA
from makd_llm.models.families import Family
from makd_llm.models.modeling_lowrank import LowRankLinear
from makd_llm.models.projections import Projections
from makd_llm.models.tensor_train import OverParameterized, mean_distance
from makd_llm.models.unpadded import places_of, with_padding, without_padding
from makd_llm.shown import Shown

AtHead = Callable[[Tensor, Tensor], Any]
"""(hidden_BTD, weight_VD) -> anything."""


class Head(nn.Module):
    """Owner of the output weight. Calls `at_head(hidden_BTD, weight_VD)` while it is whole.

    Of a factored head `at_head` sees what `down` makes of the hidden states, and `up`: R in the
    place of D, and no product of the two.
    """

    def __init__(self, head: nn.Linear | LowRankLinear) -> None:
        super().__init__()
        factored = isinstance(head, LowRankLinear)
        self.weight = cast(nn.Parameter, head.up if factored else head.weight)
        self.down = cast(nn.Parameter, head.down) if factored else None

    def forward(self, hidden_BTD: Tensor, at_head: AtHead) -> Any:
        if self.down is not None:
            hidden_BTD = F.linear(hidden_BTD, self.down)
        return at_head(hidden_BTD, self.weight)


class CausalModel(nn.Module):
    """Backbone and head of a Hugging Face causal LM, plain or low-rank.

    `projections`, where they are set before DeepSpeed takes the module, are learned beside it and
    bring what a capture shows to a wider teacher's width. `compared`: by layer, the modules whose
    auxiliary tensors have targets. `without_padding`: its backbone runs on the real tokens alone,
    where its attention is the one that capture listens to.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.head = Head(cast(nn.Linear | LowRankLinear, model.get_output_embeddings()))
        self.without_padding = model.config._attn_implementation == CAPTURING_SDPA
        self.projections: Projections | None = None
        self.compared: dict[int, list[OverParameterized]] = {}

    def forward(
        self,
        batch: Batch,
        at_head: AtHead | None = None,
        generate: dict[str, Any] | None = None,
        shown: Shown | None = None,
    ) -> Any:
        """Last hidden states (B, T, D), after the final norm; with `at_head`, what that returns.

        With `generate` (arguments of transformers' `generate`): the generated ids instead, (B, T +
        new). A whole generation is one forward of this module, so that ZeRO-3 sees it begin and
        end.

        shown: what a capture around this forward fills; its tensors are projected before the head.
        """
        if generate is not None:
            return self.model.generate(  # type: ignore[operator]
                batch.input_ids_BT, attention_mask=batch.attention_mask_BT, **generate
            )
        backbone = self.model.get_submodule(self.family.backbone)
        places = places_of(batch) if self.without_padding else None
        if places is None:
            # Without a mask SDPA takes its fast causal path, and no (B, T, T) mask is built.
            hidden_BTD = backbone(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.key_mask_BT,
                position_ids=batch.position_ids_BT if batch.padded_left else None,
                use_cache=False,
            ).last_hidden_state
        else:
            hidden_1ND = backbone(
                input_ids=without_padding(batch.input_ids_BT, places),
                attention_mask=places,
                position_ids=without_padding(batch.position_ids_BT, places),
                use_cache=False,
            ).last_hidden_state
            hidden_BTD = with_padding(hidden_1ND, places)
        if self.projections is not None and shown is not None:
            # Here and not in the capture's hooks, which a checkpointed layer's recomputation lacks.
            self.projections.project(shown, hidden_BTD)
        if shown is not None:
            shown.auxiliary |= {n: mean_distance(found) for n, found in self.compared.items()}
        return hidden_BTD if at_head is None else self.head(hidden_BTD, at_head)
