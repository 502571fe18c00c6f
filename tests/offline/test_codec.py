"""Token ids in few bytes: whatever ascends comes back, and k = 64 of a real vocabulary fits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from makd_llm.offline.codec import decode_ids, encode_ids

V = 49152


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Rows of k different ids below a vocabulary, ascending; the first and the last are likely."""
    vocabulary = draw(st.sampled_from([1, 2, 127, 129, 16385, V, 2**21 + 3, 2**31]))
    k = draw(st.integers(1, min(vocabulary, 9)))
    ids = st.integers(0, vocabulary - 1) | st.sampled_from([0, vocabulary - 1])
    row = st.lists(ids, min_size=k, max_size=k, unique=True).map(sorted)
    found = draw(st.lists(row, max_size=5))
    return np.array(found, dtype=np.int64).reshape(-1, k)


@given(rows())
def test_what_is_encoded_comes_back(ids_NK: np.ndarray) -> None:
    data = encode_ids(ids_NK)
    assert data.dtype == np.uint8 and len(data) <= ids_NK.size * 5
    np.testing.assert_array_equal(decode_ids(data, ids_NK.shape[1]), ids_NK)


def test_the_whole_vocabulary_takes_a_byte_each() -> None:
    ids = np.tile(np.arange(V), (2, 1))
    data = encode_ids(ids)
    assert len(data) == 2 * V
    np.testing.assert_array_equal(decode_ids(data, V), ids)


def test_a_row_of_64_never_takes_more_than_two_bytes_each_and_a_few() -> None:
    spread = np.linspace(0, V - 1, 64).astype(np.int64)[None]
    late = np.arange(V - 64, V)[None]
    far = np.array([[*range(61), 20000, 40000, V - 1]])
    assert [len(encode_ids(row)) for row in (spread, late, far)] == [127, 66, 61 + 3 + 3 + 2]


@pytest.mark.parametrize("row", [[3, 3], [4, 3], [-1, 2], [0, 2**31]])
def test_rows_that_do_not_ascend_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend in every row"):
        encode_ids(np.array([row]))


@pytest.mark.parametrize(("data", "k"), [([1, 2, 3], 2), ([1, 130], 1), ([128], 1)])
def test_bytes_that_are_no_rows_are_refused(data: list[int], k: int) -> None:
    with pytest.raises(ValueError, match="no rows of"):
        decode_ids(np.array(data, np.uint8), k)
