"""Examples of unequal length as one padded batch, and the labels that say what is to be learnt.

A causal model predicts at position t the token at t+1. `labels_BT` already holds that next token,
at the same position as the logits that predict it, so no caller shifts anything; every position
whose next token is not a summary token holds `IGNORE`. Padding may stand on either side: positions
count real tokens from 0, so that a left-padded row sees the same rotary angles as a right-padded
one.

Shapes: B records, T tokens of the longest record (rounded up to `multiple_of`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from makd_llm.data.schema import Example

IGNORE = -100
"""The label of a position from which nothing is learnt, as in torch's `cross_entropy`."""

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch. All tensors are int64 (masks of documents bool) and lie on the same device.

    `labels_BT[b, t]` is the token to be predicted *from* position t, or `IGNORE`.
    `document_mask_BT` is True at the documents' own tokens, False at templates'. `targets_N` holds
    the places in the flattened (B·T) batch whose label is not `IGNORE`: known here, on the host, so
    that picking them on a device makes nobody wait. `tokens_N` likewise the places of real tokens,
    for a model that leaves the padding out; None where there is none, or it is to stay (as it is
    on the left). `keys` names each record by its tokens.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    document_mask_BT: torch.Tensor
    targets_N: torch.Tensor
    record_ids: tuple[str, ...]
    padded_left: bool = False
    keys: tuple[bytes, ...] = ()
    tokens_N: torch.Tensor | None = None

    @property
    def token_mask_BT(self) -> torch.Tensor:
        """(B, T) bool: True where a real token stands, False on padding."""
        return self.attention_mask_BT.bool()

    @property
    def target_mask_BT(self) -> torch.Tensor:
        """(B, T) bool: True where the next token is one of the summary's."""
        return self.labels_BT != IGNORE

    @property
    def key_mask_BT(self) -> torch.Tensor | None:
        """(B, T) what attention has to be told: the mask, where padding stands on the left.

        Under causal attention no real token sees padding to its right; there it is None.
        """
        return self.attention_mask_BT if self.padded_left else None

    @property
    def n_tokens(self) -> torch.Tensor:
        """() int64, on the batch's device (reading it is up to the caller): real tokens."""
        return self.attention_mask_BT.sum()

    @property
    def n_targets(self) -> torch.Tensor:
        """() int64, on the batch's device: positions from which a summary token is predicted."""
        return self.target_mask_BT.sum()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; the copy does not wait where memory is pinned."""
        return Batch(
            self.input_ids_BT.to(device, non_blocking=True),
            self.attention_mask_BT.to(device, non_blocking=True),
            self.position_ids_BT.to(device, non_blocking=True),
            self.labels_BT.to(device, non_blocking=True),
            self.document_mask_BT.to(device, non_blocking=True),
            self.targets_N.to(device, non_blocking=True),
            self.record_ids,
            self.padded_left,
            self.keys,
            None if self.tokens_N is None else self.tokens_N.to(device, non_blocking=True),
        )

    def with_padding(self) -> "Batch":
        """The same for who looks into the model and expects (B, T, D) there."""
        return replace(self, tokens_N=None)


def collate(
    examples: Sequence[Example],
    pad_id: int,
    *,
    padding_side: PaddingSide = "right",
    multiple_of: int = 1,
) -> Batch:
    """Pad `examples` to one length and label each position with the summary token that follows it.

    `pad_id` may equal the end-of-sequence id: padding is known by its place, never by its id.
    `multiple_of` rounds T up, which keeps the number of different shapes small.
    """
    _check_padding(len(examples), padding_side, multiple_of)
    longest = max(len(example.input_ids) for example in examples)
    length = -(-longest // multiple_of) * multiple_of
    input_ids_BT = torch.full((len(examples), length), pad_id)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    labels_BT = torch.full_like(input_ids_BT, IGNORE)
    document_mask_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids)
        start = 0 if padding_side == "right" else length - len(ids)
        stop, summary = start + len(ids), start + example.prompt_length
        input_ids_BT[row, start:stop] = ids
        attention_mask_BT[row, start:stop] = 1
        labels_BT[row, summary - 1 : stop - 1] = ids[example.prompt_length :]
        begins, ends = example.document or (0, example.prompt_length)
        document_mask_BT[row, start + begins : start + ends] = True
    real = attention_mask_BT.flatten().nonzero().flatten()
    some_padding = len(real) < attention_mask_BT.numel()
    return Batch(
        input_ids_BT,
        attention_mask_BT,
        _positions(attention_mask_BT),
        labels_BT,
        document_mask_BT,
        (labels_BT.flatten() != IGNORE).nonzero().flatten(),
        tuple(example.record_id for example in examples),
        padded_left=padding_side == "left",
        keys=tuple(key_of(example) for example in examples),
        tokens_N=real if some_padding and padding_side == "right" else None,
    )


def examples_of(batch: Batch) -> list[Example]:
    """The examples that a batch was made of, without its padding. Every row has targets."""
    found = []
    for row, record_id in enumerate(batch.record_ids):
        real = batch.token_mask_BT[row].nonzero().flatten().tolist()
        ids = batch.input_ids_BT[row, real].tolist()
        first = int(batch.target_mask_BT[row].nonzero()[0]) + 1 - real[0]
        document = (batch.document_mask_BT[row].nonzero().flatten() - real[0]).tolist()
        place = (document[0], document[-1] + 1) if document else None
        found.append(Example(record_id, ids, first, place))
    return found


def key_of(example: Example) -> bytes:
    """16 bytes that name an example by its tokens and where its summary begins: the same for the
    same model input, whatever the record is called.
    """
    content = np.array([example.prompt_length, *example.input_ids], dtype="<i8")
    return hashlib.blake2b(content.tobytes(), digest_size=16).digest()


def batches_of(examples: Sequence[Example], size: int, pad_id: int) -> list[Batch]:
    """The examples in their order, `size` to a batch; the last may be smaller."""
    return [collate(examples[i : i + size], pad_id) for i in range(0, len(examples), size)]


def counts_of(batches: Sequence[Batch]) -> dict[str, float]:
    """What objectives are divided by, counted over some micro-batches: summary tokens ("targets"),
    real tokens and records.
    """
    return {
        "targets": float(sum(int(b.n_targets) for b in batches)),
        "tokens": float(sum(int(b.n_tokens) for b in batches)),
        "records": float(sum(len(b.record_ids) for b in batches)),
    }


def digest_of(batches: Sequence[Batch]) -> str:
    """A short name of the tokens of these batches, and of which are real and which are targets."""
    content = [
        [tensor.tolist() for tensor in (b.input_ids_BT, b.token_mask_BT, b.labels_BT)]
        for b in batches
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def prompt_batch(prompts: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Prompts as a left-padded batch without targets, for generation."""
    examples = [Example(f"prompt {i}", list(ids), len(ids)) for i, ids in enumerate(prompts)]
    return collate(examples, pad_id, padding_side="left")


def _positions(attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """Real tokens numbered from 0 in each row; padding gets a number in range that nobody uses."""
    return (attention_mask_BT.cumsum(-1) - 1).clamp(min=0)


def _check_padding(rows: int, padding_side: str, multiple_of: int) -> None:
    if rows == 0:
        raise ValueError("an empty batch has no length to pad to; pass at least one example")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; it is 'left' or 'right'")
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}; it is a positive number of tokens")


def pad_id_of(tokenizer: Any) -> int:
    """The id that fills up short rows; masks say where, so the end-of-text id serves as well."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
