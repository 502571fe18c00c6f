"""A run in numbers: what `makd report --json` prints, and what the page's tables are made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from makd_llm.report.contents import Attention, Comparison, Factorization, ModelRow, Perplexity, Run
from makd_llm.report.table import steps_of

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
LEVELS = ("model", "layer", "matrix")
_BELOW = {
    "matrix": "matrix",
    "auxiliary": "matrix",
    "attention": "layer",
    "hidden": "layer",
    "relations": "layer",
    "local": "layer",
}
"""The level of each kind of objective; all others compare the output."""


def numbers(runs: Sequence[Run], comparison: Comparison | None = None) -> dict[str, Any]:
    """Everything that is measured, as JSON: numbers that are none (nan, inf) become null."""
    found: dict[str, Any] = {"runs": [numbers_of(run) for run in runs]}
    if comparison is not None:
        found["comparison"] = comparison.model_dump()
    plain: dict[str, Any] = _plain(found)
    return plain


def numbers_of(run: Run) -> dict[str, Any]:
    """One run."""
    trained = [stage for stage in ("sft", "distil") if run.steps_of(stage)]
    return {
        "name": run.name,
        "state": run.state,
        "models": models_of(run),
        "training": {stage: training_of(run, stage) for stage in trained},
        "factorization": factorization_of(run.factorization) if run.factorization else None,
        "steps_from_the_teacher": ladder_of(run),
        "attention": attention_of(run.attention) if run.attention else None,
        "not_measured": run.notes,
    }


def models_of(run: Run) -> dict[str, dict[str, Any]]:
    """Each model's size, perplexity and ROUGE, and the share of the teacher's that it keeps; before
    an evaluation what the factorization says.
    """
    rows = run.evaluation.models if run.evaluation else _cut(run.factorization)
    teacher = rows.get("teacher")
    return {
        name: {
            "parameters": row.parameters.total if row.parameters else None,
            "in_blocks": row.parameters.blocks if row.parameters else None,
            "perplexity": row.perplexity.value if row.perplexity else None,
            **{key: row.rouge.get(key) for key in ROUGE},
            "share_of_teacher": _share(row, teacher),
        }
        for name, row in rows.items()
    }


def _cut(found: Factorization | None) -> dict[str, ModelRow]:
    """Sizes, and perplexities where they were measured on held-out text."""
    if found is None:
        return {}
    measured = found.held_out.perplexity if found.held_out else {}
    return {
        "factorized" if name == "student" else name: ModelRow(
            parameters=size,
            perplexity=Perplexity(value=measured[name]) if name in measured else None,
        )
        for name, size in found.parameters.items()
    }


def _share(row: ModelRow, teacher: ModelRow | None) -> float | None:
    """Of the teacher's ROUGE-Lsum."""
    own, whole = row.rouge.get("rougeLsum"), (teacher.rouge if teacher else {}).get("rougeLsum")
    return None if own is None or not whole or row is teacher else own / whole


def training_of(run: Run, stage: str) -> dict[str, Any]:
    """A training stage, as far as it has come; rates and tokens of the steps that were logged."""
    steps = run.steps_of(stage)
    losses = column(steps, "loss")
    return {
        "steps": steps[-1]["step"],
        "of": run.setting(f"{stage}.train.steps"),
        "loss": _ends(losses),
        "objectives": {
            name: {"level": level_of(run, name), **(_ends(column(steps, f"loss/{name}")) or {})}
            for name in objectives_of(steps)
        },
        "tokens_per_step": _of(fmean, [y for _, y in column(steps, "tokens")]),
        "tokens_per_second": _of(median, [y for _, y in column(steps, "tokens_per_second")]),
        "seconds_per_step": _of(median, [y for _, y in column(steps, "seconds")]),
        "peak_memory_MB": _of(max, [y for _, y in column(steps, "peak_memory_MB")]),
        "skipped_steps": int(_of(max, [y for _, y in column(steps, "skipped_steps")]) or 0),
    }


def column(steps: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) wherever a value was written."""
    return [
        (float(line["step"]), float(line[name]))
        for line in steps
        if isinstance(line.get(name), int | float)
    ]


def objectives_of(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all that was learnt."""
    names = (key for line in steps for key in line if key.startswith("loss/"))
    return [name.removeprefix("loss/") for name in dict.fromkeys(names)]


def level_of(run: Run, name: str) -> str:
    """The level of an objective, by its kind in the config, else by its own name."""
    objectives = run.setting("distil.objectives")
    settings = objectives.get(name) if isinstance(objectives, Mapping) else None
    kind = settings.get("objective") if isinstance(settings, Mapping) else None
    return _BELOW.get(str(kind or name), "model")


def factorization_of(found: Factorization) -> dict[str, Any]:
    """By role: how many matrices, their ranks, and what they lose."""
    by_role = {}
    for role in dict.fromkeys(m.role for m in found.matrices):
        those = [m for m in found.matrices if m.role == role]
        ranks = [m.rank for m in those if m.rank is not None]
        by_role[role] = {
            "matrices": len(those),
            "dense": len(those) - len(ranks),
            "rank": [min(ranks), max(ranks)] if ranks else None,
            "residual": fmean(m.residual for m in those),
        }
    sizes = {name: {"blocks": s.blocks, "total": s.total} for name, s in found.parameters.items()}
    return {
        "teacher": found.teacher,
        "recipe": found.recipe,
        "parameters": sizes,
        "by_role": by_role,
    }


def ladder_of(run: Run) -> list[dict[str, Any]]:
    """What each step from the teacher on is worth, where it was measured."""
    of_evaluation = run.evaluation.stages if run.evaluation else None
    held_out = run.factorization.held_out if run.factorization else None
    stages = of_evaluation or (held_out.stages if held_out else None)
    if not stages or not all(math.isfinite(v) and v > 0 for v in stages.values()):
        return []
    return [asdict(step) for step in steps_of(stages)]


def attention_of(found: Attention) -> dict[str, Any]:
    """Mean divergence of each model, in all and by layer."""
    if found.not_measured or not found.models:
        return {"not_measured": found.not_measured or "attention.json names no model"}
    return {
        "divergence": found.divergence,
        "records": found.records,
        "tokens": found.tokens,
        "models": {
            name: {
                "mean": fmean(head for layer in layers for head in layer),
                "by_layer": [fmean(layer) for layer in layers],
                "by_head": layers,
            }
            for name, layers in found.models.items()
        },
        "layers": [layer.model_dump() for layer in found.layers],
    }


def _ends(values: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    return {"first": values[0][1], "last": values[-1][1]} if values else None


def _of(how: Any, values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return float(how(finite)) if finite else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
