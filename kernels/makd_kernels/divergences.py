"""Divergences between two softmaxes, row by row, with their gradient, in few passes.

A row of teacher logits t gives p = softmax(t), a row of student logits s gives q = softmax(s).
Every formula works on rows that are *centred* (their maximum subtracted) and on exponentials that
are not yet divided by their sum l: log p = t - ln l_t. Centring keeps the relative error near 2e-7
at any logit scale, and identical inputs give exactly 0: both sides then run the same arithmetic.

Everything happens in place on small tiles: on a CPU the cost is memory passes and page faults, not
arithmetic.

| divergence      | value                       | gradient with respect to s              |
|-----------------|-----------------------------|-----------------------------------------|
| forward_kl      | KL(p||q)                    | q - p                                   |
| reverse_kl      | KL(q||p)                    | q [f - E_q(f)], f = log q - log p       |
| jsd             | b KL(p||m) + (1-b) KL(q||m) | q [f - E_q(f)], f = (1-b) log(q/m)      |
| skew_forward_kl | KL(p||m)                    | q [f - E_q(f)], f = -(1-a) p/m          |
| skew_reverse_kl | KL(q||m)                    | q [f - E_q(f)], f = log(q/m) - a q/m    |
| tvd             | sum |p - q| / 2             | q [f - E_q(f)], f = sign(q - p) / 2     |
| probability_mse | sum (p - q)^2               | q [f - E_q(f)], f = 2 (q - p)           |
| logit_mse       | sum (t - s)^2               | 2 (s - t)                               |

E_q is the mean under q; m is b p + (1-b) q for jsd, a p + (1-a) q and (1-a) p + a q for the skewed
forward and reverse KL. As in TRL, jsd at b = 0 *is* the forward KL and at b = 1 the reverse KL (the
limits of jsd / (b (1-b)); the formula itself would give 0 there). The squared errors are summed
over the row: a mean over keys would weigh a query by how many keys it sees.
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
    logits: Tensor,
    exp: Tensor,
    visible: Callable[[Tensor], None] | None = None,
    log_sum_exp: Tensor | None = None,
) -> Rows:
    """Centre `logits` in place and write their exponentials into `exp` (same shape).

    `visible` zeroes the hidden entries of what it is given; a row with nothing visible gets sum 1,
    so that its divergence and its gradient come out as exactly 0. Where `log_sum_exp` is known
    (V = 1), it is subtracted in the maximum's place, and the sum is 1. Source: ours.
    """
    logits.sub_(logits.amax(-1, keepdim=True) if log_sum_exp is None else log_sum_exp)
    torch.clamp_min(logits, LOWEST_EXPONENT, out=exp)
    exp.exp_()
    if visible is not None:
        visible(exp)
    if log_sum_exp is not None:
        return Rows(logits, exp, torch.ones_like(log_sum_exp))
    # the maximum's exponential is 1, so a visible row's sum is never below it
    return Rows(logits, exp, exp.sum(-1, keepdim=True).clamp_min_(1.0))


def visible_logits(
    logits: Tensor,
    exp: Tensor,
    visible: Callable[[Tensor], None] | None = None,
    log_sum_exp: Tensor | None = None,
) -> Rows:
    """Rows for `logit_mse`: `logits` in place with hidden entries 0; the rest has no use."""
    if visible is not None:
        visible(logits)
    return Rows(logits, exp, logits[..., :1])


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

    Source: Agarwal et al. 2024 (GKD); the form that neither overflows nor cancels is ours.
    """

    def formula(t: Rows, s: Rows, weights: Weights | None, value: bool) -> Tensor | None:
        ratio = _log_ratio(t, s)
        mixed = _log_mixture(ratio, beta)
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


def skew_forward_kl(alpha: float) -> Formula:
    """KL(p||m) with m = alpha p + (1-alpha) q, 0 < alpha < 1. Source: Ko et al. 2024 (DistiLLM)."""

    def formula(t: Rows, s: Rows, weights: Weights | None, value: bool) -> Tensor | None:
        ratio = _log_ratio(t, s)
        mixed = _log_mixture(ratio, alpha)
        over_p = ratio.neg_().clamp_min_(0.0).add_(mixed)  # log(m/p)
        result = None
        if value:
            result = t.exp.mul_(over_p).sum(-1, keepdim=True).div_(t.sum).neg_().clamp_min_(0.0)
        if weights is not None:
            _through_softmax(over_p.neg_().exp_().mul_(alpha - 1.0), s, weights, t.exp)
        return result

    return formula


def skew_reverse_kl(alpha: float) -> Formula:
    """KL(q||m) with m = (1-alpha) p + alpha q, 0 < alpha < 1. Source: Ko et al. 2024 (DistiLLM)."""

    def formula(t: Rows, s: Rows, weights: Weights | None, value: bool) -> Tensor | None:
        ratio = _log_ratio(t, s)
        mixed = _log_mixture(ratio, 1.0 - alpha)
        over_q = ratio.clamp_min_(0.0).add_(mixed).neg_()  # log(q/m)
        result = None
        if value:
            product = torch.mul(over_q, s.exp, out=t.exp)
            result = product.sum(-1, keepdim=True).div_(s.sum).clamp_min_(0.0)
        if weights is not None:
            share = torch.exp(over_q, out=mixed)  # q/m
            _through_softmax(over_q.sub_(share, alpha=alpha), s, weights, t.exp)
        return result

    return formula


