"""data/prepare.py, dataset.py, download.py: sources, splits, bad input, downloads from a local
server."""
import errno
import gzip
import hashlib
import http.server
import json
import lzma
import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data import dataset
from data import download as D
from data import prepare as P
from data import reader
from data import tokenizer as tokenizer_module
from data.prepare import Tokenizer, load_dataset, prepare, train_bpe  # noqa: F401 (for scripts)
from data.errors import UserError
from data.temporary import temporary

REPO = Path(__file__).resolve().parents[1]


def documents(count):
    return [f"document {i}: " + "some words to fill it " * (i % 7) for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepared(source, tokenizer, out, **options):
    """-> (train ids, val ids, meta)"""
    return P.load_dataset(P.prepare(source, tokenizer, out, quiet=True, **options))


def as_text(ids, meta):
    return P.Tokenizer(meta["tokenizer"]).decode(ids.tolist())


# -- datasets

def test_documents_are_split_by_their_own_text(tmp_path):
    texts = documents(200)
    few = prepared(write_jsonl(tmp_path / "a.jsonl", texts[:150]), "bytes", tmp_path / "few")
    more = prepared(write_jsonl(tmp_path / "b.jsonl", texts[::-1]), "bytes", tmp_path / "more")

    def split_text(ids, meta):
        return as_text(ids, meta).split("<|endoftext|>")[:-1]
    held_out = [set(split_text(val, meta)) for _, val, meta in (few, more)]
    assert 1 < len(held_out[0]) < len(held_out[1]) < 30 and held_out[0] < held_out[1]
    train, val, meta = more
    assert split_text(train, meta) == [t for t in texts[::-1] if t not in held_out[1]]
    assert meta["documents"] == 200 and meta["val_documents"] == len(held_out[1])
    assert meta["train_bytes"] + meta["val_bytes"] == sum(len(t.encode()) for t in texts)
    assert meta["train_tokens"] == len(train) and meta["val_tokens"] == len(val)
    assert train.dtype == np.uint16
    assert set(P.META_KEYS) <= set(meta)


def test_one_document_is_cut_by_position(tmp_path):
    text = "é" * 55 + "\r\n" + "b" * 50
    (tmp_path / "one.txt").write_bytes(text.encode())
    train, val, meta = prepared(tmp_path / "one.txt", "bytes", tmp_path / "out")
    # int(0.9 * 107) characters, no end-of-text
    assert as_text(train, meta) == text[:96] and as_text(val, meta) == text[96:]
    assert meta["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_few_documents_fall_back_to_position(tmp_path):
    texts = [text for text in documents(30) if not P.is_val(text)][:3]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    train, val, meta = prepared(source, "bytes", tmp_path / "out")
    everything = as_text(train, meta) + as_text(val, meta)
    assert everything == "".join(text + "<|endoftext|>" for text in texts) and len(val) > 2
    assert meta["sha256"] == hashlib.sha256("<|endoftext|>\n".join(texts).encode()).hexdigest()


def unequal(sizes, for_val):
    """Documents of these sizes; only those of for_val have a hash that is for validation."""
    texts = []
    for size in sizes:
        number = 0
        while P.is_val(f"{number} ".ljust(size, "x")) != (size in for_val):
            number += 1
        texts.append(f"{number} ".ljust(size, "x"))
    return texts


@pytest.mark.parametrize("for_val,rule", [
    ((16,), "position"), ((20_000,), "position"), ((2_000,), "document"), ((), "position"),
])
def test_an_unfair_split_falls_back_to_position(tmp_path, capsys, for_val, rule):
    texts = unequal((40_000, 20_000, 2_000, 16), for_val)
    folder = P.prepare(write_jsonl(tmp_path / "a.jsonl", texts), "bytes", tmp_path / "out")
    train, val, meta = P.load_dataset(folder)
    assert meta["split"] == f"by {rule}"
    assert ("split by position, the last 10 %" in capsys.readouterr().out) == (rule == "position")
    expected = 0.1 if rule == "position" else 2_000 / 62_016
    assert len(val) / (len(train) + len(val)) == pytest.approx(expected, rel=0.01)


def test_separators_val_and_compression(tmp_path):
    source = ("first\n<|endoftext|>\nsecond <|endoftext|> inline\n<|endoftext|>\r\n\n"
              "<|endoftext|>\nthird")
    with lzma.open(tmp_path / "a.train.txt.xz", "wb") as file:
        file.write(source.encode())
    with gzip.open(tmp_path / "a.val.jsonl.gz", "wb") as file:
        file.write(b'{"text": "held out"}\n\n{"text": "too"}\n')
    train, val, meta = prepared(tmp_path / "a.train.txt.xz", "bpe:300", tmp_path / "out",
                                val=tmp_path / "a.val.jsonl.gz")
    tokenizer = P.Tokenizer(meta["tokenizer"])
    assert tokenizer.decode(train) == (
        "first\n<|endoftext|>second <|endoftext|> inline\n<|endoftext|>third<|endoftext|>")
    assert (train == meta["eot"]).sum() == 3  # the inline one is text
    assert tokenizer.decode(val) == "held out<|endoftext|>too<|endoftext|>"


def test_folder_is_read_in_order(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    texts = {"b/x.md": "three", "a.txt": "one", "b.txt": "two", "skip.png": "\udcff",
             "b/y.py": "four"}
    for name, text in texts.items():
        (tmp_path / "in" / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert list(P.read_source(tmp_path / "in", set())) == ["one", "two", "three", "four"]


def test_what_a_folder_hides_is_left_out(tmp_path, symlink):
    root = tmp_path / "in"
    names = ("a.txt", ".hidden.txt", "._a.txt", ".git/b.txt", "c/.d/e.txt", "g.tar.gz", "h.zip")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name, encoding="utf-8")
    (root / "c" / "f.JSONL").write_text('{"text": "rows"}', encoding="utf-8")
    symlink(root / "link.txt", tmp_path / "nothing")
    symlink(root / "loop", root)
    (root / "folder.txt").mkdir()
    assert list(P.read_source(root, set())) == ["a.txt", "rows"]
    P.prepare(root, "bytes", tmp_path / "out", quiet=True)


def test_the_folder_of_a_text_has_its_name_and_stamp(tmp_path, monkeypatch, symlink):
    monkeypatch.setattr(P, "HERE", tmp_path / "data")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some text " * 20, encoding="utf-8")
    symlink(tmp_path / "in" / "link.txt", tmp_path / "nothing")
    folder = P.find_dataset(str(tmp_path / "in"), "bytes")
    (tmp_path / "in" / ".swap").write_text("an editor's", encoding="utf-8")  # no part of the text
    assert P.find_dataset(str(tmp_path / "in"), "bytes") == folder
    (tmp_path / "in" / "b.txt").write_text("more", encoding="utf-8")
    assert P.find_dataset(str(tmp_path / "in"), "bytes") != folder
    with pytest.raises(UserError, match="no data is named"):
        P.find_dataset("")
    with pytest.raises(UserError, match="x" * 300):
        P.find_dataset("x" * 300)


def test_python_source_leaves_out_tests_tables_and_other_encodings(tmp_path, monkeypatch, symlink):
    root = tmp_path / "lib"
    for name in ("z.py", "a/b.py", "a-b.py", "test/t.py", "a/tests/t.py", "site-packages/p.py",
                 "encodings/x.py", "_sysconfigdata_x.py", "a/note.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\xef\xbb\xbf" * (name == "z.py") + name.encode() + b"\r\n")
    (root / "latin.py").write_bytes(b"# caf\xe9")
    (root / "empty.py").write_bytes(b"")
    symlink(root / ".#lock.py", tmp_path / "nothing")  # an editor's
    (root / "folder.py").mkdir()
    monkeypatch.setattr(P.sysconfig, "get_path", lambda name: str(root))
    skipped = set()
    assert list(P.read_source("python", skipped)) == ["a-b.py\r\n", "a/b.py\r\n", "z.py\r\n"]
    assert skipped == {root / "latin.py", root / ".#lock.py", root / "folder.py"}


def test_summary_counts_skipped_python_files(tmp_path, monkeypatch, capsys):
    for name, data in [("a.py", b"x = 1\n" * 20), ("b.py", b"# caf\xe9"), ("c.py", b"\xff\xfe")]:
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(P.sysconfig, "get_path", lambda name: str(tmp_path))
    # reads the files three times, and counts them once
    folder = P.prepare("python", "bpe:258", tmp_path / "out")
    assert "1 documents (0 for validation), 2 files skipped as not UTF-8" in capsys.readouterr().out
    assert P.load_dataset(folder)[2]["skipped_files"] == 2


def test_python_packages_come_after_the_library(tmp_path, monkeypatch):
    assert Path(P.sysconfig.get_path("stdlib"), "argparse.py").is_file()
    for folder in ("lib", "site"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(folder, encoding="utf-8")
    # two names of one folder: read once
    folders = {"stdlib": "lib", "purelib": "site", "platlib": "site/../site"}
    monkeypatch.setattr(P.sysconfig, "get_path", lambda name: str(tmp_path / folders[name]))
    assert list(P.read_source("python+packages", set())) == ["lib", "site"]
    assert list(P.read_source("python", set())) == ["lib"]


def test_sample_is_even_and_from_training_text_only():
    parts = [(letter * 100_000, "val" if letter == "v" else "train", True) for letter in "avb"]
    text = "".join(P.sample(iter(parts), 0.25))
    assert "v" not in text and 40_000 < len(text) < 60_000
    assert 0.4 < text.count("a") / len(text) < 0.6


def test_text_larger_than_a_batch(tmp_path):
    texts = ["x " * 200_000 + str(i) for i in range(8)]  # 3.2 MB
    path = write_jsonl(tmp_path / "big.jsonl", texts)
    parts = [(text, "train", True) for text in P.read_source(path, set())]
    small = list(P.batches(parts, size=1 << 20))
    rows = [row for batch in small for row in batch]
    assert len(small) > 2 and all(len(piece) <= 262144 for piece, _, _ in rows)
    assert sum(ends for _, _, ends in rows) == 8
    joined = "".join(piece + "|" * ends for piece, _, ends in rows)
    assert joined == "".join(f"{text}|" for text in texts)


@pytest.mark.parametrize("line,count", [
    ("7\n", 60_000), ("x" * 999 + "\n", 4_000), ("x" * 4_000_000, 1),
])
def test_a_large_document_is_in_memory_two_to_three_times(tmp_path, monkeypatch, line, count):
    (tmp_path / "a.txt").write_bytes((line * count).encode())
    monkeypatch.setattr(reader, "BLOCK_LINES", 64)
    documents = P.Documents(tmp_path / "a.txt", None)

    def split():
        for _ in P.batches(P.split(documents, 1, int(0.9 * documents.characters)), size=1 << 14):
            pass
    tracemalloc.start()
    try:
        for function in (lambda: documents.read(quiet=True), split):
            tracemalloc.reset_peak()
            function()
            left, peak = tracemalloc.get_traced_memory()
            assert peak < 2.9 * len(line) * count + 300_000 and left < 100_000
    finally:
        tracemalloc.stop()


def test_shakespeare_by_position(tmp_path, monkeypatch):
    if not (D.DOWNLOADS / "tinyshakespeare.txt").is_file():
        pytest.skip("run `python data/prepare.py shakespeare` once to run this")
    monkeypatch.setattr(D.urllib.request, "urlopen", None)
    train, val, meta = P.load_dataset(P.prepare("shakespeare", out=tmp_path / "s", quiet=True))
    assert (len(train), len(val)) == (1_003_854, 111_540) and meta["sha256"] == D.SHAKESPEARE_SHA256


def test_the_bundled_stories_are_the_same_everywhere(tmp_path):
    prepared = P.load_dataset(P.prepare(tokenizer="bytes", out=tmp_path / "stories", quiet=True))
    train, val, meta = prepared
    assert meta["source"] == "stories" and (meta["documents"], meta["val_documents"]) == (190, 20)
    assert meta["sha256"] in (REPO / "data" / "README.md").read_text(encoding="utf-8")
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.08
    text = as_text(train, meta) + as_text(val, meta)
    assert text.startswith("THE CYCLONE\n\nDorothy lived") and "\r" not in text
    for foreign in ("Gutenberg", "Transcriber", "Illustration", "Copyright", "CHAPTER"):
        assert foreign not in text
    assert "\u201c" not in text and "_" not in text
    assert sum(path.stat().st_size for path in P.STORIES) < 900_000


def test_stories_are_the_default(tmp_path):
    import train
    assert train.TrainConfig.data == "stories" and "data" not in train.PRESETS["tiny"]
    tokenizers = {}
    for preset in train.PRESETS:
        cfg = train.make_config({"preset": preset})
        assert cfg.tokenizer == ""
        tokenizers[preset, cfg.data] = P.DEFAULT_TOKENIZER[cfg.data]
    assert tokenizers == {("tiny", "stories"): "bpe:1024", ("small", "python"): "bpe:4096",
                          ("shakespeare", "shakespeare"): "bytes", ("gpt2", "fineweb-edu"): "gpt2"}
    (tmp_path / "v.txt").write_text("another validation text", encoding="utf-8")
    folder = P.prepare("stories", "bytes", tmp_path / "out", val=tmp_path / "v.txt", quiet=True)
    _, val, meta = P.load_dataset(folder)
    assert as_text(val, meta) == "another validation text<|endoftext|>"


# -- what must not happen

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    source = write_jsonl(folder / "good.jsonl", documents(60))
    P.prepare(source, "bpe:300", folder / "good", quiet=True)
    return folder


@pytest.fixture
def good(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "good"


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta.update(changes)
    left = {key: value for key, value in meta.items() if value != "gone"}
    (folder / "meta.json").write_text(json.dumps(left), encoding="utf-8")


def write_id(folder, name, id):
    with open(folder / f"{name}.bin", "r+b") as file:
        file.write(np.array([id], dtype="<u2").tobytes())


def write_meta(folder, text):
    (folder / "meta.json").write_text(text, encoding="utf-8")


def edit_tokenizer(folder, **changes):
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**spec, **changes}), encoding="utf-8")


@pytest.mark.parametrize("damage,message", [
    (lambda f: (f / "meta.json").unlink(), "not a complete dataset: meta.json is missing"),
    (lambda f: write_meta(f, "{"), "meta.json is damaged"),
    (lambda f: write_meta(f, "3"), "meta.json is damaged .it holds 3"),
    (lambda f: write_meta(f, "[" * 100_000), "meta.json is damaged"),
    (lambda f: write_meta(f, '{"a":' * 100_000), "meta.json is damaged"),
    (lambda f: (f / "meta.json").write_bytes(b"\xff\xfe{"), "meta.json is damaged"),
    (lambda f: edit_meta(f, sha256="gone", eot="gone"), "lacks eot, sha256"),
    (lambda f: edit_meta(f, val_bytes="x"), "says 'x' for val_bytes, expected a int"),
    (lambda f: edit_meta(f, val_bytes=0), "says 0 for val_bytes"),
    (lambda f: edit_meta(f, train_tokens=None), "says None for train_tokens"),
    (lambda f: edit_meta(f, train_tokens=True), "says True for train_tokens"),
    (lambda f: edit_meta(f, val_tokens=1.5), "says 1.5 for val_tokens"),
    (lambda f: edit_meta(f, vocab_size=-1), "says -1 for vocab_size"),
    (lambda f: edit_meta(f, source=["a"]), "for source, expected a str"),
    (lambda f: edit_meta(f, tokenizer="file"), "says 'file' for tokenizer"),
    (lambda f: edit_meta(f, tokenizer={"file": 3}), "3 is missing"),
    (lambda f: edit_meta(f, tokenizer={"kind": "words"}), "unknown tokenizer"),
    (lambda f: edit_meta(f, vocab_size=999), "says 999 ids .* tokenizer has 280"),
    (lambda f: edit_meta(f, eot=5), "end-of-text 5, .* with 279"),
    (lambda f: (f / "val.bin").unlink(), "val.bin is missing"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    (lambda f: (f / "tokenizer.json").write_text("{}", encoding="utf-8"), "unknown tokenizer"),
    (lambda f: edit_tokenizer(f, pattern="("), "vocabulary is damaged"),
    (lambda f: edit_tokenizer(f, ranks=["YQ=="]), "vocabulary is damaged"),
    (lambda f: os.truncate(f / "train.bin", 100), "has 100 bytes, but meta.json says"),
    (lambda f: write_id(f, "train", 300), "train.bin holds the id 300, but the vocabulary has 280"),
    (lambda f: write_id(f, "val", 65535), "val.bin holds the id 65535"),
])
def test_load_refuses_a_damaged_dataset(good, damage, message):
    P.load_dataset(good)
    damage(good)
    with pytest.raises(UserError, match=message) as caught:
        P.load_dataset(good)
    assert str(good) in str(caught.value) and "\n" not in str(caught.value)


def test_a_dataset_is_opened_only_with_its_tokenizer(good, monkeypatch):
    import tiktoken

    def no_network(name):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    edit_meta(good, tokenizer={"kind": "gpt2"}, vocab_size=50257, eot=50256)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):  # before a training, not after it
        P.load_dataset(good)


def test_only_large_sets_are_mapped(good, monkeypatch):
    train, val, meta = P.load_dataset(good)
    os.truncate(good / "train.bin", 10)  # a mapped file would end the process here
    assert not isinstance(train, np.memmap)
    assert train.max() < meta["vocab_size"] and len(train) == meta["train_tokens"]
    P.prepare(good.with_name("good.jsonl"), "bytes", good, quiet=True)
    monkeypatch.setattr(dataset, "IN_MEMORY", 100)
    train, val, meta = P.load_dataset(good)
    assert isinstance(train, np.memmap) and len(train) == meta["train_tokens"]


@pytest.mark.parametrize("name,content,message", [
    ("a.txt", b"", "no text"),
    ("a.txt", b" \n\t\n", "no text"),
    ("a.txt", b"x", "a.txt.* is too short"),
    ("a.txt", b"good\n<|endoftext|>\nbad \xff here", "a.txt is not UTF-8: line 3, byte 5 is 0xff"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"a\.jsonl, line 2: expected .*text"),
    ("a.jsonl", b'{"text": 3}\n', "line 1"),
    ("a.jsonl", b"[]\n", "line 1"),
    ("a.jsonl", b"{text}\n", "line 1"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1.*surrogate"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xfe"}\n', "line 2, byte 11 is 0xfe"),
    ("a.txt.xz", b"not packed", "damaged"),
    ("a.txt.gz", b"not packed", "damaged"),
])
def test_bad_text_leaves_nothing_and_the_old_dataset(tmp_path, good, name, content, message):
    (tmp_path / name).write_bytes(content)
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    listing = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        P.prepare(tmp_path / name, "bytes", good, quiet=True)
    assert sorted(tmp_path.iterdir()) == listing
    assert {file.name: file.read_bytes() for file in good.iterdir()} == before


@pytest.mark.parametrize("arguments,message", [
    ({"tokenizer": "bpe:256"}, "257 to 65536"), ({"tokenizer": "bpe:65537"}, "257 to 65536"),
    ({"tokenizer": "bpe:x"}, "unknown tokenizer"), ({"tokenizer": "gpt3"}, "unknown tokenizer"),
    ({"source": "no-such-thing"}, "no-such-thing.*expected stories, python"),
    ({"val": "no-such-file"}, "no-such-file"), ({"val": ""}, "validation text is empty"),
    ({"source": "fineweb-edu", "shards": 0}, "1 to 99"),
    ({"source": "fineweb-edu", "shards": 100}, "1 to 99"),
    ({"source": "fineweb-edu", "tokenizer": "bytes"}, "gpt2"), ({"sample_mb": 0}, "sample_mb"),
])
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        P.prepare(**{"out": tmp_path / "out", "quiet": True, **arguments})
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_never_replaced(tmp_path, good):
    (good / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match=r"other files \(thesis.txt\)"):
        P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    assert (good / "thesis.txt").exists()


def test_interruption_keeps_the_old_dataset(tmp_path, good, monkeypatch):
    before, listing = (good / "meta.json").read_bytes(), sorted(tmp_path.iterdir())

    def interrupt(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(P.Tokenizer, "encode_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    assert sorted(tmp_path.iterdir()) == listing and (good / "meta.json").read_bytes() == before


def test_a_failed_rename_rolls_back(tmp_path, good, monkeypatch):
    before, replace = (good / "meta.json").read_bytes(), os.replace

    def fail(source, target):
        if ".part-" in str(source):
            raise PermissionError("in use")
        replace(source, target)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError):
        P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    assert (good / "meta.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "good.jsonl"]


@pytest.mark.parametrize("error,message", [
    (OSError(errno.ENOSPC, "No space left"), "good .No space left.: free some space"),
    (OSError(errno.EDQUOT, "Quota exceeded"), "good .Quota exceeded.: free some space"),
    (OSError(errno.EIO, "Input/output error"), "good .Input/output error.: choose another one"),
    (PermissionError(13, "denied", "x.txt"), "can't read or write x.txt .denied"),
])
def test_what_the_system_refuses_is_told_in_one_line(tmp_path, good, monkeypatch, error, message):
    before, listing = (good / "meta.json").read_bytes(), sorted(tmp_path.iterdir())

    def refuse(*arguments):
        raise error
    monkeypatch.setattr(P, "write_ids", refuse)
    with pytest.raises(UserError, match=message):
        P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    assert sorted(tmp_path.iterdir()) == listing and (good / "meta.json").read_bytes() == before
    monkeypatch.setattr(P, "text_files", refuse)
    with pytest.raises(UserError, match=message.replace("good .", "good.jsonl .")):
        P.find_dataset(str(tmp_path / "good.jsonl"))


@pytest.mark.parametrize("others", [1, 3])
def test_another_run_replaces_the_dataset_at_the_same_time(tmp_path, good, monkeypatch, others):
    replace, arrived = os.replace, []

    def with_another(source, target):
        # its dataset comes just before ours is renamed
        if ".part-" in str(source) and len(arrived) < others:
            shutil.copytree(source, target)
            arrived.append(target)
        replace(source, target)
    monkeypatch.setattr(os, "replace", with_another)
    P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    assert len(arrived) == others and P.load_dataset(good)[2]["vocab_size"] == 257
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "good.jsonl"]


def test_another_run_has_just_moved_the_dataset_aside(tmp_path, good, monkeypatch):
    replace, moved = os.replace, []

    def with_another(source, target):
        is_ready = list(tmp_path.glob("good.part-*/meta.json"))
        if is_ready and not moved:
            moved.append(good.rename(tmp_path / "aside"))
        replace(source, target)
    monkeypatch.setattr(os, "replace", with_another)
    P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    assert moved and P.load_dataset(good)[2]["vocab_size"] == 257
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", "good", "good.jsonl"]


def test_a_text_that_grows_between_the_passes_is_noticed(tmp_path, good, monkeypatch):
    before = (good / "meta.json").read_bytes()
    path = write_jsonl(tmp_path / "log.jsonl", documents(60))

    def train_while_it_grows(texts, *arguments):
        ranks = train_bpe(texts, *arguments)
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"text": "one more"}\n')
        return ranks
    monkeypatch.setattr(P, "train_bpe", train_while_it_grows)
    with pytest.raises(UserError, match="log.jsonl changed while it was read"):
        P.prepare(path, "bpe:300", good, quiet=True)
    assert (good / "meta.json").read_bytes() == before


def no_such_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.skipif(os.name == "nt", reason="there a day must pass: see is_running")
def test_what_killed_runs_left_is_cleared(tmp_path, good):
    gone = no_such_process()
    kept = [f"good.part-{os.getppid()}", f"other.part-{gone}", "good.part-x", "good.part-1x"]
    for name in [f"good.part-{gone}", f"good.old-{gone}", *kept]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.bin").write_bytes(b"half")
    other_host = [f"good.part-other-{number}" for number in (gone, os.getpid(), 1)]
    for name in other_host:
        (tmp_path / name).mkdir()
    day_ago = time.time() - 86_500
    os.utime(tmp_path / other_host[2], (day_ago, day_ago))
    kept += other_host[:2]
    mine = temporary(good, "part").name
    (tmp_path / mine.replace(str(os.getpid()), str(gone))).mkdir()
    thesis = tmp_path / f"good.part-{gone}0"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years of work", encoding="utf-8")
    P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    left = {path.name for path in tmp_path.iterdir()} - {"good", "good.jsonl"}
    assert left == {*kept, thesis.name}


@pytest.mark.skipif(os.name == "nt", reason="as above")
def test_killed_while_the_old_dataset_was_aside(tmp_path, good):
    before = (good / "meta.json").read_bytes()
    os.replace(good, tmp_path / f"good.old-{no_such_process()}")
    with pytest.raises(UserError, match="no text"):
        (tmp_path / "empty.txt").write_bytes(b"")
        P.prepare(tmp_path / "empty.txt", "bytes", good, quiet=True)
    assert (good / "meta.json").read_bytes() == before


def test_an_out_that_can_not_be_replaced_fails_before_the_work(tmp_path, good, monkeypatch):
    listing = sorted(tmp_path.iterdir())
    monkeypatch.setattr(P, "read_documents", None)  # the work
    with pytest.raises(UserError, match="good.jsonl is a file: choose another folder"):
        P.prepare(tmp_path / "good.jsonl", "bytes", tmp_path / "good.jsonl", quiet=True)
    with pytest.raises(UserError, match="can't make or replace .*choose another folder"):
        P.prepare(tmp_path / "good.jsonl", "bytes", tmp_path / "good.jsonl" / "out", quiet=True)
    with pytest.raises(UserError, match="can't be replaced: choose another folder"):
        P.prepare(tmp_path / "good.jsonl", "bytes", tmp_path.anchor, quiet=True)

    def mount_point(source, target):
        raise OSError(16, "Device or resource busy", str(source))
    monkeypatch.setattr(os, "replace", mount_point)
    with pytest.raises(UserError, match="can't make or replace .*good .Device or resource busy"):
        P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    assert sorted(tmp_path.iterdir()) == listing


def test_a_validation_text_that_would_be_trained_on(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}", encoding="utf-8")
    (tmp_path / "books").mkdir()
    shutil.copy(tmp_path / "a.txt", tmp_path / "books")
    for source, val in ((tmp_path, tmp_path / "b.txt"), (tmp_path / "a.txt", tmp_path / "a.txt"),
                        (tmp_path / "books/a.txt", tmp_path)):
        with pytest.raises(UserError, match="would be trained on: move it"):
            P.prepare(source, "bytes", tmp_path / "out", val=val, quiet=True)
    assert not (tmp_path / "out").exists()
    P.prepare(tmp_path / "books", "bytes", tmp_path / "out", val=tmp_path / "b.txt", quiet=True)


def test_texts_of_one_name_do_not_replace_one_another_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(P, "HERE", tmp_path)
    for name in ("books.v1", "books.v2", "stories"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}", encoding="utf-8")
    made = P.prepare(tmp_path / "books.v1.txt", "bytes", quiet=True)
    assert P.prepare(tmp_path / "books.v1.txt", "bytes", quiet=True) == made
    with pytest.raises(UserError, match="books-bytes holds another text .books.v1.txt.: choose"):
        P.prepare(tmp_path / "books.v2.txt", "bytes", quiet=True)
    P.prepare(tmp_path / "books.v2.txt", "bytes", made, quiet=True)        # where it is asked for
    own = P.prepare(tmp_path / "stories.txt", "bytes", quiet=True)
    assert own.name == "stories-text-bytes"                  # train.py's --data stories is ours


def test_prepare_again_replaces(tmp_path, good):
    P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    assert P.load_dataset(good)[2]["vocab_size"] == 257 and not (good / "tokenizer.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "good.jsonl"]


def run_prepare(*arguments):
    """the command, in the current folder; what it prints is UTF-8"""
    command = [sys.executable, str(REPO / "data" / "prepare.py"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "PYTHONIOENCODING": "utf-8"})


def test_command_line(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl", documents(60))
    run = run_prepare
    done = run("a.jsonl", "--tokenizer", "bytes", "--out", "made")
    assert done.returncode == 0 and "bytes per token" in done.stdout, done.stderr
    assert "sha256" in done.stdout
    assert P.load_dataset(tmp_path / "made")[2]["source"] == "a.jsonl"
    bad = run("missing.txt")
    assert bad.returncode == 1
    assert bad.stderr.startswith("prepare.py: 'missing.txt' is neither a known source nor an exis")
    assert bad.stderr.count("\n") == 1
    (tmp_path / "bad.jsonl").write_text("null", encoding="utf-8")
    for arguments in (["bad.jsonl"], ["a.jsonl", "--tokenizer", "x"], ["a.jsonl", "--val", "gone"],
                      [""]):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments, "--out", "made"])
        with pytest.raises(SystemExit, match="^prepare.py: [^\n]+$"):
            P.main()
    monkeypatch.setattr(sys, "argv", ["prepare.py", "-h"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        P.main()
    usage = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("--shards", "--val", "--sample_mb", "bpe:1024"):
        assert word in usage


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    try:
        write_jsonl(tmp_path / "a\udcff.jsonl", documents(60))
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    monkeypatch.setattr(P, "HERE", tmp_path / "data")
    source = str(tmp_path / "a\udcff.jsonl")
    assert P.find_dataset(source, "bytes") == P.find_dataset(source, "bytes")
    done = run_prepare(source, "--tokenizer", "bytes", "--out", "b\udcff")
    assert done.returncode == 0 and "b\\udcff: 60 documents" in done.stdout, done.stderr


def test_a_mistake_in_the_program_keeps_its_traceback(monkeypatch):
    def mistake(**arguments):
        return [][0]
    monkeypatch.setattr(P, "prepare", mistake)
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    with pytest.raises(IndexError):
        P.main()
    for error, shown in [(UserError("no text"), "prepare.py: no text"),
                         (KeyboardInterrupt(), "interrupted")]:
        def fail(**arguments):
            raise error
        monkeypatch.setattr(P, "prepare", fail)
        with pytest.raises(SystemExit, match=shown):
            P.main()

    for error in (ValueError("two values"), OSError("no file of the user's")):
        def wrong(**arguments):
            raise error
        monkeypatch.setattr(P, "prepare", wrong)
        with pytest.raises(type(error), match=str(error)):
            P.main()


# -- downloads, from a server of our own

@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "DOWNLOADS", tmp_path / "downloads")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append((self.path, self.headers.get("Range")))
            body, start = self.server.files.get(self.path), 0
            if body is None:
                return self.send_error(404)
            if self.headers.get("Range") and self.server.ranges:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    return self.send_error(416)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:start + self.server.break_after])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.files, httpd.requests, httpd.ranges, httpd.break_after = {}, [], True, 1 << 30
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/"
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def shard(ids, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids) if count is None else count
    return header.tobytes() + np.array(ids, dtype="<u2").tobytes()


def serve_shards(server, contents):
    server.files = {f"/finewebedu_{name}.bin": shard(ids) for name, ids in contents.items()}


def must_hold(body):
    def check(file):
        if file.read_bytes() != body:
            raise UserError("another text")
    return check


@pytest.mark.parametrize("ranges", [True, False])
def test_download_resumes(server, tmp_path, ranges):
    body = os.urandom(5000)
    server.files["/f"], server.ranges, server.break_after = body, ranges, 2000
    path, check = tmp_path / "f", must_hold(body)
    with pytest.raises(UserError, match="can't download .*Run the same command again"):
        D.download(server.url + "f", path, check, quiet=True)
    assert not path.exists() and (tmp_path / "f.part").read_bytes() == body[:2000]
    server.break_after = 1 << 30
    D.download(server.url + "f", path, check, quiet=True)
    assert path.read_bytes() == body and server.requests[1] == ("/f", "bytes=2000-")
    assert not (tmp_path / "f.part").exists()


def test_a_stale_part_is_dropped(server, tmp_path):
    server.files["/f"] = b"short"
    (tmp_path / "f.part").write_bytes(b"longer than the file")
    with pytest.raises(UserError, match="416"):
        D.download(server.url + "f", tmp_path / "f", must_hold(b"short"), quiet=True)
    D.download(server.url + "f", tmp_path / "f", must_hold(b"short"), quiet=True)
    assert (tmp_path / "f").read_bytes() == b"short"


def test_a_complete_part_is_kept(server, tmp_path):
    # killed between the last byte and the rename: nothing is left to ask a server for
    (tmp_path / "f.part").write_bytes(b"all of it")
    D.download(server.url + "f", tmp_path / "f", must_hold(b"all of it"), quiet=True)
    assert (tmp_path / "f").read_bytes() == b"all of it" and not (tmp_path / "f.part").exists()
    assert not server.requests


def test_two_processes_download_one_file(server, tmp_path, monkeypatch):
    body = os.urandom(5000)
    server.files["/f"], server.break_after = body, 2000
    path, check = tmp_path / "f", must_hold(body)
    with pytest.raises(UserError):
        D.download(server.url + "f", path, check, quiet=True)
    server.break_after = 1 << 30
    transfer, own = D.transfer, os.getpid()
    sizes = []

    def with_another(url, part, name, quiet):
        sizes.append(part.stat().st_size if part.exists() else 0)
        if len(sizes) == 1:  # the other one comes while this one's part lies there
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: own + 1)
                D.download(url, path, check, quiet=True)
            path.unlink()
        transfer(url, part, name, quiet)
    monkeypatch.setattr(D, "transfer", with_another)
    D.download(server.url + "f", path, check, quiet=True)
    assert sizes == [2000, 0] and path.read_bytes() == body
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["f"]


