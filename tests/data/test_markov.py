"""The made-up corpus has the statistics it is known by."""

import collections
import math

from moejax.data import markov


def pairs(chain: int) -> collections.Counter[str]:
    texts = [markov.write(chain, document) for document in range(60)]
    return collections.Counter(text[i : i + 2] for text in texts for i in range(len(text) - 1))


def test_each_chain_has_the_entropy_that_is_claimed() -> None:
    for chain in range(len(markov.CHAINS)):
        count, of_letter = pairs(chain), collections.Counter()
        for pair, n in count.items():
            of_letter[pair[0]] += n
        total = sum(count.values())
        bits = -sum(n / total * math.log2(n / of_letter[pair[0]]) for pair, n in count.items())
        assert abs(bits - markov.entropy()) < 0.02
        assert max(of_letter.values()) < 1.1 * total / markov.LETTERS  # no letter gives it away


def test_a_letter_leaves_two_chains_possible() -> None:
    names = "".join(markov.letters(chain) for chain in range(len(markov.CHAINS)))
    assert set(collections.Counter(names).values()) == {2}


def test_a_document_depends_on_its_number_alone() -> None:
    assert markov.write(1, 5) == markov.write(1, 5) != markov.write(1, 6)
    assert len({tuple(markov.successors(chain)) for chain in range(4)}) == 4
