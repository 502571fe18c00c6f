"""Tokens per second and memory of greedy generation: a teacher against its students.

    python benchmarks/generation.py TEACHER STUDENT... [--batch 1 16]

Every model writes the same number of tokens after the same prompt, in turns, in one process; a
student once as it is loaded, once packed (one `down` product for q, k and v, one for gate and up),
once merged into dense weights. Memory is what the weights take, and the peak beyond them while
writing.
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
from torch import nn
from transformers import AutoModelForCausalLM

import makd_llm  # noqa: F401  (makes the Auto classes know the students)
from makd_llm.models.modeling_lowrank import LowRankLinear, LowRankParts, pack
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
    models = {"teacher": loaded(resolve_model(asked.teacher))}
    for folder in asked.students:
        models[folder.name] = loaded(folder)
        models[f"{folder.name}, packed"] = packed = loaded(folder)
        pack(packed)
        models[f"{folder.name}, merged"] = merged(loaded(folder))
    rows: list[dict[str, object]] = []
    for batch in asked.batch:
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


def loaded(folder: Path) -> Model:
    """A model in bf16, ready to write."""
    model: Model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval()


def merged(model: Model) -> Model:
    """The student with every factor pair multiplied out, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankLinear):
                dense = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                dense.weight = nn.Parameter(child.dense_weight())
                if child.bias is not None:
                    dense.bias = child.bias
                setattr(parent, name, dense.to(child.up.dtype))
            assert not isinstance(child, LowRankParts), "fused modules are merged by makd export"
    return model


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
