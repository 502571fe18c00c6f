"""linear_divergence against all logits at once, and torch.compile of that, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.linear_divergence [--device cuda]

Eager is the op's reference: both logits in full, softmax in fp32, differentiated by autograd.
"loss" is the weighted sum whose gradient is made in the forward; "rows" gives one value per token
and makes the logits again in the backward. Both compute cross-entropy and divergence.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import LINEAR_CPU, LINEAR_GPU, LinearCase
from benchmarks.measure import Rows, check, command, measured, relative_error, say
from makd_kernels.linear_divergence import (
    linear_cross_entropy_divergence,
    linear_cross_entropy_divergence_loss,
)

CHECKED_TOKENS = 128
EAGER = ("reference", "loss")


def providers(device: str) -> dict[str, tuple[str, str]]:
    """Implementation and output of each provider; "compiled" is the reference, compiled."""
    found = {
        "eager": EAGER,
        "torch.compile": ("compiled", "loss"),
        "ours, chunks": ("torch", "loss"),
        "ours, chunks, rows": ("torch", "rows"),
    }
    if device == "cuda":
        found |= {"ours, Triton": ("triton", "loss"), "ours, Triton, rows": ("triton", "rows")}
    return found


@functools.cache
def _compiled_reference() -> Callable:
    reference = functools.partial(linear_cross_entropy_divergence_loss, impl="reference")
    return torch.compile(reference, dynamic=False)


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


def call(given: list[Tensor], how: tuple[str, str], options: dict, mode: str) -> Callable:
    """What is measured: the loss (forward), or the loss and the student's gradients (full)."""
    impl, output = how
    hidden_given, head_given, labels, *teacher = given

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        if impl == "compiled":
            value: Tensor = _compiled_reference()(hidden, head, labels, *teacher, **options).loss
            return value
        if output == "loss":
            return linear_cross_entropy_divergence_loss(
                hidden, head, labels, *teacher, impl=impl, **options
            ).loss
        pair = linear_cross_entropy_divergence(hidden, head, labels, *teacher, impl=impl, **options)
        return sum(
            (values.sum() for values in pair if values is not None), start=hidden.new_zeros(())
        )

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [loss(hidden_given, head_given)]

    def full() -> list[Tensor]:
        hidden, head = (t.detach().requires_grad_() for t in (hidden_given, head_given))
        value = loss(hidden, head)
        return [value.detach(), *torch.autograd.grad(value, (hidden, head))]

    return {"forward": forward, "full": full}[mode]


def _errors(case: LinearCase, dtype: torch.dtype, device: str, options: dict) -> dict:
    """Error of each provider against float64 at the first tokens of the case, in three chunks."""
    given = tensors(case._replace(tokens=min(case.tokens, CHECKED_TOKENS)), dtype, device)
    exact = [t.double() if t.is_floating_point() else t for t in given]
    truth = call(exact, EAGER, options, "full")()
    options = options | {"chunk_bytes": given[0].shape[0] * case.vocab * 2 * dtype.itemsize // 3}
    return {
        name: relative_error(call(given, how, options, "full")(), truth)
        for name, how in providers(device).items()
    }


def run(device: str, repeats: int) -> Rows:
    """Measure every case."""
    rows: Rows = []
    for case in LINEAR_CPU if device == "cpu" else LINEAR_GPU:
        for dtype in (torch.bfloat16, torch.float32):
            for divergence in case.divergences:
                say(f"linear_divergence: {case.name} {dtype} {divergence}")
                rows += _case(case, dtype, divergence, device, repeats)
    return rows


def _case(case: LinearCase, dtype: torch.dtype, divergence: str, device: str, repeats: int) -> Rows:
    options = {"divergence": divergence}
    errors = _errors(case, dtype, device, options)
    for name in errors:
        if name.startswith("ours"):
            check("linear_divergence", name, errors[name], errors["eager"], dtype)
    given = tensors(case, dtype, device)
    student = 2 * case.tokens * case.vocab * case.student_size
    teacher = 2 * case.tokens * case.vocab * case.teacher_size
    size = sum(t.numel() * t.element_size() for t in given)
    rows: Rows = []
    for mode in ("forward", "full"):
        calls = {n: call(given, how, options, mode) for n, how in providers(device).items()}
        rows += measured(
            "linear_divergence", f"{case.name}, {divergence}", case.shape, dtype, mode, calls,
            errors, flops=teacher + student * (1 if mode == "forward" else 3),
            traffic=size * (1 if mode == "forward" else 1.5), device=device, repeats=repeats,
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    command(__doc__, "linear_divergence", run, repeats=3)
