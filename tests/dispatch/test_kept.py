"""Choices on disk: later processes take them, unless anything that they hang on has changed."""

import datetime
import importlib.metadata
import json
import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from moejax.dispatch import kept, trial
from moejax.dispatch.measured import Choice, fastest

SIZES = trial.Sizes(4, 128, 128, "float32")
NAMES = ("slow", "quick")


@pytest.fixture
def tried(gpu, monkeypatch):
    """The sizes of every trial, of two stand-ins of which one refuses: it says so."""
    sizes_tried = []

    def refuses():
        raise NotImplementedError("sm_100 only")

    def measure(sizes, among):
        sizes_tried.append(sizes)
        return fastest({"slow": refuses, "quick": lambda: jnp.ones(1)}, lambda result: None)

    monkeypatch.setattr(trial, "_measure", measure)
    return sizes_tried


def chosen(sizes=SIZES, names=NAMES) -> Choice:
    """By a new process."""
    trial.on_gpu.cache_clear()
    return trial.on_gpu(sizes, tuple((name, None) for name in names))


def test_a_later_process_takes_what_was_measured_and_says_when(gpu, tried):
    first, second = chosen(), chosen()
    assert len(tried) == 1 and first.name == second.name == "quick"
    assert first.why.startswith("the fastest measured here: quick 0.")
    assert first.why.endswith(" ms; slow failed: sm_100 only")
    today = f"measured here on {datetime.date.today().isoformat()}:"
    assert second.why == first.why.replace("measured here:", today)
    (file,) = gpu.iterdir()
    assert json.loads(file.read_text())["of"]["sizes"] == SIZES._asdict()


def other_card(patch, tmp_path, kind="H200", platform="cuda 13"):
    card = SimpleNamespace(device_kind=kind, client=SimpleNamespace(platform_version=platform))
    patch.setattr(jax, "devices", lambda: [card])


def other_flags(patch, tmp_path):
    patch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")


def other_precision(patch, tmp_path):
    jax.config.update("jax_default_matmul_precision", "high")


def other_version(patch, tmp_path, package):
    version = importlib.metadata.version
    told = lambda name: "0.0.1" if name == package else version(name)  # noqa: E731
    patch.setattr(importlib.metadata, "version", told)


def other_source(patch, tmp_path, name):
    shutil.copytree(kept.FOLDER, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / name / f"{name}.py").open("a") as file:
        file.write("# changed\n")
    patch.setattr(kept, "FOLDER", tmp_path / name)


CHANGES = {
    "card": other_card,
    "its kind": partial(other_card, kind="H100"),
    "platform": partial(other_card, platform="cuda 14"),
    "flags": other_flags,
    "precision": other_precision,
    **{name: partial(other_version, package=name) for name in ("jax", "jaxlib", "tokamax")},
    **{name: partial(other_source, name=name) for name in kept.SOURCES},
}


def test_whatever_it_hangs_on_is_told_apart(gpu, tried, tmp_path):
    chosen()
    precision = jax.config.jax_default_matmul_precision
    for number, (name, change) in enumerate(CHANGES.items(), start=2):
        with pytest.MonkeyPatch.context() as patch:
            change(patch, tmp_path)
            assert " on " not in chosen().why and " on " in chosen().why, name
        jax.config.update("jax_default_matmul_precision", precision)
        assert len(tried) == len(list(gpu.iterdir())) == number, name
    others = {"experts": 8, "dim": 256, "ffn": 256, "dtype": "bfloat16", "varying": True}
    assert others.keys() == SIZES._asdict().keys()
    for field, value in others.items():
        assert " on " not in chosen(SIZES._replace(**{field: value})).why, field
    assert " on " not in chosen(names=("quick", "newest")).why
    assert " on " in chosen().why  # the first one, still


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"name": "qui',
        b"\xff",
        b"[]",
        b'{"name": "quick"}',
        b'{"name": "gone", "told": "gone 0.10 ms", "day": "2026-11-27"}',
    ],
)
def test_what_cannot_be_read_is_measured_again_and_replaced(gpu, tried, content):
    chosen()
    (file,) = gpu.iterdir()
    file.write_bytes(content)
    assert " on " not in chosen().why and len(tried) == 2
    assert " on " in chosen().why and list(gpu.iterdir()) == [file]


@pytest.mark.parametrize("place", ["file", "~nobody-of-this-name"])
def test_without_a_folder_it_is_kept_in_the_process(tried, monkeypatch, tmp_path, place):
    (tmp_path / "file").write_text("precious")
    folder = place if place.startswith("~") else str(tmp_path / place)
    monkeypatch.setenv("MOEJAX_DATA_DIR", folder)
    among = tuple((name, None) for name in NAMES)
    assert trial.on_gpu(SIZES, among) == trial.on_gpu(SIZES, among)
    assert len(tried) == 1 and " on " not in chosen().why
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes"),
        RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY"),
        MemoryError(),
    ],
)
def test_what_lack_of_memory_decided_is_not_kept(gpu, monkeypatch, error):
    def fails():
        raise error

    runs = {"slow": fails, "quick": lambda: jnp.ones(1)}
    monkeypatch.setattr(trial, "_measure", lambda *_: fastest(runs, lambda result: None))
    assert chosen().name == "quick" and " on " not in chosen().why
    runs["quick"] = fails
    assert "nothing could be measured" in chosen().why
    runs["slow"] = runs["quick"] = lambda: jnp.ones(1)
    assert " on " not in chosen().why and " on " in chosen().why


def test_a_choice_without_a_trial_is_not_kept(gpu, tried, monkeypatch):
    chosen(SIZES._replace(ffn=64))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    chosen()
    assert not tried and not gpu.exists()
