"""What DeepSpeed's JSON says about memory and messages, as plain numbers.

`zero_optimization` is read by DeepSpeed's own class (0.19), which knows its defaults and its old
names. Sizes of buckets are in numbers, not in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from makd_llm.errors import UserError

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

_SMALL = {"bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "fp32": 4, "float32": 4}
_NOT_PLANNED = {
    "zero_quantized_weights": "quantized weights",
    "zero_quantized_nontrainable_weights": "quantized weights",
    "zero_quantized_gradients": "quantized gradients",
    "zenflow": "ZenFlow's updates",
    "leaf_module": "leaf modules",
    "module_granularity_threshold": "leaf modules",
    "model_persistence_threshold": "limits to what stays whole",
    "use_all_reduce_for_fetch_params": "weights that come by all-reduces",
    "allgather_sequential": "weights that come one by one",
    "offload_optimizer.ratio": "optimizers that are offloaded in part",
    "offload_optimizer.super_offload": "SuperOffload's updates",
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
        swap_buffers, swap_buffer: how many buffers in host memory each model has for its weights on
            NVMe, and how many numbers one holds.
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
    swap_buffers: int = 5
    swap_buffer: int = 100_000_000

    def kept(self, head: int) -> int:
        """Numbers of a model that stay whole from its forward into its backward (ZeRO-3).

        What is used again within `reuse` numbers is not let go: half of them lie on either side of
        the turn. Nor is what the prefetch has passed over because it was there already: up to
        `live`. The head, of so many numbers, is what runs next in any case. Source: DeepSpeed's
        partitioned_param_coordinator.py, __params_to_release.
        """
        return max(self.live, self.reuse // 2, head)

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
    """Reads the numbers of a JSON that `read_deepspeed_config` has checked. Raises UserError for
    what the planner does not model.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
    _check_planned(zero, source)
    optimizer = config.get("optimizer", {})
    kind = str(optimizer.get("type", "AdamW"))
    if kind.lower() not in ("adam", "adamw"):
        raise UserError(
            f"{source}: optimizer.type {kind} is not planned; take Adam or AdamW, or measure it"
        )
    weight = 2 if config.get("bf16", {}).get("enabled") else 4
    gradient = config.get("data_types", {}).get("grad_accum_dtype")
    message = config.get("communication_data_type")
    stage, overlap = int(zero.stage), bool(zero.overlap_comm)
    moved, swap = zero.offload_optimizer, zero.offload_param
    return Sharding(
        stage=stage,
        weight=weight,
        gradient=_SMALL.get(str(gradient), weight),
        message=_SMALL.get(str(message), weight),
        reduce_bucket=zero.reduce_bucket_size,
        prefetch=zero.prefetch_bucket_size,
        live=zero.max_live_parameters,
        reuse=zero.max_reuse_distance,
        persist=zero.param_persistence_threshold,
        sub_group=zero.sub_group_size,
        overlap=overlap,
        buckets=0 if not zero.contiguous_gradients else 2 if stage < 3 and overlap else 1,
        optimizer=str(moved.device) if moved else "none",
        parameters=str(swap.device) if swap else "none",
        secondary=max(1, zero.zero_hpz_partition_size),
        fused=not optimizer.get("params", {}).get("torch_adam", False),
        swap_buffers=swap.buffer_count if swap else Sharding.swap_buffers,
        swap_buffer=swap.buffer_size if swap else Sharding.swap_buffer,
    )


def _check_planned(zero: "DeepSpeedZeroConfig", source: str) -> None:
    """Raises UserError for what differs from DeepSpeed's defaults and is not modelled."""
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    default = type(zero)(stage=zero.stage)
    moved, plain = zero.offload_optimizer, DeepSpeedZeroOffloadOptimizerConfig()
    for key, meaning in _NOT_PLANNED.items():
        section, _, name = key.rpartition(".")
        found, usual = (moved or plain, plain) if section else (zero, default)
        if getattr(found, name) != getattr(usual, name):
            raise UserError(
                f"{source}: zero_optimization.{key}: {meaning} are not planned yet; leave it out, "
                "and measure what it saves"
            )
    moves = zero.offload_param is not None and zero.offload_param.device != "none"
    for key, given in (
        ("offload_param", moves),
        ("zero_hpz_partition_size", zero.zero_hpz_partition_size > 1),
    ):
        if given and zero.stage < 3:
            raise UserError(
                f"{source}: zero_optimization.{key} does nothing at stage {zero.stage}; take "
                "stage 3, or leave it out"
            )
