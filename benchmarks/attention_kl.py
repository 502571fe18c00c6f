"""attention_kl against eager maps, torch.compile, FlexAttention's identity and LinearARD's sweeps.

    python benchmarks/attention_kl.py [--device cuda]

Eager holds both maps with softmax in fp32; "half softmax" keeps them in the inputs' precision, as
many training scripts do. The identity (kernels of the flash kind give KL through two extra values:
scale_t q_t.O_1 - scale_s q_s.O_2 - L_t + L_s) runs on a GPU only: FlexAttention's CPU kernel
returns no log-sum-exp. "given" is ours where attention's own log-sum-exps are at hand, which are
made outside of the measurement.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cases import ATTENTION_CPU, ATTENTION_GPU, AttentionCase
from linear_ard import LinearARD
from makd_kernels.attention_kl import attention_kl
from measure import Rows, checked, command, measured, modes, say

Provider = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def providers(given: list[Tensor], divergence: str) -> dict[str, Provider]:
    """The ways to compute the divergence that run where the tensors are."""
    on_gpu, dtype = given[0].device.type == "cuda", given[0].dtype

    def ours(impl: str, options: dict[str, Any] | None = None) -> Provider:
        options = {"divergence": divergence, "impl": impl} | (options or {})
        return functools.partial(attention_kl, **options)

    lse = {
        f"log_sum_exp_{side}_BHT": _log_sum_exp(*pair)
        for side, pair in (("teacher", given[:2]), ("student", given[2:]))
    }
    found = {"eager": ours("reference")}
    if dtype != torch.float32:
        found["eager, half softmax"] = functools.partial(_half_softmax, divergence)
    found["torch.compile"] = torch.compile(ours("reference"), dynamic=False)
    if divergence == "forward_kl":
        if on_gpu:
            found["FlexAttention identity"] = _flex_identity
        found["LinearARD's algorithm"] = LinearARD.apply
    found["ours, blockwise"] = ours("torch")
    found["ours, blockwise, given"] = ours("torch", lse)
    if on_gpu:
        found["ours, Triton"] = ours("triton")
        found["ours, Triton, given"] = ours("triton", lse)
    return found


@torch.no_grad()
def _log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    """(B, H, T), a head at a time, so that nothing large is left behind."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu_(1)
    heads = [
        (q[:, h] @ k[:, h].mT).to(torch.promote_types(q.dtype, torch.float32))
        .mul_(q.shape[-1] ** -0.5).masked_fill_(hidden, -torch.inf).logsumexp(-1)
        for h in range(q.shape[1])
    ]  # fmt: skip
    return torch.stack(heads, 1)


def _half_softmax(divergence: str, q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
    """Both maps with softmax in the inputs' own precision."""
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


def _flex_identity(q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
    """KL(teacher || student) from attention calls with keys as values; differentiable."""
    scale = q_t.shape[-1] ** -0.5
    blocks = _causal_blocks(q_t.shape[2], q_t.device.type)
    both, lse_t = _flex()(q_t, k_t, torch.cat([k_t, k_s], -1), blocks)
    expected_t, expected_s = both.chunk(2, -1)
    _, lse_s = _flex()(q_s, k_s, k_s.detach(), blocks)
    of_t = (q_t.float() * expected_t.float()).sum(-1)
    of_s = (q_s.float() * expected_s.float()).sum(-1)
    values: Tensor = scale * (of_t - of_s) - lse_t + lse_s
    return values


@functools.cache
def _flex() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(plain_flex, dynamic=False)


def plain_flex(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> tuple[Tensor, Tensor]:
    """(attention's output, its log-sum-exps)"""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    aux = AuxRequest(lse=True)
    out, found = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True, return_aux=aux)
    assert found.lse is not None, "it was asked for"
    return out, found.lse


@functools.cache
def _causal_blocks(tokens: int, device: str) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(causal, None, None, tokens, tokens, device=device)


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


def run(device: str, repeats: int) -> Iterator[Rows]:
    """Measure every case."""
    for case in ATTENTION_CPU if device == "cpu" else ATTENTION_GPU:
        for dtype in (torch.bfloat16, torch.float32):
            for divergence in ("forward_kl", "reverse_kl"):
                if divergence == "reverse_kl" and case.name != "demo step" and device == "cpu":
                    continue
                for mode in modes(dtype, device):
                    say(f"attention_kl: {case.name} {dtype} {divergence} {mode}")
                    yield _case(case, dtype, divergence, mode, device, repeats)


def _case(
    case: AttentionCase, dtype: torch.dtype, divergence: str, mode: str, device: str, repeats: int
) -> Rows:
    torch.compiler.reset()  # past a limit of recompilations it would run eager, in silence
    small = tensors(
        case._replace(batch=1, heads=case.heads // case.groups, groups=1), dtype, device
    )
    exact = functools.partial(attention_kl, divergence=divergence, impl="reference")
    truth = call([t.double() for t in small], exact, mode)()
    found = {n: call(small, p, mode) for n, p in providers(small, divergence).items()}
    errors = checked("attention_kl", found, truth, "eager", dtype)
    torch.compiler.reset()
    given = tensors(case, dtype, device)
    found = {n: call(given, p, mode) for n, p in providers(given, divergence).items()}
    calls = {name: found[name] for name in errors}
    # One product under a causal mask. Forward and backward are worth eight: both scores, once more
    # both scores (nothing T x T may be kept between), and dq and dk of each.
    half = 2 * case.batch * case.heads * (case.tokens**2 / 2) * case.size
    size = sum(t.numel() * t.element_size() for t in given)
    return measured(
        "attention_kl", f"{case.name}, {divergence}", case.shape, dtype, mode, calls, errors, given,
        flops=half * (2 if mode == "forward" else 8),
        traffic=size * (1 if mode == "forward" else 2.5),
        device=device, repeats=repeats,
    )  # fmt: skip


if __name__ == "__main__":
    command(__doc__, "attention_kl", run, repeats=7)
