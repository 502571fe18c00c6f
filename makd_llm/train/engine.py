"""The two DeepSpeed engines: the student's trains, the teacher's only runs forward.

Both wrap a CausalModel and offer the same three things: a forward, a scoped capture, and the output
weight gathered for the time of a `with`. The teacher is frozen, in eval mode, and its forward runs
without autograd; nothing can give it a gradient.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from makd_kernels.lean import keeping_less
from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.data.schema import Example
from makd_llm.evaluation.perplexity import perplexity
from makd_llm.memory import return_freed_memory
from makd_llm.models.capture import capture
from makd_llm.models.causal import AtHead, CausalModel
from makd_llm.models.tensor_train import TensorTrain
from makd_llm.shown import Needs, Shown
from makd_llm.train import monitors


class Frozen:
    """A model that is only read: the teacher, and any model under evaluation."""

    def __init__(self, model: CausalModel, deepspeed_config: dict[str, Any]) -> None:
        model.requires_grad_(False)
        model.eval()
        self.model = model
        self._engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config)
        self._engine.eval()
        self._sharded = (
            deepspeed_config["zero_optimization"]["stage"] == 3 and distributed.world_size() > 1
        )

    @torch.no_grad()
    def __call__(self, batch: Batch, at_head: AtHead | None = None) -> Any:
        """Last hidden states (B, T, D), or what `at_head` returns."""
        return self._engine(batch, at_head)

    @torch.no_grad()
    def generate(self, batch: Batch, **arguments: Any) -> Tensor:
        """Generated ids (B, T + new) for left-padded prompts; arguments of transformers'
        `generate`.
        """
        # Under ZeRO-3 every rank must run every forward, also one whose texts have all ended.
        result: Tensor = self._engine(batch, None, {**arguments, "synced_gpus": self._sharded})
        return result

    def capture(self, needs: Needs) -> AbstractContextManager[Shown]:
        """What the next forward shows."""
        return capture(self.model.model, self.model.family, needs)

    @contextmanager
    def output_weight(self) -> Iterator[Tensor]:
        """The head's weight (V, D), whole inside the `with`."""
        with deepspeed.zero.GatheredParameters([self.model.head.weight]):
            yield self.model.head.weight.detach()

    def close(self) -> None:
        """Gives the memory back; the model is gone after it."""
        _release(self._engine, self.model)
        del self._engine, self.model
        gc.collect()
        return_freed_memory()


class Trained:
    """A model that learns: the student, or the teacher while it is tuned."""

    def __init__(
        self,
        model: CausalModel,
        deepspeed_config: dict[str, Any],
        *,
        gradient_checkpointing: bool = False,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        """schedule: step (from 0) -> share of the peak learning rate; ignored where the JSON has a
        scheduler.
        """
        if gradient_checkpointing:
            # Reentrant checkpointing would cut captured tensors off from autograd.
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        self.model = model
        with monitors.starting():
            self.engine, *_ = deepspeed.initialize(
                model=model,
                config=deepspeed_config,
                model_parameters=list(model.parameters()),
                lr_scheduler=None
                if schedule is None or "scheduler" in deepspeed_config
                else partial(LambdaLR, lr_lambda=schedule),
            )
        self.differentiates_twice = (
            not gradient_checkpointing and not self.engine.zero_optimization_partition_weights()
        )
        """Whether a backward can go through a backward: all weights lie there while it runs."""
        # What a checkpointed layer runs again in the backward has to keep what its forward did.
        self._keeping: Callable[[], AbstractContextManager[None]] = nullcontext
        if not gradient_checkpointing:
            whole = not self.engine.zero_optimization_partition_weights()
            self._keeping = partial(keeping_less, whole_weights=whole)
        self.accumulation_steps: int = self.engine.gradient_accumulation_steps()
        self.data_parallel_size: int = self.engine.dp_world_size
        self.engine.train()

    def __call__(self, batch: Batch, at_head: AtHead, shown: Shown | None = None) -> Any:
        """What `at_head` returns, called where the output weight is whole. shown: of the capture
        around this call, to be projected where the model has projections.
        """
        with self._keeping():
            return self.engine(batch, at_head, shown=shown)

    def capture(
        self, needs: Needs, replay: dict[tuple[int, str], Tensor] | None = None
    ) -> AbstractContextManager[Shown]:
        """What the next forward shows; see models.capture."""
        return capture(self.model.model, self.model.family, needs, replay)

    def backward(self, loss: Tensor) -> None:
        """Backward by DeepSpeed, which divides by accumulation steps and averages over ranks."""
        self.engine.backward(loss)

    @torch.no_grad()
    def loss_of(self, examples: Sequence[Example], batch_size: int, pad_id: int) -> float:
        """Cross-entropy of the examples' targets in nats per token, as the model is now.
        Collective.
        """
        self.engine.eval()
        found = perplexity(self, examples, batch_size=batch_size, pad_id=pad_id)
        self.engine.train()
        return found.nats / max(found.tokens, 1)

    def step(self) -> None:
        """Counts a micro-batch; at the accumulation boundary, one optimizer step."""
        self.engine.step()

    @property
    def step_applied(self) -> bool:
        """False where the last boundary was skipped because the gradient was not finite."""
        return bool(self.engine.was_step_applied())

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group, as the next step will use it."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    @property
    def gradient_norm(self) -> float:
        """Global norm at the last boundary, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def close(self) -> None:
        """Gives the memory back; the model is gone after it."""
        _release(self.engine, self.model)
        del self.engine, self.model
        gc.collect()
        return_freed_memory()


def _release(engine: deepspeed.DeepSpeedEngine, model: CausalModel) -> None:
    """Empties what an engine holds. DeepSpeed's hooks tie engine, optimizer and parameters together
    through autograd's own graph nodes, which Python's collector cannot see into, so dropping the
    last reference frees nothing (DeepSpeed 0.19; tests/train holds that this does)."""
    optimizers = [o for o in (engine.optimizer, getattr(engine, "basic_optimizer", None)) if o]
    engine.destroy()
    for optimizer in optimizers:
        vars(optimizer).clear()
    nothing = torch.empty(0)
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = nothing.to(parameter.ds_tensor)
        parameter.grad = None
        parameter.data = nothing.to(parameter)


def whole_tensors(model: CausalModel) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters under their Hugging Face names, one at a time, whole, on the CPU; what
    is over-parameterized as the matrix that it stands for. Collective.
    """
    trains = {n: m for n, m in model.model.named_modules() if isinstance(m, TensorTrain)}
    for name, parameter in model.model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        train = trains.get(owner)
        if train is None:
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach().to("cpu", copy=True)
        elif leaf == "tensor_0":
            with deepspeed.zero.GatheredParameters(train.tensors), torch.no_grad():
                yield owner, train.stored().to("cpu", copy=True)
