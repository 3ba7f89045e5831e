"""decode.py's command line: text, --trace, --svg, and what it says of bad requests. Toys."""

import dataclasses
import json
import sys

import pytest
import torch

import decode
import train
from common import UserError, save_checkpoint
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """checkpoints with 2, 5 and 0 heads over bytes"""
    folder = tmp_path_factory.mktemp("toys")
    for name, heads in (("two", 2), ("five", 5), ("none", 0)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(257, 64, 1, 2, 8, heads))
        cfg = train.TrainConfig(block_size=64, n_mtp=heads)
        save_checkpoint(folder / f"{name}.pt", model, tokenizer={"kind": "bytes"},
                        train_config=dataclasses.asdict(cfg))
    return folder


def call(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["decode.py", *map(str, argv)])
    decode.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("more", [
    [], ["--trace"], ["--temperature", 0], ["--heads", 0], ["--accept", "match", "--top_k", 5],
])
def test_text_and_statistics(toys, monkeypatch, capsys, more):
    flags = ["--prompt", "the", "--tokens", 20, "--fast", "off", "--json"]
    out = call(monkeypatch, capsys, toys / "two.pt", *flags, *more)
    result = json.loads(out.splitlines()[-1])
    assert result["tokens"] == len(result["ids"]) == 20
    assert sum(result["accepted"]) == result["forwards"]
    assert f"1 token by the prefill, then 19 in {result['forwards']} forward passes" in out
    heads = 0 if "--heads" in more else 2
    assert f"with {heads} of 2 heads: plain PyTorch (fast is off)" in out
    if heads == 0:
        assert result["forwards"] == 19
    if "--trace" in more:  # a line for the prefill and one per round: the tokens emitted
        lines = [line for line in out.splitlines() if "|main" in line or "|1" in line]
        parts = [part for line in lines for part in line.split("  ") if "|" in part]
        emitted = [part for part in parts if not part.endswith("|rejected")]
        assert len(emitted) == 20 and len(lines) == result["forwards"] + 1


def test_the_text_as_it_comes_ends_as_the_whole_text_does(toys, monkeypatch, capsys):
    """also where that is half a character: a toy's bytes are random"""
    ends = []
    for seed in range(1, 5):
        flags = ["--prompt", "the", "--tokens", 20, "--no-stop", "--seed", seed, "--json"]
        out = call(monkeypatch, capsys, toys / "two.pt", *flags)
        text = json.loads(out.splitlines()[-1])["text"]
        assert out.startswith(f"the{text}\n")
        ends.append(text[-1])
    assert "\ufffd" in ends


def test_the_trace_as_a_picture(toys, monkeypatch, capsys, tmp_path):
    flags = ["--prompt", "the", "--tokens", 9, "--svg", tmp_path / "new/trace.svg", "--json"]
    out = call(monkeypatch, capsys, toys / "two.pt", *flags)
    svg = (tmp_path / "new/trace.svg").read_text(encoding="utf-8")
    forwards = json.loads(out.splitlines()[-1])["forwards"]
    assert svg.startswith("<svg") and svg.count("<text ") == forwards + 1


def test_a_picture_that_can_not_be_written_is_one_line(toys, monkeypatch, capsys, tmp_path):
    with pytest.raises(UserError, match="could not write .*give another file with --svg"):
        call(monkeypatch, capsys, toys / "two.pt", "--tokens", 5, "--svg", tmp_path)
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="mine.txt exists, and is not what --svg writes"):
        call(monkeypatch, capsys, toys / "two.pt", "--tokens", 5, "--svg", tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "mine"
    for _ in range(2):
        call(monkeypatch, capsys, toys / "two.pt", "--tokens", 5, "--svg", tmp_path / "a.svg")


def test_a_checkpoint_without_heads_decodes(toys, monkeypatch, capsys):
    out = call(monkeypatch, capsys, toys / "none.pt", "--tokens", 5, "--json")
    assert json.loads(out.splitlines()[-1])["forwards"] == 4 and "with 0 of 0 heads" in out


@pytest.mark.parametrize("name, more, auto", [
    ("two", [], False), ("two", ["--heads", "auto"], True), ("five", [], True),
    ("five", ["--heads", -1], False),
])
def test_auto_is_the_default_with_more_than_4_heads(toys, monkeypatch, capsys, name, more, auto):
    """a toy's heads are nearly as large as its trunk and nothing that they draft is right, so auto
    soon runs none; the closing line says how many ran on average"""
    flags = ["--prompt", "the", "--tokens", 40, "--temperature", 0, "--json", "--no-stop", *more]
    out = call(monkeypatch, capsys, toys / f"{name}.pt", *flags)
    drafted = json.loads(out.splitlines()[-1])["drafted"]
    K = len(drafted) - 1
    assert (drafted[K] < sum(drafted)) == auto
    mean = sum(k * n for k, n in enumerate(drafted)) / sum(drafted)
    assert f"with {mean:.3g} of {K} heads: plain PyTorch" in out


def test_more_tokens_than_the_context_takes(toys, monkeypatch, capsys):
    out = call(monkeypatch, capsys, toys / "two.pt", "--prompt", "x" * 60, "--tokens", 9, "--json")
    assert len(json.loads(out.splitlines()[-1])["ids"]) == 4 and "leaves room for 4 new ones" in out


@pytest.mark.parametrize("argv,message", [
    (["two.pt", "--prompt", ""], "prompt is empty"),
    (["two.pt", "--heads", 3], "has 2 MTP heads"),
    (["two.pt", "--heads", -2], "--heads is -2"),
    (["two.pt", "--heads", "auto", "--costs", "gone.json"], "can't read gone.json"),
    (["two.pt", "--costs", "gone.json"], "costs have no effect without heads"),
    (["two.pt", "--temperature", -1], "--temperature is -1"),
    (["two.pt", "--top_k", -2], "--top_k is -2"),
    (["two.pt", "--top_k", 999], "top_k is 999"),
    (["two.pt", "--tokens", 0], "--tokens is 0"),
    (["two.pt", "--accept", "x"], "--accept is 'x'"),
    (["two.pt", "--fast", "x"], "--fast is 'x'"),
    (["two.pt", "--prompt", "x" * 64], "64 tokens; the context takes 64"),
    (["gone.pt"], "no checkpoint at"),
])
def test_bad_requests(toys, monkeypatch, capsys, argv, message):
    argv = [toys / a if str(a).endswith(".pt") else a for a in argv]
    with pytest.raises(UserError, match=message):
        call(monkeypatch, capsys, *argv)


def test_heads_that_are_no_number(toys, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, capsys, toys / "two.pt", "--heads", "four")
    assert "--heads: invalid number_or_auto value: 'four'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--check", "--bench"])
def test_measuring_has_left(toys, monkeypatch, capsys, flag):
    """results/bench.py does it"""
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, capsys, toys / "two.pt", flag)
    assert stop.value.code == 2
