"""A row of logits in Triton: cross-entropy, divergence, and the gradient in the logits' own place.

One program reduces one token's logits of both sides, and where a gradient is wanted walks them once
more and overwrites the student's logits with it. The KLs read a row twice (their value falls out of
the pass that finds the log-sum-exps, through the centred accumulator of `attention_kl`), the others
three times. Arithmetic is fp32. As in `attention_kl`, a row's maximum and the logarithm of its sum
stay two numbers, and the maximum is subtracted before anything is exponentiated.
"""

# V vocabulary; t and s are log p and log q of teacher and student

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
HIDDEN = tl.constexpr(-1e30)

# the divergence inside the kernels
NONE = tl.constexpr(-1)
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)
TVD = tl.constexpr(5)


@triton.jit
def _logits(row, columns, inside, outside):
    """Logits in fp32, and `outside` (which a narrower dtype may not hold) beyond the vocabulary."""
    return tl.where(inside, tl.load(row + columns, mask=inside, other=0.0).to(tl.float32), outside)


@triton.jit
def _exp(x):
    """e^x by the hardware's 2^x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _log(x):
    """ln x by the hardware's log2."""
    return LN_2 * tl.log2(x)


@triton.jit
def _log_mixture(log_ratio, share):
    """log(m/q) less max(log_ratio, 0), for m = share p + (1 - share) q."""
    of_smaller = tl.where(log_ratio > 0, 1.0 - share, share)
    return _log(1.0 + of_smaller * (_exp(-tl.abs(log_ratio)) - 1.0))


@triton.jit
def _parts(t, s, beta, alpha, DIVERGENCE: tl.constexpr):
    """A word's share in the value, and f, for a gradient q [f - E_q(f)]."""
    p = _exp(t)
    q = _exp(s)
    ratio = t - s
    if DIVERGENCE == JSD:
        mixed = _log_mixture(ratio, beta)
        q_over_m = -(tl.maximum(ratio, 0.0) + mixed)
        p_over_m = -(tl.maximum(-ratio, 0.0) + mixed)
        return beta * p * p_over_m + (1.0 - beta) * q * q_over_m, (1.0 - beta) * q_over_m
    if DIVERGENCE == SKEW_FORWARD_KL:
        p_over_m = -(tl.maximum(-ratio, 0.0) + _log_mixture(ratio, alpha))
        return p * p_over_m, (alpha - 1.0) * _exp(p_over_m)
    if DIVERGENCE == SKEW_REVERSE_KL:
        q_over_m = -(tl.maximum(ratio, 0.0) + _log_mixture(ratio, 1.0 - alpha))
        return q * q_over_m, q_over_m - alpha * _exp(q_over_m)
    gap = q - p
    return 0.5 * tl.abs(gap), tl.where(gap > 0, 0.5, tl.where(gap < 0, -0.5, 0.0))


