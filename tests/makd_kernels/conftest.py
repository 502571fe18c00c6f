"""Triton without a GPU: its interpreter, with a bf16 matmul that multiplies numbers, not bits."""

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()


@pytest.fixture(scope="session")
def device() -> str:
    """Where the Triton kernels run: the GPU, or the interpreter on the CPU."""
    if not ON_GPU:
        _multiply_bf16_as_numbers()
    return "cuda" if ON_GPU else "cpu"


def _multiply_bf16_as_numbers() -> None:
    """The interpreter keeps bf16 as its bits in uint16, and its dot multiplies those."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot
    if getattr(original, "multiplies_numbers", False):
        return

    def as_float(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return original(self, as_float(a), as_float(b), d, input_precision, max_num_imprecise_acc)

    create_dot.multiplies_numbers = True
    interpreter.InterpreterBuilder.create_dot = create_dot
