"""What is to be planned, as plain numbers."""

import math
from dataclasses import dataclass

from makd_llm.cluster.activations import Captured
from makd_llm.cluster.sharding import Sharding
from makd_llm.cluster.sizes import Sizes


@dataclass(frozen=True)
class Job:
    """A distillation, or (without a teacher) a fine-tuning, on so many ranks.

    Attributes:
        student, teacher: the models.
        sharding: what DeepSpeed's JSON says.
        captured: what the objectives look at, per token.
        nodes, gpus: machines, and ranks on each.
        micro_batch, accumulation: records per rank and forward, and forwards per optimizer step.
        length, targets: tokens of a record, and those of them that are to be learnt (its summary).
        checkpointing: layers are computed again in the backward.
        compared: the head compares both models' logits.
        on_cpu: the ranks are CPU processes.
    """

    student: Sizes
    teacher: Sizes | None
    sharding: Sharding
    captured: Captured
    nodes: int = 1
    gpus: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    length: int = 1024
    targets: int = 256
    checkpointing: bool = False
    compared: bool = True
    on_cpu: bool = False

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def tokens(self) -> int:
        """Of a rank and forward."""
        return self.micro_batch * self.length

    @property
    def rows(self) -> int:
        """Tokens of a rank and forward whose logits are needed."""
        return self.micro_batch * self.targets

    @property
    def batch(self) -> int:
        """Records of an optimizer step."""
        return self.micro_batch * self.accumulation * self.ranks

    @property
    def largest_shard(self) -> int:
        """Numbers of the largest tensor that one rank holds a part of, in that part."""
        models = [sizes for sizes in (self.teacher, self.student) if sizes is not None]
        return max(math.ceil(max(sizes.tensors) / self.ranks) for sizes in models)

    @property
    def swaps(self) -> bool:
        """DeepSpeed's buffers for weights on NVMe, if any, have room for the largest shard."""
        on_disk = self.sharding.parameters == "nvme"
        return not on_disk or self.largest_shard <= self.sharding.swap_buffer

    @property
    def gathers(self) -> bool:
        """Weights are brought together before they are used."""
        apart = self.ranks > 1 or (self.sharding.parameters != "none" and not self.on_cpu)
        return self.sharding.stage == 3 and apart
