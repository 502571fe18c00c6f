"""Saving and resuming a training stage.

A checkpoint is a folder `step-00000100`: DeepSpeed's files, one `rank-K.pt` per rank (loader
position, random state), `about.json` (under which config and of which data it was made, by how many
ranks), and a manifest with every file's size and SHA-256. It is written under another name, synced,
renamed when it is whole, and only then the pointer file `latest` moves, atomically. A checkpoint
that does not match its manifest is reported and the one before it is used.

Another number of ranks than the one that wrote it goes on from it as well (universal.py): weights
and optimizer states are cut anew, the state that all ranks share is taken over, what each had for
itself is added up or drawn anew. Whatever is loaded is read as plain values (plain.py).

Checkpoints of another config are set aside as `FOLDER.DIGEST` and taken back when that config is
asked for again; they go when the stage is done.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine

from makd_llm import distributed
from makd_llm.checkpoint.plain import plain_values_only
from makd_llm.checkpoint.universal import is_cut, reading_universal, write_universal
from makd_llm.errors import UserError
from makd_llm.files import is_plain_name, sha256_of, sync, write_whole

POINTER = "latest"
MANIFEST = "manifest.json"
ABOUT = "about.json"

State = dict[str, Any]


class Saved(NamedTuple):
    """What a checkpoint gives back besides the engine's own. state: the same on every rank. shares:
    this rank's numbers that add up over the ranks.
    """

    state: State
    shares: dict[str, float]


class Checkpoints:
    """The checkpoints of one training stage in one folder; the newest `keep` stay.

    about: what they are made under, kept with each of them: `under` (a digest of the stage's key),
    `source` and `content` (where the data lies, and its hash).
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        tell: Callable[[str], None],
        about: dict[str, str | None] | None = None,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.tell = tell
        self.about_run = about or {}

    def save(
        self,
        engine: DeepSpeedEngine,
        step: int,
        state: State,
        shares: dict[str, float] | None = None,
    ) -> None:
        """Writes the checkpoint of a step and moves the pointer. Collective. state: the same on
        every rank, for torch.save; shares: see Saved.

        Raises UserError on every rank where one of them cannot write; what was saved before stays.
        """
        final = self.folder / _name(step)
        staging = self.folder / f"{_name(step)}.writing"
        about = {**self.about_run, "step": step, "ranks": distributed.world_size()}
        try:
            distributed.on_main(_fresh, staging, about)
            with _noted_failures(engine) as failures:
                engine.save_checkpoint(str(self.folder), tag=staging.name, save_latest=False)
            mine = {**state, "shares": shares or {}, "rng": _rng_state()}
            distributed.on_all(_write_own, staging, mine, failures)
            entries = distributed.on_all(_entries, staging)
            shared = distributed.gather_objects(entries)
            manifest = {name: entry for share in shared for name, entry in share.items()}
            distributed.on_main(self._publish, staging, final, manifest)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)  # its space may be what is missing
            raise UserError(self._unwritable(final, error)) from error

    def load(self, engine: DeepSpeedEngine) -> Saved | None:
        """Loads the newest sound checkpoint into the engine; None: there is none. Collective.

        Raises UserError where one cannot be read, or holds what is not to be loaded.
        """
        lost = False
        for folder in distributed.on_main(self._candidates):
            found = distributed.gather_objects(distributed.on_all(_problem, folder))
            problem = next((p for p in found if p), None)
            if problem:
                self.tell(f"checkpoint {folder}: {problem}; trying the one before it")
                lost = True
                continue
            ranks = distributed.on_main(_ranks_of, folder)
            if ranks == distributed.world_size():
                return self._loaded(engine, folder)
            self.tell(
                f"checkpoint {folder}: written by {ranks} ranks, goes on with "
                f"{distributed.world_size()}; equal to rounding, and no longer to the last bit"
            )
            return self._loaded_elsewhere(engine, folder, ranks)
        if lost:
            self.tell(f"checkpoint {self.folder}: no sound one is left; the stage starts anew")
        return None

    def about(self) -> dict[str, Any]:
        """What the newest checkpoint was made under; empty: there is none. For rank 0."""
        found = self._newest_about()
        return {} if found is None else found[1]

    def belong_to(self, under: str) -> None:
        """Sets checkpoints that were made under another key aside, and takes those of this one
        back. Collective.
        """
        distributed.on_main(self._belong_to, under)

    def drop_set_aside(self) -> None:
        """Deletes those that were set aside. Collective."""
        for folder in distributed.on_main(self._set_aside):
            distributed.on_main(shutil.rmtree, folder, ignore_errors=True)
            self.tell(f"checkpoint {folder}: removed, the stage is done under another config")

    def _belong_to(self, under: str) -> None:
        found = self._newest_about()
        if found is not None:
            newest, about = found
            theirs = str(about.get("under"))
            if theirs == under:
                return
            aside = self._aside(theirs if is_plain_name(theirs) else "unknown")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.folder, aside)
            self.tell(f"checkpoint {newest}: of another config, set aside as {aside / newest.name}")
        if self._aside(under).is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self._aside(under), self.folder)
            self.tell(f"checkpoint {self.folder}: taken back, this is its config again")

    def _newest_about(self) -> tuple[Path, dict[str, Any]] | None:
        """Of the newest checkpoint whose own word about itself is whole; the others are damaged,
        and `load` says so.
        """
        told = ((folder, _about(folder)) for folder in self._listed())
        return next(((folder, about) for folder, about in told if about is not None), None)

    def _aside(self, under: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{under}")

    def _set_aside(self) -> list[Path]:
        return sorted(self.folder.parent.glob(f"{self.folder.name}.*"))

    def _loaded(self, engine: DeepSpeedEngine, folder: Path) -> Saved:
        with plain_values_only(folder):
            self._into(engine, folder)
        saved = _read_own(folder / _own_file())
        _set_rng_state(saved.pop("rng"))
        return Saved(saved, saved.pop("shares", {}))

    def _loaded_elsewhere(self, engine: DeepSpeedEngine, folder: Path, ranks: int) -> Saved:
        """Of a checkpoint of another number of ranks."""
        whole = folder.with_name(f"{folder.name}.universal.writing")
        if distributed.on_main(is_cut, folder):
            try:
                distributed.on_main(shutil.rmtree, whole, ignore_errors=True)
                # One level down: DeepSpeed leaves a pointer of its own beside what it writes.
                distributed.on_main(write_universal, folder, whole / folder.name)
                with reading_universal(engine), plain_values_only(folder):
                    self._into(engine, whole / folder.name)
            except (OSError, RuntimeError) as error:
                shutil.rmtree(whole, ignore_errors=True)
                failed = _as_os_error(error)
                if not isinstance(failed, OSError):
                    raise
                raise UserError(self._unwritable(whole, failed)) from error
            distributed.on_main(shutil.rmtree, whole, ignore_errors=True)
        else:
            with plain_values_only(folder):
                self._into(engine, folder)
        saved, shares = distributed.on_main(_joined, folder, ranks)
        _set_rng_of_new_rank(saved.pop("rng"))
        return Saved(saved, shares if distributed.is_main() else dict.fromkeys(shares, 0.0))

    @staticmethod
    def _into(engine: DeepSpeedEngine, folder: Path) -> None:
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed did not load {folder}, whose files are whole")

    def _publish(self, staging: Path, final: Path, manifest: dict[str, Any]) -> None:
        write_whole(
            staging / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True), durable=True
        )
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
        write_whole(self.folder / POINTER, final.name, durable=True)
        folders = _steps(self.folder)
        # Newer ones than this are leftovers of a future that was not resumed (damaged, or never
        # pointed to); they must not push out what this run wrote.
        for old in [f for f in folders if f.name <= final.name][: -self.keep]:
            shutil.rmtree(old)
        for newer in [f for f in folders if f.name > final.name]:
            shutil.rmtree(newer)

    def _candidates(self) -> list[Path]:
        """`_listed`, after what killed runs have left half done is cleared away."""
        for unfinished in self.folder.glob("*.writing"):
            shutil.rmtree(unfinished, ignore_errors=True)
        return self._listed(tell=True)

    def _listed(self, *, tell: bool = False) -> list[Path]:
        """Newest first, starting at the pointer where it points to something."""
        folders = _steps(self.folder)[::-1]
        pointer = self.folder / POINTER
        if not pointer.is_file():
            if tell and folders:
                self.tell(f"checkpoint {self.folder}: no pointer {POINTER}; the newest is taken")
            return folders
        named = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not _STEP.fullmatch(named):
            if tell:
                self.tell(f"checkpoint {pointer}: damaged; the newest checkpoint is taken")
            return folders
        if tell and not (self.folder / named).is_dir():
            self.tell(f"checkpoint {self.folder / named}: missing; trying the one before it")
        return [f for f in folders if f.name <= named]

    def _unwritable(self, what: Path, error: OSError) -> str:
        kept = next(iter(self._listed()), None)
        stands = f"{kept.name} stands" if kept else "nothing was saved before it"
        reason = error.strerror or str(error)
        return (
            f"checkpoint {what}: cannot be written ({reason}; {_free(self.folder)}); {stands}; "
            "free some space, and the same command goes on"
        )


