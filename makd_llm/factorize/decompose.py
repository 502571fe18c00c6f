"""Decompositions of a matrix W (M x K) into rank-one components, best first, in float64.

All are the singular value decomposition of P = L W S, with a left scale L and a right root S that
say what counts as an error:

    svd       L = 1                          S = 1                  the weights themselves
    fwsvd     L = root of row Fisher sums    S = 1                  weights, by rows' gradients
    asvd      L = 1                          S = diag(mean|x|^a)    weights, by their inputs' sizes
    whitened  L = 1                          S S^T = X X^T          the outputs W X
    fisher    L L^T = G G^T                  S S^T = X X^T          the loss, by gradients
    refitted  the outputs W X of the teacher's inputs, made from the student's own inputs X'

The first r components are the best approximation of rank r in that sense, so one decomposition
serves every rank. Components are balanced: column of up and row of down have the same norm. For
plain SVD that is sqrt(sigma) on either side. For whitened SVD it is ours: sqrt(sigma) on either
side of S^-1 leaves down smaller than up by the size of the inputs summed over all calibration
tokens, and an optimizer that moves every weight by the learning rate (Adam) tears it apart.
"""
# M outputs, K inputs, J = min(M, K), R rank, X inputs of the matrix as columns

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A factor pair and what the truncation costs.

    residual: |L (W - up down) S|_F / |L W S|_F. Where S S^T = X X^T and L = 1 it is the relative
    error of the outputs on the calibration text.
    """

    down_RK: Tensor
    up_MR: Tensor
    residual: float


@dataclass(frozen=True)
class Components:
    """A matrix as a sum of components, best first.

    discarded: (J + 1,) float64 on the CPU; the squared error |L (W - W_r) S|_F^2 that is left when
    the first r components are kept. It falls with r, to 0 except for `refitted`.
    """

    down_JK: Tensor
    up_MJ: Tensor
    discarded: Tensor

    def first(self, rank: int) -> Factors:
        """The best factor pair of this rank."""
        return Factors(self.down_JK[:rank], self.up_MJ[:, :rank], self.residual(rank))

    def residual(self, rank: int) -> float:
        """The relative error that is left at this rank."""
        whole = float(self.discarded[0])
        return (float(self.discarded[rank]) / whole) ** 0.5 if whole > 0 else 0.0


@dataclass(frozen=True)
class Root:
    """S with S S^T = C, and how to divide by it."""

    s_KK: Tensor
    triangular: bool
    inverse_KK: Tensor | None = None

    def divide(self, v_JK: Tensor) -> Tensor:
        """v S^-1."""
        if self.triangular:
            divided_JK: Tensor = torch.linalg.solve_triangular(
                self.s_KK, v_JK, upper=False, left=False
            )
            return divided_JK
        assert self.inverse_KK is not None
        return v_JK @ self.inverse_KK


def svd(weight_MK: Tensor) -> Components:
    """Plain SVD: the best approximation of the weights. Source: Eckart and Young 1936."""
    weight_MK = weight_MK.double()
    return _components(weight_MK, weight_MK, None)


def fwsvd(weight_MK: Tensor, fisher_M: Tensor) -> Components:
    """SVD of the rows scaled by the root of their Fisher information.

    fisher_M: sum over the row of squared gradients of the loss. Source: FWSVD (Hsu et al. 2022).
    Rows without any gradient keep a millionth of the mean weight, so that they are not lost.
    """
    scale_M = fisher_M.double().sqrt()
    scale_M = scale_M.clamp_min(1e-6 * scale_M.mean().clamp_min(1e-30))
    weight_MK = weight_MK.double()
    scaled = _components(scale_M[:, None] * weight_MK, scale_M[:, None] * weight_MK, None)
    return _balanced(scaled.down_JK, scaled.up_MJ / scale_M[:, None], scaled.discarded)


def asvd(weight_MK: Tensor, mean_abs_K: Tensor, *, alpha: float = 0.5) -> Components:
    """SVD of the columns scaled by the size of their inputs, mean|x|^alpha.

    Source: ASVD (Yuan et al. 2023). Inputs that are always 0 keep a millionth of the mean scale.
    """
    scale_K = mean_abs_K.double().pow(alpha)
    scale_K = scale_K.clamp_min(1e-6 * scale_K.mean().clamp_min(1e-30))
    weight_MK = weight_MK.double()
    scaled = _components(weight_MK * scale_K, weight_MK * scale_K, None)
    return _balanced(scaled.down_JK / scale_K, scaled.up_MJ, scaled.discarded)


def whitened(weight_MK: Tensor, covariance_KK: Tensor) -> Components:
    """SVD of W S with S S^T = X X^T: the best approximation of the outputs on X.

    covariance_KK: X X^T summed over calibration tokens, float64. Source: SVD-LLM (Wang et al.
    2024). Where W has no more rows than columns S is not needed: V^T S^-1 is U^T W, and U comes
    from W S S^T W^T = W C W^T.
    """
    weight_MK, covariance_KK = weight_MK.double(), covariance_KK.double()
    if not bool(covariance_KK.any()):  # no token came here: the weights are what is known
        return svd(weight_MK)
    if weight_MK.shape[0] <= weight_MK.shape[1]:
        sigma_M, u_MM = _spectrum(weight_MK @ covariance_KK @ weight_MK.T)
        return _balanced(u_MM.T @ weight_MK, u_MM, _discarded(sigma_M))
    root = whitening_root(covariance_KK)
    return _components(weight_MK @ root.s_KK, None, root)


def fisher(weight_MK: Tensor, covariance_KK: Tensor, gradients_MM: Tensor) -> Components:
    """SVD of L^T W S: the best approximation by the loss, as far as a Kronecker product says it.

    covariance_KK: X X^T. gradients_MM: G G^T of the outputs' gradients; both summed over the same
    tokens, float64. `discarded` is sum (g . d)^2 with the two averaged apart, over tokens. Source:
    GFWSVD (Chekalina et al. 2025), whose factors are fitted; here they are K-FAC's (Martens and
    Grosse 2015).
    """
    weight_MK, covariance_KK = weight_MK.double(), covariance_KK.double()
    if not bool(covariance_KK.any()) or not bool(gradients_MM.any()):
        return whitened(weight_MK, covariance_KK)
    if weight_MK.shape[0] <= weight_MK.shape[1]:
        left = whitening_root(gradients_MM)
        scaled_MK = left.s_KK.T @ weight_MK
        square_M, u_MM = _spectrum(scaled_MK @ covariance_KK @ scaled_MK.T)
        up_MM = left.divide(u_MM.T).T  # L^-T U
        return _balanced(u_MM.T @ scaled_MK, up_MM, _discarded(square_M))
    root = whitening_root(covariance_KK)
    ws_MK = weight_MK @ root.s_KK
    square_K, v_KK = _spectrum(ws_MK.T @ gradients_MM.double() @ ws_MK)
    return _balanced(root.divide(v_KK.T), ws_MK @ v_KK, _discarded(square_K))


def refitted(
    weight_MK: Tensor,
    student_KK: Tensor,
    teacher_student_KK: Tensor,
    teacher_KK: Tensor,
    *,
    ridge: float = 1e-4,
) -> Components:
    """The best approximation of the teacher's outputs W X from the student's inputs X'.

    student_KK: X' X'^T. teacher_student_KK: X X'^T. teacher_KK: X X^T; all summed over the same
    tokens, float64. ridge: what X' never shows (after a cut of low rank, whole directions) is left
    as it is in W instead of being fitted to rounding errors; a share of the median input's energy.

    The unrestricted best is the regression B = W X X'^T (X' X'^T)^-1, and
    |W X - A X'|^2 = |W X - B X'|^2 + |(B - A) X'|^2, so the rest is whitened SVD of B. `discarded`
    holds both terms: it does not fall to 0, because X' has lost something. Source: reduced-rank
    regression (Izenman 1975); its use for factorization after earlier layers were cut is ours.
    """
    weight_MK, diagonal_K = weight_MK.double(), student_KK.double().diagonal()
    if not bool(diagonal_K.any()):  # no token came here: the weights are what is known
        return svd(weight_MK)
    # As if every input had also been seen alone, by teacher and student alike.
    alone_KK = torch.diag_embed(torch.full_like(diagonal_K, ridge * float(diagonal_K.median())))
    root = whitening_root(student_KK.double() + alone_KK)
    cross_MK = weight_MK @ (teacher_student_KK.double() + alone_KK)
    if root.triangular:
        p_MK = torch.linalg.solve_triangular(root.s_KK.T, cross_MK, upper=True, left=False)
    else:
        assert root.inverse_KK is not None
        p_MK = cross_MK @ root.inverse_KK.T
    found = _components(p_MK, None, root)
    whole = float(((weight_MK @ (teacher_KK.double() + alone_KK)) * weight_MK).sum())
    lost = max(whole - float(found.discarded[0]), 0.0)
    return Components(found.down_JK, found.up_MJ, found.discarded + lost)


def whitening_root(covariance_KK: Tensor) -> Root:
    """S with S S^T = C: by Cholesky, or by eigenvalues where C is singular.

    Singular is what a constant or repeated input makes of it. Eigenvalues below 1e-12 of the
    largest are raised to that, so that a direction that calibration never showed keeps a trace of
    the weights instead of being divided by 0. Raises ValueError where C is not finite.
    """
    covariance_KK = _finite(covariance_KK.double())
    root_KK, info = torch.linalg.cholesky_ex(covariance_KK)
    diagonal = root_KK.diagonal()
    if int(info) == 0 and bool(diagonal.min() > 1e-6 * diagonal.max()):
        return Root(root_KK, triangular=True)
    square_K, q_KK = torch.linalg.eigh(covariance_KK)
    floor = (1e-12 * square_K[-1]).clamp_min(1e-30)
    size_K = square_K.clamp_min(floor).sqrt()
    return Root(q_KK * size_K, triangular=False, inverse_KK=(q_KK / size_K).T)


def _components(p_MK: Tensor, right_MK: Tensor | None, root: Root | None) -> Components:
    """Components of P S^-1, by the Gram matrix of P's smaller side.

    right_MK: P S^-1, where it is at hand.
    """
    if p_MK.shape[0] <= p_MK.shape[1]:
        sigma_M, u_MM = _spectrum(p_MK @ p_MK.T)
        if right_MK is not None:
            down_JK = u_MM.T @ right_MK
        else:
            assert root is not None
            down_JK = root.divide(u_MM.T @ p_MK)
        return _balanced(down_JK, u_MM, _discarded(sigma_M))
    sigma_K, v_KK = _spectrum(p_MK.T @ p_MK)
    down_JK = v_KK.T if root is None else root.divide(v_KK.T)
    return _balanced(down_JK, p_MK @ v_KK, _discarded(sigma_K))


def _balanced(down_JK: Tensor, up_MJ: Tensor, discarded: Tensor) -> Components:
    """The same product, with equal norms of each component's row of down and column of up."""
    tiny = torch.finfo(torch.float64).tiny
    down_J = torch.linalg.vector_norm(down_JK, dim=1).clamp_min(tiny)
    up_J = torch.linalg.vector_norm(up_MJ, dim=0).clamp_min(tiny)
    scale_J = (down_J / up_J).sqrt()
    return Components(down_JK / scale_J[:, None], up_MJ * scale_J, discarded)


def _spectrum(gram_JJ: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values, largest first, and vectors of the matrix whose Gram matrix this is.

    Several times faster than an SVD; in float64, what squaring costs is a relative 1e-8 of the
    largest singular value, far below the weights' own precision.
    """
    square_J, vectors_JJ = torch.linalg.eigh(_finite(gram_JJ))
    return square_J.flip(0).clamp_min(0.0), vectors_JJ.flip(1)


def _discarded(square_J: Tensor) -> Tensor:
    """What remains of the sum after the first 0, 1, 2, ... values; summed from the small end."""
    tail_J = square_J.cpu().flip(0).cumsum(0).flip(0)
    return torch.cat([tail_J, tail_J.new_zeros(1)])


def _finite(matrix: Tensor) -> Tensor:
    if not bool(matrix.isfinite().all()):
        raise ValueError("a matrix or its covariance holds values that are not finite")
    return matrix
