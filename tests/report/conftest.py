"""Run folders with every file that a finished run leaves, and a comparison of such."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from makd_llm.config import dump_config, load_config

Make = Callable[..., Path]
ROLES = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 48, "up": 48, "down": 32}
SECRET = "hf_abcdefghijklmnopqrst"


def matrices(layers: int) -> list[dict[str, Any]]:
    return [
        {
            "name": f"model.layers.{layer}.{role}",
            "role": role,
            "key": role,
            "layer": layer,
            "rows": rows,
            "columns": 32,
            "rank": None if role == "v" else 4 + 4 * (layer % 3),
            "residual": 0.0 if role == "v" else 0.02 * (layer + 1) + 0.01 * place,
            "added": 0.0,
        }
        for layer in range(layers)
        for place, (role, rows) in enumerate(ROLES.items())
    ]


def metrics(steps: int) -> list[dict[str, Any]]:
    lines = []
    for stage, count in (("sft", 3), ("distil", steps)):
        for step in range(1, count + 1):
            fall = math.exp(-step / count) + 0.05 * math.sin(step)
            names = {"cross_entropy": 4, "logits": 1.5, "matrix": 0.3, "attention": 0.2, "late": 1}
            shown = names if stage == "distil" else {"cross_entropy": 4}
            lines.append(
                {
                    "stage": stage,
                    "step": step,
                    "loss": 5 * fall,
                    **{f"loss/{name}": size * fall for name, size in shown.items()},
                    "gradient_norm": 7.5 * fall,
                    "learning_rate": 1e-4 * (1 - step / (count + 1)),
                    "tokens": 1900 + step,
                    "tokens_per_second": 900.0 + 10 * math.sin(step),
                    "seconds": 2.0,
                    "peak_memory_MB": 1500.0 + 10 * min(step, 5),
                    "epoch": 0.1 * step,
                    "skipped_steps": 0,
                }
            )
    return lines


def evaluation(worse: float) -> dict[str, Any]:
    def row(size: int, perplexity: float, rouge: float) -> dict[str, Any]:
        names = {"rouge1": 1.4, "rouge2": 0.4, "rougeL": 1.0, "rougeLsum": 1.05}
        return {
            "parameters": {"blocks": size, "total": size + 10_000, "factorized": size - 500},
            "perplexity": {"value": perplexity, "nats": 1.0, "tokens": 446, "utf8_bytes": 0},
            "rouge": {name: rouge * share for name, share in names.items()},
        }

    models = {
        "teacher": row(100_000, 22.25, 20.0),
        "factorized": row(50_000, 68.07, 12.0),
        "student": row(50_000, 43.67 + worse, 18.0 - worse),
        "lead-3": {"rouge": {"rouge1": 20.0, "rouge2": 4.0, "rougeL": 15.0, "rougeLsum": 16.0}},
    }
    return {
        "records": {"perplexity": 16, "rouge": 3},
        "skipped": {},
        "skipped_in_words": None,
        "prompt": "window 384 tokens",
        "perplexity_rule": "of the reference's tokens",
        "generation": "greedy, at most 40 new tokens",
        "rouge_settings": {"scorer": "rouge-score"},
        "models": models,
        "stages": {"teacher": 22.25, "svd": 500.0, "fisher": 68.07, "distilled": 43.67 + worse},
    }


def attention(layers: int, heads: int) -> dict[str, Any]:
    def model(size: float) -> list[list[float]]:
        return [[size * (1 + n + 0.1 * h) for h in range(heads)] for n in range(layers)]

    return {
        "divergence": "forward_kl",
        "unit": "nats per query",
        "records": 16,
        "tokens": 6000,
        "seed": 0,
        "not_measured": None,
        "layers": [
            {"student": n, "teacher": n, "heads": list(range(heads))} for n in range(layers)
        ],
        "models": {"factorized": model(0.11), "student": model(0.07)},
    }


def samples(count: int, written: str) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{n}",
            "document": f"Anna meets Ben in town number {n}. They talk about the rain. " * 6,
            "references": [f"Anna and Ben meet in town {n} and talk about the rain."],
            "teacher": f"Anna meets Ben in town {n}, and they talk about rain.",
            "factorized": "the the the town town",
            "student": written,
            "lead-3": f"Anna meets Ben in town number {n}.",
        }
        for n in range(count)
    ]


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """Writes a finished run's files into a folder of that name, and gives the folder."""

    def make(
        name: str = "run",
        *,
        layers: int = 4,
        heads: int = 4,
        steps: int = 12,
        documents: int = 3,
        written: str = "Ben meets a whale in town, and they sing.",
        worse: float = 0.0,
        overrides: tuple[str, ...] = (),
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = (f"run_dir={folder}", f"distil.train.steps={steps}", *overrides)
        config = load_config(None, ["distil.objectives.late={objective: hidden}", *settings])
        (folder / "config.yaml").write_text(dump_config(config))
        ds = {"zero_optimization": {"stage": 3}, "comet": {"api_key": "plain-words"}}
        files = {
            "environment.json": {
                "command": ["train.py", f"hub.token={SECRET}"],
                "ranks": 2,
                "device": "cpu",
                "packages": {"torch": "2.13.0"},
            },
            "stages.json": {
                stage: {"key": {"ds": ds}, "done": True}
                for stage in ("sft", "factorize", "distil", "evaluate")
            },
            "factorization.json": {
                "teacher": "builtin:x",
                "recipe": {"keep_ratio": 0.5, "method": "fisher", "budget": "greedy"},
                "matrices": matrices(layers),
                "parameters": {
                    "teacher": {"blocks": 100_000, "total": 110_000, "factorized": 99_500},
                    "student": {"blocks": 50_000, "total": 60_000, "factorized": 49_500},
                },
            },
            "evaluation.json": evaluation(worse),
            "attention.json": attention(layers, heads),
        }
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content))
        for file, lines in {
            "metrics.jsonl": metrics(steps),
            "samples.jsonl": samples(documents, written),
        }.items():
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


