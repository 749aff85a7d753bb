"""Prepare a corpus ahead of a run and show what is in it: moejax data --name=text

With --download, one of TFDS's own corpora is fetched first, which needs the network. With
--export=DIR, installed text is packed into a folder that is the same corpus on another machine:
MOEJAX_DATA_DIR=DIR moejax train ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from moejax import storage
from moejax.data import DataConfig, TextDataset, open_dataset
from moejax.data.export import export

NAME = flags.DEFINE_string("name", DataConfig.name, "corpus: stdlib, text, lm1b, c4, wikipedia/...")
TOKENIZER = flags.DEFINE_string("tokenizer", DataConfig.tokenizer, "bytes, or bpe:N")
DATA_DIR = flags.DEFINE_string("data_dir", "", "where prepared data goes; see DataConfig")
VALIDATION = flags.DEFINE_float("validation", DataConfig.validation, "share held out")
MAX_DOCUMENTS = flags.DEFINE_integer("max_documents", 0, "cap for each domain; 0 for none")
DOWNLOAD = flags.DEFINE_bool("download", False, "let TFDS download the corpus first")
EXPORT = flags.DEFINE_string("export", "", "a folder for another machine, to be its data_dir")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; the corpus goes into --name")
    try:
        config = DataConfig(
            name=NAME.value,
            tokenizer=TOKENIZER.value,
            data_dir=DATA_DIR.value,
            validation=VALIDATION.value,
            max_documents=MAX_DOCUMENTS.value,
        )
        if DOWNLOAD.value:
            from moejax.data import builders

            builders.download(config.name, storage.data_directory(config.data_dir), progress=True)
        if EXPORT.value:
            export(config, Path(EXPORT.value))
        show(open_dataset(config))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def show(dataset: TextDataset) -> None:
    print(f"{'split':<12}{'domain':<12}{'documents':>12}{'bytes':>16}{'tokens':>16}{'windows':>12}")
    for split, domains in dataset.sizes.items():
        for domain, size in domains.items():
            columns = f"{size['documents']:>12,}{size['bytes']:>16,}{size['tokens']:>16,}"
            print(f"{split:<12}{domain:<12}{columns}{size['windows']:>12,}")
    print(f"vocabulary {dataset.vocab_size}, fingerprint {dataset.fingerprint}")


if __name__ == "__main__":
    app.run(main)
