"""A run's config: what is refused, in which words, and what presets mean."""

from pathlib import Path

import pytest

from makd_llm.config import PRESETS, dump_config, load_config
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
        ("distil.preset=mkd", "distil.preset: input should be 'makd', 'kd' or 'finetune'"),
        ("distil.objectives.matrix.layers=top", "distil.objectives.matrix.layers"),
        ("distil.preset=[kd]", "distil.preset"),
        ("distil.layer_map=even", "distil.layer_map: input should be 'origin' or 'uniform'"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
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


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no.yaml", "no such config file"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=words):
            load_config(path, [])


def test_overrides_win_over_the_file_and_single_objectives_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\ndistil: {preset: kd, objectives: {hidden: {weight: 0.5}}}\n")
    config = load_config(path, ["seed=4"])
    assert config.seed == 4
    assert config.distil.objectives.hidden.weight == 0.5
    assert config.distil.objectives.matrix.weight == config.distil.objectives.attention.weight == 0


def test_presets_are_what_they_are_called() -> None:
    weights = {}
    for preset in PRESETS:
        objectives = load_config(None, [f"distil.preset={preset}"]).distil.objectives
        weights[preset] = {
            name: getattr(objectives, name).weight for name in type(objectives).model_fields
        }
    assert all(weight > 0 for weight in weights["makd"].values())
    assert {name for name, weight in weights["kd"].items() if weight} == {"cross_entropy", "logits"}
    assert {name for name, weight in weights["finetune"].items() if weight} == {"cross_entropy"}


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
    same = load_config(path, [])
    assert same.distil.objectives.hidden.weight == 0.5
    kd = load_config(path, ["distil.preset=kd", "distil.objectives.attention.weight=2"])
    objectives = kd.distil.objectives
    assert (objectives.hidden.weight, objectives.matrix.weight, objectives.logits.weight) == (
        0.0,
        0.0,
        1.0,
    )
    assert objectives.attention.weight == 2.0
