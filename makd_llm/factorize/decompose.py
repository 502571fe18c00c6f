"""Truncated decompositions W (M x K) ~ up (M x R) down (R x K), computed in float64.

Both put the square root of the kept singular values on either side, so that the factors have
balanced norms.
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
    u_MJ, sigma_J, vt_JK = torch.linalg.svd(weight_MK.double(), full_matrices=False)
    root_R = sigma_J[:rank].sqrt()
    return Factors(
        root_R[:, None] * vt_JK[:rank], u_MJ[:, :rank] * root_R, _residual(sigma_J, rank)
    )


def whitened(weight_MK: Tensor, covariance_KK: Tensor, rank: int) -> Factors:
    """Truncated SVD of W S with S S^T = X X^T: the best approximation of the outputs on the
    calibration text.

    covariance_KK: X X^T summed over calibration tokens, float64. Source: SVD-LLM (Wang et al.
    2024); the jitter for a singular covariance is theirs as well.
    """
    s_KK = whitening_root(covariance_KK)
    u_MJ, sigma_J, vt_JK = torch.linalg.svd(weight_MK.double() @ s_KK, full_matrices=False)
    root_R = sigma_J[:rank].sqrt()
    scaled_RK = root_R[:, None] * vt_JK[:rank]
    down_RK = torch.linalg.solve_triangular(s_KK, scaled_RK, upper=False, left=False)
    return Factors(down_RK, u_MJ[:, :rank] * root_R, _residual(sigma_J, rank))


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
