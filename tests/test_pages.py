"""Huge pages: asked for once, where the kernel gives them to those who ask."""

import os
import subprocess
import sys

import pytest

from moejax import pages
from tests import tiny

SHOW = """
import os, sys
from moejax.pages import start_again
start_again()
block = bytearray(b"1") * 2**26
kib = [l.split()[1] for l in open("/proc/self/smaps_rollup") if l.startswith("AnonHugePages")]
print(os.getpid(), os.environ.get("GLIBC_TUNABLES", ""), kib[0], *sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("enabled", "given", "wanted"),
    [
        ("always [madvise] never", {}, "glibc.malloc.hugetlb=1"),
        (
            "always [madvise] never",
            {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
            "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1",
        ),
        ("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, None),
        ("[always] madvise never", {}, None),
        ("always madvise [never]", {}, None),
        (None, {}, None),
    ],
)
def test_asked_for_where_it_changes_something(tmp_path, enabled, given, wanted):
    kernel = tmp_path / "enabled"
    if enabled is not None:
        kernel.write_text(enabled)
    environment = pages.asking({"HOME": "x", **given}, kernel)
    if wanted is None:
        assert environment is None
    else:
        assert environment == {"HOME": "x", "GLIBC_TUNABLES": wanted}


def test_the_process_starts_again_as_itself_with_huge_pages():
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW, "an argument"],
        cwd=tiny.ROOT,
        env={**environment, "PYTHONPATH": str(tiny.ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    asks = pages.asking(environment) is not None
    pid, *words = out.split(" ", 3)
    tunables, kib, arguments = words
    assert int(pid) == process.pid and arguments.strip() == "an argument"
    assert tunables == ("glibc.malloc.hugetlb=1" if asks else "")
    if asks:  # most of 64 MiB
        assert int(kib) > 2**15
