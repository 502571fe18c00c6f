"""Perplexity of every factorization method at every keep_ratio, in one table.

    python benchmarks/factorization.py --calibrate valid.txt --test test.txt

Each row is a student cut from the teacher and measured on the test text in windows that do not
overlap, every token but a window's first predicted. A row that stands in the CSV under the same
settings is not made again, so an interrupted table goes on.
"""

import argparse
import csv
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from makd_llm import distributed
from makd_llm.data.batch import Batch, batches_of, pad_id_of
from makd_llm.data.text import read_tokens, spread_windows
from makd_llm.factorize.refine import Refinement
from makd_llm.factorize.residuals import perplexity
from makd_llm.factorize.student import Recipe, factorize
from makd_llm.models.source import load_tokenizer, resolve_model
from measure import RESULTS, say, where, write

ROWS: dict[str, dict[str, object]] = {
    "svd": {"method": "svd"},
    "fwsvd": {"method": "fwsvd"},
    "asvd": {"method": "asvd"},
    "whitened": {"method": "whitened"},
    "sequential": {"method": "sequential"},
    "refitted": {"method": "refitted"},
    "fisher": {"method": "fisher"},
    "whitened, greedy": {"method": "whitened", "budget": "greedy"},
    "whitened, sensitivity": {"method": "whitened", "budget": "sensitivity"},
    "fisher, greedy": {"method": "fisher", "budget": "greedy"},
    "whitened + refinement": {"method": "whitened", "refine": Refinement()},
    "fisher, greedy + refinement": {
        "method": "fisher",
        "budget": "greedy",
        "refine": Refinement(),
    },
}


def main() -> None:
    """Makes the missing rows, writes each as soon as it is measured, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--calibrate", type=Path, required=True, help="a .txt file")
    parser.add_argument("--test", type=Path, required=True, help="a .txt file")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--test-samples", type=int, default=10**9, help="test windows")
    parser.add_argument("--batch", type=int, default=1, help="windows; of a step of refinement too")
    parser.add_argument("--rank-multiple", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS / "factorization.csv")
    asked = parser.parse_args()
    distributed.quiet()
    distributed.init()
    teacher = resolve_model(asked.teacher)
    tokenizer = load_tokenizer(teacher)
    batches: dict[str, list[Batch]] = {}
    for name, count in (("calibrate", asked.samples), ("test", asked.test_samples)):
        tokens, _ = read_tokens(getattr(asked, name), tokenizer, f"--{name}")
        windows = spread_windows(tokens, window=asked.window, count=count)
        batches[name] = batches_of(windows, asked.batch, pad_id_of(tokenizer))
    settings = (
        f"{asked.teacher}; calibrated on {_tokens(batches['calibrate'])} tokens of "
        f"{asked.calibrate.name}, measured on {_tokens(batches['test'])} of {asked.test.name}; "
        f"windows of {asked.window}, {asked.batch} at a time; ranks in multiples of "
        f"{asked.rank_multiple}; bfloat16"
    )
    stored = _read(asked.out)
    rows = [r for r in stored if r["settings"] == settings]
    others = [r for r in stored if r["settings"] != settings]
    done = {(r["method"], float(str(r["keep_ratio"]))) for r in rows}
    with tempfile.TemporaryDirectory() as scratch:
        if ("teacher", 1.0) not in done:
            row = _row("teacher", 1.0, perplexity(teacher, batches["test"], dtype=torch.bfloat16))
            _add(rows, {**row, "seconds": "", "settings": settings}, others, asked.out)
        for name in asked.rows:
            for keep in asked.keep:
                if (name, keep) not in done:
                    say(f"{name}, keep {keep}")
                    recipe = Recipe(keep, rank_multiple=asked.rank_multiple, **ROWS[name])  # type: ignore[arg-type]
                    row = _made(name, recipe, teacher, batches, Path(scratch))
                    _add(rows, {**row, "settings": settings}, others, asked.out)
            shutil.rmtree(Path(scratch) / "student", ignore_errors=True)
    _show(rows, settings)


def _made(
    name: str, recipe: Recipe, teacher: Path, batches: Mapping[str, list[Batch]], scratch: Path
) -> dict[str, object]:
    started = time.monotonic()
    reports = factorize(
        teacher,
        scratch / "student",
        recipe,
        batches["calibrate"],
        tokenizer=None,
        dtype=torch.bfloat16,
        components=scratch / f"components-{recipe.calibrated_as}",
    )
    seconds = time.monotonic() - started
    found = perplexity(scratch / "student", batches["test"], dtype=torch.bfloat16)
    stored = sum(
        r.rows * r.columns if r.rank is None else r.rank * (r.rows + r.columns) for r in reports
    )
    kept = stored / sum(r.rows * r.columns for r in reports)
    row = _row(name, recipe.keep_ratio, found)
    return {**row, "kept": round(kept, 4), "seconds": round(seconds, 1)}


def _row(name: str, keep: float, found: float) -> dict[str, object]:
    return {"method": name, "keep_ratio": keep, "kept": keep, "perplexity": round(found, 3)}


def _add(
    rows: list[dict[str, object]],
    row: dict[str, object],
    others: list[dict[str, object]],
    out: Path,
) -> None:
    """others: rows of other settings, which stay in the file."""
    rows.append({**row, **where("cpu")})
    write([*rows, *others], out)


def _read(path: Path) -> list[dict[str, object]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _show(rows: Iterable[Mapping[str, object]], settings: str) -> None:
    found = {(r["method"], float(str(r["keep_ratio"]))): float(str(r["perplexity"])) for r in rows}
    keeps = sorted({keep for name, keep in found if name != "teacher"}, reverse=True)
    table = Table(title=f"perplexity (teacher {found['teacher', 1.0]:.2f})", caption=settings)
    for column in ["method", *(f"keep {keep:g}" for keep in keeps)]:
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in dict.fromkeys(name for name, _ in found if name != "teacher"):
        cells = [f"{found[name, k]:.2f}" if (name, k) in found else "" for k in keeps]
        table.add_row(str(name), *cells)
    Console(width=120).print(table)


def _tokens(batches: Iterable[Batch]) -> int:
    return sum(int(batch.n_tokens) for batch in batches)


if __name__ == "__main__":
    main()
