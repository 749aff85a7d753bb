"""The house itself: lint, types, layout, the README's generated parts, and the notebooks."""

import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from moejax.routers import COLUMNS, markdown, rows

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_ruff_finds_nothing() -> None:
    assert (check := run("ruff", "check", ".")).returncode == 0, check.stdout
    assert (check := run("ruff", "format", "--check", ".")).returncode == 0, check.stdout


def test_types_hold() -> None:
    assert (check := run("mypy")).returncode == 0, check.stdout


def test_readme_shows_the_catalogue_as_it_is() -> None:
    assert markdown(COLUMNS, rows()) in (ROOT / "README.md").read_text(), (
        "paste `moejax routers --markdown`"
    )


def test_pictures_of_the_readme_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    pictures = [part.partition(")")[0] for part in text.split("](")[1:]]
    pictures = [path for path in pictures if path.endswith(".png")]
    assert pictures
    assert [path for path in pictures if not (ROOT / path).is_file()] == []


def test_top_level_holds_what_it_should() -> None:
    wanted = {"setup.py", "moejax", "experiments", "tests", "notebooks", "README.md", "LICENSE"}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name.partition("/")[0] for name in tracked if not name.startswith(".")} == wanted


def test_notebooks_are_there() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_keeps_its_plots(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    script = jupytext.read(path.with_suffix(".py"))
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in script.cells], "jupytext --sync"
    kept = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in kept), "execute and save it"
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(cwd=str(ROOT))
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
