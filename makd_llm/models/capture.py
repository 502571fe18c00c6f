"""Scoped capture: inside `with capture(...)` a model shows what an objective asked for, and nothing
else.

Queries and keys are taken after rotary embedding by an attention function registered with
transformers' AttentionInterface. It calls SDPA as before, so no architecture is forced to eager
attention and no T x T map exists. Matrix inputs, matrix outputs and hidden states come from hooks
that live only inside the `with`; they are registered after DeepSpeed's own, so what they see is
what DeepSpeed handed on.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from makd_llm.models.families import Family, Matrix, part_of
from makd_llm.models.unpadded import as_places, attention_by_record
from makd_llm.shown import LAYER, AttentionShown, Needs, Shown

CAPTURING_SDPA = "makd_sdpa"
_RECORDER = "_makd_attention_recorder"


def _capturing_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, showing queries and keys to whoever listens to this module."""
    recorder: Callable[[Tensor, Tensor, dict[str, Any]], None] | None = getattr(
        module, _RECORDER, None
    )
    if recorder is not None:
        recorder(query, key, kwargs)
    places = as_places(attention_mask)
    if places is not None:
        return attention_by_record(module, query, key, value, places, **kwargs), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(CAPTURING_SDPA, _capturing_sdpa)
AttentionMaskInterface.register(CAPTURING_SDPA, sdpa_mask)


def attention_of(config: PreTrainedConfig) -> str:
    """The attention implementation that a model of this config runs with.

    SDPA that can be listened to; plain SDPA for Falcon, which does not take its attention from
    transformers' interface; eager where attention logits are capped, which SDPA would leave out.
    """
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"
    return "sdpa" if config.model_type.removeprefix("makd_") == "falcon" else CAPTURING_SDPA


@contextmanager
def capture(
    model: nn.Module,
    family: Family,
    needs: Needs,
    replay: Mapping[tuple[int, str], Tensor] | None = None,
) -> Iterator[Shown]:
    """Collects `needs` from the forward pass that runs inside the `with`.

    model: a Hugging Face causal LM of that family, plain or low-rank. replay: the teacher's inputs,
    of matrices by (layer, role) and of layers by (layer, "layer"). `Shown.fed` holds a matrix's
    output for such an input, and `Shown.again` a layer's; both are made by a second call of the
    module (so that ZeRO-3 gathers its weights), not for the model's own stream.
    """
    replay = replay or {}
    shown = Shown()
    layers: nn.ModuleList = model.get_submodule(family.layers)  # type: ignore[assignment]
    part = _Part(model.config)  # type: ignore[arg-type]
    with ExitStack() as stack:
        backbone = model.get_submodule(family.backbone)
        stack.callback(backbone.register_forward_pre_hook(part.note_rows, with_kwargs=True).remove)
        for index in sorted(needs.hidden):
            hook = _hidden_hook(shown, part, index)
            stack.callback(layers[index].register_forward_hook(hook).remove)
        for index in sorted(needs.layer_input):
            before = _layer_input_hook(shown, part, index)
            handle = layers[index].register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        for index in sorted(needs.attention):
            _listen_to_attention(layers[index], shown, part, index, stack)
        for index, matrices in _by_module(family, model.config, needs):  # type: ignore[arg-type]
            module = layers[index].get_submodule(matrices[0].module)
            hook = _matrix_hook(shown, part, index, matrices, needs)
            stack.callback(module.register_forward_hook(hook).remove)
            fed = [m for m in matrices if (index, m.key) in needs.fed]
            if fed:
                hook = _fed_hook(shown, part, index, fed, replay)
                stack.callback(module.register_forward_hook(hook).remove)
        for index in sorted({index for index, _ in needs.again}):
            sources = [source for i, source in sorted(needs.again) if i == index]
            again = _again_hook(shown, part, index, sources, replay)
            handle = layers[index].register_forward_hook(again, with_kwargs=True)
            stack.callback(handle.remove)
        yield shown


