"""comparison.json: the table of a comparison as plain values, from what its runs have left.

A row is one run, or a baseline; a group is a row over its seeds. What is not there yet is null.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from filelock import FileLock

from makd_llm.comparison.analysis import analysis_of
from makd_llm.comparison.grid import Grid
from makd_llm.comparison.reading import Found, read_rows
from makd_llm.comparison.tables import as_csv, as_markdown
from makd_llm.evaluation import rouge
from makd_llm.evaluation.against import METRICS, differences, scores_of
from makd_llm.evaluation.measured import Measured
from makd_llm.evaluation.significance import METHODS, mean_interval
from makd_llm.files import write_json, write_whole

NUMBERS = ("parameters", "tokens", "seconds", "peak_memory_MB", "perplexity")


def publish(grid: Grid) -> dict[str, Any]:
    """Writes comparison.json, and the same as CSV and Markdown; returns it."""
    grid.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(grid.folder / ".publish.lock"):
        found = results(grid)
        write_json(grid.folder / "comparison.json", found)
        write_whole(grid.folder / "comparison.csv", as_csv(found))
        write_whole(grid.folder / "comparison.md", as_markdown(found))
    return found


def results(grid: Grid) -> dict[str, Any]:
    """comparison.json of what there is now."""
    rows = read_rows(grid)
    teacher = next((_means([f]) for f in rows if f.row.baseline == "teacher" and f.measured), {})
    by_place = {(f.row.name, f.row.keep_ratio, f.row.seed): f for f in rows}
    groups: dict[tuple[str, float | None], list[Found]] = {}
    for one in rows:
        groups.setdefault((one.row.name, one.row.keep_ratio), []).append(one)
    made = {
        "name": grid.config.name,
        "teacher": grid.base.teacher.model,
        "data": grid.base.data.source,
        "settings": _settings(grid),
        "rows": [_row(grid, one, by_place, teacher) for one in rows],
        "groups": [_group(grid, those, by_place, teacher) for those in groups.values()],
        "equal_tokens": equal_tokens(rows),
    }
    return {**made, "analysis": analysis_of(made)}


Places = Mapping[tuple[str, float | None, int | None], Found]


def _row(
    grid: Grid, found: Found, by_place: Places, teacher: Mapping[str, float]
) -> dict[str, Any]:
    row = found.row
    return {
        "name": row.name,
        "label": row.label,
        "keep_ratio": row.keep_ratio,
        "seed": row.seed,
        "run": None if row.item is None else row.item.place,
        "state": found.state,
        "error": found.error,
        **_numbers(found),
        **_measures([found], teacher),
        "against": _against(grid, [found], by_place, whole=False),
    }


def _group(
    grid: Grid, those: Sequence[Found], by_place: Places, teacher: Mapping[str, float]
) -> dict[str, Any]:
    """A row over its seeds; spread: the standard deviation between them, null for one."""
    done = [one for one in those if one.state == "done"]
    first, failed = those[0].row, next((one for one in those if one.state == "failed"), None)
    state = "done" if len(done) == len(those) else "failed" if failed else "waiting"
    numbers = [_numbers(one) for one in done]
    columns = {name: [n[name] for n in numbers if n[name] is not None] for name in NUMBERS}
    columns |= {metric: [_means([one])[metric] for one in done] for metric in METRICS}
    return {
        "name": first.name,
        "label": first.label,
        "keep_ratio": first.keep_ratio,
        "seeds": [one.row.seed for one in done if one.row.seed is not None],
        "run": first.item.place if first.item is not None and len(those) == 1 else None,
        "state": state,
        "error": failed.error if failed else None,
        **{name: fmean(columns[name]) if columns[name] else None for name in NUMBERS},
        **_measures(done, teacher),
        "against": _against(grid, done, by_place, whole=True),
        "spread": {n: stdev(values) if len(values) > 1 else None for n, values in columns.items()},
    }


def _numbers(found: Found) -> dict[str, Any]:
    measured = {} if found.measured is None else found.measured.row
    size, perplexity = measured.get("parameters"), measured.get("perplexity")
    return {
        "parameters": size["total"] if size else None,
        "tokens": sum(found.tokens) if found.tokens else None,
        "seconds": sum(found.seconds) if found.seconds else None,
        "peak_memory_MB": found.peak_memory_MB,
        "perplexity": perplexity["value"] if perplexity else None,
    }


def _measures(those: Sequence[Found], teacher: Mapping[str, float]) -> dict[str, Any]:
    """ROUGE of one row, or of its seeds together, and as a share of the teacher's."""
    if not any(one.measured for one in those):
        return dict.fromkeys((*METRICS, "share_of_teacher"))
    means, scores = _means(those), scores_of(_measured(those))
    share = {m: means[m] / teacher[m] if teacher[m] else None for m in METRICS if teacher}
    return {
        **{metric: asdict(mean_interval(scores[metric])) for metric in METRICS},
        "share_of_teacher": share or None,
    }


