"""A teacher cache holds what the teacher says, is found again by its tokens, and survives whatever
ends its writing.
"""
# B batch, T tokens, N summary tokens, K likeliest tokens, D width

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from makd_llm.config import RunConfig
from makd_llm.data.batch import Batch, collate, key_of
from makd_llm.data.schema import Example
from makd_llm.errors import UserError
from makd_llm.models.capture import capture
from makd_llm.models.sharded import load_sharded
from makd_llm.models.source import load_tokenizer
from makd_llm.offline.manifest import read_manifest
from makd_llm.offline.plan import Entry, shards_of
from makd_llm.offline.read import TeacherCache
from makd_llm.offline.shards import Answer, Shard, is_whole, name_of, write_shard
from makd_llm.shown import Needs, Shown
from makd_llm.teaching import Teaching
from makd_llm.testing import environment_alone
from makd_llm.train.build import build_prompts, build_records

HIDDEN = (1, 3)


class Plain:
    """The teacher without DeepSpeed. delay: seconds of each forward."""

    def __init__(self, folder: Path, delay: float = 0.0) -> None:
        self.model, self.delay = load_sharded(folder, {}, torch.float32), delay

    def __call__(self, batch: Batch, at_head: Any = None) -> Any:
        time.sleep(self.delay)
        with torch.no_grad():
            return self.model(batch, at_head)

    def capture(self, needs: Needs) -> AbstractContextManager[Shown]:
        return capture(self.model.model, self.model.family, needs)

    def close(self) -> None:
        pass


def config(tiny: Path, **changes: Any) -> RunConfig:
    distil = {
        "preset": "kd",
        "objectives": {
            "logits": {"temperature": 2.0},
            "sharp": {"objective": "logits"},
            "hidden": {"layers": HIDDEN},
        },
        "offline": {"top_k": 16, "batch_size": 2},
    }
    given = {
        "teacher": {"model": str(tiny / "teacher")},
        "data": {"source": str(tiny / "train.jsonl"), "max_length": 48},
        "distil": distil,
    }
    return RunConfig.model_validate({**given, **changes})


def write(tiny: Path, out: Path, delay: float = 0.0, **changes: Any) -> list[str]:
    """Writes a cache of the tiny teacher; what was said."""
    said: list[str] = []
    made = config(tiny, **changes)
    teaching = Teaching(made, made.data, torch.float32, said.append)
    teaching.write(tiny / "teacher", HIDDEN, out, lambda folder, size: Plain(folder, delay))
    return said


def in_a_process(tiny: str, out: str) -> None:
    """What is killed."""
    write(Path(tiny), Path(out), delay=0.05)


def cache_in(folder: Path) -> TeacherCache:
    return TeacherCache(folder, read_manifest(folder), dtype=torch.float32)


