"""Norms and feed-forward parts of transformers' models that train with less memory, and faster on a
CPU: `makd_kernels.lean` in their forward, everything else as it was.
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import SiLUActivation

from makd_kernels.lean import rms_norm, swiglu

NORMS = frozenset(
    f"{architecture}RMSNorm" for architecture in ("Llama", "Mistral", "Phi3", "Qwen2", "Qwen3")
)
"""Whose forward is `rms_norm`. Gemma's weights by 1 + w, OLMo 2's rounds after the weighting."""


def make_lean(model: nn.Module) -> None:
    """Gives every norm of `NORMS` and every SwiGLU of three modules the forward of here."""
    for module in model.modules():
        if type(module).__name__ in NORMS:
            module.__class__ = _with_forward(type(module), _norm)
        elif _is_swiglu(module):
            module.__class__ = _with_forward(type(module), _feed_forward)


def _is_swiglu(module: Any) -> bool:
    parts = {name for name, _ in module.named_children()}
    return (
        type(module).__name__.endswith("MLP")
        and parts == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and isinstance(module.act_fn, nn.SiLU | SiLUActivation)
    )


_MADE: dict[tuple[Any, Any], Any] = {}


def _with_forward(kind: Any, forward: Any) -> Any:
    if (kind, forward) not in _MADE:
        own = {"forward": forward, "__module__": kind.__module__}
        _MADE[kind, forward] = type(kind.__name__, (kind,), own)
    return _MADE[kind, forward]


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != module.weight.dtype:  # under autocast, of queries and keys
        out: Tensor = super(type(module), module).forward(hidden_states)
        return out
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return out
