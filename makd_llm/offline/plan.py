"""Which records a cache holds, in which shard, and how large it becomes.

A record is found again by its tokens (data.batch.key_of) and not by its id, which another record
may share: what is looked up is then certain to be what the teacher saw. Records of the same tokens
are kept once. The shards depend on the records alone, not on how many ranks write them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from makd_llm.data.batch import key_of
from makd_llm.data.prompt import PromptBuilder, usable_examples
from makd_llm.data.records import RecordList, describe_skipped
from makd_llm.data.schema import Example, OnBadRecord
from makd_llm.errors import UserError
from makd_llm.offline.codec import MOST_BYTES

SHARD_BYTES = 64 * 2**20
FEWEST_SHARDS = 32
"""Of a small cache: what is killed loses little, and ranks have something to share."""


@dataclass(frozen=True)
class Entry:
    """One record: its place in the list, its name, its length, of which so much is the summary."""

    place: int
    key: bytes
    tokens: int
    targets: int


@dataclass
class Plan:
    """The records of a split that fit the window, each once, as the list has them."""

    prompts: PromptBuilder
    records: RecordList
    entries: list[Entry]
    skipped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, prompts: PromptBuilder, records: RecordList, on_bad_record: OnBadRecord) -> "Plan":
        """Tokenizes every record, and forgets the tokens. Raises BadRecord as `usable_examples`
        does, and UserError where no record fits.
        """
        plan = cls(prompts, records, [])
        seen: set[bytes] = set()
        for place, record in enumerate(records):
            for _, example in usable_examples(prompts, [record], on_bad_record, plan.skipped):
                key, length = key_of(example), len(example.input_ids)
                if key not in seen:
                    seen.add(key)
                    entry = Entry(place, key, length, length - example.prompt_length)
                    plan.entries.append(entry)
        if not plan.entries:
            raise UserError(
                f"no record fits the window ({describe_skipped(plan.skipped)}); make "
                "data.max_length larger"
            )
        return plan

    @property
    def digest(self) -> str:
        """SHA-256 of all keys, in order."""
        return hashlib.sha256(b"".join(entry.key for entry in self.entries)).hexdigest()

    def example(self, entry: Entry) -> Example:
        """The record's tokens, made anew. Raises UserError where it has changed since."""
        record = self.records[entry.place]
        example = self.prompts.example(record)
        if key_of(example) != entry.key:
            raise UserError(f"{record.where} has changed while the teacher read it; begin again")
        return example

    def where(self, entry: Entry) -> str:
        """The record's place in its source, for messages."""
        return self.records[entry.place].where


def most_bytes(entry: Entry, top_k: int, temperatures: int, hidden: int, width: int) -> int:
    """At most so many are kept of a record."""
    top = top_k * (2 + MOST_BYTES) + 4 * temperatures if temperatures else 0
    return entry.targets * top + entry.tokens * 2 * hidden * width + 64


def shards_of(entries: Sequence[Entry], sizes: Sequence[int]) -> list[list[Entry]]:
    """Runs of entries whose sizes add up to at most SHARD_BYTES, or are one record. Records of
    about one length stand together, so that little is padded.
    """
    most = min(SHARD_BYTES, max(1, -(-sum(sizes) // FEWEST_SHARDS)))
    return [sorted(part, key=lambda entry: entry.tokens) for part in _runs(entries, sizes, most)]


def _runs(entries: Sequence[Entry], sizes: Sequence[int], most: int) -> Iterator[list[Entry]]:
    part: list[Entry] = []
    filled = 0
    for entry, size in zip(entries, sizes, strict=True):
        if part and filled + size > most:
            yield part
            part, filled = [], 0
        part.append(entry)
        filled += size
    if part:
        yield part
