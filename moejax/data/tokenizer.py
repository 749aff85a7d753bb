"""Text to token ids and back: bytes, or byte-level BPE. Id 0 separates documents and stands for no
text.

Each tokeniser knows how many bytes each id stands for, so that losses compare in bits per byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moejax import storage

if TYPE_CHECKING:
    import tokenizers

SEPARATOR = 0
SEPARATOR_TEXT = "\0"  # no document holds it: see clean()
SHOWN = "\N{SYMBOL FOR NULL}"  # how decode() shows a separator
TRAINING_BYTES = 100_000_000  # BPE merges settle long before


class Tokenizer(Protocol):
    """identity: changes when any text would be cut otherwise. bytes_V: float32, bytes of each
    id."""

    vocab_size: int
    dtype: np.dtype
    identity: str
    bytes_V: np.ndarray

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


def clean(text: bytes) -> bytes:
    """Drops NUL bytes: 0 is the separator."""
    return text.replace(b"\0", b"")


class ByteTokenizer:
    """UTF-8 bytes are the ids: 256 of them, and byte 0, which text does not hold, separates."""

    vocab_size = 256
    dtype = np.dtype(np.uint8)
    identity = "bytes"

    def __init__(self) -> None:
        self.bytes_V = np.ones(256, np.float32)
        self.bytes_V[SEPARATOR] = 0

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        text = bytes(int(token) for token in ids).decode("utf-8", errors="replace")
        return text.replace(SEPARATOR_TEXT, SHOWN)


class BpeTokenizer:
    """Byte-level BPE. Ids that a small corpus could not fill stay unused and stand for no bytes."""

    def __init__(self, file: Path, vocab_size: int) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self.vocab_size = vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.identity = f"bpe:{vocab_size}:{storage.digest(self._tokenizer.to_str())}"
        self._bytes = token_bytes(self._tokenizer, vocab_size)
        self.bytes_V = np.array([len(piece) for piece in self._bytes], np.float32)

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        decoded = [text.decode("utf-8", errors="replace") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        pieces = [SHOWN.encode() if token == SEPARATOR else self._bytes[token] for token in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")


def token_bytes(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> list[bytes]:
    """Returns the bytes that each id stands for; b"" for the separator and for unused ids."""
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    pieces = [b""] * vocab_size
    for piece, token in tokenizer.get_vocab().items():
        if token != SEPARATOR:
            pieces[token] = bytes(byte_of[character] for character in piece)
    return pieces


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: itself, or one from 256 on.

    Source: Radford et al. 2019 (GPT-2), whose mapping `tokenizers` uses.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def train_bpe(texts: Iterable[bytes], vocab_size: int, file: Path, progress: bool) -> None:
    """Trains byte-level BPE on the first 100 MB of the texts and writes it to `file`.
    Deterministic."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR_TEXT],  # the first id: 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=storage.show_bars(progress),
    )
    tokenizer.train_from_iterator(_first_bytes(texts), trainer)
    tokenizer.save(str(file))


def _first_bytes(texts: Iterable[bytes]) -> Iterable[str]:
    total = 0
    for text in texts:
        if total >= TRAINING_BYTES:
            return
        total += len(text)
        yield clean(text).decode("utf-8", errors="replace")
