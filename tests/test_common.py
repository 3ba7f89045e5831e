"""common.py: flags and their ranges, devices, damaged checkpoints, errors and output."""
import errno
import io
import json
import math
import os
import sys
import zipfile
from dataclasses import dataclass

import pytest
import torch

import common
import train
from data.temporary import temporary
from model import GPT, GPTConfig


@dataclass
class Config:
    rate: float = common.flag(0.5, "a fraction", max=1)
    decay: float = common.flag(0.9, "a decay", max=0.99)
    count: int = common.flag(3, "100 % of them", min=1)
    kind: str = common.flag("", "a | b", choices=("", "a", "b"))
    any: float = common.flag(1.0, "at least 0, which is the default range")
    switch: bool = common.flag(True, "on")


@pytest.mark.parametrize("name,value,message", [
    ("rate", 1.1, r"--rate is 1.1; it must be a finite number in \[0, 1\]$"),
    ("rate", -0.1, "--rate"), ("rate", float("nan"), "--rate is nan; it must be a finite number"),
    ("decay", 1.0, r"--decay is 1.0; .* in \[0, 0.99\]"), ("any", -0.1, "--any"),
    ("count", 0, r"--count is 0; .* in \[1, 1e\+18\]"),
    ("count", 10**23, "--count is 1.*; it must be a finite number"),
    ("kind", "c", "--kind is 'c'; it must be one of a, b"),
    ("any", float("inf"), "--any is inf; it must be a finite number"),
])
def test_a_flag_outside_its_range(name, value, message):
    with pytest.raises(common.UserError, match=message):
        common.check_flags(Config(**{name: value}))
    for fine in ({}, {"rate": 0.0}, {"rate": 1.0}, {"decay": 0.0}, {"kind": "b"}, {"any": 5e9}):
        common.check_flags(Config(**fine))


def test_an_earlier_run_that_may_not_be_moved_is_one_line(tmp_path, monkeypatch):
    """a folder without permission to write, or on Windows a file that is open"""
    (tmp_path / "ckpt.pt").write_bytes(b"an earlier run")

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(args[0]))
    monkeypatch.setattr(common.os, "replace", refuse)
    with pytest.raises(common.UserError, match="could not write .*ckpt.pt.*Permission denied"):
        common.keep_old(tmp_path)


def test_parse_tells_what_was_given(capsys):
    extra = [("file", {"nargs": "?"}), ("--json", {"action": "store_true"})]
    given, rest = common.parse(Config, "", extra, ["x", "--no-switch", "--count", "7"])
    assert given == {"switch": False, "count": 7} and rest == {"file": "x", "json": False}
    with pytest.raises(SystemExit):
        common.parse(Config, "what it does", extra, ["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "what it does" in text and "100 % of them (default 3)" in text


def test_parse_some_of_the_fields(capsys):
    given, rest = common.parse(Config, "", argv=["--rate", "0.1"], only=("rate", "count"))
    assert given == {"rate": 0.1} and not rest
    for argv in (["--kind", "a"], ["-h"]):
        with pytest.raises(SystemExit):
            common.parse(Config, "what it does", argv=argv, only=("rate", "count"))
    text = capsys.readouterr().out
    assert "a fraction" in text and "a | b" not in text and "default" not in text


@pytest.mark.parametrize("alone", ["RANK", "WORLD_SIZE"])
def test_a_leftover_of_a_cluster_is_an_error(monkeypatch, alone):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert common.processes() == (0, 1)
    monkeypatch.setenv(alone, "1")
    with pytest.raises(common.UserError, match="RANK and WORLD_SIZE is set.*torchrun"):
        common.processes()


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert common.pick_device("auto").type == "cpu"
    assert common.pick_dtype("auto", torch.device("cpu"))[0] == torch.float32
    for name in ("cuda", "mps", "banana"):
        message = f"--device is '{name}'; it must be one of cpu here, or auto"
        with pytest.raises(common.UserError, match=message):
            common.pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert common.pick_device("auto").type == "cpu"  # mps is untested: only on request
    assert common.pick_device("mps").type == "mps"
    assert common.pick_dtype("auto", torch.device("mps"))[0] == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.pick_device("auto").type == "cuda"


# ---- checkpoints


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=8, n_mtp=1))
    common.save_checkpoint(tmp_path / "ckpt.pt", model, step=3, tokenizer={"kind": "bytes"})
    return tmp_path / "ckpt.pt"


