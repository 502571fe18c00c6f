"""A run's teacher asked once, before the student learns: its cache is written, checked and opened
here (makd_llm/offline has the parts). Every function here is collective.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from makd_llm import distributed
from makd_llm.checkpoint.folder import read_config
from makd_llm.config import DataConfig, RunConfig
from makd_llm.config.objectives import LogitsConfig
from makd_llm.data.batch import pad_id_of
from makd_llm.data.records import RecordList, describe_skipped
from makd_llm.files import sample_of_folder
from makd_llm.models.source import load_tokenizer
from makd_llm.offline.manifest import (
    Manifest,
    check_contents,
    check_teacher_of,
    difference_of_settings,
    digest_of_tokenizer,
    other_data,
    read_manifest,
)
from makd_llm.offline.plan import Plan, most_bytes, shards_of
from makd_llm.offline.read import TeacherCache
from makd_llm.offline.write import begin, finish, write_shards
from makd_llm.train.build import build_prompts, build_records
from makd_llm.train.engine import Frozen


class Teaching:
    """Asks the teacher as a run's config says, whose `distil.offline` is set. data: what the
    student will learn from; dtype: in which the models run; tell: says a sentence.
    """

    def __init__(
        self,
        config: RunConfig,
        data: DataConfig,
        dtype: torch.dtype,
        tell: Callable[[str], None],
    ) -> None:
        assert config.distil.offline is not None
        self.config, self.data, self.dtype, self.tell = config, data, dtype, tell
        self.offline = config.distil.offline
        asked = config.distil.of(LogitsConfig).values()
        self.temperatures = tuple(sorted({objective.temperature for objective in asked}))

    def check_given(self, teacher: Path) -> None:
        """Whether the cache of another run can be of use, as far as that shows before any stage.
        Raises UserError.
        """
        if self.offline.cache is not None:
            check_contents(
                read_manifest(self.offline.cache),
                self.offline.cache,
                tokenizer=digest_of_tokenizer(load_tokenizer(teacher)),
                top_k=self.offline.top_k,
                temperatures=self.temperatures,
            )

    def write(
        self,
        teacher: Path,
        hidden: Sequence[int],
        folder: Path,
        frozen: Callable[[Path, int], Frozen],
    ) -> None:
        """Writes the run's own cache, or what an interrupted call has left to do. hidden: the
        teacher's layers whose states are kept; frozen: loads a folder for so many records at once.
        """
        tokenizer, model = load_tokenizer(teacher), read_config(teacher)
        plan = self._plan(teacher)
        kept = self.offline.top_k, len(self.temperatures), len(hidden), model.hidden_size
        sizes = [most_bytes(entry, *kept) for entry in plan.entries]
        shards = shards_of(plan.entries, sizes)
        manifest = Manifest(
            teacher=self.config.teacher.model,
            teacher_files=distributed.on_main(sample_of_folder, teacher),
            tokenizer=digest_of_tokenizer(tokenizer),
            vocabulary=model.vocab_size,
            dtype=str(self.dtype).removeprefix("torch."),
            data=plan.digest,
            settings=self._settings(),
            top_k=self.offline.top_k,
            temperatures=self.temperatures,
            hidden=tuple(sorted(hidden)),
            width=model.hidden_size,
            records=len(plan.entries),
            targets=sum(entry.targets for entry in plan.entries),
            tokens=sum(entry.tokens for entry in plan.entries),
            shards=len(shards),
        )
        missing = distributed.on_main(begin, folder, manifest)
        self.tell(
            f"teach: {manifest.records} records, {manifest.targets} summary tokens, at most "
            f"{sum(sizes) / 2**20:.1f} MiB; {len(missing)} of {len(shards)} files to write"
        )
        if skipped := describe_skipped(plan.records.skipped + plan.skipped):
            self.tell(f"teach: {skipped}")
        if missing:
            engine = frozen(teacher, self.offline.batch_size)
            sized = {"batch_size": self.offline.batch_size, "pad_id": pad_id_of(tokenizer)}
            write_shards(folder, manifest, plan, shards, missing, engine, **sized)
            engine.close()
        distributed.barrier()
        done = distributed.on_main(finish, folder, manifest)
        self.tell(
            f"teach: {done.bytes_per_target:.1f} bytes per summary token, and "
            f"{done.bytes_per_token:.1f} per token for hidden states"
        )

    def open(
        self, folder: Path, teacher: Path, student: Path, hidden: Sequence[int]
    ) -> TeacherCache:
        """The cache for training. One of another run is held against this one's teacher, student
        and data first. Raises UserError where it does not fit.
        """
        manifest = read_manifest(folder)
        cache = TeacherCache(folder, manifest, dtype=self.dtype)
        if self.offline.cache is not None:
            check_teacher_of(
                manifest,
                folder,
                teacher_files=distributed.on_main(sample_of_folder, teacher),
                vocabulary=read_config(student).vocab_size,
                hidden=hidden,
            )
            self._check_data(cache, self._plan(teacher))
        return cache

    def _check_data(self, cache: TeacherCache, plan: Plan) -> None:
        missing = cache.missing(entry.key for entry in plan.entries)
        if missing:
            first = plan.where(plan.entries[missing[0]])
            why = difference_of_settings(cache.manifest, self._settings())
            raise other_data(
                cache.folder,
                f"it lacks {len(missing)} of {len(plan.entries)} records as they are cut here, the "
                f"first of them {first}{why}",
            )

    def _plan(self, teacher: Path) -> Plan:
        """The training split as training sees it; as a list, also where training streams it."""
        data = self.data
        records = build_records(data.model_copy(update={"streaming": False}))
        assert isinstance(records, RecordList)
        return Plan.of(build_prompts(data, load_tokenizer(teacher)), records, data.on_bad_record)

    def _settings(self) -> dict[str, object]:
        """What decides about the records and their cut, by name."""
        data = self.data.model_dump(
            exclude={
                *("validation_source", "validation_split", "padding_side"),
                *("streaming", "shuffle_buffer"),
            }
        )
        flat: dict[str, object] = {}
        for name, value in data.items():
            if isinstance(value, dict):
                flat |= {f"data.{name}.{inner}": v for inner, v in value.items()}
            else:
                flat[f"data.{name}"] = value
        return flat
