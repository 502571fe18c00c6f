"""The charts of a report, from the runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from makd_llm.report.charts import HeatMap, IntervalChart, LineChart, Series
from makd_llm.report.contents import Attention, Comparison, Factorization, Matrix, Row, Run
from makd_llm.report.numbers import LEVELS, attention_of, column, ladder_of, level_of, objectives_of
from makd_llm.report.table import kept_share

STAGES = {"distil": "distillation", "sft": "tuning the teacher"}
MOST_HEADS = 64
"""Columns of a heat map; beyond, only layers' means are shown."""


@dataclass
class Student:
    """A factorization that one or more runs began with."""

    names: list[str]
    maps: list[HeatMap]
    charts: list[LineChart]
    ladder: list[dict[str, object]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


@dataclass
class AttentionPanel:
    """What a run's attention was and became; reason: why it was not measured."""

    name: str
    reason: str | None
    said: str = ""
    maps: list[HeatMap] = field(default_factory=list)
    chart: LineChart | None = None


def totals(runs: Sequence[Run]) -> list[LineChart]:
    """The loss that is learnt, of each training stage."""
    return _by_stage(runs, "loss", "loss, {stage}", "nats, weighted sum")


def objectives(runs: Sequence[Run]) -> list[LineChart]:
    """A chart for each objective of distillation, level by level."""
    found: dict[str, list[LineChart]] = {level: [] for level in LEVELS}
    steps = [run.steps_of("distil") for run in runs]
    for name in dict.fromkeys(name for lines in steps for name in objectives_of(lines)):
        level = next(level_of(r, name) for r, s in zip(runs, steps, strict=True) if s)
        said = name.replace("_", " ")
        chart = _chart(runs, "distil", f"loss/{name}", said, f"{level} level")
        found[level] += [chart] if chart else []
    return [chart for level in LEVELS for chart in found[level]]


def speeds(runs: Sequence[Run]) -> list[LineChart]:
    """Throughput and memory over time."""
    return [
        *_by_stage(runs, "tokens_per_second", "throughput, {stage}", "tokens/s", from_zero=True),
        *_by_stage(runs, "peak_memory_MB", "peak memory, {stage}", "MB", from_zero=True),
    ]


def others(runs: Sequence[Run]) -> list[LineChart]:
    """What else a step writes down."""
    found = []
    for name, title in {
        "gradient_norm": "gradient norm",
        "learning_rate": "learning rate",
        "validation_loss": "validation loss",
        "own_share": "share of the student's own texts",
    }.items():
        chart = _chart(runs, "distil", name, title, "")
        found += [chart] if chart else []
    return found


def _by_stage(
    runs: Sequence[Run], name: str, title: str, unit: str, *, from_zero: bool = False
) -> list[LineChart]:
    charts = [
        _chart(runs, stage, name, title.format(stage=said), unit, from_zero=from_zero)
        for stage, said in STAGES.items()
    ]
    return [chart for chart in charts if chart]


def _chart(
    runs: Sequence[Run], stage: str, name: str, title: str, unit: str, *, from_zero: bool = False
) -> LineChart | None:
    """One value over the steps of a stage, a line for each run; None where no run has it."""
    series = [
        Series(run.name, column(run.steps_of(stage), name), number)
        for number, run in enumerate(runs)
    ]
    if not any(s.finite for s in series):
        return None
    return LineChart(title, "step", series, unit, from_zero)


def students(runs: Sequence[Run]) -> list[Student]:
    """Each factorization once, with the names of the runs that began with it."""
    found: list[tuple[Factorization, list[Run]]] = []
    for run in runs:
        if run.factorization is None:
            continue
        same = next((those for f, those in found if f.matrices == run.factorization.matrices), None)
        if same is not None:
            same.append(run)
        else:
            found.append((run.factorization, [run]))
    return [_student(factorization, those) for factorization, those in found]


def _student(found: Factorization, runs: Sequence[Run]) -> Student:
    held_out = found.held_out
    residuals: Sequence[float | None] = [m.residual for m in found.matrices]
    if held_out:
        residuals = held_out.matrix_residuals
    maps = []
    placed = [(m, r) for m, r in zip(found.matrices, residuals, strict=True) if m.layer is not None]
    if placed:
        roles = list(dict.fromkeys(m.role for m, _ in placed))
        layers = sorted({m.layer for m, _ in placed if m.layer is not None})
        cells = [[[p for p in placed if _at(p[0], n, r)] for r in roles] for n in layers]
        names = [str(n) for n in layers]
        kept = [[_mean([_share(m) for m, _ in cell]) for cell in row] for row in cells]
        ranks = [[_ranks([m for m, _ in cell]) for cell in row] for row in cells]
        lost = [[_mean([r for _, r in cell]) for cell in row] for row in cells]
        maps = [
            HeatMap(
                "Residual, measured on held-out text" if held_out else "Residual, as calibrated",
                "layer",
                roles,
                list(zip(names, lost, strict=True)),
                texts=[
                    [
                        "–" if rank == "–" else "" if value is None else f"{value:.3f}"
                        for value, rank in zip(*row, strict=True)
                    ]
                    for row in zip(lost, ranks, strict=True)
                ],
                note=f"relative error of the outputs over {held_out.tokens:,} tokens of "
                f"{held_out.data}"
                if held_out
                else "relative error that is left, in the norm that the method weighs by",
            ),
            HeatMap(
                "Rank",
                "layer",
                roles,
                list(zip(names, kept, strict=True)),
                texts=ranks,
                most=1.0,
                say=lambda share: f"{share:.0%} kept",
                note="coloured by the share of the matrix's parameters that its factors have; "
                "– is a matrix that stayed dense",
            ),
        ]
    charts = []
    if held_out and held_out.layer_residuals:
        points = [(float(n), value) for n, value in enumerate(held_out.layer_residuals)]
        series = [Series("student before distillation", points)]
        title = "distance of the layers' outputs from the teacher's, held-out"
        charts.append(
            LineChart(title, "layer", series, "of their length", from_zero=True, by_run=False)
        )
    facts = {str(k): str(v) for k, v in found.recipe.items() if v not in (None, {}, [])}
    return Student([run.name for run in runs], maps, charts, ladder_of(runs[0]), facts)


def _at(matrix: Matrix, layer: int, role: str) -> bool:
    return matrix.layer == layer and matrix.role == role


def _share(matrix: Matrix) -> float:
    return kept_share(matrix.model_dump())


def _ranks(matrices: Sequence[Matrix]) -> str:
    """The rank, or of a layer's experts the least and the largest."""
    ranks = [m.rank for m in matrices if m.rank is not None]
    if not ranks:
        return "–" if matrices else ""
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}–{max(ranks)}"


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(measured) if measured else None


