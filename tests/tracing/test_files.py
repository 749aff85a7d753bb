"""A trace on disk: what is written is read, in constant memory, and what is broken is named."""

import dataclasses
import logging

import numpy as np
import pytest

from moejax.tracing import Part, Trace, TraceMeta, TraceWriter, concatenate, files, open_trace

META = TraceMeta(300, (1, 3), ("code", "prose"), 256, "bytes")
ROWS_B = np.array([3, 0, 4])


def made(number: int, scores: bool = False) -> Trace:
    """Seven tokens in two documents, of random decisions."""
    random = np.random.default_rng(number)
    return Trace(
        meta=META,
        token_T=random.integers(0, 256, 7, np.int32),
        target_T=random.integers(0, 256, 7, np.int32),
        position_T=np.array([0, 1, 2, 0, 1, 2, 3], np.int32),
        document_T=np.array([0, 0, 0, 1, 1, 1, 1], np.int32),
        domain_T=np.array([1, 1, 1, -1, -1, -1, -1], np.int32),
        expert_TLR=random.integers(0, 301, (7, 2, 3)).astype(np.uint16),
        weight_TLR=random.random((7, 2, 3), np.float32),
        dropped_TLR=random.random((7, 2, 3)) < 0.5,
        entropy_TL=random.random((7, 2), np.float32),
        margin_TL=random.normal(size=(7, 2)).astype(np.float32),
        scores_TLE=random.random((7, 2, 300)).astype(np.float16) if scores else None,
    )


def written(folder, numbers, every: int = 1, **options) -> TraceWriter:
    writer = TraceWriter(folder, META, every=every, **options)
    for number in numbers:
        writer.add(Part(number, made(number), ROWS_B, 3 * number))
    return writer


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(files, "TOKENS_A_FILE", 14)  # two parts


def assert_same(left: Trace, right: Trace) -> None:
    assert left.meta == right.meta
    names = [name for name, _ in left.columns()]
    assert names == [name for name, _ in right.columns()]
    for name in names:
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_what_is_written_is_read(tmp_path, small_files) -> None:
    writer = written(tmp_path, range(1, 6))
    assert len(writer._parts) == 1  # no more than a file's parts are ever held
    writer.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000001-00000002.npz",
        "00000003-00000004.npz",
        "00000005-00000005.npz",
        "meta.json",
    ]
    there = open_trace(tmp_path)
    assert (there.meta, there.every, there.last) == (META, 1, 5)
    parts = [
        dataclasses.replace(made(n), document_T=made(n).document_T + np.int32(2 * (n - 1)))
        for n in range(1, 6)
    ]
    assert [len(trace) for trace in there] == [14, 14, 7]
    assert_same(there.read(), concatenate(parts))
    assert_same(there.read(16), concatenate(parts)[:16])
    part = there.part(4)
    assert (part.number, part.position, part.tokens_B.tolist()) == (4, 12, [3, 0, 4])
    np.testing.assert_array_equal(part.trace.weight_TLR, made(4).weight_TLR)
    assert there.cut == ""


def test_scores_and_guesses_are_kept(tmp_path) -> None:
    kept = dataclasses.replace(made(1, scores=True), predicted_T=np.arange(7, dtype=np.int32))
    writer = TraceWriter(tmp_path, META, extra={"seed": 3})
    writer.add(Part(1, kept, ROWS_B))
    writer.flush()
    assert_same(open_trace(tmp_path).read(), kept)
    assert open_trace(tmp_path).info["seed"] == 3


def test_a_run_that_goes_on_makes_later_parts_again(tmp_path, small_files) -> None:
    written(tmp_path, range(3, 22, 3), every=3).flush()  # 3-6, 9-12, 15-18, 21-21
    again = written(tmp_path, (15,), every=3, resume=12)
    assert open_trace(tmp_path).last == 12
    again.flush()
    there = open_trace(tmp_path)
    assert len(there.read()) == 35 and there.last == 15 and there.cut == ""
    with pytest.raises(KeyError):
        there.part(13)


BREAKS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"no archive" * 50),
    "absent": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("which", ["00000003-00000004.npz", "00000005-00000005.npz"])
def test_a_trace_cut_short_is_read_up_to_there(tmp_path, small_files, caplog, how, which) -> None:
    written(tmp_path, range(1, 6)).flush()
    BREAKS[how](tmp_path / which)
    there = open_trace(tmp_path)
    last = 2 if which.startswith("00000003") else 4
    with caplog.at_level(logging.WARNING):
        trace = there.read()
    assert len(trace) == 7 * last
    problem = f"{which} is broken"
    if how == "absent":
        file = "from number 3 on" if last == 2 else "that ends at number 5"
        problem = f"the file {file} is missing"
    line = (
        f"trace {tmp_path} is cut short: {problem}; {7 * last} tokens up to number {last} of 5 "
        "could be read"
    )
    assert there.cut == line and [record.message for record in caplog.records] == [line]


def test_where_nothing_can_be_read_one_line_says_why(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no trace: there is no whole meta.json"):
        open_trace(tmp_path / "none")
    written(tmp_path, [1]).flush()
    (tmp_path / "00000001-00000001.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="1.npz is broken; 0 tokens up to number 0 of 1"):
        open_trace(tmp_path).read()
    TraceWriter(tmp_path, META)
    with pytest.raises(ValueError, match="has no tokens: nothing was routed"):
        open_trace(tmp_path).read()
    (tmp_path / "meta.json").write_text('{"trace"')
    with pytest.raises(FileNotFoundError, match="no whole meta.json"):
        open_trace(tmp_path)
