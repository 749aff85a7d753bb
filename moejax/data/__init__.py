"""Text for training: corpora, tokenisers, packed rows with document masks, exact resume.

Independent of the rest of moejax and of jax. open_dataset(DataConfig()) needs no download.
"""

from moejax.data.config import DataConfig
from moejax.data.dataset import TextDataset, open_dataset
from moejax.data.windows import UNSCORED, Batch

__all__ = ["UNSCORED", "Batch", "DataConfig", "TextDataset", "open_dataset"]
