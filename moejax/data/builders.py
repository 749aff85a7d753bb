"""The TFDS side: our dataset builder, and reading records of a prepared dataset.

Everything here is array_record, which TFDS reads and writes without TensorFlow (its default,
tfrecord, needs it). Imported only when something has to be prepared: tensorflow_datasets takes half
a second.

The builder is an ordinary one: `tfds.builder("moejax_text/stdlib", file_format="array_record")`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

from moejax import storage
from moejax.data.config import DataConfig
from moejax.data.corpora import SOURCES, STDLIB, Document, Source, group_of, held_out
from moejax.data.markov import MARKOV
from moejax.data.splits import BUILDER_VERSION, TRAIN, VALIDATION

FORMAT = "array_record"
RECORDS_AT_ONCE = 256
PROBE, PROBE_SECONDS = "https://storage.googleapis.com", 10


@dataclasses.dataclass
class TextConfig(tfds.core.BuilderConfig):
    """One source of documents, the share of them held out, and a cap for each domain (0: none)."""

    source: Source = STDLIB
    validation: float = DataConfig.validation
    max_documents: int = 0


class MoejaxText(tfds.core.GeneratorBasedBuilder):
    """Installed text as documents: `text`, `domain`, `id`; splits train and validation."""

    VERSION = tfds.core.Version(BUILDER_VERSION)
    RELEASE_NOTES: ClassVar = {BUILDER_VERSION: "First version."}
    BUILDER_CONFIGS: ClassVar = [TextConfig(name=s.name, source=s) for s in (*SOURCES, MARKOV)]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "text": tfds.features.Text(),
            "domain": tfds.features.ClassLabel(names=self.builder_config.source.domains),
            "id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self.builder_config
        documents = config.source.documents(config.max_documents)
        held = held_out(documents, config.validation)
        splits: dict[str, list[Document]] = {TRAIN: [], VALIDATION: []}
        for document in documents:
            splits[VALIDATION if group_of(document.id) in held else TRAIN].append(document)
        for split, chosen in splits.items():
            if not chosen:
                raise ValueError(
                    f"the {split} split of corpus {config.source.name!r} is empty: validation "
                    f"{config.validation} of {len(documents)} documents; raise max_documents"
                )
        return {split: self._generate_examples(chosen) for split, chosen in splits.items()}

    def _generate_examples(self, documents: list[Document]) -> Iterator[tuple[str, dict[str, str]]]:
        for document in documents:
            yield f"{document.domain}:{document.id}", document._asdict()


def build(directory: Path, source: Source, share: float, limit: int, progress: bool) -> None:
    """Writes the TFDS dataset of a source to `directory` (.../moejax_text/<config>/<version>)."""
    config = TextConfig(
        name=directory.parent.name, source=source, validation=share, max_documents=limit
    )
    with quiet(progress):
        builder = MoejaxText(config=config, data_dir=str(directory.parents[2]), file_format=FORMAT)
        builder.download_and_prepare()


def download(name: str, data_dir: Path, progress: bool) -> None:
    """Downloads and prepares one of TFDS's own datasets under data_dir/tfds; c4 takes days.

    Raises ConnectionError where there is no network: TFDS would retry for minutes before it says
    so.
    """
    try:
        urllib.request.urlopen(PROBE, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, so there is a network
    except OSError as error:
        raise ConnectionError(f"{name} needs a download, and {PROBE} does not answer") from error
    storage.announce(f"downloading {name} into {data_dir / 'tfds'}", progress)
    with quiet(progress):
        builder = tfds.builder(name, data_dir=str(data_dir / "tfds"), file_format=FORMAT)
        builder.download_and_prepare()


def records(directory: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yields the records of a split of a prepared dataset, in the order of its files."""
    with quiet(progress=False):
        source = tfds.builder_from_directory(str(directory)).as_data_source(split)
    for start in range(0, len(source), RECORDS_AT_ONCE):
        yield from source.__getitems__(range(start, min(start + RECORDS_AT_ONCE, len(source))))


@contextlib.contextmanager
def quiet(progress: bool) -> Iterator[None]:
    """TFDS prints to stdout, where a command's result goes, draws bars into log files, and logs."""
    bars, logger = tqdm_utils._active, logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.display_progress_bar(storage.show_bars(progress))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        tfds.display_progress_bar(bars)
        logger.setLevel(level)
