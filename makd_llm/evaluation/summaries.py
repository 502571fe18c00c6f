"""Summaries that a model writes: greedy, in batches, with a KV cache, on all ranks."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from makd_llm import distributed
from makd_llm.data.batch import Batch, prompt_batch


class Generates(Protocol):
    """What writes: an engine's `generate`."""

    def __call__(self, batch: Batch, **arguments: object) -> Tensor: ...


def summarize(
    generate: Generates,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
) -> list[str]:
    """One text per prompt, in order, the same list on every rank. Collective.

    Prompts are sorted by length and dealt out to the ranks, so that batches are even and little is
    padded.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    share_of = batch_size * distributed.world_size()
    written: dict[int, str] = {}
    for start in range(0, len(order), share_of):
        group = order[start : start + share_of]
        mine = group[distributed.rank() :: distributed.world_size()]
        # A rank without a prompt of its own goes along: sharded weights need every rank in every
        # forward.
        batch = prompt_batch([prompts[i] for i in mine or group[:1]], pad_id).to(
            distributed.device()
        )
        ids_BT = generate(
            batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # A model's own generation settings may hold these; then it would not be plain greedy.
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=list(eos_ids),
            pad_token_id=pad_id,
        )
        new_BT = ids_BT[:, batch.input_ids_BT.shape[1] :]
        texts = tokenizer.batch_decode(new_BT, skip_special_tokens=True)
        written.update(zip(mine, (text.strip() for text in texts), strict=False))
    everything: dict[int, str] = {}
    for share in distributed.gather_objects(written):
        everything.update(share)
    return [everything[i] for i in range(len(prompts))]
