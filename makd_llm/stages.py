"""Which stages of a run stand: results are kept, and made again only when what they depend on has
changed.

Each stage has a key: the part of the config it depends on, and the key of the stage before it. The
key is written when the stage starts and marked done when its result stands, so that an interrupted
stage is resumed only under the very config it was started with.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from makd_llm.errors import UserError
from makd_llm.files import write_json

STAGES = ("sft", "shape", "factorize", "baselines", "write", "teach", "distil", "evaluate")
"""In order. `baselines` runs only where a run is to stop there."""

Key = dict[str, Any]


class Stages:
    """The record of a run folder's stages, in stages.json. Read and written by rank 0 alone."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "stages.json"

    def stands(self, stage: str, key: Key) -> bool:
        """Whether the stage was finished under this key."""
        entry = self._read().get(stage, {})
        return bool(entry.get("done")) and entry["key"] == _plain(key)

    def change(self, stage: str, key: Key) -> str | None:
        """What differs from the key under which the stage was last started, in words; None:
        nothing, or never.
        """
        entry = self._read().get(stage)
        return None if entry is None else difference(entry["key"], key)

    def done(self, stage: str) -> bool:
        """Whether the stage was finished, under whichever key."""
        return bool(self._read().get(stage, {}).get("done"))

    def key_of(self, stage: str) -> Key | None:
        """The key under which the stage was finished; None: it does not stand."""
        entry = self._read().get(stage, {})
        return entry["key"] if entry.get("done") else None

    def mark(self, stage: str, key: Key, *, done: bool) -> None:
        """Records that the stage starts, or that its result stands."""
        entries = self._read()
        entries[stage] = {"key": _plain(key), "done": done}
        write_json(self._path, entries, durable=True)

    def forget(self, stages: Iterable[str]) -> bool:
        """Has finished stages run again, whatever their keys; whether there was one to forget."""
        keys = {stage: key for stage in stages if (key := self.key_of(stage)) is not None}
        for stage, key in keys.items():
            self.mark(stage, key, done=False)
        return bool(keys)

    def _read(self) -> dict[str, Any]:
        try:
            entries: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise UserError(
                f"{self._path}: damaged, so nobody knows which stages stand; delete it to run all "
                "of them anew"
            ) from None
        return entries


def difference(before: Key, after: Key) -> str | None:
    """What of `after` differs from `before`, in words; None: nothing."""
    after = _plain(after)
    if before == after:
        return None
    old, new = _flat(before), _flat(after)
    missing = object()  # a key that a version does not have differs from one that is null
    differing = [p for p in [*new, *old] if old.get(p, missing) != new.get(p, missing)]
    if not differing:
        return "an empty section came or went"
    path = differing[0]
    if path.endswith("after"):
        return "the stage before it changed"
    if path not in old or path not in new:
        return f"{path} is {'new' if path in new else 'no longer there'}"
    return f"{path} changed from {old.get(path)!r} to {new.get(path)!r}"


def digest(key: Key) -> str:
    """A short name of a key, for the key of the next stage."""
    return hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()[:16]


def _plain(key: Key) -> Key:
    """The key as JSON gives it back."""
    plain: Key = json.loads(json.dumps(key, default=str))
    return plain


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        p: v
        for name, inner in value.items()
        for p, v in _flat(inner, f"{path}.{name}".lstrip(".")).items()
    }
