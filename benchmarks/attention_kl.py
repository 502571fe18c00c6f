"""attention_kl against eager maps, torch.compile, FlexAttention's identity and LinearARD's sweeps.

    OMP_NUM_THREADS=1 python -m benchmarks.attention_kl [--device cuda]

Eager holds both maps with softmax in fp32. The identity (kernels of the flash kind give KL through
two extra values: scale_t q_t.O_1 - scale_s q_s.O_2 - L_t + L_s) runs forward only, on a GPU.
LinearARD's algorithm (arXiv 2604.00004; our writing of it in torch) makes both log-sum-exps, then
the values, then the gradients, over all tiles also where a causal mask hides them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import ATTENTION_CPU, ATTENTION_GPU, AttentionCase
from benchmarks.measure import Rows, check, command, measured, relative_error, say
from makd_kernels.attention_kl import attention_kl

Provider = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TILE = 256


def providers(device: str, divergence: str, dtype: torch.dtype, mode: str) -> dict[str, Provider]:
    """The ways to compute the divergence that run on this device in this mode."""

    def ours(impl: str) -> Provider:
        return functools.partial(attention_kl, divergence=divergence, impl=impl)

    found = {"eager": ours("reference"), "ours, blockwise": ours("torch")}
    if dtype != torch.float32:
        found["eager, half softmax"] = functools.partial(_half_softmax, divergence)
    found["torch.compile"] = torch.compile(ours("reference"), dynamic=False)
    if divergence == "forward_kl":
        if mode == "forward" and device == "cuda":  # its CPU kernel returns no log-sum-exp
            found["FlexAttention identity"] = _flex_identity
        found["LinearARD's algorithm"] = _LinearARD.apply
    if device == "cuda":
        found["ours, Triton"] = ours("triton")
    return found


def _half_softmax(divergence: str, q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
    """Both maps with softmax in the inputs' own precision: what many training scripts do."""
    tokens = q_t.shape[2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q_t.device).triu_(1)

    def log_attention(q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, torch.finfo(q.dtype).min)
        logs: Tensor = scores.log_softmax(-1)
        return logs

    log_p, log_q = log_attention(q_t, k_t), log_attention(q_s, k_s)
    if divergence == "reverse_kl":
        log_p, log_q = log_q, log_p
    values: Tensor = (log_p.exp() * (log_p - log_q)).masked_fill(hidden, 0.0).sum(-1)
    return values


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _causal_blocks(tokens: int, device: str) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(causal, None, None, tokens, tokens, device=device)


