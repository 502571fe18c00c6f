"""Tokens per second and memory of greedy generation: a teacher against its students.

    python benchmarks/generation.py TEACHER STUDENT... [--batch 1 16]

Every model writes the same number of tokens after the same prompt, in turns, in one process; once
as transformers loads it, and once packed (makd_llm/models/packing.py: fewer products, pairs
multiplied out where that is faster). Memory is what the weights take, and the peak beyond them
while writing.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import makd_llm  # noqa: F401  (makes the Auto classes know the students)
from makd_llm.models.packing import pack
from makd_llm.models.source import resolve_model
from measure import RESULTS, megabytes, ratio_to, say, where, write

Model = Any


def main() -> None:
    """Loads all models, lets them write in turns, and writes a row for each and batch size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("students", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "generation_cpu.csv")
    asked = parser.parse_args()
    rows: list[dict[str, object]] = []
    for batch in asked.batch:
        models = _models(resolve_model(asked.teacher), asked.students, batch)
        ids = torch.arange(batch * asked.prompt).reshape(batch, -1) % 1000 + 100
        calls = {name: writing(model, ids, asked.new) for name, model in models.items()}
        say(f"batch {batch}")
        times = in_turns(calls, asked.turns)
        for name, turns in times.items():
            ratio, low, high = ratio_to(times["teacher"], turns, in_turns=True)
            seconds = statistics.median(turns)
            peak, _ = megabytes(partial(listed, calls[name]), [], "cpu")
            row = {
                "model": name,
                "batch": batch,
                "prompt": asked.prompt,
                "new": asked.new,
                "tokens_per_second": f"{batch * asked.new / seconds:.1f}",
                "of_teachers_time": f"{ratio:.3f}",
                "low": f"{low:.3f}",
                "high": f"{high:.3f}",
                "weights_MB": f"{weights(models[name]):.1f}",
                "peak_MB": "" if peak is None else f"{peak:.1f}",
            }
            rows.append(row | where("cpu"))
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write(rows, asked.out)


def _models(teacher: Path, students: list[Path], batch: int) -> dict[str, Model]:
    models: dict[str, Model] = {}
    for name, folder in [("teacher", teacher), *((f.name, f) for f in students)]:
        if name in models:
            raise SystemExit(f"two models are called {name}; rename one of the folders")
        models[name] = loaded(folder)
        models[f"{name}, packed"] = packed = loaded(folder)
        say(f"{name}: {pack(packed, rows=batch)}")
    return models


def loaded(folder: Path) -> Model:
    """A model in bf16, ready to write."""
    model: Model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval()


def writing(model: Model, ids: torch.Tensor, new: int) -> Callable[[], torch.Tensor]:
    """Greedy generation of exactly `new` tokens."""

    def call() -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
        return found

    return call


def listed(call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """A call's result as the memory measurement wants it."""
    return [call()]


def in_turns(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each call in every turn, in an order that changes; the first round warms up."""
    order, shuffle = list(calls), random.Random(0).shuffle
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        shuffle(order)
        for name in order:
            began = time.perf_counter()
            calls[name]()
            if turn:
                spent[name].append(time.perf_counter() - began)
    return spent


def weights(model: Model) -> float:
    """MB of a model's parameters, tied ones once."""
    return float(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20)


if __name__ == "__main__":
    main()
