"""Attributions of both models, and what the student learns from them; see objectives.attribution.

Two ways to a gradient of gradients. `exact` is a backward through the backward: it needs attention
that can be differentiated twice (SDPA's plain form), and all weights while it runs. `differences`
needs neither: with v the loss's slope at the student's gradient g = dF/dx, the slope of v · g over
the weights is that of (F(x + e v) - F(x - e v)) / 2e, of two ordinary forward passes (ours).
"""
# B records, T tokens, K views, I document tokens or spans, D width

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from makd_llm.data.batch import Batch
from makd_llm.models.causal import CausalModel
from makd_llm.models.embeddings import embeddings_changed
from makd_llm.objectives.attribution import (
    Attribution,
    Question,
    attribution_distance,
    spans_of,
    token_importance,
)

STEPS = {torch.bfloat16: 0.05, torch.float16: 0.05}
"""Of central differences, in units of the embeddings' norm: less drowns in rounding."""
STEP = 0.01
"""The same where numbers are more exact."""


def attribution_loss(
    student: CausalModel,
    teacher: CausalModel,
    term: Attribution,
    batch: Batch,
    question: Question,
    *,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """(a scalar whose slope over the student's weights is the loss's, the loss), summed over
    records.

    exact: by a backward through the backward, rather than by differences. The teacher gets no
    gradient. Collective: every rank runs the same number of forward passes. Source: AD-KD, for
    decoders (ours, docs/methods/adkd.md).
    """
    theirs = Explained(teacher, batch, question, whole=exact)
    ours = Explained(student, batch, question, whole=exact)
    if term.method == "occlusion":
        with torch.no_grad():
            teacher_BKI = theirs.occluded(term.spans)
        student_BKI = ours.occluded(term.spans)
        loss = attribution_distance(student_BKI, teacher_BKI, question.probability_BK).sum()
        return loss, loss.detach()
    with torch.enable_grad():
        slopes, x_BTD = theirs.slopes(term.steps)
    teacher_BKI = theirs.importance(slopes, x_BTD, term.top_k).detach()

    def compare(slopes: list[Tensor], x_BTD: Tensor) -> Tensor:
        student_BKI = ours.importance(slopes, x_BTD)
        return attribution_distance(student_BKI, teacher_BKI, question.probability_BK).sum()

    if exact:
        with sdpa_kernel(SDPBackend.MATH):
            loss = compare(*ours.slopes(term.steps, create_graph=True))
        return loss, loss.detach()
    return _by_differences(ours, term.steps, compare)


class Explained:
    """One model, one batch, one question: its scores and their slopes, on changed embeddings.

    whole: all weights lie there, so that one forward pass serves the slopes of all views. ZeRO-3
    fetches them for one backward of each forward.
    """

    def __init__(
        self, model: CausalModel, batch: Batch, question: Question, *, whole: bool = True
    ) -> None:
        self.model, self.question, self.whole = model, question, whole
        self.batch = batch.with_padding()  # embeddings are changed where the document stands
        self.document_BT1 = batch.document_mask_BT[..., None]

    def scores(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """F (B, K) on what `change` makes of the embeddings; the model's own ones (B, T, D), and
        the changed ones.
        """
        with embeddings_changed(self.model.model, change) as embedded:
            scores_BK: Tensor = self.model(self.batch, self.question.scores)
        assert embedded.own_BTD is not None and embedded.given_BTD is not None
        return scores_BK, embedded.own_BTD, embedded.given_BTD

    def scaled(self, x_BTD: Tensor, factor: float) -> Tensor:
        """The document's embeddings times a factor; the template's and summary's as they are."""
        return torch.where(self.document_BT1, x_BTD * factor, x_BTD)

    def slopes(self, steps: int, *, create_graph: bool = False) -> tuple[list[Tensor], Tensor]:
        """dF/dx of every view, (B, T, D) each: the mean over `steps` points between a document of
        blank embeddings (left out) and the model's own ones (the last point); and these, (B, T, D).
        """
        points = [self._slopes_at(n / steps, create_graph) for n in range(1, steps + 1)]
        by_view = zip(*(slopes for slopes, _ in points), strict=True)
        return [torch.stack(slopes).mean(0) for slopes in by_view], points[-1][1]

    def _slopes_at(self, factor: float, create_graph: bool) -> tuple[list[Tensor], Tensor]:
        def change(x_BTD: Tensor) -> Tensor:
            changed_BTD = self.scaled(x_BTD, factor)
            return changed_BTD if changed_BTD.requires_grad else changed_BTD.requires_grad_()

        if self.whole:
            scores_BK, own_BTD, given_BTD = self.scores(change)
            return [
                torch.autograd.grad(
                    score_B.sum(), given_BTD, create_graph=create_graph, retain_graph=True
                )[0]
                for score_B in scores_BK.unbind(1)
            ], own_BTD
        slopes = []
        for k in range(self.question.tokens_BSK.shape[-1]):
            scores_BK, own_BTD, given_BTD = self.scores(change)
            slopes.append(torch.autograd.grad(scores_BK[:, k].sum(), given_BTD)[0])
        return slopes, own_BTD

    def importance(self, slopes: list[Tensor], x_BTD: Tensor, top_k: float = 1.0) -> Tensor:
        """Of every view and token, (B, K, T)."""
        document_BT = self.batch.document_mask_BT
        return torch.stack([token_importance(g, x_BTD, document_BT, top_k) for g in slopes], 1)

    def occluded(self, spans: int) -> Tensor:
        """How much every view's score falls when a span of the document is blank, (B, K, spans)."""
        whole_BK, *_ = self.scores(lambda x_BTD: x_BTD)
        span_BT1 = spans_of(self.batch.document_mask_BT, spans)[..., None]
        without = [
            self.scores(lambda x_BTD, j=j: torch.where(span_BT1 == j, 0.0, x_BTD))[0]  # type: ignore[misc]
            for j in range(spans)
        ]
        return whole_BK[..., None] - torch.stack(without, dim=-1)


def _by_differences(
    student: Explained, steps: int, compare: Callable[[list[Tensor], Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    slopes, own_BTD = student.slopes(steps)
    slopes = [g_BTD.detach().requires_grad_() for g_BTD in slopes]
    x_BTD = own_BTD.detach().requires_grad_()
    loss = compare(slopes, x_BTD)
    *directions, at_x_BTD = torch.autograd.grad(loss, [*slopes, x_BTD])
    size_B11 = _norm(torch.where(student.document_BT1, x_BTD.detach(), 0.0))
    surrogate = torch.zeros_like(loss)
    for k, v_BTD in enumerate(directions):
        length_B11 = _norm(v_BTD)
        # A record whose direction is 0 has nothing to learn from this view, and stays as it is.
        step_B11 = (
            STEPS.get(x_BTD.dtype, STEP) * size_B11 / length_B11.where(length_B11 > 0, torch.inf)
        )
        half_over_step_B = torch.where(step_B11 > 0, 0.5 / step_B11, 0.0).flatten()
        shift_BTD = (step_B11 * v_BTD).to(x_BTD.dtype)
        for n in range(1, steps + 1):
            for shift in (shift_BTD, -shift_BTD):
                scores_BK, own_BTD, _ = student.scores(
                    lambda x, n=n, shift=shift: student.scaled(x, n / steps) + shift  # type: ignore[misc]
                )
                sign = 1.0 if shift is shift_BTD else -1.0
                surrogate = surrogate + sign / steps * (half_over_step_B * scores_BK[:, k]).sum()
    # The loss sees the embeddings also beside their slopes.
    return surrogate + (own_BTD * at_x_BTD).sum(), loss.detach()


def _norm(x_BTD: Tensor) -> Tensor:
    exact = torch.promote_types(x_BTD.dtype, torch.float32)
    norm_B11: Tensor = torch.linalg.vector_norm(x_BTD.to(exact), dim=(1, 2), keepdim=True)
    return norm_B11
