"""A teacher's folder becomes a student's: every method, every family, interrupted, on two ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import makd_llm  # noqa: F401  (makes the Auto classes know the students)
from makd_llm.checkpoint.export import count_parameters
from makd_llm.checkpoint.folder import read_config
from makd_llm.data.batch import Batch, batches_of
from makd_llm.data.schema import Example
from makd_llm.errors import UserError
from makd_llm.factorize import decompose, student
from makd_llm.factorize.refine import Refinement, least_squares, typical_size
from makd_llm.factorize.residuals import perplexity, residuals
from makd_llm.factorize.student import MatrixReport, Recipe, factorize
from makd_llm.models.families import FAMILIES, family_of, matrices_of
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.testing import run_on_ranks, tiny_config

EXPERTS = [name for name, family in FAMILIES.items() if family.experts]
METHODS = ["svd", "fwsvd", "asvd", "whitened", "fisher", "sequential", "refitted"]


def texts(count: int, seed: int = 0, length: int = 24) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 48, (count, length), generator=generator).tolist()
    return [Example(str(i), row, 1) for i, row in enumerate(rows)]


def calibration_batches(count: int = 12) -> list[Batch]:
    return batches_of(texts(count), 4, 0)


def saved_teacher(model_type: str, folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = tiny_config(model_type)
    config.init_std = config.initializer_range = 0.2  # OPT's name, and the others'
    for name, value in changes.items():
        setattr(config, name, value)
    model_class_for(config)(config).save_pretrained(folder)
    return folder


def cut(teacher: Path, out: Path, **recipe: Any) -> list[MatrixReport]:
    settings: dict[str, Any] = {"keep_ratio": 0.5, "rank_multiple": 2, **recipe}
    return factorize(
        teacher,
        out,
        Recipe(**settings),
        calibration_batches(),
        tokenizer=None,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_keeps_the_budget_and_can_be_loaded(
    model_type: str, method: str, tmp_path: Path
) -> None:
    teacher = saved_teacher(model_type, tmp_path / "teacher")
    reports = cut(teacher, tmp_path / "student", method=method)
    config = read_config(tmp_path / "student")
    counts = [
        count_parameters(f, family_of(c), c).factorized
        for f, c in ((teacher, read_config(teacher)), (tmp_path / "student", config))
    ]
    assert 0.45 * counts[0] < counts[1] <= 0.5 * counts[0]
    assert len(reports) == len(matrices_of(config))
    assert all(0 < r.residual < 1 for r in reports if r.rank is not None)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    written = model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=4, do_sample=False)
    assert written.shape[1] > 3
    assert not list(tmp_path.glob(".student*"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_at_full_rank_every_method_gives_the_teacher(
    model_type: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = saved_teacher(model_type, tmp_path / "teacher")
    full = lambda shapes, keep, **more: [min(s.rows, s.columns) for s in shapes]  # noqa: E731
    monkeypatch.setattr(student, "uniform_ranks", full)
    cut(teacher, tmp_path / "student", method=method)
    ids = torch.arange(3, 20)[None]
    both = [
        AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits
        for f in (teacher, tmp_path / "student")
    ]
    torch.testing.assert_close(both[1], both[0], rtol=1e-3, atol=2e-3)


def test_few_components_of_large_matrices_are_found_at_random_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    monkeypatch.setattr(decompose, "OVERSAMPLED", 1)
    found = {}
    for name, far_below in (("whole", 10**9), ("randomized", 4)):
        monkeypatch.setattr(decompose, "FAR_BELOW", far_below)
        reports = cut(teacher, tmp_path / name, method="whitened", keep_ratio=0.3)
        found[name] = {(r.layer, r.key): r for r in reports}
    assert all(r.added == 0.0 for r in found["whole"].values())
    assert any(r.added > 0.0 for r in found["randomized"].values())
    for place, report in found["randomized"].items():
        least = found["whole"][place].residual
        assert least * (1 - 1e-6) <= report.residual <= least + report.added + 1e-6


def test_a_matrix_that_gets_no_smaller_stays_dense_also_inside_a_fused_module(
    tmp_path: Path,
) -> None:
    teacher = saved_teacher("gpt2", tmp_path / "teacher")
    reports = cut(teacher, tmp_path / "student", limits={"k": (1.0, 1.0), "up": (1.0, 1.0)})
    assert {r.role for r in reports if r.rank is None} == {"k", "up"}
    tensors = load_file(tmp_path / "student" / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.parts.1.weight"].shape == (32, 32)
    whole = load_file(teacher / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(tensors[name], whole[name])
    config = read_config(tmp_path / "student")
    assert config.lowrank["transformer.h.0.attn.c_attn"][1] is None


@pytest.mark.parametrize("model_type", ["llama", *EXPERTS])
def test_the_measured_loss_is_the_predicted_one(model_type: str, tmp_path: Path) -> None:
    """The root of the discarded singular values' energy, at every module, to 1e-6 in float64."""
    teacher = saved_teacher(model_type, tmp_path / "teacher", dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    model.save_pretrained(teacher)
    given = calibration_batches()
    recipe = Recipe(keep_ratio=0.5, rank_multiple=1)
    reports = factorize(
        teacher, tmp_path / "student", recipe, given, tokenizer=None, dtype=torch.float64
    )
    measured = residuals(teacher, tmp_path / "student", given, dtype=torch.float64)
    for report in reports:
        assert measured.matrix[report.layer, report.key] == pytest.approx(report.residual, rel=1e-6)
    assert model_type == "llama" or any(report.key == "down.3" for report in reports)


def test_what_is_known_of_the_stream_helps(tmp_path: Path) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    held_out = batches_of(texts(12, seed=0), 4, 0)
    drift = {}
    for method in ("svd", "whitened", "sequential", "refitted"):
        cut(teacher, tmp_path / method, method=method)
        found = residuals(teacher, tmp_path / method, held_out, dtype=torch.float32)
        drift[method] = found.layer[-1]
    cut(teacher, tmp_path / "refined", refine=Refinement(epochs=20, learning_rate=3e-3))
    found = residuals(teacher, tmp_path / "refined", held_out, dtype=torch.float32)
    drift["refined"] = found.layer[-1]
    assert drift["whitened"] < drift["svd"]
    assert drift["refitted"] < drift["whitened"]
    assert drift["refined"] < drift["whitened"]


@pytest.fixture
def refined(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The losses of every layer that is refined, as they come."""
    from makd_llm.factorize import student_stream

    seen: list[list[float]] = []
    real = student_stream.refine_block

    def watched(*args: Any) -> tuple[dict[str, Tensor], list[float]]:
        factors, losses = real(*args)
        seen.append(losses)
        return factors, losses

    monkeypatch.setattr(student_stream, "refine_block", watched)
    return seen


@pytest.mark.parametrize("loss", ["least_squares", "lillama"])
@pytest.mark.parametrize("inputs", ["student", "teacher", "both"])
def test_refinement_lowers_its_loss(
    loss: str, inputs: str, refined: list[list[float]], tmp_path: Path
) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    cut(
        teacher,
        tmp_path / "student",
        refine=Refinement(epochs=15, learning_rate=2e-2, loss=loss, inputs=inputs),
    )
    assert len(refined) == 2
    for losses in refined:  # three batches an epoch
        assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_perplexity_is_that_of_the_whole_model(tmp_path: Path) -> None:
    teacher = saved_teacher("gemma3_text", tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    examples = texts(3, seed=5)
    nats = 0.0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        nats += 23 * float(model(ids, labels=ids).loss.detach())
    found = perplexity(teacher, batches_of(examples, 2, 0), dtype=torch.float32)
    assert found == pytest.approx(torch.tensor(nats / (3 * 23)).exp().item(), rel=1e-4)


@pytest.mark.parametrize("method", ["whitened", "fisher"])
def test_refinement_in_bfloat16_learns_on_every_step(
    method: str, refined: list[list[float]], tmp_path: Path
) -> None:
    """autocast keeps its copies of the weights for as long as it lasts."""
    teacher = saved_teacher("llama", tmp_path / "teacher")
    factorize(
        teacher,
        tmp_path / "student",
        Recipe(0.5, rank_multiple=2, method=method, refine=Refinement(15, learning_rate=1e-2)),
        calibration_batches(),
        tokenizer=None,
        dtype=torch.bfloat16,
    )
    assert len(refined) == 2
    for losses in refined:
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_steps_are_in_units_of_each_entrys_typical_size(scale: float) -> None:
    signs = torch.randn(6, 9).sign()
    factor = signs * torch.logspace(-2, 2, 9) * torch.logspace(0, 2, 6)[:, None] * scale
    torch.testing.assert_close(factor / typical_size(factor), signs)
    assert (typical_size(torch.zeros(2, 3)) > 0).all()


def test_refinement_that_makes_it_worse_is_taken_back(tmp_path: Path) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    cut(teacher, tmp_path / "plain")
    cut(teacher, tmp_path / "wild", refine=Refinement(epochs=3, learning_rate=30.0))
    plain, wild = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "wild"))
    assert all(torch.equal(plain[name], wild[name]) for name in plain)


def test_refinement_whose_loss_is_not_finite_ends_with_the_layer(tmp_path: Path) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    with pytest.raises(UserError, match="the loss of layer 0 is not finite"):
        cut(teacher, tmp_path / "student", refine=Refinement(epochs=2, learning_rate=1e20))
    assert not (tmp_path / "student").exists()


def test_a_token_of_which_the_teacher_makes_nothing_counts_plainly() -> None:
    output, target = torch.ones(2, 4), torch.stack([torch.zeros(4), torch.full((4,), 2.0)])
    assert least_squares(output, target).item() == pytest.approx((4.0 + 0.25) / 2)


class Killed(BaseException):
    """What a signal does to a process, as far as the files know."""


@pytest.mark.parametrize("method", ["svd", "whitened", "refitted"])
def test_an_interrupted_factorization_goes_on_and_ends_the_same(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    recipe = (
        {"method": method, "refine": Refinement(epochs=1)}
        if method != "svd"
        else {"method": method}
    )
    cut(teacher, tmp_path / "whole", **recipe)
    real = student.Parts.write
    writes: list[str] = []

    def dying(self: Any, name: str, tensors: Any) -> None:
        if len(writes) == 9:
            raise Killed
        writes.append(name)
        real(self, name, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(student.Parts, "write", dying)
        with pytest.raises(Killed):
            cut(teacher, tmp_path / "student", **recipe)
    assert not (tmp_path / "student").exists()

    def counting(self: Any, name: str, tensors: Any) -> None:
        assert name not in writes
        real(self, name, tensors)

    monkeypatch.setattr(student.Parts, "write", counting)
    said: list[str] = []
    factorize(
        teacher,
        tmp_path / "student",
        Recipe(keep_ratio=0.5, rank_multiple=2, **recipe),  # type: ignore[arg-type]
        calibration_batches(),
        tokenizer=None,
        dtype=torch.float32,
        tell=said.append,
    )
    assert said == ["factorize: goes on from 9 parts of an interrupted one"]
    tensors = [load_file(tmp_path / n / "model.safetensors") for n in ("whole", "student")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_parts_of_another_recipe_are_not_used(tmp_path: Path) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    parts = tmp_path / ".student.parts" / "components"
    parts.mkdir(parents=True)
    (parts / "key.json").write_text(json.dumps({"recipe": "another"}))
    (parts / "0000.q.components.safetensors").write_bytes(b"not even safetensors")
    cut(teacher, tmp_path / "student")
    assert (tmp_path / "student" / "model.safetensors").exists() and not parts.parent.exists()


@pytest.mark.parametrize("method", ["svd", "whitened", "fisher"])
@pytest.mark.parametrize("budget", ["greedy", "sensitivity"])
def test_budgets_are_kept_and_differ_from_uniform(method: str, budget: str, tmp_path: Path) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    reports = cut(teacher, tmp_path / "student", method=method, budget=budget, keep_ratio=0.6)
    dense = sum(r.rows * r.columns for r in reports)
    stored = sum(
        r.rows * r.columns if r.rank is None else r.rank * (r.rows + r.columns) for r in reports
    )
    assert 0.55 * dense < stored <= 0.6 * dense
    assert len({r.rank for r in reports if r.role == "gate" or r.role == "up"}) > 1


def test_components_that_are_kept_serve_other_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    cut(teacher, tmp_path / "direct", keep_ratio=0.4, budget="greedy")
    settings: dict[str, Any] = {"tokenizer": None, "dtype": torch.float32}
    given, kept = calibration_batches(), tmp_path / "kept"
    first, second = Recipe(0.6, rank_multiple=2), Recipe(0.4, budget="greedy", rank_multiple=2)
    factorize(teacher, tmp_path / "first", first, given, components=kept, **settings)
    monkeypatch.setattr(student, "Walk", None)  # nothing is walked again
    factorize(teacher, tmp_path / "second", second, given, components=kept, **settings)
    tensors = [load_file(tmp_path / n / "model.safetensors") for n in ("direct", "second")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize(
    ("recipe", "tokens", "says"),
    [
        ({"keep_ratio": 0.001}, 12, "keep_ratio 0.001 cannot be met"),
        ({"limits": {"gate_up": (0.0, 1.0)}}, 12, "this model has no such matrices; it has q, k"),
        ({}, 1, "24 tokens cannot fill the covariance of 40 inputs; give at least 40 tokens"),
    ],
)
def test_bad_input_is_found_before_the_work(
    recipe: dict[str, Any], tokens: int, says: str, tmp_path: Path
) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    settings = Recipe(**{"keep_ratio": 0.5, "rank_multiple": 2, **recipe})
    with pytest.raises(UserError, match=says):
        factorize(
            teacher,
            tmp_path / "student",
            settings,
            calibration_batches(tokens),
            tokenizer=None,
            dtype=torch.float32,
        )
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("method", ["whitened", "fisher"])
def test_inputs_that_are_not_finite_are_named(method: str, tmp_path: Path) -> None:
    teacher = saved_teacher("llama", tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.model.layers[1].input_layernorm.weight.data.fill_(float("nan"))
    model.save_pretrained(teacher)
    with pytest.raises(UserError, match="layer 1, matrix q"):
        cut(teacher, tmp_path / "student", method=method)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        ("llama", "whitened"),
        ("llama", "fwsvd"),
        ("llama", "refitted"),
        ("mixtral", "whitened"),
        ("qwen2_moe", "fisher"),
        ("qwen3_moe", "refitted"),
    ],
)
def test_two_ranks_make_the_student_of_one(model_type: str, method: str, tmp_path: Path) -> None:
    teacher = saved_teacher(model_type, tmp_path / "teacher")
    cut(teacher, tmp_path / "student-1", method=method)
    on_two_ranks(str(tmp_path), method)
    tensors = [load_file(tmp_path / f"student-{n}" / "model.safetensors") for n in (1, 2)]
    for name, tensor in tensors[0].items():
        other = tensors[1][name]
        assert tensor.shape == other.shape
        if name.endswith(".up"):  # signs of components are free: compare products
            down = name.removesuffix("up") + "down"
            one, two = tensor @ tensors[0][down], other @ tensors[1][down]
            assert torch.linalg.norm(one - two) < 5e-3 * torch.linalg.norm(one)


@run_on_ranks(2)
def on_two_ranks(folder: str, method: str) -> None:
    from makd_llm import distributed

    rank = distributed.rank()
    mine = batches_of(texts(12)[rank::2], 4, 0)
    factorize(
        Path(folder) / "teacher",
        Path(folder) / "student-2",
        Recipe(keep_ratio=0.5, rank_multiple=2, method=method),
        mine,
        tokenizer=None,
        dtype=torch.float32,
    )
