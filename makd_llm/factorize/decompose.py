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
serves every rank. Where `most` says how many will be wanted, and that is far below the size, the
decomposition is randomized.

Components are balanced: column of up and row of down have the same norm. For plain SVD that is
sqrt(sigma) on either side. For whitened SVD it is ours: sqrt(sigma) on either side of S^-1 leaves
down smaller than up by the size of the inputs summed over all calibration tokens, and an optimizer
that moves every weight by the learning rate (Adam) tears it apart.
"""
# M outputs, K inputs, J = min(M, K), R rank, X inputs of the matrix as columns

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

FAR_BELOW, OVERSAMPLED, ITERATIONS = 8, 16, 6
"""A randomized decomposition where the rank, with so many vectors more, is at most an eighth of the
size; so many rounds of subspace iteration.
"""
ROWS = 8192
"""Of a tall matrix, read together."""


@dataclass(frozen=True)
class Factors:
    """A factor pair and what the truncation costs.

    residual: |L (W - up down) S|_F / |L W S|_F. Where S S^T = X X^T and L = 1 it is the relative
    error of the outputs on the calibration text. added: an estimate from above of how much less a
    full decomposition would have made it; 0 but for a randomized one.
    """

    down_RK: Tensor
    up_MR: Tensor
    residual: float
    added: float = 0.0


class Left(NamedTuple):
    """discarded, added: as in `Components`."""

    discarded: Tensor
    added: float


@dataclass(frozen=True)
class Components:
    """A matrix as a sum of components, best first.

    discarded: (J + 1,) float64 on the CPU; the squared error |L (W - W_r) S|_F^2 that is left when
    the first r components are kept. It falls with r, to 0 where J = min(M, K), except for
    `refitted`. added: an estimate from above of how much of that a full decomposition would have
    kept; 0 but for a randomized one.
    """

    down_JK: Tensor
    up_MJ: Tensor
    discarded: Tensor
    added: float = 0.0

    @property
    def left(self) -> Left:
        """What the components leave."""
        return Left(self.discarded, self.added)

    def first(self, rank: int) -> Factors:
        """The best factor pair of this rank."""
        pair = (self.down_JK[:rank], self.up_MJ[:, :rank])
        return Factors(*pair, *residual_of(self.discarded, self.added, rank))


def residual_of(discarded: Tensor, added: float, rank: int) -> tuple[float, float]:
    """`Factors.residual` and `Factors.added` at a rank; the arguments as in `Components`."""
    whole, lost = float(discarded[0]), float(discarded[rank])
    if whole <= 0:
        return 0.0, 0.0
    residual = (lost / whole) ** 0.5
    return residual, residual - (max(lost - added, 0.0) / whole) ** 0.5


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


def svd(weight_MK: Tensor, most: int | None = None) -> Components:
    """Plain SVD: the best approximation of the weights. Source: Eckart and Young 1936."""
    weight_MK = weight_MK.double()
    return _components(weight_MK, weight_MK, None, most)


def fwsvd(weight_MK: Tensor, fisher_M: Tensor, most: int | None = None) -> Components:
    """SVD of the rows scaled by the root of their Fisher information.

    fisher_M: sum over the row of squared gradients of the loss. Source: FWSVD (Hsu et al. 2022).
    Rows without any gradient keep a millionth of the mean weight, so that they are not lost.
    """
    scale_M = fisher_M.double().sqrt()
    scale_M = scale_M.clamp_min(1e-6 * scale_M.mean().clamp_min(1e-30))
    weight_MK = weight_MK.double()
    scaled_MK = scale_M[:, None] * weight_MK
    scaled = _components(scaled_MK, scaled_MK, None, most)
    return _balanced(scaled.down_JK, scaled.up_MJ / scale_M[:, None], scaled.left)


def asvd(
    weight_MK: Tensor, mean_abs_K: Tensor, most: int | None = None, *, alpha: float = 0.5
) -> Components:
    """SVD of the columns scaled by the size of their inputs, mean|x|^alpha.

    Source: ASVD (Yuan et al. 2023). Inputs that are always 0 keep a millionth of the mean scale.
    """
    scale_K = mean_abs_K.double().pow(alpha)
    scale_K = scale_K.clamp_min(1e-6 * scale_K.mean().clamp_min(1e-30))
    weight_MK = weight_MK.double()
    scaled = _components(weight_MK * scale_K, weight_MK * scale_K, None, most)
    return _balanced(scaled.down_JK / scale_K, scaled.up_MJ, scaled.left)


def whitened(weight_MK: Tensor, covariance_KK: Tensor, most: int | None = None) -> Components:
    """SVD of W S with S S^T = X X^T: the best approximation of the outputs on X.

    covariance_KK: X X^T summed over calibration tokens, float64. Source: SVD-LLM (Wang et al.
    2024). Where W has no more rows than columns S is not needed: V^T S^-1 is U^T W, and U comes
    from W S S^T W^T = W C W^T.
    """
    weight_MK, covariance_KK = weight_MK.double(), covariance_KK.double()
    if not bool(covariance_KK.any()):
        return unused(weight_MK, most)
    if weight_MK.shape[0] <= weight_MK.shape[1]:
        covariance_KK = floored(_finite(covariance_KK))
        u_MJ, left = _spectrum(weight_MK @ covariance_KK @ weight_MK.T, most)
        return _balanced(u_MJ.T @ weight_MK, u_MJ, left)
    root = whitening_root(covariance_KK)
    return _components(weight_MK @ root.s_KK, None, root, most)


def unused(weight_MK: Tensor, most: int | None = None) -> Components:
    """Of a matrix to which no calibration token came: its weights are what is known, and whatever
    is discarded costs nothing.
    """
    found = svd(weight_MK, most)
    return replace(found, discarded=torch.zeros_like(found.discarded), added=0.0)


def fisher(
    weight_MK: Tensor,
    covariance_KK: Tensor,
    gradients_MM: Tensor,
    tokens: int,
    most: int | None = None,
) -> Components:
    """SVD of L^T W S: the best approximation by the loss, as far as a Kronecker product says it.

    covariance_KK: X X^T. gradients_MM: G G^T of the outputs' gradients; both summed over the same
    tokens, float64. `discarded` is the sum over these tokens of (g . d)^2, with inputs and
    gradients averaged apart. Source: GFWSVD (Chekalina et al. 2025), whose factors are fitted; here
    they are K-FAC's (Martens and Grosse 2015).
    """
    weight_MK, covariance_KK = weight_MK.double(), covariance_KK.double()
    if not bool(covariance_KK.any()) or not bool(gradients_MM.any()):
        return unused(weight_MK, most)
    covariance_KK = covariance_KK / tokens
    if weight_MK.shape[0] <= weight_MK.shape[1]:
        covariance_KK = floored(_finite(covariance_KK))
        scale = whitening_root(gradients_MM)
        scaled_MK = scale.s_KK.T @ weight_MK
        u_MJ, left = _spectrum(scaled_MK @ covariance_KK @ scaled_MK.T, most)
        return _balanced(u_MJ.T @ scaled_MK, scale.divide(u_MJ.T).T, left)  # L^-T U
    root = whitening_root(covariance_KK)
    ws_MK = weight_MK @ root.s_KK
    v_KJ, left = _spectrum(ws_MK.T @ gradients_MM.double() @ ws_MK, most)
    return _balanced(root.divide(v_KJ.T), ws_MK @ v_KJ, left)


def refitted(
    weight_MK: Tensor,
    student_KK: Tensor,
    teacher_student_KK: Tensor,
    teacher_KK: Tensor,
    most: int | None = None,
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
    if not bool(diagonal_K.any()):
        return unused(weight_MK, most)
    # As if every input had also been seen alone, by teacher and student alike.
    alone_KK = torch.diag_embed(torch.full_like(diagonal_K, ridge * float(diagonal_K.median())))
    root = whitening_root(student_KK.double() + alone_KK)
    cross_MK = weight_MK @ (teacher_student_KK.double() + alone_KK)
    if root.triangular:
        p_MK = torch.linalg.solve_triangular(root.s_KK.T, cross_MK, upper=True, left=False)
    else:
        assert root.inverse_KK is not None
        p_MK = cross_MK @ root.inverse_KK.T
    found = _components(p_MK, None, root, most)
    whole = float(((weight_MK @ (teacher_KK.double() + alone_KK)) * weight_MK).sum())
    lost = max(whole - float(found.discarded[0]), 0.0)
    return replace(found, discarded=found.discarded + lost)


def tall(
    weight_VD: Tensor, metric_DD: Tensor, rank: int, row_weight_V: Tensor | None = None
) -> Factors:
    """The best pair for |diag(w)^1/2 (W - up down) S|_F with S S^T = metric, for a matrix with far
    more rows than columns, of which only a block of rows is in float64 at a time.

    row_weight_V: w, of each row; None: 1.
    """
    root = whitening_root(metric_DD)
    gram_DD = root.s_KK.T @ tall_gram(weight_VD, row_weight_V) @ root.s_KK
    v_DR, left = _spectrum((gram_DD + gram_DD.T) / 2, rank)
    up_DR = root.s_KK @ v_DR
    up_VR = torch.cat([(block.double() @ up_DR).float() for block in weight_VD.split(ROWS)])
    found = _balanced(root.divide(v_DR.T), up_VR, left)
    return found.first(rank)


def tall_gram(weight_VD: Tensor, row_weight_V: Tensor | None = None) -> Tensor:
    """W^T diag(w) W, (D, D) in float64."""
    width = weight_VD.shape[1]
    gram_DD = weight_VD.new_zeros(width, width, dtype=torch.float64)
    for start in range(0, len(weight_VD), ROWS):
        block_vD = weight_VD[start : start + ROWS].double()
        scaled_vD = block_vD
        if row_weight_V is not None:
            scaled_vD = row_weight_V[start : start + ROWS, None].to(block_vD) * block_vD
        gram_DD.addmm_(scaled_vD.T, block_vD)
    return gram_DD


def floored(covariance_KK: Tensor) -> Tensor:
    """The same, or, where it is singular, with a trace of every direction: so that weights which
    calibration never asked for are kept in the order of their size, rather than in any.
    """
    if _cholesky(covariance_KK) is not None:
        return covariance_KK
    trace = 1e-12 * torch.linalg.matrix_norm(covariance_KK, 2)
    return covariance_KK + torch.diag_embed(trace.expand(len(covariance_KK)))


def _cholesky(covariance_KK: Tensor) -> Tensor | None:
    """The lower factor; None where C is singular."""
    root_KK, info = torch.linalg.cholesky_ex(covariance_KK)
    diagonal = root_KK.diagonal()
    regular = int(info) == 0 and bool(diagonal.min() > 1e-6 * diagonal.max())
    return root_KK if regular else None


def whitening_root(covariance_KK: Tensor) -> Root:
    """S with S S^T = C: by Cholesky, or by eigenvalues where C is singular.

    Singular is what a constant or repeated input makes of it. Eigenvalues below 1e-12 of the
    largest are raised to that, so that a direction that calibration never showed keeps a trace of
    the weights instead of being divided by 0. Raises ValueError where C is not finite.
    """
    covariance_KK = _finite(covariance_KK.double())
    root_KK = _cholesky(covariance_KK)
    if root_KK is not None:
        return Root(root_KK, triangular=True)
    square_K, q_KK = torch.linalg.eigh(covariance_KK)
    floor = (1e-12 * square_K[-1]).clamp_min(1e-30)
    size_K = square_K.clamp_min(floor).sqrt()
    return Root(q_KK * size_K, triangular=False, inverse_KK=(q_KK / size_K).T)


def _components(
    p_MK: Tensor, right_MK: Tensor | None, root: Root | None, most: int | None
) -> Components:
    """Components of P S^-1, by the Gram matrix of P's smaller side.

    right_MK: P S^-1, where it is at hand.
    """
    if p_MK.shape[0] <= p_MK.shape[1]:
        u_MJ, left = _spectrum(p_MK @ p_MK.T, most)
        if right_MK is not None:
            down_JK = u_MJ.T @ right_MK
        else:
            assert root is not None
            down_JK = root.divide(u_MJ.T @ p_MK)
        return _balanced(down_JK, u_MJ, left)
    v_KJ, left = _spectrum(p_MK.T @ p_MK, most)
    down_JK = v_KJ.T if root is None else root.divide(v_KJ.T)
    return _balanced(down_JK, p_MK @ v_KJ, left)


def _balanced(down_JK: Tensor, up_MJ: Tensor, left: Left) -> Components:
    """The same product, with equal norms of each component's row of down and column of up."""
    tiny = torch.finfo(torch.float64).tiny
    down_J = torch.linalg.vector_norm(down_JK, dim=1).clamp_min(tiny)
    up_J = torch.linalg.vector_norm(up_MJ, dim=0).clamp_min(tiny)
    scale_J = (down_J / up_J).sqrt()
    return Components(down_JK / scale_J[:, None], up_MJ * scale_J.to(up_MJ.dtype), *left)