def test_no_flipped_byte_changes_a_weight_unnoticed(saved):
    whole = saved.read_bytes()
    model, meta = common.load_checkpoint(saved)
    noticed = 0
    for at in range(7, len(whole), len(whole) // 150):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            other, other_meta = common.load_checkpoint(saved)
        except common.UserError as error:
            noticed += 1
            assert "\n" not in str(error)
            continue
        assert other_meta == meta and other.config == model.config, at   # padding, or a date
        assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values())), at
    assert noticed > 50


def test_loading_draws_no_initial_weights(saved, monkeypatch):
    """on the device meta, the first random function would import 800 modules"""
    def fail(*args, **kwargs):
        raise AssertionError("normal_ was called")

    monkeypatch.setattr(torch.Tensor, "normal_", fail)
    common.load_checkpoint(saved)


def test_a_reader_that_stops_early_is_no_error(monkeypatch):
    """as `python decode.py .. | head -1`"""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:   # its end writes once more what print left
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as stop:
            common.run(lambda: print("a token", flush=True))
    assert stop.value.code == 1


def test_a_folder_stands_for_its_checkpoint(saved):
    os.replace(saved, saved.with_name("ckpt.pt"))
    assert common.load_checkpoint(saved.parent)[0].config.n_embd > 0


def test_a_wrong_checksum_is_told(saved):
    with zipfile.ZipFile(saved) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(saved.read_bytes())
    data[largest.header_offset + 200] ^= 1
    saved.write_bytes(data)
    with pytest.raises(common.UserError, match="the checksum of .*data.* is wrong.*damaged"):
        common.load_checkpoint(saved)


def drop(raw, part, name):
    del raw[part][name]


def set_weight(raw, weight):
    raw["model"]["norm.weight"] = weight


@pytest.mark.parametrize("change, message", [
    (lambda raw: raw["model"]["norm.weight"].fill_(math.nan), "norm.weight .* not finite"),
    (lambda raw: raw["model"]["norm.weight"][2:3].fill_(math.inf), "norm.weight .* not finite"),
    # one number that stands for all: an optimizer would write past its end
    (lambda raw: set_weight(raw, torch.ones(1).expand(8)), "norm.weight .* not contiguous"),
    (lambda raw: set_weight(raw, torch.ones(8).to_sparse()), "norm.weight .* not contiguous"),
    (lambda raw: set_weight(raw, torch.ones(8, dtype=torch.int8)), "norm.weight.*floating point"),
    # structure: nothing is allocated for a config that doesn't fit its weights
    (lambda raw: raw["config"].update(n_experts=4), "n_experts.*another version"),
    (lambda raw: raw["config"].update(n_layer="two"), "TypeError"),
    (lambda raw: raw["config"].update(n_layer=2.5), "TypeError"),
    (lambda raw: raw["config"].update(n_embd=2**20), "size mismatch"),
    (lambda raw: raw["config"].update(n_mtp=2), "Missing key.*heads.1"),
    (lambda raw: raw["config"].update(n_mtp=0), "Unexpected key.*heads.0"),
    (lambda raw: raw.update(config=[1]), "can't be loaded"),
    (lambda raw: raw.update(model=[1]), "can't be loaded"),
    (lambda raw: raw.pop("model"), "KeyError: 'model'"),
    (lambda raw: raw.pop("config"), "KeyError: 'config'"),
    (lambda raw: drop(raw, "model", "norm.weight"), "Missing key.*norm.weight"),
    (lambda raw: set_weight(raw, torch.ones(9)), "size mismatch for norm.weight"),
    (lambda raw: set_weight(raw, torch.ones(2, 4)), "size mismatch for norm.weight"),
    (lambda raw: set_weight(raw, "weights"), "can't be loaded"),
])
def test_a_checkpoint_with_wrong_contents(saved, change, message):
    raw = torch.load(saved, weights_only=True)
    change(raw)
    torch.save(raw, saved)
    with pytest.raises(common.UserError, match=message) as caught:
        common.load_checkpoint(saved)
    assert "\n" not in str(caught.value) and str(saved) in str(caught.value)


