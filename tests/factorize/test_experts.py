"""Experts that few tokens reach, or none, or on one rank only; and files that stack them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from makd_llm import distributed
from makd_llm.checkpoint.folder import TensorReader
from makd_llm.data.batch import Batch, batches_of
from makd_llm.data.schema import Example
from makd_llm.factorize.decompose import svd
from makd_llm.factorize.matrices import jobs_of
from makd_llm.factorize.refine import Refinement
from makd_llm.factorize.residuals import residuals
from makd_llm.factorize.statistics import inputs_of
from makd_llm.factorize.student import MatrixReport, Recipe, factorize
from makd_llm.layerwise.walk import Walk
from makd_llm.models.families import FAMILIES
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.testing import run_on_ranks, tiny_config

EXPERTS = [name for name, family in FAMILIES.items() if family.experts]
CPU = torch.device("cpu")
RECIPES: dict[str, dict[str, Any]] = {
    "fwsvd": {"method": "fwsvd"},
    "asvd": {"method": "asvd"},
    "whitened": {"method": "whitened"},
    "fisher": {"method": "fisher"},
    "sequential": {"method": "sequential"},
    "refitted": {"method": "refitted"},
    "refined": {"method": "whitened", "refine": Refinement(epochs=2)},
    "sensitivity": {"method": "whitened", "budget": "sensitivity"},
}


def batches(count: int, length: int = 24, start: int = 0, step: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 48, (count, length), generator=generator).tolist()
    examples = [Example(str(i), row, 1) for i, row in enumerate(rows)]
    return batches_of(examples[start::step], 4, 0)


def saved_teacher(model_type: str, folder: Path, *, experts: int, choices: int = 2) -> Any:
    """Random; where there are five experts, no token ever chooses the last of layer 1."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    config.initializer_range = 0.2
    config.num_experts, config.num_experts_per_tok = experts, choices
    model: Any = model_class_for(config)(config).eval()
    if experts == 5:
        with torch.no_grad():
            router = model.model.layers[1].mlp.gate.weight
            # Two of a, -a, b, -b are never less than 0.
            router.copy_(torch.stack([router[0], -router[0], router[1], -router[1], 0 * router[0]]))
    model.save_pretrained(folder)
    return model


def cut(
    teacher: Path, out: Path, given: list[Batch], keep_ratio: float = 0.5, **recipe: Any
) -> list[MatrixReport]:
    settings = Recipe(keep_ratio, rank_multiple=2, **recipe)
    return factorize(teacher, out, settings, given, tokenizer=None, dtype=torch.float32)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_an_expert_that_no_token_reaches_is_cut_by_its_weights(
    model_type: str, name: str, tmp_path: Path
) -> None:
    model = saved_teacher(model_type, tmp_path / "teacher", experts=5)
    reports = cut(tmp_path / "teacher", tmp_path / "student", batches(12), **RECIPES[name])
    (report,) = [r for r in reports if (r.layer, r.key) == (1, "gate.4")]
    assert report.rank is not None
    # Of its outputs on the calibration text nothing is lost: there are none.
    by_weights = name in ("svd", "fwsvd", "asvd")
    assert 0 < report.residual < 1 if by_weights else report.residual == 0.0
    weight_MK = model.model.layers[1].mlp.experts.gate_up_proj[4].chunk(2)[0].detach()
    best = svd(weight_MK).first(report.rank)
    reader = TensorReader(tmp_path / "student")
    up, down = (reader.get(f"{report.name}.{part}") for part in ("up", "down"))
    torch.testing.assert_close(up @ down, (best.up_MR @ best.down_RK).float(), rtol=1e-4, atol=1e-5)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student(torch.tensor([[3, 1, 4]])).logits.isfinite().all()

    found = residuals(tmp_path / "teacher", tmp_path / "student", batches(4), dtype=torch.float32)
    unmeasured = {place for place, residual in found.matrix.items() if residual is None}
    assert unmeasured == {(1, "gate.4"), (1, "up.4"), (1, "down.4")}


