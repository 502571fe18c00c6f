"""linear_divergence against all logits at once, torch.compile of that, and Liger, in one run.

    python benchmarks/linear_divergence.py [--device cuda]

Everything computes the sum of cross-entropy and divergence, and full mode its gradient to hidden
states and head. Eager is the op's reference: both logits in full, softmax in fp32, differentiated
by autograd. "ours" makes its gradient in the forward; "ours, rows" gives one value per token and
makes the logits again in the backward. "Liger, chunked" is LigerFusedLinearJSDLoss (torch, compiled
by default, softmax in the inputs' precision), "Liger, Triton" its two kernels, fused linear
cross-entropy and fused linear JSD.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cases import LINEAR_CPU, LINEAR_GPU, LinearCase
from makd_kernels.linear_divergence import (
    linear_cross_entropy_divergence,
    linear_cross_entropy_divergence_loss,
)
from measure import Rows, checked, command, measured, modes, say

CHECKED_TOKENS = 128
LIGER_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
# student's hidden states and head, labels, teacher's hidden states and head -> the loss
Provider = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def providers(device: str, divergence: str, chunk_bytes: int | None = None) -> dict[str, Provider]:
    """The ways to compute the loss that run on this device."""

    def plain(impl: str, function: Callable = _loss) -> Provider:
        return functools.partial(function, divergence, impl, chunk_bytes)

    found = {
        "eager": plain("reference"),
        "torch.compile": torch.compile(plain("reference"), dynamic=False),
    }
    if divergence in LIGER_BETA and importlib.util.find_spec("liger_kernel") is not None:
        found["Liger, chunked"] = _liger_chunked(LIGER_BETA[divergence])
        if device == "cuda":
            found["Liger, Triton"] = functools.partial(_liger_triton, LIGER_BETA[divergence])
    found |= {"ours, blockwise": plain("torch"), "ours, blockwise, rows": plain("torch", _rows)}
    if device == "cuda":
        found |= {"ours, Triton": plain("triton"), "ours, Triton, rows": plain("triton", _rows)}
    return found


def _loss(divergence: str, impl: str, chunk_bytes: int | None, *given: Tensor) -> Tensor:
    return linear_cross_entropy_divergence_loss(
        *given, divergence=divergence, impl=impl, chunk_bytes=chunk_bytes
    ).loss


def _rows(divergence: str, impl: str, chunk_bytes: int | None, *given: Tensor) -> Tensor:
    cross_entropy_N, divergence_N = linear_cross_entropy_divergence(
        *given, divergence=divergence, impl=impl, chunk_bytes=chunk_bytes
    )
    assert divergence_N is not None, "there is a teacher"
    return cross_entropy_N.sum() + divergence_N.sum()


def _liger_chunked(beta: float) -> Provider:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    mean = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=beta)

    def provider(x: Tensor, head: Tensor, labels: Tensor, *teacher: Tensor) -> Tensor:
        value: Tensor = mean(x, head, *teacher, labels) * labels.shape[0]
        return value

    return provider


def _liger_triton(
    beta: float, x: Tensor, head: Tensor, labels: Tensor, x_teacher: Tensor, head_teacher: Tensor
) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    cross_entropy = LigerFusedLinearCrossEntropyLoss(reduction="sum")(head, x, labels)
    divergence = LigerFusedLinearJSD(jsd_beta=beta)(x, head, x_teacher, head_teacher, labels)
    value: Tensor = cross_entropy + divergence * labels.shape[0]
    return value


def tensors(case: LinearCase, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Student hidden and head, labels, teacher hidden and head; logits of standard deviation 2."""
    generator = torch.Generator().manual_seed(0)

    def side(size: int) -> list[Tensor]:
        hidden = torch.randn(case.tokens, size, generator=generator)
        head = torch.randn(case.vocab, size, generator=generator) * (2.0 / size**0.5)
        return [hidden.to(device, dtype), head.to(device, dtype)]

    student, teacher = side(case.student_size), side(case.teacher_size)
    labels = torch.randint(0, case.vocab, (case.tokens,), generator=generator).to(device)
    return [*student, labels, *teacher]


def call(given: list[Tensor], provider: Provider, mode: str) -> Callable[[], list[Tensor]]:
    """What is measured: the loss (forward), or the loss and the student's gradients (full)."""
    hidden_given, head_given, *fixed = given

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [provider(*given)]

    def full() -> list[Tensor]:
        hidden, head = (t.detach().requires_grad_() for t in (hidden_given, head_given))
        value = provider(hidden, head, *fixed)
        return [value.detach(), *torch.autograd.grad(value, (hidden, head))]

    return {"forward": forward, "full": full}[mode]


def _errors(case: LinearCase, dtype: torch.dtype, device: str, divergence: str) -> dict[str, float]:
    """Error of each provider against float64 at the first tokens of the case, in three chunks."""
    given = tensors(case._replace(tokens=min(case.tokens, CHECKED_TOKENS)), dtype, device)
    exact = [t.double() if t.is_floating_point() else t for t in given]
    chunk_bytes = given[0].shape[0] * case.vocab * 2 * dtype.itemsize // 3
    found = providers(device, divergence, chunk_bytes)
    truth = call(exact, found["eager"], "full")()
    calls = {name: call(given, provider, "full") for name, provider in found.items()}
    return checked("linear_divergence", calls, truth, "eager", dtype)


def run(device: str, repeats: int) -> Iterator[Rows]:
    """Measure every case."""
    if importlib.util.find_spec("liger_kernel") is None:
        say("linear_divergence: liger-kernel is not installed, so its rows are missing")
    for case in LINEAR_CPU if device == "cpu" else LINEAR_GPU:
        for dtype in (torch.bfloat16, torch.float32):
            for divergence in case.divergences:
                say(f"linear_divergence: {case.name} {dtype} {divergence}")
                yield _case(case, dtype, divergence, device, repeats)


def _case(case: LinearCase, dtype: torch.dtype, divergence: str, device: str, repeats: int) -> Rows:
    torch.compiler.reset()  # past a limit of recompilations it would run eager, in silence
    errors = _errors(case, dtype, device, divergence)
    given = tensors(case, dtype, device)
    student = 2 * case.tokens * case.vocab * case.student_size
    teacher = 2 * case.tokens * case.vocab * case.teacher_size
    size = sum(t.numel() * t.element_size() for t in given)
    rows: Rows = []
    for mode in modes(dtype, device):
        torch.compiler.reset()
        found = providers(device, divergence)
        calls = {name: call(given, found[name], mode) for name in errors}
        rows += measured(
            "linear_divergence", f"{case.name}, {divergence}", case.shape, dtype, mode, calls,
            errors, given, flops=teacher + student * (1 if mode == "forward" else 3),
            traffic=size * (1 if mode == "forward" else 1.5), device=device, repeats=repeats,
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    command(__doc__, "linear_divergence", run, repeats=3)
