"""The model card of a student: what it was cut from, how, what was measured, how to load it.

A card is README.md of a model folder, with a block of metadata that the Hub reads. It says only
what factorization.json and evaluation.json say, and travels: paths of this machine are not in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import makd_llm
from makd_llm.models.provenance import (
    UNKNOWN,
    Provenance,
    is_hub_id,
    license_of_data,
    provenance_of,
    public_name,
)
from makd_llm.models.source import BUILTIN

METRICS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}

TITLE = "# A low-rank student"
TITLE_MERGED = "# A low-rank student, its factors multiplied out,"
FORM = (
    "Every factorized matrix W is kept as two thin factors, up and down; config.json has the rank "
    "of each."
)
FORM_MERGED = (
    "A dense model of the teacher's architecture, as large as the teacher, which equals the "
    "low-rank student up to rounding. Parameters and ranks below are those of the factors."
)
LOADING = """\
```python
from transformers import pipeline
write = pipeline("text-generation", model="FOLDER", trust_remote_code=True)
```

`trust_remote_code=True` runs modeling_lowrank.py of this folder, which defines the factors and
imports torch and transformers alone; after `import makd_llm` it is not needed. `makd export FOLDER
OUT --merge` writes the dense form, which needs neither."""
LOADING_MERGED = """\
```python
from transformers import pipeline
write = pipeline("text-generation", model="FOLDER")
```"""


def student_card(
    report: Mapping[str, Any],
    *,
    distilled: Mapping[str, str] | None = None,
    data: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a student.

    report: factorization.json. distilled: how it was trained, by name; None: it was not. data: what
    it learnt from and was measured on, as `data.source`. evaluation: evaluation.json, of a run that
    measured it.
    """
    origin = provenance_of(report["teacher"])
    body = [
        f"{TITLE} of {_short(origin)}",
        f"{FORM} Made with makd_llm {makd_llm.__version__}"
        f"{'' if distilled else '; not distilled yet'}.",
        "## How it was made",
        _table(("", ""), _facts(report, origin, distilled, data).items()),
        "## Ranks",
        _table(("role", "matrices", "dense", "rank"), _ranks(report["matrices"])),
        "## What was measured",
        *_measured(report, evaluation),
        "## How to load it",
        LOADING,
        "## Limitations",
        "\n".join(f"- {said}" for said in _limitations(evaluation)),
        "## License",
        _license(origin, data),
    ]
    return _joined(_metadata(origin, data, evaluation), body)


def merged_card(card: str) -> str:
    """The card of a student whose factors are multiplied out, from the student's own."""
    found = ModelCard(card, ignore_metadata_errors=True)
    metadata: Any = found.data
    metadata.tags = [tag for tag in metadata.tags or [] if tag != "low-rank"] or None
    text = found.text.strip()
    for one, other in (
        (f"{TITLE} of", f"{TITLE_MERGED} of"),
        (FORM, FORM_MERGED),
        (LOADING, LOADING_MERGED),
    ):
        text = text.replace(one, other, 1)
    return _joined(metadata, [text])


def _short(origin: Provenance) -> str:
    """The teacher's name without its owner."""
    return (origin.hub_id or origin.name).rpartition("/")[2]


def _joined(metadata: ModelCardData, body: Sequence[str]) -> str:
    return "\n\n".join([f"---\n{metadata.to_yaml()}\n---", *body]) + "\n"


def _metadata(
    origin: Provenance, data: str | None, evaluation: Mapping[str, Any] | None
) -> ModelCardData:
    """What the Hub reads. Values are those of the student, on the validation split."""
    measured = []
    row = evaluation["models"]["student"] if evaluation else {}
    source = public_name(data).removeprefix(BUILTIN) if data else "unknown"
    where: dict[str, Any] = {
        "task_type": "summarization",
        "dataset_type": source,
        "dataset_name": source,
        "dataset_split": "validation",
    }
    if "perplexity" in row:
        value = round(row["perplexity"]["value"], 2)
        measured.append(
            EvalResult(
                **where, metric_type="perplexity", metric_name="perplexity", metric_value=value
            )
        )
    for key, name in METRICS.items():
        if key in row.get("rouge", {}):
            value = round(row["rouge"][key], 2)
            measured.append(
                EvalResult(**where, metric_type=key.lower(), metric_name=name, metric_value=value)
            )
    stated: dict[str, Any] = dict(origin.license)
    return ModelCardData(
        base_model=origin.hub_id,
        datasets=[data] if data and is_hub_id(data) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["low-rank", "makd-llm"],
        model_name=f"low-rank student of {_short(origin)}" if measured else None,
        eval_results=measured or None,
        **stated,
    )


