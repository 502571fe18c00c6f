"""`makd plan` as a command: what it prints, and what it says of bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from makd_llm.cli import main
from makd_llm.errors import UserError
from makd_llm.planning import build_job
from makd_llm.testing import tiny_config

DS = Path(__file__).parents[1] / "ds_configs"
ZERO3 = DS / "zero3.json"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    tiny_config("llama").to_json_file(path, use_diff=False)
    return path


@pytest.fixture
def call(teacher: Path) -> list[str]:
    return [
        *("plan", "--teacher", str(teacher), "--ds", str(ZERO3), "--nodes", "8", "--gpus", "8"),
        *("--batch", "64", "--seq", "32", "--keep", "0.5", "--rank-multiple", "1"),
    ]


def test_the_command(call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    main([*call, "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert "teacher weights" in printed and "tokens a day" in printed
    assert "micro-batch: 1 record, 1 a step; the largest that fits as it is: " in printed
    assert "plan it with --preset finetune" in printed
    assert picture.stat().st_size > 1000
    main([*call, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["memory"]["peak"] == sum(
        found["memory"]["device"][found["memory"]["moment"]].values()
    )
    assert len(found["scaling"]) == 11
    main([*call, "--preset", "adkd"])
    assert "runs both models again on some steps" in capsys.readouterr().out


def test_where_nothing_fits_it_says_so(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*call, "--memory", "0.000001"])
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "none, not even one record" in printed


def test_tuning_the_teacher_is_planned_as_a_student_of_its_own(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = build_job(teacher, ZERO3, preset="finetune", student=teacher, length=32)
    assert found.teacher is None and found.student.ranks == (0, 0)
    main(
        [
            *("plan", "--teacher", str(teacher), "--student", str(teacher), "--ds", str(ZERO3)),
            *("--preset", "finetune", "--seq", "32"),
        ]
    )
    assert "Adam's moments" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rank-multiple", "0"], "--rank-multiple 0: expected 1 or more"),
        (["--rank-multiple", "-3"], "--rank-multiple -3: expected 1 or more"),
        (["--keep", "0"], "--keep 0: expected a share"),
        (["--memory", "nan"], "--memory nan: expected a number"),
        (["--link", "inf"], "--link inf: expected a number"),
        (
            ["--plot", "no-such-folder/a.png"],
            "--plot no-such-folder/a.png: name a .png in a folder that is there",
        ),
        (["--plot", "."], "--plot .: name a .png"),
        (["--batch", "8"], "a batch of 8 records has less than one for each of 64 ranks"),
        (["--batch", "96"], "choose a batch size that the ranks can share"),
        (["--seq", "4096"], "--seq is 4096, but .* has only .* positions"),
        (["--student", "."], "leave them out, or --student"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], said: str, call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    with pytest.raises(SystemExit) as ended:
        main([*call, *more])
    assert ended.value.code == UserError.exit_code
    error = capsys.readouterr().err.strip()
    assert re.search(said, error) and len(error.splitlines()) == 1


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    tiny_config("mixtral").to_json_file(config, use_diff=False)
    with pytest.raises(UserError, match="a mixture of experts"):
        build_job(config, ZERO3, rank_multiple=1, length=32)


def test_buffers_for_nvme_have_room_for_the_largest_shard(teacher: Path, tmp_path: Path) -> None:
    given = json.loads((DS / "zero3_nvme.json").read_text())
    given["zero_optimization"]["offload_param"]["buffer_size"] = 1000
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps(given))
    with pytest.raises(UserError, match=r"offload_param.buffer_size is 1000, but .* shard is"):
        build_job(teacher, ds, rank_multiple=1, length=32)
