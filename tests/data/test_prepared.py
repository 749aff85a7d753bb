"""Preparing once: whole or not at all, on one machine and without a network."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from moejax.data import DataConfig, corpora, open_dataset, prepared
from moejax.data.corpora import group_of
from moejax.data.export import export

REPOSITORY = Path(__file__).parents[2]
OPEN = """
import os, signal, sys
from moejax.data import DataConfig, open_dataset, builders, packing
{patch}
config = DataConfig(data_dir=sys.argv[1], max_documents=40, validation=0.2, sequence=32, batch=8)
print(open_dataset(config).fingerprint)
"""
DIE_BUILDING = """
examples = builders.MoejaxText._generate_examples
def dying(self, documents):
    yield from examples(self, documents[:5])
    os.kill(os.getpid(), signal.SIGKILL)
builders.MoejaxText._generate_examples = dying
"""
DIE_PACKING = """
counts = packing.Writer.counts
def dying(self):
    os.kill(os.getpid(), signal.SIGKILL)
packing.Writer.counts = dying
"""


def start(data_dir: Path, patch: str = "") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", OPEN.format(patch=patch), str(data_dir)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen) -> tuple[int, str]:
    printed, _ = process.communicate()
    return process.returncode, printed.strip()


def tree(directory: Path) -> list[str]:
    return [str(path.relative_to(directory)) for path in directory.rglob("*")]


@pytest.fixture
def copy(small, small_config, tmp_path):
    """A config whose data is prepared, in a directory of its own to damage."""
    shutil.copytree(small_config.data_dir, tmp_path / "copy")
    return dataclasses.replace(small_config, data_dir=str(tmp_path / "copy"))


def test_killed_while_preparing_leaves_nothing_that_is_trusted(small, tmp_path):
    assert outcome(start(tmp_path, DIE_BUILDING)) == (-signal.SIGKILL, "")
    assert any("incomplete" in path for path in tree(tmp_path))
    assert not list(tmp_path.rglob("dataset_info.json"))
    assert outcome(start(tmp_path, DIE_PACKING)) == (-signal.SIGKILL, "")
    assert list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("meta.json"))
    assert outcome(start(tmp_path)) == (0, small.fingerprint)
    assert not any("incomplete" in path or ".new." in path for path in tree(tmp_path))


def test_two_processes_at_once_prepare_once(small, tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    outputs = [process.communicate() for process in both]
    assert [out.strip() for out, _ in outputs] == [small.fingerprint] * 2
    told = "".join(err for _, err in outputs)
    assert len(told.splitlines()) == 2  # and nothing of TFDS's own
    assert told.count("reading stdlib") == told.count("packing stdlib") == 1


@pytest.mark.parametrize(
    "damage", ["short", "no stream", "no meta", "cut meta", "no shard", "cut info"]
)
def test_a_damaged_copy_is_made_again(damage, copy, small):
    directory = Path(copy.data_dir)
    (packed,) = [path for path in directory.glob("packed/*") if (path / "meta.json").exists() and
                 json.loads((path / "meta.json").read_text())["dtype"] == "uint8"]  # fmt: skip
    stream, meta = packed / "train-code.bin", packed / "meta.json"
    (info,) = directory.rglob("dataset_info.json")
    if damage == "short":
        os.truncate(stream, stream.stat().st_size - 1)
    elif damage == "no stream":
        stream.unlink()
    elif damage == "no meta":
        meta.unlink()
    elif damage == "cut meta":
        os.truncate(meta, 20)
    else:
        shutil.rmtree(packed)
        if damage == "no shard":
            next(info.parent.glob("*-train.array_record-*")).unlink()
        else:
            os.truncate(info, 20)
    assert open_dataset(copy, progress=False).fingerprint == small.fingerprint
    assert open_dataset(copy, progress=False).sizes == small.sizes


def test_a_prepared_copy_opens_without_the_builders(copy, small, monkeypatch):
    shutil.rmtree(Path(copy.data_dir) / "tfds")
    monkeypatch.setitem(sys.modules, "moejax.data.builders", None)  # an import would raise
    assert open_dataset(copy, progress=False).fingerprint == small.fingerprint


def test_an_exported_corpus_is_the_same_where_the_text_is_another(
    small, small_config, tmp_path, monkeypatch
):
    export(small_config, tmp_path / "export", progress=False)
    other = dataclasses.replace(small_config, data_dir=str(tmp_path / "export"))
    # Another machine: no such text, no TFDS.
    monkeypatch.setattr(prepared, "STDLIB", dataclasses.replace(corpora.STDLIB, root=lambda: None))
    monkeypatch.setitem(sys.modules, "moejax.data.builders", None)
    assert open_dataset(other, progress=False).fingerprint == small.fingerprint
    again = dataclasses.replace(other, data_dir=str(tmp_path / "again"))
    export(other, tmp_path / "again", progress=False)
    assert open_dataset(again, progress=False).fingerprint == small.fingerprint
    uncut = dataclasses.replace(other, max_documents=0)
    with pytest.raises(FileNotFoundError, match="'stdlib' in .*export was exported, packed for"):
        open_dataset(uncut, progress=False)


def test_an_export_brings_its_tokenizer(small_bpe, small_config, tmp_path):
    config = dataclasses.replace(small_config, tokenizer="bpe:400")
    export(config, tmp_path, progress=False)
    other = dataclasses.replace(config, data_dir=str(tmp_path))
    assert open_dataset(other, progress=False).fingerprint == small_bpe.fingerprint


def test_a_corpus_of_tfds_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="copy lm1b from the tfds folder"):
        export(DataConfig(name="lm1b", data_dir=str(tmp_path)), tmp_path / "export")


def test_importing_is_cheap_and_jax_free():
    code = (
        "import sys, moejax.data; heavy = {'jax', 'grain', 'tensorflow_datasets', 'tokenizers'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_preparing_tells_stderr_and_leaves_stdout_alone(tmp_path, capfd):
    config = DataConfig(data_dir=str(tmp_path), max_documents=20, validation=0.2, batch=2)
    open_dataset(config)
    told = capfd.readouterr()
    assert told.out == ""
    assert "moejax.data: reading stdlib into" in told.err and "packing stdlib into" in told.err
    assert "\r" not in told.err  # no bars where nobody watches
    open_dataset(config)
    assert capfd.readouterr().err == ""


def test_the_tfds_dataset_is_an_ordinary_one_split_by_file(small, small_config):
    (info,) = Path(small_config.data_dir).rglob("dataset_info.json")
    builder = tfds.builder_from_directory(str(info.parent))
    assert builder.info.features["domain"].names == ["code", "prose"]
    files, texts = {}, {}
    for split in ("train", "validation"):
        source = builder.as_data_source(split)
        assert len(source) == sum(size["documents"] for size in small.sizes[split].values())
        files[split] = {group_of(record["id"].decode()) for record in source}
        texts[split] = {(record["domain"], record["text"]) for record in source}
    assert files["train"] and files["validation"]
    assert not files["train"] & files["validation"]
    assert not texts["train"] & texts["validation"]


def test_unwritable_data_dir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"cannot be written \(.*\); set data_dir or \$MOEJAX_DATA_DIR"
    ):
        open_dataset(DataConfig(data_dir=str(tmp_path / "file")), progress=False)


# The standard corpora ----------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """No prepared corpora anywhere but where a test puts them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return tmp_path