def _hidden_hook(shown: Shown, part: "_Part", index: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not part.again:
            shown.hidden[index] = _hidden_of(output)

    return hook


def _hidden_of(output: Any) -> Tensor:
    hidden_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden_BTD


def _layer_input_hook(shown: Shown, part: "_Part", index: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not part.again:
            shown.layer_input[index] = args[0] if args else kwargs["hidden_states"]

    return hook


def _again_hook(
    shown: Shown,
    part: "_Part",
    index: int,
    sources: list[str],
    replay: Mapping[tuple[int, str], Tensor],
) -> Callable[..., None]:
    """Runs a layer again on other inputs, while nothing inside it is captured."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if part.again:  # the calls below come back here
            return
        own = args[0] if args else kwargs["hidden_states"]
        # A cache holds what the model's own pass put there.
        others = [None if isinstance(value, Cache) else value for value in args[1:]]
        rest = {name: None if isinstance(v, Cache) else v for name, v in kwargs.items()}
        rest.pop("hidden_states", None)
        part.again = True
        try:
            for source in sources:
                x_BTD = own.detach() if source == "student" else replay[index, LAYER]
                shown.again[index, source] = _hidden_of(module(x_BTD, *others, **rest))
        finally:
            part.again = False

    return hook


def _listen_to_attention(
    layer: nn.Module, shown: Shown, part: "_Part", index: int, stack: ExitStack
) -> None:
    def record(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
        if part.again:
            return
        window = kwargs.get("sliding_window")
        shown.attention[index] = AttentionShown(query, key, kwargs.get("scaling"), window)

    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, _RECORDER, record)
            stack.callback(delattr, module, _RECORDER)


def _by_module(
    family: Family, config: PreTrainedConfig, needs: Needs
) -> list[tuple[int, list[Matrix]]]:
    """The asked matrices, those that share a fused module together."""
    groups: dict[tuple[int, str], list[Matrix]] = {}
    for index, key in sorted(needs.matrix | needs.fed | needs.plain):
        for matrix in family.matrices(config, index):
            if matrix.key == key:
                groups.setdefault((index, matrix.module), []).append(matrix)
    return [(index, matrices) for (index, _), matrices in groups.items()]


class _Part:
    """A matrix's share of what its module takes or gives, as (B, T, ...) or, without padding, (1,
    N, ...); and whether this is the model's own pass.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._rows: tuple[int, ...] = ()
        self.again = False
        """Whether something runs again, in which nothing is to be captured."""

    def note_rows(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """(B, T) of the forward that begins, or (1, N): OPT's feed-forward works on (B T, ...)."""
        self._rows = tuple((args[0] if args else kwargs["input_ids"]).shape[:2])

    def of_output(self, matrix: Matrix, output: Tensor) -> Tensor:
        return self.of_input(part_of(self._config, matrix, output))

    def of_input(self, x: Tensor) -> Tensor:
        return x.view(*self._rows, -1) if x.dim() == 2 else x


def _matrix_hook(
    shown: Shown, part: _Part, index: int, matrices: list[Matrix], needs: Needs
) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if part.again:
            return
        for matrix in matrices:
            key = index, matrix.key
            if key in needs.matrix:
                shown.matrix[key] = part.of_output(matrix, output)
                if needs.matrix_input:
                    shown.matrix_input[key] = part.of_input(args[0])
            if key in needs.plain:
                shown.plain[key] = part.of_output(matrix, output)

    return hook


def _fed_hook(
    shown: Shown,
    part: _Part,
    index: int,
    matrices: list[Matrix],
    replay: Mapping[tuple[int, str], Tensor],
) -> Callable[..., None]:
    """Runs a module again on the teacher's inputs; those that share it are fed the same."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if part.again:  # the call below comes back here
            return
        part.again = True
        try:
            outputs = module(replay[index, matrices[0].key])
        finally:
            part.again = False
        for matrix in matrices:
            shown.fed[index, matrix.key] = part.of_output(matrix, outputs)

    return hook
