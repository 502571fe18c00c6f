"""Model level: optimal transport between the next-token distributions of a record (SinKD).

The divergences compare the two models token by token; this compares the set of a record's
distributions with the teacher's set, so that it also sees how they lie to each other. The original
takes the rows of a batch; here they are one record's, so that the loss does not depend on which
records share a micro-batch (ours).
"""
# N summary tokens, S of them of one record, V vocabulary

import torch
from torch import Tensor

from makd_llm.objectives.head import Outputs


def sinkhorn_cost(
    outputs: Outputs,
    *,
    temperature: float = 2.0,
    regularization: float = 0.1,
    iterations: int = 20,
    positions: int = 64,
) -> Tensor:
    """The transport cost of each record, at its first summary token that takes part and 0 at all
    others, times the number of its summary tokens over those that take part. Returns (N,) fp32 (or
    fp64).

    C_ij = |q_i - p_j|_1 between the student's and the teacher's softened distributions; the plan is
    exp(-C / regularization), its rows and columns made to sum to 1 in turns; the cost is sum P C.
    positions: at most so many tokens of a record, evenly spread. Source: SinKD (its code: 20
    normalizations, temperature 2, regularization 0.1), with a record's rows for the batch's.
    """
    exact = torch.promote_types(outputs.student_ND.dtype, torch.float32)
    found_N = torch.zeros(len(outputs.record_N), dtype=exact, device=outputs.student_ND.device)
    for record in outputs.record_N.unique().tolist():
        places = (outputs.record_N == record).nonzero().flatten()
        taken = places[_spread(len(places), positions)]
        log_q_SV = _softened(outputs.student_ND[taken], outputs.student_weight_VD, temperature)
        with torch.no_grad():
            theirs = outputs.teacher_NE[taken], outputs.teacher_weight_VE
            log_p_SV = _softened(*theirs, temperature)
        cost = transport_cost(log_q_SV.exp(), log_p_SV.exp(), regularization, iterations)
        found_N = found_N.index_add(0, taken[:1], cost.to(exact)[None] * (len(places) / len(taken)))
    return found_N


def transport_cost(q_SV: Tensor, p_SV: Tensor, regularization: float, iterations: int) -> Tensor:
    """sum P C for C_ij = |q_i - p_j|_1 and the plan P of entropic transport. Returns a scalar."""
    cost_SS = torch.cdist(q_SV[None], p_SV[None], p=1.0)[0]
    log_plan_SS = -cost_SS / regularization  # in logs: exp(-20) times a hundred tokens underflows
    for _ in range(iterations):
        log_plan_SS = log_plan_SS - log_plan_SS.logsumexp(1, keepdim=True)
        log_plan_SS = log_plan_SS - log_plan_SS.logsumexp(0, keepdim=True)
    return (log_plan_SS.exp() * cost_SS).sum()


def _softened(hidden_SD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_SV = hidden_SD @ weight_VD.T
    exact = torch.promote_types(logits_SV.dtype, torch.float32)
    return (logits_SV.to(exact) / temperature).log_softmax(-1)


def _spread(count: int, most: int) -> Tensor:
    """Numbers below count, at most so many, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()
