"""data/selftext.py: a toy writes a dataset; every kind of prompt, the rows, the numbers, bad
requests."""
import dataclasses
import hashlib
import itertools
import sys

import numpy as np
import pytest
import torch
from test_pretrained import gguf_settings, tokens
from tqdm import tqdm

import common
import decode
from data import pretrained, selftext
from data.prepare import load_dataset, prepare
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig


def save(folder, spec, vocab, data=""):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab, 80, 1, 1, 8, 2, embed_std=1.0))
    common.save_checkpoint(folder / "ckpt.pt", model, tokenizer=spec,
                           train_config={"data": str(data)})
    return folder / "ckpt.pt"


@pytest.fixture
def chatty(tmp_path):
    """a model with a chat template; its vocabulary is padded by 3 ids"""
    spec = pretrained.gguf_tokenizer("toy", gguf_settings())
    return save(tmp_path / "chatty", spec, len(tokens()) + 3)


@pytest.fixture
def own(tmp_path):
    """a model of this project, and its dataset"""
    (tmp_path / "my.txt").write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    data = prepare(tmp_path / "my.txt", "bytes", tmp_path / "text", quiet=True)
    return save(tmp_path / "own", {"kind": "bytes"}, 257, data)


def write(monkeypatch, checkpoint, *flags, out="made"):
    flags = [f"--out={out}", "--tokens=1500", "--length=50", "--batch=8", "--device=cpu", *flags]
    monkeypatch.setattr(sys, "argv", ["selftext.py", str(checkpoint), *flags])
    common.run(selftext.main)
    return load_dataset(out)