def examples_of(tiny: Path) -> list[Example]:
    data = config(tiny).data
    prompts = build_prompts(data, load_tokenizer(tiny / "teacher"))
    return [prompts.example(record) for record in build_records(data)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that was written in one go."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    write(tiny, folder)
    return folder


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gets_what_the_teacher_says_of_it(tiny: Path, whole: Path, side: Any) -> None:
    """In the batch's order and place, whichever way it is padded; rounded to bf16."""
    examples = examples_of(tiny)
    chosen = [examples[i] for i in (17, 3, 30, 8)]
    batch = collate(chosen, pad_id=0, padding_side=side, multiple_of=8)
    shown = cache_in(whole).shown(batch, Needs(hidden=frozenset(HIDDEN)))
    teacher = Plain(tiny / "teacher")
    with teacher.capture(Needs(hidden=frozenset(HIDDEN))) as expected:
        logits_BTV = teacher(
            batch.with_padding(), lambda hidden_BTD, weight_VD: hidden_BTD @ weight_VD.T
        )
    real = batch.token_mask_BT
    assert shown.hidden.keys() == expected.hidden.keys()
    for layer, states in shown.hidden.items():
        states_ND = states[0] if side == "right" else states[real]  # without padding; with it
        torch.testing.assert_close(states_ND, expected.hidden[layer][real], rtol=2**-8, atol=1e-5)
        assert side == "right" or not states[~real].any()
    log_p_NV = logits_BTV.flatten(0, 1)[batch.targets_N].double().log_softmax(-1)
    top = shown.top
    assert top is not None and top.temperatures == (1.0, 2.0)
    kept_NK = log_p_NV.gather(-1, top.ids_NK)
    torch.testing.assert_close(kept_NK.sort(-1).values, log_p_NV.topk(16).values.flip(-1))
    torch.testing.assert_close(top.log_p_NK.double(), kept_NK, rtol=2**-8, atol=0)
    for column, tau in enumerate(top.temperatures):
        rest_NV = (log_p_NV / tau).scatter(-1, top.ids_NK, -torch.inf)
        rest_N = rest_NV.logsumexp(-1)
        torch.testing.assert_close(
            top.log_rest_NS[:, column].double(), rest_N, rtol=1e-4, atol=1e-5
        )


def test_only_what_is_needed_is_read(tiny: Path, whole: Path) -> None:
    batch = collate(examples_of(tiny)[:2], pad_id=0)
    cache = cache_in(whole)
    assert cache.shown(batch, Needs(hidden=frozenset({3}))).hidden.keys() == {3}
    assert cache.shown(batch, Needs()).hidden == {}
    mapped = Path("/proc/self/maps").read_text()
    assert str(whole / "shard-") in mapped, "shards are mapped and not read"


def test_the_manifest_says_what_there_is(tiny: Path, whole: Path) -> None:
    manifest, examples = read_manifest(whole), examples_of(tiny)
    assert manifest.finished and manifest.top_k == 16 and manifest.hidden == HIDDEN
    assert manifest.records == len({key_of(example) for example in examples})
    assert manifest.shards == len(list(whole.glob("shard-*"))) > 8
    assert manifest.bytes_per_token == 2 * 2 * 32
    assert manifest.settings["data.max_length"] == 48


def test_killed_and_resumed_equals_uninterrupted_byte_for_byte(
    tiny: Path, whole: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    call = "import runpy, sys; runpy.run_path(sys.argv[1])['in_a_process'](*sys.argv[2:])"
    environment = environment_alone() | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)
    }
    process = subprocess.Popen(
        [sys.executable, "-c", call, __file__, str(tiny), str(broken)],
        env=environment | {"DS_ACCELERATOR": "cpu"},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while len(list(broken.glob("shard-*"))) < 5:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "no shard is written"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = {path: path.stat().st_mtime_ns for path in broken.glob("shard-*")}
    assert 5 <= len(written) < read_manifest(whole).shards
    with pytest.raises(UserError, match="not finished; run the command that writes it again"):
        read_manifest(broken)
    said = write(tiny, broken)
    assert f"{read_manifest(whole).shards - len(written)} of" in said[0]
    assert all(path.stat().st_mtime_ns == before for path, before in written.items()), "kept"
    assert files(broken) == files(whole)


def test_what_is_torn_is_written_again_and_nothing_else(
    tiny: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(whole, folder)
    short, gone, kept = (folder / name_of(number) for number in (1, 2, 3))
    short.write_bytes(short.read_bytes()[:-7])
    gone.unlink()
    (folder / f".writing-{name_of(2)}").write_bytes(b"half of it")
    before = kept.stat().st_mtime_ns
    for path in (short, gone):
        with pytest.raises(UserError, match=f"{path}: missing or damaged; delete"):
            cache_in(folder)
        (folder / "manifest.json").unlink()
        said = write(tiny, folder)
        assert files(folder) == files(whole)
        assert f"{2 if path == short else 1} of" in said[0]
        gone.unlink(missing_ok=path == short)
    assert kept.stat().st_mtime_ns == before


def test_a_folder_of_other_contents_is_written_anew(
    tiny: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(whole, folder)
    distil = {"preset": "kd", "offline": {"top_k": 4, "batch_size": 2}}
    said = write(tiny, folder, distil=distil)
    manifest = read_manifest(folder)
    assert manifest.top_k == 4 and f"{manifest.shards} of {manifest.shards} files" in said[0]
    assert all(is_whole(path, manifest.contents) for path in folder.glob("shard-*"))
    assert write(tiny, folder, distil=distil)[0].endswith(f"0 of {manifest.shards} files to write")


def test_a_record_that_the_teacher_did_not_see_is_named(tiny: Path, whole: Path) -> None:
    example = examples_of(tiny)[5]
    changed = Example(example.record_id, example.input_ids[:-1], example.prompt_length)
    with pytest.raises(UserError, match=f"record {example.record_id}: the teacher cache"):
        cache_in(whole).shown(collate([changed], pad_id=0), Needs())


def test_records_of_the_same_tokens_are_kept_once_and_all_are_found(
    tiny: Path, tmp_path: Path
) -> None:
    lines = (tiny / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:3], lines[1], lines[1]]))
    data = {"source": str(tmp_path / "train.jsonl"), "max_length": 48}
    write(tiny, tmp_path / "cache", data=data)
    assert read_manifest(tmp_path / "cache").records == 3
    cache, examples = cache_in(tmp_path / "cache"), examples_of(tiny)
    assert cache.missing(key_of(example) for example in examples[:5]) == [3, 4]


