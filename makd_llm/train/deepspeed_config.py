"""Joins the run's config with DeepSpeed's JSON.

The JSON is DeepSpeed's own: precision, sharding, optimizer, clipping, batch sizes. Where it says
"auto" the run's config fills the value in; where both say something different, that is an error
that names both. `OWNED` is the table, ds_configs/README.md its prose.
"""

import copy
import difflib
import json
from pathlib import Path
from typing import Any

import torch

from makd_llm.config import TrainConfig
from makd_llm.errors import UserError
from makd_llm.redaction import names_a_secret

AUTO = "auto"

OWNED: dict[str, str] = {
    # DeepSpeed's JSON -> what fills its "auto", as a key of a `train` section
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_clipping": "gradient_clipping",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.total_num_steps": "steps",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Reads `--ds`. Raises UserError for a missing or malformed file and for settings this program
    cannot honour.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such DeepSpeed config; ds_configs/ holds examples") from None
    except IsADirectoryError:
        raise UserError(
            f"{path}: a folder, not a DeepSpeed config; name a .json file in it"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected a DeepSpeed config in JSON") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a DeepSpeed config in JSON"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(config).__name__}")
    _check_known_keys(config, path)
    _check_types(config, path)
    _check_zero(config.get("zero_optimization", {}), path)
    _check_secrets(config, path, "")
    if "optimizer" not in config:
        raise UserError(f"{path}: no optimizer; add one, as ds_configs/zero3.json has")
    if config.get("fp16", {}).get("enabled"):
        raise UserError(
            f"{path}: fp16.enabled: only bf16 or fp32 are supported; set bf16.enabled instead"
        )
    return config


def _check_known_keys(config: dict[str, Any], path: Path) -> None:
    """DeepSpeed ignores keys it does not know; a misspelt one would silently change the run."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig  # noqa: F401  (fills the constants' module)

    known = {
        value
        for name, value in vars(constants).items()
        if name.isupper() and isinstance(value, str)
    }
    known |= {
        "zero_optimization",
        "optimizer",
        "scheduler",
        "fp16",
        "bf16",
        "aio",
        "flops_profiler",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "activation_checkpointing",
        "autotuning",
        "comms_logger",
        "compression_training",
        "data_efficiency",
        "elasticity",
        "checkpoint",
        "data_types",
        "torch_autocast",
        "tensor_parallel",
        "compile",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "sparse_attention",
        "wall_clock_breakdown",
        "dump_state",
        "prescale_gradients",
        "gradient_predivide_factor",
        "communication_data_type",
        "seed",
    }
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = (
                f"did you mean {near[0]}?" if near else "see DeepSpeed's list of configuration keys"
            )
            raise UserError(f"{path}: unknown key {key}; {advice}")


def _check_secrets(section: dict[str, Any], path: Path, above: str) -> None:
    """DeepSpeed writes its whole JSON into every checkpoint."""
    for key, value in section.items():
        if names_a_secret(key) and isinstance(value, str) and value:
            raise UserError(
                f"{path}: {above}{key} would be written into every checkpoint; leave it out and "
                "give it in the environment (COMET_API_KEY, WANDB_API_KEY)"
            )
        if isinstance(value, dict):
            _check_secrets(value, path, f"{above}{key}.")


def _check_types(config: dict[str, Any], path: Path) -> None:
    """What DeepSpeed would meet with a traceback, or take for something else."""
    monitors = ("tensorboard", "wandb", "csv_monitor", "comet")
    for section in ("optimizer", "scheduler", "bf16", "fp16", "zero_optimization", *monitors):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(
                f"{path}: {section} is {config[section]!r}; expected an object in braces"
            )
    for section in ("optimizer", "scheduler"):
        if not isinstance(config.get(section, {}).get("params", {}), dict):
            raise UserError(f"{path}: {section}.params: expected an object in braces")
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        value = config.get(key, 1)
        if value != AUTO and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f'{path}: {key} is {value!r}; expected a positive integer or "auto"')
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3")
    rate = config.get("optimizer", {}).get("params", {}).get("lr", AUTO)
    if rate != AUTO and (isinstance(rate, bool) or not isinstance(rate, int | float)):
        raise UserError(f'{path}: optimizer.params.lr is {rate!r}; expected a number or "auto"')


def _check_zero(section: dict[str, Any], path: Path) -> None:
    """By DeepSpeed's own class, whose errors are many lines and come when models are loaded."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["zero_optimization", *(str(part) for part in first["loc"])])
        reason = first["msg"]
        if first["type"] == "extra_forbidden":
            fields = DeepSpeedZeroConfig.model_fields
            known = [*fields, *(str(f.alias) for f in fields.values() if f.alias)]
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
            reason = "unknown to DeepSpeed" + (f"; did you mean {near[0]}?" if near else "")
        raise UserError(f"{path}: {place}: {reason}") from None


def training_config(
    deepspeed: dict[str, Any], train: TrainConfig, *, world_size: int, ds_path: Path, section: str
) -> dict[str, Any]:
    """The complete JSON of the student's engine: every "auto" filled, batch sizes multiplied out.

    section: the path of `train` in the run's config, for messages. Raises UserError on a
    contradiction.
    """
    resolved = copy.deepcopy(deepspeed)
    for path, key in OWNED.items():
        value = train.warmup if key == "warmup_steps" else getattr(train, key)
        _join(resolved, path, value, f"{section}.{key}", key in train.model_fields_set, ds_path)
    _multiply_out(resolved, world_size, ds_path)
    resolved.setdefault("steps_per_print", 10**9)
    resolved["gradient_accumulation_steps"] = int(resolved["gradient_accumulation_steps"])
    return resolved


def left_to_json(deepspeed: dict[str, Any], train: TrainConfig) -> TrainConfig:
    """The section with null for whatever the JSON states itself: what took part in the run, so that
    the section, given again with the same JSON, contradicts nothing.
    """
    ruled: dict[str, None] = {}
    for path, key in OWNED.items():
        place, last = _place(deepspeed, path)
        if place.get(last, AUTO) != AUTO and key != "steps":
            ruled[key] = None
    return train.model_copy(update=ruled)


def frozen_config(deepspeed: dict[str, Any], *, micro_batch_size: int) -> dict[str, Any]:
    """The JSON of an engine that only runs forward: sharding and precision as in `--ds`, no
    optimizer.
    """
    kept: dict[str, Any] = {
        key: copy.deepcopy(deepspeed[key]) for key in ("bf16",) if key in deepspeed
    }
    zero = copy.deepcopy(deepspeed.get("zero_optimization", {}))
    zero.pop("offload_optimizer", None)
    # Only stage 3 shards weights; below it there is nothing to shard without an optimizer.
    kept["zero_optimization"] = zero if zero.get("stage") == 3 else {"stage": 0}
    kept["train_micro_batch_size_per_gpu"] = micro_batch_size
    kept["steps_per_print"] = 10**9
    return kept


def dtype_of(deepspeed: dict[str, Any]) -> torch.dtype:
    """The dtype of weights and activations: bfloat16 where the JSON says so, else float32."""
    return torch.bfloat16 if deepspeed.get("bf16", {}).get("enabled") else torch.float32


def _place(config: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The object that holds the last key of a dotted path (an empty one where there is none)."""
    *parents, last = path.split(".")
    for parent in parents:
        config = config.get(parent, {})
    return config, last


def _join(
    config: dict[str, Any], path: str, value: Any, run_key: str, explicit: bool, ds_path: Path
) -> None:
    place, last = _place(config, path)
    if last not in place:
        return
    stated = place[last]
    if stated == AUTO:
        if value is None and path != "train_micro_batch_size_per_gpu":
            raise UserError(
                f'{ds_path}: {path} is "auto" but {run_key} is null; give one of them a value'
            )
        if value is None:
            del place[last]
        else:
            place[last] = value
    elif explicit and value is not None and stated != value:
        raise UserError(
            f'{ds_path}: {path} is {stated} but {run_key} is {value}; remove one, or set "auto"'
        )


def _multiply_out(config: dict[str, Any], world_size: int, ds_path: Path) -> None:
    """batch = micro-batch x accumulation x ranks: whatever is missing follows from the rest."""
    batch = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    accumulation = None if accumulation == AUTO else accumulation
    if batch is None:
        if micro is None:
            raise UserError(
                f"{ds_path}: neither train_batch_size nor train_micro_batch_size_per_gpu is set"
            )
        batch = micro * (accumulation or 1) * world_size
    if micro is None:
        micro = batch // (world_size * (accumulation or 1))
    if accumulation is None:
        accumulation = max(1, batch // (world_size * max(1, micro)))
    if micro < 1:
        raise UserError(
            f"{ds_path}: a batch of {batch} records has less than one for each of {world_size} "
            f"ranks{f' and {accumulation} micro-batches' if accumulation > 1 else ''}; choose a "
            "larger batch size, or fewer ranks"
        )
    if batch != micro * accumulation * world_size:
        raise UserError(
            f"{ds_path}: batch size {batch} is not micro-batch {micro} x "
            f"accumulation {accumulation} x {world_size} ranks; "
            "choose a batch size that the ranks can share"
        )
    config["train_batch_size"] = batch
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = accumulation
