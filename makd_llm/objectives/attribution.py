"""Model level: do both models take their summary from the same words of the document? (AD-KD)

A view is a choice of tokens at some summary positions: the reference's, and the teacher's likeliest
ones. What a view owes to each token of the document is its attribution, a vector that is brought to
length 1 on both sides before the two are compared, so that only the shares count.

How attributions are made is up to the caller (train.attribution); here is what needs no model.
"""
# B records, T tokens, S sampled summary positions, K views, I document tokens or spans, D width

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from makd_llm.data.batch import Batch
from makd_llm.objectives.head import ALWAYS, Timing

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, never repeat and are spread evenly."""


@dataclass(frozen=True)
class Attribution:
    """The objective's settings; see config.objectives.AttributionConfig."""

    weight: float
    method: Literal["gradients", "occlusion"] = "gradients"
    views: int = 2
    positions: int = 8
    steps: int = 1
    top_k: float = 0.8
    spans: int = 8
    second_order: Literal["auto", "exact", "differences"] = "auto"
    timing: Timing = ALWAYS

    def is_exact(self, possible: bool) -> bool:
        """Whether the student learns by a backward through the backward; possible: if it can."""
        return possible if self.second_order == "auto" else self.second_order == "exact"


@dataclass(frozen=True)
class Question:
    """What is explained: K views of the tokens at S summary positions of each record. taken_BS is
    False where a summary has fewer than S tokens; probability_BK: the teacher's mean of each view.
    """

    places_BS: Tensor
    taken_BS: Tensor
    tokens_BSK: Tensor
    probability_BK: Tensor

    def scores(self, hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """F of every record and view: the mean of log p of its tokens, (B, K) fp32 (or fp64)."""
        log_p_BSV = _log_probabilities(hidden_BTD, weight_VD, self.places_BS)
        return _mean_over_positions(log_p_BSV.gather(-1, self.tokens_BSK), self.taken_BS)


@torch.no_grad()
def ask(
    batch: Batch, term: Attribution, step: int, teacher_hidden_BTE: Tensor, weight_VE: Tensor
) -> Question:
    """The question of one step (counted from 1): the reference's tokens and the teacher's likeliest
    ones at some of the summary's positions.
    """
    places_BS, taken_BS = sampled_positions(batch, term.positions, step)
    log_p_BSV = _log_probabilities(teacher_hidden_BTE, weight_VE, places_BS)
    golden_BS1 = batch.labels_BT.gather(1, places_BS).clamp(min=0)[..., None]
    likeliest_BSK = log_p_BSV.topk(term.views, dim=-1).indices
    tokens_BSK = torch.cat([golden_BS1, likeliest_BSK], dim=-1)
    probability_BSK = log_p_BSV.gather(-1, tokens_BSK).exp()
    mean_BK = _mean_over_positions(probability_BSK, taken_BS)
    return Question(places_BS, taken_BS, tokens_BSK, mean_BK)


def sampled_positions(batch: Batch, count: int, step: int) -> tuple[Tensor, Tensor]:
    """Places of the sequence from which summary tokens are predicted: evenly spread, and others in
    every step, but the same for every split into ranks and micro-batches.

    Returns (B, S) places and (B, S) bool, False where a summary has fewer tokens than that.
    """
    offset = (step * GOLDEN) % 1.0
    places_BS = torch.zeros(len(batch.record_ids), count, dtype=torch.long)
    taken_BS = torch.zeros_like(places_BS, dtype=torch.bool)
    for row, is_target_T in enumerate(batch.target_mask_BT.cpu()):
        targets = is_target_T.nonzero().flatten()
        some = min(count, len(targets))
        chosen = ((torch.arange(some) + offset) * (len(targets) / max(some, 1))).long()
        places_BS[row, :some] = targets[chosen]
        taken_BS[row, :some] = True
    device = batch.labels_BT.device
    return places_BS.to(device), taken_BS.to(device)


def token_importance(
    gradient_BTD: Tensor, embedding_BTD: Tensor, document_BT: Tensor, top_k: float = 1.0
) -> Tensor:
    """|g * x|_2 of each token of the document over its top_k x D largest dimensions, 0 for others.
    Returns (B, T) fp32 (or fp64). Source: AD-KD.
    """
    exact = torch.promote_types(gradient_BTD.dtype, torch.float32)
    product_BTD = gradient_BTD.to(exact) * embedding_BTD.to(exact)
    if top_k < 1.0:
        kept = max(1, round(top_k * product_BTD.shape[-1]))
        product_BTD = product_BTD.abs().topk(kept, dim=-1).values
    squared_BT = torch.where(document_BT, product_BTD.square().sum(-1), 0.0)
    # The root's slope at 0 is infinite; of a token that counts for nothing it is to be 0.
    above_BT = squared_BT > 0
    return torch.where(above_BT, torch.where(above_BT, squared_BT, 1.0).sqrt(), 0.0)


def attribution_distance(
    student_BKI: Tensor, teacher_BKI: Tensor, probability_BK: Tensor
) -> Tensor:
    """sum_k w_k |a_S / |a_S| - a_T / |a_T||²: at most 4 per view (2 where nothing is negative), and
    0 where one of the two owes nothing to the document. w_k: the teacher's mean probability of that
    view. Returns (B,). Source: AD-KD, its mean over tokens left out (ours).
    """
    if student_BKI.shape != teacher_BKI.shape:
        raise ValueError(
            f"student {tuple(student_BKI.shape)} and teacher {tuple(teacher_BKI.shape)} differ in "
            "shape; attributions are compared token by token"
        )
    teacher_BKI = teacher_BKI.detach()
    known_BK = student_BKI.detach().any(-1) & teacher_BKI.any(-1)
    difference_BKI = _unit(student_BKI, known_BK) - _unit(teacher_BKI, known_BK)
    squared_BK = difference_BKI.square().sum(-1)
    return (probability_BK.detach() * torch.where(known_BK, squared_BK, 0.0)).sum(-1)


def spans_of(document_BT: Tensor, count: int) -> Tensor:
    """(B, T): into which of `count` even spans of its document a token falls; -1 outside of it."""
    place_BT = document_BT.cumsum(-1) - 1
    length_B1 = document_BT.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(document_BT, place_BT * count // length_B1, -1)


def _log_probabilities(hidden_BTD: Tensor, weight_VD: Tensor, places_BS: Tensor) -> Tensor:
    """(B, S, V) of the tokens after these places."""
    index_BSD = places_BS[..., None].expand(-1, -1, hidden_BTD.shape[-1])
    logits_BSV = hidden_BTD.gather(1, index_BSD) @ weight_VD.T
    exact = torch.promote_types(logits_BSV.dtype, torch.float32)
    return logits_BSV.to(exact).log_softmax(-1)


def _mean_over_positions(values_BSK: Tensor, taken_BS: Tensor) -> Tensor:
    """(B, K); 0 for a record of which no position is taken."""
    summed_BK = torch.where(taken_BS[..., None], values_BSK, 0.0).sum(1)
    return summed_BK / taken_BS.sum(1, keepdim=True).clamp(min=1)


def _unit(a_BKI: Tensor, known_BK: Tensor) -> Tensor:
    safe_BKI = torch.where(known_BK[..., None], a_BKI, torch.ones_like(a_BKI))
    unit: Tensor = safe_BKI / torch.linalg.vector_norm(safe_BKI, dim=-1, keepdim=True)
    return unit
