"""What has to hold of a reshaped student's learned projections on DeepSpeed's engines: the gradient
is that of plain autograd for every split, nothing old is learnt where a level is off, a resumed run
is the same run, and an export has none of them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from makd_llm.data.batch import Batch
from makd_llm.models.families import FAMILIES
from makd_llm.models.origin import Origin, origin_of
from makd_llm.testing import launch_ranks
from makd_llm.testing.training import (
    FP32_ZERO3,
    assert_same_gradient,
    factorized,
    gradients,
    named_parameters,
    parts,
    run_loop,
    sizes,
    small_loader,
)

pytestmark = pytest.mark.slow

HEAD = 8
MODULES = {matrix.role: matrix.module for matrix in FAMILIES["llama"].dense}
EVERYTHING = {"objectives": {name: {"layers": "all"} for name in ("matrix", "attention", "hidden")}}


def origin_in(folder: Path) -> Origin:
    """What a model folder's config says of its origin."""
    from makd_llm.checkpoint.folder import read_config

    origin = origin_of(read_config(folder))
    assert origin is not None
    return origin


def by_hand(origin: Origin) -> dict[str, torch.Tensor]:
    """The projections at their start, written out: the teacher's width x the student's."""
    assert origin.channels and origin.neurons
    found = {}
    for layer in range(3):
        channels = torch.zeros(32, 24)
        channels[list(origin.channels), range(24)] = 1.0
        neurons = torch.zeros(48, 40)
        neurons[list(origin.neurons[layer]), range(40)] = 1.0
        heads = torch.eye(HEAD).repeat(2, 1)
        of_role = {"o": channels, "down": channels, "hidden": channels, "k": heads, "v": heads}
        of_role |= {"gate": neurons, "up": neurons}
        found |= {f"{layer} {role}": start for role, start in of_role.items()}
    return {name: start.clone().requires_grad_() for name, start in found.items()}


def shown_by(path: Path, one: Batch) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A plain model, its output with attention maps, and what its modules gave."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    seen: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for role, name in [*MODULES.items(), ("hidden", "")]:
            layer.get_submodule(name).register_forward_hook(
                lambda m, i, o, key=f"{index} {role}": seen.__setitem__(key, o)
            )
    out = model(one.input_ids_BT, attention_mask=one.attention_mask_BT, output_attentions=True)
    return model, out, seen


def plain_gradients(folder: Path, student: Path) -> dict[str, torch.Tensor]:
    """The same by plain transformers and autograd, the objective written out in full."""
    import torch.nn.functional as F

    one = small_loader(folder, student, micro_batch_size=4).next_step()[0]
    model, student_out, ours = shown_by(student, one)
    _, teacher_out, theirs = shown_by(folder / "teacher", one)
    origin = origin_in(student)
    assert origin.query_heads
    real, maps = one.token_mask_BT, by_hand(origin)

    def relative(key: str, teacher_BTM: torch.Tensor) -> torch.Tensor:
        student_BTM = ours[key] @ maps[key].T if key in maps else ours[key]
        teacher_NM = teacher_BTM[real].detach()
        error_N = (student_BTM[real] - teacher_NM).square().sum(-1) / teacher_NM.square().sum(-1)
        return error_N.sum() / one.n_tokens

    loss = torch.zeros(())
    # Layer 1 was dropped: the student's layer 0 is to give what the teacher's layer 1 gives.
    for layer, (copied, last) in enumerate([(0, 1), (2, 2), (3, 3)]):
        heads = list(origin.query_heads[layer])
        for role in MODULES:
            target = theirs[f"{copied} {role}"]
            if role == "q":
                target = target.unflatten(-1, (4, HEAD))[..., heads, :].flatten(-2)
            loss = loss + relative(f"{layer} {role}", target) / 21
        loss = loss + relative(f"{layer} hidden", theirs[f"{last} hidden"]) / 3
        p = teacher_out.attentions[copied][:, heads].detach()
        q = student_out.attentions[layer]
        kl = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log()), 0.0)
        loss = loss + kl.sum(-1).mean(1)[real].sum() / one.n_tokens / 3
    wanted = one.target_mask_BT
    log_q = F.log_softmax(student_out.logits[wanted], -1)
    log_p = F.log_softmax(teacher_out.logits[wanted].detach(), -1)
    loss = loss + (log_p.exp() * (log_p - log_q)).sum() / one.n_targets
    labels = one.labels_BT[wanted]
    loss = loss + 0.3 * F.nll_loss(log_q, labels, reduction="sum") / one.n_targets
    loss.backward()
    return {n: p.grad for n, p in [*model.named_parameters(), *maps.items()]}


def on_one_rank(folder: str) -> dict[str, Any]:
    path = Path(folder)
    student = factorized(path, "reduced")

    def of(world: int, micro: int, stage: int = 3, **trained: Any) -> dict[str, torch.Tensor]:
        return gradients(path, student, sizes(world, micro, stage), distil=EVERYTHING, **trained)

    return {
        "plain": plain_gradients(path, student),
        "stage 1": of(1, 4, stage=1),
        "stage 2": of(1, 4, stage=2),
        "accumulation": of(1, 2),
        "checkpointing": of(1, 4, gradient_checkpointing=True),
        "pipeline": through_the_pipeline(path, student),
    }


def on_two_ranks(folder: str) -> dict[str, Any]:
    path = Path(folder)
    student = factorized(path, "reduced")
    return {
        "2 ranks": gradients(path, student, sizes(2, 2), distil=EVERYTHING),
        "staged": staged(path, student),
        "resumed": resumed(path, student),
    }


