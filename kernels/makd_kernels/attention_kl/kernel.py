"""Attention divergence in Triton: one program per tile of queries or of keys, nothing T x T.

Every kernel walks tiles of scores and makes them again from queries and keys:

* `_kl_kernel`: one pass, in which the maxima, the sums and the *centred* mean of the gap between
  the two sides' scores are updated together (ours; flash attention keeps the first two). Its
  log-sum-exps are all that the backward needs.
* `_values_kernel`: any divergence where both log-sum-exps are known, from `_kl_kernel` or because
  attention gave them.
* `_dq_kernel`: one program per tile of queries, over the teacher heads paired with its head; where
  the log-sum-exps were given, the forward KL's values come out of the same sweep.
* `_dk_kernel`: one program per tile of keys, over the query heads that share it and their pairs.

No atomics: every sum has one owner and one order, so two runs give equal bits. Tiles above the
diagonal, and those that have left a window, are never visited. Scores, exponentials and sums are
fp32; the gradient of the scores is rounded to the inputs' dtype for its matmul, as eager does.
A row's log-sum-exp is kept as two numbers, the maximum and the logarithm of the sum, and scores
stay in nats until the maximum is subtracted: one number, or bits, would be rounded once more at the
size of the scores, which eager attention is not.
"""

# B batch, H student heads, P pairs of heads, T tokens, D head size; in the kernels M the queries
# and N the keys of a tile, "first" and "second" the sides of a KL, t and s teacher and student

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
HIDDEN = tl.constexpr(-1e30)

# the divergence inside the kernels
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
PROBABILITY_MSE = tl.constexpr(3)
LOGIT_MSE = tl.constexpr(4)