@pytest.fixture
def make_comparison(tmp_path: Path, make_run: Make) -> Callable[[], Path]:
    """Writes a comparison of two baselines, four runs that are done, one that failed and one that
    waits.
    """

    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 1.5, "high": value + 1.5}

    def row(name: str, keep: float | None, seed: int | None, value: float) -> dict[str, Any]:
        run = None if keep is None else f"rows/{name}-keep{keep}-seed{seed}"
        if run:
            make_run(f"comparison/{run}", worse=20 - value, overrides=(f"seed={seed}",))
        return {
            "name": name,
            "label": name,
            "keep_ratio": keep,
            "seed": seed,
            "run": run,
            "state": "done",
            "error": None,
            "parameters": 60_000 if run else None,
            "tokens": 1_000_000 if run else None,
            "seconds": 321.5 if run else None,
            "peak_memory_MB": 2048.0 if run else None,
            "perplexity": 40.0 if run else None,
            **{key: interval(value * share) for key, share in SHARES.items()},
            "share_of_teacher": dict.fromkeys(SHARES, value / 21) | {"rouge2": None},
            "against": {
                "kd": {"rougeLsum": {"difference": value - 18, "low": -1.0, "high": 2.0, "p": 0.04}}
            }
            if run
            else {},
        }

    def empty(name: str, state: str, error: str | None) -> dict[str, Any]:
        found = dict.fromkeys(row("x", None, None, 1.0))
        return {**found, "name": name, "label": name, "state": state, "error": error} | {
            "keep_ratio": 0.25,
            "seed": 0,
            "run": f"rows/{name}-keep0.25-seed0",
            "against": {},
        }

    def make() -> Path:
        rows = [
            row("lead-3", None, None, 15.0),
            row("teacher", None, None, 21.0),
            *(row("kd", 0.5, seed, 18.0) for seed in (0, 1)),
            *(row("makd", 0.5, seed, 18.5) for seed in (0, 1)),
            empty("tinybert", "failed", "no steps left"),
            empty("adkd", "waiting", None),
        ]
        alone = {"seed": None, "seeds": [], "run": None, "spread": dict.fromkeys(SPREAD)}
        two = {"seeds": [0, 1], "tokens": 1_000_000.5, "spread": SPREAD}
        groups = [
            {**r, **alone, **(two if r["run"] and r["state"] == "done" else {})}
            for r in rows
            if r["seed"] in (None, 0)
        ]
        content = {
            "name": "dialogsum",
            "teacher": "builtin:x",
            "data": "data/dialogsum",
            "settings": {"tokens": 1_000_000, "seeds": [0, 1]},
            "rows": rows,
            "groups": groups,
            "analysis": "Full makd is 0.50 above kd; the interval holds 0.",
        }
        folder = tmp_path / "comparison"
        (folder / "comparison.json").write_text(json.dumps(content))
        return folder

    return make


SHARES = {"rouge1": 1.3, "rouge2": 0.4, "rougeLsum": 1.0}
SPREAD = {"tokens": 0.7, "perplexity": 1.75, "rouge1": 0.5, "rouge2": 0.1, "rougeLsum": 0.4}