def staged(folder: Path, student: Path) -> dict[str, Any]:
    """At each step of a staged schedule, the largest gradient of each kind of projection."""
    from deepspeed.utils import safe_get_full_grad

    schedule = {"kind": "staged", "matrix": 0.25, "layer": 0.25, "model": 0.5}
    distil = {**EVERYTHING, "schedule": schedule}
    made = parts(folder, student, sizes(2, 2), distil=distil)
    projections = made.trained.model.projections
    assert projections is not None
    seen: dict[int, dict[str, float]] = {}

    def look(step: int) -> None:
        seen[step] = {"matrix": 0.0, "hidden": 0.0}
        for (_, role), linear in zip(projections.points, projections.maps, strict=True):
            kind = "hidden" if role == "hidden" else "matrix"
            largest = float(safe_get_full_grad(linear.weight).abs().max())
            seen[step][kind] = max(seen[step][kind], largest)

    run_dir = folder / "staged"
    run_loop(made, run_dir, 8, distil=distil, after=look)
    made.close()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [[k for k in json.loads(line) if k.startswith("loss/")] for line in lines]
    return {"gradients": seen, "losses": losses}


def resumed(folder: Path, student: Path) -> dict[str, Any]:
    """8 steps; and the last 4 of them again, from the checkpoint of step 4."""
    from makd_llm import distributed

    run_dir = folder / "resumed"
    first, shares, _ = eight_steps(folder, student, run_dir)
    last = run_dir / "checkpoints" / "step-00000008"
    distributed.on_main(shutil.rmtree, last)
    second, _, said = eight_steps(folder, student, run_dir)
    return {"first": first, "second": second, "shares": shares, "said": said}


def eight_steps(
    folder: Path, student: Path, run_dir: Path
) -> tuple[dict[str, torch.Tensor], dict[str, int], list[str]]:
    """All parameters whole, how much of each this rank has, and what the checkpoints said."""
    import deepspeed

    made = parts(folder, student, sizes(2, 2), distil=EVERYTHING)
    said = run_loop(made, run_dir, 8, save_every=4)
    parameters = named_parameters(made.trained)
    shares = {n: p.ds_tensor.numel() for n, p in parameters.items()}  # type: ignore[attr-defined]
    whole = {}
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().clone()
    made.close()
    return whole, shares, said


def through_the_pipeline(folder: Path, student: Path) -> list[str]:
    """The distil stage as a run has it; the names of the tensors that it exports."""
    from makd_llm.checkpoint.folder import TensorReader
    from makd_llm.config import load_config
    from makd_llm.pipeline import Run

    ds = folder / "ds.json"
    precision = {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2}
    ds.write_text(json.dumps({**FP32_ZERO3, **precision}))
    overrides = [f"run_dir={folder}/run", f"data.source={folder}", "data.max_length=64"]
    overrides += ["evaluation.max_new_tokens=4", "distil.train.steps=2"]
    overrides += ["distil.objectives.matrix.input=teacher"]
    run = Run(load_config(None, [*overrides, "distil.train.batch_size=4"]), ds)
    said: list[str] = []
    run.tell = said.append  # type: ignore[method-assign]
    (folder / "run").mkdir()
    run._distil(folder / "teacher", student, folder / "run" / "student")
    assert any(text.startswith("projections to the teacher's widths: ") for text in said), said
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(0 < json.loads(line)["loss/matrix"] < 10 for line in lines) and len(lines) == 2
    return sorted(TensorReader(folder / "run" / "student").names())


@pytest.fixture(scope="module")
def one_rank(reshaped: Path) -> dict[str, Any]:
    return launch_ranks(1, on_one_rank, str(reshaped))[0]


@pytest.fixture(scope="module")
def two_ranks(reshaped: Path) -> list[dict[str, Any]]:
    return launch_ranks(2, on_two_ranks, str(reshaped), timeout=400)


@pytest.mark.parametrize("split", ["stage 1", "stage 2", "accumulation", "checkpointing"])
def test_gradient_equals_plain_autograd(one_rank: dict[str, Any], split: str) -> None:
    assert_same_gradient(one_rank[split], one_rank["plain"])


def test_gradient_of_two_ranks_equals_plain_autograd(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    for rank in two_ranks:
        assert_same_gradient(rank["2 ranks"], one_rank["plain"])


def test_a_level_that_is_off_gives_its_projections_no_gradient(
    two_ranks: list[dict[str, Any]],
) -> None:
    for rank in two_ranks:
        seen = rank["staged"]["gradients"]
        on = [[kind for kind, largest in seen[step].items() if largest > 0] for step in range(1, 9)]
        assert on == [["matrix"]] * 2 + [["hidden"]] * 2 + [[]] * 4
        losses = rank["staged"]["losses"]
        assert losses[2:4] == [["loss/attention", "loss/hidden"]] * 2


def test_projections_are_sharded_trained_and_resumed_to_the_last_bit(
    two_ranks: list[dict[str, Any]], reshaped: Path
) -> None:
    starts = by_hand(origin_in(reshaped / "reduced"))
    assert "missing; trying the one before it" in two_ranks[0]["resumed"]["said"][0]
    for rank in two_ranks:
        found = rank["resumed"]
        assert set(starts) < set(found["first"]) == set(found["second"])
        for name, tensor in found["first"].items():
            assert torch.equal(tensor, found["second"][name]), name
        for name, start in starts.items():
            assert not torch.equal(found["first"][name], start), name
            assert found["shares"][name] == start.numel() // 2, name


def test_an_export_has_the_students_tensors_only(one_rank: dict[str, Any], reshaped: Path) -> None:
    from safetensors import safe_open

    with safe_open(reshaped / "student-1" / "model.safetensors", "pt") as file:
        assert one_rank["pipeline"] == sorted(file.keys())
    config = json.loads((reshaped / "run" / "student" / "config.json").read_text())
    assert config["makd_origin"]["layers"] == [0, 2, 3], "handed on"
