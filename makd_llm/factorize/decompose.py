"""Truncated decompositions W (M x K) ~ up (M x R) down (R x K), computed in float64.

The factors are balanced: each component's column of up and row of down have the same norm. For
plain SVD that is sqrt(sigma) on either side. For whitened SVD it is ours: sqrt(sigma) on either
side of S^-1 leaves down smaller than up by the size of the inputs summed over all calibration
tokens, and an optimizer that moves every weight by the learning rate (Adam) tears it apart.
"""
# M outputs, K inputs, R rank, X inputs of the matrix as columns

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A factor pair and what the truncation costs.

    residual: |(W - up down) S|_F / |W S|_F with S = 1 (svd) or S S^T = X X^T (whitened, where it is
    the relative error of the outputs on the calibration text). Exactly the root of the discarded
    singular values' energy.
    """

    down_RK: Tensor
    up_MR: Tensor
    residual: float


def svd(weight_MK: Tensor, rank: int) -> Factors:
    """Plain truncated SVD: the best approximation of the weights. Source: Eckart and Young 1936."""
    weight_MK = weight_MK.double()
    if weight_MK.shape[0] <= weight_MK.shape[1]:
        return _from_left(weight_MK, weight_MK @ weight_MK.T, rank)
    transposed = _from_left(weight_MK.T, weight_MK.T @ weight_MK, rank)
    return Factors(transposed.up_MR.T, transposed.down_RK.T, transposed.residual)


def whitened(weight_MK: Tensor, covariance_KK: Tensor, rank: int) -> Factors:
    """Truncated SVD of W S with S S^T = X X^T: the best approximation of the outputs on X.

    covariance_KK: X X^T summed over calibration tokens, float64. Source: SVD-LLM (Wang et al.
    2024). Where W has no more rows than columns, S is not needed: U_r Sigma_r V_r^T S^-1 is
    U_r U_r^T W, and U comes from W S S^T W^T = W C W^T.
    """
    weight_MK, covariance_KK = weight_MK.double(), covariance_KK.double()
    if weight_MK.shape[0] <= weight_MK.shape[1]:
        return _from_left(weight_MK, weight_MK @ covariance_KK @ weight_MK.T, rank)
    s_KK = whitening_root(covariance_KK)
    ws_MK = weight_MK @ s_KK
    sigma_K, v_KK = _spectrum(ws_MK.T @ ws_MK)
    root_R, v_KR = sigma_K[:rank].sqrt(), v_KK[:, :rank]
    down_RK = torch.linalg.solve_triangular(s_KK, (v_KR * root_R).T, upper=False, left=False)
    return _balanced(down_RK, ws_MK @ v_KR / root_R, _residual(sigma_K, rank))


def _from_left(weight_MK: Tensor, gram_MM: Tensor, rank: int) -> Factors:
    """U_r U_r^T W, with U the eigenvectors of W S S^T W^T."""
    sigma_M, u_MM = _spectrum(gram_MM)
    u_MR = u_MM[:, :rank]
    return _balanced(u_MR.T @ weight_MK, u_MR, _residual(sigma_M, rank))


def _balanced(down_RK: Tensor, up_MR: Tensor, residual: float) -> Factors:
    """The same product, with equal norms of each component's row of down and column of up."""
    tiny = torch.finfo(torch.float64).tiny
    down_R = torch.linalg.vector_norm(down_RK, dim=1).clamp_min(tiny)
    up_R = torch.linalg.vector_norm(up_MR, dim=0).clamp_min(tiny)
    scale_R = (down_R / up_R).sqrt()
    return Factors(down_RK / scale_R[:, None], up_MR * scale_R, residual)


def _spectrum(gram_JJ: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and vectors of the matrix whose Gram matrix this is.

    Several times faster than an SVD; in float64, what squaring costs is a relative 1e-8 of the
    largest singular value, far below the weights' own precision. Values below that are rounding
    and are raised to it, so that dividing by their roots stays harmless.
    """
    if not bool(gram_JJ.isfinite().all()):
        raise ValueError("a matrix or its covariance holds values that are not finite")
    square_J, vectors_JJ = torch.linalg.eigh(gram_JJ)
    square_J, vectors_JJ = square_J.flip(0), vectors_JJ.flip(1)
    floor = (square_J[0] * 1e-16).clamp_min(torch.finfo(torch.float64).tiny)
    return square_J.clamp_min(floor).sqrt(), vectors_JJ


def whitening_root(covariance_KK: Tensor) -> Tensor:
    """Lower triangular S with S S^T = C, by Cholesky in float64.

    Where C is singular (fewer calibration tokens than inputs, or a constant input) its diagonal is
    raised by 1e-9 of its mean plus whatever its smallest eigenvalue lacks.
    """
    covariance_KK = covariance_KK.double()
    root_KK: Tensor
    root_KK, info = torch.linalg.cholesky_ex(covariance_KK)
    if int(info) == 0:
        return root_KK
    floor = 1e-9 * covariance_KK.diagonal().mean().clamp_min(1e-30)
    smallest = torch.linalg.eigvalsh(covariance_KK)[0]
    jitter = floor + (-smallest).clamp_min(0.0)
    for _ in range(8):
        identity_KK = torch.eye(
            len(covariance_KK), dtype=torch.float64, device=covariance_KK.device
        )
        root_KK, info = torch.linalg.cholesky_ex(covariance_KK + jitter * identity_KK)
        if int(info) == 0:
            return root_KK
        jitter = jitter * 10
    raise ValueError(
        "the covariance is not positive semi-definite, and no jitter made it so; does it hold NaN?"
    )


def _residual(sigma_J: Tensor, rank: int) -> float:
    energy = sigma_J.square().sum()
    return float((sigma_J[rank:].square().sum() / energy).sqrt()) if float(energy) > 0 else 0.0
