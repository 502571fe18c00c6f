"""A run from teacher to table: sft -> (shape) -> factorize -> (baselines) -> (write) -> (teach) ->
distil -> (merge) -> evaluate.

Each stage ends in a folder of the run (a Hugging Face model, or the evaluation) and is skipped
while that result stands under the same config. Every function here is collective: all ranks call
it.
"""

import gc
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from makd_kernels.attention_kl import choose_impl
from makd_llm import distributed
from makd_llm.checkpoint.export import merge, write_model
from makd_llm.checkpoint.folder import read_config
from makd_llm.checkpoint.state import Checkpoints
from makd_llm.checks import check_same_tokenizer, check_settings, check_teacher
from makd_llm.config import DataConfig, RunConfig, TrainConfig, dump_config
from makd_llm.cutting import Cutting
from makd_llm.data.batch import pad_id_of
from makd_llm.data.prompt import PromptBuilder, usable_examples
from makd_llm.data.records import content_of
from makd_llm.data.schema import Example
from makd_llm.ending import one_ending
from makd_llm.errors import UserError
from makd_llm.evaluating import Evaluating
from makd_llm.files import claimed, sample_of_folder, sha256_of, write_json, write_whole
from makd_llm.models.causal import CausalModel
from makd_llm.models.families import family_of
from makd_llm.models.pairing import Pairing, pair
from makd_llm.models.projections import Projections
from makd_llm.models.sharded import load_sharded
from makd_llm.models.source import load_tokenizer, resolve_model
from makd_llm.objectives.combine import Objectives
from makd_llm.objectives.head import CrossEntropy
from makd_llm.offline import manifest
from makd_llm.offline.read import TeacherCache
from makd_llm.redaction import without_secrets_in
from makd_llm.report.card import student_card
from makd_llm.report.page import write_report
from makd_llm.report.table import factorization_table, show, show_evaluation
from makd_llm.reshape.reshape import Shape, check_shape
from makd_llm.stages import STAGES, Key, Stages, digest
from makd_llm.teacher_summaries import Task, write_with_engine
from makd_llm.teaching import Teaching
from makd_llm.train import monitors
from makd_llm.train.build import (
    build_balance,
    build_chains,
    build_loader,
    build_objectives,
    build_on_policy,
    build_projections,
    build_prompts,
    build_records,
    build_schedule,
    build_shape,
    staged_shares,
)
from makd_llm.train.deepspeed_config import (
    dtype_of,
    frozen_config,
    left_to_json,
    read_deepspeed_config,
    training_config,
)
from makd_llm.train.engine import Frozen, Trained, whole_tensors
from makd_llm.train.loop import Loop, LoopSettings
from makd_llm.train.over_parameterize import over_parameterize
from makd_llm.train.step import distill_step, finetune_step, offline_step

SHAPES = {"depth", "width", "heads"}
"""The sections of `student` that the stage `shape` is about; the others are factorize's."""
TRAINING = ("sft", "distil")
"""The stages that save checkpoints."""
FREE = (
    *("checkpoint_every", "keep_checkpoints", "log_every", "max_bad_steps"),
    *("micro_batch_size", "gradient_checkpointing"),
)
"""Settings of training that may change while a stage is under way: what is learnt stays. By the
last two it is cut for other ranks, or for less memory.
"""


