"""Truncated decompositions: optimal, exact at full rank, honest about their residual."""

import pytest
import torch

from makd_llm.factorize.decompose import svd, whitened, whitening_root
from makd_llm.factorize.ranks import uniform_rank


def correlated_inputs(tokens: int = 400, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -3, width, dtype=torch.float64)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) * scales @ mix


@pytest.fixture(params=[16, 40], ids=["wide", "tall"])
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    """A matrix with fewer rows than its 24 columns, and one with more: two ways of computing."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(request.param, 24, generator=generator, dtype=torch.float64)


def test_full_rank_gives_the_matrix_back(weight: torch.Tensor) -> None:
    x = correlated_inputs()
    full = min(weight.shape)
    for factors in (svd(weight, full), whitened(weight, x.T @ x, full)):
        torch.testing.assert_close(factors.up_MR @ factors.down_RK, weight, rtol=1e-6, atol=1e-6)
        assert factors.residual == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_residuals_are_what_they_say(weight: torch.Tensor, rank: int) -> None:
    x = correlated_inputs()
    plain, white = svd(weight, rank), whitened(weight, x.T @ x, rank)
    error = torch.linalg.norm(weight - plain.up_MR @ plain.down_RK) / torch.linalg.norm(weight)
    assert plain.residual == pytest.approx(float(error), rel=1e-6)
    outputs = x @ weight.T
    error = torch.linalg.norm(outputs - x @ (white.up_MR @ white.down_RK).T) / torch.linalg.norm(
        outputs
    )
    assert white.residual == pytest.approx(float(error), rel=1e-6)


def test_whitening_is_better_on_the_outputs_and_svd_on_the_weights(weight: torch.Tensor) -> None:
    x = correlated_inputs()
    plain, white = svd(weight, 5), whitened(weight, x.T @ x, 5)

    def errors(product: torch.Tensor) -> tuple[float, float]:
        off = weight - product
        return float(torch.linalg.norm(x @ off.T)), float(torch.linalg.norm(off))

    on_outputs, on_weights = zip(
        errors(plain.up_MR @ plain.down_RK), errors(white.up_MR @ white.down_RK), strict=True
    )
    assert on_outputs[1] < 0.7 * on_outputs[0]
    assert on_weights[0] < on_weights[1]


def test_a_singular_covariance_is_raised_and_stays_usable(weight: torch.Tensor) -> None:
    few = correlated_inputs(tokens=6)
    factors = whitened(weight, few.T @ few, 6)
    error = torch.linalg.norm(few @ (weight - factors.up_MR @ factors.down_RK).T)
    assert error < 1e-3 * torch.linalg.norm(few @ weight.T)


def test_factors_equal_those_of_an_svd(weight: torch.Tensor) -> None:
    x = correlated_inputs()
    root = torch.linalg.cholesky(x.T @ x)
    u, sigma, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    exact = (u[:, :5] * sigma[:5]) @ vt[:5] @ torch.linalg.inv(root)
    factors = whitened(weight, x.T @ x, 5)
    torch.testing.assert_close(factors.up_MR @ factors.down_RK, exact, rtol=1e-6, atol=1e-6)


def test_components_are_balanced_whatever_the_scale_of_the_inputs(weight: torch.Tensor) -> None:
    x = 1000 * correlated_inputs()
    for factors in (svd(weight, 5), whitened(weight, x.T @ x, 5)):
        norms = factors.up_MR.norm(dim=0), factors.down_RK.norm(dim=1)
        torch.testing.assert_close(*norms)


def test_a_matrix_of_zeros_is_no_reason_to_fail() -> None:
    factors = whitened(torch.zeros(4, 6), torch.eye(6, dtype=torch.float64), 2)
    assert torch.equal(factors.up_MR @ factors.down_RK, torch.zeros(4, 6, dtype=torch.float64))


def test_the_root_is_a_root_and_nan_is_refused() -> None:
    x = correlated_inputs()
    covariance = x.T @ x
    root = whitening_root(covariance)
    torch.testing.assert_close(root @ root.T, covariance, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="not finite"):
        whitened(torch.ones(3, 3), torch.full((3, 3), float("nan"), dtype=torch.float64), 1)


@pytest.mark.parametrize(
    ("rows", "columns", "keep"), [(576, 1536, 0.5), (192, 576, 0.3), (8, 8, 1.0), (2, 2, 0.01)]
)
def test_ranks_keep_within_the_budget(rows: int, columns: int, keep: float) -> None:
    rank = uniform_rank(rows, columns, keep)
    assert rank >= 1
    if rank > 1:
        assert rank * (rows + columns) <= keep * rows * columns < (rank + 1) * (rows + columns)


def test_a_keep_ratio_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep_ratio is 1.2"):
        uniform_rank(4, 4, 1.2)