@triton.jit
def _rows_kernel(
    student, teacher, labels, weight_ce, weight_div, cross_entropy, divergence,
    stride_s, stride_t, vocab, temperature, beta, alpha,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, HEATED: tl.constexpr, GRADIENT: tl.constexpr,
    TILE_V: tl.constexpr,
):  # fmt: skip
    """One row. `student` becomes its gradient, `weight_ce` dCE/ds + `weight_div` dD/ds.

    HEATED: the temperature is not 1, so that the cross-entropy's softmax is not the divergence's.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    columns = tl.arange(0, TILE_V)
    heat = 1.0 / temperature

    # first pass: maxima, sums of exponentials, and for a KL its centred accumulator
    m_t = HIDDEN
    m_s = HIDDEN
    l_t = 0.0
    l_s = 0.0
    l_plain = 0.0
    a = 0.0
    for start in range(0, vocab, TILE_V):
        inside = start + columns < vocab
        s = _logits(student, start + columns, inside, HIDDEN) * heat
        m_s_new = tl.maximum(m_s, tl.max(s, 0))
        s -= m_s_new
        exp_s = tl.where(inside, _exp(s), 0.0)
        shrink_s = _exp(m_s - m_s_new)
        if LABELS and HEATED:
            exp_plain = tl.where(inside, _exp(s * temperature), 0.0)
            l_plain = l_plain * _exp((m_s - m_s_new) * temperature) + tl.sum(exp_plain, 0)
        if DIVERGENCE != NONE:
            t = _logits(teacher, start + columns, inside, HIDDEN) * heat
            m_t_new = tl.maximum(m_t, tl.max(t, 0))
            t -= m_t_new
            exp_t = tl.where(inside, _exp(t), 0.0)
            shrink_t = _exp(m_t - m_t_new)
            moved = (m_t - m_t_new) - (m_s - m_s_new)
            if DIVERGENCE == FORWARD_KL:
                a = shrink_t * (a + l_t * moved) + tl.sum(exp_t * (t - s), 0)
            if DIVERGENCE == REVERSE_KL:
                a = shrink_s * (a - l_s * moved) + tl.sum(exp_s * (s - t), 0)
            l_t = shrink_t * l_t + tl.sum(exp_t, 0)
            m_t = m_t_new
        l_s = shrink_s * l_s + tl.sum(exp_s, 0)
        m_s = m_s_new
    log_s = _log(l_s)
    m_plain = m_s
    log_plain = log_s
    if LABELS and HEATED:
        m_plain = m_s * temperature
        log_plain = _log(l_plain)

    g_ce = 0.0
    label = -1
    if LABELS:
        label = tl.load(labels + row)
        counted = label >= 0
        logit = tl.load(student + tl.where(counted, label, 0)).to(tl.float32)
        tl.store(cross_entropy + row, tl.where(counted, log_plain - (logit - m_plain), 0.0))
        if GRADIENT:
            g_ce = tl.where(counted, tl.load(weight_ce + row), 0.0)

    mean_f = 0.0
    g_div = 0.0
    log_t = 0.0
    if DIVERGENCE != NONE:
        log_t = _log(l_t)
        value = 0.0
        if DIVERGENCE == FORWARD_KL:
            value = a / l_t - log_t + log_s
        elif DIVERGENCE == REVERSE_KL:
            value = a / l_s - log_s + log_t
            mean_f = value
        else:
            for start in range(0, vocab, TILE_V):
                inside = start + columns < vocab
                s = _logits(student, start + columns, inside, 0.0) * heat
                t = _logits(teacher, start + columns, inside, 0.0) * heat
                t = t - m_t - log_t
                s = s - m_s - log_s
                one, f = _parts(t, s, beta, alpha, DIVERGENCE)
                value += tl.sum(tl.where(inside, one, 0.0), 0)
                mean_f += tl.sum(tl.where(inside, _exp(s) * f, 0.0), 0)
        value = tl.where(value < 0.0, 0.0, value)  # tl.maximum would turn NaN into 0
        tl.store(divergence + row, value * temperature * temperature)
        if GRADIENT:
            g_div = tl.load(weight_div + row) * temperature

    if GRADIENT:
        for start in range(0, vocab, TILE_V):
            inside = start + columns < vocab
            logits = _logits(student, start + columns, inside, 0.0)
            s = logits * heat - m_s - log_s
            q = _exp(s)
            gradient = tl.zeros([TILE_V], tl.float32)
            if LABELS:
                q_plain = _exp(logits - m_plain - log_plain) if HEATED else q
                gradient = g_ce * (q_plain - tl.where(start + columns == label, 1.0, 0.0))
            if DIVERGENCE != NONE:
                t = _logits(teacher, start + columns, inside, 0.0) * heat
                t = t - m_t - log_t
                if DIVERGENCE == FORWARD_KL:
                    gradient += g_div * (q - _exp(t))
                elif DIVERGENCE == REVERSE_KL:
                    gradient += g_div * q * ((s - t) - mean_f)
                else:
                    _, f = _parts(t, s, beta, alpha, DIVERGENCE)
                    gradient += g_div * q * (f - mean_f)
            tl.store(student + start + columns, gradient.to(student.dtype.element_ty), mask=inside)
