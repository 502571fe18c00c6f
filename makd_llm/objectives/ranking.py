"""Model level: whether the student ranks the likeliest tokens as the teacher does (RLKD)."""
# N summary tokens, V vocabulary, U tokens of the union

import torch
from torch import Tensor

from makd_llm.objectives.head import Outputs

CHUNK = 256  # positions whose logits are looked at together


def ranking_loss(outputs: Outputs, *, top_k: int = 5, softness: float = 1.0) -> Tensor:
    """1 - Spearman's correlation of ranks among the union of both models' top_k tokens, per summary
    token. Returns (N,) fp32 (or fp64), between 0 and 2.

    The student's ranks are soft, rank_i = 1/2 + sum_j sigmoid((z_j - z_i) / s) with s = softness
    times the standard deviation of its logits in the union (ours; RLKD's code sorts softly by
    another relaxation); the teacher's are exact. Only the union's logits are differentiated: the
    others are looked at in chunks, without a graph. A position where one side ranks all tokens
    alike counts 1. Source: RLKD.
    """
    union_NU, shared_NU = _union(outputs, top_k)
    exact = torch.promote_types(outputs.student_ND.dtype, torch.float32)
    z_NU = _logits_of(outputs.student_ND, outputs.student_weight_VD, union_NU).to(exact)
    with torch.no_grad():
        teacher = _logits_of(outputs.teacher_NE, outputs.teacher_weight_VE, union_NU).to(exact)
    return 1.0 - spearman(z_NU, teacher, shared_NU, softness)


def spearman(z_NU: Tensor, teacher_NU: Tensor, valid_NU: Tensor, softness: float) -> Tensor:
    """Correlation of the student's soft ranks with the teacher's exact ones, per row. (N,)"""
    scale_N1 = _deviation(z_NU.detach(), valid_NU)
    beats_NUU = torch.sigmoid(
        (z_NU[:, None, :] - z_NU[:, :, None]) / (softness * scale_N1)[:, :, None].clamp_min(1e-6)
    )
    ours_NU = (beats_NUU * valid_NU[:, None, :]).sum(-1)
    theirs_NU = ((teacher_NU[:, None, :] > teacher_NU[:, :, None]) & valid_NU[:, None, :]).sum(-1)
    ours_NU = _standardized(ours_NU, valid_NU)
    theirs_NU = _standardized(theirs_NU.to(ours_NU.dtype), valid_NU)
    return (ours_NU * theirs_NU).sum(-1)


@torch.no_grad()
def _union(outputs: Outputs, top_k: int) -> tuple[Tensor, Tensor]:
    """Token numbers (N, 2 top_k), and which of them count: one found on both sides counts once."""
    found = []
    sides = (
        (outputs.teacher_NE, outputs.teacher_weight_VE),
        (outputs.student_ND, outputs.student_weight_VD),
    )
    for hidden_ND, weight_VD in sides:
        chunks = [(h @ weight_VD.T).topk(top_k, -1).indices for h in hidden_ND.split(CHUNK)]
        found.append(torch.cat(chunks) if chunks else hidden_ND.new_zeros(0, top_k).long())
    theirs_NK, ours_NK = found
    new_NK = (ours_NK[:, :, None] != theirs_NK[:, None, :]).all(-1)
    return torch.cat([theirs_NK, ours_NK], 1), torch.cat([torch.ones_like(new_NK), new_NK], 1)


def _logits_of(hidden_ND: Tensor, weight_VD: Tensor, tokens_NU: Tensor) -> Tensor:
    return torch.einsum("nd,nud->nu", hidden_ND, weight_VD[tokens_NU])


def _centred(x_NU: Tensor, valid_NU: Tensor) -> Tensor:
    """Without the mean of each row's valid entries; 0 at the others."""
    sum_N1 = torch.where(valid_NU, x_NU, 0.0).sum(-1, keepdim=True)
    return torch.where(valid_NU, x_NU - sum_N1 / valid_NU.sum(-1, keepdim=True), 0.0)


def _deviation(x_NU: Tensor, valid_NU: Tensor) -> Tensor:
    """Standard deviation of each row's valid entries, (N, 1)."""
    squares_N1 = _centred(x_NU, valid_NU).square().sum(-1, keepdim=True)
    return (squares_N1 / valid_NU.sum(-1, keepdim=True)).sqrt()


def _standardized(x_NU: Tensor, valid_NU: Tensor) -> Tensor:
    """Centred, and of length 1 (0 where all are alike)."""
    centred_NU = _centred(x_NU, valid_NU)
    length_N1: Tensor = torch.linalg.vector_norm(centred_NU, dim=-1, keepdim=True)
    return centred_NU / length_N1.clamp_min(1e-12)
