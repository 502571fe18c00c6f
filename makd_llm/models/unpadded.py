"""Rows of unequal length without their padding.

A backbone is given the real tokens of a batch as one row of N, so that no product, norm or gate is
computed of padding, and no activation of it kept. Attention alone has to know which tokens belong
together: it sees one record at a time, never two.

transformers hands a mask of four dimensions on to every layer's attention as it is, through
checkpointing too. `places_of` uses that: its "mask" holds the tokens' places and has the padded
batch's shape.

Shapes: B records, T tokens of the longest, N real tokens of all; H heads, K key-value heads, D.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from makd_llm.data.batch import Batch
from makd_llm.shown import RECORDS_APART, padded_rows


def places_of(batch: Batch) -> Tensor | None:
    """(B, T, 1, N) int64: the place of each real token in the flattened (B T), the same for all B
    and T (a view, N numbers in memory). None where the batch is to be computed as it is.
    """
    if batch.tokens_N is None:
        return None
    return batch.tokens_N.expand(*batch.input_ids_BT.shape, 1, -1)


def as_places(attention_mask: Tensor | None) -> Tensor | None:
    """The mask, if it is one of `places_of`."""
    if attention_mask is None or attention_mask.dtype != torch.int64 or attention_mask.dim() != 4:
        return None
    return attention_mask


def without_padding(x_BT: Tensor, places: Tensor) -> Tensor:
    """(B, T, ...) -> (1, N, ...): the real tokens, record after record."""
    return x_BT.flatten(0, 1).index_select(0, places[0, 0, 0])[None]


def with_padding(x_1N: Tensor, places: Tensor) -> Tensor:
    """(1, N, ...) -> (B, T, ...), with zeros at the padding."""
    return padded_rows(x_1N, places[0, 0, 0], *places.shape[:2])


def heads_with_padding(x_1HND: Tensor, places: Tensor) -> Tensor:
    """(1, H, N, D) -> (B, H, T, D), with zeros at the padding."""
    return with_padding(x_1HND.transpose(1, 2), places).transpose(1, 2)


def attention_by_record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, places: Tensor, **kwargs: Any
) -> Tensor:
    """(1, N, H, D): transformers' SDPA attention of every record by itself.

    query: (1, H, N, D); key, value: (1, K, N, D). kwargs: as transformers gives them.

    Record after record on the devices of `RECORDS_APART`. On others in one call, on padded rows,
    whose lengths the host need not know.
    """
    if query.device.type in RECORDS_APART:
        length = places.shape[1]
        counts = torch.bincount(places[0, 0, 0] // length, minlength=places.shape[0]).tolist()
        parts = zip(*(x.split(counts, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([_causal(module, q, k, v, **kwargs) for q, k, v in parts], dim=1)
    padded = (heads_with_padding(x, places) for x in (query, key, value))
    return without_padding(_causal(module, *padded, **kwargs), places)


def _causal(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """(B, T, H, D). Padding to the right of a row is seen by none of its real tokens."""
    length, window = query.shape[2], kwargs.get("sliding_window")
    seen_TT = None
    if window is not None and length > window:
        seen_TT = torch.ones(length, length, dtype=torch.bool, device=query.device)
        seen_TT = seen_TT.tril().triu(1 - window)[None, None]
    return sdpa_attention_forward(module, query, key, value, seen_TT, **kwargs)[0]