def _spectrum(gram_JJ: Tensor, most: int | None) -> tuple[Tensor, Left]:
    """Of the matrix whose Gram matrix this is: its first `most` singular vectors (None: all), and
    what is left of its squared norm without the first 0, 1, 2, ... of them.

    Several times faster than an SVD; in float64, what squaring costs is a relative 1e-8 of the
    largest singular value, far below the weights' own precision.
    """
    size = len(_finite(gram_JJ))
    if most is not None and FAR_BELOW * (most + OVERSAMPLED) <= size:
        return _leading(gram_JJ, most)
    square_J, vectors_JJ = torch.linalg.eigh(gram_JJ)
    # Summed from the small end, so that small sums keep their precision.
    left_J = square_J.cpu().clamp_min(0.0).cumsum(0).flip(0)
    discarded = torch.cat([left_J, left_J.new_zeros(1)])
    most = size if most is None else min(most, size)
    return vectors_JJ.flip(1)[:, :most], Left(discarded[: most + 1], 0.0)


def _leading(gram_JJ: Tensor, most: int) -> tuple[Tensor, Left]:
    """`_spectrum` by randomized subspace iteration (Halko, Martinsson and Tropp 2011).

    The squared error is exact for the vectors that are found. How far it is from the least is
    estimated from above: by Kahan's bound on Ritz values, sqrt(2 r) |G Q - Q H|_F with H = Q^T G Q,
    for how far these are from some r eigenvalues of G; and by what the kept values are below the
    largest eigenvalue outside Q, which power iteration finds, for those being the first r.
    """
    generator = torch.Generator().manual_seed(0)
    size = len(gram_JJ)
    start_JQ = torch.randn(size, most + OVERSAMPLED, generator=generator, dtype=gram_JJ.dtype)
    q_JQ = start_JQ.to(gram_JJ.device)
    for _ in range(ITERATIONS):
        q_JQ = torch.linalg.qr(gram_JJ @ q_JQ).Q
    times_JQ = gram_JJ @ q_JQ
    square_Q, turn_QQ = torch.linalg.eigh(q_JQ.T @ times_JQ)
    square_R, turn_QR = square_Q.flip(0)[:most], turn_QQ.flip(1)[:, :most]
    vectors_JR = q_JQ @ turn_QR
    wrong = float(torch.linalg.matrix_norm(times_JQ @ turn_QR - vectors_JR * square_R))
    outside = _largest_outside(gram_JJ, q_JQ, generator)
    missed = float((outside - square_R).clamp_min(0.0).sum())
    kept = torch.cat([square_R.new_zeros(1), square_R.clamp_min(0.0).cumsum(0)])
    discarded = (gram_JJ.diagonal().sum() - kept).clamp_min(0.0).cpu()
    return vectors_JR, Left(discarded, (2 * most) ** 0.5 * wrong + missed)


def _largest_outside(gram_JJ: Tensor, q_JQ: Tensor, generator: torch.Generator) -> float:
    """The largest eigenvalue of G in the complement of Q, and by what it may be too small."""
    size = (len(gram_JJ), min(8, len(gram_JJ)))
    rest = torch.randn(size, generator=generator, dtype=gram_JJ.dtype).to(gram_JJ.device)
    for _ in range(2 * ITERATIONS):
        rest = gram_JJ @ rest
        rest = torch.linalg.qr(rest - q_JQ @ (q_JQ.T @ rest)).Q
    times = gram_JJ @ rest
    values, turn = torch.linalg.eigh(rest.T @ times)
    outside = times - q_JQ @ (q_JQ.T @ times)
    wrong = torch.linalg.vector_norm(outside @ turn[:, -1] - values[-1] * (rest @ turn[:, -1]))
    return float(values[-1] + wrong)


def _finite(matrix: Tensor) -> Tensor:
    if not bool(matrix.isfinite().all()):
        raise ValueError("a matrix or its covariance holds values that are not finite")
    return matrix
