"""Divergences between two softmaxes, row by row, with their gradient, in few passes.

A row of teacher logits t gives p = softmax(t), a row of student logits s gives q = softmax(s).
Every formula works on rows that are *centred* (their maximum subtracted) and on exponentials that
are not yet divided by their sum l: log p = t - ln l_t. Centring keeps the relative error near 2e-7
at any logit scale, and identical inputs give exactly 0: both sides then run the same arithmetic.

Everything happens in place on small tiles: on a CPU the cost is memory passes and page faults, not
arithmetic.

| divergence   | value                       | gradient with respect to s           |
|--------------|-----------------------------|--------------------------------------|
| forward_kl   | KL(p||q)                    | q - p                                |
| reverse_kl   | KL(q||p)                    | q [(log q - log p) - KL(q||p)]       |
| jsd (beta)   | b KL(p||m) + (1-b) KL(q||m) | (1-b) q [log(q/m) - KL(q||m)]        |

with m = b p + (1-b) q. As in TRL, jsd at b = 0 *is* the forward KL and at b = 1 the reverse KL (the
limits of jsd / (b (1-b)); the formula itself would give 0 there).
"""

# V the row's length (vocabulary or keys); "..." any leading dimensions; row statistics have V = 1

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# exp() of anything lower vanishes beside the row's maximum, whose exp is 1, in float64 too. The
# CPU's vector exp is a hundred times slower where the result is denormal, so it never gets there.
LOWEST_EXPONENT = -64.0


class Rows(NamedTuple):
    """Centred logits, their exponentials, and the exponentials' sum over the last dimension."""

    logits: Tensor
    exp: Tensor
    sum: Tensor


class Weights(NamedTuple):
    """What the gradient is made of, one number per row: `divergence` * dD/ds + `student` * q."""

    divergence: Tensor
    student: Tensor | None = None


Formula = Callable[[Rows, Rows, Weights | None, bool], Tensor | None]


def exponentials(
    logits: Tensor, exp: Tensor, visible: Callable[[Tensor], None] | None = None
) -> Rows:
    """Centre `logits` in place and write their exponentials into `exp` (same shape).

    `visible` zeroes the hidden entries of what it is given; a row with nothing visible gets sum 1,
    so that its divergence and its gradient come out as exactly 0. Source: ours.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    torch.clamp_min(logits, LOWEST_EXPONENT, out=exp)
    exp.exp_()
    if visible is not None:
        visible(exp)
    # the maximum's exponential is 1, so a visible row's sum is never below it
    return Rows(logits, exp, exp.sum(-1, keepdim=True).clamp_min_(1.0))


def forward_kl(t: Rows, s: Rows, weights: Weights | None, value: bool) -> Tensor | None:
    """KL(p||q) as (..., 1) if `value`; with `weights` the gradient overwrites `s.exp`.

    Overwrites the teacher's rows. Source: Hinton et al. 2015.
    """
    result = None
    if value:
        gap = t.logits.sub_(s.logits)
        result = gap.mul_(t.exp).sum(-1, keepdim=True).div_(t.sum)
        result.sub_(t.sum.log()).add_(s.sum.log()).clamp_min_(0.0)
    if weights is not None:
        of_q = weights.divergence
        if weights.student is not None:
            of_q = of_q + weights.student
        s.exp.mul_(of_q / s.sum).sub_(t.exp.mul_(weights.divergence / t.sum))
    return result


def reverse_kl(t: Rows, s: Rows, weights: Weights | None, value: bool) -> Tensor | None:
    """KL(q||p) as (..., 1) if `value`; with `weights` the gradient overwrites `s.exp`.

    Overwrites the teacher's rows. Source: Gu et al. 2024 (MiniLLM).
    """
    gap = t.logits.sub_(s.logits)
    mean_gap = torch.mul(gap, s.exp, out=t.exp).sum(-1, keepdim=True).div_(s.sum)
    if weights is not None:
        scale = weights.divergence / s.sum
        shift = mean_gap * scale
        if weights.student is not None:
            shift.add_(weights.student / s.sum)
        s.exp.mul_(gap.mul_(scale.neg_()).add_(shift))
    if not value:
        return None
    return mean_gap.neg_().sub_(s.sum.log()).add_(t.sum.log()).clamp_min_(0.0)


def jsd(beta: float) -> Formula:
    """Generalised Jensen-Shannon divergence: beta KL(p||m) + (1-beta) KL(q||m), 0 < beta < 1.

    With r = log p - log q and u = log1p(c expm1(-|r|)), where c is 1-beta for r > 0 and beta
    otherwise, log(m/q) = max(r, 0) + u and log(m/p) = max(-r, 0) + u: no overflow at any r, and
    full precision near r = 0. Source: Agarwal et al. 2024 (GKD); this form is ours.
    """

    def formula(t: Rows, s: Rows, weights: Weights | None, value: bool) -> Tensor | None:
        ratio = t.logits.sub_(s.logits).sub_(t.sum.log() - s.sum.log())
        mixed = ratio.abs().neg_().expm1_()
        mixed.mul_((ratio > 0).to(ratio.dtype).mul_(1.0 - 2.0 * beta).add_(beta)).log1p_()
        over_q = ratio.clamp_min(0.0).add_(mixed)  # log(m/q)
        kl_q = (over_q * s.exp).sum(-1, keepdim=True).div_(s.sum).neg_()
        result = None
        if value:
            over_p = ratio.neg_().clamp_min_(0.0).add_(mixed)  # log(m/p)
            kl_p = over_p.mul_(t.exp).sum(-1, keepdim=True).div_(t.sum).neg_()
            result = kl_p.mul_(beta).add_(kl_q, alpha=1.0 - beta).clamp_min_(0.0)
        if weights is not None:
            scale = weights.divergence * (beta - 1.0) / s.sum
            shift = kl_q * scale
            if weights.student is not None:
                shift.add_(weights.student / s.sum)
            s.exp.mul_(over_q.mul_(scale).add_(shift))
        return result

    return formula


DIVERGENCES: dict[str, Callable[[float], Formula]] = {
    "forward_kl": lambda beta: forward_kl,
    "reverse_kl": lambda beta: reverse_kl,
    "jsd": lambda beta: {0.0: forward_kl, 1.0: reverse_kl}.get(beta) or jsd(beta),
}


def check_divergence(name: str, known: Iterable[str], beta: float = 0.5) -> None:
    """ValueError unless `name` is among `known` and `beta` lies in [0, 1]."""
    if name not in known:
        raise ValueError(f"divergence={name!r} is not known; choose one of: {', '.join(known)}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta} is outside [0, 1]; 0 is the forward KL, 1 the reverse KL")
