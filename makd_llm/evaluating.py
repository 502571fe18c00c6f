"""What a run's models are worth at its end: perplexity and ROUGE of the teacher, the factorized and
the distilled student, how far the students' attention is from the teacher's, and the student's
card. Every function here is collective.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from makd_llm import distributed
from makd_llm.checkpoint.export import counts_of_folders
from makd_llm.checkpoint.folder import read_config
from makd_llm.config import RunConfig
from makd_llm.cutting import Cutting
from makd_llm.data.batch import pad_id_of
from makd_llm.data.records import RecordList
from makd_llm.errors import UserError
from makd_llm.evaluation.attention import (
    DIVERGENCE,
    Divergences,
    PairedLayer,
    attention_divergence,
    drawn,
    paired_layers,
)
from makd_llm.evaluation.evaluate import (
    Evaluation,
    Settings,
    evaluate_model,
    evaluate_perplexity,
    evaluate_text,
)
from makd_llm.factorize.ladder import name_of
from makd_llm.files import write_json, write_whole
from makd_llm.models.source import load_tokenizer
from makd_llm.report.card import merged_card, student_card
from makd_llm.train.build import build_prompts, build_recipe, build_records
from makd_llm.train.engine import Frozen


class Evaluating:
    """Measures as a run's config says, into its folder. frozen: loads a folder for so many records
    at once; tell: says a sentence.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        cutting: Cutting,
        frozen: Callable[[Path, int], Frozen],
        tell: Callable[[str], None],
    ) -> None:
        self.config, self.dir, self.cutting = config, folder, cutting
        self.frozen, self.tell = frozen, tell

    def write(self, teacher: Path, start: Path, factorized: Path, student: Path) -> None:
        """Writes evaluation.json, attention.json, samples.jsonl and the student's card. start: what
        was cut.
        """
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
        rows = self._measured(folders, evaluation)
        rows[f"lead-{asked.lead_k}"] = evaluation.lead()
        distributed.on_main(evaluation.write_samples, self.dir / "samples.jsonl")

        found = {**evaluation.settings(), "models": rows}
        if asked.stages:
            value = {name: rows[name]["perplexity"]["value"] for name in folders}
            found["stages"] = self._steps(teacher, start, evaluation, value)
        distributed.on_main(self._write_card, student, found)
        distributed.on_main(write_json, self.dir / "evaluation.json", found)

    def _measured(self, folders: dict[str, Path], evaluation: Evaluation) -> dict[str, Any]:
        """A row for each model; and attention.json. The teacher stays loaded for the latter, beside
        one student at a time.
        """
        asked, sizes = self.config.evaluation, evaluation.sizes
        counts = distributed.on_main(counts_of_folders, folders)
        layers, reason = self._compared(folders)
        chosen = drawn(evaluation.examples, asked.attention_records, self.config.seed)
        rows: dict[str, Any] = {}
        looked: dict[str, Divergences] = {}
        teacher: Frozen | None = None
        for name, folder in folders.items():
            self.tell(f"evaluate: {name}")
            engine = self.frozen(folder, asked.batch_size)
            rows[name] = {
                "parameters": counts[name].__dict__,
                **evaluate_model(evaluation, name, engine),
            }
            if asked.text:
                rows[name]["text"] = evaluate_text(
                    engine,
                    evaluation.tokenizer,
                    asked.text,
                    window=asked.text_window,
                    stride=asked.text_stride,
                    batch_size=asked.batch_size,
                    pad_id=sizes.pad_id,
                )
            if layers and name == "teacher":
                teacher = engine
                continue
            if teacher:
                impl = self.config.distil.kernels
                looked[name] = attention_divergence(
                    teacher, engine, layers, chosen, pad_id=sizes.pad_id, impl=impl
                )
            engine.close()
        if teacher:
            teacher.close()
        distributed.on_main(self._write_attention, layers, reason, looked, len(chosen))
        return rows

    def _compared(self, folders: dict[str, Path]) -> tuple[list[PairedLayer], str | None]:
        """The layers whose attention is compared, or none and why."""
        if not self.config.evaluation.attention_records:
            return [], None
        student, teacher = (read_config(folders[name]) for name in ("student", "teacher"))
        try:
            return paired_layers(student, teacher, self.config.distil.layer_map), None
        except UserError as error:
            self.tell(f"evaluate: the attention is not compared: {error}")
            return [], str(error)

    def _write_attention(
        self,
        layers: list[PairedLayer],
        reason: str | None,
        looked: dict[str, Divergences],
        records: int,
    ) -> None:
        """What was measured, or why not; nothing where it is switched off."""
        path = self.dir / "attention.json"
        if not layers and reason is None:
            path.unlink(missing_ok=True)
            return
        found = {
            "divergence": DIVERGENCE,
            "unit": "nats per query, mean over all tokens of prompt and reference",
            "records": records if layers else 0,
            "tokens": max((found.tokens for found in looked.values()), default=0),
            "seed": self.config.seed,
            "not_measured": reason,
            "layers": [asdict(layer) for layer in layers],
            "models": {name: found.by_head for name, found in looked.items()},
        }
        write_json(path, found)

    def _write_card(self, student: Path, evaluation: dict[str, Any]) -> None:
        """README.md of the distilled student: how it was made, and what was measured."""
        report = json.loads((self.dir / "factorization.json").read_text(encoding="utf-8"))
        train = self.config.distil.train
        distilled = {
            "preset": self.config.distil.preset,
            "steps": f"{train.steps} of {train.batch_size} records",
            **self._targets(),
        }
        card = student_card(
            report, distilled=distilled, data=self.config.data.source, evaluation=evaluation
        )
        write_whole(student / "README.md", card)
        merged = student.with_name(f"{student.name}-merged")
        if merged.is_dir():
            write_whole(merged / "README.md", merged_card(card))

    def _targets(self) -> dict[str, str]:
        """Said where the student did not learn from the references."""
        asked = self.config.distil.sequences
        if asked.source == "data":
            return {}
        return {"targets": f"the teacher's own summaries ({asked.generation.method})"}

    def _steps(
        self, teacher: Path, start: Path, evaluation: Evaluation, measured: dict[str, float]
    ) -> dict[str, float]:
        """Perplexities from the teacher to the student, with those of the steps between."""

        def perplexity_of(folder: Path) -> float:
            engine = self.frozen(folder, self.config.evaluation.batch_size)
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
