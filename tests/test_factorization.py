"""`makd factorize`: a student from a teacher and a text, what it says, and how it refuses."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import makd_llm  # noqa: F401  (makes the Auto classes know the student)
from makd_llm.cli import main
from makd_llm.testing import environment_alone, tiny_config


@pytest.fixture
def text(tiny: Path) -> Path:
    words = [json.loads(line)["document"] for line in (tiny / "train.jsonl").open()]
    (tiny / "text.txt").write_text("\n".join(words) * 3, encoding="utf-8")
    return tiny / "text.txt"


@pytest.fixture
def held_out(tiny: Path) -> Path:
    words = [json.loads(line)["document"] for line in (tiny / "validation.jsonl").open()]
    (tiny / "held-out.txt").write_text("\n".join(reversed(words)) * 3, encoding="utf-8")
    return tiny / "held-out.txt"


def call(tiny: Path, out: Path, *more: str) -> None:
    sizes = ("--rank-multiple", "2", "--window", "32", "--samples", "16", "--dtype", "float32")
    main(["factorize", str(tiny / "teacher"), "--out", str(out), *sizes, *more])


@pytest.mark.parametrize("kind", ["text", "records"])
def test_a_student_and_its_report(
    kind: str,
    tiny: Path,
    text: Path,
    held_out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, other = (text, held_out) if kind == "text" else (tiny, tiny)  # a folder's two splits
    out, given = tmp_path / "student", ("--data", str(data), "--held-out", str(other))
    call(tiny, out, *given, "--keep", "0.6", "--budget", "greedy")
    shown = capsys.readouterr().out
    assert "factorized matrices" in shown and "held-out perplexity" in shown
    report = json.loads((out / "factorization.json").read_text())
    count = report["parameters"]
    assert count["student"]["factorized"] <= 0.6 * count["teacher"]["factorized"]
    assert len(report["matrices"]) == 28 == len(report["held_out"]["matrix_residuals"])
    assert len(report["held_out"]["layer_residuals"]) == 4
    assert report["recipe"]["budget"] == "greedy" and report["calibration"]["tokens"] > 100
    assert len(AutoTokenizer.from_pretrained(out)) == len(
        AutoTokenizer.from_pretrained(tiny / "teacher")
    )
    AutoModelForCausalLM.from_pretrained(out)


def test_stages_tell_what_each_step_is_worth(
    tiny: Path,
    text: Path,
    held_out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, given = tmp_path / "student", ("--data", str(text), "--held-out", str(held_out))
    call(tiny, out, *given, "--stages", "--refine", "1")
    assert "what each step is worth" in capsys.readouterr().out
    report = json.loads((out / "factorization.json").read_text())
    stages = report["held_out"]["stages"]
    assert [*stages] == [
        "teacher",
        "svd",
        "whitened",
        "fisher, greedy",
        "fisher, greedy + refinement",
    ]
    found = report["held_out"]["perplexity"]
    assert (stages["teacher"], [*stages.values()][-1]) == (found["teacher"], found["student"])
    assert len(set(stages.values())) == 5
    assert "fisher, greedy + refinement" in (out / "report.html").read_text()
    assert not (tmp_path / ".student.stages").exists()
    call(tiny, out, *given, "--stages", "--refine", "1")  # over what stands there
    # A rung is what its recipe alone makes.
    call(tiny, tmp_path / "whitened", *given, "--method", "whitened", "--budget", "uniform")
    alone = json.loads((tmp_path / "whitened" / "factorization.json").read_text())
    assert alone["held_out"]["perplexity"]["student"] == pytest.approx(stages["whitened"])


def test_a_mixture_of_experts_with_experts_that_the_held_out_text_does_not_reach(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = tiny_config("qwen2_moe")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "teacher")
    config.vocab_size, config.num_experts, config.num_experts_per_tok = len(tokenizer), 16, 1
    config.initializer_range = 0.2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "short.txt").write_text("the cat sat on a mat", encoding="utf-8")
    options = {
        "--out": str(tmp_path / "student"),
        "--data": str(text),
        "--held-out": str(tmp_path / "short.txt"),
        "--rank-multiple": "2",
        "--window": "4",
        "--samples": "64",
        "--dtype": "float32",
        "--method": "fisher",
    }
    main(["factorize", str(tmp_path / "teacher"), *(w for pair in options.items() for w in pair)])
    assert "held-out mean" in capsys.readouterr().out
    report = json.loads((tmp_path / "student" / "factorization.json").read_text())
    measured = report["held_out"]["matrix_residuals"]
    keys = [m["key"] for m in report["matrices"]]
    assert len(keys) == 7 + 4 + 3 * 17 and keys[-1] == "down.shared"
    unmeasured = {key for key, residual in zip(keys, measured, strict=True) if residual is None}
    assert unmeasured and all(key.rpartition(".")[2].isdigit() for key in unmeasured)
    assert "down.shared" not in (tmp_path / "student" / "report.html").read_text(), "by role"
    AutoModelForCausalLM.from_pretrained(tmp_path / "student")


def test_json_is_the_report(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(tiny, tmp_path / "student", "--method", "svd", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "student" / "factorization.json").read_text())
    assert "held_out" not in shown and shown["calibration"]["tokens"] == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "--data is missing: method fisher needs text"),
        (["--data", "none.txt"], "--data none.txt: not readable"),
        (["--data", "TEXT", "--window", "999"], "has only 128 positions"),
        (["--data", "TEXT", "--samples", "1"], "32 tokens cannot fill the covariance of 48"),
        (["--data", "TEXT", "--stages"], "name a text for it in --held-out"),
        (["--data", "TEXT", "--keep", "0.01"], "keep_ratio 0.01 cannot be met"),
        (["--data", "TEXT", "--held-out", "TEXT"], "is the file that --data calibrates on"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    more: list[str],
    says: str,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(tiny, tmp_path / "student", *[str(text) if m == "TEXT" else m for m in more])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "student").exists()


def refused(capsys: pytest.CaptureFixture[str], tiny: Path, out: Path, *more: str) -> str:
    """What a call says that ends with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(tiny, out, *more)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_disk_that_fills_leaves_no_student(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from makd_llm.checkpoint import folder

    def full(*given: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "save_file", full)
    said = refused(capsys, tiny, tmp_path / "student", "--data", str(text))
    assert "No space left on device" in said
    assert not (tmp_path / "student").exists()
    monkeypatch.undo()
    call(tiny, tmp_path / "student", "--data", str(text))
    assert "goes on from 28 parts" in capsys.readouterr().err
    assert (tmp_path / "student" / "model.safetensors").exists()


def test_records_that_are_held_out_are_of_the_validation_split(tiny: Path, tmp_path: Path) -> None:
    from makd_llm.factorization import TextSettings, _batches
    from makd_llm.models.source import load_tokenizer

    rows = [json.loads(line) for line in (tiny / "validation.jsonl").open()]
    kept = [json.dumps({**row, "id": f"v{row['id']}"}) for row in rows]
    for split in ("train", "validation"):
        lines = kept if split == "validation" else (tiny / "train.jsonl").read_text().splitlines()
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    settings = TextSettings(str(tmp_path), str(tmp_path), 8, 64, 4)
    tokenizer = load_tokenizer(tiny / "teacher")
    ids = {}
    for key in ("--data", "--held-out"):
        batches = _batches(str(tmp_path), key, settings, tokenizer)
        ids[key] = {i for batch in batches for i in batch.record_ids}
    assert len(ids["--data"]) == 8 == len(ids["--held-out"])
    assert all(i.startswith("v") for i in ids["--held-out"])
    assert not any(i.startswith("v") for i in ids["--data"])


def test_a_call_that_ended_before_its_report_goes_on_there(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is full when the report is written: nothing half-written, and nothing done twice."""
    from makd_llm import files

    whole = Path.write_text

    def full(path: Path, *given: str, **more: str) -> int:
        if "factorization.json" in path.name:
            whole(path, "half", encoding="utf-8")
            raise OSError(28, "No space left on device")
        return whole(path, *given, **more)

    monkeypatch.setattr(files.Path, "write_text", full)
    assert "No space left" in refused(capsys, tiny, tmp_path / "student", "--data", str(text))
    monkeypatch.undo()
    assert not list((tmp_path / "student").glob("*factorization.json*"))
    assert not list((tmp_path / "student").glob(".writing*"))
    call(tiny, tmp_path / "student", "--data", str(text))
    assert "goes on from 28 parts" in capsys.readouterr().err
    assert (tmp_path / "student" / "factorization.json").exists()
    assert not (tmp_path / ".student.parts").exists()


def test_a_tokenizer_that_finds_the_disk_full_is_one_line(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import PreTrainedTokenizerFast

    def full(*given: object, **more: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    assert "No space left" in refused(capsys, tiny, tmp_path / "student", "--data", str(text))
    assert not (tmp_path / "student").exists()


def test_ctrl_c_ends_with_75(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Sent as soon as the first layer is done."""
    command = [sys.executable, "-m", "makd_llm.cli", "factorize", str(tiny / "teacher")]
    command += ["--out", str(tmp_path / "student"), "--data", str(text), "--samples", "2000"]
    command += ["--window", "128", "--method", "sequential", "--budget", "uniform"]
    command += ["--rank-multiple", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment_alone())
    parts = tmp_path / ".student.parts" / "factors"
    deadline = time.monotonic() + 120
    while not list(parts.glob("*.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "the same command goes on" in said, said
    assert not (tmp_path / "student").exists()


def test_a_low_rank_student_is_no_teacher(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(tiny, tmp_path / "student", "--method", "svd", "--budget", "uniform")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        out = ("--out", str(tmp_path / "again"), "--method", "svd")
        main(["factorize", str(tmp_path / "student"), *out])
    assert ended.value.code == 2
    assert "is a low-rank student; make it dense first" in capsys.readouterr().err


@pytest.mark.parametrize("declared", [True, False])
def test_quantized_weights_are_refused(
    declared: bool, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have scales beside them, without which they are no weights."""
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    if declared:
        path = tmp_path / "teacher" / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    else:
        path = tmp_path / "teacher" / "model.safetensors"
        tensors = load_file(path)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SystemExit) as ended:
        out = ("--out", str(tmp_path / "student"), "--method", "svd", "--rank-multiple", "2")
        main(["factorize", str(tmp_path / "teacher"), *out])
    assert ended.value.code == 2
    words = "quantized (fp8)" if declared else "stored as float8_e4m3fn"
    assert words in capsys.readouterr().err
    assert not (tmp_path / "student").exists()