def attention_overview(runs: Sequence[Run]) -> LineChart | None:
    """The finished students' mean divergence by layer, a line for each run; None for fewer than
    two.
    """
    series = []
    for number, run in enumerate(runs):
        layers = run.attention.models.get("student", []) if run.attention else []
        points = [(float(n), fmean(heads)) for n, heads in enumerate(layers)]
        series += [Series(run.name, points, number)] if points else []
    if len(series) < 2:
        return None
    return LineChart("after distillation", "layer", series, "nats per query", from_zero=True)


def attentions(runs: Sequence[Run]) -> list[AttentionPanel]:
    """Of each run that has been evaluated: before and after, by layer and head."""
    return [_attention(run.name, run.attention) for run in runs if run.attention]


_MOMENTS = {"factorized": "before distillation", "student": "after distillation"}


def _attention(name: str, found: Attention) -> AttentionPanel:
    numbers = attention_of(found)
    if reason := numbers.get("not_measured"):
        return AttentionPanel(name, reason)
    means = {model: numbers["models"][model]["mean"] for model in found.models}
    said = ", ".join(f"{_MOMENTS.get(m, m)} {value:.4f}" for m, value in means.items())
    series = [
        Series(_MOMENTS.get(model, model), [(float(n), fmean(h)) for n, h in enumerate(layers)], i)
        for i, (model, layers) in enumerate(found.models.items())
    ]
    chart = LineChart(
        "mean over heads", "layer", series, "nats per query", from_zero=True, by_run=False
    )
    most = max(
        (h for layers in found.models.values() for heads in layers for h in heads), default=0.0
    )
    width = max(len(layer.heads) for layer in found.layers)
    if width > MOST_HEADS:
        return AttentionPanel(name, None, said, [], chart)
    names = [
        str(layer.student)
        if layer.student == layer.teacher
        else f"{layer.student} (teacher's {layer.teacher})"
        for layer in found.layers
    ]
    maps = [
        HeatMap(
            _MOMENTS.get(model, model).capitalize(),
            "layer",
            [str(head) for head in range(width)],
            [
                (layer, [*heads, *[None] * (width - len(heads))])
                for layer, heads in zip(names, layers, strict=True)
            ],
            most=most,
            say="{:.2f}".format if most >= 0.2 else "{:.3f}".format,
            note="by the student's query heads; both maps share one scale",
        )
        for model, layers in found.models.items()
    ]
    return AttentionPanel(name, None, said, maps, chart)


def intervals(comparison: Comparison) -> list[IntervalChart]:
    """ROUGE-Lsum of the rows with their intervals, a chart for each share that is kept."""
    rows = comparison.groups or comparison.rows
    kept = sorted({r.keep_ratio for r in rows if r.keep_ratio is not None}, reverse=True)
    shares: list[float | None] = [*kept] or [None]
    found = []
    for share in shares:
        those = [r for r in rows if r.keep_ratio in (share, None) and r.rougeLsum is not None]
        title = "ROUGE-Lsum" + (f", keep {share:g}" if share is not None else "")
        bars = [_interval(row) for row in those]
        bars.sort(key=lambda bar: -bar[1])
        if any(row.keep_ratio == share for row in those):
            found.append(IntervalChart(title, bars))
    return found


def rivals(comparison: Comparison) -> dict[str, str]:
    """The rows that others are tested against, in the comparison's order: name -> label."""
    rows = [*comparison.groups, *comparison.rows]
    tested = {name for row in rows for name in row.against or {}}
    labels = {row.name: row.label or row.name for row in rows}
    return {name: label for name, label in labels.items() if name in tested}


def _interval(row: Row) -> tuple[str, float, float, float, bool]:
    assert row.rougeLsum is not None
    found = row.rougeLsum
    return row.label or row.name, found.value, found.low, found.high, row.keep_ratio is None