def answer(key: bytes, targets: int, ids: np.ndarray) -> Answer:
    k = ids.shape[1]
    log_p = torch.randn(targets, k).log_softmax(-1).bfloat16()
    return Answer(key, torch.from_numpy(ids).int(), log_p, torch.zeros(targets, 1), {}, targets + 9)


def test_names_that_end_in_zeros_are_told_apart(tmp_path: Path, whole: Path) -> None:
    keys = [bytes(16), b"a" + bytes(15), b"a" * 15 + b"\0", b"a" * 16, b"a" * 14 + bytes(2)]
    ids = np.array([[4, 7]])
    manifest = read_manifest(whole).model_copy(update={"shards": 1})
    answers = [answer(key, 1, ids) for key in keys]
    write_shard(tmp_path / name_of(0), answers, manifest.contents)
    cache = TeacherCache(tmp_path, manifest, dtype=torch.float32)
    assert cache.missing(keys) == []
    assert cache.missing([b"a" * 13 + bytes(3), b"b" * 16, b"\0" * 15 + b"a"]) == [0, 1, 2]


def zipf(rows: int, k: int, vocabulary: int) -> np.ndarray:
    """Ids as a real teacher has them: small ones are frequent, as they are in a BPE vocabulary."""
    rank = np.arange(1, vocabulary + 1)
    scores = np.log(1.0 / rank)[None] + np.random.default_rng(0).gumbel(size=(rows, vocabulary))
    return np.sort(np.argpartition(-scores, k, axis=1)[:, :k], axis=1)


def uniform(rows: int, k: int, vocabulary: int) -> np.ndarray:
    draws = np.random.default_rng(0)
    return np.stack([np.sort(draws.choice(vocabulary, k, replace=False)) for _ in range(rows)])


@pytest.mark.parametrize("ids", [zipf, uniform])
def test_64_of_49152_tokens_take_at_most_300_bytes(tmp_path: Path, ids: Any) -> None:
    """Of the whole file, tables and all, for summaries of 30 tokens."""
    records = [ids(30, 64, 49152) for _ in range(4)]
    path = tmp_path / name_of(0)
    write_shard(path, [answer(bytes([n] * 16), 30, r) for n, r in enumerate(records)], "x")
    size = path.stat().st_size / (4 * 30)
    print(f"{ids.__name__}: {size:.1f} bytes per summary token")
    assert 200 < size <= 300
    shard = Shard(path)
    for row, expected in enumerate(records):
        found, _, _ = shard.top(shard.opened(), row, 64)
        np.testing.assert_array_equal(found.numpy(), expected)


def test_shards_are_bounded_and_records_of_a_length_stand_together() -> None:
    entries = [Entry(i, bytes([i]), tokens=(i * 7) % 13 + 1, targets=1) for i in range(100)]
    sizes = [1000 * entry.tokens for entry in entries]
    parts = shards_of(entries, sizes)
    assert sorted(e.place for part in parts for e in part) == list(range(100))
    assert all(part == sorted(part, key=lambda e: e.tokens) for part in parts)
    most = -(-sum(sizes) // 32)
    assert all(sum(1000 * e.tokens for e in part) <= max(most, 13000) for part in parts)
    (large,) = shards_of(entries[:1], [10**12])
    assert large == entries[:1]


def test_a_folder_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write(tiny, tmp_path / "file" / "cache")
