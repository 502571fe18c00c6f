"""Attributions of real models: integrated gradients are complete, a planted word is found, and the
student's gradient is that of the loss, each way of taking it.
"""
# B records, T tokens, K views, D width

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from makd_llm.data.batch import Batch, collate
from makd_llm.data.schema import Example
from makd_llm.models.causal import CausalModel
from makd_llm.models.families import FAMILIES
from makd_llm.objectives.attribution import (
    Attribution,
    Question,
    ask,
    attribution_distance,
    token_importance,
)
from makd_llm.testing import launch_ranks
from makd_llm.testing.training import assert_same_gradient, factorized, gradients, sizes
from makd_llm.train.attribution import Explained, attribution_loss

V = 48


def model_of(
    seed: int,
    hidden: int = 16,
    dtype: torch.dtype = torch.float64,
    eps: float = 1e-6,
    scale: float = 0.3,
) -> CausalModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=scale,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        rms_norm_eps=eps,
        attn_implementation="sdpa",
    )
    return CausalModel(LlamaForCausalLM(config).to(dtype).eval(), FAMILIES["llama"])


def small_batch(padding_side: Any = "right") -> Batch:
    torch.manual_seed(5)
    rows = [torch.randint(3, V, (n,)).tolist() for n in (14, 11)]
    given = [Example("a", rows[0], 9, (1, 8)), Example("b", rows[1], 7, (2, 6))]
    return collate(given, pad_id=0, padding_side=padding_side)


def question_of(teacher: CausalModel, batch: Batch, term: Attribution, step: int = 1) -> Question:
    with torch.no_grad():
        return ask(batch, term, step, teacher(batch), teacher.head.weight)


def written_out(
    model: CausalModel, batch: Batch, question: Question, steps: int, top_k: float
) -> Tensor:
    """(B, K, T) attributions, record by record, through `inputs_embeds`."""
    found = torch.zeros(*question.probability_BK.shape, batch.labels_BT.shape[1]).double()
    hf: Any = model.model
    for b in range(len(batch.record_ids)):
        x = hf.get_input_embeddings()(batch.input_ids_BT[b]).detach()
        document = batch.document_mask_BT[b]
        for k in range(question.tokens_BSK.shape[-1]):
            g = torch.zeros_like(x)
            for n in range(1, steps + 1):
                at = torch.where(document[:, None], x * n / steps, x).requires_grad_()
                logits = hf(
                    inputs_embeds=at[None],
                    attention_mask=batch.attention_mask_BT[b : b + 1],
                    position_ids=batch.position_ids_BT[b : b + 1],
                ).logits[0]
                places = question.places_BS[b][question.taken_BS[b]]
                tokens = question.tokens_BSK[b, :, k][question.taken_BS[b]]
                score = logits[places].log_softmax(-1)[range(len(places)), tokens].mean()
                g += torch.autograd.grad(score, at)[0] / steps
            found[b, k] = token_importance(g[None], x[None], document[None], top_k)[0]
    return found


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_loss_is_that_of_every_record_by_itself(steps: int, padding_side: str) -> None:
    student, teacher, batch = model_of(0), model_of(1), small_batch(padding_side)
    teacher.requires_grad_(False)
    term = Attribution(1.0, steps=steps, positions=3, top_k=0.5)
    question = question_of(teacher, batch, term)
    expected = attribution_distance(
        written_out(student, batch, question, steps, 1.0),
        written_out(teacher, batch, question, steps, 0.5),
        question.probability_BK,
    )
    for exact in (True, False):
        _, loss = attribution_loss(student, teacher, term, batch, question, exact=exact)
        torch.testing.assert_close(loss, expected.sum(), rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in teacher.parameters())


def loss_along(
    student: CausalModel, teacher: CausalModel, term: Attribution, question: Question, by: float
) -> float:
    """The loss with the student's weights moved by so much along a fixed direction."""
    directions = direction_of(student)
    with torch.no_grad():
        for p, d in zip(student.parameters(), directions, strict=True):
            p += by * d
    _, loss = attribution_loss(student, teacher, term, small_batch(), question, exact=True)
    with torch.no_grad():
        for p, d in zip(student.parameters(), directions, strict=True):
            p -= by * d
    return float(loss)


def direction_of(student: CausalModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(p.shape, generator=generator).to(p) for p in student.parameters()]


@pytest.mark.parametrize("method", ["gradients", "occlusion"])
def test_the_gradient_is_the_losss_own_slope(method: Any) -> None:
    student, teacher, batch = model_of(0), model_of(1), small_batch()
    teacher.requires_grad_(False)
    term = Attribution(1.0, method=method, steps=2, positions=3, spans=3)
    question = question_of(teacher, batch, term)
    total, _ = attribution_loss(student, teacher, term, batch, question, exact=True)
    total.backward()
    along = sum(
        float((p.grad * d).sum())  # type: ignore[operator]
        for p, d in zip(student.parameters(), direction_of(student), strict=True)
    )
    h = 1e-4  # less drowns: norms and rotary angles are float32 in any model
    measured = (
        loss_along(student, teacher, term, question, h)
        - loss_along(student, teacher, term, question, -h)
    ) / (2 * h)
    assert along == pytest.approx(measured, rel=5e-3)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 0.999), (torch.bfloat16, 0.9)])
