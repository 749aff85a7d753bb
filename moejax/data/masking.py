"""Masked tokens: a share of them is hidden in the input and predicted from both sides.

Devlin et al. 2018, 1810.04805, without their tenth that is left as it was and their tenth that is
replaced at random. Which ones is a function of a seed and the row's number alone, as the row itself
is: so a resumed run, and any number of processes, see the same.

A masked token reads as the separator, the id that stands for no text. A separator itself is no
target, and no document sees another's, so nothing that is asked for can be mistaken for one.
"""

from collections.abc import Sequence

import numpy as np

from moejax.data.tokenizer import SEPARATOR
from moejax.data.windows import UNSCORED, Batch


def mask_tokens(
    batch: Batch, rate: float, *, seed: int, number_B: Sequence[int] | np.ndarray
) -> Batch:
    """Returns the batch with about `rate` of its real tokens masked; only they have a target.

    number_B: each row's number, from 0; of a padded row any number.
    """
    length = batch.tokens_BS.shape[1]
    draw_BS = [np.random.default_rng([seed, max(0, int(n))]).random(length) for n in number_B]
    masked_BS = (np.reshape(draw_BS, (-1, length)) < rate) & batch.valid_BS
    return batch._replace(
        tokens_BS=np.where(masked_BS, np.int32(SEPARATOR), batch.tokens_BS),
        targets_BS=np.where(masked_BS, batch.tokens_BS, np.int32(UNSCORED)),
    )
