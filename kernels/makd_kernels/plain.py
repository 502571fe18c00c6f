"""The divergences as their papers write them, on log-probabilities, for reading and for checks.

Every entry takes (log_p, log_q, beta, alpha), p the teacher's and q the student's distribution over
the last dimension, works in any float dtype, and is differentiated by autograd. The table in
`makd_kernels.divergences` has their formulas in one place.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def forward_kl(log_p: Tensor, log_q: Tensor, beta: float = 0.0, alpha: float = 0.0) -> Tensor:
    """KL(p||q)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor, beta: float = 0.0, alpha: float = 0.0) -> Tensor:
    """KL(q||p)."""
    return forward_kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, beta: float, alpha: float = 0.0) -> Tensor:
    """beta KL(p||m) + (1-beta) KL(q||m) with m = beta p + (1-beta) q."""
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1.0 - beta) * forward_kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, beta: float, alpha: float) -> Tensor:
    """KL(p||m) with m = alpha p + (1-alpha) q."""
    return forward_kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, beta: float, alpha: float) -> Tensor:
    """KL(q||m) with m = (1-alpha) p + alpha q."""
    return forward_kl(log_q, _log_mixture(log_q, log_p, alpha))


def tvd(log_p: Tensor, log_q: Tensor, beta: float = 0.0, alpha: float = 0.0) -> Tensor:
    """Total variation distance, half the sum of |p - q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def probability_mse(log_p: Tensor, log_q: Tensor, beta: float = 0.0, alpha: float = 0.0) -> Tensor:
    """Sum of (p - q)^2."""
    return (log_p.exp() - log_q.exp()).square().sum(-1)


def _log_mixture(log_first: Tensor, log_second: Tensor, share: float) -> Tensor:
    """log of share * first + (1 - share) * second."""
    shares = log_first.new_tensor([share, 1.0 - share]).log()
    return torch.logaddexp(log_first + shares[0], log_second + shares[1])


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "probability_mse": probability_mse,
}
