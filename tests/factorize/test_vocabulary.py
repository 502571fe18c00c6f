"""The embedding and the head as factors: best in their own sense, tied where they were tied."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from makd_llm.checkpoint.export import merge
from makd_llm.checkpoint.folder import read_config
from makd_llm.data.batch import Batch, batches_of
from makd_llm.data.schema import Example
from makd_llm.errors import UserError
from makd_llm.factorize.decompose import tall
from makd_llm.factorize.refine import Refinement
from makd_llm.factorize.residuals import perplexity
from makd_llm.factorize.student import MatrixReport, Recipe, factorize
from makd_llm.models.causal import CausalModel
from makd_llm.models.families import FAMILIES, family_of
from makd_llm.models.modeling_lowrank import LowRankEmbedding, LowRankLinear
from makd_llm.testing import tiny_config

IDS = torch.arange(3, 20)[None]


def saved(folder: Path, model_type: str, tied: bool) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, tied))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    model.save_pretrained(folder)
    return folder


def texts(vocabulary: int = 48, rows: int = 24) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (rows, 16), generator=generator)
    return batches_of([Example(str(i), row, 1) for i, row in enumerate(ids.tolist())], 4, 0)


def cut(teacher: Path, out: Path, **more: Any) -> list[MatrixReport]:
    given = {"keep_ratio": 0.9, "method": "whitened", "rank_multiple": 1, "embedding": 0.6}
    recipe = Recipe(**given | more)  # type: ignore[arg-type]
    return factorize(teacher, out, recipe, texts(), tokenizer=None, dtype=torch.float32)


def test_a_tall_matrix_is_cut_best_in_its_own_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("makd_llm.factorize.decompose.ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(80, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 12)
    rows = torch.rand(50, generator=generator, dtype=torch.float64)
    metric = x.T @ x
    found = tall(weight, metric, 4, rows)
    scaled = rows.sqrt()[:, None] * weight @ torch.linalg.cholesky(metric)
    least = float(torch.linalg.svdvals(scaled)[4:].square().sum() ** 0.5)
    error = rows.sqrt()[:, None] * (weight - found.up_MR.double() @ found.down_RK)
    assert float((error @ torch.linalg.cholesky(metric)).norm()) == pytest.approx(least, rel=1e-5)
    assert found.residual == pytest.approx(least / float(scaled.norm()), rel=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_loads_generates_and_merges(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    teacher = saved(tmp_path / "teacher", model_type, tied)
    reports = cut(teacher, tmp_path / "student")
    ends = [report for report in reports if report.layer is None]
    assert [r.role for r in ends] == (["embedding"] if tied else ["embedding", "head"])
    assert all(0 < report.residual < 1 for report in ends)
    for report in ends:
        stored = report.rank * (report.rows + report.columns) if report.rank else 0
        assert 0.4 < stored / (report.rows * report.columns) <= 0.6
    student, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    assert isinstance(embedding, LowRankEmbedding) and isinstance(head, LowRankLinear)
    assert (head.up is embedding.up and head.down is embedding.down) == tied
    written = student.generate(IDS, max_new_tokens=4, do_sample=False)
    assert written.shape[1] == IDS.shape[1] + 4
    student.save_pretrained(tmp_path / "again")
    merge(tmp_path / "student", tmp_path / "merged")
    said = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(IDS).logits
        for name in ("student", "again", "merged")
    ]
    assert torch.equal(said[0], said[1])
    torch.testing.assert_close(said[2], said[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_at_full_rank_it_is_the_teachers(tied: bool, tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher", "llama", tied)
    config = read_config(teacher)
    full = min(config.vocab_size, config.hidden_size)
    share = full * (config.vocab_size + config.hidden_size) / config.vocab_size / config.hidden_size
    cut(teacher, tmp_path / "student", method="svd", keep_ratio=1.0, embedding=share)
    said = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(IDS).logits
        for name in ("teacher", "student")
    ]
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_walk_and_training_see_the_same_head(tied: bool, tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher", "llama", tied)
    cut(teacher, tmp_path / "student")
    student: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    batch = texts()[0]
    with torch.no_grad():
        logits_BTV = student(batch.input_ids_BT).logits
        wrapped = CausalModel(student, family_of(student.config))
        seen_BTV = wrapped(batch, lambda hidden, weight: hidden @ weight.T)
    torch.testing.assert_close(seen_BTV, logits_BTV)
    nats = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), batch.input_ids_BT[:, 1:].flatten()
    )
    found = perplexity(tmp_path / "student", [batch], dtype=torch.float32)
    assert found == pytest.approx(float(nats.exp()), rel=1e-4)


def test_calibration_serves_what_is_used(tmp_path: Path) -> None:
    """Whitened, a head loses less of the logits than by plain SVD, and an embedding less of the
    tokens that occur.
    """
    teacher = saved(tmp_path / "teacher", "llama", tied=False)
    dense = load_file(teacher / "model.safetensors")
    lost: dict[str, float] = {}
    for method in ("svd", "whitened"):
        cut(teacher, tmp_path / method, method=method, keep_ratio=1.0, embedding=0.4)
        found = load_file(tmp_path / method / "model.safetensors")
        error = found["model.embed_tokens.up"] @ found["model.embed_tokens.down"]
        error -= dense["model.embed_tokens.weight"]
        seen = torch.cat([b.input_ids_BT.flatten() for b in texts()])
        lost[method] = float(error[seen].square().sum())
    assert lost["whitened"] < lost["svd"]


def test_refinement_starts_from_the_students_own_embedding(tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher", "llama", tied=True)
    cut(teacher, tmp_path / "dense", embedding=None, refine=Refinement())
    cut(teacher, tmp_path / "low", embedding=0.3, refine=Refinement())
    name = "model.layers.0.self_attn.q_proj.down"
    dense, low = (load_file(tmp_path / n / "model.safetensors")[name] for n in ("dense", "low"))
    assert not torch.equal(dense, low)


def test_a_share_that_no_rank_has_is_refused(tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher", "llama", tied=True)
    with pytest.raises(UserError, match=r"embedding 0.05: a rank of 2 "):
        cut(teacher, tmp_path / "student", embedding=0.05, rank_multiple=2)
    assert not list(tmp_path.glob("*student*"))
