"""What a run writes: metrics.jsonl, TensorBoard events, and the live line."""

import io
import json
import sys
from collections import defaultdict

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from moejax.training.records import Progress, Records, load_image, read_records

RECORD = {
    "kind": "train",
    "step": 2,
    "loss": np.float32(1.5),
    "max_vio": 0.25,
    "balance": {"load_balance": np.float32(1.125)},
    "load_LE": np.array([[0.25, 0.75]], np.float32),
}


def events(folder):
    """Tag -> [(step, value)], read from the event files' own framing (length, crc, data, crc)."""
    found = defaultdict(list)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                found[value.tag].append((event.step, value.simple_value))
            data = data[16 + size :]
    return dict(found)


def test_records_come_back_as_plain_numbers(tmp_path):
    records = Records(tmp_path, 0)
    records.write(RECORD)
    records.write({"kind": "eval", "step": 2, "bpb": 4.0})
    wanted = [
        {**RECORD, "loss": 1.5, "balance": {"load_balance": 1.125}, "load_LE": [[0.25, 0.75]]},
        {"kind": "eval", "step": 2, "bpb": 4.0},
    ]
    assert read_records(tmp_path / "metrics.jsonl") == wanted  # while the run goes on
    records.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == wanted


def test_tensorboard_gets_every_number_by_kind_and_name(tmp_path):
    records = Records(tmp_path, 0)
    records.write(RECORD)
    records.write({"kind": "eval", "step": 4, "bpb": 4.0, "bpb_domain": {"code": 3.5}})
    records.close()
    assert events(tmp_path / "tensorboard") == {
        "train/loss": [(2, 1.5)],
        "train/max_vio": [(2, 0.25)],
        "train/balance/load_balance": [(2, 1.125)],
        "eval/bpb": [(4, 4.0)],
        "eval/bpb_domain/code": [(4, 3.5)],
    }


def test_a_resumed_run_drops_the_records_after_its_checkpoint_and_a_line_cut_short(tmp_path):
    records = Records(tmp_path, 0)
    for step in (1, 2, 3):
        records.write({"kind": "train", "step": step})
    records.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    records = Records(tmp_path, 2)
    records.write({"kind": "train", "step": 3, "again": True})
    records.close()
    found = read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r.get("again", False)) for r in found] == [
        (1, False),
        (2, False),
        (3, True),
    ]
    assert [path.name for path in tmp_path.glob("*.partial")] == []


SHOWN = {
    "step": 30,
    "loss": 2.34567,
    "tokens_per_s": 12345.6,
    "mfu": 0.4321,
    "max_vio": 0.876,
    "drop": 0.0123,
}


class Terminal(io.StringIO):
    def __init__(self, live):
        super().__init__()
        self.live = live

    def isatty(self):
        return self.live


@pytest.fixture
def stderr(monkeypatch):
    def replaced(live):
        terminal = Terminal(live)
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    return replaced


LINE = "switch 30/200  loss 2.3457  12,346 tokens/s  MFU 43.2%  ETA 75 s  MaxVio 0.88  drops 1.2%"


def test_the_live_line_says_all_and_stays_one_line(stderr):
    terminal = stderr(live=True)
    progress = Progress("switch", 200)
    progress.show(SHOWN, 75.4)
    assert terminal.getvalue() == f"\r\x1b[K{LINE}"
    progress.show({**SHOWN, "step": 200}, 0.0)
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().endswith("\n")


def test_a_dense_run_shows_no_routing(stderr):
    terminal = stderr(live=True)
    dense = {key: value for key, value in SHOWN.items() if key not in ("max_vio", "drop")}
    Progress("dense", 200).show(dense, 75.4)
    assert "MaxVio" not in terminal.getvalue() and "MFU 43.2%" in terminal.getvalue()


def test_on_a_pipe_there_is_a_line_now_and_then_and_the_last_one(stderr):
    terminal = stderr(live=False)
    progress = Progress("switch", 200)
    for step in (30, 40, 50, 200):
        progress.show({**SHOWN, "step": step}, 75.4)
    lines = terminal.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["30/200", "200/200"]
    assert lines[0] == LINE


def test_quiet_is_quiet(stderr):
    terminal = stderr(live=True)
    progress = Progress("switch", 200, quiet=True)
    progress.show({**SHOWN, "step": 200}, 0.0)
    progress.say("resumed")
    assert terminal.getvalue() == ""


def test_numbers_of_layers_go_to_tensorboard_one_by_one(tmp_path):
    records = Records(tmp_path, 0)
    records.write({"kind": "train", "step": 1, "drop_L": np.array([0.5, 0.25]), "drop_k": [1.0]})
    records.show_saturation({"step": [3, 6], "saturation_SL": [[0.5], [0.75]], "floor": 0.25})
    records.show_saturation({})
    records.close()
    assert events(tmp_path / "tensorboard") == {
        "train/drop_L/0": [(1, 0.5)],
        "train/drop_L/1": [(1, 0.25)],
        "eval/saturation_L/0": [(3, 0.5), (6, 0.75)],
    }


def test_the_picture_of_a_load():
    # Two layers of four experts: fair; four times, nothing, half and twice the fair share.
    image = load_image(np.array([[0.25] * 4, [1.0, 0.0, 0.125, 0.5]]))
    assert image.shape == (24, 48, 3) and image.dtype == np.uint8
    pixels = image[6::12, 6::12].tolist()
    assert pixels[0] == [[255, 255, 255]] * 4
    assert pixels[1] == [[255, 0, 0], [0, 0, 255], [127, 127, 255], [255, 127, 127]]
