"""Distillation losses that never hold what they reduce: no T x T attention map, no N x V logits.

Two families, each a folder with the op (`__init__.py`), plain torch to read and to check against
(`reference.py`), and an implementation with bounded memory for any device (`blockwise.py`). Only
torch is imported. `impl="auto"` picks an implementation; `choose_impl` of either folder says which
(`from makd_kernels.attention_kl import choose_impl`).
"""

from makd_kernels.attention_kl import attention_kl, attention_kl_loss
from makd_kernels.linear_divergence import (
    linear_cross_entropy_divergence,
    linear_cross_entropy_divergence_loss,
    linear_divergence,
)
from makd_kernels.lowrank_linear import lowrank_linear, lowrank_linear_packed
from makd_kernels.lowrank_swiglu import lowrank_swiglu

__all__ = [
    "attention_kl",
    "attention_kl_loss",
    "linear_cross_entropy_divergence",
    "linear_cross_entropy_divergence_loss",
    "linear_divergence",
    "lowrank_linear",
    "lowrank_linear_packed",
    "lowrank_swiglu",
]
