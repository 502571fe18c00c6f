"""Summaries of a list of prompts: greedy, in batches, with a KV cache, on all ranks."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from makd_llm import distributed
from makd_llm.generation.decoding import Decoding, Generates, continuations


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
    decoding = Decoding(max_new_tokens=max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    share_of = batch_size * distributed.world_size()
    written: dict[int, str] = {}
    for start in range(0, len(order), share_of):
        group = order[start : start + share_of]
        mine = group[distributed.rank() :: distributed.world_size()]
        # A rank without a prompt of its own goes along: sharded weights need every rank in every
        # forward.
        batch = [prompts[i] for i in mine or group[:1]]
        found = continuations(generate, batch, decoding, eos_ids=eos_ids, pad_id=pad_id)
        texts = tokenizer.batch_decode([ids for (ids,) in found], skip_special_tokens=True)
        written.update(zip(mine, (text.strip() for text in texts), strict=False))
    everything: dict[int, str] = {}
    for share in distributed.gather_objects(written):
        everything.update(share)
    return [everything[i] for i in range(len(prompts))]
