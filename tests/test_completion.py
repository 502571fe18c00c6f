"""What the shell completes; it asks the program, which should answer at once."""

import os
import subprocess
import sys

import pytest


def answered(words: str, place: int) -> list[str]:
    """What bash is told about the word at a place of a command line."""
    asked = {"_MAKD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    done = subprocess.run(
        [sys.executable, "-m", "makd_llm.cli"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "place", "expected"),
    [
        ("makd ev", 1, ["evaluate"]),
        ("makd train --until d", 3, ["distil"]),
        ("makd train --preset ti", 3, ["tinybert"]),
        ("makd doctor --js", 2, ["--json"]),
    ],
)
def test_commands_options_and_presets(words: str, place: int, expected: list[str]) -> None:
    assert answered(words, place) == expected


def test_the_command_line_waits_for_no_heavy_library() -> None:
    program = (
        "import sys, makd_llm.cli\n"
        "print({'torch', 'transformers', 'deepspeed', 'pydantic', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
