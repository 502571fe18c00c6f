"""Our ROUGE is the papers': the examples of Lin (2004), and values of ROUGE-1.5.5 itself."""

import json
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makd_llm.evaluation.rouge import METRICS, SETTINGS, RougeScores, score, split_sentences
from makd_llm.testing import shared_data

WORDS = st.lists(st.sampled_from(["the", "cat", "dog", "sat", "ran", "quickly"]), min_size=2)
SENTENCES = st.lists(WORDS.map(" ".join), min_size=1, max_size=4).map("\n".join)


def one(prediction: str, *references: str, stemming: bool = True) -> dict[str, float]:
    return score([prediction], [references], presplit=True, stemming=stemming).mean


@pytest.mark.parametrize(
    ("candidate", "rouge1", "rouge2", "rouge_l"),
    [
        ("police kill the gunman", 3 / 4, 1 / 3, 3 / 4),
        ("the gunman kill police", 3 / 4, 1 / 3, 2 / 4),
        ("the gunman police killed", 4 / 4, 2 / 3, 2 / 4),
    ],
)
def test_example_of_section_3_1_of_lin_2004(
    candidate: str, rouge1: float, rouge2: float, rouge_l: float
) -> None:
    got = one(candidate, "police killed the gunman", stemming=False)
    expected = {"rouge1": rouge1, "rouge2": rouge2, "rougeL": rouge_l, "rougeLsum": rouge_l}
    assert got == pytest.approx({metric: 100 * value for metric, value in expected.items()})


def test_union_lcs_example_of_section_3_2_of_lin_2004() -> None:
    got = one("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")
    recall, precision = 4 / 5, 4 / 10
    assert got["rougeLsum"] == pytest.approx(200 * recall * precision / (recall + precision))


def test_stemming_makes_one_word_of_its_forms() -> None:
    assert one("police killing gunmen", "police killed gunmen")["rouge1"] == 100
    plain = one("police killing gunmen", "police killed gunmen", stemming=False)
    assert plain["rouge1"] == pytest.approx(200 / 3)


def test_each_metric_takes_its_own_best_reference() -> None:
    shuffled, half = "d c b a", "a b x y"
    got = one("a b c d", shuffled, half)
    assert got["rouge1"] == one("a b c d", shuffled)["rouge1"] == 100
    assert got["rouge2"] == one("a b c d", half)["rouge2"] == pytest.approx(100 / 3)


def test_texts_are_split_into_sentences_for_lsum() -> None:
    reference = "The cat sat on a mat. Dr. No ran home."
    swapped = "Dr. No ran home. The cat sat on a mat."
    got = score([swapped], [[reference]]).mean
    assert got["rougeLsum"] == 100
    assert got["rougeL"] == 60
    unsplit = score([swapped], [[reference]], presplit=True).mean
    assert unsplit["rougeLsum"] == 60


def test_the_mean_is_over_pairs_and_an_empty_prediction_counts() -> None:
    scores = score(["a b", ""], [["a b"], ["a b"]])
    assert scores.pairs["rouge1"] == [100, 0]
    assert scores.mean == dict.fromkeys(METRICS, 50)


@given(SENTENCES, SENTENCES, SENTENCES)
def test_invariants(text: str, other: str, third: str) -> None:
    assert one(text, text) == pytest.approx(dict.fromkeys(METRICS, 100))
    alone, more = one(text, other), one(text, other, third)
    assert all(0 <= alone[metric] <= more[metric] <= 100 for metric in METRICS)
    turned = one(other, text)
    for metric in ("rouge1", "rouge2", "rougeL"):
        assert turned[metric] == pytest.approx(alone[metric]), "F1 is the same from either side"


@given(st.text())
def test_splitting_loses_nothing_but_white_space(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in sentences)
    assert not any("\n" in sentence for sentence in sentences)


def test_sentences_end_where_a_reader_says() -> None:
    text = "Dr. Smith paid 3.5 million to the U.S. firm. Was it worth it?\n#Person1#: Yes!\n\nNo"
    assert split_sentences(text) == [
        "Dr. Smith paid 3.5 million to the U.S. firm.",
        "Was it worth it?",
        "#Person1#: Yes!",
        "No",
    ]
    assert split_sentences(" \n ") == []


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [], "1 predictions for 0"),
        (["a", "b"], [["a"], []], "pair 1: references"),
        (["a"], ["a"], "pair 0: references"),
    ],
)
def test_misuse_is_named(predictions: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(predictions, references)


def test_no_pairs_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        _ = RougeScores({metric: [] for metric in METRICS}).mean


def test_settings_go_into_a_json_file() -> None:
    assert json.loads(json.dumps(SETTINGS)) == SETTINGS
    assert "0." in SETTINGS["scorer"]


def test_agrees_with_rouge_155_on_googles_fixture() -> None:
    fixture = json.loads(shared_data("data/rouge/google_rouge_fixture.json").read_text())
    official = fixture["perl_rouge_1_5_5"]
    compared = 0
    for name, values in official.items():
        if name in ("note", "rougeLsum_stem_multi_0"):
            continue
        metric, stem = name.split("_")
        ours = score(
            fixture["prediction_lines"],
            [[line] for line in fixture["target_lines"]],
            presplit=True,
            stemming=stem == "stem",
        )
        f1 = [100 * value[2] for value in values]
        assert ours.pairs[metric] == pytest.approx(f1, abs=1e-3), name
        compared += len(f1)
    several_lines = one(fixture["prediction_multi_0"], fixture["target_multi_0"])
    f1 = 100 * official["rougeLsum_stem_multi_0"][2]
    assert several_lines["rougeLsum"] == pytest.approx(f1, abs=1e-3)
    assert compared + 1 == 11


def test_agrees_with_rouge_155_on_summaries_of_realsumm() -> None:
    path = shared_data("data/rouge/realsumm_official_rouge155.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()][::12][:200]
    ours = score(
        ["\n".join(row["prediction"]) for row in rows],
        [["\n".join(row["reference"])] for row in rows],
        presplit=True,
    )
    official = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    official["rougeLsum"] = "rouge_l"

    def gaps(metric: str) -> list[float]:
        published = [100 * row[f"{official[metric]}_f_score"] for row in rows]
        return [a - b for a, b in zip(ours.pairs[metric], published, strict=True)]

    # Points of F1; the remainder is how the two treat apostrophes and the like.
    assert fmean(map(abs, gaps("rouge1"))) < 0.8
    assert fmean(map(abs, gaps("rouge2"))) < 0.3
    assert fmean(map(abs, gaps("rougeLsum"))) < 1.6
    assert fmean(gaps("rougeL")) < -9, "what ROUGE-1.5.5 calls L is our Lsum"
