"""What a teacher cache was made of, and whether it fits a run.

`manifest.json` is written when the work begins and once more when it is done. The name of its
contents stands in every shard too, so that none of an earlier work is taken for one of this.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from makd_llm.errors import UserError
from makd_llm.files import write_whole

FORMAT = 1
FILE = "manifest.json"


class Manifest(BaseModel):
    """The contents of a cache, and how much there is of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    teacher: str
    """As the run named it."""
    teacher_files: str
    """Tells one content of its folder from another (files.sample_of_folder)."""
    tokenizer: str
    """`digest_of_tokenizer`."""
    vocabulary: int
    """Rows of the teacher's head."""
    dtype: str
    """In which the teacher ran."""
    data: str
    """SHA-256 of the keys (data.batch.key_of) of all records, in order."""
    settings: dict[str, Any]
    """How records were chosen and cut, by the names of the run's config."""
    top_k: int
    temperatures: tuple[float, ...]
    """For which the others' sum is kept; none: no tokens are kept at all."""
    hidden: tuple[int, ...]
    """The teacher's layers whose hidden states are kept, in bf16."""
    width: int
    records: int
    targets: int
    """Summary tokens."""
    tokens: int
    shards: int
    finished: bool = False
    bytes_per_target: float | None = None
    """Of everything but the hidden states."""
    bytes_per_token: float | None = None
    """Of the hidden states."""

    @property
    def contents(self) -> str:
        """A name of what the shards hold, whoever the teacher is called and however cut."""
        told = {"teacher", "settings", "finished", "bytes_per_target", "bytes_per_token"}
        return hashlib.sha256(self.model_dump_json(exclude=told).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Into its folder."""
        write_whole(folder / FILE, self.model_dump_json(indent=1))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished cache. Raises UserError where there is none."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{path}: a teacher cache of format {found['format']}, this version reads "
                f"{FORMAT}; write it anew"
            )
        manifest = Manifest.model_validate(found)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected the folder of a teacher cache"
        ) from None
    except (ValueError, ValidationError):
        raise UserError(f"{path}: damaged; delete it, and the stage teach writes it anew") from None
    if not manifest.finished:
        raise UserError(
            f"{folder}: this teacher cache is not finished; run the command that writes it again"
        )
    return manifest


def check_contents(
    manifest: Manifest,
    folder: Path,
    *,
    tokenizer: str,
    top_k: int,
    temperatures: Sequence[float],
) -> None:
    """What can be said before any stage has run. Raises UserError naming what differs."""
    if manifest.tokenizer != tokenizer:
        raise _other(folder, "it was made for another tokenizer than the teacher's")
    if temperatures and manifest.top_k != top_k:
        raise _other(folder, f"it has top_k {manifest.top_k}, distil.offline.top_k is {top_k}")
    missing = [tau for tau in temperatures if tau not in manifest.temperatures]
    if missing:
        known = ", ".join(str(tau) for tau in manifest.temperatures) or "none"
        raise _other(folder, f"temperature {missing[0]} is asked for, it has {known}")


def check_teacher_of(
    manifest: Manifest,
    folder: Path,
    *,
    teacher_files: str,
    vocabulary: int,
    hidden: Sequence[int],
) -> None:
    """What can be said once the teacher and the student are there. Raises UserError."""
    if manifest.teacher_files != teacher_files:
        raise _other(folder, f"another teacher wrote it ({manifest.teacher})")
    if manifest.vocabulary != vocabulary:
        raise _other(
            folder, f"its vocabulary has {manifest.vocabulary} tokens, the student's {vocabulary}"
        )
    missing = [layer for layer in hidden if layer not in manifest.hidden]
    if missing:
        known = ", ".join(str(layer) for layer in manifest.hidden) or "none"
        raise _other(
            folder,
            f"hidden states of the teacher's layer {missing[0]} are asked for, it has {known}",
        )


def difference_of_settings(manifest: Manifest, settings: dict[str, Any]) -> str:
    """The first setting that differs, in words that follow a statement; may be empty."""
    for name, value in settings.items():
        before = manifest.settings.get(name)
        if before != value:
            return f" ({name} was {before!r} there and is {value!r} here)"
    return ""


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of which token has which id."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def other_data(folder: Path, said: str) -> UserError:
    """The error for a cache of other records."""
    return _other(folder, said)


def _other(folder: Path, what: str) -> UserError:
    return UserError(
        f"distil.offline.cache {folder}: {what}; name another, or set distil.offline.cache=null "
        "and the run writes its own"
    )
