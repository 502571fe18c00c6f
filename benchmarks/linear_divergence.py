"""linear_divergence against all logits at once: first the result, then time and memory, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.linear_divergence [--device cuda]

Eager is the op's reference: both logits in full, softmax in fp32, differentiated by autograd.
"loss" is the weighted sum whose gradient is made in the forward; "rows" gives one value per token
and makes the logits again in the backward. Both compute cross-entropy and divergence.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import LINEAR_ACCELERATOR, LINEAR_CPU, LinearCase
from benchmarks.measure import check, milliseconds, peak_megabytes, publish, relative_error
from makd_kernels.linear_divergence import (
    linear_cross_entropy_divergence,
    linear_cross_entropy_divergence_loss,
)

CHECKED_TOKENS = 128
PROVIDERS = {
    "eager": ("reference", "loss"),
    "ours": ("torch", "loss"),
    "ours, rows": ("torch", "rows"),
}


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


def errors(case: LinearCase, dtype: torch.dtype, device: str, options: dict) -> dict:
    """Error of each provider against float64 at the first tokens of the case, in three chunks."""
    given = tensors(case._replace(tokens=min(case.tokens, CHECKED_TOKENS)), dtype, device)
    exact = [t.double() if t.is_floating_point() else t for t in given]
    truth = call(exact, PROVIDERS["eager"], options, "full")()
    options = options | {"chunk_bytes": given[0].shape[0] * case.vocab * 2 * dtype.itemsize // 3}
    return {
        name: relative_error(call(given, how, options, "full")(), truth)
        for name, how in PROVIDERS.items()
    }


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = arguments.device
    cases = LINEAR_CPU if device == "cpu" else LINEAR_ACCELERATOR
    rows: list[dict[str, object]] = []
    for case in cases:
        for dtype in (torch.bfloat16, torch.float32):
            for divergence in case.divergences:
                options = {"divergence": divergence}
                error = errors(case, dtype, device, options)
                for name in ("ours", "ours, rows"):
                    check("linear_divergence", error[name], error["eager"], dtype)
                given = tensors(case, dtype, device)
                for mode in ("forward", "full"):
                    calls = {n: call(given, how, options, mode) for n, how in PROVIDERS.items()}
                    times = milliseconds(calls, device, arguments.repeats)
                    for name, (low, median, high) in times.items():
                        peak = peak_megabytes(calls[name], device)
                        rows.append(
                            {
                                "case": case.name,
                                "N,V,D,E": ",".join(map(str, case[1:5])),
                                "dtype": str(dtype).removeprefix("torch."),
                                "divergence": divergence,
                                "mode": mode,
                                "provider": name,
                                "ms_20": f"{low:.0f}",
                                "ms_50": f"{median:.0f}",
                                "ms_80": f"{high:.0f}",
                                "peak_MB": "" if peak is None else f"{peak:.0f}",
                                "error_fp64": f"{error[name]:.1e}",
                            }
                        )
                        publish("linear_divergence", device, rows)


if __name__ == "__main__":
    main()
