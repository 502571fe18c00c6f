"""Labels stand beside the logits that predict them, and padding changes nothing."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from makd_llm.data.batch import IGNORE, collate, counts_of, examples_of, key_of, prompt_batch
from makd_llm.data.prompt import Example

SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")

examples = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 5)).map(
        lambda lengths: Example("r", [10 * lengths[0] + i for i in range(sum(lengths))], lengths[0])
    ),
    min_size=1,
    max_size=5,
)


@given(examples, st.sampled_from(SIDES), st.sampled_from([1, 4, 7]))
def test_every_label_is_the_next_summary_token(
    batch_of: list[Example], side: Literal["left", "right"], multiple_of: int
) -> None:
    # 3 also occurs as a token: padding is known by its place, not by its id.
    batch = collate(batch_of, 3, padding_side=side, multiple_of=multiple_of)
    assert batch.input_ids_BT.shape[1] % multiple_of == 0
    for row, example in enumerate(batch_of):
        real = batch.token_mask_BT[row]
        ids, labels = batch.input_ids_BT[row][real].tolist(), batch.labels_BT[row][real].tolist()
        assert ids == example.input_ids
        assert (batch.labels_BT[row][~real] == IGNORE).all()
        assert batch.position_ids_BT[row][real].tolist() == list(range(len(ids)))
        given_, n = example.prompt_length, len(ids)
        assert labels[: given_ - 1] + labels[n - 1 :] == [IGNORE] * given_
        assert labels[given_ - 1 : n - 1] == ids[given_:]
    assert batch.n_tokens == sum(len(example.input_ids) for example in batch_of)
    assert batch.n_targets == sum(len(e.input_ids) - e.prompt_length for e in batch_of)


@given(examples)
def test_both_sides_hold_the_same_targets(batch_of: list[Example]) -> None:
    sides = [collate(batch_of, 0, padding_side=side) for side in SIDES]
    left, right = (
        (
            batch.labels_BT.flatten()[batch.targets_N].tolist(),
            batch.position_ids_BT.flatten()[batch.targets_N].tolist(),
            batch.input_ids_BT.flatten()[batch.targets_N].tolist(),
        )
        for batch in sides
    )
    assert left == right
    assert (sides[0].labels_BT.flatten()[sides[0].targets_N] != IGNORE).all()
    assert sides[0].n_targets == len(sides[0].targets_N)


def test_attention_is_told_of_padding_on_the_left_only() -> None:
    batch_of = [Example("a", [5, 6, 7], 2), Example("b", [8, 9], 1)]
    left = collate(batch_of, 0, padding_side="left")
    assert left.key_mask_BT is not None
    assert left.key_mask_BT.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert collate(batch_of, 0).key_mask_BT is None
    assert left.record_ids == ("a", "b")


def test_moving_keeps_everything() -> None:
    batch = collate([Example("a", [5, 6, 7], 2)], 0, padding_side="left")
    moved = batch.to("meta")
    assert (moved.record_ids, moved.padded_left) == (("a",), True)
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).is_meta
            assert getattr(moved, name).dtype == value.dtype


def test_prompts_end_at_the_same_position() -> None:
    batch = prompt_batch([[1, 2, 3], [4]], 0)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.n_targets == 0


def test_misuse_is_refused() -> None:
    example = Example("a", [1], 1)
    with pytest.raises(ValueError, match="at least one"):
        collate([], 0)
    with pytest.raises(ValueError, match="'left' or 'right'"):
        collate([example], 0, padding_side="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive"):
        collate([example], 0, multiple_of=0)


@given(examples, st.sampled_from(SIDES), st.sampled_from([1, 7]))
def test_a_batch_gives_its_examples_back(
    batch_of: list[Example], side: Literal["left", "right"], multiple_of: int
) -> None:
    whole = [
        Example(
            f"r{i}", [*e.input_ids, 9], e.prompt_length, (e.prompt_length // 2, e.prompt_length)
        )
        for i, e in enumerate(batch_of)
    ]
    batch = collate(whole, 3, padding_side=side, multiple_of=multiple_of)
    assert examples_of(batch) == whole
    assert counts_of([batch, batch]) == {
        "targets": 2.0 * int(batch.n_targets),
        "tokens": 2.0 * int(batch.n_tokens),
        "records": 2.0 * len(whole),
    }


def test_examples_are_named_by_their_tokens_and_where_the_summary_begins() -> None:
    example = Example("r", [5, 6, 7, 8], 2)
    same = [example, Example("another id", [5, 6, 7, 8], 2)]
    others = [
        Example("r", [5, 6, 7, 8], 3),
        Example("r", [5, 6, 7], 2),
        Example("r", [2, 5, 6, 7, 8], 2),
        Example("r", [5, 6, 8, 7], 2),
    ]
    for side in SIDES:
        keys = collate([*same, *others], 0, padding_side=side, multiple_of=4).keys
        assert keys == tuple(key_of(e) for e in [*same, *others])
        assert keys[0] == keys[1] and len(set(keys)) == 5 and {len(key) for key in keys} == {16}
    assert collate(same, 0).to("cpu").keys == (key_of(example),) * 2
