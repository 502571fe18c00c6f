"""The Triton kernels compile for Hopper without a GPU, within their recorded registers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_main_configurations_keep_their_budget() -> None:
    """Forward KL in bf16 at every head size; `make check` compiles all the others as well."""
    command = [sys.executable, "benchmarks/compiled.py", "--only", "forward_kl 128 bfloat16"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dk forward_kl 128 bfloat16 padded" in done.stdout
