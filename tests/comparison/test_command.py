"""`makd compare` where it is asked for wrongly: one line, and nothing is made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from makd_llm.cli import main


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong call prints."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("more", [["compare"], ["compare", "--dry-run"], ["slurm", "compare"]])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "ds.json: no such DeepSpeed config"),
        ('{"optimizer"', "ds.json, line 1: not JSON"),
        ('{"optimizer": {}, "zero_optimisation": {}}', "did you mean zero_optimization?"),
    ],
)
def test_what_is_wrong_with_deepspeeds_json_is_one_line(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    tmp_path: Path,
    more: list[str],
    content: str | None,
    words: str,
) -> None:
    ds, made = tmp_path / "ds.json", tmp_path / "made"
    if content is not None:
        ds.write_text(content)
    assert words in ended(capsys, *more, str(config), f"--ds={ds}", f"--folder={made}")
    assert not (made / "comparison.json").exists()


def test_it_is_also_where_the_file_names_it_and_for_the_table(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    text = config.read_text()
    (ds,) = [line for line in text.splitlines() if line.startswith("ds: ")]
    other.write_text(text.replace(ds, f"ds: {tmp_path}/none.json"))
    words = ended(capsys, "compare", str(other), f"--folder={tmp_path}", "--collect")
    assert "none.json: no such DeepSpeed config" in words


@pytest.mark.parametrize("more", [["compare"], ["compare", "--dry-run"], ["slurm", "compare"]])
@pytest.mark.parametrize("place", ["a_file", "a_file/below"])
def test_a_folder_that_is_a_file_is_one_line(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path, more: list[str], place: str
) -> None:
    (tmp_path / "a_file").write_text("kept")
    said = ended(capsys, *more, str(config), f"--folder={tmp_path / place}")
    assert f"{place}: {tmp_path / 'a_file'} is no folder; name another" in said
    assert (tmp_path / "a_file").read_text() == "kept"


def test_a_table_of_a_folder_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    said = ended(capsys, "compare", str(config), "--collect", f"--folder={tmp_path / 'typo'}")
    assert "typo: not there, so nothing is to be collected" in said
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--row", "0", "--prepare", "--collect"], "--row and --prepare and --collect: each is"),
        (["--prepare", "--dry-run"], "--prepare and --dry-run: each is all that a call does"),
        (["--keep", "a"], "--keep a: expected numbers that commas part, as 0.5,0.3"),
        (["--seeds", "0;1"], "--seeds 0;1: expected numbers that commas part, as 0,1"),
    ],
)
def test_wrong_options_are_named(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    tmp_path: Path,
    options: list[str],
    words: str,
) -> None:
    folder = f"--folder={tmp_path}"
    assert words in ended(capsys, "compare", str(config), folder, *options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["compare", "plan", "doctor"])
def test_nothing_but_json_is_printed_where_json_is_asked_for(
    config: Path, tiny: Path, tmp_path: Path, command: str
) -> None:
    """DeepSpeed has a word on machines without a GPU, and says it on standard output."""
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    ds = Path(__file__).parents[2] / "ds_configs" / "zero3.json"
    call = {
        "compare": ["compare", str(config), f"--folder={tmp_path}", "--collect", "--json"],
        "plan": [
            "plan",
            f"--teacher={tiny / 'teacher'}",
            f"--ds={ds}",
            "--seq=32",
            "--rank-multiple=4",
            "--json",
        ],
        "doctor": ["doctor", f"--runs={tmp_path}", "--json"],
    }[command]
    done = subprocess.run(
        [sys.executable, "-m", "makd_llm.cli", *call],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert {"name", "job", "findings"} & json.loads(done.stdout).keys()
