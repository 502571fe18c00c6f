"""The baseline that every summarizer is measured against: the document's own first sentences.

News and abstracts put what matters first, so lead-3 is hard to beat there (See et al. 2017); a
table of ROUGE without its row says little.
"""

from makd_llm.evaluation.rouge import split_sentences


def lead_k(document: str, k: int) -> str:
    """The first `k` sentences of a document, one on each line; all of them where there are fewer.

    Raises ValueError unless k is 1 or more.
    """
    if k < 1:
        raise ValueError(f"k is {k}, but a lead has at least one sentence")
    return "\n".join(split_sentences(document)[:k])
