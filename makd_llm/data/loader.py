"""Which records make up which optimizer step, and which of them this rank computes.

The global batch of step s depends on the seed and on s alone. How many ranks share it, and in how
many micro-batches each of them goes through its part, changes who computes a record and never which
records are in the step, nor their order:

    global batch, batch_size = 8       r0 r1 | r2 r3 | r4 r5 | r6 r7
    2 ranks, micro-batches of 2        rank 0  rank 1  rank 0  rank 1
                                       ── micro-batch 0  ── micro-batch 1

A list of records is permuted anew in every epoch; a stream is read in blocks of `shuffle_buffer`
records, each permuted on its own. Epochs join without a seam: a step that begins in one may end in
the next, so no record is lost and a data set may be smaller than a batch. Either order can be taken
up again at any step exactly: a permutation is a function of the seed and a number, and a block is
read again from the place in the stream where it began. (The shuffle buffer of `datasets` is
refilled with other records after a resume; hence blocks.)
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

from makd_llm.data.batch import Batch, PaddingSide, collate
from makd_llm.data.prompt import PromptBuilder
from makd_llm.data.records import RecordList, RecordStream, describe_skipped
from makd_llm.data.schema import BadRecord, OnBadRecord, Record
from makd_llm.errors import UserError


class TrainLoader:
    """Micro-batches of this rank, one optimizer step at a time, without end.

    `batch_size` counts the records of one optimizer step over all ranks, `micro_batch_size` those
    of one forward pass on one rank; their quotient over the ranks is the accumulation. All other
    arguments are those of `collate`. Every rank must be given the same source, seed and sizes.

    A list's records are all checked here: the first one that does not fit the window is raised as
    BadRecord, or dropped and counted where `on_bad_record` is "skip". A stream's are checked as
    they come. Raises UserError where the sizes contradict or no record remains.
    """

    def __init__(
        self,
        source: RecordList | RecordStream,
        prompts: PromptBuilder,
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        pad_id: int,
        padding_side: PaddingSide = "right",
        shuffle: bool = True,
        shuffle_buffer: int = 1024,
        on_bad_record: OnBadRecord,
        multiple_of: int = 1,
    ) -> None:
        self.accumulation = accumulation_steps(batch_size, micro_batch_size, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        self._source, self._prompts = source, prompts
        self._batch_size, self._micro, self._world = batch_size, micro_batch_size, world_size
        self._rank, self._pad_id = rank, pad_id
        self._padding_side, self._multiple_of = padding_side, multiple_of
        usable = _Usable(prompts, on_bad_record)
        self._order: _Order
        if isinstance(source, RecordList):
            self._order = _ListOrder(source, usable, seed, shuffle)
        else:
            self._order = _StreamOrder(source, usable, seed, shuffle, shuffle_buffer)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step, in the order to go through them."""
        records = self._order.take(self._batch_size)
        size, stride = self._micro, self._micro * self._world
        starts = range(self._rank * size, self._batch_size, stride)
        return [self._batch(records[start : start + size]) for start in starts]

    def _batch(self, records: Sequence[Record]) -> Batch:
        return collate(
            [self._prompts.example(record) for record in records],
            self._pad_id,
            padding_side=self._padding_side,
            multiple_of=self._multiple_of,
        )

    @property
    def epoch(self) -> float:
        """How often the data has been gone through. A stream's first pass counts when it ends."""
        return self._order.epoch

    @property
    def skipped(self) -> Counter[str]:
        """Records that were left out so far, by reason: the source's own, and those too long."""
        return self._source.skipped + self._order.skipped

    def describe_skipped(self) -> str | None:
        """One phrase such as "skipped 3 records: 2 malformed JSON, 1 empty summary", or None."""
        return describe_skipped(self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """The place of the next step, in JSON values; the same on every rank."""
        return {"batch_size": self._batch_size, **self._order.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, at any world size and micro-batch size.

        Raises UserError where it is of another batch size, seed, shuffling or number of records.
        """
        now = self.state_dict()
        for key in ("batch_size", *self._order.fixed):
            if state.get(key) != now[key]:
                raise UserError(
                    f"the checkpoint's data had {key.replace('_', ' ')} {state.get(key)!r} and "
                    f"this run's has {now[key]!r}; restore it, or begin a new run folder"
                )
        self._order.load_state_dict(state)


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """How many micro-batches each rank goes through per step. Raises UserError for a fraction."""
    together = micro_batch_size * world_size
    if min(batch_size, micro_batch_size, world_size) < 1 or batch_size % together:
        raise UserError(
            f"batch_size {batch_size} is no multiple of micro_batch_size {micro_batch_size} × "
            f"{world_size} ranks = {together}; change one of the two sizes"
        )
    return batch_size // together


class _Usable:
    """Decides whether a record fits the window, by the policy for bad records."""

    def __init__(self, prompts: PromptBuilder, on_bad_record: OnBadRecord) -> None:
        self._prompts, self._on_bad_record = prompts, on_bad_record

    def fault(self, record: Record) -> str | None:
        """None if the record fits, else the reason; raises BadRecord where none may be skipped."""
        try:
            self._prompts.check(record)
        except BadRecord as bad:
            if self._on_bad_record == "error":
                raise
            return bad.reason
        return None


class _Order(Protocol):
    """An endless sequence of records with a place that can be kept."""

    skipped: Counter[str]

    @property
    def fixed(self) -> tuple[str, ...]:
        """Keys of the state that a resumed run must share."""

    @property
    def epoch(self) -> float: ...
    def take(self, count: int) -> Sequence[Record]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _ListOrder:
    """A list of records, permuted anew in every epoch. The place is one number."""

    fixed = ("seed", "shuffle", "records")

    def __init__(self, records: RecordList, usable: _Usable, seed: int, shuffle: bool) -> None:
        self.skipped: Counter[str] = Counter()
        self._records, self._seed, self._shuffle = records, seed, shuffle
        self._indices: list[int] = []
        for index, record in enumerate(records):
            reason = usable.fault(record)
            if reason is None:
                self._indices.append(index)
            else:
                self.skipped[reason] += 1
        if not self._indices:
            raise _none_left(self.skipped)
        self._taken = 0
        self._permuted: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def epoch(self) -> float:
        return self._taken / len(self._indices)

    def take(self, count: int) -> Sequence[Record]:
        places = range(self._taken, self._taken + count)
        self._taken += count
        return _Lazy(self._records, [self._index(place) for place in places])

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, len(self._indices))
        if self._permuted[0] != epoch:
            order = _permutation(len(self._indices), self._seed, epoch, self._shuffle)
            self._permuted = (epoch, order)
        return self._indices[int(self._permuted[1][offset])]

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "records": len(self._indices),
            "taken": self._taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._taken = state["taken"]


class _Lazy(Sequence[Record]):
    """Records of a list by chosen indices; only those that are asked for are read."""

    def __init__(self, records: RecordList, indices: list[int]) -> None:
        self._records, self._indices = records, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._records[chosen] for chosen in self._indices[index]]
        return self._records[self._indices[index]]


class _StreamOrder:
    """A stream in blocks, each permuted on its own.

    The place is what was so before the block was read, and how far into the block the next record
    is. That a pass has ended shows when a block comes out empty; the next one begins the next pass.
    """

    fixed = ("seed", "shuffle", "shuffle_buffer")

    def __init__(
        self, stream: RecordStream, usable: _Usable, seed: int, shuffle: bool, block_size: int
    ) -> None:
        if block_size < 1:
            raise UserError(f"shuffle_buffer is {block_size}; it is at least 1 record")
        self.skipped: Counter[str] = Counter()
        self._stream, self._usable, self._seed = stream, usable, seed
        self._shuffle, self._block_size = shuffle, block_size
        self._blocks = 0
        self._passes = 0
        self._read_in_pass = 0
        self._pass_length: int | None = None
        self._rest: Iterator[Record] = self._usable_records()
        self._block: list[Record] = []
        self._offset = 0
        self._before = self._place()

    @property
    def epoch(self) -> float:
        if self._pass_length is None:
            return float(self._passes)
        taken = self._read_in_pass - len(self._block) + self._offset
        return self._passes + taken / self._pass_length

    def take(self, count: int) -> list[Record]:
        taken: list[Record] = []
        while len(taken) < count:
            if self._offset == len(self._block):
                self._next_block()
            part = self._block[self._offset : self._offset + count - len(taken)]
            self._offset += len(part)
            taken += part
        return taken

    def _next_block(self) -> None:
        self._before = self._place()
        block = list(islice(self._rest, self._block_size))
        if not block:
            if self._read_in_pass == 0:
                raise _none_left(self.skipped)
            self._passes, self._pass_length = self._passes + 1, self._read_in_pass
            self._read_in_pass = 0
            self._rest = self._usable_records()
            block = list(islice(self._rest, self._block_size))
        order = _permutation(len(block), self._seed, self._blocks, self._shuffle)
        self._block = [block[index] for index in order]
        self._offset = 0
        self._blocks += 1
        self._read_in_pass += len(block)

    def _usable_records(self) -> Iterator[Record]:
        """One pass, or the rest of one, without the records that do not fit the window."""
        for record in self._stream:
            reason = self._usable.fault(record)
            if reason is None:
                yield record
            elif self._passes == 0:
                self.skipped[reason] += 1

    def _place(self) -> dict[str, Any]:
        return {
            "stream": self._stream.state_dict(),
            "blocks": self._blocks,
            "passes": self._passes,
            "read_in_pass": self._read_in_pass,
            "pass_length": self._pass_length,
            "skipped": dict(self.skipped),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "shuffle_buffer": self._block_size,
            "before_block": self._before,
            "offset": self._offset,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = state["before_block"]
        self._stream.load_state_dict(before["stream"])
        self._blocks, self._passes = before["blocks"], before["passes"]
        self._read_in_pass, self._pass_length = before["read_in_pass"], before["pass_length"]
        self.skipped = Counter(before["skipped"])
        self._rest = self._usable_records()
        self._before, self._block, self._offset = before, [], 0
        if state["offset"] > 0:
            self._next_block()
            self._offset = state["offset"]


def _permutation(n: int, seed: int, number: int, shuffle: bool) -> np.ndarray:
    """(n,) int64: the order of epoch or block `number`, a function of the arguments alone."""
    return np.random.default_rng([seed, number]).permutation(n) if shuffle else np.arange(n)


def _none_left(skipped: Counter[str]) -> UserError:
    return UserError(
        f"no record fits the window ({describe_skipped(skipped)}); make data.max_length larger"
    )
