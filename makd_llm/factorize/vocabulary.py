"""The embedding and the head as factor pairs: a row per token, in one matrix (tied) or in two.

They are no part of the layers' budget: each keeps a share of its own. What counts as an error
follows from their use (ours). The head's is that of the logits on the calibration text's last
hidden states h: |(E - up down) H| with H H^T = sum h h^T. The embedding's is that of the rows,
weighted by how often their tokens occur; tokens that never do count as half an occurrence. A tied
matrix has to serve both: H H^T and the identity, each divided by the loss without any component,
and every row alike. Plain `svd` knows nothing of either.
"""
# V tokens of the vocabulary, D width, R rank

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from makd_llm import distributed
from makd_llm.checkpoint.folder import TensorReader
from makd_llm.data.batch import Batch
from makd_llm.errors import UserError
from makd_llm.factorize.decompose import Factors, tall, tall_gram
from makd_llm.factorize.statistics import real_rows
from makd_llm.layerwise.walk import Walk
from makd_llm.models.families import family_of
from makd_llm.report.progress import progress


def vocabulary_modules(config: PreTrainedConfig) -> dict[str, str]:
    """Role (embedding, head) -> the module's name; a tied head is its embedding."""
    family = family_of(config)
    ends = {"embedding": family.embedding}
    return ends if config.tie_word_embeddings else ends | {"head": family.head}


def vocabulary_ranks(
    reader: TensorReader, config: PreTrainedConfig, keep: float, multiple: int
) -> dict[str, int]:
    """Module name -> the rank at which it keeps this share of its numbers; none where that is all.

    Raises UserError where no multiple is that small.
    """
    ranks: dict[str, int] = {}
    if keep == 1.0:
        return ranks
    for role, name in vocabulary_modules(config).items():
        rows, columns = reader.shape(f"{name}.weight")
        rank = int(keep * rows * columns / (rows + columns)) // multiple * multiple
        if rank == 0:
            raise UserError(
                f"embedding {keep:g}: a rank of {multiple} (rank_multiple) is already more "
                f"than that of the {rows} x {columns} {role}; keep more, or lower the multiple"
            )
        ranks[name] = rank
    return ranks


def vocabulary_factors(
    reader: TensorReader,
    config: PreTrainedConfig,
    name: str,
    rank: int,
    hidden_DD: Tensor | None,
    counts_V: Tensor | None,
) -> Factors:
    """The factors of one of them. hidden_DD: H H^T; counts_V: of the tokens; None: plain SVD."""
    weight_VD = reader.get(f"{name}.weight").to(distributed.device())
    identity_DD = torch.eye(weight_VD.shape[1], dtype=torch.float64, device=weight_VD.device)
    if hidden_DD is None or counts_V is None:
        return tall(weight_VD, identity_DD, rank)
    if config.tie_word_embeddings:
        gram_DD = tall_gram(weight_VD)
        logits, rows = float((gram_DD * hidden_DD).sum()), float(gram_DD.trace())
        return tall(weight_VD, hidden_DD / logits + identity_DD / rows, rank)
    if name == family_of(config).head:
        return tall(weight_VD, hidden_DD, rank)
    return tall(weight_VD, identity_DD, rank, counts_V.clamp_min(0.5))


def hidden_covariance(walk: Walk) -> Tensor:
    """(D, D) float64: H H^T of the last hidden states of all ranks' real tokens. Collective."""
    stream = walk.embedded()
    with progress("factorize: head", len(walk)) as advance:
        for index in range(len(walk)):
            stream = walk.advanced(index, walk.layer(index), stream)
            advance()
    total_DD: Tensor | None = None
    with torch.no_grad():
        for batch, hidden_BTD in zip(walk.batches, walk.finished(stream), strict=True):
            h_ND = real_rows(hidden_BTD, batch)
            total_DD = h_ND.T @ h_ND if total_DD is None else total_DD.addmm_(h_ND.T, h_ND)
    assert total_DD is not None
    return distributed.sum_over_ranks(total_DD)


def token_counts(batches: Sequence[Batch], size: int) -> Tensor:
    """(V,) float64: how often each token occurs in all ranks' batches. Collective."""
    counts_V = torch.zeros(size, dtype=torch.float64)
    for batch in batches:
        ids_N = batch.input_ids_BT[batch.token_mask_BT]
        counts_V += torch.bincount(ids_N, minlength=size).double()
    return distributed.sum_over_ranks(counts_V)
