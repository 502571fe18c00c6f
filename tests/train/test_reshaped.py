"""A student of another shape that computes what its teacher does starts with every loss at zero."""

import copy
from typing import Any

import pytest
import torch

from makd_llm.data.batch import Batch, collate
from makd_llm.data.schema import Example
from makd_llm.errors import UserError

EVERYTHING = {name: {"layers": "all"} for name in ("matrix", "attention", "hidden")}


def batch() -> Batch:
    rows = [[(7 * i + 3 * r) % 60 + 3 for i in range(9 - 2 * r)] for r in range(2)]
    return collate([Example(str(r), ids, 4) for r, ids in enumerate(rows)], pad_id=0)


def losses_at_start(student: Any, teacher: Any, **distil: Any) -> tuple[dict[str, float], Any]:
    """Every objective's mean over tokens, in float64 and without DeepSpeed; the student's model."""
    from makd_llm.config import DistilConfig
    from makd_llm.models.capture import CAPTURING_SDPA, capture
    from makd_llm.models.causal import CausalModel
    from makd_llm.models.families import family_of
    from makd_llm.models.pairing import pair
    from makd_llm.models.projections import Projections
    from makd_llm.train.build import build_objectives, build_projections

    models = []
    for model in (student, teacher):
        double = copy.deepcopy(model).double().eval()
        double.set_attn_implementation(CAPTURING_SDPA)
        models.append(CausalModel(double, family_of(double.config)))
    ours, theirs = models
    theirs.requires_grad_(False)
    asked = DistilConfig.model_validate({"objectives": EVERYTHING, **distil})
    pairing = pair(student.config, teacher.config, asked.layer_map)
    objectives = build_objectives(asked, ours.family, student.config.num_hidden_layers, pairing)
    projections = build_projections(objectives, pairing)
    if projections:
        ours.projections = Projections(projections, {}, torch.float64)
    counts = {"targets": float(batch().n_targets), "tokens": float(batch().n_tokens)}
    with capture(theirs.model, theirs.family, objectives.needs_of_teacher) as shown_by_teacher:
        hidden_BTE = theirs(batch())
    replay = objectives.replayed(shown_by_teacher)
    with capture(ours.model, ours.family, objectives.needs_of_student, replay) as shown:
        at_head = objectives.at_head(batch(), counts, hidden_BTE, theirs.head.weight)
        model_level = ours(batch(), at_head, shown=shown)
    losses = objectives(model_level, shown, shown_by_teacher, batch(), counts)
    losses.total.backward()
    unit = {"cross_entropy": "targets", "logits": "targets"}
    means = {n: float(v) / counts[unit.get(n, "tokens")] for n, v in losses.sums.items()}
    return means, ours


ASPECTS = ("matrix", "attention", "hidden", "logits")


@pytest.mark.parametrize("inputs", ["student", "teacher"])
def test_what_only_lost_idle_parts_starts_with_every_loss_at_zero(
    idle_and_reduced: tuple[Any, Any], inputs: str
) -> None:
    teacher, student = idle_and_reduced
    objectives = {**EVERYTHING, "matrix": {"layers": "all", "input": inputs}}
    losses, model = losses_at_start(student, teacher, objectives=objectives)
    assert all(losses[name] < 1e-12 for name in ASPECTS), losses
    found = sorted(role for _, role in model.projections.points)
    assert found == sorted([*["k", "v", "o", "gate", "up", "down", "hidden"] * 3])


def test_what_is_only_permuted_is_picked_on_the_teachers_side(
    plain_and_permuted: tuple[Any, Any],
) -> None:
    teacher, student = plain_and_permuted
    losses, model = losses_at_start(student, teacher)
    assert all(losses[name] < 1e-12 for name in ASPECTS), losses
    assert model.projections is None, "nothing to be learnt"
    del student.config.makd_origin
    unknown, _ = losses_at_start(student, teacher)
    assert unknown["attention"] > 0.01 and unknown["matrix"] > 0.01 > 1e-12 > unknown["hidden"]


def test_gradients_reach_every_projection(idle_and_reduced: tuple[Any, Any]) -> None:
    teacher, student = idle_and_reduced
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    _, model = losses_at_start(student, teacher)
    gradients = [p.grad for p in model.projections.parameters()]
    assert len(gradients) == 21 and all(g is not None and g.abs().max() > 0 for g in gradients)


def test_another_map_compares_with_other_layers(idle_and_reduced: tuple[Any, Any]) -> None:
    teacher, student = idle_and_reduced
    uniform, _ = losses_at_start(student, teacher, layer_map="uniform")
    listed, _ = losses_at_start(student, teacher, layer_map=[0, 1, 3])
    assert uniform == listed and uniform["matrix"] > 0.1 and uniform["attention"] > 0.01
    # Layer 1 hands on what layer 0 gives, so these two lists are one for hidden states.
    other, _ = losses_at_start(student, teacher, layer_map=[0, 2, 3])
    assert other["hidden"] < 1e-12 and other["matrix"] < 1e-12
    with pytest.raises(UserError, match=r"distil\.layer_map: 2 layers are named"):
        losses_at_start(student, teacher, layer_map=[0, 1])
