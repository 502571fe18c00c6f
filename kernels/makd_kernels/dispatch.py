"""The one place where the word given as `impl` becomes an implementation. Nothing falls back."""

import importlib.util
import os
from collections.abc import Sequence

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def choose(impl: str, implementations: Sequence[str], device: str) -> str:
    """The name behind `impl` for tensors on a device of type `device` ("cpu", "cuda", ...).

    "auto" takes "triton" where it is among the implementations and can run, and "torch" otherwise.
    ValueError names the known ones; RuntimeError says why "triton" cannot run.
    """
    if impl == "auto":
        if device == "cpu" or "triton" not in implementations:
            return "torch"
        return "torch" if why_not_triton(device) else "triton"
    if impl not in implementations:
        known = ", ".join(["auto", *implementations])
        raise ValueError(f"impl={impl!r} is not known; choose one of: {known}")
    if impl == "triton":
        reason = why_not_triton(device)
        if reason is not None:
            raise RuntimeError(f"impl='triton' cannot run: {reason}; impl='torch' runs anywhere")
    return impl


def why_not_triton(device: str) -> str | None:
    """Why Triton's kernels cannot run on this type of device, or None where they can."""
    if not TRITON_INSTALLED:
        return "the package triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device!r}, and Triton compiles for GPUs ('cuda')"
    return None
