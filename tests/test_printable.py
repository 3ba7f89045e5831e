"""data/errors.py: control characters are shown on a terminal, and stay as they are in a pipe."""
import dataclasses
import io
import sys

import pytest
import torch

import common
import decode
import extend
import train
from data import prepare as P
from data.errors import UserError, printable
from model import GPT, GPTConfig

EVIL = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \b\x7f\x9b2J \u202eright to left\u2066"
SHOWN = r"\x1b[31mred\x1b[0m \x1b]0;title\x07 \x08\x7f\x9b2J \u202eright to left\u2066"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("text", [
    "", "plain text,\n\twith a tab\n", "line ends of Windows\r\n", "日本語 한국어 é e\u0301 🙂",
    "\ufffd \u00a0 \u2028 \u200d", "a backslash, \\x1b",
])
def test_ordinary_text_is_shown_as_it_is(text):
    for stream in (Terminal(), io.StringIO()):
        assert printable(text, stream) == text


def test_controls_are_shown_on_a_terminal_and_raw_elsewhere(monkeypatch):
    assert printable(EVIL, Terminal()) == SHOWN and printable(EVIL, io.StringIO()) == EVIL
    assert printable("over\rwritten\r\n", Terminal()) == "over\\rwritten\r\n"
    controls = map(chr, [*range(32), *range(127, 160)])
    assert [c for c in controls if printable(c, Terminal()) == c] == ["\t", "\n"]
    for stream, expected in ((Terminal(), SHOWN), (io.StringIO(), EVIL), (None, EVIL)):
        monkeypatch.setattr(sys, "stdout", stream)
        assert printable(EVIL) == expected


def test_names_in_what_prepare_prints(tmp_path, monkeypatch):
    name = "a\x1b]0;b\x07.txt"
    (tmp_path / name).write_text("some text " * 20, encoding="utf-8")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        P.prepare(tmp_path / name, "bytes", tmp_path / "\x1b[2Jout")
        assert ("\x1b" in stream.getvalue()) != stream.isatty() and "[2Jout: " in stream.getvalue()

    def fail(**arguments):
        raise UserError(f"{name} is damaged")
    monkeypatch.setattr(P, "prepare", fail)
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    for stream, shown in ((Terminal(), r"a\x1b]0;b\x07.txt"), (io.StringIO(), name)):
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(SystemExit) as stop:
            P.main()
        assert stop.value.code == f"prepare.py: {shown} is damaged"


def test_names_in_what_the_scripts_print(tmp_path, monkeypatch):
    (tmp_path / "a\x1b]0;b\x07.txt").write_text("some text " * 40, encoding="utf-8")
    data = P.prepare(tmp_path / "a\x1b]0;b\x07.txt", "bytes", tmp_path / "data", quiet=True)
    flags = ["--steps", "1", "--eval_windows", "1", "--data", str(data), "--device", "cpu"]
    size = ["--preset", "tiny", "--n_layer", "1", "--n_head", "1", "--n_embd", "16",
            "--block_size", "16"]
    first = tmp_path / "\x1b[2Jout"
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # the bar's
    for script, argv, shown in (
        (train, [*size, "--out", str(first)], (r"a\x1b]0;b\x07.txt", r"\x1b[2Jout/ckpt.pt")),
        (extend, [str(first / "ckpt.pt"), "--heads", "5"], (r"\x1b[2Jout-5/ckpt.pt",)),
    ):
        monkeypatch.setattr(sys, "argv", [script.__name__, *argv, *flags])
        monkeypatch.setattr(sys, "stdout", Terminal())
        script.main()
        assert "\x1b" not in sys.stdout.getvalue()
        assert all(name in sys.stdout.getvalue() for name in shown)


@pytest.fixture
def echo(tmp_path):
    """a checkpoint that repeats the last token: its blocks add nothing to the embedding"""
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 64, 1, 1, 16, 1))
    for weight in model.blocks.parameters():
        weight.data.zero_()
    cfg = dataclasses.asdict(train.TrainConfig(block_size=64, n_mtp=1))
    common.save_checkpoint(tmp_path / "echo.pt", model, tokenizer={"kind": "bytes"},
                           train_config=cfg)
    return tmp_path / "echo.pt"


@pytest.mark.parametrize("more", [[], ["--trace"]])
def test_a_prompt_and_the_text_generated_after_it(echo, monkeypatch, more):
    flags = ["--prompt", "so \x1b", "--tokens", "6", "--temperature", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["decode.py", str(echo), *flags, *more])
    for stream, expected in ((Terminal(), "so " + r"\x1b" * 7), (io.StringIO(), "so " + "\x1b" * 7)):
        monkeypatch.setattr(sys, "stdout", stream)
        decode.main()
        assert expected in stream.getvalue()
        assert ("so \x1b" in stream.getvalue()) != stream.isatty()


def test_an_error_is_one_line(tmp_path):
    name = "two\nlines.txt"
    try:
        (tmp_path / name).write_bytes(b"\xff")
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(UserError) as caught:
        P.prepare(tmp_path / name, "bytes", tmp_path / "out", quiet=True)
    assert str(caught.value).startswith(f"{tmp_path / 'two'}\\nlines.txt is not UTF-8: line 1")
    assert "\n" not in str(caught.value)


def test_errors_of_the_scripts(monkeypatch):
    def main():
        raise UserError("no checkpoint at \x1b[2J.pt")
    for stream, shown in ((Terminal(), r"\x1b[2J.pt"), (io.StringIO(), "\x1b[2J.pt")):
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(SystemExit) as stop:
            common.run(main)
        assert stop.value.code.endswith(f": no checkpoint at {shown}")
