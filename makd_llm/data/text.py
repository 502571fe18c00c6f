"""Plain text as token windows: for calibration, and to measure a language model on."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from makd_llm.data.schema import Example
from makd_llm.errors import UserError


def read_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, key: str) -> tuple[list[int], int]:
    """The text's token ids, and its bytes in UTF-8.

    No BOS is added beyond what the tokenizer adds by itself. key: what named the file, for the
    message. Raises UserError where the file is missing, not UTF-8, or has less than two tokens.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key} {path}: not readable as UTF-8 text: {error}") from None
    tokens: list[int] = tokenizer(text)["input_ids"]
    if len(tokens) < 2:
        raise UserError(f"{key} {path}: holds {len(tokens)} tokens, at least 2 are needed")
    return tokens, len(text.encode())


def spread_windows(tokens: Sequence[int], *, window: int, count: int) -> list[Example]:
    """At most `count` windows that do not overlap, evenly over the text; every token but each
    window's first is predicted.

    A text shorter than one window is one. Raises ValueError where window is below 2 or count below
    1.
    """
    if window < 2 or count < 1:
        raise ValueError(f"window {window} and count {count}: at least 2 tokens, and one window")
    whole = max(1, len(tokens) // window)
    taken = min(count, whole)
    starts = [number * whole // taken * window for number in range(taken)]
    return [Example(f"text@{s}", list(tokens[s : s + window]), 1) for s in starts]


def text_windows(tokens: Sequence[int], *, window: int, stride: int) -> list[Example]:
    """Plain text as overlapping windows; every token but the first is predicted exactly once.

    Each window predicts its last `stride` tokens (the first window: all but its first), so a
    predicted token has at least window - stride tokens of context. Raises ValueError where stride
    is not in [1, window).
    """
    if not 1 <= stride < window:
        raise ValueError(
            f"stride is {stride}, expected at least 1 and less than the window ({window})"
        )
    examples = []
    predicted = 1  # the first token has no context
    while predicted < len(tokens):
        end = min(window if predicted == 1 else predicted + stride, len(tokens))
        start = max(0, end - window)
        examples.append(Example(f"window@{start}", list(tokens[start:end]), predicted - start))
        predicted = end
    return examples
