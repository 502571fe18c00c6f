"""What a run's models are worth at its end: perplexity and ROUGE of the teacher, the factorized and
the distilled student, how far the students' attention is from the teacher's, and the student's
card. Every function here is collective.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

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
from makd_llm.evaluation.measured import Measured, read_measured, write_measured
from makd_llm.factorize.ladder import name_of
from makd_llm.files import sample_of_folder, sha256_of, write_json, write_whole
from makd_llm.models.source import load_tokenizer
from makd_llm.report.card import merged_card, student_card
from makd_llm.train.build import build_prompts, build_recipe, build_records
from makd_llm.train.engine import Frozen


class Evaluating:
    """Measures as a run's config says, into its folder. frozen: loads a folder for so many records
    at once; tell: says a sentence; under: what a result depends on beside config and model.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        cutting: Cutting,
        frozen: Callable[[Path, int], Frozen],
        tell: Callable[[str], None],
        under: Mapping[str, Any],
    ) -> None:
        self.config, self.dir, self.cutting = config, folder, cutting
        self.frozen, self.tell, self.under = frozen, tell, under

    def write(self, teacher: Path, start: Path, factorized: Path, student: Path) -> None:
        """Writes evaluation.json, attention.json, samples.jsonl and the student's card. start: what
        was cut.
        """
        folders = {"teacher": teacher, "factorized": factorized, "student": student}
        evaluation, found = self._measured(folders)
        distributed.on_main(evaluation.write_samples, self.dir / "samples.jsonl")
        if self.config.evaluation.stages:
            value = {name: found["models"][name]["perplexity"]["value"] for name in folders}
            found["stages"] = self._steps(teacher, start, evaluation, value)
        self._compare_attention(folders, evaluation)
        distributed.on_main(self._write_card, student, found)
        distributed.on_main(write_json, self.dir / "evaluation.json", found)

    def write_baselines(self, teacher: Path, factorized: Path) -> None:
        """Writes baselines.json: what evaluation.json will say of all but the student."""
        _, found = self._measured({"teacher": teacher, "factorized": factorized})
        distributed.on_main(write_json, self.dir / "baselines.json", found)

    def _measured(self, folders: Mapping[str, Path]) -> tuple[Evaluation, dict[str, Any]]:
        """The rows of some models and of the lead. What stands in measured/ is taken from there."""
        asked = self.config.evaluation
        evaluation = self._evaluation(load_tokenizer(folders["teacher"]))
        counts = distributed.on_main(counts_of_folders, folders)
        rows: dict[str, Any] = {}
        for name, folder in folders.items():
            path, key = self.dir / "measured" / f"{name}.json", self._key(folder)
            known = distributed.on_main(read_measured, path, key)
            if known is None:
                self.tell(f"evaluate: {name}")
                row = {"parameters": counts[name].__dict__, **self._row(evaluation, name, folder)}
                known = Measured(row, evaluation.texts[name], evaluation.scores[name])
                distributed.on_main(write_measured, path, key, known)
            else:
                self.tell(f"evaluate: {name} stands in {path}")
                evaluation.texts[name], evaluation.scores[name] = list(known.texts), known.scores
            rows[name] = known.row
        lead = f"lead-{asked.lead_k}"
        rows[lead] = evaluation.lead()
        known = Measured(rows[lead], evaluation.texts[lead], evaluation.scores[lead])
        distributed.on_main(write_measured, self.dir / "measured" / f"{lead}.json", {}, known)
        return evaluation, {**evaluation.settings(), "models": rows}

    def _evaluation(self, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        asked = self.config.evaluation
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
        return Evaluation(
            records,
            build_prompts(self.config.data, tokenizer),
            tokenizer,
            settings,
            asked.records,
            asked.generate_records,
            self.config.data.on_bad_record,
        )

    def _key(self, folder: Path) -> dict[str, Any]:
        """What a model's results depend on."""
        asked = self.config.evaluation
        return {
            "model": distributed.on_main(sample_of_folder, folder),
            "evaluation": asked.model_dump(exclude={"lead_k", "stages"}, mode="json"),
            "text": distributed.on_main(sha256_of, asked.text) if asked.text else None,
            "data": self.config.data.model_dump(mode="json"),
            **self.under,
        }

    def _row(self, evaluation: Evaluation, name: str, folder: Path) -> dict[str, Any]:
        """One model's perplexity and ROUGE."""
        asked, sizes = self.config.evaluation, evaluation.sizes
        engine = self.frozen(folder, asked.batch_size)
        row = evaluate_model(evaluation, name, engine)
        if asked.text:
            row["text"] = evaluate_text(
                engine,
                evaluation.tokenizer,
                asked.text,
                window=asked.text_window,
                stride=asked.text_stride,
                batch_size=asked.batch_size,
                pad_id=sizes.pad_id,
            )
        engine.close()
        return row

    def _compare_attention(self, folders: Mapping[str, Path], evaluation: Evaluation) -> None:
        """Writes attention.json, with the teacher loaded beside one student at a time."""
        asked, pad_id = self.config.evaluation, evaluation.sizes.pad_id
        layers, reason = self._compared(folders)
        chosen = drawn(evaluation.examples, asked.attention_records, self.config.seed)
        looked: dict[str, Divergences] = {}
        if layers:
            self.tell("evaluate: attention")
            teacher = self.frozen(folders["teacher"], asked.batch_size)
            for name in ("factorized", "student"):
                engine = self.frozen(folders[name], asked.batch_size)
                impl = self.config.distil.kernels
                looked[name] = attention_divergence(
                    teacher, engine, layers, chosen, pad_id=pad_id, impl=impl
                )
                engine.close()
            teacher.close()
        distributed.on_main(self._write_attention, layers, reason, looked, len(chosen))

    def _compared(self, folders: Mapping[str, Path]) -> tuple[list[PairedLayer], str | None]:
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
