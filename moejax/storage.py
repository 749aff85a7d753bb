"""Files that are prepared once: whole or absent, and safe against a second process and SIGKILL.

A directory is written under a temporary name and renamed when it is complete. Whoever prepares
holds a lock, which the system drops when its holder dies; so leftovers found under the lock are
dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def data_directory(data_dir: str = "") -> Path:
    """Returns where prepared data goes: data_dir, else $MOEJAX_DATA_DIR, else ~/.cache/moejax."""
    path = Path(data_dir or os.environ.get("MOEJAX_DATA_DIR") or "~/.cache/moejax")
    return path.expanduser().resolve()


def digest(value: Any) -> str:
    """Returns 16 hexadecimal digits that stand for a JSON-able value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock for preparing `target`; a second process waits here, and says so.

    Raises ValueError where it cannot be taken. The lock file stays: deleting it would be a race.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(target.parent / f".{target.name}.lock", "a")  # noqa: SIM115
    except OSError as error:
        raise ValueError(_refusal(target, error)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that prepares %s", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            raise ValueError(_refusal(target, error)) from error
        yield


def _refusal(target: Path, error: OSError) -> str:
    reason = error.strerror or error
    return f"{target.parent} cannot be written ({reason}); set data_dir or $MOEJAX_DATA_DIR"


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory that becomes `target` on success. Call it under the lock."""
    remove_leftovers(target)
    temporary = target.parent / f".{target.name}.new.{os.getpid()}"
    temporary.mkdir()  # not mkdtemp: others who share data_dir must be able to read it
    try:
        yield temporary
        shutil.rmtree(target, ignore_errors=True)  # a broken copy: its reader refused it
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Deletes what a killed process left behind on its way to `target`."""
    for path in target.parent.glob(f".{target.name}.new.*"):
        shutil.rmtree(path, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file; None where it is absent, cut short or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def announce(message: str, progress: bool) -> None:
    """Tells whoever waits what is being prepared, on stderr; to the log if they did not ask."""
    if progress:
        print(f"moejax.data: {message}", file=sys.stderr, flush=True)
    else:
        log.info(message)


def show_bars(progress: bool) -> bool:
    """Bars are for terminals: in a log file each update would be a line of its own."""
    return progress and sys.stderr.isatty()
