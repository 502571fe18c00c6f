"""The training loop: steps, metrics, checkpoints, and every way a run can end.

One optimizer step is: this rank's micro-batches; the counts of valid positions summed over all
ranks, once; a backward per micro-batch; DeepSpeed's step. The loop knows nothing of what is learnt:
`step_fn` does.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from makd_llm import distributed
from makd_llm.checkpoint.state import Checkpoints
from makd_llm.data.batch import Batch, counts_of
from makd_llm.data.loader import TrainLoader
from makd_llm.ending import is_out_of_memory
from makd_llm.errors import Diverged, Interrupted, OutOfMemory
from makd_llm.memory import Peak
from makd_llm.objectives.combine import Losses, Objectives
from makd_llm.train.engine import Trained
from makd_llm.train.levels import LevelBalance, staged_turn
from makd_llm.train.metrics import Metrics
from makd_llm.train.monitors import told
from makd_llm.train.on_policy import OnPolicy

StepFn = Callable[[Batch, dict[str, float]], Losses]


@dataclass(frozen=True)
class LoopSettings:
    """What the loop does besides stepping; see TrainConfig."""

    stage: str
    steps: int
    checkpoint_every: int
    log_every: int = 1
    max_bad_steps: int = 10
    staged: dict[str, float] | None = None
    """Shares of the steps, where the levels take turns."""


class Loop:
    """One training stage, from its newest checkpoint to its last step."""

    def __init__(
        self,
        model: Trained,
        objectives: Objectives,
        loader: TrainLoader,
        checkpoints: Checkpoints,
        settings: LoopSettings,
        run_dir: Path,
        balance: LevelBalance | None = None,
        on_policy: OnPolicy | None = None,
    ) -> None:
        self.model, self.objectives, self.loader = model, objectives, loader
        self.checkpoints, self.settings, self.run_dir = checkpoints, settings, run_dir
        self.balance, self.on_policy = balance, on_policy
        self.step = 0
        self.bad_in_a_row = 0
        self.skipped = 0
        self._shares: dict[str, torch.Tensor] = {}
        """This rank's share of each objective's mean, where it last counted since the last log."""
        self._latest: dict[str, float] = {}
        """Each objective's mean when it was last measured."""
        self._resume()

    def run(self, step_fn: StepFn) -> None:
        """Trains to the last step. Raises Interrupted after a signal (saved), Diverged after too
        many bad steps.
        """
        settings = self.settings
        saved = self.step
        peak = Peak(distributed.device())
        with (
            told(self.model.engine, settings.stage, self.run_dir) as tell,
            Metrics(
                self.run_dir, settings.stage, steps=settings.steps, start=self.step, tell=tell
            ) as metrics,
            _signals() as stop,
        ):
            if self.step:
                metrics.note(f"{settings.stage}: resumed at step {self.step} of {settings.steps}")
            while self.step < settings.steps:
                asked_to_stop = self._one_step(step_fn, metrics, stop, peak)
                at_end = self.step == settings.steps
                if asked_to_stop or at_end or self.step % settings.checkpoint_every == 0:
                    self.save()
                    saved = self.step
                if asked_to_stop:
                    raise Interrupted(
                        f"{settings.stage}: stopped at step {saved} of {settings.steps}, "
                        "state saved; the same command goes on from here"
                    )
            if any(distributed.gather_objects(len(stop))):  # it came while the last was saved
                raise Interrupted(
                    f"{settings.stage}: stopped after its last step, state saved; the same command "
                    "goes on from here"
                )

    def save(self) -> None:
        """Writes a checkpoint of this moment. Collective."""
        self.checkpoints.save(
            self.model.engine,
            self.step,
            {
                "step": self.step,
                "loader": self.loader.state_dict(),
                "skipped": self.skipped,
                "bad_in_a_row": self.bad_in_a_row,
                "multiplier": self.balance.multiplier if self.balance else {},
                "on_policy": self.on_policy.state_dict() if self.on_policy else {},
                "latest": self._latest,
            },
            {name: share.item() for name, share in self._shares.items()},
        )

    def _resume(self) -> None:
        saved = self.checkpoints.load(self.model.engine)
        if saved is None:
            return
        state = saved.state
        self.step, self.skipped, self.bad_in_a_row = (
            state["step"],
            state["skipped"],
            state["bad_in_a_row"],
        )
        self.loader.load_state_dict(state["loader"])
        self._shares = {
            name: torch.tensor(share, dtype=torch.float64, device=distributed.device())
            for name, share in saved.shares.items()
        }
        self._latest = state["latest"]
        if self.balance:
            self.balance.multiplier = state["multiplier"]
        if self.on_policy:
            self.on_policy.load_state_dict(state["on_policy"])

    def _one_step(self, step_fn: StepFn, metrics: Metrics, stop: list[int], peak: Peak) -> bool:
        """One optimizer step over all ranks; returns whether any rank was asked to stop."""
        began = time.monotonic()
        self.step += 1
        learning_rate = self.model.learning_rate
        self._set_multipliers()
        batches = self._batches()
        mine = counts_of(batches)
        counts = torch.tensor(list(mine.values()), dtype=torch.float64)
        totals = distributed.sum_over_ranks(counts).tolist()
        denominators = {u: max(n, 1.0) for u, n in zip(mine, totals, strict=True)}
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            with self._naming(batch):
                losses = step_fn(batch.to(distributed.device()), denominators)
                for name, value in losses.sums.items():
                    sums[name] = sums[name] + value if name in sums else value
                self.model.step()
        for name, value in sums.items():
            self._shares[name] = value.double() / denominators[self.objectives.unit_of(name)]
        self._watch(batches, metrics)
        validation_loss = self.on_policy.after_step(self.step) if self.on_policy else None
        balancing = self.balance is not None and self.balance.due(self.step)
        if (
            balancing
            or validation_loss is not None
            or self.step % self.settings.log_every == 0
            or self.step == self.settings.steps
        ):
            means = self._means()
            if balancing and self.model.step_applied:
                self._measure_levels()
            seconds = time.monotonic() - began
            metrics.write(
                self.step,
                {
                    "loss": sum(self.objectives.scale_of(n) * v for n, v in means.items()),
                    **{f"loss/{name}": value for name, value in means.items()},
                    "gradient_norm": self.model.gradient_norm,
                    "learning_rate": learning_rate,
                    "tokens": int(denominators["tokens"]),
                    "tokens_per_second": denominators["tokens"] / seconds,
                    "seconds": seconds,
                    **_largest(peak),
                    "epoch": self.loader.epoch,
                    "skipped_steps": self.skipped,
                    **self._own_words(validation_loss),
                },
            )
        # Asked now and not with the counts: a signal gets no other step's time before it is saved.
        return bool(distributed.sum_over_ranks(torch.tensor([float(len(stop))])).item())

    @contextmanager
    def _naming(self, batch: Batch) -> Iterator[None]:
        """Inside, a lack of memory is told with the records that were too much."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            train, rows = f"{self.settings.stage}.train", len(batch.record_ids)
            smaller = f"{train}.micro_batch_size={rows // 2}, " if rows > 1 else ""
            raise OutOfMemory(
                f"{self.settings.stage}: rank {distributed.rank()} ran out of memory at step "
                f"{self.step}, in a micro-batch of {batch.input_ids_BT.shape[1]} tokens by the "
                f"records {', '.join(map(repr, batch.record_ids))}; set {smaller}"
                f"{train}.gradient_checkpointing=true or a smaller data.max_length, or take more "
                "ranks; the same command goes on from the last checkpoint"
            ) from error

    def _batches(self) -> list[Batch]:
        """This rank's micro-batches of the step: of the data, or of the student's own writing."""
        batches = self.loader.next_step()
        own = self.on_policy.of_step(self.step, batches) if self.on_policy else None
        self.objectives.own_words = own is not None
        return batches if own is None else own

    def _own_words(self, validation_loss: float | None) -> dict[str, float]:
        if self.on_policy is None:
            return {}
        found = {"own_words": float(self.objectives.own_words), "own_share": self.on_policy.share}
        return found if validation_loss is None else {**found, "validation_loss": validation_loss}

    def _set_multipliers(self) -> None:
        multiplier = dict.fromkeys(self.objectives.multiplier, 1.0)
        if self.balance:
            multiplier.update(self.balance.multiplier)
        if self.settings.staged:
            turn, before = staged_turn(self.step, self.settings.steps, self.settings.staged)
            multiplier = {level: m if level == turn else 0.0 for level, m in multiplier.items()}
            self.objectives.steps_before = before
        self.objectives.multiplier = multiplier
        self.objectives.step = self.step

    def _measure_levels(self) -> None:
        """By what every objective was when it last counted, and with its full weight: one that
        skips steps or is still warming up is not to be made up for.
        """
        assert self.balance is not None
        losses: dict[str, float] = {}
        for name, value in self._latest.items():
            level = self.objectives.level_of(name)
            losses[level] = losses.get(level, 0.0) + self.objectives.full_weight_of(name) * value
        self.balance.measure(losses)

    def _means(self) -> dict[str, float]:
        """The mean over all ranks of each objective that has counted since this was last asked, as
        it last was; one collective, one device-to-host copy.
        """
        stacked = torch.stack(list(self._shares.values()))
        values: list[float] = distributed.sum_over_ranks(stacked).tolist()
        means = dict(zip(self._shares, values, strict=True))
        self._shares = {}
        if self.model.step_applied:
            self._latest |= means
        return means

    def _watch(self, batches: list[Batch], metrics: Metrics) -> None:
        """Counts steps that DeepSpeed skipped because the gradient was not finite; gives up after
        too many.
        """
        if self.model.step_applied:
            self.bad_in_a_row = 0
            return
        self.skipped += 1
        self.bad_in_a_row += 1
        shares = distributed.gather_objects([i for b in batches for i in b.record_ids])
        ids = [i for share in shares for i in share]
        path = self.run_dir / "bad_steps.jsonl"
        distributed.on_main(
            _append, path, {"stage": self.settings.stage, "step": self.step, "record_ids": ids}
        )
        metrics.note(
            f"{self.settings.stage}: step {self.step} skipped, its gradient is not finite; "
            f"records in {path}"
        )
        if self.bad_in_a_row >= self.settings.max_bad_steps:
            raise Diverged(
                f"{self.settings.stage}: {self.bad_in_a_row} steps in a row without a finite "
                f"gradient, last step {self.step}; their records are in {path}; lower the learning "
                "rate, or look at those records"
            )


def _largest(peak: Peak) -> dict[str, float]:
    """The stage's peak memory until now, of the rank that needed most. Collective."""
    held = torch.tensor([peak.megabytes() or 0.0], dtype=torch.float64)
    most = distributed.max_over_ranks(held).item()
    return {"peak_memory_MB": most} if most else {}


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        print(json.dumps(entry), file=file)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a list, so that it can be looked at."""
    received: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {
        kind: signal.signal(kind, lambda number, frame: received.append(number)) for kind in kinds
    }
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
