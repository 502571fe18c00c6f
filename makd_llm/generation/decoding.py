"""How prompts are continued: greedily, by beams, or by draws that can be repeated.

transformers draws a batch's tokens from one generator, so that a text depends on what else is in
the batch and on everything that was drawn before. Here each text has random numbers of its own,
known beforehand from the seed, the record's place in its split and the copy's number; a token is
drawn by looking its number up in the distribution (inverse transform sampling; that it is done per
row is ours). So a text depends neither on ranks nor on interruptions, and on the batch only by the
rounding that padding brings along.
"""
# B texts, T prompt tokens, V vocabulary, N new tokens

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from makd_llm import distributed
from makd_llm.data.batch import Batch, prompt_batch

Method = Literal["greedy", "beam", "sample"]

# A model's own generation settings may hold these; then it would not be the plain method.
PLAIN: dict[str, Any] = {
    "do_sample": False,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "min_length": 0,
    "min_new_tokens": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
}


class Generates(Protocol):
    """What writes: an engine's `generate`."""

    def __call__(self, batch: Batch, **arguments: object) -> Tensor: ...


@dataclass(frozen=True)
class Decoding:
    """A method and its settings; those of the other methods have no say.

    Raises ValueError where the method cannot write so many texts of one document.
    """

    method: Method = "greedy"
    max_new_tokens: int = 96
    beams: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    per_document: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method == "greedy" and self.per_document > 1:
            raise ValueError("greedy decoding has one text for a document; sample, or use beams")
        if self.method == "beam" and self.per_document > self.beams:
            raise ValueError(f"{self.beams} beams have no {self.per_document} texts for a document")

    @property
    def copies(self) -> int:
        """How often a prompt stands in a batch: beams give all their texts from one."""
        return self.per_document if self.method == "sample" else 1

    @property
    def says(self) -> dict[str, Any]:
        """What the texts depend on, in JSON values."""
        own = {
            "greedy": (),
            "beam": ("beams",),
            "sample": ("temperature", "top_p", "top_k", "seed"),
        }[self.method]
        names = ("method", *own, "max_new_tokens", "per_document")
        return {name: getattr(self, name) for name in names}

    def draws_of(self, record: int, copy: int) -> np.ndarray:
        """(N,) float64 in [0, 1): one number for each token of a record's copy."""
        return np.random.default_rng([self.seed, record, copy]).random(self.max_new_tokens)


def continuations(
    generate: Generates,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    draws_BN: np.ndarray | None = None,
) -> list[list[list[int]]]:
    """The new ids of one batch: for each prompt its texts, the best first; of beams as many as are
    wanted, else one. An end-of-text id, where one was written, is the last.

    draws_BN: for sampling, a row for each prompt, as `draws_of` gives it. Under ZeRO-3 every rank
    has to call this together. Raises ValueError where draws are missing or given in vain.
    """
    if (draws_BN is not None) != (decoding.method == "sample"):
        raise ValueError(f"{decoding.method}: draws belong to sampling, and to nothing else")
    batch = prompt_batch(prompts, pad_id).to(distributed.device())
    length = batch.input_ids_BT.shape[1]
    arguments = {
        **PLAIN,
        "max_new_tokens": decoding.max_new_tokens,
        "num_beams": 1,
        "num_return_sequences": 1,
        "eos_token_id": list(eos_ids),
        "pad_token_id": pad_id,
    }
    returned = 1
    if decoding.method == "beam":
        returned = decoding.per_document
        arguments.update(num_beams=decoding.beams, num_return_sequences=returned)
    if draws_BN is not None:
        draws = torch.from_numpy(draws_BN).to(batch.input_ids_BT.device)
        arguments["logits_processor"] = _sampling(decoding, draws, length)
    new = generate(batch, **arguments)[:, length:].tolist()
    ended = [_to_the_end(ids, eos_ids) for ids in new]
    return [ended[i : i + returned] for i in range(0, len(ended), returned)]


def _to_the_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Without the padding behind the end."""
    end = next((place for place, id_ in enumerate(ids) if id_ in eos_ids), len(ids))
    return ids[: end + 1]


def _sampling(decoding: Decoding, draws_BN: Tensor, prompt_length: int) -> LogitsProcessorList:
    """In transformers' order: temperature, top k, top p, and then the draw."""
    steps: list[LogitsProcessor] = []
    if decoding.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k is not None:
        steps.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1.0:
        steps.append(TopPLogitsWarper(decoding.top_p))
    return LogitsProcessorList([*steps, Draw(draws_BN, prompt_length)])


class Draw(LogitsProcessor):
    """Leaves each row one token, drawn from its distribution by the row's own number; whoever takes
    the best then takes it. In float64: the cumulative sum of a vocabulary loses tokens in fp32.
    """

    def __init__(self, draws_BN: Tensor, prompt_length: int) -> None:
        self._draws_BN, self._prompt_length = draws_BN, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._prompt_length
        cumulative_BV = scores.double().softmax(-1).cumsum(-1)
        place_B1 = self._draws_BN[:, step : step + 1] * cumulative_BV[:, -1:]
        # `right`: the first token whose sum is above the number, so never one of probability 0.
        token_B1 = torch.searchsorted(cumulative_BV, place_B1, right=True)
        chosen_BV = torch.full_like(scores, -torch.inf)
        return chosen_BV.scatter_(1, token_B1.clamp_(max=scores.shape[1] - 1), 0.0)