def _flex_identity(q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
    """KL(teacher || student) from two attention calls with keys as values."""
    size = q_t.shape[-1]
    scale = size**-0.5
    blocks = _causal_blocks(q_t.shape[2], q_t.device.type)
    flex = functools.partial(_compiled_flex(), block_mask=blocks, return_lse=True, enable_gqa=True)
    expected_t, lse_t = flex(q_t, k_t, k_t)
    expected_s, _ = flex(q_t, k_t, k_s)
    _, lse_s = flex(q_s, k_s, k_s)
    of_t = (q_t.float() * expected_t.float()).sum(-1)
    of_s = (q_s.float() * expected_s.float()).sum(-1)
    values: Tensor = scale * (of_t - of_s) - lse_t + lse_s
    return values


class _LinearARD(torch.autograd.Function):
    """Log-sum-exps, values and gradients in sweeps over tiles of queries and all keys."""

    @staticmethod
    def forward(ctx: Any, q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
        ctx.save_for_backward(q_t, k_t, q_s, k_s)
        values = []
        for rows in range(0, q_t.shape[2], TILE):
            log_p, log_q = _tile_logs(q_t, k_t, q_s, k_s, rows)
            values.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.cat(values, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_t, k_t, q_s, k_s = ctx.saved_tensors
        group, scale = q_s.shape[1] // k_s.shape[1], q_s.shape[-1] ** -0.5
        dq = torch.empty_like(q_s)
        dk = torch.zeros_like(k_s, dtype=torch.float32)
        for start in range(0, q_t.shape[2], TILE):
            rows = slice(start, start + TILE)
            log_p, log_q = _tile_logs(q_t, k_t, q_s, k_s, start)
            ds = (log_q.exp() - log_p.exp()).mul_(grad[..., rows, None] * scale).to(q_s.dtype)
            dq[:, :, rows] = ds @ k_s.repeat_interleave(group, dim=1)
            dk += (ds.mT @ q_s[:, :, rows]).unflatten(1, (-1, group)).float().sum(2)
        return None, None, dq, dk.to(k_s.dtype)


def _tile_logs(q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor, start: int) -> Sequence[Tensor]:
    tokens = q_t.shape[2]
    rows = torch.arange(start, min(start + TILE, tokens), device=q_t.device)
    hidden = rows[:, None] < torch.arange(tokens, device=q_t.device)

    def logs(q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q[:, :, start : start + TILE] @ k.mT).float() * q.shape[-1] ** -0.5
        found: Tensor = scores.masked_fill_(hidden, -1e30).log_softmax(-1)
        return found

    return logs(q_t, k_t), logs(q_s, k_s)


def tensors(case: AttentionCase, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Queries and keys of teacher and student, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.tokens, case.size)
    shapes = [shape, (shape[0], case.groups, *shape[2:])] * 2
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def call(given: list[Tensor], provider: Provider, mode: str) -> Callable[[], list[Tensor]]:
    """What is measured: the values (forward), or values and the student's gradients (full)."""
    q_teacher, k_teacher, q_student, k_student = given
    upstream = torch.linspace(0.5, 1.5, q_student.shape[2], device=q_student.device)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [provider(*given)]

    def full() -> list[Tensor]:
        q, k = q_student.detach().requires_grad_(), k_student.detach().requires_grad_()
        values = provider(q_teacher, k_teacher, q, k)
        gradients = torch.autograd.grad(values, (q, k), upstream.to(values.dtype).expand_as(values))
        return [values.detach(), *gradients]

    return {"forward": forward, "full": full}[mode]


def run(device: str, repeats: int) -> Rows:
    """Measure every case."""
    rows: Rows = []
    for case in ATTENTION_CPU if device == "cpu" else ATTENTION_GPU:
        for dtype in (torch.bfloat16, torch.float32):
            for divergence in ("forward_kl", "reverse_kl"):
                if divergence == "reverse_kl" and case.name != "demo step" and device == "cpu":
                    continue
                for mode in ("forward", "full"):
                    say(f"attention_kl: {case.name} {dtype} {divergence} {mode}")
                    rows += _case(case, dtype, divergence, mode, device, repeats)
    return rows


def _case(
    case: AttentionCase, dtype: torch.dtype, divergence: str, mode: str, device: str, repeats: int
) -> Rows:
    found = providers(device, divergence, dtype, mode)
    small = tensors(
        case._replace(batch=1, heads=case.heads // case.groups, groups=1), dtype, device
    )
    exact = functools.partial(attention_kl, divergence=divergence, impl="reference")
    truth = call([t.double() for t in small], exact, mode)()
    errors = {n: relative_error(call(small, p, mode)(), truth) for n, p in found.items()}
    for name in errors:
        if name.startswith("ours"):
            check("attention_kl", name, errors[name], errors["eager"], dtype)
    given = tensors(case, dtype, device)
    half = case.batch * case.heads * case.tokens**2 / 2 * case.size * 2
    size = sum(t.numel() for t in given) * dtype.itemsize
    return measured(
        "attention_kl", f"{case.name}, {divergence}", case.shape, dtype, mode,
        {name: call(given, provider, mode) for name, provider in found.items()}, errors,
        flops=half * (2 if mode == "forward" else 8),
        traffic=size * (1 if mode == "forward" else 2.5),
        device=device, repeats=repeats,
    )  # fmt: skip


if __name__ == "__main__":
    command(__doc__, "attention_kl", run, repeats=7)
