"""What would fail after hours is found before: configs, the teacher, the data, the disk."""

import shutil
from pathlib import Path

from makd_llm.checkpoint.folder import read_config
from makd_llm.checks import check_teacher
from makd_llm.cluster.sizes import sizes_of, student_config
from makd_llm.comparison.grid import TEACHER, Grid, Item
from makd_llm.comparison.record import Stamps
from makd_llm.config import RunConfig
from makd_llm.data.batch import pad_id_of
from makd_llm.data.prompt import usable_examples
from makd_llm.data.records import describe_skipped
from makd_llm.data.schema import BadRecord
from makd_llm.errors import UserError
from makd_llm.files import nearest
from makd_llm.models.families import family_of
from makd_llm.models.source import load_tokenizer, resolve_model
from makd_llm.pipeline import Run
from makd_llm.train.build import build_loader, build_objectives, build_prompts, build_records
from makd_llm.train.deepspeed_config import dtype_of, training_config

CHECKPOINT_BYTES = 16
"""Of a number: fp32 weights, Adam's two moments, the weights that are computed with."""


def check(grid: Grid, stamps: Stamps) -> list[str]:
    """Checks all that the rows of the grid need; sentences on what was found.

    Raises UserError for the first thing that would fail.
    """
    items = [item for item in grid.needed() if not stamps.stands(item)]
    given = resolve_model(grid.base.teacher.model)
    for item in items:
        _check_config(grid, item, given)
    return [*_check_data(grid, given), _check_disk(grid, items, given)]


def _check_config(grid: Grid, item: Item, given: Path) -> None:
    """As the run itself will, for its number of ranks, and without loading anything."""
    config = item.config
    try:
        run = Run(config, grid.config.ds)
        for section, stage in (("sft", config.sft), ("distil", config.distil)):
            if section == "distil" or config.sft.enabled:
                training_config(
                    run.deepspeed,
                    stage.train,
                    world_size=grid.config.ranks,
                    ds_path=grid.config.ds,
                    section=f"{section}.train",
                )
        check_teacher(given, config)
        if run.shape is None:  # else the pairing is known when the student is there
            model = read_config(given)
            build_objectives(config.distil, family_of(model), model.num_hidden_layers)
    except UserError as error:
        raise UserError(f"{item.place}: {error}") from None


def _check_data(grid: Grid, given: Path) -> list[str]:
    """Every record of both splits is read and fitted into the window, as the runs will."""
    base, train = grid.base, grid.base.distil.train
    tokenizer = load_tokenizer(given)
    prompts = build_prompts(base.data, tokenizer)
    try:
        loader = build_loader(
            base.data,
            prompts,
            batch_size=train.batch_size or 1,
            micro_batch_size=train.batch_size or 1,
            seed=base.seed,
            pad_id=pad_id_of(tokenizer),
        )
        loader.next_step()
        records = build_records(base.data, validation=True)
        skipped = records.skipped.copy()
        held_out = list(usable_examples(prompts, records, base.data.on_bad_record, skipped))
    except BadRecord as bad:
        raise UserError(f"data: {bad}; or set data.on_bad_record=skip") from None
    if not held_out:
        raise UserError("data.validation_split: no record is usable; nothing can be measured")
    epochs = train.steps * loader.epoch
    asked = base.evaluation
    measured = min(asked.generate_records or len(held_out), len(held_out))
    left_out = [s for s in (loader.describe_skipped(), describe_skipped(skipped)) if s]
    return [
        f"data: a row goes through {epochs:.2f} of the training split, and is measured on "
        f"{measured} of {len(held_out)} validation records"
        + (f" ({'; '.join(left_out)})" if left_out else "")
    ]


def _check_disk(grid: Grid, items: list[Item], given: Path) -> str:
    """What the runs will leave, and the checkpoints of the largest while it is under way."""
    teacher = read_config(given)
    weight = dtype_of(Run(grid.base, grid.config.ds).deepspeed).itemsize
    whole, multiple = sizes_of(teacher).numbers, grid.base.student.rank_multiple
    students = {
        keep: sizes_of(student_config(teacher, keep, multiple)).numbers
        for keep in grid.config.keep_ratios
    }
    stays, most = 0, 0
    for item in items:
        if item.place == TEACHER:
            stays, most = stays + whole * weight, max(most, _checkpoints(item.config, whole, "sft"))
            continue
        numbers = students[item.config.student.keep_ratio]
        if item.until == "baselines":
            stays += 4 * numbers  # factors are stored in fp32
        else:
            merged = whole if item.config.merge else 0
            stays += (numbers + merged) * weight
            most = max(most, _checkpoints(item.config, numbers, "distil"))
    needed = stays + most
    free = shutil.disk_usage(nearest(grid.folder)).free
    if needed > free:
        raise UserError(
            f"{grid.folder}: about {needed / 1e9:.1f} GB are needed ({stays / 1e9:.1f} GB stay), "
            f"{free / 1e9:.1f} GB are free there; free some, or set folder"
        )
    return (
        f"disk: about {needed / 1e9:.1f} GB ({stays / 1e9:.1f} GB stay), {free / 1e9:.1f} GB free"
    )


def _checkpoints(config: RunConfig, numbers: int, stage: str) -> int:
    """Bytes of the checkpoints that a stage has at once: those that it keeps, and one new."""
    train = config.sft.train if stage == "sft" else config.distil.train
    return (train.keep_checkpoints + 1) * numbers * CHECKPOINT_BYTES
