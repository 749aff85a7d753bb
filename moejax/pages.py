"""Huge pages for a process on Linux.

A training step on a CPU takes its temporaries anew every time, and the kernel hands memory out in
pages of 4 KiB, each cleared when it is first touched: a fifth of the step of a small model
(experiments/results/bench/README.md). Most systems give pages of 2 MiB to programs that ask
("madvise"), and glibc asks if it is told so before a process starts. So a process starts again, as
itself.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"  # since glibc 2.35; older ones ignore it


def asking(environment: Mapping[str, str], kernel: Path = KERNEL) -> dict[str, str] | None:
    """The environment of a process that asks for huge pages; None where that changes nothing: no
    such kernel, pages for all or none, or a user who has set the tunable."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or not kernel.exists() or "[madvise]" not in kernel.read_text():
        return None
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))}


def start_again() -> None:
    """Replace this process by one of the same arguments that asks for huge pages, if it does not
    yet. To be called before anything is done."""
    if environment := asking(os.environ):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