_STEP = re.compile(r"step-\d{8,}")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _own_file() -> str:
    return f"rank-{distributed.rank()}.pt"


def _steps(folder: Path) -> list[Path]:
    """The folders of checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if _STEP.fullmatch(p.name) and p.is_dir())


def _fresh(folder: Path, about: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_whole(folder / ABOUT, json.dumps(about, indent=1))


def _about(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None where that is not what its manifest names."""
    try:
        path = folder / ABOUT
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest[ABOUT] != [path.stat().st_size, sha256_of(path)]:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _ranks_of(folder: Path) -> int:
    return len(list(folder.glob("rank-*.pt")))


class _Noting:
    """DeepSpeed's checkpoint engine, which keeps a failed write to itself for now: DeepSpeed's
    barriers are still to come, and the other ranks wait there.
    """

    def __init__(self, engine: Any, failures: list[Exception]) -> None:
        self._engine, self._failures = engine, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def save(self, state_dict: Any, path: str) -> None:
        self.noting(self._engine.save, state_dict, path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.noting(self._engine.makedirs, path, exist_ok=exist_ok)

    def noting(self, write: Callable[..., None], *arguments: Any, **named: Any) -> None:
        try:
            write(*arguments, **named)
        except (OSError, RuntimeError) as error:
            self._failures.append(_as_os_error(error))


@contextmanager
def _noted_failures(engine: DeepSpeedEngine) -> Iterator[list[Exception]]:
    """Inside, what fails to be written on this rank is added to the list."""
    failures: list[Exception] = []
    own = engine.checkpoint_engine
    noting = engine.checkpoint_engine = _Noting(own, failures)
    # DeepSpeed copies a script beside the checkpoints, past its checkpoint engine.
    copy_script = getattr(engine, "_copy_recovery_script", None)
    if copy_script is not None:
        engine._copy_recovery_script = partial(noting.noting, copy_script)
    try:
        yield failures
    except OSError as error:
        failures.append(error)
    finally:
        engine.checkpoint_engine = own
        if copy_script is not None:
            del engine._copy_recovery_script


def _write_own(staging: Path, mine: State, failures: list[Exception]) -> None:
    """This rank's own file, after DeepSpeed's; raises what went wrong in either."""
    if failures:
        raise failures[0]
    try:
        torch.save(mine, staging / _own_file())
    except RuntimeError as error:
        raise _as_os_error(error) from error


def _read_own(path: Path) -> State:
    """What `_write_own` wrote. Raises UserError where it is something else."""
    with plain_values_only(path.parent):
        found = torch.load(path, weights_only=True)
    if not isinstance(found, dict) or not isinstance(found.get("rng"), dict):
        raise UserError(
            f"checkpoint {path}: not the state of a rank; take a checkpoint that this program wrote"
        )
    return found


def _as_os_error(error: Exception) -> Exception:
    """torch's writer says by a RuntimeError that the disk did not take something."""
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return OSError("the disk took only a part of a file")
    return error


def _entries(staging: Path) -> dict[str, tuple[int, str]]:
    """Name, size and SHA-256 of this rank's share of the files, which are on the disk then."""
    files = sorted(p for p in staging.rglob("*") if p.is_file())
    mine = files[distributed.rank() :: distributed.world_size()]
    for path in mine:
        sync(path)
    return {str(p.relative_to(staging)): (p.stat().st_size, sha256_of(p)) for p in mine}


def _problem(folder: Path) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or None. Raises UserError where
    one is there and cannot be read: it may be sound.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {str(name): (int(size), str(sha)) for name, (size, sha) in manifest.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return "its manifest is missing or unreadable"
    for name in entries:
        if not all(is_plain_name(part) for part in name.split("/")):
            return f"its manifest names {name!r}, which is no file of it"
    own = [f"rank-{rank}.pt" for rank in range(max(1, _ranks_of(folder)))]
    unnamed = {*_files(folder), *own} - {MANIFEST, *entries}
    if unnamed:
        return f"its manifest does not name {min(unnamed)!r}"
    for name in sorted(entries)[distributed.rank() :: distributed.world_size()]:
        size, digest = entries[name]
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} is truncated ({path.stat().st_size} of {size} bytes)"
        try:
            sound = sha256_of(path) == digest
        except OSError as error:
            raise UserError(
                f"checkpoint {path}: cannot be read ({error.strerror}); mend that, or remove "
                f"{folder} to go on from the one before it"
            ) from error
        if not sound:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def _files(folder: Path) -> list[str]:
    """Without hidden ones: file systems leave such, and nothing of a checkpoint has such a name."""
    found = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return sorted(str(p) for p in found if not any(part.startswith(".") for part in p.parts))


def _joined(folder: Path, ranks: int) -> tuple[State, dict[str, float]]:
    """Rank 0's state, and everybody's shares added up. For one rank."""
    shares: dict[str, float] = {}
    states = []
    for rank in range(ranks):
        states.append(_read_own(folder / f"rank-{rank}.pt"))
        for name, share in states[rank].pop("shares", {}).items():
            shares[name] = shares.get(name, 0.0) + share
    return states[0], shares


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free there"
    except OSError:
        return "the folder is out of reach"


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _set_rng_of_new_rank(state: dict[str, Any]) -> None:
    """Random numbers of this rank's own, known from rank 0's state: no two ranks draw the same, and
    the same command draws the same again.
    """
    torch.set_rng_state(state["cpu"])
    seeds = torch.randint(2**62, (distributed.world_size(),))
    torch.manual_seed(int(seeds[distributed.rank()]))
