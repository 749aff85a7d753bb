"""Choices kept on disk for the next process: a trial takes half a minute and more, most of it the
compiler's.

A small file each in `choices/` of the data directory, which may be deleted at any time: what it
held is measured again.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moejax import storage
from moejax.dispatch.measured import Choice, Measured

# The files that make a trial and what it tries.
SOURCES = ("blocks", "grouped", "hopper", "kept", "measured", "products", "rows", "trial")
FOLDER = Path(__file__).parent
# Of a data directory that is not to be had: no right to it, no home that it would be in.
NOWHERE = (OSError, RuntimeError)


def key_of(sizes: dict[str, Any], among: Sequence[str]) -> dict[str, Any]:
    """All that a choice among some implementations depends on, JSON-able."""
    device = jax.devices()[0]
    return {
        "sizes": sizes,
        "among": list(among),
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "versions": {package: _version(package) for package in ("jax", "jaxlib", "tokamax")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "precision": jax.config.values["jax_default_matmul_precision"],
        "source": storage.digest([(FOLDER / f"{name}.py").read_text() for name in SOURCES]),
    }


def read(key: dict[str, Any]) -> Choice | None:
    """What was written for a key; None where there is nothing that can be read."""
    found: dict[str, Any] = {}
    with contextlib.suppress(*NOWHERE):
        found = storage.read_json(_file(key)) or {}
    if found.get("name") not in key["among"] or not {"told", "day"} <= found.keys():
        return None
    return Measured(found["name"], found["told"]).choice(found["day"])


def write(key: dict[str, Any], measured: Measured) -> None:
    """Keep it, with today's date. Where nothing can be written it is no error."""
    day = datetime.date.today().isoformat()
    content = {"name": measured.name, "told": measured.told, "day": day, "of": key}
    with contextlib.suppress(*NOWHERE):
        storage.write_atomically(_file(key), json.dumps(content, indent=1).encode())


def _file(key: dict[str, Any]) -> Path:
    return storage.data_directory() / "choices" / f"{storage.digest(key)}.json"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
