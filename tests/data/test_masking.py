"""Masked tokens: by hand, and the same rows masked the same whoever reads them, and when."""

import dataclasses

import numpy as np
import pytest

from moejax.data import UNSCORED, open_dataset
from moejax.data.masking import mask_tokens
from moejax.data.windows import Windows
from tests.data.test_text_dataset import equal, joined

STREAM = np.array([1, 2, 0, 3, 4, 5, 0, 6, 0], np.uint8)  # documents: 1 2, 3 4 5, 6


@pytest.fixture(scope="module")
def masked(small_config):
    return open_dataset(dataclasses.replace(small_config, mask_rate=0.25), progress=False)


def test_by_hand():
    """Draws below 1: every real token is masked, no separator or padding."""
    rows = Windows([STREAM], sequence=6).rows([0, 1, -1])  # 1 2 0 3 4 5 | 0 6 0 ...
    batch = mask_tokens(rows, 1.0, seed=0, number_B=[0, 1, -1])
    none = UNSCORED
    assert not batch.tokens_BS.any()
    assert batch.targets_BS.tolist() == [
        [1, 2, none, 3, 4, 5],
        [none, 6, none, none, none, none],
        [none] * 6,
    ]
    assert all(np.array_equal(a, b) for a, b in zip(batch[2:], rows[2:], strict=True))
    assert [a.dtype for a in batch] == [a.dtype for a in rows]


def test_a_share_is_masked_and_nothing_else_changes(masked, small):
    plain, batch = (d.train_batch(0, seed=2, batch=200) for d in (small, masked))
    hidden_BS = batch.targets_BS != UNSCORED
    assert not hidden_BS[~batch.valid_BS].any()
    assert hidden_BS.sum() == pytest.approx(0.25 * batch.valid_BS.sum(), rel=0.1)
    np.testing.assert_array_equal(batch.targets_BS[hidden_BS], plain.tokens_BS[hidden_BS])
    np.testing.assert_array_equal(batch.tokens_BS, np.where(hidden_BS, 0, plain.tokens_BS))
    assert masked.fingerprint != small.fingerprint
    assert masked.vocab_size == small.vocab_size


def test_a_row_is_masked_by_its_number_and_the_seed(masked):
    whole = masked.train_batch(16, seed=1)
    shares = [masked.train_batch(16, seed=1, share=rows) for rows in np.split(np.arange(8), 4)]
    assert equal(joined(shares), whole)
    again, after = next(masked.train_batches(20, seed=1, batch=4))  # resumed, in batches of 4
    assert after == 24 and equal(again, masked.train_batch(16, seed=1, share=slice(4, 8)))

    windows = sum(size["windows"] for size in masked.sizes["train"].values())
    epochs = [masked.train_batch(e * windows, seed=0, batch=windows) for e in range(2)]
    seen = [set(map(bytes, batch.tokens_BS)) for batch in epochs]
    assert len(seen[0] & seen[1]) < 0.1 * windows  # another epoch masks other tokens


def test_evaluation_masks_a_row_the_same_however_many_are_read(masked):
    def by_text(rows):
        batches = masked.validation_batches(batch=8, limit_rows=rows)
        batch = joined([batches[i] for i in range(len(batches))])
        text_BS = np.where(batch.targets_BS == UNSCORED, batch.tokens_BS, batch.targets_BS)
        return dict(zip(map(bytes, text_BS), map(bytes, batch.tokens_BS), strict=True))

    every, few = by_text(0), by_text(12)  # 12: and 4 rows of padding
    assert len(few) == 13 and few.items() <= every.items() | {(bytes(128), bytes(128))}


def test_how_often_ids_stand_in_the_input(masked, small):
    count_V, plain_V = masked.count_V, small.count_V
    assert count_V.sum() == pytest.approx(plain_V.sum())
    np.testing.assert_allclose(count_V[1:], 0.75 * plain_V[1:], rtol=1e-6)
