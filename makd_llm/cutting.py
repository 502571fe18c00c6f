"""What makes a run's student out of its teacher: its shape, its factors, and, for comparison, the
students on the way to it. Every function here is collective.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from makd_llm import distributed
from makd_llm.checkpoint.export import counts_of_folders
from makd_llm.config import RunConfig
from makd_llm.data.batch import Batch, batches_of, pad_id_of
from makd_llm.data.prompt import usable_examples
from makd_llm.data.records import describe_skipped
from makd_llm.errors import UserError
from makd_llm.factorize.ladder import measured_rungs
from makd_llm.factorize.student import factorize
from makd_llm.models.source import load_tokenizer
from makd_llm.reshape.reshape import Shape, reshape
from makd_llm.train.build import build_prompts, build_recipe, build_records


class Cutting:
    """Cuts students as a run's config says. dtype: in which layers run; tell: says a sentence."""

    def __init__(self, config: RunConfig, dtype: torch.dtype, tell: Callable[[str], None]) -> None:
        self.config, self.dtype, self.tell = config, dtype, tell

    def shape(self, shape: Shape, teacher: Path, result: Path) -> None:
        """Writes the teacher in another shape, dense."""
        tokenizer = load_tokenizer(teacher)
        batches = self._calibration("shape", tokenizer) if shape.needs_calibration else []
        reshape(
            teacher,
            result,
            shape,
            batches,
            tokenizer=tokenizer,
            dtype=self.dtype,
            tell=self.tell,
        )

    def factors(self, teacher: Path, start: Path, result: Path) -> dict[str, Any]:
        """Writes the factorized student, and returns what factorization.json says of it.

        start: the model that is cut, the teacher or what `shape` made of it.
        """
        settings = self.config.student
        tokenizer = load_tokenizer(teacher)
        recipe = build_recipe(settings)
        batches = self._calibration("factorize", tokenizer) if recipe.needs_calibration else []
        reports = factorize(
            start,
            result,
            recipe,
            batches,
            tokenizer=tokenizer,
            dtype=self.dtype,
            tell=self.tell,
            keep_origin=start != teacher,
        )
        folders = {"teacher": teacher, "student": result}
        if start != teacher:
            folders["shaped"] = start
        counts = distributed.on_main(counts_of_folders, folders)
        shape = settings.model_dump(include={"depth", "width", "heads"}, exclude_none=True)
        return {
            "teacher": self.config.teacher.model,
            "recipe": asdict(recipe),
            "shape": shape,
            "calibration": {
                "data": self.config.data.source,
                "tokens": sum(distributed.gather_objects(sum(int(b.n_tokens) for b in batches))),
            },
            "ranks": distributed.world_size(),
            "matrices": [asdict(r) for r in reports],
            "parameters": {n: asdict(c) for n, c in counts.items()},
        }

    def before(
        self, start: Path, scratch: Path, measure: Callable[[Path], float]
    ) -> dict[str, float]:
        """What is measured of each student on the way to the factorized one, by name."""
        recipe = build_recipe(self.config.student)
        calibrated = recipe.needs_calibration
        batches = self._calibration("evaluate", load_tokenizer(start)) if calibrated else []
        return measured_rungs(
            start, recipe, batches, scratch, measure, dtype=self.dtype, tell=self.tell
        )

    def _calibration(self, stage: str, tokenizer: Any) -> list[Batch]:
        """This rank's training examples for calibration; the same number on every rank."""
        prompts = build_prompts(self.config.data, tokenizer)
        wanted, world = self.config.student.calibration_records, distributed.world_size()
        records = build_records(self.config.data)
        unusable: Counter[str] = Counter()
        pairs = usable_examples(prompts, records, self.config.data.on_bad_record, unusable)
        examples = [example for _, example in islice(pairs, wanted)]
        if skipped := describe_skipped(records.skipped + unusable):
            self.tell(f"{stage}: {skipped}")
        usable = len(examples) // world * world
        if usable == 0:
            raise UserError(
                f"{self.config.data.source}: {len(examples)} usable records cannot calibrate "
                f"{world} ranks; give more, or use fewer ranks"
            )
        self.tell(f"{stage}: calibration on {usable} prompts")
        mine = examples[distributed.rank() : usable : world]
        return batches_of(mine, self.config.student.calibration_batch, pad_id_of(tokenizer))
