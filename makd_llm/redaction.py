"""What must not be written down: keys, tokens, passwords.

A run writes down what it was started with, and its messages repeat what libraries say. Whatever
goes there passes `without_secrets` first, and config files may not ask for secrets at all.

Where it is in doubt, more is hidden than needs to be: a quoted value goes as a whole. What people
measure here stays: `max_new_tokens=64`, tokens/s, paths, hashes.
"""

import re
from collections.abc import Sequence

HIDDEN = "***"

_BEGINNING = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))"  # or after a line's end, as repr writes it
_ANYWHERE = (
    r"passw(?:or)?d|passphrase|secret|credential|"
    r"(?:api|access|auth|private|secret|account)[_-]?key"
)
_TOKEN = rf"{_BEGINNING}(?:access|auth|session|refresh|id|api|hf)?token"
_SURE = rf"{_ANYWHERE}|{_TOKEN}(?!s)"
_NAME = re.compile(
    rf"{_ANYWHERE}|"
    rf"(?:{_TOKEN}|{_BEGINNING}(?:key|pass|auth|pat)|[A-Za-z0-9][_\-.]pwd?)$",
    re.I,
)

# As it is written, as JSON, and as JSON within a string: to the closing quote, or the line's end.
_QUOTED = r"b?(?P<quote>\\?['\"])(?:(?!(?P=quote))(?:\\.|[^\n\\]))*"
_PLAIN = r"(?:[^\s'\",;}]|[,;](?=[^\s'\"]))+"
_SEPARATOR = r"\\?['\"]?\s*[=:]\s*"

_ASSIGNED = re.compile(
    rf"(?P<before>(?:(?:{_SURE})s?{_SEPARATOR}|(?-i:[A-Z0-9]_(?:KEY|PASS|AUTH|PAT|PWD?)=)))"
    rf"(?:{_QUOTED}|{_PLAIN})",
    re.I,
)
_PAIR = re.compile(
    rf"(?P<before>\(\s*b?['\"][\w.\-]*(?:{_SURE}|authorization)['\"]\s*,\s*){_QUOTED}", re.I
)
_HEADER = re.compile(
    rf"(?P<before>\bauthorization{_SEPARATOR})(?:{_QUOTED}|(?:[\w\-]+[ ]+)?{_PLAIN})", re.I
)
_SCHEME = re.compile(
    r"(?P<before>\b(?:bearer\s+|basic\s+(?=[\w+/=.\-~]*(?-i:[A-Z0-9=]))))[\w+/=.\-~]{8,}", re.I
)
# A password may hold @ and, against the rules, a slash; what looks like a port is none.
_IN_URL = re.compile(
    r"(?P<before>(?<![a-z0-9])[a-z][a-z0-9]*+://)"
    r"(?:[^\s/:@\[]*:(?!\d+/)[^\s@]{1,256}@(?:[^\s/@]*@)*|[^\s/]+@)",
    re.I,
)
_KNOWN = re.compile(
    rf"{_BEGINNING}(?:hf_[A-Za-z0-9]{{16,}}|sk-[\w\-]{{16,}}|"
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|"
    r"gl(?:pat|dt|rt|ft|ptt|cbt|soat|agent)-[\w\-]{20,}|AIza[\w\-]{30,}|ya29\.[\w\-]{20,}|"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}|xox[a-z]-[\w\-]{10,}|nvapi-[\w\-]{20,}|pypi-[\w\-]{50,}|"
    r"npm_[A-Za-z0-9]{30,}|eyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]{5,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.S,
)


def names_a_secret(name: str) -> bool:
    """Whether a setting or variable of this name holds one: `HF_TOKEN`, `api_key`, `--password`,
    `DB_PASS`. `PWD` is a folder, `tokens` are counted.
    """
    return bool(_NAME.search(name.strip()))


def without_secrets(text: str) -> str:
    """The text with *** for whatever looks like a secret: `token=…`, `('token', '…')`, a header
    `Authorization`, user and password in a URL, and the keys of well-known services by their form.
    """
    text = _KNOWN.sub(HIDDEN, text)
    text = _IN_URL.sub(rf"\g<before>{HIDDEN}@", text)
    for pattern in (_HEADER, _PAIR, _ASSIGNED):
        text = pattern.sub(_hidden, text)
    return _SCHEME.sub(rf"\g<before>{HIDDEN}", text)


def without_secrets_in(command: Sequence[str]) -> list[str]:
    """A command line likewise, where the value may also be the next word: `--api-key VALUE`."""
    shown: list[str] = []
    for word in command:
        before = shown[-1] if shown else ""
        follows = before.startswith("-") and "=" not in before and names_a_secret(before)
        name, equals, _ = word.partition("=")
        if follows:
            shown.append(HIDDEN)
        elif equals and names_a_secret(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(without_secrets(word))
    return shown


def _hidden(found: re.Match[str]) -> str:
    return found["before"] + (found["quote"] or "") + HIDDEN
