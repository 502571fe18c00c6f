"""Two runs' students against each other: what is printed, and which runs cannot be compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from makd_llm.cli import main
from makd_llm.evaluation.against import STUDENT, scores_of
from makd_llm.evaluation.measured import Measured, write_measured
from makd_llm.evaluation.rouge import METRICS

KEY = {"model": "a", "dtype": "torch.float32", "evaluation": {"records": 3}, "content": "sha256 1"}


def student(nats: Sequence[float], rouge: Sequence[float]) -> Measured:
    """Four tokens a document, one of three."""
    perplexity = {"value": 3.0, "nats": sum(nats), "tokens": 12}
    scores = {**{metric: list(rouge) for metric in METRICS}, "nats": list(nats)}
    return Measured({"perplexity": perplexity}, ["a text"] * 3, scores)


def leave(run_dir: Path, measured: Measured, **changed: Any) -> Path:
    run_dir.mkdir()
    write_measured(run_dir / STUDENT, KEY | changed, measured)
    return run_dir


def test_the_differences_of_two_students(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models, and the precision they were measured in, may differ."""
    one = leave(tmp_path / "one", student([4.0, 8.0, 6.0], [30.0, 20.0, 40.0]))
    rival = student([5.0, 8.0, 8.0], [30.0, 23.0, 40.0])
    other = leave(tmp_path / "other", rival, model="b", dtype="torch.bfloat16")
    main(["evaluate", str(one), "--against", str(other), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["nats_per_token"]["difference"] == pytest.approx((18 - 21) / 12)
    assert found["rougeLsum"]["difference"] == pytest.approx(-1.0)
    assert found["rougeLsum"]["low"] <= -1.0 <= found["rougeLsum"]["high"]
    main(["evaluate", str(one), "--against", str(other)])
    printed = capsys.readouterr().out
    assert "-0.250" in printed and f"p {found['nats_per_token']['p']:.3f}" in printed


def test_the_mean_of_nats_is_that_of_all_tokens() -> None:
    (nats_SN,) = (scores_of([student([4.0, 8.0, 6.0], [1.0] * 3)])["nats_per_token"],)
    assert nats_SN.shape == (1, 3) and nats_SN.mean() == pytest.approx(18 / 12)


def test_runs_that_were_measured_differently_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = student([1.0] * 3, [1.0] * 3)
    one = leave(tmp_path / "one", measured)
    other = leave(tmp_path / "other", measured, content="sha256 2", evaluation={"records": 4})
    for second, words in (
        (other, "were measured differently (evaluation, content); measure both"),
        (tmp_path / "none", "none/measured/student.json: not there, or damaged; run `makd train`"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(one), "--against", str(second)])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
