"""Saving and resuming a training stage.

A checkpoint is a folder `step-000100`: DeepSpeed's files, one `rank-K.pt` per rank (loader
position, random state), and a manifest with every file's size and SHA-256. It is written under
another name, renamed when it is whole, and only then the pointer file `latest` moves, atomically. A
checkpoint that does not match its manifest is reported and the one before it is used.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from makd_llm import distributed
from makd_llm.errors import UserError
from makd_llm.files import sha256_of, write_whole

POINTER = "latest"
MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one training stage in one folder; the newest `keep` stay."""

    def __init__(self, folder: Path, *, keep: int, tell: Callable[[str], None]) -> None:
        self.folder = folder
        self.keep = keep
        self.tell = tell

    def save(self, engine: DeepSpeedEngine, step: int, state: dict[str, Any]) -> None:
        """Writes the checkpoint of a step and moves the pointer. Collective. state: this rank's,
        for torch.save.
        """
        final = self.folder / _name(step)
        staging = self.folder / f"{_name(step)}.writing"
        distributed.on_main(_fresh, staging)
        engine.save_checkpoint(str(self.folder), tag=staging.name, save_latest=False)
        torch.save({**state, "rng": _rng_state()}, staging / f"rank-{distributed.rank()}.pt")
        distributed.barrier()
        files = sorted(p for p in staging.rglob("*") if p.is_file())
        mine = files[distributed.rank() :: distributed.world_size()]
        entries = {str(p.relative_to(staging)): [p.stat().st_size, sha256_of(p)] for p in mine}
        manifest = {
            name: e for share in distributed.gather_objects(entries) for name, e in share.items()
        }
        distributed.on_main(self._publish, staging, final, manifest)

    def load(self, engine: DeepSpeedEngine) -> dict[str, Any] | None:
        """Loads the newest sound checkpoint into the engine; returns this rank's state, or None.
        Collective.

        Raises UserError where it was written by another number of ranks.
        """
        lost = False
        for folder in distributed.on_main(self._candidates):
            problem = next((p for p in distributed.gather_objects(_problem(folder)) if p), None)
            if problem:
                self.tell(f"checkpoint {folder}: {problem}; trying the one before it")
                lost = True
                continue
            ranks = len(list(folder.glob("rank-*.pt")))
            if ranks != distributed.world_size():
                raise UserError(
                    f"{folder}: written by {ranks} ranks, this run has "
                    f"{distributed.world_size()}; resume with "
                    f"{ranks} ranks, or delete the folder {self.folder} to start the stage anew"
                )
            loaded, _ = engine.load_checkpoint(str(self.folder), tag=folder.name)
            if loaded is None:
                raise RuntimeError(f"DeepSpeed did not load {folder}, whose files are whole")
            state: dict[str, Any] = torch.load(
                folder / f"rank-{distributed.rank()}.pt", weights_only=True
            )
            _set_rng_state(state.pop("rng"))
            return state
        if lost:
            self.tell(f"checkpoint {self.folder}: no sound one is left; the stage starts anew")
        return None

    def clear(self) -> None:
        """Deletes all of them. Collective."""
        distributed.on_main(shutil.rmtree, self.folder, ignore_errors=True)

    def _publish(self, staging: Path, final: Path, manifest: dict[str, Any]) -> None:
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
        write_whole(self.folder / POINTER, final.name)
        folders = sorted(self.folder.glob("step-*"))
        # Newer ones than this are leftovers of a future that was not resumed (damaged, or never
        # pointed to); they must not push out what this run wrote.
        for old in [f for f in folders if f.name <= final.name][: -self.keep]:
            shutil.rmtree(old)
        for newer in [f for f in folders if f.name > final.name]:
            shutil.rmtree(newer)

    def _candidates(self) -> list[Path]:
        """Newest first, starting at the pointer where it points to something."""
        for unfinished in self.folder.glob("*.writing"):
            shutil.rmtree(unfinished, ignore_errors=True)
        folders = sorted(self.folder.glob("step-*"), reverse=True)
        pointer = self.folder / POINTER
        if pointer.is_file():
            named = pointer.read_text().strip()
            if not (self.folder / named).is_dir():
                self.tell(f"checkpoint {self.folder / named}: missing; trying the one before it")
            return [f for f in folders if f.name <= named]
        return folders


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _problem(folder: Path) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return "its manifest is missing or unreadable"
    for name in sorted(manifest)[distributed.rank() :: distributed.world_size()]:
        size, digest = manifest[name]
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} is truncated ({path.stat().st_size} of {size} bytes)"
        if sha256_of(path) != digest:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
