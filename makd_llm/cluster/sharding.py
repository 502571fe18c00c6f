"""What DeepSpeed's JSON says about memory and messages, as plain numbers.

Defaults are those of DeepSpeed 0.19 (`deepspeed.runtime.zero.config`); a test holds them against
it. Sizes of buckets are in numbers, not in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from makd_llm.errors import UserError

PLACES = ("none", "cpu", "nvme")
_SMALL = {"bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "fp32": 4, "float32": 4}
_NOT_PLANNED = {
    "zero_quantized_weights": "quantized weights",
    "zero_quantized_nontrainable_weights": "quantized weights",
    "zero_quantized_gradients": "quantized gradients",
    "zenflow": "ZenFlow",
    "stage3_module_granularity_threshold": "leaf modules",
}


@dataclass(frozen=True)
class Sharding:
    """How a run's two models and its optimizer lie on the ranks.

    Attributes:
        stage: of ZeRO.
        weight, gradient, message: bytes of one weight (and activation), of one gradient while it is
            accumulated, and of one gradient while it is reduced.
        reduce_bucket: gradients that are reduced together.
        prefetch, live, reuse, persist: ZeRO-3's stage3_prefetch_bucket_size,
            stage3_max_live_parameters, stage3_max_reuse_distance and
            stage3_param_persistence_threshold.
        sub_group: numbers that the optimizer updates together (ZeRO-3).
        overlap: messages run beside the computation.
        buckets: buffers that gradients are copied to before they are reduced.
        optimizer, parameters: where they are kept: "none" (the device), "cpu" or "nvme".
        secondary: ranks among which ZeRO++ keeps a second copy of the weights (hpZ); 1: none.
        fused: Adam in one kernel, without temporaries.
        swap_bytes: buffers in host memory for what lies on NVMe, for each model's parameters.
    """

    stage: int = 3
    weight: int = 2
    gradient: int = 2
    message: int = 2
    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    persist: int = 100_000
    sub_group: int = 1_000_000_000
    overlap: bool = True
    buckets: int = 1
    optimizer: str = "none"
    parameters: str = "none"
    secondary: int = 1
    fused: bool = False
    swap_bytes: int = 0

    @property
    def name(self) -> str:
        """In a few words."""
        said = [f"ZeRO-{self.stage}"]
        if self.secondary > 1:
            said.append(f"hpZ over {self.secondary}")
        for what, place in (("optimizer", self.optimizer), ("parameters", self.parameters)):
            if place != "none":
                said.append(f"{what} on {place}")
        return ", ".join(said)


def sharding_of(config: Mapping[str, Any], source: str = "the DeepSpeed JSON") -> Sharding:
    """Reads the JSON's numbers. Raises UserError for what the planner does not model."""
    zero = config.get("zero_optimization", {})
    for key, meaning in _NOT_PLANNED.items():
        if zero.get(key):
            raise UserError(
                f"{source}: zero_optimization.{key}: {meaning} are not planned yet; leave it out, "
                "and measure what it saves"
            )
    stage = int(zero.get("stage", 0))
    weight = 2 if config.get("bf16", {}).get("enabled") else 4
    gradient = config.get("data_types", {}).get("grad_accum_dtype")
    message = config.get("communication_data_type")
    contiguous = zero.get("contiguous_gradients", True)
    # overlap_comm is on by itself at stage 3 only
    overlap = bool(zero.get("overlap_comm", stage == 3))
    optimizer, parameters = (
        _place(zero, key, source) for key in ("offload_optimizer", "offload_param")
    )
    params = config.get("optimizer", {}).get("params", {})
    swap = zero.get("offload_param") or {}

    def number(key: str, default: float) -> int:
        # the old names of stage 3's keys are accepted by DeepSpeed as well
        return int(zero.get(f"stage3_{key}", zero.get(key, default)))

    return Sharding(
        stage=stage,
        weight=weight,
        gradient=_SMALL.get(str(gradient), weight),
        message=_SMALL.get(str(message), weight),
        reduce_bucket=number("reduce_bucket_size", 5e8),
        prefetch=number("prefetch_bucket_size", 5e7),
        live=number("max_live_parameters", 1e9),
        reuse=number("max_reuse_distance", 1e9),
        persist=number("param_persistence_threshold", 1e5),
        sub_group=number("sub_group_size", 1e9),
        overlap=overlap,
        buckets=0 if not contiguous else 2 if stage < 3 and overlap else 1,
        optimizer=optimizer,
        parameters=parameters,
        secondary=max(1, int(zero.get("zero_hpz_partition_size", 1))),
        fused=not params.get("torch_adam", False),
        swap_bytes=int(swap.get("buffer_count", 5)) * int(swap.get("buffer_size", 1e8)) * weight
        if parameters == "nvme"
        else 0,
    )


def _place(zero: Mapping[str, Any], key: str, source: str) -> str:
    found = str((zero.get(key) or {}).get("device") or "none")
    if found not in PLACES:
        raise UserError(
            f"{source}: zero_optimization.{key}.device is {found!r}; expected one of "
            f"{', '.join(PLACES)}"
        )
    return found
