"""A corpus whose truth is known: documents of a few Markov chains, one chain a document.

Every chain has eight letters, four of them shared with the chain before it and four with the one
after, so that a letter alone leaves two chains possible, and all have the same entropy. So the best
possible bits per byte are known, and so are the ideal experts: one for each chain.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

from moejax.data.corpora import Document, Source

CHAINS = ("chain0", "chain1", "chain2", "chain3")
GROUPS = ("abcd", "efgh", "ijkl", "mnop")  # chain i writes with groups i and i + 1
LETTERS = 8  # of a chain
CERTAINTY = 0.7  # that the chain's own successor follows; else any letter does
DOCUMENTS, LENGTH = 300, 1024  # of each chain; letters of one


def letters(chain: int) -> str:
    return GROUPS[chain] + GROUPS[(chain + 1) % len(GROUPS)]


def successors(chain: int) -> list[int]:
    """Which of its letters mostly follows each: a permutation, another one for every chain."""
    order = list(range(LETTERS))
    random.Random(f"successors of chain {chain}").shuffle(order)
    return order


def entropy() -> float:
    """Bits per letter of every chain, once the chain is known: no model can do better."""
    other = (1 - CERTAINTY) / LETTERS
    own = CERTAINTY + other
    return -own * math.log2(own) - (LETTERS - 1) * other * math.log2(other)


def write(chain: int, document: int) -> str:
    """One document; it depends on its arguments alone."""
    draw, follows = random.Random(f"{chain}/{document}"), successors(chain)
    names = letters(chain)
    letter, text = int(draw.random() * LETTERS), []
    for _ in range(LENGTH):
        text.append(names[letter])
        sure = draw.random() < CERTAINTY
        letter = follows[letter] if sure else int(draw.random() * LETTERS)
    return "".join(text)


def read_markov(root: Path, file: Path) -> Iterator[Document]:
    for chain, domain in enumerate(CHAINS):
        for document in range(DOCUMENTS):
            yield Document(domain, f"{domain}/{document}", write(chain, document))


# Its file is this one: whoever changes it has another corpus.
MARKOV = Source(
    "markov",
    CHAINS,
    "",
    lambda: Path(__file__).parent,
    lambda root: [Path(__file__)],
    read_markov,
)
