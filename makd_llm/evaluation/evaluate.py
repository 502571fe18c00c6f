"""One model measured on the validation split: perplexity of the references, and ROUGE of what it
writes.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from makd_llm.data.batch import Batch
from makd_llm.data.prompt import PromptBuilder, usable_examples
from makd_llm.data.records import RecordList, describe_skipped
from makd_llm.data.schema import Example, OnBadRecord, Record
from makd_llm.data.text import read_tokens, text_windows
from makd_llm.errors import UserError
from makd_llm.evaluation import rouge
from makd_llm.evaluation.baselines import lead_k
from makd_llm.evaluation.perplexity import Perplexity, perplexity
from makd_llm.generation.summaries import summarize


class Model(Protocol):
    """What can be evaluated: a forward that takes a function for the head, and a generation."""

    def __call__(self, batch: Batch, at_head: Any = None) -> Any: ...
    def generate(self, batch: Batch, **arguments: Any) -> Tensor: ...


@dataclass(frozen=True)
class Settings:
    """Sizes of an evaluation; max_new_tokens bounds what is written."""

    batch_size: int
    max_new_tokens: int
    pad_id: int
    lead_k: int


class Evaluation:
    """The records of an evaluation, and the texts that models wrote for them."""

    def __init__(
        self,
        records: RecordList,
        prompts: PromptBuilder,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        perplexity_records: int | None,
        rouge_records: int | None,
        on_bad_record: OnBadRecord,
    ) -> None:
        self.prompts, self.tokenizer, self.sizes = prompts, tokenizer, settings
        self.skipped: Counter[str] = Counter(records.skipped)
        usable = list(usable_examples(prompts, records, on_bad_record, self.skipped))
        self.examples: list[Example] = [example for _, example in usable][:perplexity_records]
        self.records: list[Record] = [record for record, _ in usable][:rouge_records]
        self.texts: dict[str, list[str]] = {}
        self.scores: dict[str, Mapping[str, Sequence[float]]] = {}
        """By model: ROUGE of every record, and the nats of every example."""
        if not usable:
            raise UserError(
                "data.validation_split: no record is usable "
                f"({describe_skipped(self.skipped) or 'it is empty'}); nothing can be measured"
            )

    def rouge_of(self, name: str, texts: Sequence[str]) -> dict[str, float]:
        """Mean ROUGE F1 (x 100) of texts for the records; keeps the texts for samples.jsonl, and
        each record's scores.
        """
        found = rouge.score(texts, [record.references for record in self.records])
        self.texts[name], self.scores[name] = list(texts), found.pairs
        return found.mean

    def lead(self) -> dict[str, Any]:
        """The row of the lead-k baseline: the document's first k sentences."""
        k = self.sizes.lead_k
        return {
            "rouge": self.rouge_of(
                f"lead-{k}", [lead_k(record.document, k) for record in self.records]
            )
        }

    def settings(self) -> dict[str, Any]:
        """What has to be known to compare these numbers with others."""
        return {
            "records": {"perplexity": len(self.examples), "rouge": len(self.records)},
            "skipped": dict(self.skipped),
            "skipped_in_words": describe_skipped(self.skipped),
            "prompt": self.prompts.describe(),
            "perplexity_rule": "of the reference summary's tokens and its end, given the prompt",
            "generation": f"greedy, at most {self.sizes.max_new_tokens} new tokens",
            "rouge_settings": rouge.SETTINGS,
        }

    def write_samples(self, path: Path) -> None:
        """One line per record: document, references, and what each model wrote."""
        lines = []
        for index, record in enumerate(self.records):
            texts = {name: written[index] for name, written in self.texts.items()}
            sample = {
                "id": record.id,
                "document": record.document,
                "references": record.references,
                **texts,
            }
            lines.append(json.dumps(sample, ensure_ascii=False) + "\n")
        path.write_text("".join(lines), encoding="utf-8")


def evaluate_perplexity(evaluation: Evaluation, model: Model) -> Perplexity:
    """Of the references, given their documents. Collective."""
    sizes = evaluation.sizes
    return perplexity(model, evaluation.examples, batch_size=sizes.batch_size, pad_id=sizes.pad_id)


def evaluate_model(evaluation: Evaluation, name: str, model: Model) -> dict[str, Any]:
    """One row: perplexity and ROUGE. Collective."""
    sizes = evaluation.sizes
    found = evaluate_perplexity(evaluation, model)
    prompts = [evaluation.prompts.prompt_ids(r, sizes.max_new_tokens) for r in evaluation.records]
    texts = summarize(
        model.generate,
        evaluation.tokenizer,
        prompts,
        batch_size=sizes.batch_size,
        max_new_tokens=sizes.max_new_tokens,
        eos_ids=evaluation.prompts.eos_ids,
        pad_id=sizes.pad_id,
    )
    row = {"perplexity": _as_json(found), "rouge": evaluation.rouge_of(name, texts)}
    evaluation.scores[name] = {**evaluation.scores[name], "nats": found.each}
    return row


def evaluate_text(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    window: int,
    stride: int,
    batch_size: int,
    pad_id: int,
) -> dict[str, Any]:
    """Perplexity of a text file by a sliding window, with bits per byte. Collective.

    No BOS is added beyond what the tokenizer adds by itself; the file's first token is not
    predicted. Raises UserError where the file is missing, empty or not UTF-8.
    """
    tokens, size = read_tokens(path, tokenizer, "evaluation.text")
    try:
        windows = text_windows(tokens, window=window, stride=stride)
    except ValueError as error:
        raise UserError(f"evaluation.text_stride: {error}") from None
    found = perplexity(model, windows, batch_size=batch_size, pad_id=pad_id, utf8_bytes=size)
    return {"file": path.name, "window": window, "stride": stride, **_as_json(found)}


def _as_json(found: Perplexity) -> dict[str, Any]:
    more = {"bits_per_byte": found.bits_per_byte} if found.utf8_bytes else {}
    summed = {name: value for name, value in asdict(found).items() if name != "each"}
    return {"value": found.value, **summed, **more}
