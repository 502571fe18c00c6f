"""A run from teacher to table: sft -> (shape) -> factorize -> distil -> (merge) -> evaluate.

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
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from makd_kernels.attention_kl import choose_impl
from makd_llm import distributed
from makd_llm.checkpoint.export import counts_of_folders, merge, write_model
from makd_llm.checkpoint.folder import read_config
from makd_llm.checkpoint.state import Checkpoints
from makd_llm.checks import check_same_tokenizer, check_settings, check_teacher
from makd_llm.config import RunConfig, TrainConfig, dump_config
from makd_llm.cutting import Cutting
from makd_llm.data.batch import pad_id_of
from makd_llm.data.records import RecordList, content_of
from makd_llm.errors import UserError
from makd_llm.evaluation.evaluate import (
    Evaluation,
    Settings,
    evaluate_model,
    evaluate_perplexity,
    evaluate_text,
)
from makd_llm.factorize.ladder import name_of
from makd_llm.files import sample_of_folder, sha256_of, write_whole
from makd_llm.models.causal import CausalModel
from makd_llm.models.families import family_of
from makd_llm.models.pairing import pair
from makd_llm.models.projections import Projections
from makd_llm.models.sharded import load_sharded
from makd_llm.models.source import load_tokenizer, resolve_model
from makd_llm.objectives.combine import Objectives
from makd_llm.objectives.head import CrossEntropy
from makd_llm.report.card import student_card
from makd_llm.report.plots import factorization_plot, stages_plot
from makd_llm.report.table import factorization_table, show, show_evaluation
from makd_llm.reshape.reshape import Shape, check_shape
from makd_llm.stages import STAGES, Key, Stages, digest
from makd_llm.train.build import (
    build_balance,
    build_chains,
    build_loader,
    build_objectives,
    build_projections,
    build_prompts,
    build_recipe,
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
from makd_llm.train.step import distill_step, finetune_step

SHAPES = {"depth", "width", "heads"}
"""The sections of `student` that the stage `shape` is about; the others are factorize's."""


class Run:
    """One run: its config, its DeepSpeed JSON, its folder. Whatever contradicts itself in the two
    files is found here, before processes are joined and anything is loaded.
    """

    def __init__(self, config: RunConfig, ds_path: Path) -> None:
        self.config = config
        self.ds_path = ds_path
        self.deepspeed = read_deepspeed_config(ds_path)
        self.dtype = dtype_of(self.deepspeed)
        self.dir = config.run_dir.expanduser()
        self.stages = Stages(self.dir)
        self.cutting = Cutting(config, self.dtype, self.tell)
        self.shape = build_shape(config.student)
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
        lock = distributed.on_main(_lock, self.dir)
        try:
            self._execute(wanted)
        finally:
            if distributed.is_main():
                _LOCKS.pop(lock).release()

    def _execute(self, wanted: tuple[str, ...]) -> None:
        given = resolve_model(self.config.teacher.model)
        check_teacher(given, self.config)
        if self.shape is not None:
            check_shape(read_config(given), self.shape)
        # Looked at first: a split that is missing is not to be found at the end.
        validation_file = self._content_of_data(validation=True) if "evaluate" in wanted else None
        # Whole in the first keys and not as a digest, so that a change can be named.
        first = {
            "teacher": self.config.teacher.model_dump(),
            "teacher_files": distributed.on_main(sample_of_folder, given),
            "data": self.config.data.model_dump(exclude={"validation_source", "validation_split"}),
            "train_file": self._content_of_data(validation=False),
            "seed": self.config.seed,
            "dtype": str(self.dtype),
        }
        teacher, after = given, ""
        if self.config.sft.enabled:
            teacher = self.dir / "teacher"
            key = {**first, **self._key("sft", "")}
            self._stage("sft", key, teacher, partial(self._sft, given, teacher))
            after = digest(key)
        if "shape" not in wanted:
            return
        start = teacher
        if self.shape is not None:
            start = self.dir / "shaped"
            key = {**first, "student": self._shape_key(self.shape), "after": after}
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
        key = {**first, "student": cut, "after": after}
        make = partial(self._factorize, teacher, start, factorized)
        self._stage("factorize", key, factorized, make)
        if "distil" not in wanted:
            return
        student = self.dir / "student"
        key = self._key("distil", digest(key))
        self._stage("distil", key, student, partial(self._distil, teacher, factorized, student))
        self._merged(student, {"after": digest(key)})
        if "evaluate" not in wanted:
            return
        asked = self.config.evaluation
        key = {
            "evaluation": asked.model_dump(),
            "validation": self.config.data.model_dump(
                include={"validation_source", "validation_split"}
            ),
            "validation_file": validation_file,
            "text_file": distributed.on_main(sha256_of, asked.text) if asked.text else None,
            "after": digest(key),
        }
        result = self.dir / "evaluation.json"
        self._stage(
            "evaluate", key, result, partial(self._evaluate, teacher, start, factorized, student)
        )
        evaluation = distributed.on_main(lambda: json.loads(result.read_text(encoding="utf-8")))
        if distributed.is_main():
            show_evaluation(evaluation)

    def _content_of_data(self, *, validation: bool) -> str | None:
        """A data file that was edited in place is other data, and its stages run again."""
        data = self.config.data
        source = data.validation_source if validation and data.validation_source else data.source
        return distributed.on_main(
            partial(content_of, streaming=data.streaming and not validation),
            source,
            data.validation_split if validation else data.train_split,
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
        section = getattr(self.config, stage).model_dump()
        for free in ("checkpoint_every", "keep_checkpoints", "log_every"):
            section["train"].pop(free)
        return {stage: section, "ds": self.deepspeed, "after": after}

    def _stage(self, name: str, key: Key, result: Path, make: Callable[[], None]) -> None:
        if distributed.on_main(lambda: self.stages.stands(name, key) and result.exists()):
            self.tell(f"{name}: stands in {result}")
            return
        change = distributed.on_main(self.stages.change, name, key)
        if change:
            self.tell(f"{name}: runs again, because {change}")
            self._checkpoints(name, 1).clear()
        distributed.on_main(self.stages.mark, name, key, done=False)
        distributed.on_main(self._describe)
        torch.manual_seed(self.config.seed)
        make()
        gc.collect()
        distributed.on_main(self.stages.mark, name, key, done=True)

    def _checkpoints(self, stage: str, keep: int) -> Checkpoints:
        return Checkpoints(self.dir / "checkpoints" / stage, keep=keep, tell=self.tell)

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

    def _distil(self, teacher: Path, factorized: Path, result: Path) -> None:
        config = read_config(factorized)
        check_same_tokenizer(teacher, factorized)
        pairing = pair(config, read_config(teacher), self.config.distil.layer_map)
        objectives = build_objectives(
            self.config.distil, family_of(config), config.num_hidden_layers, pairing
        )
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
            teacher=teacher if objectives.needs_teacher else None,
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
        prepare: Callable[[CausalModel, dict[str, Any]], None] = lambda model, ds: None,
    ) -> None:
        """prepare: called with the model and DeepSpeed's config before that takes the model."""
        ds = self._training_config(train, f"{stage}.train")
        tokenizer = load_tokenizer(start)
        prompts = build_prompts(self.config.data, tokenizer)
        micro = ds["train_micro_batch_size_per_gpu"]
        loader = build_loader(
            self.config.data,
            prompts,
            batch_size=ds["train_batch_size"],
            micro_batch_size=micro,
            seed=self.config.seed,
            pad_id=pad_id_of(tokenizer),
        )
        loaded = load_sharded(start, ds, self.dtype, self.config.distil.kernels)
        prepare(loaded, ds)
        model = Trained(
            loaded,
            ds,
            gradient_checkpointing=train.gradient_checkpointing,
            schedule=build_schedule(train),
        )
        frozen = self._frozen(teacher, micro) if teacher else None
        distilling = stage == "distil"
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
        )
        if frozen:
            loop.run(lambda batch, counts: distill_step(model, frozen, objectives, batch, counts))
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

    def _frozen(self, folder: Path, micro_batch_size: int) -> Frozen:
        ds = frozen_config(self.deepspeed, micro_batch_size=micro_batch_size)
        return Frozen(load_sharded(folder, ds, self.dtype, self.config.distil.kernels), ds)

    def _factorize(self, teacher: Path, start: Path, result: Path) -> None:
        """start: the model that is cut, the teacher or what `shape` made of it."""
        report = self.cutting.factors(teacher, start, result)
        distributed.on_main(_write_json, self.dir / "factorization.json", report)
        distributed.on_main(factorization_plot, report, self.dir / "factorization.png")
        distributed.on_main(write_whole, result / "README.md", student_card(report))
        if distributed.is_main():
            show(factorization_table(report))

    def _evaluate(self, teacher: Path, start: Path, factorized: Path, student: Path) -> None:
        asked = self.config.evaluation
        tokenizer = load_tokenizer(teacher)
        prompts = build_prompts(self.config.data, tokenizer)
        limits = (asked.records, asked.generate_records)
        records = build_records(
            self.config.data,
            validation=True,
            limit=None if None in limits else max(n for n in limits if n),
        )
        assert isinstance(records, RecordList)
        settings = Settings(
            asked.batch_size, asked.max_new_tokens, pad_id_of(tokenizer), asked.lead_k
        )
        evaluation = Evaluation(
            records,
            prompts,
            tokenizer,
            settings,
            asked.records,
            asked.generate_records,
            self.config.data.on_bad_record,
        )
        folders = {"teacher": teacher, "factorized": factorized, "student": student}
        counts = distributed.on_main(counts_of_folders, folders)
        rows: dict[str, Any] = {}
        for name, folder in folders.items():
            self.tell(f"evaluate: {name}")
            engine = self._frozen(folder, asked.batch_size)
            rows[name] = {
                "parameters": counts[name].__dict__,
                **evaluate_model(evaluation, name, engine),
            }
            if asked.text:
                rows[name]["text"] = evaluate_text(
                    engine,
                    tokenizer,
                    asked.text,
                    window=asked.text_window,
                    stride=asked.text_stride,
                    batch_size=asked.batch_size,
                    pad_id=settings.pad_id,
                )
            engine.close()
        rows[f"lead-{asked.lead_k}"] = evaluation.lead()
        distributed.on_main(evaluation.write_samples, self.dir / "samples.jsonl")

        found = {**evaluation.settings(), "models": rows}
        if asked.stages:
            value = {name: rows[name]["perplexity"]["value"] for name in folders}
            found["stages"] = self._steps(teacher, start, evaluation, value)
            distributed.on_main(stages_plot, found["stages"], self.dir / "stages.png")
        distributed.on_main(self._write_card, student, found)
        distributed.on_main(_write_json, self.dir / "evaluation.json", found)

    def _write_card(self, student: Path, evaluation: dict[str, Any]) -> None:
        """README.md of the distilled student: how it was made, and what was measured."""
        report = json.loads((self.dir / "factorization.json").read_text(encoding="utf-8"))
        train = self.config.distil.train
        distilled = {
            "preset": self.config.distil.preset,
            "steps": f"{train.steps} of {train.batch_size} records of {self.config.data.source}",
        }
        card = student_card(report, distilled=distilled, evaluation=evaluation)
        write_whole(student / "README.md", card)

    def _steps(
        self, teacher: Path, start: Path, evaluation: Evaluation, measured: dict[str, float]
    ) -> dict[str, float]:
        """Perplexities from the teacher to the student, with those of the steps between."""

        def perplexity_of(folder: Path) -> float:
            engine = self._frozen(folder, self.config.evaluation.batch_size)
            found = evaluate_perplexity(evaluation, engine).value
            engine.close()
            return found

        return {
            "teacher": measured["teacher"],
            **({"shaped": perplexity_of(start)} if start != teacher else {}),
            **self.cutting.before(start, self.dir / "before", perplexity_of),
            name_of(build_recipe(self.config.student)): measured["factorized"],
            "distilled": measured["student"],
        }

    def _describe(self) -> None:
        """Writes the resolved config and the environment into the run folder."""
        told = {
            name: section.model_copy(update={"train": left_to_json(self.deepspeed, section.train)})
            for name, section in (("sft", self.config.sft), ("distil", self.config.distil))
        }
        write_whole(self.dir / "config.yaml", dump_config(self.config.model_copy(update=told)))
        _write_json(self.dir / "environment.json", _environment())


_LOCKS: dict[str, FileLock] = {}


def _lock(run_dir: Path) -> str:
    """Makes the folder and keeps a second run out of it; a killed process's lock goes with it."""
    lock = FileLock(run_dir / ".lock", timeout=0)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:  # an OSError too, hence first
        raise UserError(
            f"{run_dir}: another run is at work in this folder; wait for it, or set run_dir"
        ) from None
    except OSError as error:
        raise UserError(
            f"run_dir {run_dir}: cannot be written ({error.strerror}); choose another"
        ) from None
    _LOCKS[str(run_dir)] = lock
    return str(run_dir)


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False))


def _environment() -> dict[str, Any]:
    packages = ("torch", "deepspeed", "transformers", "datasets", "makd-llm")
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    )
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "ranks": distributed.world_size(),
        "device": device,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }
