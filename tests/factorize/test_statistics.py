"""Calibration counts real tokens only; a GPT-2 factorized at all ranks is the same model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import makd_llm  # noqa: F401  (makes the Auto classes know the student)
from makd_llm.data.batch import collate
from makd_llm.data.schema import Example
from makd_llm.factorize import parallel
from makd_llm.factorize.statistics import covariances
from makd_llm.models.families import family_of


class Plain:
    """A transformers model where calibration expects one of ours."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.family = model, family_of(model.config)  # type: ignore[arg-type]

    def __call__(self, batch: object) -> None:
        with torch.no_grad():
            self.model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT)  # type: ignore[attr-defined]


def test_covariances_sum_over_real_tokens_in_float64(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "teacher", dtype=torch.float32)
    plain = Plain(model)
    ids = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    together = collate([Example("", i, 1) for i in ids], 2)
    alone = [collate([Example("", i, 1)], 2) for i in ids]
    found = covariances(plain, plain, [together], 4)  # type: ignore[arg-type]
    expected = covariances(plain, plain, alone, 4)  # type: ignore[arg-type]
    assert set(found) == {
        (layer, role) for layer in range(4) for role in ("q", "o", "gate", "down")
    }
    for key, covariance in found.items():
        assert covariance.dtype == torch.float64
        torch.testing.assert_close(covariance, expected[key], rtol=1e-4, atol=1e-6)


def test_inputs_that_are_not_finite_are_named(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "teacher", dtype=torch.float32)
    model.model.layers[1].input_layernorm.weight.data.fill_(float("nan"))
    plain = Plain(model)
    batch = collate([Example("", [5, 6, 7], 1)], 2)
    with pytest.raises(ValueError, match="layer 1, matrix q"):
        covariances(plain, plain, [batch], 4)  # type: ignore[arg-type]


def test_a_fused_gpt2_keeps_its_outputs_when_all_ranks_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(parallel, "uniform_rank", lambda rows, columns, keep: min(rows, columns))
    reports = parallel.factorize(
        tmp_path / "teacher", tmp_path / "student", keep_ratio=1.0, covariances=None, tokenizer=None
    )
    assert [r.role for r in reports[:6]] == ["q", "k", "v", "o", "up", "down"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-3, atol=1e-4)
