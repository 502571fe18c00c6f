"""The paragraph follows the table: what changes there changes here, and nothing else is in it."""

import copy
import re
from typing import Any

import pytest

from makd_llm.comparison.analysis import analysis_of
from makd_llm.comparison.tables import as_csv, as_markdown, show_comparison

Found = dict[str, Any]


def group(name: str, rouge: float, perplexity: float | None, **more: Any) -> Found:
    interval = {"value": rouge, "low": rouge - 1.25, "high": rouge + 1.25}
    learns = perplexity is not None and "against" in more
    return {
        "name": name,
        "label": more.get("label", name),
        "keep_ratio": 0.5 if learns else None,
        "seeds": [0] if learns else [],
        "run": f"rows/{name}" if learns else None,
        "state": "done",
        "error": None,
        "parameters": None if perplexity is None else 81_424_704,
        "tokens": 59_000 if learns else None,
        "seconds": more.get("seconds"),
        "peak_memory_MB": 4393.0 if learns else None,
        "perplexity": perplexity,
        **{metric: dict(interval) for metric in ("rouge1", "rouge2", "rougeLsum")},
        "share_of_teacher": {"rougeLsum": rouge / 36.0},
        "against": {
            reference: {"rougeLsum": {"difference": d, "low": d - 0.5, "high": d + 0.5, "p": p}}
            for reference, (d, p) in more.get("against", {}).items()
        },
        "spread": {"perplexity": None},
    }


@pytest.fixture
def found() -> Found:
    groups = [
        group("lead-3", 22.5, None),
        group("teacher", 36.0, 9.25),
        group("kd", 30.25, 12.5, against={"tinybert": (1.0, 0.5)}, seconds=100.0),
        group("tinybert", 29.25, 13.5, against={"kd": (-1.0, 0.5)}, seconds=110.0),
        group(
            "makd",
            31.75,
            11.75,
            against={"kd": (1.5, 0.004), "tinybert": (2.5, 0.2)},
            seconds=125.0,
        ),
        group("makd-flat", 31.5, 11.5, against={"kd": (1.25, 0.3), "tinybert": (2.25, 0.3)}),
    ]
    rows = [
        {k: v for k, v in g.items() if k not in ("seeds", "spread")} | {"seed": 0} for g in groups
    ]
    settings = {"intervals": "95% bootstrap", "p": "two-sided"}
    return {
        "name": "fabricated",
        "teacher": "a teacher",
        "data": "data",
        "settings": settings,
        "rows": rows,
        "groups": groups,
        "equal_tokens": {"equal": True, "said": "Every row saw 59,000 tokens."},
    }


def of(found: Found, name: str) -> Found:
    return next(g for g in found["groups"] if g["name"] == name)


def test_it_says_what_the_table_says(found: Found) -> None:
    assert analysis_of(found) == (
        "At keep ratio 0.5 (59,000 tokens, seed 0), the scale is lead-3 22.50 and teacher 36.00 "
        "ROUGE-Lsum, and 4 rows learnt. The highest ROUGE-Lsum has makd (31.75, 30.50 to 33.00, "
        "88.2% of the teacher's), the lowest perplexity makd-flat (11.50). Against kd in ROUGE-"
        "Lsum (3 tests, adjusted), makd (+1.50) is above it and for the other 2 rows no difference "
        "is shown. Against tinybert in ROUGE-Lsum (3 tests, adjusted), no difference is shown. "
        "makd against kd: ROUGE-Lsum +1.50 (+1.00 to +2.00), better (adjusted p 0.012); "
        "perplexity 11.75 against 12.50; 1.25 times the seconds. "
        "makd against tinybert: ROUGE-Lsum +2.50 (+2.00 to +3.00), no difference is shown "
        "(adjusted p 0.450); perplexity 11.75 against 13.50; 1.14 times the seconds. "
        "Of the hierarchies, in order of ROUGE-Lsum, not tested against each other: "
        "makd 31.75 (perplexity 11.75) and makd-flat 31.50 (perplexity 11.50)."
    )


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("lead-3", ("rougeLsum", "value"), 23.75, "lead-3 23.75"),
        ("teacher", ("rougeLsum", "value"), 35.5, "teacher 35.50"),
        ("kd", ("rougeLsum", "value"), 32.75, "The highest ROUGE-Lsum has kd (32.75,"),
        ("makd", ("rougeLsum", "high"), 33.25, "30.50 to 33.25"),
        ("makd", ("share_of_teacher", "rougeLsum"), 0.875, "87.5% of the teacher's"),
        ("kd", ("perplexity",), 11.25, "the lowest perplexity kd (11.25)"),
        ("kd", ("perplexity",), 12.75, "perplexity 11.75 against 12.75"),
        ("kd", ("tokens",), 60_000, "(60,000 tokens, seed 0)"),
        ("kd", ("seeds",), [0, 1], "seeds 0 and 1, not all of them for every row)"),
        ("kd", ("seconds",), 50.0, "; 2.50 times the seconds"),
        (
            "makd",
            ("against", "kd", "rougeLsum", "p"),
            0.04,
            "(+1.00 to +2.00), no difference is shown (adjusted p 0.120)",
        ),
        (
            "makd",
            ("against", "kd", "rougeLsum", "difference"),
            -1.5,
            "+2.00), worse (adjusted p 0.012)",
        ),
        ("makd", ("against", "kd", "rougeLsum", "difference"), -1.5, "makd (-1.50) is below it"),
        ("makd", ("against", "kd", "rougeLsum", "low"), 0.25, "(+0.25 to +2.00"),
        ("makd-flat", ("against", "kd", "rougeLsum", "p"), 0.001, "makd-flat (+1.25) are above it"),
        ("makd-flat", ("rougeLsum", "value"), 31.80, "each other: makd-flat 31.80"),
    ],
)
def test_a_number_that_changes_in_the_table_changes_the_sentence(
    found: Found, name: str, path: tuple[str, ...], value: Any, words: str
) -> None:
    before = analysis_of(found)
    changed = copy.deepcopy(found)
    place = of(changed, name)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    after = analysis_of(changed)
    assert words in after and words not in before


