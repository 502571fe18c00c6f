"""What is kept of a teacher's next-token distributions: the likeliest, and the others' sum."""
# N summary tokens, n of a chunk, V vocabulary, E width, K likeliest tokens, S temperatures

from collections.abc import Sequence

import torch
from torch import Tensor

from makd_llm.shown import TopTokens

CHUNK = 256  # summary tokens whose logits exist together


@torch.no_grad()
def top_tokens(
    hidden_NE: Tensor, weight_VE: Tensor, top_k: int, temperatures: Sequence[float]
) -> TopTokens:
    """The top_k likeliest tokens of each row and the rest at each temperature, in fp32 (or fp64).

    hidden_NE: last hidden states at the summary's tokens; weight_VE: of the head. Logits of the
    whole vocabulary exist for CHUNK rows at a time.
    """
    parts = [_chunk(x_nE, weight_VE, top_k, temperatures) for x_nE in hidden_NE.split(CHUNK)]
    ids_NK, log_p_NK, log_rest_NS = (torch.cat(part) for part in zip(*parts, strict=True))
    return TopTokens(ids_NK, log_p_NK, log_rest_NS, tuple(temperatures))


def _chunk(
    hidden_nE: Tensor, weight_VE: Tensor, top_k: int, temperatures: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    logits_nV = hidden_nE @ weight_VE.T
    log_p_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)).log_softmax(-1)
    ids_nK = log_p_nV.topk(top_k, -1).indices.sort(-1).values
    log_p_nK = log_p_nV.gather(-1, ids_nK)
    rest_nV = log_p_nV.scatter_(-1, ids_nK, -torch.inf)
    log_rest = [(rest_nV / temperature).logsumexp(-1) for temperature in temperatures]
    return ids_nK, log_p_nK, torch.stack(log_rest, -1)
