"""Small files that are whole or not there, and what says that a file has changed."""

import hashlib
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text under another name and renames it: a reader never meets half of it."""
    scratch = path.with_name(f"{path.name}.writing")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
