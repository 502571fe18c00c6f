"""The tables say what the JSON files hold, also where a row has no size or no perplexity."""

import math
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from makd_llm.report.table import (
    evaluation_table,
    factorization_table,
    rank_table,
    stages_table,
    steps_of,
)


def printed(table: Table) -> list[str]:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_evaluation() -> None:
    rouge = {"rouge1": 28.215, "rouge2": 6.6, "rougeL": 22.4, "rougeLsum": 22.5}
    evaluation: dict[str, Any] = {
        "records": {"perplexity": 24, "rouge": 12},
        "prompt": "the prompt's rule",
        "rouge_settings": "stemmed",
        "models": {
            "student": {
                "parameters": {"total": 81_341_568, "blocks": 53_030_000, "factorized": 1},
                "perplexity": {"value": 48.149},
                "rouge": rouge,
            },
            "lead-1": {"rouge": rouge},
        },
    }
    lines = printed(evaluation_table(evaluation))
    assert "perplexity over 24 references, ROUGE over 12 summaries" in lines[0]
    rows = [cells(line) for line in lines if line.startswith("│")]
    assert rows == [
        ["student", "81.34 M", "53.03 M", "48.15", "28.21", "6.60", "22.40", "22.50"],
        ["lead-1", "", "", "", "28.21", "6.60", "22.40", "22.50"],
    ]
    assert "the prompt's rule" in lines[-2] and "ROUGE: stemmed" in lines[-1]


def test_factorization() -> None:
    matrices = [
        {"role": role, "rows": 4, "columns": 6, "rank": rank, "residual": residual}
        for role, rank, residual in (("q", 2, 0.1), ("q", 3, 0.3), ("up", None, 0.0))
    ]
    parameters = {
        "teacher": {"blocks": 2_000_000, "total": 3_000_000},
        "student": {"blocks": 1_000_000, "total": 2_000_000},
    }
    report = {"matrices": matrices, "parameters": parameters}
    lines = printed(factorization_table(report))
    assert [cells(line) for line in lines if line.startswith("│")] == [
        ["q", "2", "0", "4 x 6", "2-3", "0.100", "0.200", "0.300"],
        ["up", "1", "1", "4 x 6", "-", "0.000", "0.000", "0.000"],
    ]
    caption = " ".join(lines[-2:])
    assert "blocks 2.00 M -> 1.00 M" in caption and "2,000,000 stored" in caption
    held_out = {
        "perplexity": {"teacher": 17.123, "student": 60.0},
        "tokens": 4096,
        "data": "test.txt",
        "matrix_residuals": [0.2, 0.4, 0.0],
    }
    lines = printed(factorization_table(report | {"held_out": held_out}))
    assert [cells(line)[-1] for line in lines if line.startswith("│")] == ["0.300", "0.000"]
    assert "17.12 -> 60.00 over 4,096 tokens of test.txt" in " ".join(lines)


def test_what_a_step_won_back_is_a_share_of_what_the_first_lost() -> None:
    stages = {
        "teacher": 10.0,
        "svd": 10.0 * math.e**4,
        "whitened": 10.0 * math.e,
        "distilled": 10.0,
    }
    steps = steps_of(stages)
    assert [s.above_teacher for s in steps] == pytest.approx([0.0, 4.0, 1.0, 0.0])
    assert [s.recovered for s in steps[:2]] == [None, None]
    assert [s.recovered for s in steps[2:]] == pytest.approx([0.75, 0.25])
    with_shape = dict([("teacher", 10.0), ("shaped", 11.0), *[*stages.items()][1:]])
    shares = [s.recovered for s in steps_of(with_shape)]
    assert shares == [None, None, None, pytest.approx(0.75), pytest.approx(0.25)]
    nothing_lost = {"teacher": 10.0, "svd": 10.0, "whitened": 10.0}
    assert [s.recovered for s in steps_of(nothing_lost)] == [None] * 3
    lines = printed(stages_table(stages))
    assert any("whitened" in line and "75.0%" in line for line in lines)


def test_experts_of_a_layer_stand_together() -> None:
    matrices = [
        {"layer": 0, "role": role, "rows": rows, "columns": 6, "rank": rank, "residual": 0.5}
        for role, rows, rank in (("q", 4, 2), ("up", 4, 1), ("up", 4, 3), ("up", 8, None))
    ]
    lines = printed(rank_table({"matrices": matrices}))
    assert [cells(line) for line in lines if line.startswith("│")] == [["0", "2", "1-3"]]
    count = {"blocks": 2_000_000, "total": 3_000_000}
    held_out = {
        "perplexity": {"teacher": 17.0, "student": 60.0},
        "tokens": 4096,
        "data": "test.txt",
        "matrix_residuals": [None, 0.2, None, 0.4],
        "layer_residuals": [0.3],
    }
    report = {
        "matrices": matrices,
        "parameters": {"teacher": count, "student": count},
        "held_out": held_out,
    }
    table = [cells(line) for line in printed(factorization_table(report)) if line.startswith("│")]
    assert [row[-1] for row in table] == ["-", "0.300"], "unmeasured ones do not count"
    assert table[1][3] == "4 x 6, 8 x 6"
