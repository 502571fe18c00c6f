"""A distillation step by TRL, by transformers and torch alone, and by this project, in turn.

    python benchmarks/peers.py --run runs/demo
    python benchmarks/peers.py --run runs/demo --records 4 --length 512     (random tokens)

contestants.py says who they are and what each computes. The run folder gives teacher, student and
data (`data.source=...` behind the options takes another). In every round each takes its turn at the
same batch, another one first each time, so that a machine that is now slow and now fast is so for
all; a turn is a process of its own, alone in memory, which loads both models and takes a step to
warm up (on which all must find the same divergence, or there is no table), one whose memory is
watched, and some that are timed. The optimizer's step is among what is timed, its states are among
the memory.

Columns: tokens/s (padding left out); how many times TRL's in the same round; seconds of a step (20,
50 and 80 %) and the processor's, over all threads; the process's peak memory in all (on a GPU, the
allocator's), and as a share of TRL's; all medians over the rounds. Then the seconds of each part:
`teacher` and `student`, what their layers' and heads' own forwards take, `backward`, autograd's,
`optimizer`, clipping and update, and `loss`, the rest. Where a head's product runs with the loss
(ours, TRL's DistillationTrainer) it is in `loss`; ours makes the gradients of logits there as well.

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
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
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
from training import CHECKOUT, FinishedRun, RandomRows, Results, random_rows

PARTS = ("teacher", "student", "loss", "backward", "optimizer")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WITHIN = {"fp32": 1e-3, "bf16": 5e-2}
"""How far divergences may be from TRL's, relative to it."""


@dataclass(frozen=True)
class Turn:
    """A step of a contestant, or its median of a few: seconds by the clock, cpu of all threads,
    parts by name, divergence in nats per token, peak memory in MB, where it is known.
    """

    seconds: float
    cpu: float
    parts: dict[str, float]
    divergence: float
    peak: float | None = None


def main(
    run: FinishedRun,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of its config.")] = None,
    ds: Annotated[Path, typer.Option(help="Ours.")] = CHECKOUT / "ds_configs" / "zero0_fp32.json",
    dtype: Literal["fp32", "bf16"] = "fp32",
    rounds: int = 6,
    steps: Annotated[int, typer.Option(help="That are timed in a turn.")] = 2,
    records: int = 4,
    length: RandomRows = None,
    only: Annotated[
        str | None, typer.Option(help="Names, with commas between; TRL is one in any case.")
    ] = None,
    results: Results = RESULTS,
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
    if unknown := set(names) - set(CONTESTANTS):
        raise SystemExit(f"--only: no {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}")
    turns, rates = in_turns(names, setting, batches, steps, WITHIN[dtype])
    source = f"{length} random tokens" if length else Path(config.data.source).name
    about = {"batch": f"{records} x {source}", "dtype": dtype}
    flops = necessary(setting, batches)
    rows = table(turns, rates, batches, flops, about | {"ds": ds.stem})
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
    names: Sequence[str], setting: Setting, batches: Sequence[Batch], steps: int, within: float
) -> tuple[dict[str, list[Turn]], list[float]]:
    """Every contestant's turn at every batch, and TFLOP/s of a matmul in each round. Ends the
    benchmark where one of them fails, or finds another divergence.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    rates = []
    for count, batch in enumerate(batches):
        rates.append(matmul_rate(setting.device, setting.dtype, 3))
        first = count % len(names)
        for name in [*names[first:], *names[:first]]:
            turn = in_own_process(name, setting, batch, steps)
            turns[name].append(turn)
            say(f"round {count + 1}: {name}: {turn.seconds:.3f} s, KL {turn.divergence:.5f}")
        agree({name: turns[name][-1].divergence for name in names}, within)
    return turns, rates


def agree(divergences: dict[str, float], within: float) -> None:
    """No time of a step that learns something else."""
    for name, value in divergences.items():
        if not abs(value - divergences[TRL]) <= within * divergences[TRL]:
            raise SystemExit(f"{name} finds {value}, {TRL} {divergences[TRL]}; no table")


def in_own_process(name: str, setting: Setting, batch: Batch, steps: int) -> Turn:
    """A contestant's turn, alone in memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(turn_of, name, setting, batch, steps).result()
        except BrokenProcessPool:
            raise SystemExit(f"{name}: its process was killed; is there memory enough?") from None


def turn_of(name: str, setting: Setting, batch: Batch, steps: int) -> Turn:
    """Loads a contestant's models and takes steps: one that warms up, one whose memory is watched,
    and `steps` that are timed.
    """
    contestant = CONTESTANTS[name](setting)
    clock = Clock(contestant, setting.device)
    given = contestant.fed(batch.to(setting.device))
    taken: list[Turn] = []
    step = partial(clock.step, contestant, given, taken)
    step()
    _, peak = peaks(step, setting.device)
    for _ in range(steps):
        step()
    timed = taken[2:]
    return Turn(
        statistics.median(turn.seconds for turn in timed),
        statistics.median(turn.cpu for turn in timed),
        {part: statistics.median(turn.parts[part] for turn in timed) for part in PARTS},
        taken[0].divergence,
        peak,
    )


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

    def step(self, contestant: Contestant, given: Any, taken: list[Turn]) -> None:
        """Appends to `taken`."""
        self._spent = dict.fromkeys(self._spent, 0.0)
        cpu, began = time.process_time(), self._now()
        with patch.object(torch.autograd, "backward", self._backward):
            divergence = contestant.learn(given)
        learnt = self._now()
        contestant.update()
        ended = self._now()
        loss = learnt - began - sum(self._spent.values())
        parts = {**self._spent, "loss": loss, "optimizer": ended - learnt}
        taken.append(Turn(ended - began, time.process_time() - cpu, parts, float(divergence)))

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
        paired = list(zip(own, turns[TRL], strict=True))
        held = [(turn.peak, trl.peak) for turn, trl in paired if turn.peak and trl.peak]
        rounds = zip(flops, seconds, rates, strict=True)
        row = {
            "contestant": name,
            "tokens_per_second": _median((n / s for n, s in zip(tokens, seconds, strict=True)), 1),
            "times_trl": _median((trl.seconds / turn.seconds for turn, trl in paired), 2),
            "peak_MB": _median((peak for peak, _ in held), 0),
            "memory_of_trl": _median((peak / of for peak, of in held), 2),
            "seconds_20": f"{low:.3f}",
            "seconds_50": f"{middle:.3f}",
            "seconds_80": f"{high:.3f}",
            "cpu_seconds": _median((turn.cpu for turn in own), 3),
            **{f"{part}_s": _median((turn.parts[part] for turn in own), 3) for part in PARTS},
            "of_matmul": _median((100 * n / s / (1e12 * rate) for n, s, rate in rounds), 1) + "%",
            "matmul_TFLOP/s": f"{statistics.median(rates):.3g}",
            "tokens": round(statistics.mean(tokens)),
            "learnt": round(statistics.mean(int(batch.n_targets) for batch in batches)),
            "rounds": len(own),
        }
        rows.append(about | row)
    return rows


def _median(values: Iterable[float], digits: int) -> str:
    known = list(values)
    return f"{statistics.median(known):.{digits}f}" if known else ""


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
