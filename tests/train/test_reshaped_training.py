"""What has to hold of a reshaped student's learned projections on DeepSpeed's engines: the gradient
is that of plain autograd for every split, nothing old is learnt where a level is off, a resumed run
is the same run, and an export has none of them.
"""

import copy
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

pytestmark = pytest.mark.slow

HEAD = 8
MODULES = {matrix.role: matrix.module for matrix in FAMILIES["llama"].dense}
EVERYTHING = {name: {"layers": "all"} for name in ("matrix", "attention", "hidden")}
FP32: dict[str, Any] = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "steps_per_print": 10**9,
}


def sizes(world: int, micro: int, stage: int = 3) -> dict[str, Any]:
    ds = copy.deepcopy(FP32)
    ds["train_micro_batch_size_per_gpu"] = micro
    ds["gradient_accumulation_steps"] = 4 // (world * micro)
    ds["zero_optimization"]["stage"] = stage
    return ds


def origin_in(folder: Path) -> Origin:
    """What a model folder's config says of its origin."""
    from makd_llm.checkpoint.folder import read_config

    origin = origin_of(read_config(folder))
    assert origin is not None
    return origin


def factorized(folder: Path) -> Path:
    """The low-rank student of the reduced teacher; every rank calls this, first of all."""
    from makd_llm import distributed
    from makd_llm.factorize.student import Recipe, factorize
    from makd_llm.models.source import load_tokenizer

    distributed.init()
    start, student = folder / "reduced", folder / f"student-{distributed.world_size()}"
    factorize(
        start,
        student,
        Recipe(keep_ratio=0.5, method="svd", rank_multiple=1),
        [],
        tokenizer=load_tokenizer(start),
        dtype=torch.float32,
    )
    return student


def parts(
    folder: Path, student: Path, ds: dict[str, Any], distil: dict[str, Any], **changes: Any
) -> tuple[Any, Any, Any, Any]:
    """Student engine with its projections, teacher engine, objectives and loader."""
    from makd_llm.checkpoint.folder import read_config
    from makd_llm.config import DataConfig, DistilConfig
    from makd_llm.models.pairing import pair
    from makd_llm.models.projections import Projections
    from makd_llm.models.sharded import load_sharded
    from makd_llm.models.source import load_tokenizer
    from makd_llm.train.build import (
        build_loader,
        build_objectives,
        build_projections,
        build_prompts,
    )
    from makd_llm.train.deepspeed_config import frozen_config
    from makd_llm.train.engine import Frozen, Trained

    asked = DistilConfig.model_validate({"objectives": EVERYTHING, **distil})
    config = read_config(student)
    pairing = pair(config, read_config(folder / "teacher"), asked.layer_map)
    model = load_sharded(student, ds, torch.float32)
    objectives = build_objectives(asked, model.family, config.num_hidden_layers, pairing)
    model.projections = Projections(build_projections(objectives, pairing), ds, torch.float32)
    frozen = frozen_config(ds, micro_batch_size=2)
    trained = Trained(model, ds, **changes)
    teacher = Frozen(load_sharded(folder / "teacher", frozen, torch.float32), frozen)
    data = DataConfig(source=str(folder / "train.jsonl"), max_length=64)
    loader = build_loader(
        data,
        build_prompts(data, load_tokenizer(student)),
        batch_size=4,
        micro_batch_size=ds["train_micro_batch_size_per_gpu"],
        seed=1,
        pad_id=2,
    )
    return trained, teacher, objectives, loader


def named_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The student's by their names, the projections' by their points."""
    maps = {
        f"{layer} {role}": linear.weight
        for (layer, role), linear in zip(
            model.projections.points, model.projections.maps, strict=True
        )
    }
    return {**dict(model.model.named_parameters()), **maps}


def gradients(
    folder: Path, student: Path, ds: dict[str, Any], distil: dict[str, Any], **changes: Any
) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step's loss, whole, before clipping."""
    from deepspeed.utils import safe_get_full_grad

    from makd_llm import distributed
    from makd_llm.train.step import distill_step

    trained, teacher, objectives, loader = parts(folder, student, ds, distil, **changes)
    batches = loader.next_step()
    counts = torch.tensor([[float(b.n_targets), float(b.n_tokens)] for b in batches]).sum(0)
    targets, tokens = distributed.sum_over_ranks(counts).tolist()
    for index, one in enumerate(batches):
        distill_step(trained, teacher, objectives, one, {"targets": targets, "tokens": tokens})
        if index < len(batches) - 1:
            trained.step()
    found = {n: safe_get_full_grad(p).clone() for n, p in named_parameters(trained.model).items()}
    trained.close()
    teacher.close()
    return found


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

    from makd_llm.config import DataConfig
    from makd_llm.models.source import load_tokenizer
    from makd_llm.train.build import build_loader, build_prompts

    data = DataConfig(source=str(folder / "train.jsonl"), max_length=64)
    prompts = build_prompts(data, load_tokenizer(student))
    one = build_loader(
        data, prompts, batch_size=4, micro_batch_size=4, seed=1, pad_id=2
    ).next_step()[0]
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
    student = factorized(path)
    return {
        "plain": plain_gradients(path, student),
        "stage 1": gradients(path, student, sizes(1, 4, stage=1), {}),
        "stage 2": gradients(path, student, sizes(1, 4, stage=2), {}),
        "accumulation": gradients(path, student, sizes(1, 2), {}),
        "checkpointing": gradients(path, student, sizes(1, 4), {}, gradient_checkpointing=True),
        "pipeline": through_the_pipeline(path, student),
    }


