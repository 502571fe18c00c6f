"""The global batch of a step is the same however it is shared, and after any resume."""

import json
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase as Tokenizer

from makd_llm.data.batch import Batch
from makd_llm.data.loader import TrainLoader
from makd_llm.data.prompt import PromptBuilder
from makd_llm.data.records import BadRecord
from makd_llm.data.schema import OnBadRecord
from makd_llm.errors import UserError

T = TypeVar("T")
Load = Callable[..., Any]
MakeLoader = Callable[..., TrainLoader]
quick = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def make_loader(plain: Tokenizer, make_rows: Load, load: Load, tmp_path: Path) -> MakeLoader:
    def make(records: int = 10, *, streaming: bool = False, **chosen: Any) -> TrainLoader:
        path = tmp_path / f"{records}.jsonl"
        if not path.exists():
            path.write_text("\n".join(map(json.dumps, make_rows(records))))
        options: dict[str, Any] = {
            "batch_size": 4,
            "micro_batch_size": 2,
            "rank": 0,
            "world_size": 1,
            "seed": 0,
            "pad_id": 0,
            "shuffle_buffer": 4,
            "on_bad_record": "error",
        } | chosen
        source = load(path, streaming=streaming, on_bad_record=options["on_bad_record"])
        return TrainLoader(source, PromptBuilder(plain, max_length=64), **options)

    return make


def ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.record_ids]


def flat(parts: Iterable[Iterable[T]]) -> list[T]:
    return list(chain.from_iterable(parts))


def steps(loader: TrainLoader, count: int) -> list[list[str]]:
    return [ids(loader.next_step()) for _ in range(count)]