def test_the_perplexity_is_tested_where_it_was_measured_by_document(found: Found) -> None:
    for name, p in (("makd", 0.01), ("makd-flat", 0.04)):
        test = {"difference": -0.1, "low": -0.2, "high": -0.05, "p": p}
        of(found, name)["against"]["kd"]["nats_per_token"] = test
    assert "perplexity 11.75 against 12.50, better (adjusted p 0.020); 1.25" in analysis_of(found)
    for name in ("makd", "makd-flat"):
        of(found, name)["against"]["kd"]["nats_per_token"]["p"] = 1e-4
    assert "perplexity 11.75 against 12.50, better (adjusted p <.001); 1.25" in analysis_of(found)
    of(found, "makd")["against"]["kd"]["nats_per_token"]["difference"] = 0.1
    assert "perplexity 11.75 against 12.50, worse (adjusted p <.001); 1.25" in analysis_of(found)


def test_the_full_method_is_not_held_against_itself(found: Found) -> None:
    of(found, "makd-flat")["against"]["makd"] = of(found, "makd-flat")["against"]["kd"]
    said = analysis_of(found)
    assert "Against makd in ROUGE-Lsum (1 test, adjusted), no difference is shown." in said
    assert "makd against makd" not in said


def test_what_is_missing_or_unfair_is_said(found: Found) -> None:
    found["equal_tokens"]["equal"] = False
    found["rows"][3]["state"], found["rows"][4]["state"] = "failed", "waiting"
    said = analysis_of(found)
    assert said.endswith(
        "\n\nThe rows did not see the same tokens, so they cannot be compared. "
        "1 of 6 rows failed. 1 of 6 rows is not made yet."
    )
    found["groups"] = found["groups"][:2]
    assert analysis_of(found).startswith("Nothing has been measured yet.")


def test_the_tables_hold_every_number(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    found["analysis"] = analysis_of(found)
    show_comparison(found)
    printed = capsys.readouterr().out
    markdown = as_markdown(found)
    line = next(line for line in markdown.splitlines() if line.startswith("| makd |"))
    cells = ["makd", "1", "81.42 M", "59,000", "125", "4,393", "11.75", "31.75", "31.75"]
    cells += ["31.75 (30.5-33.0)", "88.2%", "+1.50, p 0.004", "+2.50, p 0.200"]
    assert line == f"| {' | '.join(cells)} |"
    shown = next(line for line in printed.splitlines() if re.match(r"│ makd +│", line))
    assert [cell.strip() for cell in shown.strip("│").split("│")] == cells
    header, *lines = as_csv(found).splitlines()
    assert len(lines) == len(found["rows"]) + len(found["groups"])
    column = header.split(",").index("against.kd.rougeLsum.p")
    assert lines[4].split(",")[column] == "0.004"


def test_the_tables_count_the_seeds_that_failed(found: Found) -> None:
    found["analysis"] = ""
    failed = {**of(found, "makd"), "state": "failed"}
    found["groups"][found["groups"].index(of(found, "makd"))] = failed
    found["rows"] += [{**found["rows"][4], "seed": seed, "state": "failed"} for seed in (1, 2)]
    assert "| makd | 1 (2 failed) |" in as_markdown(found)
    assert "| makd-flat | 1 |" in as_markdown(found)


def test_nats_per_token_have_a_sentence_and_a_place_in_the_table(found: Found) -> None:
    for name, difference, p in (("makd", -0.031, 0.0004), ("makd-flat", 0.002, 0.7)):
        test = {"difference": difference, "low": -0.1, "high": 0.1, "p": p}
        of(found, name)["against"]["kd"]["nats_per_token"] = test
    said = analysis_of(found)
    assert (
        "Against kd in nats per token, less is better (2 tests, adjusted), makd (-0.031) is below "
        "it and for the other row no difference is shown." in said
    )
    assert "-0.031 nats, p <.001 |" in as_markdown(found | {"analysis": said})
