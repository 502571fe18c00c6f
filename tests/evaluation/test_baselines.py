"""Lead-k is the document's own beginning, sentence by sentence."""

import pytest

from makd_llm.evaluation.baselines import lead_k
from makd_llm.evaluation.rouge import score

DOCUMENT = "Dr. Lee met the U.S. team. They talked. A plan was made.\nIt failed."


def test_the_first_sentences_one_on_each_line() -> None:
    assert lead_k(DOCUMENT, 1) == "Dr. Lee met the U.S. team."
    assert lead_k(DOCUMENT, 3) == "Dr. Lee met the U.S. team.\nThey talked.\nA plan was made."


def test_a_short_document_is_its_own_lead() -> None:
    assert lead_k(DOCUMENT, 9).split() == DOCUMENT.split()
    assert lead_k("", 3) == ""


def test_a_lead_is_its_own_lead() -> None:
    assert lead_k(lead_k(DOCUMENT, 2), 2) == lead_k(DOCUMENT, 2)


def test_a_summary_that_is_the_lead_scores_full() -> None:
    assert score([lead_k(DOCUMENT, 2)], [["Dr. Lee met the U.S. team. They talked."]]).mean == {
        "rouge1": 100,
        "rouge2": 100,
        "rougeL": 100,
        "rougeLsum": 100,
    }


def test_a_lead_has_a_sentence() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        lead_k(DOCUMENT, 0)
