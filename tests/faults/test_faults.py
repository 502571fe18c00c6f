"""Faults, one by one: killed, terminated, disks that are full, files that are damaged, records that
are no numbers, ranks that are slow or have no memory.

After each: what was saved is not lost, the same command goes on or says why not, and the student is
that of the undisturbed run, to the last bit where the fault leaves the arithmetic alone. Two ranks
under ZeRO-3 in bf16, a tiny student.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from makd_llm.testing.faults import (
    EVERY,
    MANY,
    STEPS,
    Case,
    Row,
    at_step,
    before,
    die,
    resumed,
)

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(1800)]

Make = Callable[..., Case]
Note = Callable[[Row], None]
Undisturbed = Callable[..., Case]
WORKS, SAME = "goes on", "the same bits"


def in_micro_batch(step: int, act: Callable[[Any], Any]) -> None:
    """Has this rank do something with the batch of a step, in its forward and backward."""
    from makd_llm import pipeline

    original = pipeline.distill_step

    def distill_step(student: Any, teacher: Any, objectives: Any, batch: Any, counts: Any) -> Any:
        if objectives.step == step:
            act(objectives)
        return original(student, teacher, objectives, batch, counts)

    pipeline.distill_step = distill_step


def check_going_on(case: Case, whole: Case, saved: int) -> Row:
    """Lets the case go on, and says what came of it; the fault is to be named."""
    said = case.finish()
    lost = max(0, saved - resumed(said))
    assert case.equals(whole)
    return Row("", 1, lost, WORKS, SAME)


def test_a_rank_is_killed_at_random_steps(make: Make, undisturbed: Undisturbed, note: Note) -> None:
    """Twenty times within one run, each time some moment into a step or into the saving after it;
    the other rank ends by itself, with one line.
    """
    whole, case, dice = undisturbed(MANY), make("killed", MANY), random.Random(5)
    times, lost, before_kill = 20, 0, 0
    for _ in range(times):
        step = min(before_kill + 1 + dice.randrange(3), MANY - 4)
        victim, delay = dice.randrange(2), dice.random() * 0.15

        def breaking(
            rank: int, victim: int = victim, delay: float = delay, step: int = step
        ) -> None:
            if rank == victim:
                at_step(step, lambda: threading.Timer(delay, die).start())

        ranks = case.start(breaking=breaking).wait()
        assert ranks.codes[victim] == -signal.SIGKILL, ranks.said(victim)
        assert ranks.codes[1 - victim] == 74 and not ranks.hung, ranks.said(1 - victim)
        assert "has lost the others" in ranks.last_words(1 - victim)
        lost += max(0, before_kill - resumed(ranks.said()))
        before_kill = case.saved()
    said = case.finish()
    lost += max(0, before_kill - resumed(said))
    assert case.equals(whole)
    note(Row("kill -9 of a rank at random steps", times, lost, WORKS, SAME))
    assert lost == 0


def killed_while_saving(where: str) -> Callable[[int], None]:
    """Kills a rank at a place in the saving of its third checkpoint."""

    def breaking(rank: int) -> None:
        from makd_llm.checkpoint import state

        def at(number: int) -> None:
            if number == 3:
                die()

        if where == "half a file" and rank == 1:
            original, files = torch.save, 0

            def half(obj: Any, path: Any, **more: Any) -> None:
                nonlocal files
                original(obj, path, **more)
                files += 1
                if files == 8:
                    with open(path, "r+b") as file:
                        file.truncate(os.path.getsize(path) // 2)
                    die()

            torch.save = half
        if where == "before its own file" and rank == 1:
            before(state, "_write_own", at)
        if where == "before the manifest" and rank == 0:
            before(state.Checkpoints, "_publish", at)
        if where == "before the pointer" and rank == 0:
            # The manifest and the pointer are written by the same function, about.json too.
            before(state, "write_whole", lambda number: at(number // 3 if number % 3 == 0 else 0))
        if where == "after the pointer" and rank == 0:
            write, written = state.write_whole, 0

            def and_die(*arguments: Any, **named: Any) -> None:
                nonlocal written
                write(*arguments, **named)
                written += 1
                at(written // 3 if written % 3 == 0 else 0)

            state.write_whole = and_die

    return breaking


def test_a_rank_is_killed_inside_the_saving(
    make: Make, undisturbed: Undisturbed, note: Note
) -> None:
    places = (
        "half a file",
        "before its own file",
        "before the manifest",
        "before the pointer",
        "after the pointer",
    )
    lost = 0
    for number, where in enumerate(places):
        case = make(f"saving-{number}")
        ranks = case.start(breaking=killed_while_saving(where)).wait()
        assert -signal.SIGKILL in ranks.codes.values() and not ranks.hung, where
        assert case.saved() in (2 * EVERY, 3 * EVERY), where
        lost += check_going_on(case, undisturbed(), case.saved()).lost
    note(Row("kill -9 inside the saving, at 5 places", len(places), lost, WORKS, SAME))
    assert lost == 0


def test_sigterm_while_it_saves(make: Make, undisturbed: Undisturbed, note: Note) -> None:
    """It comes to both ranks while files are written; also in the last saving of all."""
    lost = 0
    for number, which in enumerate((2, STEPS // EVERY)):
        case = make(f"terminated-{number}")

        def breaking(rank: int, which: int = which) -> None:
            from makd_llm.checkpoint import state

            def terminate(count: int) -> None:
                if count == which:
                    os.kill(os.getpid(), signal.SIGTERM)

            before(state, "_write_own", terminate)

        ranks = case.start(breaking=breaking).wait()
        assert ranks.codes[0] == 75 and not ranks.hung, ranks.said()
        assert "state saved; the same command goes on" in ranks.last_words()
        assert case.saved() == min(which * EVERY + 1, STEPS), "one step more, and saved again"
        lost += check_going_on(case, undisturbed(), case.saved()).lost
    note(Row("SIGTERM while it saves", 2, lost, WORKS, SAME))
    assert lost == 0


def test_the_disk_is_full_while_it_saves(
    make: Make, undisturbed: Undisturbed, note: Note, small_disk: Path | None
) -> None:
    if small_disk is None:
        pytest.skip("this user may not mount a tmpfs; the limit of a file's size is tested beside")
    case = make("full", parent=small_disk)
    filler = small_disk / "filler"

    def breaking(rank: int) -> None:
        from makd_llm.checkpoint import state

        def fill(count: int) -> None:
            if count == 2:
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while file.write(bytes(4096)) == 4096:
                        pass
                os.truncate(filler, filler.stat().st_size - 65536)

        if rank == 0:
            before(state, "_fresh", fill)

    ranks = case.start(breaking=breaking).wait()
    assert ranks.codes[0] == 2 and not ranks.hung, ranks.said()
    words = ranks.last_words()
    assert "step-00000004: cannot be written" in words and "step-00000002 stands" in words
    assert "free some space" in words and "Traceback" not in ranks.said() + ranks.said(1)
    assert case.saved() == EVERY
    filler.unlink()
    row = check_going_on(case, undisturbed(), case.saved())
    note(Row("disk full while it saves (tmpfs)", 1, row.lost, f"says so; freed: {WORKS}", SAME))
    assert row.lost == 0


def test_a_file_grows_too_large_while_it_saves(
    make: Make, undisturbed: Undisturbed, note: Note
) -> None:
    """On one rank alone, of which the other would not know."""
    lost = 0
    for limited in (0, 1):
        case = make(f"limited-{limited}")

        def breaking(rank: int, limited: int = limited) -> None:
            from makd_llm.checkpoint import state

            def limit(count: int) -> None:
                if count == 2:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (32768, 32768))

            if rank == limited:
                # The engine is told where its failures go just before it writes.
                before(state, "_noted_failures", limit)

        ranks = case.start(breaking=breaking).wait()
        assert ranks.codes[0] == 2 and not ranks.hung, ranks.said() + ranks.said(1)
        assert "cannot be written" in ranks.last_words() and "stands" in ranks.last_words()
        assert "Traceback" not in ranks.said() + ranks.said(1)
        lost += check_going_on(case, undisturbed(), case.saved()).lost
    what = "file too large while it saves (RLIMIT_FSIZE)"
    note(Row(what, 2, lost, f"says so; lifted: {WORKS}", SAME))
    assert lost == 0


def stopped(make: Make, name: str) -> Case:
    """A run that was killed at step 7, with checkpoints of 2, 4 and 6."""
    case = make(name)
    case.start(breaking=lambda rank: at_step(7, die)).wait()
    assert case.saved() == 6
    return case


def copy(case: Case, name: str) -> Case:
    """The same run in another folder."""
    folder = case.dir.with_name(f"{case.dir.name}-{name}")
    shutil.copytree(case.dir, folder)
    return Case(case.tiny, folder, case.logs, case.steps)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 9 // 10)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("fault", "damage", "words"),
    [
        ("a truncated checkpoint file, one of each kind", truncate, "is truncated"),
        ("a bit-flipped one, one of each kind", flip, "is damaged (its SHA-256 differs)"),
    ],
)
def test_a_file_of_the_newest_checkpoint_is_damaged(
    make: Make,
    undisturbed: Undisturbed,
    note: Note,
    fault: str,
    damage: Callable[[Path], None],
    words: str,
) -> None:
    """DeepSpeed's, a rank's own, what the checkpoint says of itself, and the manifest."""
    begun, lost = stopped(make, damage.__name__), 0
    for name in ("*pp_rank_1*optim_states.pt", "rank-0.pt", "about.json", "manifest.json"):
        case = copy(begun, name.partition(".")[0].strip("*"))
        damage(next((case.checkpoints / "step-00000006").glob(name)))
        said = case.finish()
        assert "step-00000006: " in said and "trying the one before it" in said
        assert name == "manifest.json" or words in said  # what it says depends on where it is hit
        lost += max(0, 4 - resumed(said))  # step 4 is the newest sound one
        assert case.equals(undisturbed())
    note(Row(fault, 4, lost, "says so; the one before it", SAME))
    assert lost == 0


def test_the_pointer_is_gone(make: Make, undisturbed: Undisturbed, note: Note) -> None:
    case = stopped(make, "pointerless")
    (case.checkpoints / "latest").unlink()
    row = check_going_on(case, undisturbed(), 6)
    note(Row("a checkpoint folder without its pointer", 1, row.lost, WORKS, SAME))
    assert row.lost == 0


def test_a_data_file_is_changed(make: Make, undisturbed: Undisturbed, note: Note) -> None:
    case = stopped(make, "data")
    file = case.tiny / "train.jsonl"
    original = file.read_text()
    try:
        file.write_text(original.replace("cat", "dog", 1))
        ranks = case.start().wait()
        assert ranks.codes[0] == 2, ranks.said()
        words = ranks.last_words()
        assert "the file has changed since distil saved step 6 (sha256" in words
        assert case.saved() == 6
    finally:
        file.write_text(original)
    row = check_going_on(case, undisturbed(), 6)
    note(Row("a data file changed", 1, row.lost, f"refused by hash; put back: {WORKS}", SAME))
    assert row.lost == 0


def test_a_batch_gives_nan(make: Make, note: Note) -> None:
    """On one rank. The step is skipped on both and its records are named; so it is where the run is
    killed afterwards. (Without the step the student is another than the undisturbed one.)
    """

    def breaking(rank: int) -> None:
        if rank != 1:
            return
        from makd_llm.train.engine import Trained

        trained, poison = cast(Any, Trained), []
        in_micro_batch(5, lambda objectives: poison.append(float("nan")))
        original = trained.backward
        trained.backward = lambda self, loss: original(self, loss * sum(poison, 1.0))
        at_step(6, poison.clear)

    def and_killed(rank: int) -> None:
        breaking(rank)
        at_step(8, die)

    straight, killed = make("nan"), make("nan-killed")
    ranks = straight.start(breaking=breaking).wait()
    assert list(ranks.codes.values()) == [0, 0], ranks.said() + ranks.said(1)
    assert "step 5 skipped, its gradient is not finite" in ranks.said()
    entry = json.loads((straight.dir / "bad_steps.jsonl").read_text())
    assert entry["step"] == 5 and len(entry["record_ids"]) == 4
    assert all(bool(t.isfinite().all()) for t in straight.student().values())
    killed.start(breaking=and_killed).wait()
    row = check_going_on(killed, straight, killed.saved())
    note(Row("NaN in a batch", 2, row.lost, "the step is skipped", "finite; killed after: same"))
    assert row.lost == 0


def test_a_rank_is_far_slower(make: Make, undisturbed: Undisturbed, note: Note) -> None:
    case = make("slow")

    def breaking(rank: int) -> None:
        if rank == 1:
            for step in (2, 5, 9):
                in_micro_batch(step, lambda objectives: time.sleep(2.0))

    ranks = case.start(breaking=breaking).wait()
    assert list(ranks.codes.values()) == [0, 0]
    assert case.equals(undisturbed())
    note(Row("a rank 20 times slower than the other", 1, 0, "was not needed", SAME))


def test_memory_runs_out_in_a_micro_batch(make: Make, undisturbed: Undisturbed, note: Note) -> None:
    """An allocation that really fails, on either rank. Both end with the same line."""
    lost = 0
    for victim in (0, 1):
        case = make(f"memory-{victim}")

        def breaking(rank: int, victim: int = victim) -> None:
            if rank == victim:
                in_micro_batch(5, lambda objectives: torch.empty(2**55, dtype=torch.uint8))

        ranks = case.start(breaking=breaking).wait()
        assert ranks.codes == {0: 71, 1: 71} and not ranks.hung, ranks.said() + ranks.said(1)
        words = ranks.last_words()
        assert words == ranks.last_words(1)
        assert f"rank {victim} ran out of memory at step 5, in a micro-batch" in words
        assert words.count("'r") == 2, "its two records are named"
        assert "set distil.train.micro_batch_size=1" in words
        assert "Traceback" not in ranks.said() + ranks.said(1)
        lost += check_going_on(case, undisturbed(), case.saved()).lost
    note(Row("out of memory in one micro-batch", 2, lost, f"all say so; then {WORKS}", SAME))
    assert lost == 0


def test_other_numbers_of_ranks_go_on(make: Make, undisturbed: Undisturbed, note: Note) -> None:
    """2, then 1, then 4, then 2; to rounding, as sums are added up in another order. The first
    start with 1 is killed while it cuts the checkpoint anew.
    """
    case, lost, saved = stopped(make, "elastic"), 0, 6

    def die_cutting(rank: int) -> None:
        from deepspeed.checkpoint import ds_to_universal

        before(ds_to_universal, "_save_optimizer_state_stage3", lambda number: die())

    case.start(ranks=1, breaking=die_cutting).wait()
    assert case.saved() == saved and list(case.checkpoints.glob("*.writing"))
    for number, ranks_of in enumerate((1, 4)):
        step = 7 + 2 * number
        ranks = case.start(
            ranks=ranks_of, breaking=lambda rank, step=step: at_step(step + 2, die)
        ).wait()
        assert f"goes on with {ranks_of}" in ranks.said(), ranks.said()
        lost += max(0, saved - resumed(ranks.said()))
        assert case.saved() > saved
        saved = case.saved()
    said = case.finish()
    lost += max(0, saved - resumed(said))
    ours, theirs = case.student(), undisturbed().student()
    largest = max(
        float((ours[n].float() - t.float()).norm() / t.float().norm()) for n, t in theirs.items()
    )
    assert largest < 0.01
    assert not list(case.checkpoints.glob("*.writing"))
    what = "another number of ranks: 2, 1 (killed while cutting), 1, 4, 2"
    note(Row(what, 4, lost, WORKS, f"relative difference {largest:.0e}"))
    assert lost == 0
