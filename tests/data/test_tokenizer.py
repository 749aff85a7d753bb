import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data import tokenizer as tokenizing
from moejax.data.tokenizer import BpeTokenizer, ByteTokenizer, clean, train_bpe

TEXTS = [
    b"the cat sat on the mat\n" * 20,
    "l'été à Évreux, ça va?\t".encode() * 20,
    bytes(range(1, 256)),
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(TEXTS, 300, file, progress=False)
    return BpeTokenizer(file, 300)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@settings(max_examples=60, deadline=None)
@given(text=st.text().map(lambda text: text.replace("\0", "")))
def test_round_trip_and_bytes_of_any_text(kind, bpe, text):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    (ids,) = tokenizer.encode([text.encode()])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.bytes_V[ids].sum() == len(text.encode())
    assert not (ids == 0).any()  # the separator never comes from text
    assert ids.dtype == tokenizer.dtype


def test_separator_stands_for_no_bytes_and_shows_in_text(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        (ids,) = tokenizer.encode([b"the cat"])
        assert tokenizer.bytes_V[0] == 0
        assert tokenizer.decode([*ids.tolist(), 0, *ids.tolist()]) == "the cat\u2400the cat"
    assert clean(b"a\0b\0") == b"ab"


def test_byte_vocabulary():
    assert ByteTokenizer().vocab_size == 256 == len(ByteTokenizer().bytes_V)
    assert ByteTokenizer().encode(["é".encode()])[0].tolist() == [0xC3, 0xA9]
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"  # half a character


def test_bpe_compresses_and_is_deterministic(bpe, tmp_path):
    (ids,) = bpe.encode([TEXTS[0]])
    assert len(ids) < len(TEXTS[0]) / 2
    assert ids.max() > 256  # merged ids are used
    train_bpe(TEXTS, 300, tmp_path / "again.json", progress=False)
    again = BpeTokenizer(tmp_path / "again.json", 300)
    assert again.identity == bpe.identity
    train_bpe(TEXTS[:1], 300, tmp_path / "other.json", progress=False)
    assert BpeTokenizer(tmp_path / "other.json", 300).identity != bpe.identity


def test_bpe_ids_that_a_small_corpus_cannot_fill_stay_unused(tmp_path):
    train_bpe([b"ab"], 500, tmp_path / "t.json", progress=False)
    tokenizer = BpeTokenizer(tmp_path / "t.json", 500)
    assert tokenizer.vocab_size == 500 == len(tokenizer.bytes_V)
    assert (tokenizer.bytes_V[260:] == 0).all()
    assert tokenizer.dtype == np.uint16
    assert tokenizer.decode([499]) == ""


def test_bpe_trains_on_no_more_than_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "TRAINING_BYTES", 100)
    endless = iter(lambda: b"the cat ", b"")
    train_bpe(endless, 262, tmp_path / "t.json", progress=False)  # would not return otherwise
    assert BpeTokenizer(tmp_path / "t.json", 262).vocab_size == 262