class Run:
    """One run: its config, its DeepSpeed JSON, its folder. Whatever contradicts itself in the two
    files is found here, before processes are joined and anything is loaded.
    """

    def __init__(self, config: RunConfig, ds_path: Path) -> None:
        self.config = config
        self.ds_path = ds_path
        self.deepspeed = read_deepspeed_config(ds_path)
        self.dtype = dtype_of(self.deepspeed)
        self.dir = config.run_dir
        self.summaries = self.dir / "teacher-summaries"
        self.stages = Stages(self.dir)
        self.cutting = Cutting(config, self.dtype, self.tell)
        self.shape = build_shape(config.student)
        offline = config.distil.offline is not None
        data = self._data_of("distil")
        self.teaching = Teaching(config, data, self.dtype, self.tell) if offline else None
        self._data: dict[str, str | None] = {}
        self._under: str | None = None
        """The data and the stage's key that checkpoints are made under."""
        self._check_batches()
        check_settings(config, self.deepspeed, ds_path)

    @staticmethod
    def tell(text: str) -> None:
        """A sentence on standard output, from rank 0."""
        if distributed.is_main():
            print(text, flush=True)

    def execute(self, until: str = STAGES[-1]) -> None:
        """Runs the stages in order, up to and with `until`."""
        wanted = STAGES[: STAGES.index(until) + 1]
        if wanted[-1] == "sft" and not self.config.sft.enabled:
            raise UserError("sft.enabled is false, so there is nothing to tune; set it to true")
        if wanted[-1] == "shape" and self.shape is None:
            raise UserError(
                "student.depth, student.width and student.heads are all null, so there is nothing "
                "to shape; set one of them"
            )
        if wanted[-1] == "write" and self.config.distil.sequences.source != "teacher":
            raise UserError(
                "distil.sequences.source is not teacher, so there is nothing to write; set it"
            )
        if wanted[-1] == "teach" and self.teaching is None:
            raise UserError(
                "distil.offline is null, so there is nothing to write; set distil.offline.top_k"
            )
        with claimed(self.dir, "run_dir"), one_ending(self.dir):
            distributed.on_main(monitors.prepare, self.deepspeed, self.ds_path, self.dir)
            self._execute(wanted)

    def _execute(self, wanted: tuple[str, ...]) -> None:
        given = resolve_model(self.config.teacher.model)
        check_teacher(given, self.config)
        if self.shape is not None:
            check_shape(read_config(given), self.shape)
        if self.teaching is not None:
            self.teaching.check_given(given)
        # Looked at first: a split that is missing is not to be found at the end.
        measures = wanted[-1] in ("baselines", "evaluate")
        validation_file = self._content_of_data(validation=True) if measures else None
        content = self._content_of_data(validation=False)
        self._data = {
            "source": f"{self.config.data.source} {self.config.data.train_split}",
            "content": content,
        }
        distributed.on_main(self._check_data)
        # Whole in the first keys and not as a digest, so that a change can be named.
        first = {
            "teacher": self.config.teacher.model_dump(),
            "teacher_files": distributed.on_main(sample_of_folder, given),
            "data": self.config.data.model_dump(exclude={"validation_source", "validation_split"}),
            "train_file": content,
            "seed": self.config.seed,
            "dtype": str(self.dtype),
        }
        # Nothing of a cut is drawn at random.
        unseeded = {name: value for name, value in first.items() if name != "seed"}
        teacher, after = given, ""
        if self.config.sft.enabled:
            teacher = self.dir / "teacher"
            key = {**first, **self._key("sft", "")}
            self._stage("sft", key, teacher, partial(self._sft, given, teacher))
            after = digest(key)
        tuned = after
        if "shape" not in wanted:
            return
        start, tuned = teacher, after
        if self.shape is not None:
            start = self.dir / "shaped"
            key = {**unseeded, "student": self._shape_key(self.shape), "after": after}
            self._stage(
                "shape", key, start, partial(self.cutting.shape, self.shape, teacher, start)
            )
            after = digest(key)
        elif distributed.on_main((self.dir / "shaped").exists):
            distributed.on_main(shutil.rmtree, self.dir / "shaped")
            self.tell(f"shape: {self.dir / 'shaped'} removed, no other shape is asked for")
        if "factorize" not in wanted:
            return
        factorized = self.dir / "factorized"
        cut = self.config.student.model_dump(exclude=SHAPES)
        key = {**unseeded, "student": cut, "after": after}
        make = partial(self._factorize, teacher, start, factorized)
        self._stage("factorize", key, factorized, make)
        before, written = digest(key), ""
        if wanted[-1] == "baselines":
            self._baselines(teacher, factorized, validation_file, before)
        if "write" not in wanted:
            return
        if self.config.distil.sequences.source == "teacher":
            key = {**first, **self._write_key(tuned)}
            self._stage("write", key, self.summaries, partial(self._write, teacher))
            written = digest(key)
            before = digest({"factorize": before, "write": written})
        cache: Path | None = None
        if self.teaching is not None and "teach" in wanted:
            key = {**first, "after": tuned, **({"written": written} if written else {})}
            cache, taught = self._teach(teacher, factorized, key)
            before = digest({"factorize": before, "teach": taught})
        if "distil" not in wanted:
            return
        student = self.dir / "student"
        key = {"seed": self.config.seed, **self._key("distil", before)}
        make = partial(self._distil, teacher, factorized, student, cache)
        self._stage("distil", key, student, make)
        self._merged(student, {"after": digest(key)})
        if "evaluate" not in wanted:
            return
        key = self._evaluation_key(validation_file, digest(key))
        result = self.dir / "evaluation.json"
        evaluating = self._evaluating(validation_file)
        make = partial(evaluating.write, teacher, start, factorized, student)
        self._stage("evaluate", key, result, make)
        self._show(result)

    def _baselines(
        self, teacher: Path, factorized: Path, validation_file: str | None, after: str
    ) -> None:
        """What the student will have to be compared with, measured before it learns."""
        key = self._evaluation_key(validation_file, after)
        result = self.dir / "baselines.json"
        evaluating = self._evaluating(validation_file)
        make = partial(evaluating.write_baselines, teacher, factorized)
        self._stage("baselines", key, result, make)
        self._show(result)

    def _evaluation_key(self, validation_file: str | None, after: str) -> Key:
        asked = self.config.evaluation
        return {
            "evaluation": asked.model_dump(),
            "validation": self.config.data.model_dump(
                include={"validation_source", "validation_split"}
            ),
            "validation_file": validation_file,
            "text_file": distributed.on_main(sha256_of, asked.text) if asked.text else None,
            "after": after,
        }

    def _evaluating(self, validation_file: str | None) -> Evaluating:
        return Evaluating(
            self.config,
            self.dir,
            self.cutting,
            self._frozen,
            self.tell,
            {"content": validation_file, "dtype": str(self.dtype)},
        )

    def _show(self, result: Path) -> None:
        """The table of an evaluation."""
        evaluation = distributed.on_main(lambda: json.loads(result.read_text(encoding="utf-8")))
        distributed.on_main(write_report, self.dir)
        if distributed.is_main():
            show_evaluation(evaluation)

    def _content_of_data(self, *, validation: bool) -> str | None:
        """A data file that was edited in place is other data: finished stages run again."""
        data = self.config.data
        source = data.validation_source if validation and data.validation_source else data.source
        return distributed.on_main(
            partial(content_of, streaming=data.streaming and not validation),
            source,
            data.validation_split if validation else data.train_split,
        )

    def _check_data(self) -> None:
        """A stage that is under way goes on with the data that it began with, or not at all: what
        it has saved is neither mixed with other data nor thrown away.
        """
        for stage in TRAINING:
            about = {} if self.stages.done(stage) else self._checkpoints(stage, 1).about()
            then, now = about.get("content"), self._data["content"]
            if about.get("source") == self._data["source"] and then and now and then != now:
                raise UserError(
                    f"data.source {self.config.data.source}: the file has changed since "
                    f"{stage} saved step {about.get('step')} ({then[:19]}… then, {now[:19]}… now); "
                    "put the old file back to go on, or begin another run_dir"
                )

    def _merged(self, student: Path, key: Key) -> None:
        """The dense form, where it is asked for; one of an earlier student is not left lying."""
        merged = self.dir / "student-merged"
        if self.config.merge:
            self._stage("merge", key, merged, partial(distributed.on_main, merge, student, merged))
        elif distributed.on_main(lambda: merged.exists() and not self.stages.stands("merge", key)):
            distributed.on_main(shutil.rmtree, merged)
            self.tell(f"merge: {merged} removed, it was made from another student")

    def _shape_key(self, shape: Shape) -> Key:
        """What a shape depends on; on the calibration text only where it is read."""
        calibration = {"calibration_records", "calibration_batch"}
        return self.config.student.model_dump(
            include=SHAPES | calibration if shape.needs_calibration else SHAPES
        )

    def _key(self, stage: str, after: str) -> Key:
        """What a training stage depends on: its config, DeepSpeed's JSON, the stage before it."""
        section, ds = getattr(self.config, stage).model_dump(), dict(self.deepspeed)
        for free in FREE:
            section["train"].pop(free)
        if "train_batch_size" in ds:  # else the two below make the batch
            ds.pop("train_micro_batch_size_per_gpu", None)
            ds.pop("gradient_accumulation_steps", None)
        if stage == "distil":
            del section["sequences"]["generation"]  # of the stage before, where there is one
        if section.get("offline"):
            # Where it lies and how it was written is free; what it holds is in the key of `after`.
            section["offline"] = {"top_k": section["offline"]["top_k"]}
        return {stage: section, "ds": ds, "after": after}

    def _write_key(self, after: str) -> Key:
        """What the teacher's summaries depend on: how they are written, and the teacher's tuning;
        not on the student that was cut before.
        """
        asked = self.config.distil.sequences.generation
        return {"generation": asked.model_dump(exclude={"batch_size"}), "after": after}

    def _teach(self, teacher: Path, factorized: Path, key: Key) -> tuple[Path | None, str | None]:
        """The cache that the student is to learn from, and a name of what is in it; none where no
        objective asks the teacher.
        """
        assert self.teaching is not None
        objectives, _ = self._objectives(teacher, factorized)
        if not objectives.needs_teacher:
            self.tell("teach: nothing to write, as no objective asks the teacher")
            return None, None
        given = self.teaching.offline.cache
        if given is not None:
            return given, manifest.read_manifest(given).contents
        folder = self.dir / "teacher-cache"
        hidden = sorted(objectives.needs_of_teacher.hidden)
        key.pop("seed")
        key["offline"] = {
            "top_k": self.teaching.offline.top_k,
            "temperatures": self.teaching.temperatures,
            "hidden": hidden,
        }
        make = partial(self.teaching.write, teacher, hidden, folder, self._frozen)
        self._stage("teach", key, folder / manifest.FILE, make)
        return folder, manifest.read_manifest(folder).contents

    def _stage(self, name: str, key: Key, result: Path, make: Callable[[], None]) -> None:
        if distributed.on_main(lambda: self.stages.stands(name, key) and result.exists()):
            self.tell(f"{name}: stands in {result}")
            return
        change = distributed.on_main(self.stages.change, name, key)
        if change:
            self.tell(f"{name}: runs again, because {change}")
        self._under = digest(key)
        if name in TRAINING:
            self._checkpoints(name, 1).belong_to(self._under)
        distributed.on_main(self.stages.mark, name, key, done=False)
        distributed.on_main(self._describe)
        torch.manual_seed(self.config.seed)
        make()
        gc.collect()
        distributed.on_main(self.stages.mark, name, key, done=True)
        if name in TRAINING:
            self._checkpoints(name, 1).drop_set_aside()

    def _checkpoints(self, stage: str, keep: int) -> Checkpoints:
        return Checkpoints(
            self.dir / "checkpoints" / stage,
            keep=keep,
            tell=self.tell,
            about={"under": self._under, **self._data},
        )

    def _training_config(self, train: TrainConfig, section: str) -> dict[str, Any]:
        return training_config(
            self.deepspeed,
            train,
            world_size=distributed.world_size(),
            ds_path=self.ds_path,
            section=section,
        )

    def _check_batches(self) -> None:
        """Contradictions of the two config files are found before anything is loaded."""
        if self.config.sft.enabled:
            self._training_config(self.config.sft.train, "sft.train")
        self._training_config(self.config.distil.train, "distil.train")

    def _sft(self, given: Path, result: Path) -> None:
        """Tunes the teacher on the task: cross-entropy on the references."""
        head = {"cross_entropy": CrossEntropy(1.0)}
        objectives = Objectives({}, head, impl=self.config.distil.kernels)
        train = self.config.sft.train
        self._train("sft", given, result, train, objectives, teacher=None)

    def _write(self, teacher: Path) -> None:
        """The teacher's summaries of the training documents, as a data set of their own."""
        asked = self.config.distil.sequences.generation
        task = Task(teacher, self.config.data, asked, self.summaries, self.config.seed, anew=True)
        write_with_engine(task, self.deepspeed, self.tell, self.config.distil.kernels)

    def _data_of(self, stage: str) -> DataConfig:
        """What a training stage learns from; its documents are the same in either case."""
        data = self.config.data
        if stage == "distil" and self.config.distil.sequences.source == "teacher":
            return data.model_copy(update={"source": str(self.summaries), "limit": None})
        return data

    def _objectives(self, teacher: Path, factorized: Path) -> tuple[Objectives, Pairing]:
        """What the student is to learn, and what of it is compared with what of the teacher."""
        config = read_config(factorized)
        check_same_tokenizer(teacher, factorized)
        pairing = pair(config, read_config(teacher), self.config.distil.layer_map)
        objectives = build_objectives(
            self.config.distil, family_of(config), config.num_hidden_layers, pairing
        )
        return objectives, pairing

    def _distil(
        self, teacher: Path, factorized: Path, result: Path, cache: Path | None = None
    ) -> None:
        """cache: what the teacher has said before; the teacher is not loaded then."""
        objectives, pairing = self._objectives(teacher, factorized)
        answers: TeacherCache | None = None
        if cache is not None and self.teaching is not None:
            hidden = sorted(objectives.needs_of_teacher.hidden)
            answers = self.teaching.open(cache, teacher, factorized, hidden)
            self.tell(f"the teacher is read from {cache}")
        projections = build_projections(objectives, pairing)
        if projections:
            count = sum(p.width * p.teacher_width for p in projections.values())
            self.tell(
                f"projections to the teacher's widths: {len(projections)}, {count / 1e6:.2f} M "
                "parameters; trained with the student, not exported"
            )
        chains = build_chains(self.config.distil, objectives)
        kernels = choose_impl(self.config.distil.kernels, distributed.device().type)
        self.tell(f"objectives: {', '.join(objectives.names)}; kernels: {kernels}")

        def prepare(model: CausalModel, ds: dict[str, Any]) -> None:
            if projections:
                model.projections = Projections(projections, ds, self.dtype)
            if chains is not None:
                counts = over_parameterize(
                    model, chains, factorized, teacher, pairing, ds, self.dtype
                )
                self.tell(
                    f"over-parameterized: {counts.matrices} matrices, "
                    f"{counts.numbers / 1e6:.2f} M parameters as {counts.in_tensors / 1e6:.2f} M "
                    "in tensors; contracted for the export"
                )

        self._train(
            "distil",
            factorized,
            result,
            self.config.distil.train,
            objectives,
            teacher=teacher if objectives.needs_teacher and answers is None else None,
            answers=answers,
            prepare=prepare,
        )

    def _train(
        self,
        stage: str,
        start: Path,
        result: Path,
        train: TrainConfig,
        objectives: Objectives,
        *,
        teacher: Path | None,
        answers: TeacherCache | None = None,
        prepare: Callable[[CausalModel, dict[str, Any]], None] = lambda model, ds: None,
    ) -> None:
        """prepare: called with the model and DeepSpeed's config before that takes the model."""
        ds = self._training_config(train, f"{stage}.train")
        tokenizer = load_tokenizer(start)
        data = self._data_of(stage)
        prompts = build_prompts(data, tokenizer)
        micro = ds["train_micro_batch_size_per_gpu"]
        loader = build_loader(
            data,
            prompts,
            batch_size=ds["train_batch_size"],
            micro_batch_size=micro,
            seed=self.config.seed,
            pad_id=pad_id_of(tokenizer),
        )
        distilling = stage == "distil"
        held_out = self._held_out(prompts) if distilling else []
        loaded = load_sharded(start, ds, self.dtype, self.config.distil.kernels)
        prepare(loaded, ds)
        model = Trained(
            loaded,
            ds,
            gradient_checkpointing=train.gradient_checkpointing,
            schedule=build_schedule(train),
        )
        frozen = self._frozen(teacher, micro) if teacher else None
        on_policy = None
        if distilling:
            on_policy = build_on_policy(
                self.config.distil,
                data,
                self.config.seed,
                loaded,
                prompts.eos_ids,
                dtype=self.dtype,
                pad_id=pad_id_of(tokenizer),
                validation_loss=lambda: model.loss_of(held_out, micro, pad_id_of(tokenizer)),
            )
        loop = Loop(
            model,
            objectives,
            loader,
            self._checkpoints(stage, train.keep_checkpoints),
            LoopSettings(
                stage,
                train.steps,
                train.checkpoint_every,
                train.log_every,
                train.max_bad_steps,
                staged_shares(self.config.distil) if distilling else None,
            ),
            self.dir,
            build_balance(self.config.distil) if distilling else None,
            on_policy,
        )
        if frozen:
            loop.run(lambda batch, counts: distill_step(model, frozen, objectives, batch, counts))
        elif answers:
            loop.run(lambda batch, counts: offline_step(model, answers, objectives, batch, counts))
        else:
            loop.run(lambda batch, counts: finetune_step(model, objectives, batch, counts))
        if loader.describe_skipped():
            self.tell(f"{stage}: {loader.describe_skipped()}")
        self.tell(f"{stage}: {prompts.describe()}")
        config, generation = model.model.model.config, model.model.model.generation_config
        distributed.drain_on_main(
            lambda tensors: write_model(result, config, tensors, generation, tokenizer),
            whole_tensors(model.model),
        )
        model.close()
        if frozen:
            frozen.close()

    def _held_out(self, prompts: PromptBuilder) -> list[Example]:
        """What the validation loss is of, where the share of the student's own texts follows it."""
        student = self.config.distil.sequences.student
        if student is None or student.adaptive is None:
            return []
        data, count = self.config.data, student.adaptive.records
        records = build_records(data, validation=True)
        usable = usable_examples(prompts, records, data.on_bad_record, Counter())
        found = [example for _, example in islice(usable, count)]
        if not found:
            raise UserError(
                "distil.sequences.student.adaptive: data.validation_split has no usable record to "
                "measure the loss on; name another split, or leave adaptive out"
            )
        return found

    def _frozen(self, folder: Path, micro_batch_size: int) -> Frozen:
        ds = frozen_config(self.deepspeed, micro_batch_size=micro_batch_size)
        return Frozen(load_sharded(folder, ds, self.dtype, self.config.distil.kernels), ds)

    def _factorize(self, teacher: Path, start: Path, result: Path) -> None:
        """start: the model that is cut, the teacher or what `shape` made of it."""
        report = self.cutting.factors(teacher, start, result)
        distributed.on_main(write_json, self.dir / "factorization.json", report)
        distributed.on_main(lambda: write_whole(result / "README.md", student_card(report)))
        if distributed.is_main():
            show(factorization_table(report))

    def _describe(self) -> None:
        """Writes the resolved config and the environment into the run folder."""
        told = {
            name: section.model_copy(update={"train": left_to_json(self.deepspeed, section.train)})
            for name, section in (("sft", self.config.sft), ("distil", self.config.distil))
        }
        write_whole(self.dir / "config.yaml", dump_config(self.config.model_copy(update=told)))
        write_json(self.dir / "environment.json", _environment())


def _environment() -> dict[str, Any]:
    packages = ("torch", "deepspeed", "transformers", "datasets", "makd-llm")
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    )
    return {
        "command": without_secrets_in([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "ranks": distributed.world_size(),
        "device": device,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }
