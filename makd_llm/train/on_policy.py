"""Batches that the student wrote: with the teacher's prompts, and its own words to be corrected.

One coin per optimizer step, the same on every rank, says whether the step learns from the data or
from what the student writes. Weights are gathered once for all that a step writes (see
consolidated.py); what a text becomes depends on the seed, the step and the record, not on the split
into ranks and micro-batches. No gradient goes through the writing, and cross-entropy, which would
praise the student for its own words, is left out on such steps.

With a replay buffer the student's texts are kept and used again, and fewer are written the longer
the run lasts. With an adaptive share there are none at first, and more each time that the
validation loss has risen. Sources: GKD (lmbda), DistiLLM (replay, adaptive), MiniLLM (lmbda = 1).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from makd_llm import distributed
from makd_llm.data.batch import Batch, PaddingSide, collate, examples_of
from makd_llm.data.schema import Example
from makd_llm.generation.decoding import Decoding, continuations

Writer = Callable[[int], AbstractContextManager[Callable[..., Tensor]]]
"""Rows of a batch -> a `generate`, inside the `with`."""


@dataclass(frozen=True)
class Adaptive:
    """Every so many steps the validation loss is measured; where it has risen by `tolerance` or
    more since it was last measured, the share rises by `increment`.
    """

    every: int
    increment: float
    tolerance: float
    validation_loss: Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """lmbda: the share of steps that learn from the student's texts (at first, if it adapts).
    replay: how many texts are kept, 0 none. max_length: of prompt and text together, in tokens.
    """

    lmbda: float
    decoding: Decoding
    batch_size: int
    steps: int
    max_length: int
    pad_id: int
    eos_ids: tuple[int, ...]
    seed: int
    padding_side: PaddingSide = "right"
    replay: int = 0
    adaptive: Adaptive | None = None


class OnPolicy:
    """The student's texts of one training stage."""

    def __init__(self, settings: Settings, writer: Writer) -> None:
        self.settings, self._writer = settings, writer
        self.share = settings.lmbda
        self.last_loss: float | None = None
        self.kept: list[Example] = []
        """The replay buffer, oldest first; the same on every rank."""

    def of_step(self, step: int, batches: list[Batch]) -> list[Batch] | None:
        """What this rank learns from in a step (from 1) whose micro-batches of the data are these;
        None: these. Collective.
        """
        asked = self.settings
        dice = np.random.default_rng([asked.seed, step])
        drawn = dice.random()
        if drawn >= self.share:
            return None
        fresh = self.share * (1.0 - (step - 1) / asked.steps) if asked.replay else self.share
        if drawn < fresh or not self.kept:
            return self._written(step, batches)
        sizes = [len(batch.record_ids) for batch in batches]
        places = _places(sizes)
        count = sum(sizes) * distributed.world_size()
        chosen = dice.choice(len(self.kept), size=count, replace=count > len(self.kept))
        return self._as_batches([self.kept[chosen[place]] for place in places], sizes)

    def after_step(self, step: int) -> float | None:
        """Adapts the share where that is due; returns the validation loss then. Collective."""
        adaptive = self.settings.adaptive
        if adaptive is None or step % adaptive.every:
            return None
        loss = adaptive.validation_loss()
        if self.last_loss is not None and loss >= self.last_loss + adaptive.tolerance:
            self.share = min(1.0, self.share + adaptive.increment)
        self.last_loss = loss
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on every rank."""
        kept = [(e.record_id, e.input_ids, e.prompt_length, e.document) for e in self.kept]
        return {"share": self.share, "last_loss": self.last_loss, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, at any number of ranks."""
        self.share, self.last_loss = state["share"], state["last_loss"]
        kept = state["kept"]
        self.kept = [
            Example(record_id, ids, length, tuple(document) if document else None)
            for record_id, ids, length, document in kept
        ]

    def _written(self, step: int, batches: Sequence[Batch]) -> list[Batch]:
        """The same prompts with what the student makes of them now."""
        sizes = [len(batch.record_ids) for batch in batches]
        places = _places(sizes)
        given = [example for batch in batches for example in examples_of(batch)]
        prompts = [example.input_ids[: example.prompt_length] for example in given]
        texts = self._texts(step, prompts, places)
        written = [
            Example(e.record_id, [*prompt, *text], e.prompt_length, e.document)
            for e, prompt, text in zip(given, prompts, texts, strict=True)
        ]
        if self.settings.replay:
            shares = distributed.gather_objects(list(zip(places, written, strict=True)))
            by_place = {place: example for share in shares for place, example in share}
            self.kept += [by_place[place] for place in sorted(by_place)]
            del self.kept[: -self.settings.replay]
        return self._as_batches(written, sizes)

    def _texts(
        self, step: int, prompts: Sequence[list[int]], places: Sequence[int]
    ) -> list[list[int]]:
        """The new ids of each prompt, at least one and no more than fit the window."""
        asked = self.settings
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts: dict[int, list[int]] = {}
        with self._writer(min(asked.batch_size, len(prompts))) as generate:
            for start in range(0, len(order), asked.batch_size):
                group = order[start : start + asked.batch_size]
                found = continuations(
                    generate,
                    [prompts[i] for i in group],
                    asked.decoding,
                    eos_ids=asked.eos_ids,
                    pad_id=asked.pad_id,
                    draws_BN=self._draws(step, [places[i] for i in group]),
                )
                for i, (text,) in zip(group, found, strict=True):
                    texts[i] = text[: asked.max_length - len(prompts[i])]
        return [texts[i] for i in range(len(prompts))]

    def _draws(self, step: int, places: Sequence[int]) -> np.ndarray | None:
        """Random numbers for each text, known from the step and its place in the global batch."""
        decoding = self.settings.decoding
        if decoding.method != "sample":
            return None
        return np.stack([decoding.draws_of(step, place) for place in places])

    def _as_batches(self, examples: Sequence[Example], sizes: Sequence[int]) -> list[Batch]:
        asked, rest = self.settings, list(examples)
        made = []
        for size in sizes:
            made.append(collate(rest[:size], asked.pad_id, padding_side=asked.padding_side))
            del rest[:size]
        return made


def _places(sizes: Sequence[int]) -> list[int]:
    """The places of this rank's records in the global batch, micro-batch by micro-batch."""
    rank, world = distributed.rank(), distributed.world_size()
    places: list[int] = []
    for number, size in enumerate(sizes):
        start = (number * world + rank) * size
        places += range(start, start + size)
    return places
