"""What is read from the runs, and whether they may be compared at all."""

from dataclasses import replace

from makd_llm.comparison.grid import Row
from makd_llm.comparison.reading import Found
from makd_llm.comparison.results import equal_tokens


def found(name: str, seed: int, tokens: list[int]) -> Found:
    return Found(Row(name, name, None, 0.5, seed, None), "done", tokens=tokens)


def test_tokens_are_equal_step_by_step_within_a_seed() -> None:
    rows = [found("kd", 0, [10, 12]), found("makd", 0, [10, 12]), found("kd", 1, [11, 9])]
    fair = equal_tokens(rows)
    assert fair["equal"] is True
    assert fair["said"].startswith("Every row saw 20 or 22 tokens in 2 steps")
    lead = Found(Row("lead-3", "lead-3", "lead", None, None, None), "done")
    assert equal_tokens([lead, *rows]) == fair


def test_other_batches_are_told_also_where_the_sums_agree() -> None:
    rows = [found("kd", 0, [10, 12]), found("makd", 0, [12, 10]), found("kd", 1, [1, 1])]
    unfair = equal_tokens(rows)
    assert unfair["equal"] is False
    assert unfair["said"] == "TOKENS DIFFER: makd-keep0.5-seed0 saw 22, kd-keep0.5-seed0 22."
    rows.append(replace(rows[2], row=replace(rows[2].row, name="makd"), tokens=[1, 2]))
    assert equal_tokens(rows)["said"].endswith("22, and 1 more differ.")


def test_nothing_has_learnt_yet() -> None:
    assert equal_tokens([]) == {"equal": None, "said": "No row has learnt yet."}