@quick
@given(
    micro=st.integers(1, 3),
    world=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    records=st.integers(1, 12),
    streaming=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_split_gives_the_same_global_batch(
    make_loader: MakeLoader,
    micro: int,
    world: int,
    accumulation: int,
    records: int,
    streaming: bool,
    seed: int,
) -> None:
    size = micro * world * accumulation
    common = {"records": records, "streaming": streaming, "batch_size": size, "seed": seed}
    alone = make_loader(micro_batch_size=size, **common)
    ranks = [
        make_loader(micro_batch_size=micro, rank=rank, world_size=world, **common)
        for rank in range(world)
    ]
    for _ in range(4):
        (whole,) = alone.next_step()
        parts = [loader.next_step() for loader in ranks]
        assert all(len(batches) == accumulation for batches in parts)
        joined = [parts[r][a].record_ids for a in range(accumulation) for r in range(world)]
        assert tuple(flat(joined)) == whole.record_ids
        assert sum(int(b.n_targets) for part in parts for b in part) == int(whole.n_targets)


@quick
@given(
    stopped=st.integers(0, 9),
    records=st.integers(1, 11),
    streaming=st.booleans(),
    shuffle=st.booleans(),
    buffer=st.integers(1, 12),
    worlds=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
)
def test_resumed_equals_uninterrupted(
    make_loader: MakeLoader,
    stopped: int,
    records: int,
    streaming: bool,
    shuffle: bool,
    buffer: int,
    worlds: tuple[int, int],
) -> None:
    common = {
        "records": records,
        "streaming": streaming,
        "shuffle": shuffle,
        "shuffle_buffer": buffer,
        "micro_batch_size": 1,
    }
    whole = make_loader(**common)
    expected, epochs = [], []
    for _ in range(14):
        expected.append(set(ids(whole.next_step())))
        epochs.append(whole.epoch)
    first = make_loader(world_size=worlds[0], **common)
    steps(first, stopped)
    state = json.loads(json.dumps(first.state_dict()))
    first.next_step()  # going on must not change the state that was kept
    resumed = [make_loader(world_size=worlds[1], rank=r, **common) for r in range(worlds[1])]
    for loader in resumed:
        loader.load_state_dict(state)
    for step in range(stopped, 14):
        assert {name for loader in resumed for name in ids(loader.next_step())} == expected[step]
        assert all(loader.epoch == epochs[step] for loader in resumed)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("records", [3, 8, 10])
def test_every_epoch_holds_every_record_once(
    make_loader: MakeLoader, streaming: bool, records: int
) -> None:
    loader = make_loader(records, streaming=streaming)
    seen = flat(steps(loader, 3 * records))
    assert len(seen) == 12 * records
    epochs = [tuple(seen[i : i + records]) for i in range(0, len(seen), records)]
    assert all(sorted(epoch, key=int) == list(map(str, range(records))) for epoch in epochs)
    assert len(set(epochs)) > 1, "each epoch has its own order"
    assert loader.epoch == 12.0


@pytest.mark.parametrize("streaming", [False, True])
def test_seed_and_shuffle_rule_the_order(make_loader: MakeLoader, streaming: bool) -> None:
    def order(**options: Any) -> list[list[str]]:
        return steps(make_loader(40, streaming=streaming, shuffle_buffer=40, **options), 5)

    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert order(shuffle=False) == [[str(4 * s + j) for j in range(4)] for s in range(5)]


def test_a_stream_is_mixed_within_its_blocks(make_loader: MakeLoader) -> None:
    seen = flat(steps(make_loader(12, streaming=True), 3))
    assert [{int(name) // 4 for name in seen[i : i + 4]} for i in (0, 4, 8)] == [{0}, {1}, {2}]


def test_epoch_counts_parts_of_a_list(make_loader: MakeLoader) -> None:
    loader = make_loader(10)
    assert loader.epoch == 0.0
    loader.next_step()
    assert loader.epoch == 0.4
    assert loader.accumulation == 2


@pytest.mark.parametrize("streaming", [False, True])
class TestTooLong:
    @pytest.fixture
    def path(self, tmp_path: Path, make_rows: Load) -> Path:
        rows = make_rows(6)
        rows[3]["summary"] = "zq" * 80
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nbroken\n")
        return tmp_path / "a.jsonl"

    def build(
        self, path: Path, plain: Tokenizer, load: Load, streaming: bool, policy: OnBadRecord
    ) -> TrainLoader:
        source = load(path, streaming=streaming, on_bad_record="skip")
        return TrainLoader(
            source,
            PromptBuilder(plain, max_length=64),
            batch_size=2,
            micro_batch_size=1,
            rank=0,
            world_size=1,
            seed=0,
            pad_id=0,
            shuffle_buffer=3,
            on_bad_record=policy,
        )

    def test_is_an_error_with_its_line(
        self, streaming: bool, path: Path, plain: Tokenizer, load: Load
    ) -> None:
        with pytest.raises(BadRecord, match=r"^a\.jsonl, line 4: .*no room for the document"):
            loader = self.build(path, plain, load, streaming, "error")
            assert streaming, "a list is checked before the first step"
            steps(loader, 3)

    def test_is_counted_once(
        self, streaming: bool, path: Path, plain: Tokenizer, load: Load
    ) -> None:
        loader = self.build(path, plain, load, streaming, "skip")
        expected = {"malformed JSON": 1, "summary longer than the window": 1}
        if not streaming:
            assert loader.skipped == expected
        seen = flat(steps(loader, 20))
        assert set(seen) == {"0", "1", "2", "4", "5"}
        assert loader.skipped == expected
        assert loader.describe_skipped() == (
            "skipped 2 records: 1 malformed JSON, 1 summary longer than the window"
        )
        again = self.build(path, plain, load, streaming, "skip")
        again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert again.skipped == expected
        assert steps(again, 5) == steps(loader, 5)

    def test_if_none_is_left_that_is_an_error(
        self, streaming: bool, plain: Tokenizer, load: Load, tmp_path: Path
    ) -> None:
        row = {"id": "a", "document": "d", "summary": "zq" * 80}
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError, match="no record fits the window"):
            self.build(tmp_path / "a.jsonl", plain, load, streaming, "skip").next_step()


def test_sizes_that_contradict_are_named(make_loader: MakeLoader) -> None:
    with pytest.raises(UserError, match=r"batch_size 10 .* micro_batch_size 2 × 4 ranks = 8"):
        make_loader(batch_size=10, world_size=4)
    with pytest.raises(ValueError, match="rank 3"):
        make_loader(rank=3)
    with pytest.raises(UserError, match="shuffle_buffer is 0"):
        make_loader(streaming=True, shuffle_buffer=0)


def test_a_state_of_other_data_is_refused(make_loader: MakeLoader) -> None:
    state = make_loader(10).state_dict()
    with pytest.raises(UserError, match="had records 10 and this run's has 11"):
        make_loader(11).load_state_dict(state)
    with pytest.raises(UserError, match="had seed 0 and this run's has 1"):
        make_loader(10, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="had shuffle buffer None and this run's has 4"):
        make_loader(10, streaming=True).load_state_dict(state)
    with pytest.raises(UserError, match=r"had batch size \d+ and this run's has 2"):
        make_loader(10, batch_size=2, micro_batch_size=1).load_state_dict(state)


def test_options_reach_the_batch(make_loader: MakeLoader) -> None:
    batches = make_loader(10, padding_side="left", multiple_of=16, pad_id=7).next_step()
    assert all(batch.padded_left and batch.input_ids_BT.shape[1] % 16 == 0 for batch in batches)
    assert all((batch.input_ids_BT[~batch.token_mask_BT] == 7).all() for batch in batches)
