"""common.py: flags and their ranges, devices, damaged checkpoints, errors and output."""
import io
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import common
from model import GPT, GPTConfig

REPO = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    rate: float = common.flag(0.5, "a fraction", max=1)
    decay: float = common.flag(0.9, "a decay", max=0.5)
    count: int = common.flag(3, "100 % of them", min=1)
    kind: str = common.flag("", "a | b", choices=("", "a", "b"))
    any: float = common.flag(1.0, "at least 0, which is the default range")
    switch: bool = common.flag(True, "on")


@pytest.mark.parametrize("name,value,message", [
    ("rate", 1.1, "--rate is 1.1; it must be at least 0 and at most 1"), ("rate", -0.1, "--rate"),
    ("rate", float("nan"), "--rate is nan; it must be a finite number"),
    ("decay", 1.0, "--decay is 1.0; it must be at least 0 and below 1"),
    ("count", 0, "--count is 0; it must be at least 1$"),
    ("kind", "c", "--kind is 'c'; it must be one of a, b"),
    ("any", float("inf"), "--any is inf; it must be a finite number"),
])
def test_a_flag_outside_its_range(name, value, message):
    with pytest.raises(common.UserError, match=message):
        common.check_flags(Config(**{name: value}))
    for fine in ({}, {"rate": 0.0}, {"rate": 1.0}, {"decay": 0.0}, {"kind": "b"}, {"any": -5.0}):
        common.check_flags(Config(**fine))


def test_parse_tells_what_was_given(capsys):
    extra = [("file", {"nargs": "?"}), ("--json", {"action": "store_true"})]
    given, rest = common.parse(Config, "", extra, ["x", "--no-switch", "--count", "7"])
    assert given == {"switch": False, "count": 7} and rest == {"file": "x", "json": False}
    with pytest.raises(SystemExit):
        common.parse(Config, "what it does", extra, ["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "what it does" in text and "100 % of them (default 3)" in text


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
    assert "untested" in common.pick_dtype("auto", torch.device("mps"))[1]
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


def test_a_wrong_checksum_is_told(saved):
    with zipfile.ZipFile(saved) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(saved.read_bytes())
    data[largest.header_offset + 200] ^= 1
    saved.write_bytes(data)
    with pytest.raises(common.UserError, match="damaged: the checksum of .*data.* is wrong"):
        common.load_checkpoint(saved)


def to_int8(raw):
    raw["model"]["norm.weight"] = raw["model"]["norm.weight"].to(torch.int8)


@pytest.mark.parametrize("change,message", [
    (lambda raw: raw["model"]["norm.weight"].fill_(float("nan")), "norm.weight has .* not finite"),
    (lambda raw: raw["model"]["norm.weight"][2:3].fill_(float("inf")), "norm.weight has .* not finite"),
    (to_int8, "norm.weight is torch.int8"),
    (lambda raw: raw["config"].update(n_experts=4), "this version does not know: n_experts"),
])
def test_a_checkpoint_with_wrong_contents(saved, change, message):
    raw = torch.load(saved, weights_only=True)
    change(raw)
    torch.save(raw, saved)
    with pytest.raises(common.UserError, match=message):
        common.load_checkpoint(saved)


# ---- the end


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_printing_never_fails_a_run(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", None)                             # as pythonw has it
    common.run(lambda: print("a \u4e2d \ufffd b"))
    sys.stdout.flush()
    assert raw.getvalue() == b"a \\u4e2d \\ufffd b" + os.linesep.encode()


@pytest.mark.parametrize("error", ["common.UserError('--lr is 5')", "ValueError('too many values')"])
def test_a_user_error_is_one_line_and_all_else_a_traceback(tmp_path, error):
    script = tmp_path / "some.py"
    text = f"import common\ndef main():\n    raise {error}\ncommon.run(main)\n"
    script.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(REPO)})
    assert done.returncode == 1
    if "UserError" in error:
        assert done.stderr.strip() == "some.py: --lr is 5"
    else:
        assert "Traceback" in done.stderr and "line 3, in main" in done.stderr