def make_standard(name: str, directory: Path, config: str | None, splits: dict[str, int]) -> None:
    """Writes a corpus as TFDS itself would prepare it, of made-up texts."""

    def generate(self, split, count):
        for n in range(count):
            yield f"{split}{n}", {"text": f"{split} text {n} {'word ' * 30}"}

    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    body = {
        "VERSION": tfds.core.Version("1.1.0"),
        "name": name,
        "__module__": __name__,
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=features),
        "_split_generators": lambda self, dl_manager: {
            split: self._generate_examples(split, count) for split, count in splits.items()
        },
        "_generate_examples": generate,
    }
    if config:
        body["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=config)]
    base = tfds.core.GeneratorBasedBuilder
    kind = types.new_class(
        "Standard", (base,), {"skip_registration": True}, lambda namespace: namespace.update(body)
    )
    kind(data_dir=str(directory), file_format="array_record").download_and_prepare()


def test_lm1b_from_a_prepared_copy_uses_its_own_held_out_split(places):
    make_standard("lm1b", places / "tfds", None, {"train": 50, "test": 7})
    config = DataConfig("lm1b", data_dir=str(places), sequence=16, batch=4)
    dataset = open_dataset(config, progress=False)
    assert dataset.domains == ("lm1b",)
    counts = {split: size["lm1b"]["documents"] for split, size in dataset.sizes.items()}
    assert counts == {"train": 50, "validation": 7}
    assert dataset.decode(dataset.windows["validation"].streams[0]).startswith("test text")
    capped = open_dataset(dataclasses.replace(config, max_documents=5), progress=False)
    assert capped.sizes["train"]["lm1b"]["documents"] == 5


def test_wikipedia_is_split_by_document_and_asks_for_a_config(places, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(places / "shared"))
    make_standard("wikipedia", places / "shared", "20230601.en", {"train": 60})
    config = DataConfig("wikipedia", data_dir=str(places), validation=0.3, sequence=16, batch=4)
    dataset = open_dataset(config, progress=False)
    texts = {
        split: set(dataset.decode(windows.streams[0]).split("\u2400")[:-1])
        for split, windows in dataset.windows.items()
    }
    assert len(texts["train"] | texts["validation"]) == 60
    assert not texts["train"] & texts["validation"] and len(texts["validation"]) > 5
    make_standard("wikipedia", places / "shared", "20230601.fr", {"train": 60})
    both = "prepared as wikipedia/20230601.en, wikipedia/20230601.fr: name one"
    with pytest.raises(ValueError, match=both):
        open_dataset(config, progress=False)
    named = dataclasses.replace(config, name="wikipedia/20230601.en")
    assert open_dataset(named, progress=False).fingerprint == dataset.fingerprint


def test_an_unprepared_corpus_says_at_once_what_to_run(places):
    with pytest.raises(FileNotFoundError) as error:
        open_dataset(DataConfig("lm1b", data_dir=str(places)), progress=False)
    assert f"python -m moejax.data --name=lm1b --download --data_dir={places}" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"--name=wikipedia/20230601\.en"):
        open_dataset(DataConfig("wikipedia", data_dir=str(places)), progress=False)


def test_a_copy_in_tfrecord_or_in_part_is_refused_with_the_reason(places):
    make_standard("lm1b", places / "tfds", None, {"train": 50, "test": 7})
    (info,) = (places / "tfds").rglob("dataset_info.json")
    whole = info.read_text()
    config = DataConfig("lm1b", data_dir=str(places))
    info.write_text(whole.replace("array_record", "tfrecord"))
    with pytest.raises(FileNotFoundError, match="is in tfrecord, which needs TensorFlow"):
        open_dataset(config, progress=False)
    info.write_text(whole)
    next(info.parent.glob("*-test.array_record*")).unlink()
    with pytest.raises(FileNotFoundError, match="has 0 of 1 files of its split test"):
        open_dataset(config, progress=False)
    assert prepared.defect(info.parent)


def run_module(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "moejax.data", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_prepares_and_shows(small, small_config):
    done = run_module(
        f"--data_dir={small_config.data_dir}", "--max_documents=40", "--validation=0.2"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[:3] == ["train", "code",
        str(small.sizes["train"]["code"]["documents"])]  # fmt: skip
    wrong = run_module("--name=stdlb")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().startswith("error: unknown corpus 'stdlb'; did you mean")
