"""extend.py from 0 heads, end to end: weights, own text, heads, decoding. Toys."""
import dataclasses
import json
import shutil
import sys

import pytest
import torch
from processes import run_two
from test_pretrained import gguf_settings, make_tensors, tokens, write_gguf

import common
import decode
import extend
import train
from data import pretrained, selftext
from data.prepare import prepare
from model import GPT, GPTConfig

SHORT = ["--steps=6", "--batch_size=4", "--eval_every=3", "--eval_windows=4",
         "--device=cpu", "--compile=off"]


def call(monkeypatch, script, *argv):
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
    script.main()


def state_of(folder):
    return common.load_checkpoint(f"{folder}/ckpt.pt")[0].state_dict()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """a folder with a pretrained model in out/toy, its own text in data/toy-self"""
    folder = tmp_path_factory.mktemp("made")
    stored, _ = make_tensors("F16", len(tokens()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "git_commit", lambda: "1234567")
        patch.chdir(folder)
        call(patch, pretrained, write_gguf(folder / "toy.gguf", stored, gguf_settings()))
        call(patch, selftext, "out/toy/ckpt.pt", "--tokens=2000", "--length=40",
             "--prompts=start", "--device=cpu")
    return folder


@pytest.fixture
def toy(made, tmp_path, monkeypatch):
    """a copy of both in the test's own folder"""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(common, "git_commit", lambda: "1234567")
    return "out/toy/ckpt.pt"


def test_fresh_heads_learn_and_what_was_there_stays_bit_identical(toy, monkeypatch, capsys):
    before, _ = common.load_checkpoint(toy)
    capsys.readouterr()
    call(monkeypatch, extend, toy, *SHORT, "--steps=12", "--eval_every=12", "--batch_size=8",
         "--lr=0.02", "--json")
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert "0 -> 4 heads, new ones random; writing to" in out
    assert all(b < 0.8 * a for a, b in zip(result["before"]["kl"], result["after"]["kl"])), result
    after, meta = common.load_checkpoint("out/toy-4/ckpt.pt")
    state = after.state_dict()
    for name, weight in before.state_dict().items():
        assert torch.equal(state[name], weight.float()), name
    cfg = train.stored_config(meta)
    assert train.head_weights(cfg) == [[0.0] * 4, [1.0] * 4]
    assert cfg.top_n == 65536 and cfg.data == "data/toy-self"
    assert meta["extension"]["from_heads"] == 0
    # .. and on: the loop
    call(monkeypatch, extend, "out/toy-4/ckpt.pt", *SHORT)
    model, meta = common.load_checkpoint("out/toy-4-8/ckpt.pt")
    assert meta["extension"]["from_heads"] == 4 and len(model.heads) == 8
    assert torch.equal(model.heads[0].mix.weight, after.heads[0].mix.weight)


def test_resumed_heads_are_those_of_a_run_that_was_not_stopped(toy, monkeypatch):
    call(monkeypatch, extend, toy, *SHORT, "--heads=2", "--out=whole")

    def stop(cfg, step, length, original=train.batch_starts):
        if step == 4:
            raise KeyboardInterrupt
        return original(cfg, step, length)
    with monkeypatch.context() as patch:
        patch.setattr(train, "batch_starts", stop)
        with pytest.raises(KeyboardInterrupt):
            call(patch, extend, toy, *SHORT, "--heads=2", "--out=broken")
    call(monkeypatch, extend, "--resume", "broken/ckpt.pt")
    whole, broken = state_of("whole"), state_of("broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_two_processes_train_the_heads_of_one(toy, monkeypatch):
    call(monkeypatch, extend, toy, *SHORT, "--heads=2", "--out=one")
    argv = [extend.__file__, toy, *SHORT, "--heads=2", "--micro_batch=2", "--out=two"]
    said = run_two(extend.main, argv, "log")
    assert [code for code, *_ in said] == [0, 0], said
    assert "checkpoint two/ckpt.pt" in said[0][1] and not said[1][1]
    one, two = state_of("one"), state_of("two")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5)


def test_the_seed_makes_the_heads(toy, monkeypatch):
    weights = []
    for seed in (1, 1, 2):
        flags = ["--steps=1", "--heads=1", f"--seed={seed}", f"--out=made{len(weights)}"]
        call(monkeypatch, extend, toy, *SHORT, *flags)
        weights.append(common.load_checkpoint(f"made{len(weights)}/ckpt.pt")[0].heads[0].mix.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_flags_of_the_loss(toy, monkeypatch):
    call(monkeypatch, extend, toy, *SHORT, "--steps=1", "--heads=2", "--alpha=0.3", "--beta=0.5",
         "--top_n=7")
    cfg = train.stored_config(common.load_checkpoint("out/toy-2/ckpt.pt")[1])
    assert (train.head_weights(cfg), cfg.top_n) == ([[0.3, 0.3], [0.5, 0.5]], 7)


def test_an_own_model_without_heads(tmp_path, monkeypatch):
    (tmp_path / "my.txt").write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    data = prepare(tmp_path / "my.txt", "bytes", tmp_path / "text", quiet=True)
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=1, n_embd=8, n_mtp=0, block_size=24)
    cfg = train.TrainConfig(data=str(data), steps=9, **shape)
    model = GPT(GPTConfig(257, **shape))
    common.save_checkpoint("out/own/ckpt.pt", model, tokenizer={"kind": "bytes"}, step=9,
                           train_config=dataclasses.asdict(cfg))
    hint = "data/own-self is not there: `python data/selftext.py out/own/ckpt.pt`"
    with pytest.raises(common.UserError, match=hint):
        call(monkeypatch, extend, "out/own/ckpt.pt", *SHORT)
    call(monkeypatch, selftext, "out/own/ckpt.pt", "--tokens=1000", "--device=cpu")
    call(monkeypatch, extend, "out/own/ckpt.pt", *SHORT[1:], "--heads=2")
    _, meta = common.load_checkpoint("out/own-2/ckpt.pt")
    assert train.stored_config(meta).steps == 9     # the checkpoint's


def test_a_chat_ends_at_its_end_token(toy, monkeypatch, capsys):
    call(monkeypatch, extend, toy, *SHORT, "--heads=2", "--steps=1")
    path = "out/toy-2/ckpt.pt"
    model, meta = common.load_checkpoint(path)
    meta["tokenizer"]["chat"] = "<|im_start|>{}<|im_end|>"
    capsys.readouterr()

    def answer(*flags):
        common.save_checkpoint(path, model, **meta)
        call(monkeypatch, decode, path, "--chat=hello", "--temperature=1", "--tokens=20",
             "--device=cpu", "--json", *flags)
        out = capsys.readouterr().out
        assert "<|im_start|>hello<|im_end|>" in out
        return json.loads(out.splitlines()[-1])["ids"]
    ids = answer("--no-stop")
    assert len(ids) == 20
    meta["tokenizer"]["end"] = ids[5]
    assert answer() == ids[: ids.index(ids[5]) + 1] and answer("--no-stop") == ids
