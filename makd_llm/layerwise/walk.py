"""A model's decoder layers run one after another over the same batches.

Whoever wants to know what every matrix of a model reads does not need the model: one decoder layer
at a time is read from the safetensors files, all batches go through it, and its outputs are the
next layer's inputs. What is held is one layer and the batches' hidden states (on the CPU), so a
teacher larger than the memory is no special case, and a student that is built on the way (whose
layers stand in for the teacher's) is none either.

How an architecture feeds its layers (rotary angles, masks of sliding windows, positions) is left to
its own backbone: the backbone runs for every batch and layer with slots in place of its layers, of
which one does the work and the others hand on what they get. An embedding lookup is what that
costs. Experts have modules of their own here, also a teacher's.
"""
# B batch, T tokens, D width

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.initialization import no_init_weights

from makd_kernels.linear_divergence import linear_cross_entropy_divergence
from makd_llm.checkpoint.folder import TensorReader, read_config
from makd_llm.data.batch import Batch
from makd_llm.errors import UserError
from makd_llm.models.capture import attention_of
from makd_llm.models.families import Matrix, family_of
from makd_llm.models.modeling_lowrank import (
    LowRankEmbedding,
    model_class_for,
    multiply_factors,
    unstack_experts,
)

Stream = list[Tensor]
"""Hidden states (B, T, D) of every batch between two layers, on the CPU."""

LayerCall = Callable[..., Any]
"""Called as the backbone calls a decoder layer: (hidden_BTD, *args, **kwargs)."""


