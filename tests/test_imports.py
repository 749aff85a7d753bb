"""Imports run one way, read from the source of every file, new ones included."""

import ast
import pathlib
import subprocess
import sys

import pytest

import moejax
from moejax.dispatch.kept import SOURCES

PACKAGE = pathlib.Path(moejax.__file__).parent
ROOT = PACKAGE.parent


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(path: pathlib.Path, level: int) -> str:
    """What `level` leading dots stand for in a file."""
    return ".".join(path.relative_to(ROOT).parts[:-level])


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(path: pathlib.Path) -> set[str]:
    """Every module that a file imports at run time, in full, wherever the import stands."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if only_for_types(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = package_of(path, node.level) if node.level else ""
            base = ".".join(part for part in (home, node.module) if part)
            found |= {f"{base}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


FILES = {module_of(path): imported(path) for path in sorted(PACKAGE.rglob("*.py"))}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offenders(importer: str, *packages: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """'file -> import' for each file of `importer` that imports one of the packages."""
    return [
        f"{module} -> {name}"
        for module, names in FILES.items()
        if inside(module, importer)
        for name in sorted(names)
        if any(inside(name, package) for package in packages)
        and not any(inside(name, package) for package in allowed)
    ]


def test_the_files_are_found() -> None:
    assert {"moejax", "moejax.moe", "moejax.routing.types", "moejax.dispatch.plan"} <= set(FILES)
    assert "moejax.routing.RouterInput" in FILES["moejax.moe"]


def test_nothing_in_the_library_imports_experiments_or_tests() -> None:
    assert not offenders("moejax", "experiments", "tests")


def test_routing_is_pure_functions_of_arrays() -> None:
    assert not offenders("moejax.routing", "flax", "optax", "orbax", "grain", "ml_collections")
    mine = ("moejax.routing", "moejax.names")
    assert not offenders("moejax.routing", "moejax", allowed=mine)


def test_dispatch_knows_routing_and_nothing_above() -> None:
    assert not offenders("moejax.dispatch", "flax", "optax", "ml_collections")
    mine = ("dispatch", "routing", "names", "sharding", "storage")
    assert not offenders("moejax.dispatch", "moejax", allowed=tuple(f"moejax.{m}" for m in mine))


def test_a_kept_choice_counts_every_file_that_it_hangs_on() -> None:
    files = [f"moejax.dispatch.{name}" for name in SOURCES]
    assert "moejax.dispatch.grouped" in files
    for file in files:
        assert not offenders(file, "moejax", allowed=(*files, "moejax.storage"))


def test_the_spine_knows_routing_and_dispatch_only() -> None:
    mine = ("moejax.routing", "moejax.dispatch")
    assert not offenders("moejax.moe", "moejax", "flax", allowed=mine)


def test_data_stands_alone() -> None:
    assert not offenders("moejax.storage", "moejax", "jax")
    allowed = ("moejax.data", "moejax.names", "moejax.cli", "moejax.storage")
    assert not offenders("moejax.data", "moejax", allowed=allowed)


def test_traces_need_numpy_alone() -> None:
    assert not offenders("moejax.tracing", "moejax", "jax", allowed=("moejax.tracing",))


def test_configuration_builds_no_model() -> None:
    assert not offenders("moejax.config", "flax", "moejax.model", "moejax.training")


@pytest.mark.parametrize("low", ["config", "model", "moe", "reference"])
def test_nothing_low_imports_what_is_above(low: str) -> None:
    above = ("training", "generation", "reporting", "train", "compare", "evaluate", "report")
    assert not offenders(f"moejax.{low}", *(f"moejax.{name}" for name in above))


def test_model_does_not_read_data() -> None:
    assert not offenders("moejax.model", "moejax.data")


def test_measures_know_traces_and_routing_only() -> None:
    mine = ("moejax.analysis", "moejax.tracing", "moejax.routing")
    assert not offenders("moejax.analysis", "moejax", "flax", allowed=mine)


def test_training_needs_no_report_and_no_comparison() -> None:
    above = ("reporting", "generation", "analyzing", "compare", "report", "train", "analyze")
    assert not offenders("moejax.training", *(f"moejax.{name}" for name in above))


def test_what_writes_stands_on_training_and_under_the_verbs() -> None:
    above = ("reporting", "viewing", "cli", "train", "compare", "report", "generate")
    assert not offenders("moejax.generation", *(f"moejax.{name}" for name in above))


def test_the_page_of_a_trace_needs_no_model() -> None:
    for module in ("packing", "page", "panel", "pieces"):
        allowed = ("moejax.viewing", "moejax.tracing")
        assert not offenders(f"moejax.viewing.{module}", "moejax", "jax", allowed=allowed)
    assert not offenders("moejax.viewing", "moejax.reporting", "moejax.compare", "moejax.view")
    assert not offenders("moejax.training", "moejax.viewing")


def test_the_dense_oracle_is_for_tests_and_notebooks() -> None:
    assert not offenders("moejax", "moejax.reference")


def loaded_after(statement: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(out.stdout.split())


def test_import_moejax_is_cheap() -> None:
    assert not loaded_after("import moejax") & {"jax", "flax", "numpy", "ml_collections"}


def test_import_of_routing_brings_no_flax() -> None:
    loaded = loaded_after("import moejax.routing, moejax.dispatch")
    assert "jax" in loaded
    assert not loaded & {"flax", "optax", "ml_collections", "grain", "tensorflow_datasets"}


def test_public_names_come_on_first_use() -> None:
    assert callable(moejax.make_router) and moejax.ROUTERS
    with pytest.raises(AttributeError, match="no attribute 'Transfomer'"):
        _ = moejax.Transfomer
