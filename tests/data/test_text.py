"""Plain text as windows."""

from pathlib import Path

import pytest

from makd_llm.data.text import read_tokens, spread_windows
from makd_llm.errors import UserError
from makd_llm.models.source import load_tokenizer


@pytest.mark.parametrize(
    ("tokens", "window", "count", "starts"),
    [
        (100, 10, 99, list(range(0, 100, 10))),
        (105, 10, 5, [0, 20, 40, 60, 80]),
        (7, 10, 5, [0]),
        (29, 10, 3, [0, 10]),
    ],
)
def test_windows_are_spread_and_do_not_overlap(
    tokens: int, window: int, count: int, starts: list[int]
) -> None:
    found = spread_windows(list(range(tokens)), window=window, count=count)
    assert [example.input_ids[0] for example in found] == starts
    for example in found:
        first = example.input_ids[0]
        assert example.input_ids == list(range(first, min(first + window, tokens)))
        assert example.prompt_length == 1


def test_windows_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="window 1 and count 1"):
        spread_windows([1, 2], window=1, count=1)


def test_text_that_cannot_be_read_is_named(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny / "teacher")
    (tmp_path / "one.txt").write_text("a", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"--data .*one\.txt: holds 1 tokens"):
        read_tokens(tmp_path / "one.txt", tokenizer, "--data")
    for name in ("latin.txt", "none.txt"):
        with pytest.raises(UserError, match=f"--data .*{name}: not readable"):
            read_tokens(tmp_path / name, tokenizer, "--data")
    (tmp_path / "two.txt").write_text("the cat sat é", encoding="utf-8")
    tokens, size = read_tokens(tmp_path / "two.txt", tokenizer, "--data")
    assert size == 14 and tokens == tokenizer("the cat sat é")["input_ids"]
