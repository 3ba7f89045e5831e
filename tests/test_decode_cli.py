"""decode.py's command line and results/bench.py: text, --trace, --check, --bench, and what they say of bad requests. Toy checkpoints."""

import dataclasses
import json
import sys

import pytest
import torch

import decode
import train
from data.prepare import load_dataset, prepare
from model import GPT, GPTConfig
from results import bench


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """checkpoints with 2 and with 0 heads over bytes, one over another vocabulary, and a data set"""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "my.txt").write_text("the cat sat on the mat, and the dog did not. " * 40, encoding="utf-8")
    sets = {name: prepare(folder / "my.txt", name, folder / name.replace(":", ""), quiet=True) for name in ("bytes", "bpe:260")}
    for name, heads, tokenizer in (("two", 2, "bytes"), ("none", 0, "bytes"), ("other", 2, "bpe:260")):
        meta = load_dataset(sets[tokenizer])[2]
        torch.manual_seed(0)
        model = GPT(GPTConfig(meta["vocab_size"], 64, 1, 2, 8, heads))
        cfg = train.TrainConfig(data=str(sets[tokenizer]), block_size=64, n_mtp=heads)
        train.save_checkpoint(folder / f"{name}.pt", model, tokenizer=meta["tokenizer"], train_config=dataclasses.asdict(cfg))
    return folder


def call(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["decode.py", *map(str, argv)])
    decode.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--trace"], ["--temperature", 0], ["--heads", 0], ["--accept", "match", "--top_k", 5]])
def test_text_and_statistics(toys, monkeypatch, capsys, more):
    out = call(monkeypatch, capsys, toys / "two.pt", "--prompt", "the", "--tokens", 20, "--json", *more)
    result = json.loads(out.splitlines()[-1])
    assert result["tokens"] == len(result["ids"]) == 20 and "20 tokens in" in out and sum(result["accepted"]) == result["forwards"]
    if more == ["--heads", 0]:
        assert result["forwards"] == 19
    if "--trace" in more:  # a line a round, its tokens those of the text
        lines = [line for line in out.splitlines() if "|main" in line or "|1" in line]
        words = [w for line in lines for w in line.split("  ") if "|" in w and not w.endswith("|refused")]
        assert len(words) == 19 and len(lines) == result["forwards"]


def test_check_finds_no_difference_in_fp32_and_tells_of_one(toys, monkeypatch, capsys):
    out = call(monkeypatch, capsys, toys / "two.pt", "--check", "--tokens", 12, "--count", 3, "--prompt_tokens", 8, "--json")
    assert "3 of 3 greedy continuations are identical" in out and json.loads(out.splitlines()[-1])["same"] == 3
    real = decode.generate

    def wrong(model, prompts, n, **options):
        (ids,), stats = real(model, prompts, n, **options)
        return ([ids[:5] + [ids[5] ^ 1] + ids[6:]] if options["heads"] is None else [ids]), stats
    monkeypatch.setattr(decode, "generate", wrong)
    out = call(monkeypatch, capsys, toys / "two.pt", "--check", "--tokens", 12, "--count", 2, "--prompt_tokens", 8)
    assert "0 of 2" in out and out.count("differs at token 5") == 2


def test_bench_rows(toys, monkeypatch, capsys):
    (toys / "q.jsonl").write_text('{"question": "the dog"}\n{"text": "on the mat"}\n', encoding="utf-8")
    more = ["--bench", "--tokens", 10, "--prompts", toys / "q.jsonl", "--json"]
    out = call(monkeypatch, capsys, toys / "two.pt", toys / "none.pt", *more)
    rows = json.loads(out.splitlines()[-1])
    assert "none.pt has no MTP heads: decoding plainly" in out
    assert [(r["heads"], r["temperature"]) for r in rows] == [(k, t) for t in (0, 1) for k in (0, 1, 2)] + [(0, 0), (0, 1)]
    for row in rows:
        assert row["prompts"] == 2 and row["tokens_per_s"] > 0 and 1 <= row["tokens_per_forward"] <= row["heads"] + 1
    for k, row in enumerate(rows[:3]):  # two heads, greedy
        assert row["predicted_tokens_per_forward"] == pytest.approx(1 + sum(r["car"] for r in rows[1 : k + 1]))


def test_bench_of_training_steps(capsys):
    cfg = train.TrainConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, batch_size=2, compile="off")
    combos = [(0, 0, 1), (2, 0, 1), (2, 0.5, 3)]
    rows = bench.bench_training(cfg, torch.device("cpu"), torch.float32, steps=2, combos=combos, vocab=11)
    assert [(row["n_mtp"], row["beta"], row["top_n"]) for row in rows] == combos
    assert all(row["ms"] > 0 and row["tokens_per_s"] * row["ms"] == pytest.approx(16_000) for row in rows)
    assert capsys.readouterr().out.count("ms a step") == 3


def test_loops_are_told_from_text():
    assert bench.loops([1, 2, 3] + [5, 6, 7, 8] * 3) and bench.loops([9] * 12) and bench.loops([0, 1] * 6)
    assert not bench.loops(list(range(40))) and not bench.loops([7] * 5) and not bench.loops([])


@pytest.mark.parametrize("argv,message", [
    (["two.pt", "--prompt", ""], "--prompt is empty"), (["two.pt", "--heads", 3], "has 2 MTP heads"),
    (["two.pt", "--temperature", -1], "temperature is -1"), (["two.pt", "--top_k", -2], "top_k"),
    (["two.pt", "--top_k", 999], "top_k is 999"), (["two.pt", "--tokens", 0], "max_new_tokens is 0"),
    (["two.pt", "--accept", "x"], "accept rule 'x'"), (["two.pt", "other.pt", "--bench"], "different tokenizers"),
    (["two.pt", "none.pt"], "only make sense with --bench"), (["gone.pt"], "no checkpoint at"),
    (["two.pt", "--prompt", "x" * 64], "64 tokens; the context takes 64"),
    (["two.pt", "--bench", "--batch", 9, "--tokens", 4], "--batch 9"), (["two.pt", "--bench", "--batch", 0], "--batch is 0"),
    (["two.pt", "--check", "--count", 0], "--count is 0"), (["two.pt", "--compile", "x"], "unknown compile 'x'"),
    (["two.pt", "--bench", "--tokens", 2, "--prompt_tokens", 8], "no continuation is longer than 2 tokens"),
])
def test_bad_requests(toys, monkeypatch, capsys, argv, message):
    argv = [toys / a if str(a).endswith(".pt") else a for a in argv]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(monkeypatch, capsys, *argv)
