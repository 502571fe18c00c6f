"""A student's card says what its files say, and nothing of the machine it was made on."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from makd_llm.models import provenance
from makd_llm.models.provenance import license_of_data, provenance_of, public_name
from makd_llm.report.card import merged_card, student_card

REPORT: dict[str, Any] = {
    "teacher": "builtin:smollm2-135m-instruct",
    "recipe": {
        "keep_ratio": 0.5,
        "method": "fisher",
        "budget": "greedy",
        "rank_multiple": 16,
        "refine": None,
        "embedding": None,
    },
    "shape": {},
    "calibration": {"data": "builtin:aclsum", "tokens": 7271},
    "matrices": [
        {"role": "q", "rank": 16},
        {"role": "q", "rank": 96},
        {"role": "v", "rank": None},
    ],
    "parameters": {
        "teacher": {"blocks": 90, "total": 1000, "factorized": 80},
        "student": {"blocks": 50, "total": 600, "factorized": 40},
    },
}
EVALUATION: dict[str, Any] = {
    "records": {"perplexity": 16, "rouge": 8},
    "prompt": "window 384 tokens",
    "perplexity_rule": "of the reference",
    "generation": "greedy, at most 40 new tokens",
    "models": {
        "teacher": {
            "parameters": {"total": 1000},
            "perplexity": {"value": 22.254},
            "rouge": {"rouge1": 30.368, "rougeLsum": 21.174},
        },
        "student": {
            "parameters": {"total": 600},
            "perplexity": {"value": 43.674},
            "rouge": {"rouge1": 26.692, "rougeLsum": 20.481},
        },
        "lead-1": {"rouge": {"rouge1": 23.858, "rougeLsum": 18.103}},
    },
}


def card_of(**changes: Any) -> ModelCard:
    return ModelCard(
        student_card(
            REPORT | changes,
            distilled={"preset": "makd", "steps": "10 of 8 records"},
            data="builtin:aclsum",
            evaluation=EVALUATION,
        )
    )


def test_what_the_hub_reads() -> None:
    data = card_of().data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.license == "apache-2.0"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found == {"perplexity": 43.67, "ROUGE-1": 26.69, "ROUGE-Lsum": 20.48}
    assert {result.dataset_split for result in data.eval_results} == {"validation"}


def test_what_people_read() -> None:
    text = card_of().text
    assert "600 of 1,000 (60.0%)" in text and "keep_ratio 0.5" in text
    assert "| q | 2 | 0 | 16 to 96 |" in text and "| v | 1 | 1 | - |" in text
    assert "| student | 600 | 43.67 | 26.69 | 20.48 |" in text
    assert "| lead-1 |  |  | 23.86 | 18.10 |" in text
    assert "| data | builtin:aclsum; license: MIT |" in text
    assert "ROUGE-2" not in text  # was not measured
    for section in ("How to load it", "Limitations", "License"):
        assert f"## {section}" in text


def test_only_what_was_measured_is_said() -> None:
    card = ModelCard(student_card(REPORT))
    assert card.data.eval_results is None
    assert "not distilled yet" in card.text and "Nothing yet." in card.text
    assert "| distilled" not in card.text and "ROUGE" not in card.text
    held_out = {
        "perplexity": {"student": 30.0, "teacher": 20.0},
        "tokens": 1234,
        "data": "/home/somebody/other.txt",
    }
    card = ModelCard(student_card(REPORT | {"held_out": held_out}))
    assert "perplexity 30.00 (teacher 20.00) over 1,234 tokens of other.txt" in card.text


def test_no_path_of_the_machine_is_in_a_card(tmp_path: Path) -> None:
    calibration = {"data": str(tmp_path / "news"), "tokens": 5}
    card = student_card(
        REPORT | {"teacher": str(tmp_path / "teacher"), "calibration": calibration},
        distilled={"preset": "kd"},
        data=str(tmp_path / "news"),
        evaluation=EVALUATION,
    )
    assert str(tmp_path) not in card
    assert "5 tokens of news" in card and "| teacher | teacher |" in card
    assert "states no license that was found" in card


def test_the_merged_form_has_a_card_of_its_own() -> None:
    card = ModelCard(merged_card(str(card_of())))
    assert card.data.tags == ["makd-llm"] and card.data.license == "apache-2.0"
    assert len(card.data.eval_results) == 3
    assert "# A low-rank student, its factors multiplied out, of SmolLM2-135M-Instruct" in card.text
    assert "trust_remote_code" not in card.text
    assert 'pipeline("text-generation", model="FOLDER")' in card.text


def test_a_card_that_somebody_has_rewritten_stays() -> None:
    assert merged_card("Notes of mine.").endswith("Notes of mine.\n")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: mit", {"license": "mit"}),
        (
            "license: other\nlicense_name: llama3\nlicense_link: LICENSE",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("tags: [a]", {"license": "unknown"}),
        ("license: [mit, apache-2.0]", {"license": "unknown"}),
    ],
)
def test_the_license_is_what_the_teachers_card_says(
    tmp_path: Path, metadata: str, expected: dict[str, str]
) -> None:
    assert provenance_of(str(tmp_path)).license == {"license": "unknown"}
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n\n# A teacher\n")
    assert provenance_of(str(tmp_path)).license == expected
    card = ModelCard(student_card(copy.deepcopy(REPORT) | {"teacher": str(tmp_path)}))
    assert {name: card.data[name] for name in expected} == expected


def test_a_hub_model_is_looked_up_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "try_to_load_from_cache", lambda model, name: None)
    assert provenance_of("owner/name").license == {"license": "unknown"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    kept = str(tmp_path / "README.md")
    monkeypatch.setattr(provenance, "try_to_load_from_cache", lambda model, name: kept)
    found = provenance_of("owner/name")
    assert (found.hub_id, found.license) == ("owner/name", {"license": "mit"})


def test_the_license_in_a_gguf_file(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    for name, license in (("with", "apache-2.0"), ("without", None)):
        writer = GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        if license:
            writer.add_license(license)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = provenance_of(str(tmp_path / f"{name}.gguf"))
        assert found.license == {"license": license or "unknown"}
        assert found.name == f"{name}.gguf"


def test_names_as_a_card_shows_them(tmp_path: Path) -> None:
    assert public_name("builtin:aclsum") == "builtin:aclsum"
    assert public_name("owner/name") == "owner/name"
    assert public_name(str(tmp_path / "a" / "b.jsonl")) == "b.jsonl"
    assert license_of_data("builtin:aclsum") == "MIT"
    assert license_of_data("owner/name") == "unknown"


def test_the_report_is_not_changed() -> None:
    before = json.dumps(REPORT)
    card_of()
    assert json.dumps(REPORT) == before
