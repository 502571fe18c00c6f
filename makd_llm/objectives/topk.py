"""Model level: a divergence from the teacher's k likeliest tokens and one bucket for all others.

Both distributions are coarse-grained to the same k + 1 outcomes. For a divergence of the family
sum q f(p/q) (all of makd_kernels.divergences are) that never raises it, by the inequality of data
processing, and where k is the whole vocabulary it is the divergence itself.
"""
# N summary tokens, n of a chunk, V vocabulary, D width, K likeliest tokens, O outcomes

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from makd_kernels.divergences import checked_divergence
from makd_kernels.plain import DIVERGENCES
from makd_llm.objectives.head import Outputs
from makd_llm.shown import TopTokens

CHUNK = 256  # summary tokens whose logits exist together


def topk_divergence(
    outputs: Outputs,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
) -> Tensor:
    """tau² D(teacher, student) over k + 1 outcomes, per summary token. Returns (N,) fp32 (or fp64).

    At temperature tau both are p^(1/tau) of the whole vocabulary, normalised, before the others are
    put together: the cache holds what they add up to. The student's logits are made again in the
    backward, a chunk at a time. Source: ours; the divergences as in makd_kernels.divergences.
    Raises ValueError where nothing was stored, or not for this temperature.
    """
    top = outputs.top
    if top is None or temperature not in top.temperatures:
        stored = "none at all" if top is None else f"those for temperatures {top.temperatures}"
        raise ValueError(f"temperature {temperature} needs its top tokens; there are {stored}")
    student_ND, weight_VD = outputs.student_ND, outputs.student_weight_VD
    exact = torch.promote_types(student_ND.dtype, torch.float32)
    everything = top.ids_NK.shape[1] == weight_VD.shape[0]
    log_p_NO = _of_teacher(top, temperature, exact, everything)
    known = checked_divergence(divergence, DIVERGENCES, beta, alpha)
    measure = partial(
        _chunk, divergence=known, beta=beta, alpha=alpha, temperature=temperature
    )  # fmt: skip
    chunks = zip(
        student_ND.split(CHUNK), top.ids_NK.split(CHUNK), log_p_NO.split(CHUNK), strict=True
    )
    found = [
        checkpoint(measure, x, weight_VD, ids, log_p, use_reentrant=False, preserve_rng_state=False)
        for x, ids, log_p in chunks
    ]
    return torch.cat(found) * temperature**2


@torch.no_grad()
def _of_teacher(top: TopTokens, temperature: float, exact: torch.dtype, everything: bool) -> Tensor:
    """log p of the outcomes; normalised anew, as what was stored is rounded. everything: k is the
    whole vocabulary, and there are no others.
    """
    log_p_NO = top.log_p_NK.to(exact) / temperature
    if not everything:
        rest_N1 = top.log_rest_NS[:, [top.temperatures.index(temperature)]].to(exact)
        log_p_NO = torch.cat([log_p_NO, rest_N1], -1)
    return log_p_NO.log_softmax(-1)


def _chunk(
    student_nD: Tensor,
    weight_VD: Tensor,
    ids_nK: Tensor,
    log_p_nO: Tensor,
    *,
    divergence: str,
    beta: float,
    alpha: float,
    temperature: float,
) -> Tensor:
    logits_nV = (student_nD @ weight_VD.T).to(log_p_nO.dtype) / temperature
    outcomes_nO = logits_nV.gather(-1, ids_nK)
    if log_p_nO.shape[1] > ids_nK.shape[1]:
        # Not 1 - sum q, which loses all of a small rest to rounding.
        rest_nV = logits_nV.scatter(-1, ids_nK, -torch.inf)
        outcomes_nO = torch.cat([outcomes_nO, rest_nV.logsumexp(-1, keepdim=True)], -1)
    log_q_nO = outcomes_nO.log_softmax(-1)
    found_n = DIVERGENCES[divergence](log_p_nO, log_q_nO, beta, alpha)
    # None is below 0 but by rounding; the gradient stays.
    return found_n - found_n.detach().clamp_max(0.0)
