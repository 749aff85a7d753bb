"""Documents to token streams on disk, once: one memory-mapped stream for each split and domain.

A stream is document, separator, document, separator ... Rows of any length are cut from it when
they are read (windows.py), so one packing serves every sequence length.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moejax import storage
from moejax.data.config import bpe_size
from moejax.data.prepared import Prepared
from moejax.data.splits import SPLITS, TRAIN
from moejax.data.tokenizer import (
    SEPARATOR,
    BpeTokenizer,
    ByteTokenizer,
    Tokenizer,
    clean,
    train_bpe,
)

PACKING_VERSION = 1  # raise it when the same documents pack to other tokens
BYTES_AT_ONCE = 4_000_000
META = "meta.json"


@dataclass(frozen=True)
class Stream:
    """Token ids of one domain in one split, memory-mapped; `digest` stands for all of them."""

    tokens: np.ndarray
    documents: int
    bytes: int
    digest: str


Streams = dict[tuple[str, str], Stream]  # (split, domain)


def open_tokenizer(kind: str, corpora: list[Prepared], data_dir: Path, progress: bool) -> Tokenizer:
    """Returns the tokeniser "bytes" or "bpe:N", training the latter if it is not cached.

    It is trained on the training split of every domain, also of those that a run leaves out, so
    that runs on different domains of one corpus compare.
    """
    size = bpe_size(kind)
    if not size:
        return ByteTokenizer()
    target = tokenizer_directory(size, corpora, data_dir)
    if not (target / "tokenizer.json").exists():
        with storage.locked(target):
            if not (target / "tokenizer.json").exists():
                for corpus in corpora:
                    corpus.ensure(progress)
                storage.announce(f"training {kind}, once", progress)
                texts = (text for corpus in corpora for _, text in corpus.documents(TRAIN))
                with storage.new_directory(target) as directory:
                    train_bpe(texts, size, directory / "tokenizer.json", progress)
    return BpeTokenizer(target / "tokenizer.json", size)


def tokenizer_directory(size: int, corpora: list[Prepared], data_dir: Path) -> Path:
    """Where the byte-level BPE of `size` ids of some corpora is kept."""
    key = storage.digest([size, *(corpus.key for corpus in corpora)])
    return data_dir / "tokenizers" / f"bpe-{size}-{key}"


def packed_directory(corpus: Prepared, tokenizer: Tokenizer, data_dir: Path) -> Path:
    """Where the streams of a corpus are kept."""
    key = storage.digest([PACKING_VERSION, corpus.key, tokenizer.identity])
    return data_dir / "packed" / f"{corpus.name}-{key}"


def packed(corpus: Prepared, tokenizer: Tokenizer, data_dir: Path, progress: bool) -> Streams:
    """Returns the streams of a corpus, packing them first if they are not there whole."""
    target = packed_directory(corpus, tokenizer, data_dir)
    streams = read_streams(target)
    if streams is None:
        with storage.locked(target):
            streams = read_streams(target)
            if streams is None:
                corpus.ensure(progress)
                storage.announce(f"packing {corpus.name} into {target}, once", progress)
                with storage.new_directory(target) as directory:
                    write_streams(directory, corpus, tokenizer, progress)
                streams = read_streams(target)
                assert streams is not None
    return streams


def read_streams(directory: Path) -> Streams | None:
    """Maps packed streams; None where they are absent or not as long as their description says."""
    meta = storage.read_json(directory / META)
    if meta is None:
        return None
    streams: Streams = {}
    dtype = np.dtype(meta["dtype"])
    for row in meta["streams"]:
        file = directory / row["file"]
        if not file.exists() or file.stat().st_size != row["tokens"] * dtype.itemsize:
            return None
        tokens = np.memmap(file, dtype, "r") if row["tokens"] else np.zeros(0, dtype)
        stream = Stream(tokens, row["documents"], row["bytes"], row["digest"])
        streams[row["split"], row["domain"]] = stream
    return streams


def write_streams(directory: Path, corpus: Prepared, tokenizer: Tokenizer, progress: bool) -> None:
    """Encodes every document of a corpus into one file for each split and domain; describes them
    last."""
    rows = [
        row
        for split in SPLITS
        for row in write_split(directory, corpus, split, tokenizer, progress)
    ]
    meta = {"dtype": tokenizer.dtype.name, "streams": rows}
    (directory / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def write_split(
    directory: Path, corpus: Prepared, split: str, tokenizer: Tokenizer, progress: bool
) -> list[dict[str, Any]]:
    """Writes one file for each domain; returns what meta.json says of them."""
    files = {domain: f"{split}-{domain}.bin" for domain in corpus.domains}
    documents = _counted(corpus.documents(split), f"{corpus.name} {split}", progress)
    with contextlib.ExitStack() as stack:
        writers = {
            domain: Writer(stack.enter_context(open(directory / file, "wb")), tokenizer.dtype)
            for domain, file in files.items()
        }
        for batch in in_batches(documents):
            encoded = tokenizer.encode([text for _, text in batch])
            for (domain, text), ids in zip(batch, encoded, strict=True):
                writers[domain].add(ids, len(text))
    return [
        {"split": split, "domain": domain, "file": files[domain], **writer.counts()}
        for domain, writer in writers.items()
    ]


@dataclass
class Writer:
    """Appends documents to one stream's file and counts them."""

    file: BinaryIO
    dtype: np.dtype
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=8))

    def add(self, ids: np.ndarray, size: int) -> None:
        content = np.append(ids, SEPARATOR).astype(self.dtype).tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.tokens += len(ids) + 1
        self.documents += 1
        self.bytes += size

    def counts(self) -> dict[str, Any]:
        counts = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        return {**counts, "digest": self.digest.hexdigest()}


def in_batches(documents: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Groups cleaned, non-empty documents into batches of some megabytes for the tokeniser."""
    batch: list[tuple[str, bytes]] = []
    size = 0
    for domain, raw in documents:
        text = clean(raw)
        if not text:
            continue
        batch.append((domain, text))
        size += len(text)
        if size >= BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _counted(
    documents: Iterator[tuple[str, bytes]], title: str, progress: bool
) -> Iterator[tuple[str, bytes]]:
    from tqdm.auto import tqdm

    show = storage.show_bars(progress)
    yield from tqdm(documents, desc=title, unit=" documents", disable=not show, leave=False)