def test_two_processes_may_write_one_checkpoint(saved, monkeypatch):
    """each has a temporary file of its own: whoever is last, the checkpoint is whole"""
    model, _ = common.load_checkpoint(saved)
    save = torch.save

    def interrupted(content, path):
        save(content, path)
        monkeypatch.setattr(torch, "save", save)
        with monkeypatch.context() as patch:  # the other one writes, before this one renames
            patch.setattr(os, "getpid", lambda: 12345)
            common.save_checkpoint(saved, model, step=5)
    monkeypatch.setattr(torch, "save", interrupted)
    common.save_checkpoint(saved, model, step=4)
    assert common.load_checkpoint(saved)[1]["step"] == 4
    assert [path.name for path in saved.parent.iterdir()] == ["ckpt.pt"]


# ---- the end


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_printing_never_fails_a_run(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", None)                             # as pythonw has it
    common.run(lambda: print("a \u4e2d \ufffd b"))
    sys.stdout.flush()
    assert raw.getvalue() == b"a \\u4e2d \\ufffd b" + os.linesep.encode()


def test_a_user_error_is_one_line_and_all_else_a_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/some.py"])

    def main():
        raise error
    error = common.UserError("--lr is 5")
    with pytest.raises(SystemExit) as stop:         # a text: Python prints it and exits with 1
        common.run(main)
    assert stop.value.code == "some.py: --lr is 5"
    error = ValueError("too many values")
    with pytest.raises(ValueError, match="too many values"):
        common.run(main)


def test_the_hint_fits_what_went_wrong(tmp_path):
    """a full disk needs space; a folder where the file should be, or no permission, doesn't"""
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, hint in ((full, True), (RuntimeError("PytorchStreamWriter failed"), True),
                        (IsADirectoryError(errno.EISDIR, "Is a directory"), False),
                        (PermissionError(errno.EACCES, "Permission denied"), False)):
        with (pytest.raises(common.UserError, match="--out") as said,
              common.writing(tmp_path / "x")):
            raise error
        assert ("free some space" in str(said.value)) == hint


def test_half_a_line_of_a_log_is_ended(tmp_path):
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=8, n_mtp=1))
    cfg = train.TrainConfig(out=str(tmp_path))
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st', encoding="utf-8")
    common.start_log(cfg, model, {"sha256": "0"}, 5)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ['{"step": 1}', '{"st'] and json.loads(lines[2])["start"] == 5
    (tmp_path / "log.jsonl").write_bytes(b'{"s\xff')      # bytes that are no text
    common.start_log(cfg, model, {"sha256": "0"}, 6)
    assert (tmp_path / "log.jsonl").read_bytes().startswith(b'{"s\xff\n{"config"')


def test_what_a_killed_run_left_is_removed(tmp_path):
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=8, n_mtp=1))
    left = temporary(tmp_path / "ckpt.pt", "part")
    left = left.with_name(left.name.rsplit("-", 1)[0] + "-999999999")      # no process has this id
    left.write_bytes(b"half")
    common.save_checkpoint(tmp_path / "ckpt.pt", model)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("changes", [{"n_layer": 10**6}, {"block_size": 10**9}])
def test_an_absurd_size_is_told_before_anything_is_allocated(tmp_path, changes):
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=8, n_mtp=1))
    common.save_checkpoint(tmp_path / "ckpt.pt", model)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    content["config"].update(changes)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(common.UserError, match="can't be those of"):
        common.load_checkpoint(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("script, advice", [("train.py", True), ("decode.py", False)])
def test_ctrl_c_advises_to_resume_only_what_can_be_resumed(monkeypatch, script, advice):
    def main():
        raise KeyboardInterrupt
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit, match="interrupted") as stop:
        common.run(main)
    assert ("--resume" in str(stop.value.code)) == advice
