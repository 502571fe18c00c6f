"""Every wrong input ends in one line that says what, where and what to do, with exit code 2 and no
traceback.
"""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig

from makd_llm.checkpoint.folder import read_config
from makd_llm.checks import check_teacher
from makd_llm.cli import main
from makd_llm.config import DataConfig, RunConfig
from makd_llm.models.modeling_lowrank import lowrank_config
from makd_llm.models.origin import origin_of

ZERO3 = str(Path(__file__).resolve().parents[1] / "ds_configs" / "zero3.json")


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong call prints."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "trian"),
        (["train"], "--ds"),
        (["train", "--ds", "none.json"], "none.json: no such DeepSpeed config"),
        (["train", "--ds", ZERO3, "--config", "none.yaml"], "none.yaml: no such config file"),
        (["train", "--ds", ZERO3, "student.keep_ratio=7"], "student.keep_ratio"),
        (["train", "--ds", ZERO3, "studnet.keep_ratio=0.5"], "did you mean student?"),
        (["train", "--ds", ZERO3, "--oops"], "--oops"),
        (
            [
                *("train", "--ds", ZERO3, "--preset", "adkd"),
                "distil.objectives.attribution.second_order=exact",
            ],
            "distil.objectives.attribution.second_order is exact, which cannot be where",
        ),
        (
            ["train", "--ds", ZERO3, "--preset", "gkd", "distil.offline.top_k=8"],
            "what the student will write is in no cache",
        ),
        (["train", "--ds", ZERO3, "--preset", "mkad"], "no preset 'mkad'; did you mean makd?"),
        (
            [
                *("train", "--ds", ZERO3, "--preset", "lillama"),
                "distil.train.gradient_checkpointing=true",
            ],
            "distil.objectives.local runs parts of the student a second time",
        ),
        (
            [
                "train",
                "--ds",
                ZERO3,
                "distil.train.batch_size=7",
                "distil.train.micro_batch_size=2",
            ],
            "batch size 7",
        ),
        (["sft", "--ds", ZERO3, "run_dir=/dev/null/x", "sft.enabled=false"], "nothing to tune"),
        (["train", "--ds", ZERO3, f"data.source={__file__}"], "data.validation_source"),
        (["train", "--ds", ZERO3, "evaluation.text=/no/such.txt"], "/no/such.txt: cannot be"),
        (
            ["train", "--ds", ZERO3, "--until", "dinner"],
            "--until dinner: not one of sft, shape, factorize",
        ),
        (
            ["train", "--ds", ZERO3, "--until", "shape"],
            "student.depth, student.width and student.heads are all null",
        ),
        (["factorize", "nowhere/at/all", "--out", "o"], "nowhere/at/all: no such folder"),
        (["factorize", "x", "--out", "o", "--keep", "0"], "keep_ratio"),
        (["factorize", "x", "--out", "o", "--method", "magic"], "method"),
        (["factorize", "x", "--out", "o", "--dtype", "int3"], "--dtype int3"),
        (["factorize", "x", "--out", "o", "--window", "1"], "--window at least 2"),
        (["generate", "m", "--out", "o"], "--data is missing"),
        (["generate", "m", "--data", "d"], "--out"),
        (["generate", "nowhere/at/all", "--data", "d", "--out", "o"], "nowhere/at/all: no such"),
        (["generate", "m", "--data", "d", "--out", "o", "--method", "magic"], "method: input"),
        (
            ["generate", "m", "--data", "d", "--out", "o", "--per-document", "2"],
            "command line: greedy decoding has one summary of a document, not 2",
        ),
        (["generate", "m", "--data", "d", "--out", "o", "--endpoint", "host"], "no URL of a"),
        (["generate", "m", "--data", "d", "--out", "o", "--ds", "none.json"], "none.json: no such"),
        (["generate", "m", "--data", "d", "--out", "o", "data.x=1"], "unknown key data.x"),
        (["plan", "--teacher", "nowhere", "--ds", ZERO3], "nowhere: no model folder and no"),
        (["plan", "--teacher", "x", "--ds", ZERO3, "--gpu", "tpu"], "--gpu tpu: not one of h100"),
        (
            ["plan", "--teacher", "x", "--ds", ZERO3, "--flops", "0"],
            "--flops 0: expected a number, more than 0",
        ),
        (["plan", "--teacher", "x", "--ds", ZERO3, "--nodes", "0"], "start at 1"),
        (
            ["plan", "--teacher", "x", "--ds", ZERO3, "--batch", "7"],
            "a batch of 7 records has less than one for each of 8 ranks",
        ),
        (["evaluate", "nowhere"], "nowhere/evaluation.json: missing"),
        (["export", "nowhere", "out", "--merge"], "nowhere"),
        (["export", "nowhere", "out", "--dtype", "int3"], "--dtype int3"),
    ],
)
def test_wrong_calls(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in ended(capsys, *arguments)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("teacher.model=/no/such/folder", "/no/such/folder: no such folder"),
        ("teacher.model={tmp}/x.gguf", "x.gguf: no such file"),
        ("teacher.model={tmp}", "no config.json"),
        ("teacher.model={tmp}/mamba", "model_type"),
        ("teacher.model=builtin:gpt5", "gpt5"),
        ("run_dir={tmp}/a_file", "a_file: cannot be written"),
        ("teacher.model={tmp}/short", "short has only 128 positions"),
        ("teacher.model={tmp}/student", "is a low-rank student; make it dense first"),
    ],
)
def test_wrong_teachers_and_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, words: str
) -> None:
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    (tmp_path / "mamba" / "model.safetensors").touch()
    (tmp_path / "a_file").touch()
    for name, config in (
        ("short", LlamaConfig(max_position_embeddings=128)),
        ("student", lowrank_config(LlamaConfig(), {"model.layers.0.mlp.up_proj": 8})),
    ):
        config.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").touch()
    run_dir = f"run_dir={tmp_path / 'run'}"
    assert words in ended(capsys, "train", "--ds", ZERO3, run_dir, override.format(tmp=tmp_path))


