"""Results are kept while their config stands, and made again, with a reason, when it changed."""

from pathlib import Path
from typing import Any

import pytest

from makd_llm.errors import UserError
from makd_llm.stages import Stages, digest


def test_a_stage_stands_only_when_done_under_the_same_key(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    key = {"train": {"steps": 4}, "after": "x"}
    assert not stages.stands("sft", key)
    stages.mark("sft", key, done=False)
    assert not stages.stands("sft", key)
    stages.mark("sft", key, done=True)
    assert Stages(tmp_path).stands("sft", {"after": "x", "train": {"steps": 4}})
    assert not stages.stands("sft", {"train": {"steps": 5}, "after": "x"})


def test_what_changed_is_named(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    assert stages.change("sft", {"a": 1}) is None, "a stage that never ran did not change"
    stages.mark("sft", {"train": {"steps": 4}, "after": "x"}, done=True)
    assert (
        stages.change("sft", {"train": {"steps": 5}, "after": "x"})
        == "train.steps changed from 4 to 5"
    )
    assert (
        stages.change("sft", {"train": {"steps": 4}, "after": "y"}) == "the stage before it changed"
    )
    assert stages.change("sft", {"train": {"steps": 4}, "after": "x"}) is None


def test_a_setting_that_is_new_and_null_is_a_change_too(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.mark("sft", {"a": 1}, done=True)
    assert stages.change("sft", {}) == "a is no longer there"
    assert stages.change("sft", {"a": 1, "b": None}) == "b is new"


def test_an_empty_section_is_a_change_with_a_reason(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.mark("sft", {"a": 1}, done=True)
    assert stages.change("sft", {"a": 1, "ds": {}}) == "an empty section came or went"


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.mark("sft", {"a": 1}, done=True)
    (tmp_path / "stages.json").write_text('{"sft": {"ke')
    with pytest.raises(UserError, match="damaged, so nobody knows which stages stand"):
        stages.stands("sft", {"a": 1})


def test_digest_depends_on_content_and_not_on_order() -> None:
    assert (
        digest({"a": 1, "b": Path("x")})
        == digest({"b": Path("x"), "a": 1})
        != digest({"a": 2, "b": Path("x")})
    )


def test_how_a_batch_is_cut_is_no_change(tmp_path: Path) -> None:
    """Other ranks need another micro-batch, and a lack of memory a smaller one."""
    from makd_llm.config import load_config
    from makd_llm.pipeline import Run

    ds = Path(__file__).resolve().parents[1] / "ds_configs" / "zero3.json"

    def key(*settings: str) -> Any:
        config = load_config(None, [f"run_dir={tmp_path}", *settings])
        return Run(config, ds)._key("distil", "")

    train = "distil.train"
    free = (
        "micro_batch_size=2",
        "gradient_checkpointing=true",
        "checkpoint_every=7",
        "log_every=3",
    )
    assert key() == key(*(f"{train}.{setting}" for setting in free))
    assert key() != key(f"{train}.batch_size=16") != key(f"{train}.learning_rate=1.0e-3")
