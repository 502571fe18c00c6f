"""A distillation step by TRL, by transformers and torch alone, and by this project, in turn.

    python benchmarks/peers.py --run runs/demo
    python benchmarks/peers.py --run runs/demo --records 4 --length 512     (random tokens)

contestants.py says who they are and what each computes. The run folder gives teacher, student and
data (`data.source=...` behind the options takes another). Every contestant has a process of its
own, and one of them works at a time, step by step, each round beginning with another: a machine
that is now slow and now fast is so for all, and memory is each one's own. Two steps on the largest
batch come first, and are not timed: on the first all must find the same divergence, or nothing is
timed; over the second, when the optimizer's states are there, memory is watched.

Columns: tokens/s (padding left out), their median; how many times TRL's in the same round, its
median; seconds of a step (20, 50 and 80 %) and the processor's, over all threads; the process's
peak memory in all (on a GPU, the allocator's); and the seconds of each part: `teacher` and
`student`, what their layers' and heads' own forwards take, `backward`, autograd's, `optimizer`,
clipping and update, and `loss`, the rest. Where a head's product runs with the loss (ours, TRL's
DistillationTrainer) it is in `loss`; ours makes the gradients of logits there as well.

of_matmul: the operations a second that the task needs, as a share of what a large product of the
same dtype reaches on the same threads, measured in every round:

    necessary = F(teacher) + 3 F(student)
    F(model) = sum over records of 2 M n + 2 A n n + 2 V D s

for records of n tokens of which s are to be learnt: M numbers in the layers' matrices (factored
ones as they are stored), A the queries' widths of all layers, summed (scores and values are 4 A n n
operations, of which causal attention needs half), V vocabulary and D width. The backward takes two
products for each of the forward. Padding and prompts' logits are not needed by anyone.
"""

import csv
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import torch
import typer

from contestants import CONTESTANTS, TRL, Contestant, Setting, alike
from makd_llm.checkpoint.folder import read_config
from makd_llm.cluster.sizes import sizes_of
from makd_llm.cluster.timing import forward_flops
from makd_llm.config import RunConfig, load_config
from makd_llm.data.batch import Batch
from makd_llm.models.source import load_tokenizer
from makd_llm.train.build import build_loader, build_prompts
from makd_llm.train.deepspeed_config import read_deepspeed_config, training_config
from measure import RESULTS, Rows, matmul_rate, peaks, say, where, write
from training import CHECKOUT, random_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WITHIN = {"fp32": 1e-3, "bf16": 5e-2}
"""How far divergences may be from TRL's, relative to it."""


@dataclass(frozen=True)
class Turn:
    """A step of a contestant. seconds by the clock, cpu of all threads, parts by name; divergence
    in nats per token; peak in MB, where it was watched and is known.
    """

    seconds: float
    cpu: float
    parts: dict[str, float]
    divergence: float
    peak: float | None = None


def main(
    run: Annotated[Path, typer.Option(help="A finished run's folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of its config.")] = None,
    ds: Annotated[Path, typer.Option(help="Ours.")] = CHECKOUT / "ds_configs" / "zero1.json",
    dtype: Literal["fp32", "bf16"] = "fp32",
    rounds: int = 7,
    records: int = 8,
    length: Annotated[
        int | None, typer.Option(help="Of rows of random tokens, a quarter of them to be learnt.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Names, with commas between; TRL is one in any case.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the table.")] = RESULTS,
) -> None:
    """Measures, prints a table, and writes peers_<device>.csv; rows of other batches stay."""
    if importlib.util.find_spec("trl") is None:
        raise SystemExit('no TRL here: pip install -c constraints.txt -e ".[peers]"')
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = load_config(run / "config.yaml", overrides or [])
    size = {"batch_size": records, "micro_batch_size": records}
    joined = training_config(
        read_deepspeed_config(ds) | {"bf16": {"enabled": dtype == "bf16"}},
        config.distil.train.model_copy(update=size),
        world_size=1,
        ds_path=ds,
        section="distil.train",
    )
    setting = Setting(
        run / "teacher", run / "factorized", DTYPES[dtype], device, records, alike(joined)
    )
    batches = drawn(config, setting, rounds, length)
    names = list(CONTESTANTS) if only is None else list(dict.fromkeys([TRL, *only.split(",")]))
    turns, memory, rates = in_turns(names, setting, batches, WITHIN[dtype])
    said = f"{records} x {length} random tokens" if length else f"{records} of {config.data.source}"
    about = {"batch": said, "dtype": dtype}
    rows = table(
        turns, memory, rates, batches, necessary(setting, batches), about | {"ds": ds.stem}
    )
    for row in rows:
        row |= where(device)
    publish(rows, results / f"peers_{device}.csv", about)


