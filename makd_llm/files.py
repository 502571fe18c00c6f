"""Small files that are whole or not there, and what says that a file has changed."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from makd_llm.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""The ways in which a disk refuses to be written."""

TEXTS = (
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer*",
)
"""What a model and its tokenizer are loaded from, beside the weights."""


def write_whole(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes UTF-8 text under another name and renames it: a reader never meets half of it.
    durable: nor does one after a power cut.
    """
    with replacing(path, durable=durable) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """The value as JSON that a person can read, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False), durable=durable)


@contextmanager
def claimed(folder: Path, name: str, lock_name: str = ".lock") -> Iterator[None]:
    """Makes the folder and keeps a second run out of it; a killed process's claim goes with it.

    name: the setting that named the folder, for messages. lock_name: of the file that says so, one
    for each kind of claim. Collective. Raises UserError where another run is at work there, or the
    folder cannot be written.
    """
    from makd_llm import distributed  # brings torch, for which `makd --help` should not wait

    lock = FileLock(folder / lock_name, timeout=0)
    distributed.on_main(_claim, lock, folder, name)
    try:
        yield
    finally:
        if distributed.is_main():
            lock.release()


def _claim(lock: BaseFileLock, folder: Path, name: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:  # an OSError too, hence first
        raise UserError(
            f"{folder}: another run is at work in this folder; wait for it, or set {name}"
        ) from None
    except OSError as error:
        raise UserError(
            f"{name} {folder}: cannot be written ({error.strerror}); choose another"
        ) from None


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Another name to write a file under; it takes the file's place at the end, or goes where the
    writing fails. durable: it is on the disk before it does, and its name after it.
    """
    scratch = path.with_name(f".writing-{path.name}")
    try:
        yield scratch
        if durable:
            sync(scratch)
        scratch.replace(path)
        if durable:
            sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def nearest(path: Path) -> Path:
    """The path itself, or what of the folders above it is there already."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if os.path.lexists(p))


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_plain_name(name: str) -> bool:
    """Whether a name that a file, a config or somebody's data gives stays in the folder that it is
    looked for in: one part, not hidden, and printable.
    """
    return (
        bool(name)
        and not name.startswith(".")
        and not set(name) & {"/", "\\"}
        and name.isprintable()
    )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_of(path: Path) -> str:
    """Tells one content of a large file from another without reading all of it: SHA-256 of its size
    and of 64 KiB at 16 places.
    """
    digest = hashlib.sha256(f"{path.stat().st_size} ".encode())
    _add_sample(digest, path)
    return digest.hexdigest()[:16]


def sample_of_folder(folder: Path, *, weights: bool = True) -> str:
    """Tells one content of a model folder from another without reading all of it: SHA-256 of the
    names and sizes of all that is loaded from it, of TEXTS in whole, and of 64 KiB at 16 places of
    every weight file. weights: False where the tokenizer is all that counts.
    """
    digest = hashlib.sha256()
    found = {path for pattern in TEXTS for path in folder.glob(pattern)}
    found = {path for path in found if not path.name.startswith("README")}
    if weights:
        found |= set(folder.glob("*.safetensors"))
    else:
        found -= set(folder.glob("*.safetensors.index.json"))
    for path in sorted(path for path in found if path.is_file()):
        digest.update(os.fsencode(f"{path.relative_to(folder)} {path.stat().st_size} "))
        if path.suffix == ".safetensors":
            _add_sample(digest, path)
        else:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _add_sample(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for sixteenth in range(16):
            file.seek(size * sixteenth // 16)
            digest.update(file.read(65536))
