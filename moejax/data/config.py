"""What to train on: one frozen dataclass, validated before anything is read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moejax.names import did_you_mean

LOCAL_CORPORA = ("stdlib", "text", "markov")  # installed, or made up; never a download
STANDARD_CORPORA = ("lm1b", "c4", "wikipedia")  # TFDS's own, read from a prepared copy
SMALLEST_BPE = 258  # 256 bytes, the separator and one merge
LARGEST_BPE = 2**20


@dataclass(frozen=True)
class DataConfig:
    """Which text, cut how. A bad value raises ValueError here.

    name: "stdlib" (default, always there: domains `code` and `prose`), "text" (stdlib and every
      installed package of the extra `text`), "markov" (made-up text of four Markov chains, whose
      entropy is known), or a prepared TFDS corpus: "lm1b", "c4", "wikipedia",
      with a TFDS config where it has some ("wikipedia/20230601.en").
    tokenizer: "bytes" or "bpe:N" (byte-level BPE of N ids, trained once on the training split).
    sequence: tokens in a row. batch: rows in a global batch. validation: share of the documents
    held out, by a hash of each document's name. TFDS corpora that
      come with a held-out split use that one.
    domains: the domains to read, () for all.
    mask_rate: 0 = each token predicts the next, seeing those before it; above 0 = this share of the
      tokens is masked, and predicted from all others of its document (`moejax.data.masking`).
    data_dir: where prepared data goes; "" means $MOEJAX_DATA_DIR, or ~/.cache/moejax.
    max_documents: cap for each domain, 0 for none.
    """

    name: str = "stdlib"
    tokenizer: str = "bytes"
    sequence: int = 128
    batch: int = 16
    validation: float = 0.05
    domains: tuple[str, ...] = ()
    mask_rate: float = 0.0
    data_dir: str = ""
    max_documents: int = 0

    def __post_init__(self) -> None:
        known = (*LOCAL_CORPORA, *STANDARD_CORPORA)
        base, _, part = self.name.partition("/")
        if base not in known or (self.name != base and (base in LOCAL_CORPORA or not part)):
            raise ValueError(f"unknown corpus {self.name!r}{did_you_mean(base, known)}")
        bpe_size(self.tokenizer)
        if self.sequence < 2:
            raise ValueError(f"sequence {self.sequence} is too short: at least 2 tokens")
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} must be at least 1 sequence")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation {self.validation} must lie between 0 and 1, exclusive")
        if not 0 <= self.mask_rate < 1:
            raise ValueError(
                f"mask_rate {self.mask_rate} must be 0 (predict the next token) or a share below 1"
            )
        if self.max_documents < 0:
            raise ValueError(f"max_documents {self.max_documents} must be 0 (all) or more")
        if isinstance(self.domains, str):
            raise ValueError(f"domains must be a tuple of names, not the string {self.domains!r}")  # noqa: TRY004
        object.__setattr__(self, "domains", tuple(self.domains))  # a list from a config file
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains {', '.join(self.domains)} names one of them twice")


def bpe_size(tokenizer: str) -> int:
    """Returns N of "bpe:N" and 0 for "bytes"; anything else raises ValueError."""
    if tokenizer == "bytes":
        return 0
    match = re.fullmatch(r"bpe:(\d+)", tokenizer)
    if not match:
        raise ValueError(f"unknown tokenizer {tokenizer!r}; known: bytes, bpe:N (as in bpe:4096)")
    size = int(match[1])
    if not SMALLEST_BPE <= size <= LARGEST_BPE:
        raise ValueError(f"tokenizer bpe:{size}: the size must be {SMALLEST_BPE} to {LARGEST_BPE}")
    return size