@pytest.mark.parametrize("model_type", EXPERTS)
def test_files_with_stacked_experts_give_the_same_student(model_type: str, tmp_path: Path) -> None:
    model = saved_teacher(model_type, tmp_path / "hub", experts=4)
    model.config.save_pretrained(tmp_path / "stacked")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "stacked" / "model.safetensors", {"format": "pt"})
    names = TensorReader(tmp_path / "hub").names()
    assert any(
        name.endswith(("experts.3.w1.weight", "experts.3.gate_proj.weight")) for name in names
    )
    for kind in ("hub", "stacked"):
        cut(tmp_path / kind, tmp_path / f"{kind}-student", batches(4), method="whitened")
    hub, stacked = (
        load_file(tmp_path / f"{kind}-student" / "model.safetensors") for kind in ("hub", "stacked")
    )
    assert hub.keys() == stacked.keys()
    assert all(torch.equal(hub[name], stacked[name]) for name in hub)


def reached(teacher: Path, given: list[Batch]) -> set[str]:
    """Which experts' matrices of layer 1 some token comes to."""
    walk = Walk(teacher, given, dtype=torch.float32, device=CPU)
    stream = walk.advanced(0, walk.layer(0), walk.embedded())
    layer, matrices = walk.layer(1), walk.matrices(1)
    keys = {matrix.key for matrix in matrices if matrix.role == "down"}
    found: set[str] = set()
    for batch, before in zip(given, stream, strict=True):
        with torch.no_grad(), inputs_of(layer, matrices, keys, batch) as inputs:
            walk.step(1, layer, batch, before)
        found |= set(inputs)
    return found


@pytest.mark.slow
def test_ranks_whose_tokens_reach_other_experts_agree(tmp_path: Path) -> None:
    """Twelve experts and 48 tokens: what one rank sends nothing to, the other may."""
    teacher = tmp_path / "teacher"
    saved_teacher("mixtral", teacher, experts=12, choices=1)
    one, other = (reached(teacher, batches(2, start=rank, step=2)) for rank in (0, 1))
    assert one - other and other - one
    on_two_ranks(str(tmp_path))
    for name in RECIPES:
        two = torch.load(tmp_path / f"{name}.pt")
        alone = cut(teacher, tmp_path / f"{name}-1", batches(2), 0.7, **RECIPES[name])
        assert [r.rank for r in alone] == two["ranks"] or name == "sensitivity"
        assert all(torch.tensor(two["residuals"]).isfinite())
        if name in ("fwsvd", "asvd", "whitened", "fisher"):
            assert [r.residual for r in alone] == pytest.approx(
                two["residuals"], rel=1e-3, abs=1e-4
            )
        measured = [residual for residual in two["measured"] if residual is not None]
        assert len(measured) > len(two["measured"]) / 2
        assert len(measured) < len(two["measured"]), "the last of the experts is not reached"


@run_on_ranks(2)
def on_two_ranks(folder: str) -> None:
    root = Path(folder)
    mine = batches(2, start=distributed.rank(), step=2)
    for name, recipe in RECIPES.items():
        reports = cut(root / "teacher", root / name, mine, 0.7, **recipe)
        found = residuals(root / "teacher", root / name, mine, dtype=torch.float32)
        result = {
            "ranks": [report.rank for report in reports],
            "residuals": [report.residual for report in reports],
            "measured": [found.matrix[report.layer, report.key] for report in reports],
        }
        if distributed.is_main():
            torch.save(result, root / f"{name}.pt")
        distributed.barrier()


def test_every_expert_is_a_job_of_its_own(tmp_path: Path) -> None:
    saved_teacher("qwen2_moe", tmp_path, experts=5)
    walk = Walk(tmp_path, [], dtype=torch.float32, device=CPU)
    jobs = {(job.layer, job.matrix.key): job for job in jobs_of(walk.reader, walk.config)}
    assert len(jobs) == 7 + 4 + 3 * 6
    assert jobs[1, "gate.4"].name == "model.layers.1.mlp.experts.4.gate_proj"
    assert jobs[1, "down.shared"].name == "model.layers.1.mlp.shared_expert.down_proj"
    shapes = {key: (job.shape.rows, job.shape.columns) for key, job in jobs.items()}
    assert shapes[0, "down"] == (32, 40) and shapes[1, "down.4"] == (32, 24)
    assert shapes[1, "up.4"] == (24, 32) and shapes[1, "up.shared"] == (28, 32)