def tvd(t: Rows, s: Rows, weights: Weights | None, value: bool) -> Tensor | None:
    """Total variation distance: half the sum of |p - q|. Overwrites the teacher's rows."""
    gap = _probability_gap(t, s)
    result = None
    if value:
        result = torch.abs(gap, out=t.logits).sum(-1, keepdim=True).mul_(0.5)
    if weights is not None:
        _through_softmax(gap.sign_().mul_(0.5), s, weights, t.logits)
    return result


def probability_mse(t: Rows, s: Rows, weights: Weights | None, value: bool) -> Tensor | None:
    """Squared error of the probabilities, summed over the row. Overwrites the teacher's rows."""
    gap = _probability_gap(t, s)
    result = None
    if value:
        result = torch.mul(gap, gap, out=t.logits).sum(-1, keepdim=True)
    if weights is not None:
        _through_softmax(gap.mul_(2.0), s, weights, t.logits)
    return result


def logit_mse(t: Rows, s: Rows, weights: Weights | None, value: bool) -> Tensor | None:
    """Squared error of the logits themselves, summed over the row (TinyBERT, up to the mean).

    Takes rows from `visible_logits`, not from `exponentials`. Overwrites the student's logits.
    """
    gap = s.logits.sub_(t.logits)
    result = None
    if value:
        result = torch.mul(gap, gap, out=t.exp).sum(-1, keepdim=True)
    if weights is not None:
        assert weights.student is None, "without a softmax there is no q to weigh"
        torch.mul(gap, weights.divergence * 2.0, out=s.exp)
    return result


def _log_ratio(t: Rows, s: Rows) -> Tensor:
    """log p - log q, in the place of the teacher's logits."""
    return t.logits.sub_(s.logits).sub_(t.sum.log() - s.sum.log())


def _log_mixture(ratio: Tensor, share: float) -> Tensor:
    """u with log(m/q) = max(r, 0) + u and log(m/p) = max(-r, 0) + u, for m = share p + (1-share) q.

    u = log1p(c expm1(-|r|)), where r is `ratio` and c the share of the smaller of p and q: no
    overflow at any r, full precision near r = 0. Source: ours.
    """
    mixed = ratio.abs().neg_().expm1_()
    of_smaller = (ratio > 0).to(ratio.dtype).mul_(1.0 - 2.0 * share).add_(share)
    return mixed.mul_(of_smaller).log1p_()


def _probability_gap(t: Rows, s: Rows) -> Tensor:
    """q - p, in the place of the student's logits; the teacher's exponentials are lost."""
    return torch.div(s.exp, s.sum, out=s.logits).sub_(t.exp.div_(t.sum))


def _through_softmax(of_q: Tensor, s: Rows, weights: Weights, free: Tensor) -> None:
    """The gradient q [f - E_q(f)] of anything whose derivative by q is f = `of_q`, into `s.exp`.

    `of_q` and `free`, a tensor of its shape, are overwritten.
    """
    mean = torch.mul(of_q, s.exp, out=free).sum(-1, keepdim=True).div_(s.sum)
    scale = weights.divergence / s.sum
    shift = mean.mul_(scale).neg_()
    if weights.student is not None:
        shift.add_(weights.student / s.sum)
    s.exp.mul_(of_q.mul_(scale).add_(shift))


# each takes beta (of the mixture in jsd) and alpha (of the skewed ones), inside their ranges
DIVERGENCES: dict[str, Callable[[float, float], Formula]] = {
    "forward_kl": lambda beta, alpha: forward_kl,
    "reverse_kl": lambda beta, alpha: reverse_kl,
    "jsd": lambda beta, alpha: jsd(beta),
    "skew_forward_kl": lambda beta, alpha: skew_forward_kl(alpha),
    "skew_reverse_kl": lambda beta, alpha: skew_reverse_kl(alpha),
    "tvd": lambda beta, alpha: tvd,
    "probability_mse": lambda beta, alpha: probability_mse,
    "logit_mse": lambda beta, alpha: logit_mse,
}


def checked_divergence(
    name: str, known: Iterable[str], beta: float = 0.5, alpha: float = 0.1
) -> str:
    """The divergence that `name` is: at the ends of beta and alpha a mixture is a plain KL.

    ValueError unless `name` is `known`, `beta` lies in [0, 1] and `alpha` in [0, 1).
    """
    if name not in known:
        raise ValueError(f"divergence={name!r} is not known; choose one of: {', '.join(known)}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta} is outside [0, 1]; 0 is the forward KL, 1 the reverse KL")
    if not 0.0 <= alpha < 1.0:
        raise ValueError(
            f"alpha={alpha} is outside [0, 1); 0 is the plain KL, at 1 nothing is left"
        )
    if name == "jsd" and beta in (0.0, 1.0):
        return "reverse_kl" if beta else "forward_kl"
    if name.startswith("skew_") and alpha == 0.0:
        return name.removeprefix("skew_")
    return name