def drawn(config: RunConfig, setting: Setting, rounds: int, length: int | None) -> list[Batch]:
    """A batch for each round: the run's own, or random tokens."""
    if length is not None:
        torch.manual_seed(0)
        vocabulary = read_config(setting.student).vocab_size
        return [random_rows(setting.records, length, vocabulary) for _ in range(rounds)]
    tokenizer = load_tokenizer(setting.student)
    loader = build_loader(
        config.data,
        build_prompts(config.data, tokenizer),
        batch_size=setting.records,
        micro_batch_size=setting.records,
        seed=config.seed,
        pad_id=tokenizer.eos_token_id,
    )
    return [loader.next_step()[0] for _ in range(rounds)]


def necessary(setting: Setting, batches: Sequence[Batch]) -> list[float]:
    """The operations that each batch needs, see above."""
    teacher, student = (
        sizes_of(read_config(folder)) for folder in (setting.teacher, setting.student)
    )
    found = []
    for batch in batches:
        lengths = batch.attention_mask_BT.sum(1).tolist()
        learnt = batch.target_mask_BT.sum(1).tolist()
        found.append(
            sum(
                forward_flops(teacher, n, n, s) + 3 * forward_flops(student, n, n, s)
                for n, s in zip(lengths, learnt, strict=True)
            )
        )
    return found


def in_turns(
    names: Sequence[str], setting: Setting, batches: Sequence[Batch], within: float
) -> tuple[dict[str, list[Turn]], dict[str, float | None], list[float]]:
    """Every contestant's step on every batch; peak memory of each; TFLOP/s of a matmul in each
    round. Ends the benchmark where one of them fails, or finds another divergence.
    """
    largest = max(batches, key=lambda batch: batch.input_ids_BT.numel())
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    rates = []
    with ExitStack() as stack:
        ways = {}
        for name in names:
            ways[name] = stack.enter_context(started(name, setting))
            say(f"{name}: ready")
        found = {name: asked(ways, name, largest).divergence for name in names}
        agree(found, within)
        memory = {name: asked(ways, name, largest, watched=True).peak for name in names}
        for count, batch in enumerate(batches):
            rates.append(matmul_rate(setting.device, setting.dtype, 3))
            first = count % len(names)
            for name in [*names[first:], *names[:first]]:
                turns[name].append(asked(ways, name, batch))
                say(f"round {count + 1}: {name}: {turns[name][-1].seconds:.3f} s")
    return turns, memory, rates


def agree(divergences: dict[str, float], within: float) -> None:
    """No time of a step that learns something else."""
    for name, value in divergences.items():
        if not abs(value - divergences[TRL]) <= within * divergences[TRL]:
            raise SystemExit(f"{name} finds {value}, {TRL} {divergences[TRL]}; nothing timed")


