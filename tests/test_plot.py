"""results/plot.py: what it reads from a log, and that the picture shows it. And the guide's
pictures are those of their script."""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pictures
import pytest

from common import UserError
from results import plot

SVG = "{http://www.w3.org/2000/svg}"


def write_log(folder, rows, more=""):
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "log.jsonl").write_text(text + more, encoding="utf-8")
    return folder


def train_row(step, loss):
    return {"step": step, "loss": 9.0, "ce": [loss, 7.0], "kl": [0.1], "lr": 0.1, "ms": 1.0}


def val_row(step, loss, ar):
    return {"step": step, "val": {"loss": [loss, 7.0, 7.0], "ar": ar, "car": ar}}


ROWS = [
    {"config": {}}, train_row(10, 5.0), train_row(20, 4.0), val_row(20, 4.5, [0.5, 0.25]),
    {"config": {}, "start": 20}, train_row(20, 3.5), train_row(30, 3.0),
    val_row(30, 3.25, [0.75, 0.5]),
]


def test_the_main_heads_loss_and_the_acceptance_of_each_head(tmp_path, capsys):
    folder = write_log(tmp_path / "a", ROWS, '{"step": 40, "lo')
    found = plot.read_log(folder)
    assert found == plot.read_log(folder / "log.jsonl")
    # the resumed run wrote step 20 again
    assert found["train"] == [(10, 5.0), (20, 3.5), (30, 3.0)]
    assert found["val"] == [(20, 4.5), (30, 3.25)]
    assert found["ar"] == [(20, [0.5, 0.25]), (30, [0.75, 0.5])]
    assert "line 9: not a whole row, left out" in capsys.readouterr().out


def test_the_picture(tmp_path, monkeypatch, capsys):
    first, second = write_log(tmp_path / "a&b", ROWS), write_log(tmp_path / "c", ROWS[:3])
    monkeypatch.setattr(sys, "argv", ["plot.py", str(first), str(second)])
    plot.main()
    assert capsys.readouterr().out == f"wrote {first / 'plot.svg'}\n"
    svg = ET.parse(first / "plot.svg").getroot()
    lines = [line for line in svg.iter(f"{SVG}polyline") if line.get("points")]
    # train, val, two heads; train alone
    assert len(lines) == 2 + 2 + 1
    assert [text.text for text in svg.iter(f"{SVG}text")][-2:] == [str(first), str(second)]
    points = [[float(v) for v in p.split(",")] for p in lines[0].get("points").split()]
    # the loss falls
    assert points[0][0] < points[1][0] < points[2][0] and points[0][1] < points[1][1] < points[2][1]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)


@pytest.mark.parametrize(
    "low, high", [(0.0, 1.0), (2.9, 5.2), (0, 3000), (0.6421, 0.6433), (-3.0, 1e5)]
)
def test_ticks_are_a_few_round_numbers_inside(low, high):
    found = plot.ticks(low, high)
    assert 2 <= len(found) <= 12 and low <= found[0] and found[-1] <= high * (1 + 1e-9)


def test_what_can_not_be_drawn_is_said(tmp_path, monkeypatch):
    empty = write_log(tmp_path / "empty", ROWS[:1])
    full = write_log(tmp_path / "a", ROWS)
    binary = tmp_path / "ckpt.pt"
    binary.write_bytes(b"PK\x03\x04\x80")
    for arguments, found in [
        ([tmp_path / "none"], "there is no log at"), ([empty], "has no rows yet"),
        ([empty] * 7, "got 7 runs; one picture shows 6"),
        ([full, "--svg", tmp_path], "could not write"), ([binary], "ckpt.pt is no log"),
        ([full, "--svg", full / "log.jsonl"], "log.jsonl exists, and is not what --svg writes"),
    ]:
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        with pytest.raises(UserError, match=found):
            plot.main()


def test_one_evaluation_and_equal_values_are_drawn(tmp_path):
    found = plot.read_log(write_log(tmp_path / "a", [val_row(5, 4.0, [0.5])]))
    ET.fromstring(plot.draw({"a": found}))
    assert "nan" not in plot.draw({"a": found})


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_the_pictures_of_the_guide_are_those_of_the_script(name):
    file = Path(pictures.__file__).with_name(f"{name}.svg")
    assert file.read_text(encoding="utf-8") == pictures.PICTURES[name]().svg()
    ET.parse(file)
    assert f"]({name}.svg)" in file.with_name("README.md").read_text(encoding="utf-8")
