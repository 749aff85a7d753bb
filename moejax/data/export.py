"""A data directory for a machine that has other text: the tokens of a corpus, as they are here.

The standard library of another Python is other text, and a machine without a network may have no
more than that. What is exported has the fingerprint that it has here, on any machine.
"""

import json
import shutil
from pathlib import Path

from moejax import storage
from moejax.data.config import LOCAL_CORPORA, DataConfig, bpe_size
from moejax.data.packing import open_tokenizer, packed, packed_directory, tokenizer_directory
from moejax.data.prepared import EXPORTED, open_corpora


def export(config: DataConfig, target: Path, progress: bool = True) -> None:
    """Copies what a corpus is read from, in the config's tokenizer, into a directory that serves
    as another machine's data_dir. Documents and the packages that they came with stay here.

    Raises ValueError for a corpus that TFDS prepares: its own folder can be copied.
    """
    data_dir = storage.data_directory(config.data_dir)
    if config.name not in LOCAL_CORPORA:
        raise ValueError(f"--export: copy {config.name} from the tfds folder that it was found in")
    corpora = open_corpora(config, data_dir)
    tokenizer = open_tokenizer(config.tokenizer, corpora, data_dir, progress)
    there = [packed_directory(corpus, tokenizer, data_dir) for corpus in corpora]
    for corpus in corpora:
        packed(corpus, tokenizer, data_dir, progress)
    if size := bpe_size(config.tokenizer):
        there.append(tokenizer_directory(size, corpora, data_dir))
    for directory in there:
        copy = target / directory.relative_to(data_dir)
        shutil.copytree(directory, copy, dirs_exist_ok=True)
    signatures = storage.read_json(target / EXPORTED) or {}
    signatures |= {corpus.name: corpus.signature for corpus in corpora}
    (target / EXPORTED).write_text(json.dumps(signatures, indent=1))
