"""attention_kl against eager attention maps: first the result, then time and memory, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.attention_kl [--device cuda]

Eager is the op's reference: both maps in full, softmax in fp32, differentiated by autograd.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import ATTENTION_ACCELERATOR, ATTENTION_CPU, AttentionCase
from benchmarks.measure import check, milliseconds, peak_megabytes, publish, relative_error
from makd_kernels.attention_kl import attention_kl

PROVIDERS = {"eager": "reference", "ours": "torch"}


def tensors(case: AttentionCase, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Queries and keys of teacher and student, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.tokens, case.size)
    shapes = [shape, (shape[0], case.groups, *shape[2:])] * 2
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def call(given: list[Tensor], impl: str, divergence: str, mode: str) -> Callable[[], list[Tensor]]:
    """What is measured: the values (forward), or values and the student's gradients (full)."""
    q_teacher, k_teacher, q_student, k_student = given
    upstream = torch.linspace(0.5, 1.5, q_student.shape[2], device=q_student.device)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [attention_kl(*given, divergence=divergence, impl=impl)]

    def full() -> list[Tensor]:
        q, k = q_student.detach().requires_grad_(), k_student.detach().requires_grad_()
        values = attention_kl(q_teacher, k_teacher, q, k, divergence=divergence, impl=impl)
        return [values.detach(), *torch.autograd.grad(values, (q, k), upstream.expand_as(values))]

    return {"forward": forward, "full": full}[mode]


def errors(case: AttentionCase, dtype: torch.dtype, device: str, divergence: str) -> dict:
    """Error of each provider against float64 at the first sequence of the case."""
    given = tensors(case._replace(batch=1), dtype, device)
    truth = call([t.double() for t in given], "reference", divergence, "full")()
    return {
        name: relative_error(call(given, impl, divergence, "full")(), truth)
        for name, impl in PROVIDERS.items()
    }


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    device = arguments.device
    cases = ATTENTION_CPU if device == "cpu" else ATTENTION_ACCELERATOR
    rows: list[dict[str, object]] = []
    for case in cases:
        for dtype in (torch.bfloat16, torch.float32):
            for divergence in ("forward_kl", "reverse_kl"):
                error = errors(case, dtype, device, divergence)
                check("attention_kl", error["ours"], error["eager"], dtype)
                given = tensors(case, dtype, device)
                for mode in ("forward", "full"):
                    calls = {n: call(given, i, divergence, mode) for n, i in PROVIDERS.items()}
                    times = milliseconds(calls, device, arguments.repeats)
                    for name, (low, median, high) in times.items():
                        peak = peak_megabytes(calls[name], device)
                        rows.append(
                            {
                                "case": case.name,
                                "B,H,G,T,D": ",".join(map(str, case[1:])),
                                "dtype": str(dtype).removeprefix("torch."),
                                "divergence": divergence,
                                "mode": mode,
                                "provider": name,
                                "ms_20": f"{low:.1f}",
                                "ms_50": f"{median:.1f}",
                                "ms_80": f"{high:.1f}",
                                "peak_MB": "" if peak is None else f"{peak:.0f}",
                                "error_fp64": f"{error[name]:.1e}",
                            }
                        )
                        publish("attention_kl", device, rows)


if __name__ == "__main__":
    main()
