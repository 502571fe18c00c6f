"""What has to hold under ZeRO-3: the gradient does not depend on the split, the teacher is never
touched, memory stays, and broken steps are skipped and counted.

Starting processes is the dear part, so each group of checks shares one start; the tests below look
at its results.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from makd_llm.testing import launch_ranks
from makd_llm.testing.training import (
    assert_same_gradient,
    factorized,
    gradients,
    parts,
    run_loop,
    sizes,
    small_loader,
)

pytestmark = pytest.mark.slow


def plain_gradients(folder: Path, student: Path) -> dict[str, torch.Tensor]:
    """The same by plain transformers and autograd, the objective written out in full: what the rest
    is checked by.
    """
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    batch = small_loader(folder, student, micro_batch_size=4).next_step()[0]
    models = []
    for path in (student, folder / "teacher"):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        seen: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            if name.rpartition(".")[2].endswith("_proj"):
                module.register_forward_hook(
                    lambda m, i, o, seen=seen, name=name: seen.__setitem__(name, o)
                )
            if name.startswith("model.layers.") and name.count(".") == 2:
                module.register_forward_hook(
                    lambda m, i, o, seen=seen, name=name: seen.__setitem__(name, o)
                )
        out = model(
            batch.input_ids_BT, attention_mask=batch.attention_mask_BT, output_attentions=True
        )
        models.append((model, out, seen))
    (model, student_out, ours), (_, teacher_out, theirs) = models
    real = batch.token_mask_BT
    targets, tokens = batch.n_targets, batch.n_tokens

    def relative(name: str) -> torch.Tensor:
        teacher_NM = theirs[name][real].detach()
        error_N = (ours[name][real] - teacher_NM).square().sum(-1) / teacher_NM.square().sum(-1)
        return error_N.sum() / tokens

    matrices = [n for n in ours if n.endswith("_proj") and int(n.split(".")[2]) < 2]
    loss = sum(relative(n) for n in matrices) / len(matrices)
    loss = loss + (relative("model.layers.2") + relative("model.layers.3")) / 2
    for layer in (2, 3):
        p, q = teacher_out.attentions[layer].detach(), student_out.attentions[layer]
        kl = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log()), 0.0)
        loss = loss + kl.sum(-1).mean(1)[real].sum() / tokens / 2
    wanted = batch.target_mask_BT
    log_q = F.log_softmax(student_out.logits[wanted], -1)
    log_p = F.log_softmax(teacher_out.logits[wanted].detach(), -1)
    loss = loss + (log_p.exp() * (log_p - log_q)).sum() / targets
    loss = loss + 0.3 * F.nll_loss(log_q, batch.labels_BT[wanted], reduction="sum") / targets
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def on_one_rank(folder: str) -> dict[str, Any]:
    student = factorized(Path(folder))
    return {
        "plain": plain_gradients(Path(folder), student),
        "batch 4": gradients(Path(folder), student, sizes(1, 4)),
        "accumulation 2": gradients(Path(folder), student, sizes(1, 2)),
        "stage 1": gradients(Path(folder), student, sizes(1, 4, stage=1)),
        "left padding": gradients(
            Path(folder), student, sizes(1, 4), data={"padding_side": "left"}
        ),
        "checkpointing": gradients(Path(folder), student, sizes(1, 4), gradient_checkpointing=True),
    }


def on_two_ranks(folder: str) -> dict[str, Any]:
    path = Path(folder)
    student = factorized(path)
    teacher_input = {"objectives": {"matrix": {"input": "teacher", "layers": "all"}}}
    return {
        "2 ranks": gradients(path, student, sizes(2, 2)),
        "2 ranks, teacher input": gradients(path, student, sizes(2, 2), distil=teacher_input),
        "teacher": teacher_untouched(path, student),
        "memory": memory_over_steps(path, student),
        "not finite": not_finite(path, student),
        "staged": staged(path, student),
    }


def teacher_untouched(folder: Path, student: Path) -> dict[str, Any]:
    from makd_llm.checkpoint.folder import TensorReader
    from makd_llm.train.engine import whole_tensors

    made = parts(folder, student, sizes(2, 2))
    run_loop(made, folder / "untouched", 2)
    teacher = made.teacher.model
    reader = TensorReader(folder / "teacher")
    result = {
        "requires_grad": any(p.requires_grad for p in teacher.parameters()),
        "grad": any(p.grad is not None for p in teacher.parameters()),
        "same": all(torch.equal(t, reader.get(n)) for n, t in whole_tensors(teacher)),
        "training": teacher.training,
    }
    made.close()
    return result


def memory_over_steps(folder: Path, student: Path) -> list[int]:
    """Resident bytes of this rank after steps 15 and 65."""
    import gc

    import psutil

    seen = {}

    def look(step: int) -> None:
        if step in (15, 65):
            gc.collect()
            seen[step] = psutil.Process().memory_info().rss

    made = parts(folder, student, sizes(2, 2))
    run_loop(made, folder / "memory", 65, after=look)
    made.close()
    return [seen[15], seen[65]]


def not_finite(folder: Path, student: Path) -> list[dict[str, Any]]:
    """What is written about steps whose teacher gives no numbers."""
    import deepspeed

    from makd_llm.errors import Diverged

    made = parts(folder, student, sizes(2, 2))
    norm = made.teacher.model.model.model.norm.weight
    with deepspeed.zero.GatheredParameters([norm], modifier_rank=0):
        norm.data.fill_(float("nan"))
    with pytest.raises(Diverged, match="3 steps in a row"):
        run_loop(made, folder / "not-finite", 7)
    made.close()
    lines = (folder / "not-finite" / "bad_steps.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def staged(folder: Path, student: Path) -> list[list[str]]:
    """Which losses were measured at each step of a staged schedule."""
    distil = {"schedule": {"kind": "staged", "matrix": 0.25, "layer": 0.25, "model": 0.5}}
    made = parts(folder, student, sizes(2, 2), distil=distil)
    run_loop(made, folder / "staged", 8, distil=distil)
    made.close()
    lines = (folder / "staged" / "metrics.jsonl").read_text().splitlines()
    return [
        [k.removeprefix("loss/") for k in json.loads(line) if k.startswith("loss/")]
        for line in lines
    ]


@pytest.fixture(scope="module")
def one_rank(tiny: Path) -> dict[str, Any]:
    return launch_ranks(1, on_one_rank, str(tiny))[0]


@pytest.fixture(scope="module")
def two_ranks(tiny: Path) -> list[dict[str, Any]]:
    return launch_ranks(2, on_two_ranks, str(tiny), timeout=400)


@pytest.mark.parametrize(
    "split", ["batch 4", "accumulation 2", "stage 1", "left padding", "checkpointing"]
)
def test_gradient_equals_plain_autograd_for_every_split(
    one_rank: dict[str, Any], split: str
) -> None:
    assert_same_gradient(one_rank[split], one_rank["plain"])


def test_gradient_of_two_ranks_equals_that_of_one(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    for rank in two_ranks:
        assert_same_gradient(rank["2 ranks"], one_rank["batch 4"])


def test_teacher_input_reaches_every_factor_under_sharding(two_ranks: list[dict[str, Any]]) -> None:
    found, usual = two_ranks[0]["2 ranks, teacher input"], two_ranks[0]["2 ranks"]
    factors = [name for name in found if name.endswith((".down", ".up"))]
    assert factors and all(found[name].abs().max() > 0 for name in factors)
    assert any(not torch.allclose(found[name], usual[name]) for name in factors)


def test_nothing_reaches_the_teacher(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert rank["teacher"] == {
            "requires_grad": False,
            "grad": False,
            "same": True,
            "training": False,
        }


def test_memory_does_not_grow_over_fifty_steps(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        before, after = rank["memory"]
        assert after - before < 8 * 1024**2, f"{before} -> {after} bytes"


def test_steps_without_a_finite_gradient_are_skipped_named_and_end_the_run(
    two_ranks: list[dict[str, Any]],
) -> None:
    lines = two_ranks[0]["not finite"]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(len(line["record_ids"]) == 4 for line in lines)


def test_staged_levels_take_turns(two_ranks: list[dict[str, Any]]) -> None:
    measured = two_ranks[0]["staged"]
    assert measured[:2] == [["matrix"]] * 2
    assert measured[2:4] == [["attention", "hidden"]] * 2
    assert measured[4:] == [["cross_entropy", "logits"]] * 4


def closed_engines(folder: str) -> int:
    """Bytes of all tensors alive after two engines were made and closed."""
    import gc

    student = factorized(Path(folder))
    parts(Path(folder), student, sizes(1, 4)).close()
    gc.collect()
    alive = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in alive)


def test_closed_engines_hold_no_weights(tiny: Path) -> None:
    weights = sum(f.stat().st_size for f in (tiny / "teacher").glob("*.safetensors"))
    assert launch_ranks(1, closed_engines, str(tiny))[0] < weights / 10
