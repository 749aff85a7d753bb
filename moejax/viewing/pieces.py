"""The text of each token, where one character may be made of several tokens."""

from collections.abc import Callable, Iterable

import numpy as np

BROKEN = "\N{REPLACEMENT CHARACTER}"
LONGEST = 4  # bytes of a character in UTF-8


def pieces(
    decode: Callable[[Iterable[int]], str], token_T: np.ndarray, document_T: np.ndarray
) -> list[str]:
    """What each token adds to the text; "" for the first tokens of a character, whose last one has
    it all. No character goes over the border of two documents."""
    piece_T: list[str] = []
    waiting: list[int] = []
    for t, token in enumerate(token_T.tolist()):
        waiting.append(token)
        text = decode(waiting)
        last = t + 1 == len(token_T) or document_T[t + 1] != document_T[t]
        if text.endswith(BROKEN) and len(waiting) < LONGEST and not last:
            piece_T.append("")
        else:
            piece_T.append(text)
            waiting = []
    return piece_T
