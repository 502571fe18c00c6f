"""A run's config: what is refused, in which words, and what presets mean."""

from pathlib import Path

import pytest

from makd_llm.config import dump_config, load_config
from makd_llm.config.objectives import OBJECTIVES
from makd_llm.config.presets import preset_names
from makd_llm.errors import UserError


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "distil.objectves.matrix.weight=1",
            "unknown key distil.objectves; did you mean objectives?",
        ),
        ("distil.train.stepz=5", "unknown key distil.train.stepz; did you mean steps?"),
        (
            "student.keep_ratio=1.5",
            "student.keep_ratio: input should be less than or equal to 1, found 1.5",
        ),
        ("student.keep_ratio=0", "student.keep_ratio: input should be greater than 0"),
        ("student.depth.layers=0", "student.depth.layers: input should be greater than 0"),
        ("student.depth.choose=even", "student.depth.layers: field required"),
        ("student.depth={layers: 2, choose: odd}", "student.depth.choose: input should be 'even'"),
        ("student.width.hiden=8", "unknown key student.width.hiden; did you mean hidden?"),
        ("student.width={}", "student.width: both hidden and feed_forward are null"),
        ("student.heads.key_value=two", "student.heads.key_value: input should be a valid integer"),
        ("distil.train.steps=many", "distil.train.steps: input should be a valid integer"),
        ("distil.preset=mkd", "distil.preset: there is no preset 'mkd'; did you mean makd?"),
        ("distil.objectives.matrx.weight=1", "no objective 'matrx'; did you mean matrix?"),
        (
            "distil.objectives.matrix.wieght=1",
            "unknown key distil.objectives.matrix.wieght; did you mean weight?",
        ),
        ("distil.objectives.matrix=1", "matrix is 1, expected settings, as {weight: 1.0}"),
        ("distil.objectives=3", "distil.objectives: input should be a valid dictionary"),
        ("distil.objectives=[{weight: 1}]", "every objective of a list is to say which"),
        ("distil.objectives.matrix.every=0", "distil.objectives.matrix.every: input should be"),
        ("distil.objectives.matrix.layers=top", "distil.objectives.matrix.layers"),
        ("distil.preset=[kd]", "distil.preset"),
        ("distil.layer_map=even", "distil.layer_map: input should be 'origin' or 'uniform'"),
        (
            "distil.over_parameterize.tensors=4",
            "distil.over_parameterize.tensors: input should be 3",
        ),
        (
            "distil.objectives.auxiliary.weight=1",
            "tensors of over_parameterize, which is null; set",
        ),
        ("distil.over_parameterize={tensers: 3}", "tensers; did you mean tensors?"),
        ("distil.over_parameterize.roles=[]", "distil.over_parameterize.roles: tuple should have"),
        (
            "data.train_split=../x",
            "data.train_split: files are named after it: give a name without",
        ),
        ("data.validation_split=''", "data.validation_split: files are named after it"),
        ("run_dir=~nobody-of-that-name/a", "run_dir: nobody's home folder; write the path in full"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        (
            "distil.sequences.generation={per_document: 2}",
            "distil.sequences.generation: greedy decoding has one summary of a document, not 2",
        ),
        ("distil.sequences.source=student", "distil.sequences.source: input should be 'data' or"),
        ("distil=3", "distil: input should be a valid dictionary"),
        ("distil.schedule={kind: staged, matrix: 0, layer: 0, model: 0}", "are all 0"),
        ("seed", "not of the form key.path=value"),
        ("run_dir=${nothing}", "Interpolation key 'nothing' not found"),
    ],
)
def test_wrong_values_give_one_line_that_names_them(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "not readable as a config"),
        (b"- 1\n- 2\n", "found a list or a single value"),
        (b"42\n", "not readable as a config|found a list or a single value"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        (b"studnt: {}\n", "unknown key studnt; did you mean student?"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_config(path, [])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "override"),
    [
        ("student: [1]", "student.keep_ratio=0.5"),
        ("student: {keep_ratio: 0.5}", "student=[1]"),
        ("student: {depth: [1]}", "student.depth={layers: 2}"),
    ],
)
def test_an_override_of_another_kind_than_the_files_is_named(
    tmp_path: Path, content: str, override: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_config(path, ["seed=1", override])
    place = "student.depth" if "depth" in content else "student"
    assert str(caught.value).startswith(f"command line: {place}: keys and values here and a list")
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no.yaml", "no such config file"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=words):
            load_config(path, [])


def test_overrides_win_over_the_file_and_single_objectives_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\ndistil: {preset: kd, objectives: {hidden: {weight: 0.5}}}\n")
    config = load_config(path, ["seed=4"])
    assert config.seed == 4
    weights = {name: objective.weight for name, objective in config.distil.objectives.items()}
    assert weights == {"cross_entropy": 0.3, "logits": 1.0, "hidden": 0.5}


def weights_of(*overrides: str, path: Path | None = None) -> dict[str, float]:
    """The objectives that are switched on, by name."""
    objectives = load_config(path, list(overrides)).distil.objectives
    return {name: o.weight for name, o in objectives.items() if o.weight > 0}


def test_presets_are_what_they_are_called() -> None:
    assert set(weights_of()) == {"cross_entropy", "logits", "matrix", "attention", "hidden"}
    assert weights_of() == weights_of("distil.preset=makd")
    assert weights_of("distil.preset=kd") == {"cross_entropy": 0.3, "logits": 1.0}
    assert weights_of("distil.preset=finetune") == {"cross_entropy": 1.0}
    assert set(weights_of("distil.preset=minilm")) == {"relations"}
    assert weights_of("distil.preset=seqkd") == {"cross_entropy": 1.0}


def test_seqkd_alone_has_the_teacher_write_by_beams() -> None:
    sequences = load_config(None, ["distil.preset=seqkd"]).distil.sequences
    assert (sequences.source, sequences.generation.method) == ("teacher", "beam")
    for name in set(preset_names()) - {"seqkd"}:
        assert load_config(None, [f"distil.preset={name}"]).distil.sequences.source == "data"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_a_config_of_its_own(name: str) -> None:
    path = Path(__file__).parents[1] / "configs" / "presets" / f"{name}.yaml"
    assert path.is_file(), "configs/presets shows them"
    assert (path.parents[2] / "docs" / "methods" / f"{name}.md").is_file()
    assert load_config(path, []) == load_config(None, [f"distil.preset={name}"])


def test_objectives_are_combined_freely_by_name_or_as_a_list() -> None:
    late = "distil.objectives.late={objective: hidden, layers: [last], metric: cosine}"
    found = load_config(None, ["distil.preset=kd", late]).distil.objectives
    assert list(found) == ["cross_entropy", "logits", "late"]
    assert found["late"].objective == "hidden"
    listed = "[{objective: hidden, layers: [-1]}, {objective: hidden, weight: 2}]"
    assert weights_of(f"distil.objectives={listed}") == {"hidden": 1.0, "hidden_2": 2.0}
    path_first = load_config(None, [f"distil.objectives={listed}"]).distil.objectives["hidden"]
    assert path_first.layers == (-1,), "of the list, and not of the preset"  # type: ignore[attr-defined]


def test_every_kind_of_objective_has_defaults_and_says_its_name() -> None:
    for kind, section in OBJECTIVES.items():
        asked = [f"distil.objectives.{kind}.weight=2", "distil.over_parameterize.tensors=3"]
        given = load_config(None, asked).distil.objectives[kind]
        assert type(given) is section and given.objective == kind and section.__doc__


def test_a_home_folder_is_found_wherever_a_path_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["run_dir=~/run", "distil.offline.cache=~/cache", "evaluation.text=~/a.txt"]
    config = load_config(None, paths)
    assert config.distil.offline is not None
    found = (config.run_dir, config.distil.offline.cache, config.evaluation.text)
    assert list(map(str, found)) == ["/home/me/run", "/home/me/cache", "/home/me/a.txt"]


def test_the_dumped_config_reads_back_the_same(tmp_path: Path) -> None:
    given = ["distil.objectives.matrix.layers=[0,2]", "distil.layer_map=[1,3]", "distil.preset=kd"]
    config = load_config(None, given)
    assert config.distil.layer_map == (1, 3)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path, []) == config


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_configs_are_valid(path: Path) -> None:
    load_config(path, [])


