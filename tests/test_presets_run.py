"""Every preset through the command, in one run folder: the student is cut once and learns anew."""

import json
from pathlib import Path

import pytest

from makd_llm.cli import main
from makd_llm.config.presets import preset_names

pytestmark = pytest.mark.slow

ZERO3 = str(Path(__file__).resolve().parents[1] / "ds_configs" / "zero3.json")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets") / "run"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", preset_names())
def test_two_steps_of_it(
    tiny: Path, run_dir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    student = ["sequences.student.max_new_tokens=6", "sequences.student.adaptive=null"]
    writing = ["sequences.generation.max_new_tokens=6"]
    given = {"gkd": student, "distillm": student, "minillm": student, "seqkd": writing}
    main(
        [
            *("train", "--ds", ZERO3, "--preset", name, "--until", "distil"),
            *(f"teacher.model={tiny / 'teacher'}", f"data.source={tiny}", f"run_dir={run_dir}"),
            *("sft.enabled=false", "data.max_length=48", "evaluation.max_new_tokens=8"),
            *("student.rank_multiple=4", "student.calibration_records=8"),
            *("distil.train.steps=2", "distil.train.batch_size=4"),
            *(f"distil.{setting}" for setting in given.get(name, ())),
        ]
    )
    said = capsys.readouterr().out
    assert ("factorize: stands" in said) == (name != preset_names()[0])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["skipped_steps"] == 0 and line["gradient_norm"] > 0
        assert line["loss"] == pytest.approx(line["loss"]) and line["peak_memory_MB"] > 0
    assert (run_dir / "student" / "model.safetensors").is_file()