def on_two_ranks(folder: str) -> dict[str, Any]:
    path = Path(folder)
    student = factorized(path)
    return {
        "2 ranks": gradients(path, student, sizes(2, 2), {}),
        "staged": staged(path, student),
        "resumed": resumed(path, student),
    }


def run_loop(
    folder: Path, student: Path, run_dir: Path, distil: dict[str, Any], after: Any = None
) -> tuple[dict[str, torch.Tensor], dict[str, int], list[str]]:
    """8 steps on two ranks. Returns all parameters whole, each rank's share of the projections, and
    what the checkpoints said.
    """
    import deepspeed

    from makd_llm.checkpoint.state import Checkpoints
    from makd_llm.config import DistilConfig
    from makd_llm.train.build import staged_shares
    from makd_llm.train.loop import Loop, LoopSettings
    from makd_llm.train.step import distill_step

    trained, teacher, objectives, loader = parts(folder, student, sizes(2, 2), distil)
    said: list[str] = []
    loop = Loop(
        trained,
        objectives,
        loader,
        Checkpoints(run_dir / "checkpoints", keep=2, tell=said.append),
        LoopSettings("distil", 8, 4, staged=staged_shares(DistilConfig.model_validate(distil))),
        run_dir,
    )

    def step(one: Any, counts: dict[str, float]) -> Any:
        losses = distill_step(trained, teacher, objectives, one, counts)
        if after:
            after(loop.step, trained.model)
        return losses

    loop.run(step)
    parameters = named_parameters(trained.model)
    shares = {n: p.ds_tensor.numel() for n, p in parameters.items()}  # type: ignore[attr-defined]
    whole = {}
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().clone()
    trained.close()
    teacher.close()
    return whole, shares, said


def staged(folder: Path, student: Path) -> dict[str, Any]:
    """At each step of a staged schedule, the largest gradient of each kind of projection."""
    from deepspeed.utils import safe_get_full_grad

    seen: dict[int, dict[str, float]] = {}

    def look(step: int, model: Any) -> None:
        seen[step] = {"matrix": 0.0, "hidden": 0.0}
        for (_, role), linear in zip(model.projections.points, model.projections.maps, strict=True):
            kind = "hidden" if role == "hidden" else "matrix"
            largest = float(safe_get_full_grad(linear.weight).abs().max())
            seen[step][kind] = max(seen[step][kind], largest)

    schedule = {"kind": "staged", "matrix": 0.25, "layer": 0.25, "model": 0.5}
    run_dir = folder / "staged"
    run_loop(folder, student, run_dir, {"schedule": schedule}, look)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [[k for k in json.loads(line) if k.startswith("loss/")] for line in lines]
    return {"gradients": seen, "losses": losses}


def resumed(folder: Path, student: Path) -> dict[str, Any]:
    """8 steps; and the last 4 of them again, from the checkpoint of step 4."""
    from makd_llm import distributed

    run_dir = folder / "resumed"
    first, shares, _ = run_loop(folder, student, run_dir, {})
    last = run_dir / "checkpoints" / "step-00000008"
    distributed.on_main(shutil.rmtree, last)
    second, _, said = run_loop(folder, student, run_dir, {})
    return {"first": first, "second": second, "shares": shares, "said": said}


def through_the_pipeline(folder: Path, student: Path) -> list[str]:
    """The distil stage as a run has it; the names of the tensors that it exports."""
    from makd_llm.checkpoint.folder import TensorReader
    from makd_llm.config import load_config
    from makd_llm.pipeline import Run

    ds = folder / "ds.json"
    precision = {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2}
    ds.write_text(json.dumps({**FP32, **precision}))
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


def assert_same_gradient(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


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
