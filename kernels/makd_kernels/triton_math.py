"""What the Triton kernels share: exponentials, logarithms, and the mixture of two distributions."""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
HIDDEN = tl.constexpr(-1e30)  # finite: the difference of two hidden scores is 0, never NaN


@triton.jit
def exp(x):
    """e^x by the hardware's 2^x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def log(x):
    """ln x by the hardware's log2."""
    return LN_2 * tl.log2(x)


@triton.jit
def log_mixture(log_ratio, share):
    """(log(m/q), log(m/p)) for m = share p + (1 - share) q and `log_ratio` = log(p/q)."""
    of_smaller = tl.where(log_ratio > 0, 1.0 - share, share)
    mixed = log(1.0 + of_smaller * (exp(-tl.abs(log_ratio)) - 1.0))
    return tl.maximum(log_ratio, 0.0) + mixed, tl.maximum(-log_ratio, 0.0) + mixed
