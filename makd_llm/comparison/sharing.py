"""What a row takes over from the runs that are made once: the factorized student, and what was
measured of teacher and factorized student. By hard links, so that it takes no room.

Nothing is taken on trust: stages and measurements are copied with their keys, and the row's run
uses them only where the keys are its own. The key of a cut has a digest of the teacher's files in
it, that of a measurement one of the model's.
"""

import os
import shutil
from pathlib import Path

from makd_llm.stages import Stages

CUTS = {
    "shape": ("shaped",),
    "factorize": ("factorized", "factorization.json", "factorization.png"),
}
"""The stages that are taken over, and what each leaves in the run folder."""


def take_over(shared: Path, run_dir: Path) -> None:
    """Links a shared run's student and measurements into a run's folder, where it has not got the
    same already. The files are replaced by other files later, never written into.
    """
    theirs, ours = Stages(shared), Stages(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for stage, results in CUTS.items():
        key = theirs.key_of(stage)
        there = [name for name in results if (shared / name).exists()]
        if key is None or (ours.stands(stage, key) and all((run_dir / n).exists() for n in there)):
            continue
        ours.mark(stage, key, done=False)
        for name in there:
            link(shared / name, run_dir / name)
        ours.mark(stage, key, done=True)
    take_measured(shared, run_dir, "*.json")


def take_measured(shared: Path, run_dir: Path, which: str) -> None:
    """Links what was measured of models that both runs have. which: a pattern of the files."""
    for path in (shared / "measured").glob(which):
        (run_dir / "measured").mkdir(parents=True, exist_ok=True)
        link(path, run_dir / "measured" / path.name)


def same_cut(shared: Path, run_dir: Path) -> bool:
    """Whether a run's student was cut as the shared one."""
    key = Stages(shared).key_of("factorize")
    return key is not None and Stages(run_dir).key_of("factorize") == key


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or the same tree; where the file system has no hard
    links, a copy.
    """
    if source.is_dir():
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(source, target, copy_function=_link)
    else:
        target.unlink(missing_ok=True)
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # not on this file system: a copy takes room, and is no different
        shutil.copy2(source, target)
