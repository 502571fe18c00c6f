"""The model card of a factorized student: what it was cut from, how, and what it lost."""

from collections.abc import Mapping
from typing import Any

import makd_llm


def student_card(
    report: Mapping[str, Any],
    *,
    distilled: Mapping[str, str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a student, with the block that the Hub reads.

    report: factorization.json. distilled: how it was trained, by name; None: it was not.
    evaluation: evaluation.json, of a run that measured it.
    """
    recipe, parameters = report["recipe"], report["parameters"]
    teacher, student = parameters["teacher"], parameters["student"]
    metadata = [
        "---",
        *([f"base_model: {report['teacher']}"] if _is_hub_id(report["teacher"]) else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [low-rank, makd-llm]",
        "---",
    ]
    refine = recipe["refine"]
    facts = {
        "teacher": report["teacher"],
        "method": recipe["method"] + (f", refined ({_words(refine)})" if refine else ""),
        "budget": f"{recipe['budget']}, keep_ratio {recipe['keep_ratio']:g}, "
        f"ranks in multiples of {recipe['rank_multiple']}",
        **({"shape": _words(report["shape"])} if report.get("shape") else {}),
        **({"embedding": f"{recipe['embedding']:.0%} kept"} if recipe["embedding"] else {}),
        "calibration": f"{report['calibration']['tokens']:,} tokens of "
        f"{report['calibration']['data']}"
        if report["calibration"]["tokens"]
        else "none",
        "parameters": f"{student['total']:,} of {teacher['total']:,} "
        f"({student['total'] / teacher['total']:.1%}); in the factorized matrices "
        f"{student['factorized']:,} of {teacher['factorized']:,} "
        f"({student['factorized'] / teacher['factorized']:.1%})",
        "matrices": f"{sum(m['rank'] is not None for m in report['matrices'])} factored, "
        f"{sum(m['rank'] is None for m in report['matrices'])} dense",
    }
    held_out = report.get("held_out")
    if held_out:
        found = held_out["perplexity"]
        facts["perplexity"] = (
            f"{found['student']:.2f} (teacher {found['teacher']:.2f}) over "
            f"{held_out['tokens']:,} tokens of {held_out['data']}"
        )
    if distilled:
        facts["distilled"] = _words(distilled)
    if evaluation:
        models = evaluation["models"]
        facts |= {
            f"{name} (validation)": _measured(models[name])
            for name in models
            if name != "factorized"
        }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(
        [
            *metadata,
            "# A low-rank student",
            "",
            "Every factorized matrix W is kept as two thin factors, up and down. Made with "
            f"makd_llm {makd_llm.__version__}{'' if distilled else '; not distilled yet'}.",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)",
            "```",
            "",
            "`trust_remote_code` is not needed after `import makd_llm`. Ranks and residuals of all "
            "matrices: factorization.json.",
            "",
        ]
    )


def _measured(row: Mapping[str, Any]) -> str:
    """What evaluation.json says of one model."""
    found = [f"perplexity {row['perplexity']['value']:.2f}"] if "perplexity" in row else []
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeLsum": "ROUGE-Lsum"}
    return ", ".join(found + [f"{said} {row['rouge'][key]:.2f}" for key, said in names.items()])


def _is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
