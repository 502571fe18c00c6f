"""A run whose teacher speaks once: it is not loaded while the student learns, another run may learn
from what it wrote, and what does not fit is refused in one line.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from makd_llm.cli import main
from makd_llm.offline.manifest import read_manifest
from makd_llm.testing import environment_alone

pytestmark = pytest.mark.slow

ZERO3 = str(Path(__file__).resolve().parents[1] / "ds_configs" / "zero3.json")
HIDDEN = "distil.objectives.hidden={layers: [middle, last], weight: 0.5}"


def call(tiny: Path, run_dir: Path, *more: str, until: str = "distil") -> list[str]:
    return [
        *("train", "--ds", ZERO3, "--preset", "kd", "--until", until, "--debug"),
        *(f"teacher.model={tiny / 'teacher'}", f"data.source={tiny}", f"run_dir={run_dir}"),
        *(
            "sft.enabled=false",
            "data.max_length=48",
            "evaluation.max_new_tokens=8",
            "evaluation.records=4",
        ),
        *("evaluation.generate_records=2", "student.rank_multiple=4"),
        *("student.calibration_records=8", "distil.train.steps=3", "distil.train.batch_size=4"),
        *("distil.offline.top_k=16", HIDDEN, *more),
    ]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a wrong call prints."""
    with pytest.raises(SystemExit) as caught:
        main([argument for argument in arguments if argument != "--debug"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


WATCHED = """
import sys
from makd_llm import cli, pipeline
load = pipeline.load_sharded
def watched(folder, *more):
    print("loaded", folder.name, flush=True)
    return load(folder, *more)
pipeline.load_sharded = watched
cli.main(sys.argv[1:])
"""


def run(arguments: list[str]) -> str:
    """What a run in a process of its own printed, with a line for every model that was loaded."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    ours = environment_alone()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        capture_output=True,
        text=True,
        env=ours | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run, and what it printed."""
    run_dir = tmp_path_factory.mktemp("offline") / "run"
    return run_dir, run(call(tiny, run_dir))


def test_the_teacher_is_not_loaded_while_the_student_learns(finished: tuple[Path, str]) -> None:
    run_dir, printed = finished
    taught = printed.index("teach: 40 records")
    assert printed.count("loaded ") == 2
    assert taught < printed.index("loaded teacher") < printed.index("bytes per summary token")
    read = printed.index(f"the teacher is read from {run_dir / 'teacher-cache'}")
    assert read < printed.index("loaded factorized")
    assert (run_dir / "student" / "model.safetensors").exists()
    manifest = read_manifest(run_dir / "teacher-cache")
    assert manifest.hidden == (1, 3) and manifest.top_k == 16 and manifest.temperatures == (1.0,)
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    for name in ("hidden", "cross_entropy", "logits"):
        assert all(entry[f"loss/{name}"] > 0 for entry in steps)


def test_its_stages_stand_and_run_again_for_a_reason(
    tiny: Path, finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "again"
    shutil.copytree(finished[0], run_dir)
    main(call(tiny, run_dir, "distil.offline.batch_size=3"))
    printed = capsys.readouterr().out
    assert f"teach: stands in {run_dir / 'teacher-cache' / 'manifest.json'}" in printed
    assert "distil: stands in" in printed
    main(call(tiny, run_dir, "student.keep_ratio=0.4", until="teach"))
    printed = capsys.readouterr().out
    assert "factorize: runs again" in printed and "teach: stands in" in printed
    printed = run(call(tiny, run_dir, "distil.offline.top_k=8"))
    assert "teach: runs again, because offline.top_k changed from 16 to 8" in printed
    assert "distil: runs again, because distil.offline.top_k changed from 16 to 8" in printed
    shards = read_manifest(run_dir / "teacher-cache").shards
    assert f"{shards} of {shards} files to write" in printed


def test_nothing_is_asked_of_the_teacher_where_no_objective_needs_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off = ("distil.objectives.logits.weight=0", "distil.objectives.hidden.weight=0")
    main(call(tiny, tmp_path / "run", *off, until="teach"))
    assert "teach: nothing to write, as no objective asks" in capsys.readouterr().out
    assert not (tmp_path / "run" / "teacher-cache").exists()


def test_another_run_learns_the_same_from_the_cache_of_the_first(
    tiny: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    """Also where its longer window cuts nothing, and the data is read as a stream."""
    cache = finished[0] / "teacher-cache"
    printed = run(call(tiny, tmp_path / "run", f"distil.offline.cache={cache}"))
    assert f"the teacher is read from {cache}" in printed and "loaded teacher" not in printed
    assert not (tmp_path / "run" / "teacher-cache").exists()
    first, second = (
        load_file(run_dir / "student" / "model.safetensors")
        for run_dir in (finished[0], tmp_path / "run")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    stream = ("data.streaming=true", "data.shuffle_buffer=8", "data.max_length=64")
    printed = run(call(tiny, tmp_path / "stream", f"distil.offline.cache={cache}", *stream))
    assert "loaded teacher" not in printed
    assert (tmp_path / "stream" / "student" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("distil.offline.top_k=8", "it has top_k 16, distil.offline.top_k is 8"),
        (
            "distil.objectives.logits.temperature=3",
            "temperature 3.0 is asked for, it has 1.0",
        ),
        ("distil.objectives.hidden.layers=[0]", "teacher's layer 0 are asked for, it has 1, 3"),
        ("data.max_length=20", "line 1 (data.max_length was 48 there and is 20 here)"),
        ("data.prompt.bos=always", "it lacks 40 of 40 records"),
    ],
)
def test_a_cache_of_other_settings_is_refused(
    tiny: Path,
    finished: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    words: str,
) -> None:
    cache = finished[0] / "teacher-cache"
    given = call(tiny, tmp_path / "run", f"distil.offline.cache={cache}", change)
    line = refused(capsys, given)
    assert f"distil.offline.cache {cache}: " in line and words in line
    assert "set distil.offline.cache=null" in line
    assert not (tmp_path / "run" / "student").exists()


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny teacher and its data in another place, to be changed."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ("train.jsonl", "validation.jsonl"):
        shutil.copy(tiny / path, folder)
    shutil.copytree(tiny / "teacher", folder / "teacher")
    return folder


def test_a_cache_for_another_tokenizer_is_refused_before_anything_is_made(
    finished: tuple[Path, str],
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copy / "teacher" / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocabulary = stored["model"]["vocab"]
    one, other = list(vocabulary)[5:7]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(stored))
    cache = f"distil.offline.cache={finished[0] / 'teacher-cache'}"
    line = refused(capsys, call(copy, tmp_path / "run", cache))
    assert "it was made for another tokenizer than the teacher's" in line
    assert not (tmp_path / "run" / "factorized").exists()


def test_a_cache_of_another_teacher_or_other_data_is_refused(
    finished: tuple[Path, str],
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = f"distil.offline.cache={finished[0] / 'teacher-cache'}"
    lines = (copy / "train.jsonl").read_text().splitlines()
    lines[6] = lines[6].replace("the", "a").replace("cat", "mat")
    (copy / "train.jsonl").write_text("\n".join(lines))
    line = refused(capsys, call(copy, tmp_path / "run", cache))
    assert "it lacks 1 of 40 records" in line and "train.jsonl, line 7 (data.source was" in line
    weights = load_file(copy / "teacher" / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, copy / "teacher" / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, call(copy, tmp_path / "run", cache))
    assert f"another teacher wrote it ({finished[0].parent}" not in line
    assert "another teacher wrote it (" in line


def test_auxiliary_tensors_are_compared_without_the_teacher(tiny: Path, tmp_path: Path) -> None:
    """With those of the teacher's files."""
    given = call(tiny, tmp_path / "run", "student.rank_multiple=8")
    given[given.index("kd")] = "opdf"
    run([argument for argument in given if argument != HIDDEN])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["loss/auxiliary"] for line in lines]
    assert len(found) == 3 and found[0] > found[-1] > 0


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, "cannot be read (No such file or directory); expected the folder of a teacher"),
        ("{", "damaged; delete it"),
        ('{"teacher": 3}', "damaged; delete it"),
        ('{"format": 7}', "of format 7, this version reads 1"),
    ],
)
def test_a_folder_that_is_no_cache_is_named(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    contents: str | None,
    words: str,
) -> None:
    if contents is not None:
        (tmp_path / "manifest.json").write_text(contents)
    given = call(tiny, tmp_path / "run", f"distil.offline.cache={tmp_path}")
    assert f"{tmp_path / 'manifest.json'}: " in (line := refused(capsys, given)) and words in line
    assert not (tmp_path / "run" / "factorized").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("distil.preset=makd", "distil.objectives.matrix (matrix) compares what distil.offline"),
        ("distil.preset=sinkd", "distil.objectives.sinkhorn (sinkhorn) compares what"),
        ("distil.preset=rlkd", "distil.objectives.ranking (ranking) compares what"),
        ("distil.preset=minilm", "distil.objectives.relations (relations) compares what"),
        ("distil.preset=lillama", "distil.objectives.local (local) compares what"),
        (
            "distil.objectives.maps={objective: attention}",
            "set distil.objectives.maps.weight=0, or distil.offline=null",
        ),
        ("distil.offline=null", "distil.offline is null, so there is nothing to write"),
        ("distil.offline.top_k=0", "distil.offline.top_k: input should be greater than 0"),
        ("distil.offline.topk=3", "unknown key distil.offline.topk; did you mean top_k?"),
        ("distil.offline.top_k=400", "distil.offline.top_k is 400, but"),
    ],
)
def test_what_a_cache_cannot_give_is_refused_before_anything_is_loaded(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    given = call(tiny, tmp_path / "run", change, until="teach")
    if change.startswith("distil.preset"):
        given = [argument for argument in given if argument not in ("--preset", "kd", HIDDEN)]
    assert words in refused(capsys, given)
    assert not (tmp_path / "run" / "factorized").exists()
