"""Fewer key-value heads: similar ones are merged, and their queries share what comes of it.

With grouped queries (GQA) every key-value head serves a group of query heads. In each layer, sets
of groups with similar concatenated W_q and W_k are found (head sharing, docs/students.md; the
greedy search is ours), and each set gets one key-value head: the mean of its keys' and of its
values' rows. Query heads are put in the order in which the merged heads want them, and the columns
of `o` likewise, so that no query head is lost.
"""
# H query heads, G key-value heads, M outputs, K inputs

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from makd_llm.checkpoint.export import expected_shapes
from makd_llm.checkpoint.folder import TensorReader
from makd_llm.models.families import FAMILIES

HEADS_FAMILIES = tuple(
    n for n, f in FAMILIES.items() if f.dense == FAMILIES["llama"].dense and not f.experts
)
"""The model types whose q, k and v are modules of their own, named as Llama's."""

Merged = tuple[tuple[int, ...], ...]
"""For each merged key-value head, those that go into it, ascending; by the first of them."""


def similarity(q_MK: Tensor, k_NK: Tensor, groups: int) -> Tensor:
    """(G, G) fp32: the cosine of the angle between groups' concatenated W_q and W_k.

    q_MK, k_NK: all heads' rows, head by head, of which every group has as many.
    """
    joined_GX = torch.cat([w.float().reshape(groups, -1) for w in (q_MK, k_NK)], dim=1)
    directions_GX = F.normalize(joined_GX, dim=1)
    return directions_GX @ directions_GX.T


def similar_groups(similarity_GG: Tensor, keep: int) -> Merged:
    """Sets of equal size: the most similar pair first, then whatever is most similar to it, until
    the set is full; then the same with what is left.
    """
    n = len(similarity_GG)
    size = n // keep
    left, found = list(range(n)), []
    while left:
        pairs = [(i, j) for i in left for j in left if i < j]
        group = [*max(pairs, key=lambda p: float(similarity_GG[p]))] if size > 1 else [left[0]]
        while len(group) < size:
            others = [i for i in left if i not in group]
            group.append(max(others, key=lambda i: float(similarity_GG[i, group].sum())))
        left = [i for i in left if i not in group]
        found.append(tuple(sorted(group)))
    return tuple(sorted(found))


def query_order(merged: Merged, queries: int) -> tuple[int, ...]:
    """The old number of each query head in the new order. queries: of one old key-value head."""
    return tuple(
        head for group in merged for g in group for head in range(g * queries, (g + 1) * queries)
    )


def permuted_heads(tensor: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """A tensor along whose dimension the heads lie one after another, in another order."""
    by_head = tensor.unflatten(dim, (len(order), -1))
    ordered: Tensor = by_head.index_select(dim, torch.tensor(order))
    return ordered.flatten(dim, dim + 1)


def averaged_heads(tensor: Tensor, merged: Merged) -> Tensor:
    """A tensor along whose first dimension the key-value heads lie, merged; equal ones exactly."""
    groups = sum(len(group) for group in merged)
    by_head = tensor.unflatten(0, (groups, -1))
    # In float64 the sum of a few equal numbers of a shorter type is exact.
    means = [by_head[list(group)].double().mean(0).to(tensor.dtype) for group in merged]
    return torch.cat(means)


def merged_heads(reader: TensorReader, config: PreTrainedConfig, keep: int) -> tuple[Merged, ...]:
    """For each layer, which key-value heads are merged."""
    found = []
    for layer in range(config.num_hidden_layers):
        q_MK, k_NK = (
            reader.get(f"model.layers.{layer}.self_attn.{name}_proj.weight") for name in "qk"
        )
        found.append(similar_groups(similarity(q_MK, k_NK, config.num_key_value_heads), keep))
    return tuple(found)


def heads_config(config: PreTrainedConfig, keep: int) -> PreTrainedConfig:
    """The config of the model with `keep` key-value heads."""
    shared = copy.deepcopy(config)
    shared.num_key_value_heads = keep
    return shared


def heads_tensors(
    reader: TensorReader,
    config: PreTrainedConfig,
    shared: PreTrainedConfig,
    merged: Sequence[Merged],
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of that model. config: of the model that is read; shared: its own."""
    queries = config.num_attention_heads // config.num_key_value_heads
    head_dim = head_dim_of(config)
    for name in expected_shapes(shared):
        tensor = reader.get(name)
        own = name.removeprefix("model.layers.")
        index, _, inner = own.partition(".")
        if own != name and inner.startswith("self_attn."):
            groups = merged[int(index)]
            order = query_order(groups, queries)
            inner = inner.removeprefix("self_attn.")
            tensor = _of_attention(inner, tensor, head_dim, groups, order)
        yield name, tensor


def _of_attention(
    name: str, tensor: Tensor, head_dim: int, groups: Merged, order: Sequence[int]
) -> Tensor:
    """A tensor of an attention module, by its name in it. Norms of queries and keys are OLMo 2's,
    over all heads, or of one head's dimension, which is the same for all.
    """
    module = name.partition(".")[0]
    if module == "o_proj":
        return permuted_heads(tensor, order, 1) if name == "o_proj.weight" else tensor
    if module in ("q_norm", "k_norm") and len(tensor) == head_dim:
        return tensor
    if module in ("q_proj", "q_norm"):
        return permuted_heads(tensor, order, 0)
    if module in ("k_proj", "v_proj", "k_norm"):
        return averaged_heads(tensor, groups)
    raise ValueError(f"self_attn.{name}: it is not known how its heads lie")


def head_dim_of(config: PreTrainedConfig) -> int:
    """The dimension of a head."""
    said: int | None = getattr(config, "head_dim", None)
    return said or config.hidden_size // config.num_attention_heads
