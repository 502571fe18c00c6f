"""The runs that faults are injected into, and the table of what came of it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from makd_llm.testing.faults import EVERY, STEPS, Case, Row

ROWS = pytest.StashKey[list[Row]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "faults" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("faults"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; `make test-faults` runs it"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("faults")
    head = ("fault", "times", "saved steps lost", "the next start", "student, against undisturbed")
    cells = [head, *((r.fault, str(r.times), str(r.lost), r.then, r.same) for r in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for line in cells:
        text = " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        terminalreporter.write_line(text.rstrip())
    lost, times = sum(row.lost for row in rows), sum(row.times for row in rows)
    failed = len(terminalreporter.stats.get("failed", [])) or ""
    terminalreporter.write_line(
        f"{times} faults, {lost} losses" + (failed and f"; {failed} tests failed, and are not here")
    )


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Adds a row to the table."""
    return request.config.stash.setdefault(ROWS, []).append


@pytest.fixture(scope="session")
def begun(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in which the student is cut, by two ranks."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
    import makd_llm.pipeline  # noqa: F401  (so that the forked ranks need not)

    (tiny / "run.yaml").write_text(f"""
teacher: {{model: {tiny}/teacher}}
data: {{source: {tiny}, max_length: 64}}
student: {{rank_multiple: 4, calibration_records: 8, calibration_batch: 4}}
distil:
  train: {{batch_size: 4, learning_rate: 1.0e-3, checkpoint_every: {EVERY}, keep_checkpoints: 3}}
evaluation: {{max_new_tokens: 4}}
""")
    folder = tmp_path_factory.mktemp("begun")
    case = Case(tiny, folder / "run", folder / "logs", STEPS)
    ranks = case.start("--until", "factorize").wait()
    assert list(ranks.codes.values()) == [0, 0], ranks.said() + ranks.said(1)
    return case.dir


Make = Callable[..., Case]


@pytest.fixture(scope="session")
def make(begun: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A case in a copy of that folder, or in one inside `parent`."""
    root = tmp_path_factory.mktemp("cases")

    def made(name: str, steps: int = STEPS, parent: Path | None = None) -> Case:
        run_dir = (parent or root) / name
        shutil.copytree(begun, run_dir)
        return Case(tiny, run_dir, root / "logs", steps)

    return made


@pytest.fixture(scope="session")
def undisturbed(make: Make) -> Callable[[int], Case]:
    """The run that nothing happens to, of so many steps."""
    made: dict[int, Case] = {}

    def of(steps: int = STEPS) -> Case:
        if steps not in made:
            made[steps] = make(f"undisturbed-{steps}", steps)
            made[steps].finish()
        return made[steps]

    return of


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of a few MiB in memory; None where this user may not mount one."""
    import subprocess

    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
