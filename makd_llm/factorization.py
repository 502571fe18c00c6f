"""`makd factorize`: a low-rank student from a teacher and a text, without a run folder.

What comes out is a Hugging Face folder like any student's, with a model card (README.md),
`factorization.json` in it (the recipe, the rank and residual of every matrix, and, where held-out
text is given, what the student lost on it), and the same as a picture.
"""

import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from makd_llm import distributed
from makd_llm.checkpoint.export import counts_of_folders
from makd_llm.checkpoint.folder import read_config, unwritable
from makd_llm.config import DataConfig
from makd_llm.data.batch import Batch, batches_of, pad_id_of
from makd_llm.data.prompt import usable_examples
from makd_llm.data.schema import Example
from makd_llm.data.text import read_tokens, spread_windows
from makd_llm.errors import UserError
from makd_llm.factorize.ladder import components_in, measured_rungs, name_of
from makd_llm.factorize.residuals import perplexity, residuals
from makd_llm.factorize.student import MatrixReport, Recipe, clear_parts, factorize
from makd_llm.files import write_json, write_whole
from makd_llm.models.source import load_tokenizer, resolve_model
from makd_llm.report.card import student_card
from makd_llm.report.page import write_report
from makd_llm.train.build import build_prompts, build_records

TEXT_SUFFIXES = (".txt", ".md")
REPORT = "factorization.json"


@dataclass(frozen=True)
class TextSettings:
    """What a factorization reads. data: for calibration, a plain text or records; held_out: to
    measure on, likewise, or None. At most `samples` windows (or records) of `window` tokens each;
    None: 2048, or as many as the model has positions.
    """

    data: str | None
    held_out: str | None
    samples: int
    window: int | None
    batch: int


def factorize_model(
    model: str,
    out: Path,
    recipe: Recipe,
    text: TextSettings,
    *,
    dtype: torch.dtype,
    stages: bool = False,
) -> dict[str, Any]:
    """Writes the student to `out` and returns what factorization.json says. Collective.

    stages: also measure the students on the way to it (ladder.py), which takes text.held_out.
    """
    if text.held_out is not None and text.held_out == text.data and Path(text.data).is_file():
        raise UserError(
            f"--held-out {text.held_out} is the file that --data calibrates on, which tells "
            "nothing of other text; name another"
        )
    if stages and text.held_out is None:
        raise UserError("--stages measures students; name a text for it in --held-out")
    teacher = resolve_model(model)
    tokenizer = load_tokenizer(teacher)
    text = replace(text, window=_window(teacher, text.window))
    calibration: list[Batch] = []
    if recipe.needs_calibration:
        if text.data is None:
            raise UserError(
                f"--data is missing: method {recipe.method} needs text to calibrate on, a .txt "
                "file or records"
            )
        calibration = _batches(text.data, "--data", text, tokenizer)
    held_out = _batches(text.held_out, "--held-out", text, tokenizer) if text.held_out else []
    started = time.monotonic()
    scratch = out.with_name(f".{out.name}.stages") if stages else None
    matrices = factorize(
        teacher,
        out,
        recipe,
        calibration,
        tokenizer=tokenizer,
        dtype=dtype,
        components=components_in(scratch, recipe) if scratch else None,
        tell=_tell,
        keep_parts=True,
    )
    counts = distributed.on_main(counts_of_folders, {"teacher": teacher, "student": out})
    report: dict[str, Any] = {
        "teacher": model,
        "recipe": asdict(recipe),
        "calibration": {
            "data": text.data,
            "tokens": sum(distributed.gather_objects(_tokens(calibration))),
        },
        "seconds": time.monotonic() - started,
        "ranks": distributed.world_size(),
        "matrices": [asdict(matrix) for matrix in matrices],
        "parameters": {name: asdict(count) for name, count in counts.items()},
    }
    if held_out:
        report["held_out"] = measured = _measured(teacher, out, held_out, text, matrices, dtype)
        if scratch:
            found = measured["perplexity"]
            before = measured_rungs(
                teacher,
                recipe,
                calibration,
                scratch,
                lambda folder: perplexity(folder, held_out, dtype=dtype),
                dtype=dtype,
                tell=_tell,
            )
            measured["stages"] = {"teacher": found["teacher"], **before} | {
                name_of(recipe): found["student"]
            }
    distributed.on_main(_write, out, report)
    distributed.on_main(clear_parts, out)
    return report


def _write(out: Path, report: dict[str, Any]) -> None:
    try:
        write_json(out / REPORT, report)
        write_whole(out / "README.md", student_card(report))
        write_report(out)
    except OSError as error:
        raise unwritable(out, error) from error


def _window(teacher: Path, asked: int | None) -> int:
    positions = getattr(read_config(teacher), "max_position_embeddings", None)
    if asked is None:
        return min(2048, positions or 2048)
    if positions is not None and asked > positions:
        raise UserError(
            f"--window {asked}: {teacher} has only {positions} positions "
            "(max_position_embeddings); lower it"
        )
    return asked


def _measured(
    teacher: Path,
    student: Path,
    batches: list[Batch],
    text: TextSettings,
    matrices: list[MatrixReport],
    dtype: torch.dtype,
) -> dict[str, Any]:
    found = residuals(teacher, student, batches, dtype=dtype)
    return {
        "data": text.held_out,
        "tokens": sum(distributed.gather_objects(_tokens(batches))),
        "perplexity": {
            "teacher": found.teacher,
            "student": found.student,
        },
        "matrix_residuals": [
            None if m.layer is None else found.matrix[m.layer, m.key] for m in matrices
        ],
        "layer_residuals": found.layer,
    }


def _batches(
    source: str, key: str, text: TextSettings, tokenizer: PreTrainedTokenizerBase
) -> list[Batch]:
    """This rank's share; the same number of batches on every rank."""
    assert text.window is not None
    if source.endswith(TEXT_SUFFIXES):
        tokens, _ = read_tokens(Path(source), tokenizer, key)
        examples = spread_windows(tokens, window=text.window, count=text.samples)
    else:
        examples = _records(source, text, tokenizer, validation=key == "--held-out")
    world = distributed.world_size()
    usable = len(examples) // world * world
    if usable == 0:
        raise UserError(
            f"{key} {source}: {len(examples)} samples are too few for {world} ranks; "
            "give more, or use fewer ranks"
        )
    return batches_of(
        examples[distributed.rank() : usable : world], text.batch, pad_id_of(tokenizer)
    )


def _records(
    source: str, text: TextSettings, tokenizer: PreTrainedTokenizerBase, *, validation: bool
) -> list[Example]:
    """Of the training split, or the validation split; a single file has one for both."""
    assert text.window is not None
    data = DataConfig(source=source, max_length=text.window)
    records = build_records(data, validation=validation)
    found = usable_examples(build_prompts(data, tokenizer), records, data.on_bad_record, Counter())
    return [example for _, example in islice(found, text.samples)]


def _tokens(batches: list[Batch]) -> int:
    return sum(int(batch.n_tokens) for batch in batches)


def _tell(text: str) -> None:
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)  # standard output is the report's
