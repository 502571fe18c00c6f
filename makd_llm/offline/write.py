"""The teacher's pass over the split: every rank writes shards of its own, until all are there.

A shard appears under its name when it is whole. Whatever ends the work, what is whole stays, and
the next call writes what is missing; as the batches of a shard depend on the shard alone, the
result is the same to the last bit, also with another number of ranks.
"""
# B batch, T tokens, N summary tokens

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from makd_llm import distributed
from makd_llm.checkpoint.folder import unwritable
from makd_llm.data.batch import Batch, collate
from makd_llm.errors import UserError
from makd_llm.offline.manifest import Manifest
from makd_llm.offline.plan import Entry, Plan
from makd_llm.offline.shards import Answer, is_whole, name_of, write_shard
from makd_llm.offline.top_tokens import top_tokens
from makd_llm.report.progress import progress
from makd_llm.shown import Needs, Shown


class Teacher(Protocol):
    """What is asked: an engine's forward and capture."""

    def __call__(self, batch: Batch, at_head: Any = None) -> Any: ...
    def capture(self, needs: Needs) -> AbstractContextManager[Shown]: ...


def begin(folder: Path, manifest: Manifest) -> list[int]:
    """Makes the folder ready; the numbers of the shards that are still to be written. On one rank.

    What an earlier work left there of other contents is removed. Raises UserError where the folder
    cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        whole = {
            name_of(number)
            for number in range(manifest.shards)
            if is_whole(folder / name_of(number), manifest.contents)
        }
        for path in [*folder.glob("shard-*"), *folder.glob(".writing-*")]:
            if path.name not in whole:
                path.unlink()
        manifest.write(folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); choose another run_dir"
        ) from None
    return [number for number in range(manifest.shards) if name_of(number) not in whole]


def write_shards(
    folder: Path,
    manifest: Manifest,
    plan: Plan,
    shards: Sequence[Sequence[Entry]],
    missing: Sequence[int],
    teacher: Teacher,
    *,
    batch_size: int,
    pad_id: int,
) -> None:
    """The missing shards, dealt out to the ranks. Collective: a rank that has nothing of its own to
    do goes along with the others' forwards, which sharded weights need.

    batch_size: records of one forward. Raises UserError where a file cannot be written.
    """
    world = distributed.world_size()
    rounds = [missing[start : start + world] for start in range(0, len(missing), world)]
    forwards = [max(-(-len(shards[n]) // batch_size) for n in numbers) for numbers in rounds]
    answers = partial(_answers, manifest=manifest, plan=plan, teacher=teacher, pad_id=pad_id)
    with progress("teach", sum(forwards)) as advance:
        for numbers, count in zip(rounds, forwards, strict=True):
            own = numbers[distributed.rank()] if distributed.rank() < len(numbers) else None
            entries = shards[numbers[0] if own is None else own]
            found = list(answers(_batches(entries, batch_size, count), advance=advance))
            if own is not None:
                path = folder / name_of(own)
                _write(path, found[: len(entries)], manifest.contents)


def finish(folder: Path, manifest: Manifest) -> Manifest:
    """Marks the cache as finished and counts its bytes. On one rank, when all shards are there."""
    size = sum(path.stat().st_size for path in folder.glob("shard-*"))
    states = manifest.tokens * 2 * manifest.width * len(manifest.hidden)
    done = manifest.model_copy(
        update={
            "finished": True,
            "bytes_per_target": (size - states) / manifest.targets,
            "bytes_per_token": states / manifest.tokens,
        }
    )
    done.write(folder)
    return done


def _batches(entries: Sequence[Entry], size: int, count: int) -> Iterator[Sequence[Entry]]:
    """So many batches, the first once more where there are fewer."""
    for number in range(count):
        yield entries[number * size : (number + 1) * size] or entries[:size]


def _answers(
    batches: Iterator[Sequence[Entry]],
    *,
    manifest: Manifest,
    plan: Plan,
    teacher: Teacher,
    pad_id: int,
    advance: Callable[[], None],
) -> Iterator[Answer]:
    """What the teacher says of each record, batch by batch."""
    needs = Needs(hidden=frozenset(manifest.hidden))
    for entries in batches:
        batch = collate([plan.example(entry) for entry in entries], pad_id)
        batch = batch.to(distributed.device())
        with torch.no_grad(), teacher.capture(needs) as shown:
            top = teacher(batch, partial(_at_head, batch, manifest))
        lengths = [entry.tokens for entry in entries]
        states = {
            layer: _by_record(shown.hidden.pop(layer), batch, lengths) for layer in manifest.hidden
        }
        counts = [entry.targets for entry in entries]
        dtypes = (torch.int32, torch.bfloat16, torch.float32)
        ids, log_p, log_rest = (
            part.to("cpu", dtype).split(counts) for part, dtype in zip(top, dtypes, strict=True)
        )
        for row, entry in enumerate(entries):
            hidden = {
                layer: of_records[row].to("cpu", torch.bfloat16)
                for layer, of_records in states.items()
            }
            yield Answer(entry.key, ids[row], log_p[row], log_rest[row], hidden, entry.tokens)
        advance()


def _by_record(state_BTD: Tensor, batch: Batch, lengths: list[int]) -> Sequence[Tensor]:
    """(T, D) each, of real tokens."""
    if state_BTD.shape[:2] != batch.input_ids_BT.shape:
        return list(state_BTD[0].split(lengths))
    return [state_TD[:length] for state_TD, length in zip(state_BTD, lengths, strict=True)]


def _at_head(
    batch: Batch, manifest: Manifest, hidden_BTE: Tensor, weight_VE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A plain tuple: DeepSpeed looks into it."""
    hidden_NE = hidden_BTE.flatten(0, 1)[batch.targets_N]
    if not manifest.temperatures:
        nothing_N0 = hidden_NE[:, :0]
        return nothing_N0.long(), nothing_N0, nothing_N0
    top = top_tokens(hidden_NE, weight_VE, manifest.top_k, manifest.temperatures)
    return top.ids_NK, top.log_p_NK, top.log_rest_NS


def _write(path: Path, answers: Sequence[Answer], contents: str) -> None:
    try:
        write_shard(path, answers, contents)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
