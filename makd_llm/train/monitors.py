"""The metrics of a run also where DeepSpeed's JSON says: W&B, Comet, CSV files, TensorBoard.

DeepSpeed's engine has a monitor for the blocks `wandb`, `comet`, `csv_monitor` and `tensorboard` of
`--ds`, and writes its learning rate there. What metrics.jsonl says goes the same way, under the
stage's name and, as DeepSpeed's own values, over the records seen. Only rank 0 writes.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from makd_llm.errors import UserError

PACKAGES = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}
"""Block of DeepSpeed's JSON -> the package it needs."""


def prepare(deepspeed: Mapping[str, Any], ds_path: Path, run_dir: Path) -> None:
    """For rank 0, before anything is loaded: that the monitors which are asked for can start.

    W&B's files go into the run folder, its runs into a group of that folder's name, and it leaves
    the terminal alone, where its own variables say nothing else.

    Raises UserError where a package or W&B's key is missing.
    """
    for block, package in PACKAGES.items():
        if deepspeed.get(block, {}).get("enabled") and find_spec(package) is None:
            raise UserError(
                f"{ds_path}: {block}.enabled: the package {package} is not installed; "
                f"`pip install {package}`, or set it to false"
            )
    if not deepspeed.get("wandb", {}).get("enabled"):
        return
    os.environ.setdefault("WANDB_DIR", str(run_dir.resolve()))
    os.environ.setdefault("WANDB_RUN_GROUP", run_dir.resolve().name)
    os.environ.setdefault("WANDB_CONSOLE", "off")
    import wandb

    offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    if not offline and not wandb.login(prompt=False):
        raise UserError(
            f"{ds_path}: wandb.enabled: no key of W&B is known here; `wandb login`, set "
            "WANDB_API_KEY, or set WANDB_MODE=offline and `wandb sync` later"
        )


@contextmanager
def starting() -> Iterator[None]:
    """Inside, an engine is made: what keeps W&B from starting becomes a UserError."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        raise UserError(
            f"wandb: {str(error).splitlines()[0]}; set WANDB_MODE=offline and `wandb sync` later"
        ) from error


@contextmanager
def told(engine: Any, stage: str, run_dir: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What takes the values of a step to the engine's monitors, which end with the stage."""
    monitors = engine.monitor
    if monitors.enabled and monitors.wandb_monitor is not None and "WANDB_NAME" not in os.environ:
        _wandb().run.name = f"{run_dir.resolve().name}-{stage}"

    def tell(values: Mapping[str, Any]) -> None:
        if monitors.enabled:
            numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
            monitors.write_events(
                [(f"{stage}/{name}", v, engine.global_samples) for name, v in numbers.items()]
            )

    code = 0
    try:
        yield tell
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        raise
    finally:
        if monitors.enabled:
            _end(monitors, code)


def _end(monitors: Any, code: int) -> None:
    """The next stage's values start anew; W&B would take them for steps of the past."""
    if monitors.wandb_monitor is not None:
        _wandb().finish(exit_code=code)
    if monitors.tb_monitor is not None:
        monitors.tb_monitor.summary_writer.close()


def _wandb() -> Any:
    return sys.modules["wandb"]  # DeepSpeed has imported it
