"""The commands in the documents: programs, commands, options and settings that they name exist."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from makd_llm.cli import DEFAULT_CONFIG, app
from makd_llm.config import load_config

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/guide.md", "docs/plan.md", "docs/students.md", "slurm/README.md")

# Programs of others, whose own options are not looked at here. lm_eval's are tried by
# tests/ecosystem, those of `transformers serve` by tests/generation.
OTHERS = {
    "cp",
    "export",
    ".",
    "pip",
    "tensorboard",
    "lm_eval",
    "transformers",
    "sbatch",
    "salloc",
    "srun",
}


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> Iterator[list[str]]:
    """The words of every command of a page, without settings of the environment before it."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield [word.replace("$NODE", "0") for word in words]


def parsed(command: Any, words: list[str]) -> dict[str, Any]:
    """What a command of a group of typer's makes of its words. Raises what it would end with."""
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    values: dict[str, Any] = command.make_context("program", list(words)).params
    return values


def check(words: list[str]) -> None:
    """Raises where a command names what is not there."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets, f"make {rest[0]}"
    elif program in ("deepspeed", "torchrun"):
        at = next(i for i, word in enumerate(rest) if word in ("train.py", "makd_llm.cli"))
        if program == "deepspeed":
            from deepspeed.launcher.runner import parse_args

            parse_args(rest[: at + 1])
        check(["makd", *(["train"] if rest[at] == "train.py" else []), *rest[at + 1 :]])
    elif program == "makd":
        given = parsed(
            typer.main.get_command(app), [word for word in rest if word not in ("…", "...")]
        )
        if "overrides" in given and rest[0] in ("train", "sft"):
            config = given["config"]
            preset = given.get("preset")
            chosen = [f"distil.preset={preset}"] if preset else []
            at = CHECKOUT / config if config else DEFAULT_CONFIG
            load_config(at, [*chosen, *(given["overrides"] or [])])
        if given.get("ds"):
            assert (CHECKOUT / given["ds"]).is_file()
    elif program == "hf":
        helped = subprocess.run(
            [sys.executable, "-m", "huggingface_hub.cli.hf", rest[0], "--help"],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert all(f"{word} " in helped.stdout for word in rest if word.startswith("--"))
    else:
        assert program in OTHERS, f"what is {program}?"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page: str) -> None:
    found = list(commands(page))
    assert found
    for words in found:
        try:
            check(words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}: {' '.join(words)}: {error!r}") from error


@pytest.mark.parametrize(
    "wrong",
    [
        "makd distill x",
        "makd evaluate runs/x --jsn",
        "makd train --ds ds_configs/zero3.json student.keep=0.5",
        "makd train --ds ds_configs/zero9.json",
        "deepspeed --gpus_num 2 train.py --ds ds_configs/zero3.json",
        "deepspeed --num_gpus 2 train.py --ds ds_configs/zero3.json --presets kd",
        "make dmeo",
        "hf uplode a b",
        "mkad doctor",
    ],
)
def test_a_wrong_command_is_found(wrong: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(wrong))


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_links_lead_somewhere(page: str) -> None:
    for block in blocks(page, "python"):
        compile(block, page, "exec")
    folder = (CHECKOUT / page).parent
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]+)?\)", text):
        there = folder / target if target else CHECKOUT / page
        assert there.exists(), f"{page} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor[1:] in slugs, f"{page} links to {target}{anchor}"


def test_the_guide_goes_from_a_hub_teacher_to_a_served_student() -> None:
    words = [" ".join(command) for command in commands("docs/guide.md")]
    order = ("makd doctor", "makd plan", "deepspeed", "makd evaluate", "makd export", "lm_eval")
    places = [next(i for i, said in enumerate(words) if said.startswith(o)) for o in order]
    assert places == sorted(places)
