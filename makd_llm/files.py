"""Small files that are whole or not there, and what says that a file has changed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text under another name and renames it: a reader never meets half of it."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write a file under; it takes the file's place at the end, or goes where the
    writing fails.
    """
    scratch = path.with_name(f".writing-{path.name}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_of_folder(folder: Path) -> str:
    """Tells one content of a model folder from another without reading all of it: SHA-256 of names,
    sizes, and 64 KiB at 16 places of every weight file and config.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for sixteenth in range(16):
                file.seek(size * sixteenth // 16)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]