@contextmanager
def started(name: str, setting: Setting) -> Iterator[Connection]:
    """The process of a contestant, once its models are loaded."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, name, setting))
    process.start()
    there.close()
    try:
        _received(here, name)
        yield here
    finally:
        here.close()
        process.join()


def asked(ways: dict[str, Connection], name: str, batch: Batch, *, watched: bool = False) -> Turn:
    """A step of a contestant, the others waiting."""
    ways[name].send((batch, watched))
    turn: Turn = _received(ways[name], name)
    return turn


def _received(way: Connection, name: str) -> Any:
    try:
        return way.recv()
    except EOFError:
        raise SystemExit(f"{name}: failed") from None


def work(way: Connection, name: str, setting: Setting) -> None:
    """What the process of a contestant does: steps, until there is nobody to ask for them."""
    contestant = CONTESTANTS[name](setting)
    clock = Clock(contestant, setting.device)
    way.send(name)
    with suppress(EOFError):
        while True:
            batch, watched = way.recv()
            made: list[Turn] = []
            step = partial(clock.step, contestant, batch.to(setting.device), made)
            if watched:
                _, peak = peaks(step, setting.device)
                made[0] = replace(made[0], peak=peak)
            else:
                step()
            way.send(made[0])


class Clock:
    """Times a contestant's step and its parts."""

    def __init__(self, contestant: Contestant, device: str) -> None:
        self._cuda = device == "cuda"
        self._began = 0.0
        self._spent = dict.fromkeys(("teacher", "student", "backward"), 0.0)
        for part, model in (("teacher", contestant.teacher), ("student", contestant.student)):
            for module in (model.base_model, model.get_output_embeddings()):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(partial(self._end, part))

    def step(self, contestant: Contestant, batch: Batch, made: list[Turn]) -> None:
        """Appends to `made`. What turns the batch into a contestant's own form is not timed."""
        given = contestant.fed(batch)
        self._spent = dict.fromkeys(self._spent, 0.0)
        cpu, began = time.process_time(), self._now()
        with patch.object(torch.autograd, "backward", self._backward):
            divergence = contestant.learn(given)
        learnt = self._now()
        contestant.update()
        ended = self._now()
        loss = learnt - began - sum(self._spent.values())
        parts = {**self._spent, "loss": loss, "optimizer": ended - learnt}
        made.append(Turn(ended - began, time.process_time() - cpu, parts, float(divergence)))

    def _backward(self, *arguments: Any, **options: Any) -> None:
        self._begin()
        BACKWARD(*arguments, **options)
        self._end("backward")

    def _begin(self, *_: Any) -> None:
        self._began = self._now()

    def _end(self, part: str, *_: Any) -> None:
        self._spent[part] += self._now() - self._began

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


BACKWARD = torch.autograd.backward


def table(
    turns: dict[str, list[Turn]],
    memory: dict[str, float | None],
    rates: Sequence[float],
    batches: Sequence[Batch],
    flops: Sequence[float],
    about: dict[str, str],
) -> Rows:
    """One row per contestant. rates: TFLOP/s, by round as turns and batches are."""
    tokens = [int(batch.n_tokens) for batch in batches]
    rows: Rows = []
    for name, own in turns.items():
        seconds = [turn.seconds for turn in own]
        low, middle, high = (_quantile(seconds, share) for share in (0.2, 0.5, 0.8))
        speed = [n / s for n, s in zip(tokens, seconds, strict=True)]
        ratios = [trl.seconds / s for trl, s in zip(turns[TRL], seconds, strict=True)]
        reached = [
            100 * count / s / rate / 1e12
            for count, s, rate in zip(flops, seconds, rates, strict=True)
        ]
        peak, of = memory[name], memory[TRL]
        rows.append(
            about
            | {
                "contestant": name,
                "tokens_per_second": f"{statistics.median(speed):.1f}",
                "times_trl": f"{statistics.median(ratios):.2f}",
                "peak_MB": "" if peak is None else f"{peak:.0f}",
                "memory_of_trl": "" if peak is None or of is None else f"{peak / of:.2f}",
                "seconds_20": f"{low:.3f}",
                "seconds_50": f"{middle:.3f}",
                "seconds_80": f"{high:.3f}",
                "cpu_seconds": f"{statistics.median(turn.cpu for turn in own):.3f}",
                **{
                    f"{part}_s": f"{statistics.median(turn.parts[part] for turn in own):.3f}"
                    for part in ("teacher", "student", "loss", "backward", "optimizer")
                },
                "of_matmul": f"{statistics.median(reached):.1f}%",
                "matmul_TFLOP/s": f"{statistics.median(rates):.3g}",
                "tokens": round(statistics.mean(tokens)),
                "learnt": round(statistics.mean(int(batch.n_targets) for batch in batches)),
                "rounds": len(own),
            }
        )
    return rows


def _quantile(values: Sequence[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def publish(rows: Rows, path: Path, about: dict[str, str]) -> None:
    """Prints the rows, and writes them beside those of other batches and dtypes."""
    for row in rows:
        print(
            f"{row['contestant']:24} {row['tokens_per_second']:>8} tokens/s "
            f"{row['times_trl']:>5} x TRL  {row['peak_MB']:>6} MB {row['memory_of_trl']:>5} x TRL  "
            f"{row['of_matmul']:>6} of matmul  "
            + " ".join(f"{k[:-2]} {v}" for k, v in row.items() if k.endswith("_s"))
        )
    kept: Rows = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            kept = [r for r in csv.DictReader(file) if any(r[k] != v for k, v in about.items())]
    write([*kept, *rows], path)
    say(f"written {path}")


if __name__ == "__main__":
    typer.run(main)
