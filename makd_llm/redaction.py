"""What must not be written down: keys, tokens, passwords.

A run writes down what it was started with, and its messages repeat what libraries say. Whatever
goes there passes `without_secrets` first, and config files may not ask for secrets at all.
"""

import re
from collections.abc import Sequence

HIDDEN = "***"

_NAME = re.compile(r"(?:^|[_\-.])(?:api_?)?(?:key|token|secret|passw(?:or)?d|credentials?)$", re.I)
_ASSIGNED = re.compile(
    r"((?:\b|[_\-.])(?:(?:api|access|auth|private)[_-]?key|token|secret|passw(?:or)?d|credentials?)"
    r"['\"]?\s*[=:]\s*)"
    r"(['\"]?)[^\s'\",;}]+",
    re.I,
)
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.\-]*://)[^/\s@]+@", re.I)
_BEARER = re.compile(r"(\b(?:bearer|basic)\s+)[\w+/=.\-~]{8,}", re.I)
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|"
    r"AKIA[A-Z0-9]{16}|eyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]{5,})"
)


def names_a_secret(name: str) -> bool:
    """Whether a setting or variable of this name holds one: `HF_TOKEN`, `api_key`, `--password`."""
    return bool(_NAME.search(name.strip()))


def without_secrets(text: str) -> str:
    """The text with *** for whatever looks like a secret: `token=…`, user and password in a URL,
    and the keys of well-known services by their form.
    """
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    text = _ASSIGNED.sub(rf"\1\2{HIDDEN}", text)
    return _KNOWN.sub(HIDDEN, text)


def without_secrets_in(command: Sequence[str]) -> list[str]:
    """A command line likewise, where the value may also be the next word: `--api-key VALUE`."""
    shown: list[str] = []
    for word in command:
        before = shown[-1] if shown else ""
        follows = before.startswith("-") and "=" not in before and names_a_secret(before)
        shown.append(HIDDEN if follows else without_secrets(word))
    return shown