class Walk:
    """The layers of a model folder, dense or low-rank, over one list of batches."""

    def __init__(
        self, folder: Path, batches: Sequence[Batch], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reads everything but the layers. Raises UserError for an unknown architecture, a damaged
        folder, or missing tensors.
        """
        self.config = read_config(folder)
        self.family = family_of(self.config)
        self.reader = TensorReader(folder)
        self.batches = batches
        self.dtype, self.device = dtype, device
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = model_class_for(self.config)._from_config(
                self.config, dtype=dtype, attn_implementation=attention_of(self.config)
            )
            unstack_experts(model)
        model.eval()
        layers: nn.ModuleList = model.get_submodule(self.family.layers)
        self._layers = list(layers)
        self._work: tuple[int, LayerCall] | None = None
        self._in_tuples = False
        for index, layer in enumerate(self._layers):
            layers[index] = _Slot(self, index, layer)
        self._backbone = model.get_submodule(self.family.backbone)
        self.fill(self._backbone, self.family.backbone)
        self._backbone.to(device)

    def __len__(self) -> int:
        return len(self._layers)

    def matrices(self, index: int) -> tuple[Matrix, ...]:
        """The matrices of a layer."""
        return self.family.matrices(self.config, index)

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Gives the module's parameters, which have no storage yet, the folder's values."""
        names = [name for name, _ in module.named_parameters()]
        missing = [name for name in names if f"{prefix}.{name}" not in self.reader]
        if missing:
            raise UserError(
                f"{self.reader.folder}: tensor {prefix}.{missing[0]} is missing; "
                "the files are not of this model's config.json"
            )
        values = {
            name: self.reader.get(f"{prefix}.{name}").to(self.device, self.dtype) for name in names
        }
        module.load_state_dict(values, strict=False, assign=True)
        module.requires_grad_(False)
        self.reader.release()

    def empty_layer(self, index: int) -> nn.Module:
        """A copy of a layer whose parameters have no storage yet."""
        return copy.deepcopy(self._layers[index])

    def layer(self, index: int) -> nn.Module:
        """A layer with the folder's values, on the device."""
        layer = self.empty_layer(index)
        self.fill(layer, f"{self.family.layers}.{index}")
        return layer.to(self.device)

    def embedded(self, embedding: nn.Module | None = None) -> Stream:
        """What the first layer reads; embedding: in the place of the model's own."""
        if embedding is not None:
            own = self._backbone.get_input_embeddings()
            self._backbone.set_input_embeddings(embedding)
            try:
                return self.embedded()
            finally:
                self._backbone.set_input_embeddings(own)

        def stop(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> None:
            raise Reached(hidden_BTD)

        with torch.no_grad():
            return [self._run(0, stop, batch).to("cpu") for batch in self.batches]

    def step(self, index: int, layer: LayerCall, batch: Batch, before_BTD: Tensor) -> Tensor:
        """The output (B, T, D) of one layer for one batch, on the device.

        layer: called in place of the backbone's layer `index`.
        """

        def work(_: Tensor, *args: Any, **kwargs: Any) -> None:
            output = layer(before_BTD.to(self.device), *args, **kwargs)
            self._in_tuples = isinstance(output, tuple)
            raise Reached(output[0] if self._in_tuples else output)

        return self._run(index, work, batch)

    def advanced(self, index: int, layer: LayerCall, stream: Stream) -> Stream:
        """The outputs of one layer for every batch, without gradients, back on the CPU."""
        with torch.no_grad():
            return [
                self.step(index, layer, batch, before).to("cpu")
                for batch, before in zip(self.batches, stream, strict=True)
            ]

    def finished(self, stream: Iterable[Tensor]) -> Iterator[Tensor]:
        """The last hidden states (B, T, D), after the final norm, on the device."""
        for batch, last in zip(self.batches, stream, strict=True):

            def work(_: Tensor, *args: Any, last: Tensor = last, **kwargs: Any) -> Any:
                hidden_BTD = last.to(self.device)
                return (hidden_BTD,) if self._in_tuples else hidden_BTD

            yield self._run(len(self) - 1, work, batch)

    def factored_embedding(self, factors: Mapping[str, Tensor]) -> nn.Module:
        """A factored one in the shape of the model's embedding; factors: `up` and `down`."""
        dense = cast(nn.Embedding, self._backbone.get_input_embeddings())
        factored = LowRankEmbedding.like(dense, len(factors["down"]))
        factored.load_state_dict({leaf: factors[leaf] for leaf in ("up", "down")})
        return factored.requires_grad_(False).to(self.device, self.dtype)

    def output_weight(self) -> Tensor:
        """The head's weight (V, D), on the device."""
        for name in (self.family.head, self.family.embedding):
            if f"{name}.weight" in self.reader:
                return self.reader.get(f"{name}.weight").to(self.device, self.dtype)
            if f"{name}.up" in self.reader:
                up_VR, down_RD = (
                    self.reader.get(f"{name}.{leaf}").to(self.device) for leaf in ("up", "down")
                )
                return multiply_factors(up_VR, down_RD).to(self.dtype)
        raise UserError(f"{self.reader.folder}: neither the head's weight nor the embedding's")

    def nats(self, hidden_BTD: Tensor, batch: Batch, weight_VD: Tensor) -> Tensor:
        """(N,) fp32: the cross-entropy of each target of a batch, for its last hidden states."""
        targets_N = batch.targets_N.to(self.device)
        labels_N = batch.labels_BT.flatten().to(self.device)[targets_N]
        hidden_ND = hidden_BTD.flatten(0, 1)[targets_N]
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is None:
            return linear_cross_entropy_divergence(hidden_ND, weight_VD, labels_N)[0]

        def capped(hidden_nD: Tensor, labels_n: Tensor) -> Tensor:
            logits_nV = torch.tanh((hidden_nD @ weight_VD.T).float() / cap) * cap
            return F.cross_entropy(logits_nV, labels_n, reduction="none")

        chunks = zip(hidden_ND.split(256), labels_N.split(256), strict=True)
        return torch.cat([checkpoint(capped, *chunk, use_reentrant=False) for chunk in chunks])

    def _run(self, index: int, work: LayerCall, batch: Batch) -> Tensor:
        self._work = (index, work)
        try:
            output = self._backbone(
                input_ids=batch.input_ids_BT.to(self.device),
                attention_mask=None
                if batch.key_mask_BT is None
                else batch.key_mask_BT.to(self.device),
                position_ids=batch.position_ids_BT.to(self.device) if batch.padded_left else None,
                use_cache=False,
            )
            last: Tensor = output.last_hidden_state
            return last
        except Reached as reached:
            return reached.output_BTD
        finally:
            self._work = None


class Reached(Exception):
    """Leaves a backbone whose part is done; `step` returns what it carries. A hook inside a layer
    may raise it too, where the rest of the layer is not wanted.
    """

    def __init__(self, output_BTD: Tensor) -> None:
        self.output_BTD = output_BTD


class _Slot(nn.Module):
    """Stands where a decoder layer stood; works when its turn is, else hands on its input."""

    def __init__(self, walk: Walk, index: int, layer: nn.Module) -> None:
        super().__init__()
        self._walk, self._index = walk, index
        self._stands_for = (layer,)  # in a tuple: not a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what backbones read off their layers, as attention_type
            return getattr(super().__getattribute__("_stands_for")[0], name)

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self._walk._work is not None
        index, work = self._walk._work
        if index == self._index:
            return work(hidden_BTD, *args, **kwargs)
        return (hidden_BTD,) if self._walk._in_tuples else hidden_BTD
