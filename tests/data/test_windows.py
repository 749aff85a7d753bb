import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data.windows import Windows, balanced_order, shares

# Documents "ab", "cde", "f": a b 0 c d e 0 f 0, with a = 1 ... f = 6.
STREAM = np.array([1, 2, 0, 3, 4, 5, 0, 6, 0], np.uint8)


def test_windows_by_hand():
    windows = Windows([STREAM], sequence=4)  # 8 targets, so 2 windows
    assert len(windows) == 2
    batch = windows.rows([0, 1])
    assert batch.tokens_BS.tolist() == [[1, 2, 0, 3], [4, 5, 0, 6]]
    assert batch.targets_BS.tolist() == [[2, 0, 3, 4], [5, 0, 6, 0]]
    # the separator ends its document; c, after it, begins the next at position 0
    assert batch.segment_BS.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert batch.position_BS.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    # from a separator nothing is predicted: its target is another document's
    assert batch.valid_BS.tolist() == [[True, True, False, True], [True, True, False, True]]
    assert batch.domain_B.tolist() == [0, 0]
    assert {array.dtype for array in batch} == {np.dtype(np.int32), np.dtype(bool)}


def test_the_last_window_is_padded():
    batch = Windows([STREAM], sequence=6).rows([1])  # targets 6, 7 are left: f and its separator
    assert batch.tokens_BS.tolist() == [[0, 6, 0, 0, 0, 0]]
    assert batch.targets_BS.tolist() == [[6, 0, 0, 0, 0, 0]]
    assert batch.valid_BS.tolist() == [[False, True, False, False, False, False]]
    assert batch.segment_BS.tolist() == [[0, 1, 1, 2, 3, 4]]
    assert batch.position_BS.tolist() == [[0, 0, 1, 0, 0, 0]]


def test_a_row_comes_from_one_domain_and_minus_one_is_padding():
    windows = Windows([STREAM, STREAM[:0], STREAM + 100], sequence=4)
    assert windows.count_D.tolist() == [2, 0, 2]
    batch = windows.rows([3, -1, 0])
    assert batch.domain_B.tolist() == [2, -1, 0]
    assert batch.tokens_BS[0].tolist() == [104, 105, 100, 106]
    assert not batch.tokens_BS[1].any() and not batch.valid_BS[1].any()


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=8),
    st.integers(2, 9),
)
def test_every_token_is_a_target_once_and_segments_are_documents(documents, sequence):
    stream = np.array([token for document in documents for token in (*document, 0)])
    windows = Windows([stream], sequence)
    batch = windows.rows(range(len(windows)))
    assert batch.targets_BS.reshape(-1)[: len(stream) - 1].tolist() == stream[1:].tolist()
    # all that is predicted: each document but its first token, and the separator that ends it
    predicted = [token for document in documents for token in (*document[1:], 0)]
    assert batch.targets_BS[batch.valid_BS].tolist() == predicted
    number = np.repeat(np.arange(len(documents)), [len(d) + 1 for d in documents])
    for row, _ in enumerate(batch.valid_BS):
        length = min(sequence, len(stream) - row * sequence)
        truth = number[row * sequence :][:length]
        assert batch.segment_BS[row][:length].tolist() == (truth - truth[0]).tolist()
        same = np.diff(batch.segment_BS[row]) == 0
        assert (np.diff(batch.position_BS[row])[same] == 1).all()
        assert (batch.position_BS[row][1:][~same] == 0).all()


def test_validation_order_by_hand():
    # 2, 5 and 1 windows: in turns, then what is left
    assert balanced_order(np.array([2, 5, 1])).tolist() == [0, 2, 7, 1, 3, 4, 5, 6]
    # 4 rows: one from the small domain, and 3 for the other two; domain 1's at even distances
    assert shares(np.array([2, 5, 1]), 4) == [1, 2, 1]
    assert balanced_order(np.array([2, 5, 1]), 4).tolist() == [0, 2, 7, 4]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 120))
def test_validation_order_is_balanced(counts, limit):
    count_D = np.array(counts)
    order = balanced_order(count_D, limit)
    assert len(order) == len(set(order.tolist())) == min(limit or count_D.sum(), count_D.sum())
    share_D = np.bincount(
        np.searchsorted(np.cumsum(count_D), order, "right"), minlength=len(counts)
    )
    short_D = share_D < count_D  # a domain with windows left has as many rows as any, but for one
    if short_D.any():
        assert share_D.max() - share_D[short_D].min() <= 1


def test_a_window_that_is_not_there_is_an_error():
    with pytest.raises(IndexError):
        Windows([STREAM], 4).rows([2])
