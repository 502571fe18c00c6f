"""A small distillation run on DeepSpeed's engines, put together by hand: what the tests of training
look into.

Everything here runs on the ranks that `launch_ranks` starts. A folder holds `teacher/` and
`train.jsonl`; the student is compared with that teacher, through projections where their shapes
ask for them.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.utils import safe_get_full_grad

from makd_llm import distributed
from makd_llm.checkpoint.folder import read_config
from makd_llm.checkpoint.state import Checkpoints
from makd_llm.config import DataConfig, DistilConfig
from makd_llm.data.batch import collate, counts_of, examples_of
from makd_llm.data.loader import TrainLoader
from makd_llm.data.schema import Example
from makd_llm.factorize.student import Recipe, factorize
from makd_llm.models.pairing import pair
from makd_llm.models.projections import Projections
from makd_llm.models.sharded import load_sharded
from makd_llm.models.source import load_tokenizer
from makd_llm.objectives.combine import Objectives
from makd_llm.train.build import (
    build_chains,
    build_loader,
    build_objectives,
    build_on_policy,
    build_projections,
    build_prompts,
    staged_shares,
)
from makd_llm.train.deepspeed_config import frozen_config
from makd_llm.train.engine import Frozen, Trained
from makd_llm.train.loop import Loop, LoopSettings
from makd_llm.train.on_policy import OnPolicy
from makd_llm.train.over_parameterize import over_parameterize
from makd_llm.train.step import distill_step

BATCH = 4
FP32_ZERO3: dict[str, Any] = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "steps_per_print": 10**9,
}


class Parts(NamedTuple):
    """What a distillation step needs."""

    trained: Trained
    teacher: Frozen
    objectives: Objectives
    loader: TrainLoader

    def close(self) -> None:
        self.trained.close()
        self.teacher.close()


def sizes(world: int, micro: int, stage: int = 3) -> dict[str, Any]:
    """A DeepSpeed config in float32 for batches of 4, split over ranks and micro-batches."""
    ds = copy.deepcopy(FP32_ZERO3)
    ds["train_micro_batch_size_per_gpu"] = micro
    ds["gradient_accumulation_steps"] = BATCH // (world * micro)
    ds["zero_optimization"]["stage"] = stage
    return ds


def factorized(folder: Path, start: str = "teacher") -> Path:
    """A low-rank student of the model in `start`, by plain SVD; every rank calls this, first of
    all.
    """
    distributed.init()
    student = folder / f"student-{distributed.world_size()}"
    factorize(
        folder / start,
        student,
        Recipe(keep_ratio=0.5, method="svd", rank_multiple=1),
        [],
        tokenizer=load_tokenizer(folder / start),
        dtype=torch.float32,
    )
    return student


def small_loader(
    folder: Path, student: Path, micro_batch_size: int, data: dict[str, Any] | None = None
) -> TrainLoader:
    """Batches of 4 records of `train.jsonl`, always in the same order."""
    settings = DataConfig(source=str(folder / "train.jsonl"), max_length=64, **(data or {}))
    return build_loader(
        settings,
        build_prompts(settings, load_tokenizer(student)),
        batch_size=BATCH,
        micro_batch_size=micro_batch_size,
        seed=1,
        pad_id=2,
    )


def parts(
    folder: Path,
    student: Path,
    ds: dict[str, Any],
    distil: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **trained: Any,
) -> Parts:
    """Engines, objectives and loader. distil, data: settings of these blocks; trained: of the
    student's engine.
    """
    asked = DistilConfig.model_validate(distil or {})
    config = read_config(student)
    pairing = pair(config, read_config(folder / "teacher"), asked.layer_map)
    model = load_sharded(student, ds, torch.float32)
    objectives = build_objectives(asked, model.family, config.num_hidden_layers, pairing)
    projections = build_projections(objectives, pairing)
    if projections:
        model.projections = Projections(projections, ds, torch.float32)
    chains = build_chains(asked, objectives)
    if chains is not None:
        over_parameterize(model, chains, student, folder / "teacher", pairing, ds, torch.float32)
    frozen = frozen_config(ds, micro_batch_size=2)
    return Parts(
        Trained(model, ds, **trained),
        Frozen(load_sharded(folder / "teacher", frozen, torch.float32), frozen),
        objectives,
        small_loader(folder, student, ds["train_micro_batch_size_per_gpu"], data),
    )


def named_parameters(trained: Trained) -> dict[str, torch.nn.Parameter]:
    """The student's by their names, its projections' by their points, e.g. `0 gate`."""
    found = dict(trained.model.model.named_parameters())
    projections = trained.model.projections
    if projections is not None:
        for (layer, role), weight in zip(projections.points, projections.parameters(), strict=True):
            found[f"{layer} {role}"] = weight
    return found


def gradients(
    folder: Path, student: Path, ds: dict[str, Any], *, copies: int = 1, **changes: Any
) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step's loss, whole, before clipping; on the student's own texts
    where those are asked for. copies: how often each record is in its micro-batch; changes: as in
    parts.
    """
    made = parts(folder, student, ds, **changes)
    trained, teacher, objectives, loader = made
    batches = loader.next_step()
    on_policy = _on_policy(made, DistilConfig.model_validate(changes.get("distil") or {}))
    own = on_policy.of_step(1, batches) if on_policy else None
    if own is not None:
        batches, objectives.own_words = own, True
    if copies > 1:
        batches = [collate(examples_of(batch) * copies, pad_id=2) for batch in batches]
    counts = counts_of(batches)
    totals = distributed.sum_over_ranks(torch.tensor(list(counts.values()))).tolist()
    denominators = dict(zip(counts, totals, strict=True))
    for index, batch in enumerate(batches):
        distill_step(trained, teacher, objectives, batch, denominators)
        if index < len(batches) - 1:
            trained.step()
    found = {n: safe_get_full_grad(p).clone() for n, p in named_parameters(trained).items()}
    made.close()
    return found


def run_loop(
    made: Parts,
    run_dir: Path,
    steps: int,
    *,
    distil: dict[str, Any] | None = None,
    save_every: int = 10**9,
    after: Callable[[int], None] = lambda step: None,
    held_out: Sequence[Example] = (),
) -> list[str]:
    """Trains for so many steps; what the checkpoints said. after: called after each micro-batch.
    held_out: what a validation loss is of.
    """
    said: list[str] = []
    asked = DistilConfig.model_validate(distil or {})
    loop = Loop(
        made.trained,
        made.objectives,
        made.loader,
        Checkpoints(run_dir / "checkpoints", keep=2, tell=said.append),
        LoopSettings(
            "distil",
            steps,
            save_every,
            max_bad_steps=3,
            staged=staged_shares(asked),
        ),
        run_dir,
        on_policy=_on_policy(made, asked, held_out),
    )

    def step(batch: Any, counts: dict[str, float]) -> Any:
        losses = distill_step(made.trained, made.teacher, made.objectives, batch, counts)
        after(loop.step)
        return losses

    loop.run(step)
    return said


def _on_policy(
    made: Parts, asked: DistilConfig, held_out: Sequence[Example] = ()
) -> OnPolicy | None:
    return build_on_policy(
        asked,
        DataConfig(max_length=64),
        1,
        made.trained.model,
        (2,),
        dtype=torch.float32,
        pad_id=2,
        validation_loss=lambda: made.trained.loss_of(held_out, 2, 2),
    )


def assert_same_gradient(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Every gradient of `expected` is there, is not zero, and agrees in float32."""
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-3, atol=2e-6, msg=f"{name}: {{}}".format
        )