@pytest.mark.skipif(os.name == "nt", reason="there a day must pass: see is_running")
def test_the_part_of_a_killed_download_is_resumed(server, tmp_path):
    server.files["/f"] = b"all of it"
    part = temporary(tmp_path / "f", "part").name.replace(str(os.getpid()), str(no_such_process()))
    (tmp_path / part).write_bytes(b"all")
    D.download(server.url + "f", tmp_path / "f", must_hold(b"all of it"), quiet=True)
    assert server.requests == [("/f", "bytes=3-")]
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["f"]


def test_shakespeare_download(server, tmp_path, monkeypatch):
    text = ("To be, or not to be.\n" * 50).encode()
    monkeypatch.setattr(D, "SHAKESPEARE_URL", server.url + "input.txt")
    monkeypatch.setattr(D, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    server.files["/input.txt"] = b"<html>sign in to this hotel's network</html>"
    with pytest.raises(UserError, match="something else .its sha256 is .*place the right file"):
        P.prepare("shakespeare", out=tmp_path / "s", quiet=True)
    assert not list(D.DOWNLOADS.iterdir()) and not (tmp_path / "s").exists()
    server.files["/input.txt"] = text
    for _ in range(2):
        P.prepare("shakespeare", out=tmp_path / "s", quiet=True)
    assert len(server.requests) == 2  # the second time the file is there
    assert P.load_dataset(tmp_path / "s")[2]["train_tokens"] == int(0.9 * len(text))


def test_a_damaged_download_is_fetched_anew(server, tmp_path):
    server.files["/f"] = b"right"
    (tmp_path / "f").write_bytes(b"wrong")
    for _ in range(2):
        D.download(server.url + "f", tmp_path / "f", must_hold(b"right"), quiet=True)
    assert (tmp_path / "f").read_bytes() == b"right" and len(server.requests) == 1


def test_offline(server, tmp_path, monkeypatch):
    # nobody listens there
    monkeypatch.setattr(D, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(UserError, match=r"tinyshakespeare.txt by hand.*prepare.py. .stories"):
        P.prepare("shakespeare", out=tmp_path / "s", quiet=True)
    monkeypatch.setattr(D, "SHAKESPEARE_URL", server.url + "nothing")
    with pytest.raises(UserError, match="HTTP Error 404"):
        P.prepare("shakespeare", out=tmp_path / "s", quiet=True)
    assert not list(D.DOWNLOADS.iterdir())


def gpt2_tokenizer():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with GPT-2's files to run this")
    return P.Tokenizer({"kind": "gpt2"})


class NoGPT2:  # of the vocabulary's size; one byte for each id
    eot_token = 50256

    def decode_single_token_bytes(self, id):
        return b"x"


def test_fineweb_shards(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "load_gpt2", NoGPT2)
    monkeypatch.setattr(D, "FINEWEB_URL", server.url)
    contents = {"val_000000": [50256, 1, 2, 3], "train_000001": [50256, 4, 5],
                "train_000002": [50256, 6, 50256, 7]}
    serve_shards(server, contents)
    one = P.load_dataset(P.prepare("fineweb-edu", out=tmp_path / "one", quiet=True))
    two = P.load_dataset(P.prepare("fineweb-edu", out=tmp_path / "two", shards=2, quiet=True))
    assert one[0].tolist() == contents["train_000001"]
    assert two[0].tolist() == contents["train_000001"] + contents["train_000002"]
    assert one[1].tolist() == two[1].tolist() == contents["val_000000"]
    assert len(server.requests) == 3 and two[2]["documents"] == 4 and two[2]["val_documents"] == 1
    assert two[2]["vocab_size"] == 50257 and two[2]["tokenizer"] == {"kind": "gpt2"}


def test_fineweb_byte_counts(server, tmp_path, monkeypatch):
    gpt2 = gpt2_tokenizer()
    monkeypatch.setattr(D, "FINEWEB_URL", server.url)
    ids = [gpt2.eot, *gpt2.encode("a café\n")]
    serve_shards(server, dict.fromkeys(("val_000000", "train_000001"), ids))
    meta = P.load_dataset(P.prepare("fineweb-edu", out=tmp_path / "one", quiet=True))[2]
    assert meta["val_bytes"] == meta["train_bytes"] == len("a café\n".encode())


@pytest.mark.parametrize("body", [
    b"<!doctype html><title>Rate limited</title>" * 50, b"", shard([1, 2, 3], count=4),
    shard([1])[:900], b"\0" * 2000,
])
def test_a_wrong_shard_is_never_kept(server, tmp_path, monkeypatch, body):
    monkeypatch.setattr(D, "FINEWEB_URL", server.url)
    server.files = {"/finewebedu_val_000000.bin": body}
    with pytest.raises(UserError, match="something else"):
        P.prepare("fineweb-edu", out=tmp_path / "f", quiet=True)
    assert not list(D.DOWNLOADS.iterdir()) and not (tmp_path / "f").exists()


def test_a_shard_with_foreign_ids(server, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "FINEWEB_URL", server.url)
    serve_shards(server, dict.fromkeys(("val_000000", "train_000001"), [1, 60000]))
    with pytest.raises(UserError, match="holds the id 60000"):
        P.prepare("fineweb-edu", out=tmp_path / "f", quiet=True)
    assert not list(D.DOWNLOADS.iterdir()) and not (tmp_path / "f").exists()
