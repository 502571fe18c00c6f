"""Decompositions: optimal in their own sense, exact at full rank, honest about what they lose."""

import pytest
import torch

from makd_llm.factorize.decompose import (
    Components,
    asvd,
    fisher,
    fwsvd,
    refitted,
    svd,
    whitened,
    whitening_root,
)


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


def row_weights(weight: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0.01, 4, len(weight), dtype=torch.float64)


def gradients(weight: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(90, len(weight), generator=generator, dtype=torch.float64)
    mix = torch.randn(len(weight), len(weight), generator=generator, dtype=torch.float64)
    g = g * row_weights(weight) @ mix
    return g.T @ g


def everything(weight: torch.Tensor) -> dict[str, Components]:
    x = correlated_inputs()
    covariance = x.T @ x
    return {
        "svd": svd(weight),
        "fwsvd": fwsvd(weight, row_weights(weight)),
        "asvd": asvd(weight, x.abs().mean(0)),
        "whitened": whitened(weight, covariance),
        "fisher": fisher(weight, covariance, gradients(weight), len(x)),
        "refitted": refitted(weight, covariance, covariance, covariance, ridge=0),
    }


def product(components: Components, rank: int) -> torch.Tensor:
    factors = components.first(rank)
    return factors.up_MR @ factors.down_RK


def error_in_its_own_sense(name: str, weight: torch.Tensor, approximation: torch.Tensor) -> float:
    x, off = correlated_inputs(), weight - approximation
    if name == "fwsvd":
        off = row_weights(weight).sqrt()[:, None] * off
    elif name == "asvd":
        off = off * x.abs().mean(0).sqrt()
    elif name == "fisher":
        off = torch.linalg.cholesky(gradients(weight)).T @ off @ x.T / len(x) ** 0.5
    elif name in ("whitened", "refitted"):
        off = x @ off.T
    return float(off.square().sum())


METHODS = ["svd", "fwsvd", "asvd", "whitened", "fisher", "refitted"]


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_gives_the_matrix_back(weight: torch.Tensor, method: str) -> None:
    components = everything(weight)[method]
    full = min(weight.shape)
    torch.testing.assert_close(product(components, full), weight, rtol=1e-6, atol=1e-6)
    assert components.first(full).residual == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_what_is_discarded_is_what_is_lost(weight: torch.Tensor, rank: int, method: str) -> None:
    components = everything(weight)[method]
    lost = error_in_its_own_sense(method, weight, product(components, rank))
    assert float(components.discarded[rank]) == pytest.approx(lost, rel=1e-6)
    whole = error_in_its_own_sense(method, weight, torch.zeros_like(weight))
    assert components.first(rank).residual == pytest.approx((lost / whole) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_each_is_the_best_in_its_own_sense(weight: torch.Tensor, method: str) -> None:
    errors = {
        name: error_in_its_own_sense(method, weight, product(components, 5))
        for name, components in everything(weight).items()
    }
    assert errors[method] <= min(errors.values()) * (1 + 1e-9)
    others = {"whitened", "refitted"} if method in ("whitened", "refitted") else {method}
    assert all(errors[name] > 1.001 * errors[method] for name in METHODS if name not in others)


def falling(rows: int, columns: int, power: float = 1.0) -> torch.Tensor:
    """A matrix whose n-th singular value is n to minus this power."""
    generator = torch.Generator().manual_seed(4)
    u, v = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    size = min(rows, columns)
    return u[:, :size] * (1.0 + torch.arange(size, dtype=torch.float64)) ** -power @ v[:size]


@pytest.mark.parametrize("power", [1.0, 0.25, 0.02, 0.005], ids=lambda p: f"power {p}")
@pytest.mark.parametrize("shape", [(256, 320), (320, 256)], ids=["wide", "tall"])
def test_far_below_the_size_it_is_randomized_and_says_what_that_costs(
    shape: tuple[int, int], power: float
) -> None:
    matrix = falling(*shape, power)
    whole, some = svd(matrix), svd(matrix, 8)
    assert len(whole.discarded) == 257
    assert (len(some.discarded), len(some.down_JK)) == (9, 8)
    assert whole.added == 0.0 < some.added
    for rank in range(9):
        lost = float((matrix - product(some, rank)).square().sum())
        assert float(some.discarded[rank]) == pytest.approx(lost, rel=1e-9)
        least = float(whole.discarded[rank])
        assert least * (1 - 1e-9) <= lost <= least + some.added
    assert some.added < 0.1 * float(whole.discarded[8])
    assert torch.equal(svd(matrix, 8).up_MJ, some.up_MJ)


def test_close_to_the_size_it_is_not_randomized() -> None:
    matrix = falling(256, 320)
    some = svd(matrix, 24)
    assert some.added == 0.0
    torch.testing.assert_close(some.discarded, svd(matrix).discarded[:25])


def test_what_fisher_discards_grows_with_the_tokens_as_a_sum_does(weight: torch.Tensor) -> None:
    """So that matrices which see more tokens than others are compared with them rightly."""
    x, g = correlated_inputs(), gradients(weight)
    once = fisher(weight, x.T @ x, g, len(x))
    twice = fisher(weight, 2 * x.T @ x, 2 * g, 2 * len(x))
    torch.testing.assert_close(twice.discarded, 2 * once.discarded, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["whitened", "fisher", "refitted"])
def test_without_a_token_the_weights_decide_and_nothing_is_at_stake(
    weight: torch.Tensor, method: str
) -> None:
    none = torch.zeros(24, 24, dtype=torch.float64)
    found = {
        "whitened": lambda: whitened(weight, none, 5),
        "fisher": lambda: fisher(weight, none, gradients(weight), 0, 5),
        "refitted": lambda: refitted(weight, none, none, none, 5),
    }[method]()
    torch.testing.assert_close(product(found, 5), product(svd(weight), 5))
    assert found.discarded.tolist() == [0.0] * 6


def test_few_tokens_leave_the_rest_to_the_weights(weight: torch.Tensor) -> None:
    """Beyond the rank of the covariance the larger weights are kept, not arbitrary ones."""
    x = correlated_inputs(tokens=3)
    lost = float((weight - product(whitened(weight, x.T @ x), 12)).square().sum())
    assert lost < 1.6 * float((weight - product(svd(weight), 12)).square().sum())


def test_refitting_recovers_what_inputs_that_drifted_still_say(weight: torch.Tensor) -> None:
    x = correlated_inputs()
    generator = torch.Generator().manual_seed(2)
    bent = torch.eye(24, dtype=torch.float64)
    bent += 0.3 * torch.randn(24, 24, generator=generator, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    seen = x @ bent + 0.01 * noise  # what the student reads in place of x
    wanted = x @ weight.T

    def error(approximation: torch.Tensor) -> float:
        return float((wanted - seen @ approximation.T).square().sum())

    again = refitted(weight, seen.T @ seen, x.T @ seen, x.T @ x, ridge=0)
    assert error(product(again, 8)) == pytest.approx(float(again.discarded[8]), rel=1e-6)
    assert error(product(again, 8)) < 0.5 * error(product(whitened(weight, seen.T @ seen), 8))
    # No matrix of that rank is better: a step of gradient descent finds nothing.
    up, down = again.first(8).up_MR.clone(), again.first(8).down_RK.clone()
    up.requires_grad_(True), down.requires_grad_(True)
    (wanted - seen @ (up @ down).T).square().sum().backward()
    assert up.grad is not None and down.grad is not None
    scale = float((wanted.T @ seen).norm() * down.detach().norm())
    assert float(up.grad.norm()) < 1e-6 * scale and float(down.grad.norm()) < 1e-6 * scale


def test_refitting_leaves_alone_what_the_inputs_no_longer_show(weight: torch.Tensor) -> None:
    """After a cut of low rank the inputs fill a few directions only, up to rounding."""
    x = correlated_inputs()
    basis = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    seen = x @ basis[:, :6] @ basis[:, :6].T
    rounded = [
        (x.float().double(), seen.float().double()),
        (x.half().double(), seen.half().double()),
    ]
    found = []
    for a, b in rounded:
        components = refitted(weight, b.T @ b, a.T @ b, a.T @ a)
        found.append(product(components, min(weight.shape)))
        assert torch.linalg.norm(found[-1]) < 10 * torch.linalg.norm(weight)
    assert torch.linalg.norm(found[0] - found[1]) < 0.5 * torch.linalg.norm(found[0])


def test_components_equal_those_of_an_svd(weight: torch.Tensor) -> None:
    x = correlated_inputs()
    root = torch.linalg.cholesky(x.T @ x)
    u, sigma, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    exact = (u[:, :5] * sigma[:5]) @ vt[:5] @ torch.linalg.inv(root)
    components = whitened(weight, x.T @ x)
    torch.testing.assert_close(product(components, 5), exact, rtol=1e-6, atol=1e-6)
    tail = sigma.square().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(components.discarded[:-1], tail, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("tokens", [6, 400], ids=["few tokens", "a constant input"])
def test_a_singular_covariance_goes_by_its_eigenvalues(weight: torch.Tensor, tokens: int) -> None:
    x = correlated_inputs(tokens=tokens)
    if tokens == 400:
        x[:, 3] = 0.0
        x[:, 5] = x[:, 4]
    root = whitening_root(x.T @ x)
    assert not root.triangular
    torch.testing.assert_close(root.s_KK @ root.s_KK.T, x.T @ x, rtol=1e-6, atol=1e-6)
    rank = min(torch.linalg.matrix_rank(x).item(), *weight.shape)
    approximation = product(whitened(weight, x.T @ x), rank)
    assert bool(approximation.isfinite().all())
    if rank == torch.linalg.matrix_rank(x):
        wrong = torch.linalg.norm(x @ (weight - approximation).T)
        assert wrong < 1e-3 * torch.linalg.norm(x @ weight.T)


def test_components_are_balanced_whatever_the_scale_of_the_inputs(weight: torch.Tensor) -> None:
    x = 1000 * correlated_inputs()
    for components in (svd(weight), whitened(weight, x.T @ x), asvd(weight, x.abs().mean(0))):
        factors = components.first(5)
        torch.testing.assert_close(factors.up_MR.norm(dim=0), factors.down_RK.norm(dim=1))


def test_zeros_are_no_reason_to_fail(weight: torch.Tensor) -> None:
    zeros, eye = torch.zeros_like(weight), torch.eye(24, dtype=torch.float64)
    for components in (whitened(zeros, eye), svd(zeros)):
        assert bool(product(components, 2).isfinite().all())
        assert components.first(2).residual == 0.0
    # Inputs that calibration never showed: the weights themselves are what is known.
    torch.testing.assert_close(product(whitened(weight, 0 * eye), 5), product(svd(weight), 5))
    for components in (
        fwsvd(weight, torch.zeros(len(weight))),
        asvd(weight, torch.zeros(24)),
    ):
        assert bool(product(components, 2).isfinite().all())


def test_the_root_is_a_root_and_nan_is_refused() -> None:
    x = correlated_inputs()
    root = whitening_root(x.T @ x)
    torch.testing.assert_close(root.s_KK @ root.s_KK.T, x.T @ x, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="not finite"):
        whitened(torch.ones(3, 3), torch.full((3, 3), float("nan"), dtype=torch.float64))