def test_kernels_that_cannot_run_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    overrides = (f"run_dir={tmp_path / 'run'}", "distil.kernels=triton")
    said = ended(capsys, "train", "--ds", ZERO3, *overrides)
    assert "distil.kernels=triton cannot run here: the tensors are on 'cpu'" in said
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_larger_than_the_embedding(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny / "teacher", teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<picture>"])
    tokenizer.save_pretrained(teacher)
    config = RunConfig(data=DataConfig(max_length=64))
    check_teacher(teacher, config)  # as Gemma 3's token for pictures, which texts do not hold
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(teacher)
    overrides = (f"teacher.model={teacher}", f"run_dir={tmp_path / 'run'}", "data.max_length=64")
    assert "its embedding has 320 rows" in ended(
        capsys, "train", "--ds", ZERO3, *overrides, "evaluation.max_new_tokens=8"
    )


def test_a_layer_map_beyond_the_teacher_is_found_before_anything_is_cut(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    overrides = (f"teacher.model={tiny / 'teacher'}", f"run_dir={tmp_path / 'run'}")
    said = ended(capsys, "train", "--ds", ZERO3, *overrides, "distil.layer_map=[0,4]")
    assert "distil.layer_map: there is no layer 4; the teacher has layers 0 to 3" in said
    assert not (tmp_path / "run" / "stages.json").exists()


def test_a_missing_validation_split_is_found_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny / "train.jsonl", tmp_path)
    overrides = (f"teacher.model={tiny / 'teacher'}", f"data.source={tmp_path}")
    sizes = ("data.max_length=64", "evaluation.max_new_tokens=8", f"run_dir={tmp_path / 'run'}")
    said = ended(capsys, "train", "--ds", ZERO3, *overrides, *sizes)
    assert "no file for the split 'validation'" in said
    assert not (tmp_path / "run" / "stages.json").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("student.depth.layers=5", "student.depth.layers is 5, but the teacher has 4"),
        ("student.width.hidden=64", "student.width.hidden is 64, but the teacher has 32"),
        ("student.heads.key_value=3", "student.heads.key_value is 3, but the teacher has 2"),
    ],
)
def test_a_shape_that_the_teacher_cannot_get_is_found_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, override: str, words: str
) -> None:
    overrides = (f"teacher.model={tiny / 'teacher'}", f"data.source={tiny}", "data.max_length=64")
    sizes = ("evaluation.max_new_tokens=8", f"run_dir={tmp_path / 'run'}", "sft.enabled=true")
    assert words in ended(capsys, "train", "--ds", ZERO3, *overrides, *sizes, override)
    assert not (tmp_path / "run" / "stages.json").exists()


def test_shape_and_factorize_run_and_stand(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    call = [
        *("train", "--ds", ZERO3, f"teacher.model={tiny / 'teacher'}", f"data.source={tiny}"),
        *("data.max_length=64", "evaluation.max_new_tokens=8", f"run_dir={run_dir}"),
        *("sft.enabled=false", "student.rank_multiple=4", "student.calibration_records=8"),
        *("student.depth={layers: 2, choose: ild}", "student.heads.key_value=1"),
    ]
    main([*call, "--until", "shape"])
    printed = capsys.readouterr().out
    assert "shape: calibration on 8 prompts" in printed
    assert (run_dir / "shaped" / "tokenizer.json").exists()
    assert not (run_dir / "factorized").exists()
    main([*call, "--until", "factorize"])
    printed = capsys.readouterr().out
    assert f"shape: stands in {run_dir / 'shaped'}" in printed
    assert "factorize: calibration on 8 prompts" in printed
    student = read_config(run_dir / "factorized")
    origin = origin_of(student)
    assert origin is not None and origin == origin_of(read_config(run_dir / "shaped"))
    assert len(origin.layers) == student.num_hidden_layers == 2 and origin.teacher_layers == 4
    assert student.num_key_value_heads == 1
    report = json.loads((run_dir / "factorization.json").read_text())
    counts = {name: count["blocks"] for name, count in report["parameters"].items()}
    assert counts["teacher"] > counts["shaped"] > counts["student"]
    card = (run_dir / "factorized" / "README.md").read_text()
    assert "| shape | depth" in card and "not distilled yet" in card
    main([*call, "--until", "factorize"])
    printed = capsys.readouterr().out
    assert "shape: stands in" in printed and "factorize: stands in" in printed
    main([*call, "student.depth.choose=even", "--until", "factorize"])
    printed = capsys.readouterr().out
    assert "shape: runs again, because student.depth.choose changed from 'ild' to" in printed
    assert "factorize: runs again, because the stage before it changed" in printed
    main([*call[:-2], "--until", "factorize"])
    assert f"shape: {run_dir / 'shaped'} removed" in capsys.readouterr().out
    assert not (run_dir / "shaped").exists()
    assert read_config(run_dir / "factorized").num_hidden_layers == 4


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    out = tiny / "teacher" / "config.json" / "out"
    assert "cannot be written" in ended(capsys, "export", str(tiny / "teacher"), str(out))


def test_debug_shows_the_traceback() -> None:
    from makd_llm.errors import UserError

    with pytest.raises(UserError):
        main(["train", "--ds", "none.json", "--debug"])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    printed = capsys.readouterr().out
    names = ("train", "factorize", "generate", "plan", "compare", "evaluate", "export", "slurm")
    assert all(name in printed for name in names)
