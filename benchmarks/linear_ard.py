"""LinearARD's algorithm (arXiv 2604.00004), written by us: what `attention_kl` is measured against.

Log-sum-exps of both sides in two sweeps, the values in a third, the student's gradients in a
fourth, over all tiles also where a causal mask hides them. On a GPU the sweeps are Triton kernels
and the gradients are added up by fp32 atomics, so that their last bits change from run to run; on a
CPU they are torch, a tile of queries at a time. Forward KL, causal, both sides of one shape.
"""

# B batch, H heads, G key heads, T tokens, D head size

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_CPU = 256
LOG2_E = tl.constexpr(1.4426950408889634)


class LinearARD(torch.autograd.Function):
    """(B, H, T) KL(teacher || student) of queries (B, H, T, D) and keys (B, G, T, D)."""

    @staticmethod
    def forward(ctx: Any, q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
        if q_t.device.type == "cpu" and not INTERPRETED:
            ctx.save_for_backward(q_t, k_t, q_s, k_s)
            return _values_on_cpu(q_t, k_t, q_s, k_s)
        lse_t, lse_s = _log_sum_exp(q_t, k_t), _log_sum_exp(q_s, k_s)
        values = torch.empty_like(lse_t)
        grid, sizes = _grid(q_t, k_t)
        _value_kernel[grid](q_t, k_t, q_s, k_s, lse_t, lse_s, values, *sizes, **_tiles(q_t))
        ctx.save_for_backward(q_t, k_t, q_s, k_s, lse_t, lse_s)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_t, k_t, q_s, k_s, *lse = ctx.saved_tensors
        if not lse:
            return (None, None, *_gradients_on_cpu(q_t, k_t, q_s, k_s, grad))
        dq, dk = (torch.zeros_like(t, dtype=torch.float32) for t in (q_s, k_s))
        grid, sizes = _grid(q_t, k_t)
        _gradient_kernel[grid](
            q_t, k_t, q_s, k_s, *lse, grad.contiguous(), dq, dk, *sizes, **_tiles(q_t)
        )
        return None, None, dq.to(q_s.dtype), dk.to(k_s.dtype)


INTERPRETED = bool(triton.knobs.runtime.interpret)


def _tiles(q: Tensor) -> dict[str, int]:
    """Of one program; fp32 needs smaller ones."""
    if INTERPRETED:
        return {"TILE_M": 16, "TILE_N": 16}
    if q.dtype == torch.float32:
        return {"TILE_M": 32, "TILE_N": 32, "num_warps": 4, "num_stages": 1}
    return {"TILE_M": 64, "TILE_N": 64, "num_warps": 8, "num_stages": 2}


def _grid(q: Tensor, k: Tensor) -> tuple[tuple[int, int], tuple[int | float, ...]]:
    batch, heads, tokens, size = q.shape
    tile = _tiles(q)["TILE_M"]
    grid = (triton.cdiv(tokens, tile), batch * heads)
    return grid, (heads // k.shape[1], tokens, size**-0.5, size)


def _log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    grid, sizes = _grid(q, k)
    _lse_kernel[grid](q, k, lse, *sizes, **_tiles(q))
    return lse


@triton.jit
def _tile(pointer, head, rows, tokens, SIZE: tl.constexpr):
    """Rows of one head of a contiguous (B, H, T, D) tensor, zero outside."""
    at = (head.to(tl.int64) * tokens + rows)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return tl.load(pointer + at, mask=(rows < tokens)[:, None], other=0.0)


@triton.jit
def _scores(q, k, rows, keys, tokens, scale):
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = (rows[:, None] >= keys[None, :]) & (keys < tokens)[None, :]
    return tl.where(seen, scores, -1e30)


@triton.jit
def _lse_kernel(
    q, k, lse, group, tokens, scale, SIZE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    query = _tile(q, head, rows, tokens, SIZE)
    maximum = tl.full([TILE_M], -1e30, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    for start in range(0, tokens, TILE_N):
        keys = start + tl.arange(0, TILE_N)
        key = _tile(k, head // group, keys, tokens, SIZE)
        scores = _scores(query, key, rows, keys, tokens, scale)
        higher = tl.maximum(maximum, tl.max(scores, 1))
        exps = tl.exp2((scores - higher[:, None]) * LOG2_E)
        total = total * tl.exp2((maximum - higher) * LOG2_E) + tl.sum(exps, 1)
        maximum = higher
    tl.store(lse + head * tokens + rows, maximum + tl.log2(total) / LOG2_E, mask=rows < tokens)


@triton.jit
def _value_kernel(
    q_t, k_t, q_s, k_s, lse_t, lse_s, values, group, tokens, scale, SIZE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    at = head * tokens + rows
    query_t = _tile(q_t, head, rows, tokens, SIZE)
    query_s = _tile(q_s, head, rows, tokens, SIZE)
    l_t = tl.load(lse_t + at, mask=rows < tokens, other=0.0)[:, None]
    l_s = tl.load(lse_s + at, mask=rows < tokens, other=0.0)[:, None]
    value = tl.zeros([TILE_M], tl.float32)
    for start in range(0, tokens, TILE_N):
        keys = start + tl.arange(0, TILE_N)
        key_t = _tile(k_t, head // group, keys, tokens, SIZE)
        key_s = _tile(k_s, head // group, keys, tokens, SIZE)
        log_p = _scores(query_t, key_t, rows, keys, tokens, scale) - l_t
        log_q = _scores(query_s, key_s, rows, keys, tokens, scale) - l_s
        value += tl.sum(tl.exp2(log_p * LOG2_E) * (log_p - log_q), 1)
    tl.store(values + at, value, mask=rows < tokens)


@triton.jit
def _gradient_kernel(
    q_t, k_t, q_s, k_s, lse_t, lse_s, gradient, dq, dk, group, tokens, scale, SIZE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    inside = rows < tokens
    columns = tl.arange(0, SIZE)
    at = head * tokens + rows
    query_t = _tile(q_t, head, rows, tokens, SIZE)
    query_s = _tile(q_s, head, rows, tokens, SIZE)
    l_t = tl.load(lse_t + at, mask=inside, other=0.0)[:, None]
    l_s = tl.load(lse_s + at, mask=inside, other=0.0)[:, None]
    g = tl.load(gradient + at, mask=inside, other=0.0)[:, None] * scale
    rows_at = (head.to(tl.int64) * tokens + rows)[:, None] * SIZE + columns[None, :]
    for start in range(0, tokens, TILE_N):
        keys = start + tl.arange(0, TILE_N)
        key_head = head // group
        key_t = _tile(k_t, key_head, keys, tokens, SIZE)
        key_s = _tile(k_s, key_head, keys, tokens, SIZE)
        p = tl.exp2((_scores(query_t, key_t, rows, keys, tokens, scale) - l_t) * LOG2_E)
        q = tl.exp2((_scores(query_s, key_s, rows, keys, tokens, scale) - l_s) * LOG2_E)
        ds = (g * (q - p)).to(key_s.dtype)
        keys_at = (key_head.to(tl.int64) * tokens + keys)[:, None] * SIZE + columns[None, :]
        dq_tile = tl.dot(ds, key_s, input_precision="ieee")
        dk_tile = tl.dot(tl.trans(ds), query_s, input_precision="ieee")
        tl.atomic_add(dq + rows_at, dq_tile, mask=inside[:, None])
        tl.atomic_add(dk + keys_at, dk_tile, mask=(keys < tokens)[:, None])


def _values_on_cpu(q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
    values = []
    for start in range(0, q_t.shape[2], TILE_CPU):
        log_p, log_q = _tile_logs(q_t, k_t, start), _tile_logs(q_s, k_s, start)
        values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(values, -1)


def _gradients_on_cpu(
    q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    group, scale = q_s.shape[1] // k_s.shape[1], q_s.shape[-1] ** -0.5
    dq = torch.empty_like(q_s)
    dk = torch.zeros_like(k_s, dtype=torch.float32)
    for start in range(0, q_t.shape[2], TILE_CPU):
        rows = slice(start, start + TILE_CPU)
        log_p, log_q = _tile_logs(q_t, k_t, start), _tile_logs(q_s, k_s, start)
        ds = (log_q.exp() - log_p.exp()).mul_(grad[..., rows, None] * scale).to(q_s.dtype)
        dq[:, :, rows] = ds @ k_s.repeat_interleave(group, dim=1)
        dk += (ds.mT @ q_s[:, :, rows]).unflatten(1, (-1, group)).float().sum(2)
    return dq, dk.to(k_s.dtype)


def _tile_logs(q: Tensor, k: Tensor, start: int) -> Tensor:
    """ln of the attention of one tile of queries over all keys, in fp32."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q[:, :, start : start + TILE_CPU] @ k.mT).float() * q.shape[-1] ** -0.5
    rows = torch.arange(start, start + scores.shape[2], device=q.device)
    hidden = rows[:, None] < torch.arange(q.shape[2], device=q.device)
    logs: Tensor = scores.masked_fill_(hidden, -1e30).log_softmax(-1)
    return logs
