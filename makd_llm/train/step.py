"""One micro-batch: teacher forward, student forward, objectives, the only backward of training."""

import torch

from makd_llm.data.batch import Batch
from makd_llm.objectives.attribution import ask
from makd_llm.objectives.combine import Losses, Objectives
from makd_llm.offline.read import TeacherCache
from makd_llm.shown import Shown
from makd_llm.train.attribution import attribution_loss
from makd_llm.train.engine import Frozen, Trained


def distill_step(
    student: Trained,
    teacher: Frozen,
    objectives: Objectives,
    batch: Batch,
    denominators: dict[str, float],
) -> Losses:
    """Adds one micro-batch's gradient. denominators: valid positions of the whole optimizer step,
    per unit.
    """
    with torch.no_grad(), teacher.capture(objectives.needs_of_teacher) as shown_by_teacher:
        teacher_hidden_BTD = teacher(batch)
    replay = objectives.replayed(shown_by_teacher)
    with (
        student.capture(objectives.needs_of_student, replay) as shown_by_student,
        teacher.output_weight() as teacher_weight_VD,
    ):
        at_head = objectives.at_head(batch, denominators, teacher_hidden_BTD, teacher_weight_VD)
        model_level = student(batch, at_head, shown_by_student)
        questions = {
            name: ask(batch, term, objectives.step, teacher_hidden_BTD, teacher_weight_VD)
            for name, term in objectives.asked.items()
        }
    del replay  # what has been fed need not wait for the backward
    losses = objectives(model_level, shown_by_student, shown_by_teacher, batch, denominators)
    for name, question in questions.items():
        term = objectives.attributions[name]
        exact = term.is_exact(student.differentiates_twice)
        loss, summed = attribution_loss(
            student.model, teacher.model, term, batch, question, exact=exact
        )
        scale = objectives.scale_of(name) / denominators["records"]
        losses = losses.plus(name, loss * scale, summed)
    student.backward(losses.total * (student.data_parallel_size * student.accumulation_steps))
    return losses.detached()


def offline_step(
    student: Trained,
    cache: TeacherCache,
    objectives: Objectives,
    batch: Batch,
    denominators: dict[str, float],
) -> Losses:
    """The same from what the teacher has said before."""
    if not student.model.without_padding:
        batch = batch.with_padding()
    shown_by_teacher = cache.shown(batch, objectives.needs_of_teacher)
    with student.capture(objectives.needs_of_student) as shown_by_student:
        at_head = objectives.at_head(batch, denominators, top=shown_by_teacher.top)
        model_level = student(batch, at_head, shown_by_student)
    losses = objectives(model_level, shown_by_student, shown_by_teacher, batch, denominators)
    student.backward(losses.total * (student.data_parallel_size * student.accumulation_steps))
    return losses.detached()


def finetune_step(
    model: Trained, objectives: Objectives, batch: Batch, denominators: dict[str, float]
) -> Losses:
    """The same without a teacher: to tune the teacher, and for objectives that need none."""
    model_level = model(batch, objectives.at_head(batch, denominators))
    losses = objectives(model_level, Shown(), Shown(), batch, denominators)
    model.backward(losses.total * (model.data_parallel_size * model.accumulation_steps))
    return losses.detached()