def test_differences_learn_what_a_backward_through_the_backward_learns(
    dtype: torch.dtype, least: float
) -> None:
    found = []
    for exact in (True, False):
        student, teacher = model_of(0), model_of(1)
        teacher.requires_grad_(False)
        question = question_of(teacher, small_batch(), Attribution(1.0))
        if not exact:
            student, teacher = student.to(dtype), teacher.to(dtype)
        total, _ = attribution_loss(
            student, teacher, Attribution(1.0), small_batch(), question, exact=exact
        )
        total.backward()
        found.append(torch.cat([p.grad.flatten().double() for p in student.parameters()]))  # type: ignore[union-attr]
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > least
    assert 0.9 < found[1].norm() / found[0].norm() < 1.1


def test_attributions_sum_to_what_the_document_is_worth() -> None:
    """Completeness of integrated gradients: F(x) - F(blank document), as the steps grow. (RMSNorm
    jumps where embeddings are blank; with its usual epsilon that takes thousands of steps.)
    """
    model, batch = model_of(3, eps=0.1), small_batch()
    question = question_of(model, batch, Attribution(1.0))
    explained = Explained(model, batch, question)
    whole, *_ = explained.scores(lambda x: x)
    blank, *_ = explained.scores(lambda x: explained.scaled(x, 0.0))
    worth = (whole - blank).detach()
    errors = []
    for steps in (4, 16, 64, 256):
        slopes, x = explained.slopes(steps)
        mask = batch.document_mask_BT[..., None]
        summed = torch.stack([(g * x * mask).sum((1, 2)) for g in slopes], dim=1).detach()
        errors.append(float((summed - worth).abs().max()))
    assert errors[-1] < 0.01 * float(worth.abs().max())
    assert errors[-1] < errors[1] / 8  # the error of a sum of rectangles falls with their number


def key_examples(count: int, seed: int) -> list[Example]:
    """Documents of nine fillers and one key, anywhere; the key alone says what the summary is."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        document = torch.randint(20, V, (10,), generator=generator).tolist()
        place, key = torch.randint(0, 8, (2,), generator=generator).tolist()
        document[place] = 4 + key
        made.append(Example(str(index), [1, *document, 3, 12 + key, 2], 12, (1, 11)))
    return made


@pytest.mark.slow
def test_the_word_that_decides_the_summary_gets_the_largest_attribution() -> None:
    model = model_of(7, hidden=32, dtype=torch.float32, scale=0.1)
    torch.nn.init.normal_(model.model.get_input_embeddings().weight, std=1.0)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        batch = collate(key_examples(64, step), pad_id=0)
        logits = model.model(input_ids=batch.input_ids_BT).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05  # it has learnt to look for the key
    held_out = key_examples(64, 10**6)
    batch = collate(held_out, pad_id=0)
    question = question_of(model, batch, Attribution(1.0, views=0, positions=1), step=2)
    is_key = (batch.input_ids_BT >= 4) & (batch.input_ids_BT < 12)
    explained = Explained(model, batch, question)
    key = (is_key & batch.document_mask_BT).int().argmax(-1)

    def hits(steps: int) -> float:
        importance = explained.importance(*explained.slopes(steps))[:, 0]
        return float((importance.argmax(-1) == key).float().mean())

    assert hits(1) > 0.95 and hits(8) > 0.95
    spans = explained.occluded(10)[:, 0].detach()
    assert (spans.argmax(-1) == key - 1).float().mean() > 0.95


def of_stage_two(folder: str, world: int, micro: int) -> dict[str, Tensor]:
    student = factorized(Path(folder))
    distil = {
        "preset": "adkd",
        "objectives": {
            "cross_entropy": {"weight": 0.0},
            "logits": {"weight": 0.0},
            "attribution": {"second_order": "exact", "every": 1},
        },
    }
    return gradients(Path(folder), student, sizes(world, micro, stage=2), distil=distil)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_backward_through_the_backward_is_the_same_for_every_split(tiny: Path) -> None:
    whole = launch_ranks(1, of_stage_two, str(tiny), 1, 4, timeout=300)[0]
    accumulated = launch_ranks(1, of_stage_two, str(tiny), 1, 1, timeout=300)[0]
    for rank in (accumulated, *launch_ranks(2, of_stage_two, str(tiny), 2, 2, timeout=300)):
        assert_same_gradient(rank, whole)
