"""Who takes part in peers.py: TRL's two trainers by their own steps, a plain loop, and ours.

All read the same two folders, see the same batch, and learn the same thing: forward KL(teacher,
student) at temperature 1, over the summary's tokens, divided by their number. `makd` learns more
beside it, and `kd` cross-entropy; each reports its KL, and peers.py holds them against each other.
AdamW, gradients clipped at 1 and SDPA for all. Without gradient checkpointing but for the two that
are named so: TRL has it on unless told otherwise, ours off.

- TRL's DistillationTrainer with beta 0: its `training_step`, given the texts that it would have the
  student write. Prompts are padded on the left and summaries on the right; the heads' products run
  with the loss, in pieces (off Triton for padding as well).
- TRL's GKDTrainer with beta 0 and lmbda 0: its `training_step`. Logits of all positions.
- transformers and torch: the loop that one writes first. Logits of all positions, softmax of the
  summary's alone.
- makd_llm: `distill_step` on DeepSpeed's engines. The heads' products run with the loss.

In bf16 the peers have fp32 weights under autocast, as TRL trains by default, and a bf16 teacher;
ours has bf16 weights, and fp32 ones in the optimizer.
"""
# B records, P and S tokens of the longest prompt and summary, T of the longest record

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from makd_llm import distributed
from makd_llm.checkpoint.folder import read_config
from makd_llm.config import load_config
from makd_llm.data.batch import IGNORE, Batch, counts_of, examples_of
from makd_llm.models.families import family_of
from makd_llm.models.modeling_lowrank import register
from makd_llm.models.pairing import pair
from makd_llm.models.sharded import load_sharded
from makd_llm.models.source import load_tokenizer
from makd_llm.train.build import build_objectives
from makd_llm.train.deepspeed_config import frozen_config
from makd_llm.train.engine import Frozen, Trained
from makd_llm.train.step import distill_step

RATE, BETAS, CLIPPING = 1e-6, (0.9, 0.95), 1.0
"""Of every AdamW, without decay. Little is learnt: what is timed does not hang on it."""


@dataclass(frozen=True)
class Setting:
    """What all are given. deepspeed: the complete JSON of ours."""

    teacher: Path
    student: Path
    dtype: torch.dtype
    device: str
    records: int
    deepspeed: dict[str, Any]


def alike(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """A complete JSON with the optimizer's settings of the others."""
    given = copy.deepcopy(deepspeed)
    given["optimizer"]["params"] |= {"lr": RATE, "betas": list(BETAS), "weight_decay": 0.0}
    return given | {"gradient_clipping": CLIPPING}


class Contestant(Protocol):
    """Two models, and what a step is made of."""

    teacher: PreTrainedModel
    student: PreTrainedModel

    def fed(self, batch: Batch) -> Any:
        """The batch in the form that `learn` takes."""

    def learn(self, given: Any) -> Tensor:
        """Both forwards, loss and backward. Returns KL(teacher, student), nats per token."""

    def update(self) -> None:
        """The optimizer's step; no gradient is left."""


class Ours:
    """A preset of this project's."""

    def __init__(self, preset: str, setting: Setting, *, checkpointed: bool = False) -> None:
        distributed.quiet()
        distributed.init()
        config = setting.deepspeed
        student = load_sharded(setting.student, config, setting.dtype)
        self.trained = Trained(student, config, gradient_checkpointing=checkpointed)
        frozen = frozen_config(config, micro_batch_size=setting.records)
        self.frozen = Frozen(load_sharded(setting.teacher, frozen, setting.dtype), frozen)
        self.student, self.teacher = self.trained.model.model, self.frozen.model.model
        shape = read_config(setting.student)
        self.objectives = build_objectives(
            load_config(None, [f"distil.preset={preset}"]).distil,
            family_of(shape),
            shape.num_hidden_layers,
            pair(shape, read_config(setting.teacher)),
        )

    def fed(self, batch: Batch) -> Batch:
        return batch

    def learn(self, given: Batch) -> Tensor:
        counts = counts_of([given])
        losses = distill_step(self.trained, self.frozen, self.objectives, given, counts)
        return losses.sums["logits"] / counts["targets"]

    def update(self) -> None:
        self.trained.step()


class Plain:
    """transformers and torch, and nothing else."""

    def __init__(self, setting: Setting) -> None:
        self.teacher, self.student = models(setting)
        self.teacher.eval()
        self.student.train()
        self.parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, RATE, BETAS, weight_decay=0.0)
        mixed = setting.dtype == torch.bfloat16
        self.precision = partial(torch.autocast, setting.device, torch.bfloat16, enabled=mixed)

    def fed(self, batch: Batch) -> Batch:
        return batch

    def learn(self, given: Batch) -> Tensor:
        inputs = {"input_ids": given.input_ids_BT, "attention_mask": given.attention_mask_BT}
        with self.precision():
            with torch.no_grad():
                teacher_logits_BTV = self.teacher(**inputs).logits
            student_logits_BTV = self.student(**inputs).logits
            taught_BT = given.target_mask_BT
            loss = F.kl_div(
                F.log_softmax(student_logits_BTV[taught_BT].float(), -1),
                F.log_softmax(teacher_logits_BTV[taught_BT].float(), -1),
                reduction="batchmean",
                log_target=True,
            )
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIPPING)
        self.optimizer.step()
        self.optimizer.zero_grad()


