"""The benchmarks' own parts: peers compute what ours computes, and no table is typed by hand."""

import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from makd_kernels import attention_kl
from makd_kernels.linear_divergence import linear_cross_entropy_divergence_loss

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """A module of the benchmarks, imported as its scripts import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def by_name(name: str) -> ModuleType:
        return importlib.import_module(name)

    return by_name


def sides(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 37, 16), (2, 2, 37, 16)] * 2
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(provider, given: list[Tensor]) -> tuple[Tensor, ...]:
    q, k = (tensor.detach().clone().requires_grad_() for tensor in given[2:])
    values = provider(given[0], given[1], q, k)
    upstream = torch.linspace(-2, 3, values.numel()).view(values.shape)
    return values.detach(), *torch.autograd.grad(values, (q, k), upstream)


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by_triton", [True, False], ids=["Triton", "torch"])
def test_linear_ard(load, monkeypatch: pytest.MonkeyPatch, by_triton: bool) -> None:
    if by_triton and torch.cuda.is_available():
        pytest.skip("where there is a GPU, Triton compiles for it and takes no CPU tensors")
    module = load("linear_ard")
    monkeypatch.setattr(module, "INTERPRETED", by_triton)
    monkeypatch.setattr(module, "TILE_CPU", 16)
    given = sides()
    assert_close(with_gradients(attention_kl, given), with_gradients(module.LinearARD.apply, given))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_flex_attention_identity(load, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the GPU suite runs it, only not compiled; FlexAttention has no backward on a CPU."""
    module = load("attention_kl")
    monkeypatch.setattr(module, "_flex", lambda: module.plain_flex)
    given = sides()
    assert_close([attention_kl(*given)], [module._flex_identity(*given)])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
def test_liger(load, divergence: str) -> None:
    module = load("linear_divergence")
    case = module.LinearCase("here", 40, 96, 16, 24)
    given = module.tensors(case, torch.float32, "cpu")
    theirs = module.providers("cpu", divergence)["Liger, chunked"](*given)
    ours = linear_cross_entropy_divergence_loss(*given, divergence=divergence).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_a_wrong_result_is_not_timed(load) -> None:
    with pytest.raises(SystemExit, match="nothing timed"):
        load("measure").check("op", "ours", error=0.1, eager=0.01, dtype=torch.bfloat16)


def test_a_wrong_gradient_is_seen_behind_right_values(load) -> None:
    right, wrong = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    error = load("measure").relative_error([right, wrong], [right, right])
    assert error != error


def test_a_rival_that_fails_is_left_out_and_ours_stops_everything(load) -> None:
    def fails() -> list[Tensor]:
        raise RuntimeError("out of something")

    measure, right = load("measure"), [torch.ones(3)]
    calls = {"eager": lambda: right, "rival": fails, "ours": lambda: right}
    assert list(measure.checked("op", calls, right, "eager", torch.float32)) == ["eager", "ours"]
    with pytest.raises(RuntimeError, match="out of something"):
        measure.checked("op", calls | {"ours": fails}, right, "eager", torch.float32)


def test_the_readme_shows_what_was_measured() -> None:
    command = [sys.executable, str(BENCHMARKS / "readme.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ratios_are_taken_turn_by_turn(load) -> None:
    measure = load("measure")
    plain = [1.0, 5.0, 1.0, 5.0] * 25  # a machine that is now fast and now slow
    slower = [1.1 * t for t in plain]
    ratio, low, high = measure.ratio_to(plain, slower, in_turns=True)
    assert low == pytest.approx(1.1) and ratio == pytest.approx(1.1) == high
    noisy = [t * (1 + 0.2 * (i * 7 % 10 - 4.5) / 10) for i, t in enumerate(slower)]
    ratio, low, high = measure.ratio_to(plain, noisy, in_turns=True)
    assert low < ratio < high and low < 1.1 < high and high - low < 0.1
    ratio, low, high = measure.ratio_to(plain, slower[:3], in_turns=False)
    assert ratio == pytest.approx(1.1 / 3) and low != low and high != high