def _facts(
    report: Mapping[str, Any],
    origin: Provenance,
    distilled: Mapping[str, str] | None,
    data: str | None,
) -> dict[str, str]:
    recipe, parameters = report["recipe"], report["parameters"]
    teacher, student = parameters["teacher"], parameters["student"]
    refine, calibration = recipe["refine"], report["calibration"]
    facts = {
        "teacher": origin.name
        if origin.hub_id in (None, origin.name)
        else f"{origin.name} ({origin.hub_id})",
        "parameters": f"{student['total']:,} of {teacher['total']:,} "
        f"({student['total'] / teacher['total']:.1%}); in the factorized matrices "
        f"{student['factorized']:,} of {teacher['factorized']:,} "
        f"({student['factorized'] / teacher['factorized']:.1%})",
        "method": recipe["method"] + (f", refined ({_words(refine)})" if refine else ""),
        "budget": f"{recipe['budget']}, keep_ratio {recipe['keep_ratio']:g}, "
        f"ranks in multiples of {recipe['rank_multiple']}",
        "calibration": f"{calibration['tokens']:,} tokens of {public_name(calibration['data'])}"
        if calibration["tokens"]
        else "none",
    }
    if report.get("shape"):
        facts["shape"] = _words(report["shape"])
    if recipe["embedding"]:
        facts["embedding"] = f"{recipe['embedding']:.0%} kept"
    if distilled:
        facts["distilled"] = _words(distilled)
    if data:
        facts["data"] = f"{public_name(data)}; license: {license_of_data(data)}"
    return facts


def _ranks(matrices: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A row for each role."""
    for role in dict.fromkeys(matrix["role"] for matrix in matrices):
        those = [matrix["rank"] for matrix in matrices if matrix["role"] == role]
        ranks = [rank for rank in those if rank is not None]
        spread = " to ".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else "-"
        yield role, str(len(those)), str(len(those) - len(ranks)), spread


def _measured(report: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> Iterator[str]:
    """What evaluation.json says, and the held-out text of a factorization."""
    held_out = report.get("held_out")
    if held_out:
        found = held_out["perplexity"]
        yield (
            f"Before any distillation: perplexity {found['student']:.2f} (teacher "
            f"{found['teacher']:.2f}) over {held_out['tokens']:,} tokens of "
            f"{public_name(held_out['data'])}."
        )
    if evaluation is None:
        if not held_out:
            yield "Nothing yet."
        return
    models = evaluation["models"]
    columns = {
        key: said
        for key, said in METRICS.items()
        if any(key in r["rouge"] for r in models.values())
    }
    yield _table(
        ("validation split", "parameters", "perplexity", *columns.values()),
        (
            (
                name,
                f"{row['parameters']['total']:,}" if "parameters" in row else "",
                f"{row['perplexity']['value']:.2f}" if "perplexity" in row else "",
                *(f"{row['rouge'][key]:.2f}" for key in columns),
            )
            for name, row in models.items()
        ),
    )
    records = evaluation["records"]
    yield (
        f"Perplexity of {records['perplexity']} references, {evaluation['perplexity_rule']}; ROUGE "
        f"of {records['rouge']} summaries, {evaluation['generation']}. Prompt: "
        f"{evaluation['prompt']}. *teacher* is the one that the student learnt from, tuned if that "
        "was asked for; *factorized* is the student before it learnt; *lead* is the beginning of "
        "the document."
    )
    texts = {name: row["text"] for name, row in models.items() if "text" in row}
    if texts:
        said = ", ".join(f"{name} {text['value']:.2f}" for name, text in texts.items())
        yield f"Perplexity of the text {next(iter(texts.values()))['file']}: {said}."


def _limitations(evaluation: Mapping[str, Any] | None) -> Iterator[str]:
    yield (
        "It has the teacher's knowledge, biases and mistakes, less what its missing parameters "
        "held."
    )
    if evaluation is None:
        yield "It has not been measured as a summarizer: measure it before it is used."
    else:
        yield (
            "Nothing but the table above was measured. Other kinds of text, other languages, "
            "longer documents, and everything about safety are unknown."
        )
    yield "A summary may state what its document does not."


def _license(origin: Provenance, data: str | None) -> str:
    stated = origin.license["license"]
    if stated == UNKNOWN:
        weights = f"The teacher, {origin.name}, states no license that was found here"
    else:
        weights = f"The weights come from {origin.name}, whose license is {stated}"
    named = origin.license.get("license_name")
    link = origin.license.get("license_link")
    more = f" ({', '.join(x for x in (named, link) if x)})" if named or link else ""
    learnt = (
        f" Whether the terms of the data ({public_name(data)}, {license_of_data(data)}) reach a "
        "model that learnt from it is for whoever passes it on to judge."
        if data
        else ""
    )
    return f"{weights}{more}. modeling_lowrank.py, where it is here: Apache-2.0.{learnt}"


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