class OfTRL:
    """What both trainers have in common: everything but how they are made and fed. What
    `Trainer.train` does around a step is done here: prepare, clip, step, zero.
    """

    def __init__(self, trainer: Any, inputs: Callable[[Batch], dict[str, Tensor]]) -> None:
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        self.trainer, self.inputs = trainer, inputs
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.student, self.teacher = trainer.model, trainer.teacher_model
        self.model.train()

    def fed(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        return self.inputs(batch), batch.n_targets

    def learn(self, given: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        loss: Tensor = self.trainer.training_step(self.model, *given)
        return loss

    def update(self) -> None:
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), CLIPPING)
        self.optimizer.step()
        self.model.zero_grad()


def trl_distillation(setting: Setting, *, checkpointed: bool = False) -> OfTRL:
    """TRL's DistillationTrainer, which takes given texts in place of the student's."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Given(DistillationTrainer):
        def _prepare_inputs(self, generation_batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return generation_batch

    teacher, student = models(setting)
    if checkpointed:  # as `Trainer.train` would
        student.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = Given(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(**arguments(setting), beta=0.0, temperature=1.0),
        train_dataset=Dataset.from_list([{"prompt": "none"}]),
        processing_class=load_tokenizer(setting.student),
    )
    return OfTRL(trainer, prompts_and_completions)


def trl_gkd(setting: Setting) -> OfTRL:
    """TRL's GKDTrainer, which never has the student write."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher, student = models(setting)
    said = [{"role": "user", "content": "none"}, {"role": "assistant", "content": "none"}]
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(**arguments(setting), beta=0.0, lmbda=0.0),
        train_dataset=Dataset.from_list([{"messages": said}]),
        processing_class=load_tokenizer(setting.student),
    )
    return OfTRL(trainer, whole_texts)


def models(setting: Setting) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student as a user of transformers loads them, on the device."""
    register()
    load = partial(AutoModelForCausalLM.from_pretrained, attn_implementation="sdpa")
    teacher = load(setting.teacher, dtype=setting.dtype)
    student = load(setting.student, dtype=torch.float32)
    for model in (teacher, student):
        model.config.use_cache = False
        torch.nn.Module.to(model, setting.device)  # transformers' own `to` has no types
    return teacher, student


def arguments(setting: Setting) -> dict[str, Any]:
    """Of both trainers' configs: those of transformers' TrainingArguments."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": setting.device == "cpu",
        "bf16": setting.dtype == torch.bfloat16,
        "per_device_train_batch_size": setting.records,
        "gradient_checkpointing": False,
        "learning_rate": RATE,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": 0.0,
        "report_to": [],
    }


def whole_texts(batch: Batch) -> dict[str, Tensor]:
    """As GKDTrainer takes them: labels (B, T) stand at their tokens, not before."""
    labels_BT = torch.full_like(batch.labels_BT, IGNORE)
    labels_BT[:, 1:] = batch.labels_BT[:, :-1]
    return {
        "input_ids": batch.input_ids_BT,
        "attention_mask": batch.attention_mask_BT,
        "labels": labels_BT,
    }


def prompts_and_completions(batch: Batch) -> dict[str, Tensor]:
    """As DistillationTrainer makes them: (B, P) padded on the left, (B, S) on the right."""
    examples = examples_of(batch)
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    completions = [example.input_ids[example.prompt_length :] for example in examples]
    made: dict[str, Tensor] = {}
    for name, rows, side in (("prompt", prompts, "left"), ("completion", completions, "right")):
        longest = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        made[f"{name}_ids"] = ids.to(batch.input_ids_BT.device)
        made[f"{name}_mask"] = mask.to(batch.input_ids_BT.device)
    return made | {"num_items_in_batch": batch.n_targets}


TRL = "TRL DistillationTrainer"
"""The one that the others are measured by."""

CONTESTANTS: dict[str, Callable[[Setting], Contestant]] = {
    TRL: trl_distillation,
    "TRL GKDTrainer": trl_gkd,
    "transformers + torch": Plain,
    "makd_llm kd": partial(Ours, "kd"),
    "makd_llm makd": partial(Ours, "makd"),
    f"{TRL}, checkpointed": partial(trl_distillation, checkpointed=True),
    "makd_llm kd, checkpointed": partial(Ours, "kd", checkpointed=True),
}
