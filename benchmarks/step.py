"""What objectives cost: a distillation step under each set of them, in turn, in one run.

    deepspeed --num_accelerators 2 benchmarks/step.py --ds ds_configs/zero3.json --run runs/demo
    ... --records 4 --length 512 --sets kd,makd      (whole rows, of random tokens)

The run folder (of a finished `make demo`, say) gives teacher, student and data. All sets see the
same batches on the same two engines, one after the other, round after round, every round beginning
with another set, so that a machine that is now slow and now fast is so for all of them. Nothing is
learnt: the optimizer's step is left out, and is the same for all. Every step is one on which all of
a set's objectives count: what `every` and the levels' turns save does not show. Columns: seconds
per micro-batch (20, 50 and 80 %), the ratio to `kd` (cross-entropy and logits) in the same round,
its median over rounds; the median seconds that the student writes, where a step on its own words
has it write; and a rank's peak memory in a round of its own: beyond what is held between steps, and
in all (no gradients or optimizer states are among that, so ratios are larger than in training).
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedTokenizerBase

from makd_llm import distributed
from makd_llm.checkpoint.folder import read_config
from makd_llm.config import DataConfig, DistilConfig, load_config
from makd_llm.config.presets import preset_names
from makd_llm.data.batch import Batch, counts_of
from makd_llm.models.families import family_of
from makd_llm.models.pairing import pair
from makd_llm.models.sharded import load_sharded
from makd_llm.models.source import load_tokenizer
from makd_llm.objectives.combine import Objectives
from makd_llm.train.build import build_loader, build_objectives, build_on_policy, build_prompts
from makd_llm.train.deepspeed_config import (
    dtype_of,
    frozen_config,
    read_deepspeed_config,
    training_config,
)
from makd_llm.train.engine import Frozen, Trained
from makd_llm.train.on_policy import OnPolicy
from makd_llm.train.step import distill_step, finetune_step
from measure import RESULTS, peaks, where, write
from training import FinishedRun, RandomRows, Results, random_rows

SETS: dict[str, list[str]] = {
    # opdf trains another student: not the one that all others are timed on
    **{name: [f"distil.preset={name}"] for name in ("kd", *preset_names()) if name != "opdf"},
    "kd + matrix": ["distil.preset=kd", "distil.objectives.matrix.weight=1"],
    "kd + attention": ["distil.preset=kd", "distil.objectives.attention.weight=1"],
    "kd + hidden": ["distil.preset=kd", "distil.objectives.hidden.weight=1"],
    "makd everywhere": [
        "distil.preset=makd",
        "distil.objectives.matrix.layers=all",
        "distil.objectives.attention.layers=all",
        "distil.objectives.hidden.layers=all",
    ],
}


WRITTEN_ROUNDS = 3
"""In which the student writes, where it does."""


def main(
    ds: Annotated[Path, typer.Option()],
    run: FinishedRun,
    rounds: int = 14,
    records: Annotated[int, typer.Option(help="Per rank and micro-batch.")] = 2,
    length: RandomRows = None,
    sets: Annotated[
        str | None, typer.Option(help="Names, with commas between; kd is one of them in any case.")
    ] = None,
    results: Results = RESULTS,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Measures, prints a table, and writes step_<device>.csv."""
    distributed.quiet()
    distributed.init()
    config = load_config(run / "config.yaml", [])
    given = read_deepspeed_config(ds)
    world = distributed.world_size()
    size = {"batch_size": world * records, "micro_batch_size": records}
    joined = training_config(
        given,
        config.distil.train.model_copy(update=size),
        world_size=world,
        ds_path=ds,
        section="distil.train",
    )
    dtype = dtype_of(given)
    student = Trained(load_sharded(run / "factorized", joined, dtype), joined)
    frozen = frozen_config(given, micro_batch_size=1)
    teacher = Frozen(load_sharded(run / "teacher", frozen, dtype), frozen)
    shape = read_config(run / "factorized")
    tokenizer = load_tokenizer(run / "factorized")
    loader = build_loader(
        config.data,
        build_prompts(config.data, tokenizer),
        batch_size=joined["train_batch_size"],
        micro_batch_size=joined["train_micro_batch_size_per_gpu"],
        seed=config.seed,
        pad_id=tokenizer.eos_token_id,
    )
    wanted = list(SETS) if sets is None else ["kd", *sets.split(",")]
    pairing = pair(shape, read_config(run / "teacher"))
    distils = {name: load_config(None, SETS[name]).distil for name in dict.fromkeys(wanted)}
    chosen = {
        name: build_objectives(distil, family_of(shape), shape.num_hidden_layers, pairing)
        for name, distil in distils.items()
    }
    writers = {
        name: writer_of(distil, config.data, student, tokenizer, dtype)
        for name, distil in distils.items()
        if distil.sequences.student
    }
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    writing: dict[str, list[float]] = {name: [] for name in writers}
    memory: dict[str, tuple[float | None, float | None]] = {}
    tokens = 0
    for count in range(rounds + 1):
        drawn = random_rows(records, length, shape.vocab_size) if length else loader.next_step()[0]
        batch = drawn.to(distributed.device())
        tokens += int(batch.n_tokens)
        first = count % len(chosen)
        names = list(chosen)
        for name in names[first:] + names[:first]:
            step = partial(one, student, teacher, chosen[name], batch)
            if count:
                seconds[name].append(step())
            else:  # the first round warms up
                step()
                memory[name] = peaks(step, _kind())
            if name in writers and count <= WRITTEN_ROUNDS:
                writing[name].append(timed(partial(writers[name].of_step, count + 1, [drawn])))
    rows = table(seconds, writing, memory, tokens // (rounds + 1), world)
    if distributed.is_main():
        publish(rows, results)
    distributed.shutdown()


def writer_of(
    distil: DistilConfig,
    data: DataConfig,
    student: Trained,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> OnPolicy:
    """The student's texts, written on every step."""
    always = {"lmbda": 1.0, "replay": 0, "adaptive": None}
    assert distil.sequences.student is not None
    sequences = distil.sequences.model_copy(
        update={"student": distil.sequences.student.model_copy(update=always)}
    )
    made = build_on_policy(
        distil.model_copy(update={"sequences": sequences}),
        data,
        0,
        student.model,
        build_prompts(data, tokenizer).eos_ids,
        dtype=dtype,
        pad_id=tokenizer.eos_token_id,
        validation_loss=lambda: 0.0,
    )
    assert made is not None
    return made


def timed(work: Callable[[], object]) -> float:
    """Seconds, until all ranks are done."""
    distributed.barrier()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    distributed.barrier()
    return time.perf_counter() - began


def one(student: Trained, teacher: Frozen, objectives: Objectives, batch: Batch) -> float:
    """Seconds of forward and backward of one micro-batch, until all ranks are done."""
    counts = counts_of([batch])
    if objectives.needs_teacher:
        took = timed(partial(distill_step, student, teacher, objectives, batch, counts))
    else:
        took = timed(partial(finetune_step, student, objectives, batch, counts))
    student.engine.optimizer.zero_grad()
    return took


def table(
    seconds: dict[str, list[float]],
    writing: dict[str, list[float]],
    memory: dict[str, tuple[float | None, float | None]],
    tokens: int,
    world: int,
) -> list[dict[str, Any]]:
    """One row per set of objectives."""
    rows = []
    for name, values in seconds.items():
        low, middle, high = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7))
        ratios = [value / kd for value, kd in zip(values, seconds["kd"], strict=True)]
        rows.append(
            {
                "objectives": name,
                "seconds_20": f"{low:.3f}",
                "seconds_50": f"{middle:.3f}",
                "seconds_80": f"{high:.3f}",
                "ratio_to_kd": f"{statistics.median(ratios):.2f}",
                "writing": f"{statistics.median(writing[name]):.3f}" if name in writing else "",
                "peak_MB": _shown(memory[name][0]),
                "in_all_MB": _shown(memory[name][1]),
                "memory_to_kd": _ratio(memory[name][1], memory["kd"][1]),
                "tokens_per_rank": tokens,
                "ranks": world,
                "rounds": len(values),
                **where(_kind()),
            }
        )
    return rows


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _ratio(value: float | None, to: float | None) -> str:
    return "" if value is None or to is None else f"{value / to:.2f}"


def _kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def publish(rows: list[dict[str, Any]], results: Path) -> None:
    """Prints the rows and writes the CSV."""
    path = results / f"step_{_kind()}.csv"
    write(rows, path)
    for row in rows:
        print(
            f"{row['objectives']:30} {row['seconds_50']:>8} s  {row['ratio_to_kd']:>5} x kd  "
            f"{row['writing'] and '+ ' + row['writing'] + ' s':>10}  "
            f"{row['peak_MB']:>6} MB of {row['in_all_MB']:>6} MB  {row['memory_to_kd']:>5} x kd"
        )
    print(f"written {path}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