def _against(
    grid: Grid, those: Sequence[Found], by_place: Places, *, whole: bool
) -> dict[str, Any]:
    """Differences from the rows that others are tested against, by name. whole: of all seeds that
    there are, so that a row is tested only if both have the same.
    """
    own = {one.row.seed: one for one in those if one.measured}
    if not own:
        return {}
    own_row, against = those[0].row, {}
    for name in grid.config.against:
        others = {
            seed: other
            for (row, keep, seed), other in by_place.items()
            if other.measured and row == name and keep == own_row.keep_ratio
        }
        alike = own.keys() == others.keys() if whole else own.keys() <= others.keys()
        if name == own_row.name or not alike:
            continue
        found = differences(_measured(own.values()), _measured(others[seed] for seed in own))
        against[name] = {metric: asdict(difference) for metric, difference in found.items()}
    return against


def _measured(those: Iterable[Found]) -> list[Measured]:
    return [one.measured for one in those if one.measured]


def _means(those: Sequence[Found]) -> dict[str, float]:
    return {metric: float(s.mean()) for metric, s in scores_of(_measured(those)).items()}


def equal_tokens(rows: Sequence[Found]) -> dict[str, Any]:
    """Whether all finished rows of a seed saw as many tokens in every step, and a sentence on it.

    The order of batches is a function of the seed and the data alone, so they see the same; this
    holds it against what was counted.
    """
    trained = [one for one in rows if one.tokens]
    first = {one.row.seed: one for one in reversed(trained)}
    differing = [one for one in trained if one.tokens != first[one.row.seed].tokens]
    if not trained:
        return {"equal": None, "said": "No row has learnt yet."}
    if differing:
        one, other = differing[0], first[differing[0].row.seed]
        said = (
            f"TOKENS DIFFER: {one.row.words} saw {sum(one.tokens):,}, {other.row.words} "
            f"{sum(other.tokens):,}"
        )
        more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        return {"equal": False, "said": said + more + "."}
    counts = {sum(one.tokens) for one in first.values()}
    each = " or ".join(f"{count:,}" for count in sorted(counts))
    return {
        "equal": True,
        "said": f"Every row saw {each} tokens in {len(trained[0].tokens)} steps, the same number "
        "in every step of a seed.",
    }


def _settings(grid: Grid) -> dict[str, str]:
    """What has to be known to read the table, or to make it again."""
    base, train = grid.base, grid.base.distil.train
    asked, sft = base.evaluation, base.sft.train
    tuned = f"{sft.steps} steps of {sft.batch_size} records, learning rate {sft.learning_rate:g}"
    return {
        "teacher's tuning": tuned if base.sft.enabled else "none",
        "student": f"{base.student.method}, {base.student.budget}, keep ratios "
        + ", ".join(f"{keep:g}" for keep in grid.config.keep_ratios),
        "distillation": f"{train.steps} steps of {train.batch_size} records, learning rate "
        f"{train.learning_rate:g}",
        "window": f"{base.data.max_length} tokens",
        "seeds": ", ".join(str(seed) for seed in grid.config.seeds),
        "perplexity": f"of {_count(asked.records)} references",
        "summaries": f"greedy, {_count(asked.generate_records)} documents, at most "
        f"{asked.max_new_tokens} new tokens",
        "ROUGE": ", ".join(f"{key}: {value}" for key, value in rouge.SETTINGS.items()),
        **METHODS,
        "DeepSpeed": grid.config.ds.name,
    }


def _count(number: int | None) -> str:
    return "all" if number is None else f"at most {number}"