def test_a_preset_on_the_command_line_sets_the_weights_that_a_file_gives(tmp_path: Path) -> None:
    """A run's own config.yaml names every weight; a control made from it is to be that control."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config(None, ["distil.objectives.hidden.weight=0.5"])))
    assert weights_of(path=path)["hidden"] == 0.5
    control = ["distil.preset=kd", "distil.objectives.attention.weight=2"]
    assert weights_of(*control, path=path) == {
        "cross_entropy": 0.3,
        "logits": 1.0,
        "attention": 2.0,
    }


@pytest.mark.parametrize(
    "objectives", ["{matrix: 1}", "[{weight: 1}]", "[3]", "{matrx: {weight: 1}}"]
)
def test_wrong_objectives_of_a_file_are_one_line_under_another_preset_too(
    objectives: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"distil: {{preset: makd, objectives: {objectives}}}\n")
    for overrides in ([], ["distil.preset=kd"]):
        with pytest.raises(UserError, match=r"run\.yaml") as caught:
            load_config(path, overrides)
        assert "\n" not in str(caught.value)


def test_what_a_files_preset_brought_along_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config(None, ["distil.preset=tinybert", "seed=3"])))
    assert load_config(path, []).distil.schedule.kind == "staged"
    kd = load_config(path, ["distil.preset=kd"])
    assert (kd.distil.schedule.kind, kd.distil.layer_map, kd.seed) == ("joint", "origin", 3)
    assert weights_of("distil.preset=kd", path=path) == {"cross_entropy": 0.3, "logits": 1.0}
    path.write_text(dump_config(load_config(None, ["distil.preset=seqkd"])))
    assert load_config(path, ["distil.preset=kd"]).distil.sequences.source == "data"