@triton.jit
def _tile(pointer, rows, stride_row, stride_d, tokens, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """`rows` of a (T, D) matrix as (rows, PADDED), zero outside."""
    columns = tl.arange(0, PADDED)
    inside = (rows < tokens)[:, None]
    if SIZE != PADDED:
        inside = inside & (columns < SIZE)[None, :]
    return tl.load(
        pointer + rows[:, None] * stride_row + columns[None, :] * stride_d, mask=inside, other=0.0
    )


@triton.jit
def _scores(a, b, scale):
    """a @ b^T times `scale` in fp32; fp32 inputs are multiplied as fp32, not as tf32."""
    return tl.dot(a, tl.trans(b), input_precision="ieee") * scale


@triton.jit
def _exp(x):
    """e^x by the hardware's 2^x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _log(x):
    """ln x by the hardware's log2."""
    return LN_2 * tl.log2(x)


@triton.jit
def _not_negative(x):
    """x, or 0 where rounding made it negative; NaN stays, which tl.maximum would turn into 0."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _seen(
    rows, keys, real_keys, tokens, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr
):
    """Does this query see this key; `rows` and `keys` are shaped to broadcast."""
    seen = (keys < tokens) & (rows < tokens)
    if CAUSAL:
        seen = seen & (rows >= keys)
    if WINDOW:
        seen = seen & (rows - keys < WINDOW)
    if MASKED:
        seen = seen & (tl.load(real_keys + keys, mask=keys < tokens, other=0) != 0)
    return seen


@triton.jit
def _key_range(
    row, tokens, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """(first, full, end): keys that a tile of queries sees; every query sees all of first..full."""
    first = 0
    end = tokens
    full = tokens // TILE_N * TILE_N
    if CAUSAL:
        end = tl.minimum(row + TILE_M, tokens)
        full = row // TILE_N * TILE_N
    if WINDOW:
        first = tl.maximum(row - WINDOW + 1, 0) // TILE_N * TILE_N
    if WINDOW or MASKED:
        full = first
    return first, full, end


@triton.jit
def _statistics(statistics, size, at, inside, DIVERGENCE: tl.constexpr):
    """(maximum, log-sum) of teacher and student and the row statistic, 0 where there is none."""
    zeros = tl.zeros(at.shape, tl.float32)
    max_t, log_t, max_s, log_s, row = zeros, zeros, zeros, zeros, zeros
    if DIVERGENCE != LOGIT_MSE:
        max_t = tl.load(statistics + at, mask=inside, other=0.0)
        log_t = tl.load(statistics + size + at, mask=inside, other=0.0)
        max_s = tl.load(statistics + 2 * size + at, mask=inside, other=0.0)
        log_s = tl.load(statistics + 3 * size + at, mask=inside, other=0.0)
        if DIVERGENCE != FORWARD_KL:
            row = tl.load(statistics + 4 * size + at, mask=inside, other=0.0)
    return max_t, log_t, max_s, log_s, row


@triton.jit
def _mixture(log_ratio, beta):
    """(log(m/q), log(m/p)) for m = beta p + (1-beta) q and `log_ratio` = log(p/q)."""
    of_smaller = tl.where(log_ratio > 0, 1.0 - beta, beta)
    mixed = _log(1.0 + of_smaller * (_exp(-tl.abs(log_ratio)) - 1.0))
    return tl.maximum(log_ratio, 0.0) + mixed, tl.maximum(-log_ratio, 0.0) + mixed


@triton.jit
def _value(t, s, beta, DIVERGENCE: tl.constexpr):
    """A key's share in (the value, the row statistic of the gradient), from log p and log q."""
    if DIVERGENCE == LOGIT_MSE:
        value = (s - t) * (s - t)
        return value, value
    if DIVERGENCE == FORWARD_KL:
        value = _exp(t) * (t - s)
        return value, value
    if DIVERGENCE == REVERSE_KL:
        value = _exp(s) * (s - t)
        return value, value
    p, q = _exp(t), _exp(s)
    if DIVERGENCE == JSD:
        over_q, over_p = _mixture(t - s, beta)
        row = -q * over_q
        return (1.0 - beta) * row - beta * p * over_p, row
    return (q - p) * (q - p), 2.0 * q * (q - p)


@triton.jit
def _score_gradient(t, s, gradient, row, beta, DIVERGENCE: tl.constexpr):
    """`gradient` times dD/ds, 0 for a HIDDEN key, from log p and log q.

    For LOGIT_MSE t and s are the scores themselves.
    """
    if DIVERGENCE == LOGIT_MSE:
        return 2.0 * gradient * (s - t)
    p, q = _exp(t), _exp(s)
    if DIVERGENCE == FORWARD_KL:
        return gradient * (q - p)
    if DIVERGENCE == REVERSE_KL:
        return gradient * q * ((s - t) - row)
    if DIVERGENCE == JSD:
        over_q, _ = _mixture(t - s, beta)
        return gradient * (beta - 1.0) * q * (over_q + row)
    return gradient * q * (2.0 * (q - p) - row)


@triton.jit
def _kl_kernel(
    q_1, k_1, q_2, k_2, real_keys, head_1_P, head_2_P, values, statistics,
    stride_q1b, stride_q1h, stride_q1t, stride_q1d, stride_k1b, stride_k1h, stride_k1t, stride_k1d,
    stride_q2b, stride_q2h, stride_q2t, stride_q2d, stride_k2b, stride_k2h, stride_k2t, stride_k2d,
    tokens, pairs, size, scale_1, scale_2,
    GROUP_1: tl.constexpr, GROUP_2: tl.constexpr,
    SIZE_1: tl.constexpr, SIZE_2: tl.constexpr, PADDED_1: tl.constexpr, PADDED_2: tl.constexpr,
    TEACHER_FIRST: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """KL(first || second), maxima and log-sums of both, for one tile of one pair's queries.

    With a = sum_j e^(u_j - m) [(u_j - m) - (v_j - n)], u and v the scores and m and n their running
    maxima, KL = a / l_1 - ln l_1 + ln l_2: the large common part of both scores never meets a
    rounding. Moving the maxima by (dm, dn) turns a into e^dm (a + l_1 (dm - dn)).
    """
    tiles = tl.cdiv(tokens, TILE_M)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest first
    batch = (tl.program_id(0) // tiles // pairs).to(tl.int64)
    pair = tl.program_id(0) // tiles % pairs
    head_1 = tl.load(head_1_P + pair).to(tl.int64)
    head_2 = tl.load(head_2_P + pair).to(tl.int64)
    q_1 += batch * stride_q1b + head_1 * stride_q1h
    q_2 += batch * stride_q2b + head_2 * stride_q2h
    k_1 += batch * stride_k1b + head_1 // GROUP_1 * stride_k1h
    k_2 += batch * stride_k2b + head_2 // GROUP_2 * stride_k2h
    real_keys += batch * tokens
    rows = tile * TILE_M + tl.arange(0, TILE_M)
    query_1 = _tile(q_1, rows, stride_q1t, stride_q1d, tokens, SIZE_1, PADDED_1)
    query_2 = _tile(q_2, rows, stride_q2t, stride_q2d, tokens, SIZE_2, PADDED_2)

    m = tl.full([TILE_M], HIDDEN, tl.float32)
    n = tl.full([TILE_M], HIDDEN, tl.float32)
    l_1 = tl.zeros([TILE_M], tl.float32)
    l_2 = tl.zeros([TILE_M], tl.float32)
    a = tl.zeros([TILE_M], tl.float32)
    first, full, end = _key_range(tile * TILE_M, tokens, CAUSAL, WINDOW, MASKED, TILE_M, TILE_N)
    for checked in tl.static_range(2):
        for start in range(full if checked else first, end if checked else full, TILE_N):
            keys = start + tl.arange(0, TILE_N)
            key_1 = _tile(k_1, keys, stride_k1t, stride_k1d, tokens, SIZE_1, PADDED_1)
            key_2 = _tile(k_2, keys, stride_k2t, stride_k2d, tokens, SIZE_2, PADDED_2)
            u = _scores(query_1, key_1, scale_1)
            v = _scores(query_2, key_2, scale_2)
            if checked:
                seen = _seen(
                    rows[:, None], keys[None, :], real_keys, tokens, CAUSAL, WINDOW, MASKED
                )
                u = tl.where(seen, u, HIDDEN)
                v = tl.where(seen, v, HIDDEN)
            m_new = tl.maximum(m, tl.max(u, 1))
            n_new = tl.maximum(n, tl.max(v, 1))
            u -= m_new[:, None]
            v -= n_new[:, None]
            exp_u = _exp(u)
            shrink = _exp(m - m_new)
            a = shrink * (a + l_1 * ((m - m_new) - (n - n_new))) + tl.sum(exp_u * (u - v), 1)
            l_1 = shrink * l_1 + tl.sum(exp_u, 1)
            l_2 = _exp(n - n_new) * l_2 + tl.sum(_exp(v), 1)
            m = m_new
            n = n_new

    ln_1 = _log(l_1)
    ln_2 = _log(l_2)
    kl = _not_negative(a / l_1 - ln_1 + ln_2)
    if MASKED:
        kl = tl.where(tl.load(real_keys + rows, mask=rows < tokens, other=0) != 0, kl, 0.0)
    at = (batch * pairs + pair) * tokens + rows
    tl.store(values + at, kl, mask=rows < tokens)
    first_at = 0 if TEACHER_FIRST else 2
    tl.store(statistics + first_at * size + at, m, mask=rows < tokens)
    tl.store(statistics + (first_at + 1) * size + at, ln_1, mask=rows < tokens)
    tl.store(statistics + (2 - first_at) * size + at, n, mask=rows < tokens)
    tl.store(statistics + (3 - first_at) * size + at, ln_2, mask=rows < tokens)
    if not TEACHER_FIRST:
        tl.store(statistics + 4 * size + at, kl, mask=rows < tokens)


@triton.jit
def _values_kernel(
    q_t, k_t, q_s, k_s, real_keys, head_t_P, head_s_P, values, statistics,
    stride_qtb, stride_qth, stride_qtt, stride_qtd, stride_ktb, stride_kth, stride_ktt, stride_ktd,
    stride_qsb, stride_qsh, stride_qst, stride_qsd, stride_ksb, stride_ksh, stride_kst, stride_ksd,
    tokens, pairs, size, scale_t, scale_s, beta,
    GROUP_T: tl.constexpr, GROUP_S: tl.constexpr,
    SIZE_T: tl.constexpr, SIZE_S: tl.constexpr, PADDED_T: tl.constexpr, PADDED_S: tl.constexpr,
    DIVERGENCE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Value and row statistic of one tile of one pair's queries, from both log-sum-exps."""
    tiles = tl.cdiv(tokens, TILE_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // pairs).to(tl.int64)
    pair = tl.program_id(0) // tiles % pairs
    head_t = tl.load(head_t_P + pair).to(tl.int64)
    head_s = tl.load(head_s_P + pair).to(tl.int64)
    q_t += batch * stride_qtb + head_t * stride_qth
    q_s += batch * stride_qsb + head_s * stride_qsh
    k_t += batch * stride_ktb + head_t // GROUP_T * stride_kth
    k_s += batch * stride_ksb + head_s // GROUP_S * stride_ksh
    real_keys += batch * tokens
    rows = tile * TILE_M + tl.arange(0, TILE_M)
    query_t = _tile(q_t, rows, stride_qtt, stride_qtd, tokens, SIZE_T, PADDED_T)
    query_s = _tile(q_s, rows, stride_qst, stride_qsd, tokens, SIZE_S, PADDED_S)
    at = (batch * pairs + pair) * tokens + rows
    # what this kernel fills in is not read
    max_t, log_t, max_s, log_s, _ = _statistics(
        statistics, size, at, rows < tokens, FORWARD_KL if DIVERGENCE != LOGIT_MSE else LOGIT_MSE
    )

    value = tl.zeros([TILE_M], tl.float32)
    row = tl.zeros([TILE_M], tl.float32)
    first, full, end = _key_range(tile * TILE_M, tokens, CAUSAL, WINDOW, MASKED, TILE_M, TILE_N)
    for checked in tl.static_range(2):
        for start in range(full if checked else first, end if checked else full, TILE_N):
            keys = start + tl.arange(0, TILE_N)
            key_t = _tile(k_t, keys, stride_ktt, stride_ktd, tokens, SIZE_T, PADDED_T)
            key_s = _tile(k_s, keys, stride_kst, stride_ksd, tokens, SIZE_S, PADDED_S)
            t = _scores(query_t, key_t, scale_t) - max_t[:, None] - log_t[:, None]
            s = _scores(query_s, key_s, scale_s) - max_s[:, None] - log_s[:, None]
            if checked:
                seen = _seen(
                    rows[:, None], keys[None, :], real_keys, tokens, CAUSAL, WINDOW, MASKED
                )
                t = tl.where(seen, t, HIDDEN)
                s = tl.where(seen, s, HIDDEN)
            one_value, one_row = _value(t, s, beta, DIVERGENCE)
            value += tl.sum(one_value, 1)
            row += tl.sum(one_row, 1)

    value = _not_negative(value)
    if MASKED:
        value = tl.where(tl.load(real_keys + rows, mask=rows < tokens, other=0) != 0, value, 0.0)
    tl.store(values + at, value, mask=rows < tokens)
    if DIVERGENCE != LOGIT_MSE and DIVERGENCE != FORWARD_KL:
        tl.store(statistics + 4 * size + at, row, mask=rows < tokens)


@triton.jit
def _dq_kernel(
    q_t, k_t, q_s, k_s, real_keys, head_t_P, first_pair_H, statistics, gradient, values, dq,
    stride_qtb, stride_qth, stride_qtt, stride_qtd, stride_ktb, stride_kth, stride_ktt, stride_ktd,
    stride_qsb, stride_qsh, stride_qst, stride_qsd, stride_ksb, stride_ksh, stride_kst, stride_ksd,
    tokens, heads, pairs, size, scale_t, scale_s, beta,
    GROUP_T: tl.constexpr, GROUP_S: tl.constexpr,
    SIZE_T: tl.constexpr, SIZE_S: tl.constexpr, PADDED_T: tl.constexpr, PADDED_S: tl.constexpr,
    DIVERGENCE: tl.constexpr, VALUES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of one student head's queries, over all its pairs.

    With VALUES also the values themselves, and the gradient of their plain sum over pairs: a
    query's own gradient is a factor on its row, to be multiplied in when it is known.
    """
    tiles = tl.cdiv(tokens, TILE_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head_s = (tl.program_id(0) // tiles % heads).to(tl.int64)
    q_t += batch * stride_qtb
    k_t += batch * stride_ktb
    q_s += batch * stride_qsb + head_s * stride_qsh
    k_s += batch * stride_ksb + head_s // GROUP_S * stride_ksh
    real_keys += batch * tokens
    rows = tile * TILE_M + tl.arange(0, TILE_M)
    query_s = _tile(q_s, rows, stride_qst, stride_qsd, tokens, SIZE_S, PADDED_S)

    total = tl.zeros([TILE_M, PADDED_S], tl.float32)
    first, full, end = _key_range(tile * TILE_M, tokens, CAUSAL, WINDOW, MASKED, TILE_M, TILE_N)
    for pair in range(tl.load(first_pair_H + head_s), tl.load(first_pair_H + head_s + 1)):
        head_t = tl.load(head_t_P + pair).to(tl.int64)
        query_t = _tile(
            q_t + head_t * stride_qth, rows, stride_qtt, stride_qtd, tokens, SIZE_T, PADDED_T
        )
        k_of_head = k_t + head_t // GROUP_T * stride_kth
        at = (batch * pairs + pair) * tokens + rows
        g = tl.full([TILE_M, 1], 1.0, tl.float32)
        if not VALUES:
            g = tl.load(gradient + at, mask=rows < tokens, other=0.0)[:, None]
        value = tl.zeros([TILE_M], tl.float32)
        max_t, log_t, max_s, log_s, row = _statistics(
            statistics, size, at, rows < tokens, DIVERGENCE
        )
        for checked in tl.static_range(2):
            for start in range(full if checked else first, end if checked else full, TILE_N):
                keys = start + tl.arange(0, TILE_N)
                key_t = _tile(k_of_head, keys, stride_ktt, stride_ktd, tokens, SIZE_T, PADDED_T)
                key_s = _tile(k_s, keys, stride_kst, stride_ksd, tokens, SIZE_S, PADDED_S)
                t = _scores(query_t, key_t, scale_t) - max_t[:, None] - log_t[:, None]
                s = _scores(query_s, key_s, scale_s) - max_s[:, None] - log_s[:, None]
                if checked:
                    seen = _seen(
                        rows[:, None], keys[None, :], real_keys, tokens, CAUSAL, WINDOW, MASKED
                    )
                    t = tl.where(seen, t, HIDDEN)
                    s = tl.where(seen, s, HIDDEN)
                if VALUES:
                    value += tl.sum(_value(t, s, beta, DIVERGENCE)[0], 1)
                ds = _score_gradient(t, s, g, row[:, None], beta, DIVERGENCE)
                total += tl.dot(ds.to(key_s.dtype), key_s, input_precision="ieee")
        if VALUES:
            tl.store(values + at, _not_negative(value), mask=rows < tokens)

    columns = tl.arange(0, PADDED_S)
    at = ((batch * heads + head_s) * tokens + rows)[:, None] * SIZE_S + columns[None, :]
    inside = (rows < tokens)[:, None] & (columns < SIZE_S)[None, :]
    tl.store(dq + at, (total * scale_s).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _dk_kernel(
    q_t, k_t, q_s, k_s, real_keys, head_t_P, head_s_P, first_pair_H, statistics,
    gradient, dk,
    stride_qtb, stride_qth, stride_qtt, stride_qtd, stride_ktb, stride_kth, stride_ktt, stride_ktd,
    stride_qsb, stride_qsh, stride_qst, stride_qsd, stride_ksb, stride_ksh, stride_kst, stride_ksd,
    tokens, key_heads, pairs, size, scale_t, scale_s, beta,
    GROUP_T: tl.constexpr, GROUP_S: tl.constexpr,
    SIZE_T: tl.constexpr, SIZE_S: tl.constexpr, PADDED_T: tl.constexpr, PADDED_S: tl.constexpr,
    DIVERGENCE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of one student key head, over the queries of all that share it.

    Scores are made transposed, (keys, queries), so that their gradient is the left factor of its
    matmul as it stands. One masked loop: two would not fit the registers.
    """
    tiles = tl.cdiv(tokens, TILE_N)
    tile = tl.program_id(0) % tiles  # under a causal mask the first keys have the most queries
    batch = (tl.program_id(0) // tiles // key_heads).to(tl.int64)
    key_head = (tl.program_id(0) // tiles % key_heads).to(tl.int64)
    q_t += batch * stride_qtb
    k_t += batch * stride_ktb
    q_s += batch * stride_qsb
    k_s += batch * stride_ksb + key_head * stride_ksh
    real_keys += batch * tokens
    keys = tile * TILE_N + tl.arange(0, TILE_N)
    key_s = _tile(k_s, keys, stride_kst, stride_ksd, tokens, SIZE_S, PADDED_S)

    total = tl.zeros([TILE_N, PADDED_S], tl.float32)
    first = 0
    end = tokens
    if CAUSAL:
        first = tile * TILE_N // TILE_M * TILE_M
    if WINDOW:
        end = tl.minimum(tile * TILE_N + TILE_N - 1 + WINDOW, tokens)
    first_pair = tl.load(first_pair_H + key_head * GROUP_S)
    for pair in range(first_pair, tl.load(first_pair_H + (key_head + 1) * GROUP_S)):
        head_t = tl.load(head_t_P + pair).to(tl.int64)
        q_t_head = q_t + head_t * stride_qth
        q_s_head = q_s + tl.load(head_s_P + pair).to(tl.int64) * stride_qsh
        key_t = _tile(
            k_t + head_t // GROUP_T * stride_kth, keys, stride_ktt, stride_ktd, tokens, SIZE_T,
            PADDED_T,
        )  # fmt: skip
        for start in range(first, end, TILE_M):
            rows = start + tl.arange(0, TILE_M)
            at = (batch * pairs + pair) * tokens + rows
            g = tl.load(gradient + at, mask=rows < tokens, other=0.0)[None, :]
            max_t, log_t, max_s, log_s, row = _statistics(
                statistics, size, at, rows < tokens, DIVERGENCE
            )
            query_t = _tile(q_t_head, rows, stride_qtt, stride_qtd, tokens, SIZE_T, PADDED_T)
            query_s = _tile(q_s_head, rows, stride_qst, stride_qsd, tokens, SIZE_S, PADDED_S)
            t = _scores(key_t, query_t, scale_t) - max_t[None, :] - log_t[None, :]
            s = _scores(key_s, query_s, scale_s) - max_s[None, :] - log_s[None, :]
            seen = _seen(rows[None, :], keys[:, None], real_keys, tokens, CAUSAL, WINDOW, MASKED)
            t = tl.where(seen, t, HIDDEN)
            s = tl.where(seen, s, HIDDEN)
            ds = _score_gradient(t, s, g, row[None, :], beta, DIVERGENCE)
            total += tl.dot(ds.to(query_s.dtype), query_s, input_precision="ieee")

    columns = tl.arange(0, PADDED_S)
    at = ((batch * key_heads + key_head) * tokens + keys)[:, None] * SIZE_S + columns[None, :]
    inside = (keys < tokens)[:, None] & (columns < SIZE_S)[None, :]
    tl.store(dk + at, (total * scale_s).to(dk.dtype.element_ty), mask=inside)
