"""The Triton kernels compile without a GPU, within their recorded registers."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


RECORDED = json.loads((CHECKOUT / "benchmarks/results/registers.json").read_text())["triton"]


def test_a_budget_of_another_triton_is_refused(tmp_path: Path) -> None:
    """Registers depend on the compiler: a comparison would mean nothing."""
    script = (
        "import compiled, pathlib; compiled.BUDGET = pathlib.Path('other.json'); compiled.main()"
    )
    (tmp_path / "other.json").write_text('{"triton": "0.1"}')
    paths = os.pathsep.join(str(CHECKOUT / name) for name in ("benchmarks", "kernels"))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "triton 0.1" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.metadata.version("triton") != RECORDED,
    reason=f"the budget is of triton {RECORDED}",
)
def test_the_main_configurations_keep_their_budget() -> None:
    """Forward KL in bf16 at head size 128; `make check` compiles all the others as well."""
    command = [sys.executable, "benchmarks/compiled.py", "--only", "forward_kl 128 bfloat16"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dk forward_kl 128 bfloat16 padded" in done.stdout