def test_the_dataset_is_whole_and_says_where_it_comes_from(chatty, monkeypatch):
    train, val, meta = write(monkeypatch, chatty)
    assert meta["checkpoint_sha256"] == hashlib.sha256(chatty.read_bytes()).hexdigest()
    assert (meta["seed"], meta["temperature"], meta["prompts"]) == (1, [1.0], "chat,start")
    spec = pretrained.gguf_tokenizer("toy", gguf_settings())
    assert meta["tokenizer"] == spec and len(train) + len(val) >= 1500
    tokenizer = Tokenizer(spec)
    for name, ids in (("train", train), ("val", val)):
        assert meta[f"{name}_bytes"] == sum(len(tokenizer.token_bytes(i)) for i in ids)
        assert ids.max() < tokenizer.vocab_size and ids[0] == tokenizer.eot
    assert meta["documents"] % 8 == 0
    assert meta["val_documents"] == -(-meta["documents"] // selftext.VAL_EVERY)


def test_the_seed_is_the_text(chatty, monkeypatch):
    digests = []
    changes = ([], [], ["--seed=2"], ["--temperature=0.5"], ["--temperature=0.5,1"])
    for i, flags in enumerate(changes):
        flags = [*flags, "--tokens=1000"]
        digests.append(write(monkeypatch, chatty, *flags, out=f"made{i}")[2]["sha256"])
    assert digests[0] == digests[1] and len(set(digests)) == 4


def test_rows_begin_with_their_prompts_and_go_on_to_the_length(chatty, monkeypatch, tmp_path):
    (tmp_path / "asked.txt").write_text("12 hello\n", encoding="utf-8")
    (tmp_path / "begun.txt").write_text("hello hello wo\n", encoding="utf-8")
    settings = gguf_settings(**{"tokenizer.chat_template": "<|im_start|>"})
    tokenizer = Tokenizer(pretrained.gguf_tokenizer("toy", settings))
    chatty = save(tmp_path / "brief", tokenizer.spec, len(tokens()))
    said = []
    run = decode.run_decoder

    def spy(decoder, prompts, new):
        texts, stats = run(decoder, prompts, new)
        said.extend(prompt + text for prompt, text in zip(prompts, texts))
        return texts, stats
    monkeypatch.setattr(decode, "run_decoder", spy)
    frame = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.spec["chat"] == frame
    prompts = "--prompts=chat,start,chat:asked.txt,begun.txt"
    train, val, meta = write(monkeypatch, chatty, prompts, "--length=99")
    starts = [tokenizer.encode_special("<|im_start|>user\n"), [0],
              tokenizer.encode_chat("12 hello"), tokenizer.encode("hello hello wo")]
    text = []
    for i, row in enumerate(said):
        start = starts[i % 4]
        assert row[: len(start)] == start
        assert len(row) == 80 - max(map(len, starts)) + len(start)      # 80: the model's context
        text += [row if row[0] == 0 else [0, *row]]
    held = text[:: selftext.VAL_EVERY]
    assert val.tolist() == sum(held, []) and len(train) == sum(map(len, text)) - len(val)
    assert meta["length"] == 80
    for name in ("chat", "chat:asked.txt"):
        with pytest.raises(SystemExit, match=f"{name} has no prompt of at most 4 tokens"):
            write(monkeypatch, chatty, f"--prompts={name}", "--length=8", out="other")
    with pytest.raises(SystemExit, match="an empty name"):
        write(monkeypatch, chatty, "--prompts=start,,chat", out="other")


def test_own_models_continue_their_validation_text(own, monkeypatch, tmp_path):
    train, val, meta = write(monkeypatch, own)
    _, held_out, _ = load_dataset(tmp_path / "text")
    assert meta["prompts"] == "val" and meta["tokenizer"] == {"kind": "bytes"}
    assert bytes(val[1:16].tolist()) in held_out.astype(np.uint8).tobytes()


def test_their_text_must_be_in_their_tokenizer(own, monkeypatch, tmp_path):
    prepare(tmp_path / "my.txt", "bpe:280", tmp_path / "text", quiet=True)
    with pytest.raises(SystemExit, match="text has another tokenizer than the checkpoint"):
        write(monkeypatch, own)


def test_a_pretrained_model_without_a_template_begins_texts(own, chatty, monkeypatch):
    model, meta = common.load_checkpoint(own)
    common.save_checkpoint(own, model, **{**meta, "source": "toy.gguf"})
    assert write(monkeypatch, own)[2]["prompts"] == "start"
    model, meta = common.load_checkpoint(chatty)
    common.save_checkpoint(chatty, model, **{**meta, "source": "toy.gguf"})
    assert write(monkeypatch, chatty, out="more")[2]["prompts"] == "chat,start"


def test_a_folder_is_its_checkpoint_and_a_silent_bar_counts(own, monkeypatch):
    run, calls = decode.run_decoder, itertools.count()

    def counted(*args):
        assert next(calls) < 99, "it never ends"
        return run(*args)
    monkeypatch.setattr(decode, "run_decoder", counted)
    made = write(monkeypatch, own, "--prompts=start")
    monkeypatch.setattr(selftext, "tqdm", lambda **options: tqdm(**options, disable=True))
    again = write(monkeypatch, own.parent, "--prompts=start", out="again")
    assert made[2]["sha256"] == again[2]["sha256"]
    assert made[2]["checkpoint_sha256"] == again[2]["checkpoint_sha256"]


def test_one_row_is_no_dataset(own, monkeypatch, tmp_path):
    run = decode.run_decoder

    def more(decoder, prompts, new):
        texts, stats = run(decoder, prompts, new)
        return texts, dataclasses.replace(stats, tokens=1000)
    monkeypatch.setattr(decode, "run_decoder", more)
    with pytest.raises(SystemExit, match="one row, and both training and validation need some"):
        write(monkeypatch, own, "--prompts=start", "--batch=1", "--tokens=1000")
    assert not (tmp_path / "made").exists()


def test_ids_of_a_padded_vocabulary_never_come_out(chatty, monkeypatch):
    V = len(tokens())

    run = decode.run_decoder

    def last_ids(decoder, prompts, new):
        _, stats = run(decoder, prompts, new)
        return [[V + 2] * new for _ in prompts], stats
    monkeypatch.setattr(decode, "run_decoder", last_ids)
    train, _, _ = write(monkeypatch, chatty, "--prompts=start")
    assert not train.any()                                                 # end-of-text, id 0


def test_an_interruption_leaves_nothing(chatty, monkeypatch, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(decode, "run_decoder", stop)
    with pytest.raises(SystemExit, match="interrupted"):
        write(monkeypatch, chatty)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("made")]


@pytest.mark.parametrize("flags, found", [
    (["--prompts=chat"], "no chat template"), (["--prompts=gone.txt"], "gone.txt"),
    (["--temperature=hot"], "--temperature is 'hot'"),
    (["--temperature=1,0"], "one number above 0"),
    (["--tokens=0"], "--tokens is 0"), (["--length=1"], "--length is 1"),
    (["--out=text"], "text exists; remove it"),
])
def test_bad_requests(flags, found, own, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=found):
        write(monkeypatch, own, *flags)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("made")]
