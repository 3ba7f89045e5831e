"""data/prepare.py: tokenizers, the trainer against a slow one, sources, splits, downloads from a local server, bad input."""
import gzip
import hashlib
import http.server
import json
import lzma
import os
import subprocess
import sys
import threading
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from data import download as D
from data import prepare as P
from data.prepare import Tokenizer, load_dataset, prepare, train_bpe  # noqa: F401  (the names that scripts import)
from data.tokenizer import PATTERN, bpe_spec

REPO = Path(__file__).resolve().parents[1]
LOCAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # optional: real texts and GPT-2's files, if present
TEXT = "def f(x):\n    return x + 1\n\n\nfor i in range(10):\n    if f(i) > 3:\n        print('café', i)\r\n\tdone 12345 !!\n"


def documents(count):
    return [f"document {i}: " + "some words to fill it " * (i % 7) for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def as_text(ids, meta):
    return P.Tokenizer(meta["tokenizer"]).decode(ids.tolist())


# -- tokenizers

def slow_bpe(text, vocab_size):
    # the definition: count every pair of every piece anew, merge the first, repeat
    import regex
    pieces = [[bytes([b]) for b in piece.encode()] for piece in regex.findall(PATTERN, text)]
    ranks = [bytes([b]) for b in range(256)]
    while len(ranks) < vocab_size - 1:
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not counts or max(counts.values()) < 2:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        for piece in pieces:
            i = 0
            while i + 1 < len(piece):
                if (piece[i], piece[i + 1]) == pair:
                    piece[i:i + 2] = [pair[0] + pair[1]]
                i += 1
        ranks.append(pair[0] + pair[1])
    return ranks


@pytest.mark.parametrize("text", [TEXT * 2, "aaaa aaaaa aaa abcabc bcabcab ab abc aaa" * 3,
                                  Path(P.__file__).read_text(encoding="utf-8")[:5000]])
def test_trainer_agrees_with_the_slow_definition(text):
    ranks = P.train_bpe([text], 420)
    assert ranks == slow_bpe(text, 420) and len(set(ranks)) == len(ranks)


def test_trainer_sizes():
    assert len(P.train_bpe([TEXT * 3], 257)) == 256
    assert len(P.train_bpe([TEXT * 3], 300)) == 299
    assert len(P.train_bpe(["ab ab"], 300)) == 257 and P.train_bpe(["ab ab"], 300)[-1] == b"ab"  # no other pair occurs twice


def test_bpe_compresses_and_indentation_is_one_token():
    tokenizer = P.Tokenizer(bpe_spec(P.train_bpe([TEXT * 3], 320)))
    assert len(tokenizer.encode(TEXT)) < 0.7 * len(TEXT)
    ids = tokenizer.encode(":\n        print")
    assert b"\n        " in [tokenizer.token_bytes(i) for i in ids]


def tokenizer_of(kind, monkeypatch):
    if kind == "gpt2":
        if not (LOCAL_DATA / "tiktoken").is_dir() and not os.environ.get("TIKTOKEN_CACHE_DIR"):
            pytest.skip("GPT-2's files are not on this machine")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.environ.get("TIKTOKEN_CACHE_DIR", str(LOCAL_DATA / "tiktoken")))
        return P.Tokenizer({"kind": "gpt2"})
    return P.Tokenizer({"kind": "bytes"} if kind == "bytes" else bpe_spec(P.train_bpe([TEXT * 3], 400)))


@pytest.mark.parametrize("kind,vocab_size", [("bytes", 257), ("bpe", None), ("gpt2", 50257)])
def test_tokenizer_round_trip(kind, vocab_size, monkeypatch):
    tokenizer = tokenizer_of(kind, monkeypatch)
    assert tokenizer.vocab_size == (vocab_size or len(tokenizer.spec["ranks"]) + 1)
    assert tokenizer.eot == tokenizer.vocab_size - 1
    every = "".join(chr(c) for c in range(0x3000) if not 0xD800 <= c < 0xE000) + "日本語 🙂 한국어 e\u0301 \U0010ffff"
    for text in ["", TEXT, every, "<|endoftext|>", " " * 500 + "x" * 500 + "\n" * 300 + "-" * 300, "\r\n \r\n\t\x1c\x85 \u2028"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
        assert tokenizer.eot not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch([TEXT, "", every]) == [tokenizer.encode(TEXT), [], tokenizer.encode(every)]
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"
    half = next(i for i in range(256) if tokenizer.token_bytes(i) == "é".encode()[:1])
    assert tokenizer.decode([half]) == "\ufffd"
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(ValueError, match="position 1: surrogates not allowed"):
            call("a\ud800b")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.token_bytes(bad)
    # the spec survives JSON, and pieces of a long text join to what the whole text gives
    again = P.Tokenizer(json.loads(json.dumps(tokenizer.spec)))
    text = "".join(f"line {i} of a ({i % 13}) long text.   \n\n\t{'  ' * (i % 5)}end{i}\r\n" for i in range(12000))
    pieces = P.PIECE.findall(text)
    assert len(pieces) > 1 and "".join(pieces) == text
    assert all(after[0] in "\r\n" and not before[-1].isspace() for before, after in pairwise(pieces))
    assert list(chain(*again.encode_batch(pieces))) == tokenizer.encode(text)


@pytest.mark.parametrize("spec", [None, {}, {"kind": "words"}, {"kind": "bpe", "pattern": ".", "ranks": ["YQ=="]},
                                  {"kind": "bpe", "pattern": ".", "ranks": ["YQ=="] * 256}])
def test_bad_spec(spec):
    with pytest.raises(ValueError, match="unknown tokenizer|damaged"):
        P.Tokenizer(spec)


def test_gpt2_out_of_reach(monkeypatch):
    import tiktoken
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ConnectionError, match=r"TIKTOKEN_CACHE_DIR.*bytes.*bpe:N"):
        P.Tokenizer({"kind": "gpt2"})


# -- data sets

def test_documents_are_split_by_their_own_text(tmp_path):
    texts = documents(200)
    few = P.load_dataset(P.prepare(write_jsonl(tmp_path / "a.jsonl", texts[:150]), "bytes", tmp_path / "few", quiet=True))
    more = P.load_dataset(P.prepare(write_jsonl(tmp_path / "b.jsonl", texts[::-1]), "bytes", tmp_path / "more", quiet=True))
    held_out = [set(as_text(val, meta).split("<|endoftext|>")[:-1]) for _, val, meta in (few, more)]
    assert 1 < len(held_out[0]) < len(held_out[1]) < 30 and held_out[0] < held_out[1]
    train, val, meta = more
    assert as_text(train, meta).split("<|endoftext|>")[:-1] == [t for t in texts[::-1] if t not in held_out[1]]
    assert meta["documents"] == 200 and meta["val_documents"] == len(held_out[1])
    assert meta["train_bytes"] + meta["val_bytes"] == sum(len(t.encode()) for t in texts)
    assert meta["train_tokens"] == len(train) and meta["val_tokens"] == len(val) and train.dtype == np.uint16
    assert set(P.META_KEYS) <= set(meta)


def test_one_document_is_cut_by_position(tmp_path):
    text = "é" * 55 + "\r\n" + "b" * 50
    (tmp_path / "one.txt").write_bytes(text.encode())
    train, val, meta = P.load_dataset(P.prepare(tmp_path / "one.txt", "bytes", tmp_path / "out", quiet=True))
    assert as_text(train, meta) == text[:96] and as_text(val, meta) == text[96:]  # int(0.9 * 107) characters, no end-of-text
    assert meta["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_few_documents_fall_back_to_position(tmp_path):
    texts = [text for text in documents(30) if not P.is_val(text)][:3]
    train, val, meta = P.load_dataset(P.prepare(write_jsonl(tmp_path / "a.jsonl", texts), "bytes", tmp_path / "out",
                                                quiet=True))
    everything = as_text(train, meta) + as_text(val, meta)
    assert everything == "".join(text + "<|endoftext|>" for text in texts) and len(val) > 2
    assert meta["sha256"] == hashlib.sha256("<|endoftext|>\n".join(texts).encode()).hexdigest()


def test_separators_val_and_compression(tmp_path):
    source = "first\n<|endoftext|>\nsecond <|endoftext|> inline\n<|endoftext|>\r\n\n<|endoftext|>\nthird"
    with lzma.open(tmp_path / "a.train.txt.xz", "wb") as file:
        file.write(source.encode())
    with gzip.open(tmp_path / "a.val.jsonl.gz", "wb") as file:
        file.write(b'{"text": "held out"}\n\n{"text": "too"}\n')
    folder = P.prepare(tmp_path / "a.train.txt.xz", "bpe:300", tmp_path / "out", val=tmp_path / "a.val.jsonl.gz", quiet=True)
    train, val, meta = P.load_dataset(folder)
    tokenizer = P.Tokenizer(meta["tokenizer"])
    assert tokenizer.decode(train) == "first\n<|endoftext|>second <|endoftext|> inline\n<|endoftext|>third<|endoftext|>"
    assert (train == meta["eot"]).sum() == 3  # the inline one is text
    assert tokenizer.decode(val) == "held out<|endoftext|>too<|endoftext|>"


def test_folder_is_read_in_order(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name, text in [("b/x.md", "three"), ("a.txt", "one"), ("b.txt", "two"), ("skip.png", "\udcff"), ("b/y.py", "four")]:
        (tmp_path / "in" / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert list(P.read_source(tmp_path / "in", set())) == ["one", "two", "three", "four"]


def test_python_source_leaves_out_tests_tables_and_other_encodings(tmp_path, monkeypatch):
    root = tmp_path / "lib"
    for name in ("z.py", "a/b.py", "a-b.py", "test/t.py", "a/tests/t.py", "site-packages/p.py", "encodings/x.py",
                 "_sysconfigdata_x.py", "a/note.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() + b"\r\n")
    (root / "latin.py").write_bytes(b"# caf\xe9")
    (root / "empty.py").write_bytes(b"")
    monkeypatch.setattr(P.sysconfig, "get_path", lambda name: str(root))
    skipped = set()
    assert list(P.read_source("python", skipped)) == ["a-b.py\r\n", "a/b.py\r\n", "z.py\r\n"]
    assert skipped == {root / "latin.py"}


def test_summary_counts_skipped_python_files(tmp_path, monkeypatch, capsys):
    for name, data in [("a.py", b"x = 1\n" * 20), ("b.py", b"# caf\xe9"), ("c.py", b"\xff\xfe")]:
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(P.sysconfig, "get_path", lambda name: str(tmp_path))
    folder = P.prepare("python", "bpe:258", tmp_path / "out")  # reads the files three times, and counts them once
    assert "1 documents (0 for validation), 2 files skipped as not UTF-8" in capsys.readouterr().out
    assert P.load_dataset(folder)[2]["skipped_files"] == 2


def test_python_packages_come_after_the_library(tmp_path, monkeypatch):
    assert Path(P.sysconfig.get_path("stdlib"), "argparse.py").is_file()
    for folder in ("lib", "site"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(folder, encoding="utf-8")
    folders = {"stdlib": "lib", "purelib": "site", "platlib": "site/../site"}  # two names of one folder: read once
    monkeypatch.setattr(P.sysconfig, "get_path", lambda name: str(tmp_path / folders[name]))
    assert list(P.read_source("python+packages", set())) == ["lib", "site"]
    assert list(P.read_source("python", set())) == ["lib"]


def test_sample_is_even_and_from_training_text_only():
    parts = [("a" * 100_000, "train", True), ("v" * 100_000, "val", True), ("b" * 100_000, "train", True)]
    text = "".join(P.sample(iter(parts), 0.25))
    assert "v" not in text and 40_000 < len(text) < 60_000 and 0.4 < text.count("a") / len(text) < 0.6


def test_text_larger_than_a_batch(tmp_path):
    path = write_jsonl(tmp_path / "big.jsonl", ["x " * 200_000 + str(i) for i in range(8)])  # 3.2 MB
    small = list(P.batches([(text, "train", True) for text in P.read_source(path, set())], size=1 << 20))
    rows = [row for batch in small for row in batch]
    assert len(small) > 2 and all(len(piece) <= 262144 for piece, _, _ in rows)
    assert sum(ends for _, _, ends in rows) == 8
    assert "".join(piece + "|" * ends for piece, _, ends in rows) == "".join(f"{t}|" for t in P.read_source(path, set()))


def test_shakespeare_by_position(tmp_path, monkeypatch):
    if not (LOCAL_DATA / "tinyshakespeare.txt").is_file():
        pytest.skip("tinyshakespeare.txt is not on this machine")
    monkeypatch.setattr(D, "DOWNLOADS", LOCAL_DATA)  # the file is there, so no network is used
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
    for foreign in ("Gutenberg", "Transcriber", "Illustration", "Copyright", "CHAPTER", "\u201c", "_"):
        assert foreign not in text
    assert sum(path.stat().st_size for path in P.STORIES) < 900_000


def test_stories_are_the_default(tmp_path):
    import train
    assert train.TrainConfig.data == "stories" and train.PRESETS["tiny"]["tokenizer"] == "bpe:2048"
    assert "data" not in train.PRESETS["tiny"]
    assert (train.PRESETS["small"]["data"], train.PRESETS["small"]["tokenizer"]) == ("python", "bpe:8192")
    (tmp_path / "v.txt").write_text("another validation text", encoding="utf-8")
    folder = P.prepare("stories", "bytes", tmp_path / "out", val=tmp_path / "v.txt", quiet=True)
    _, val, meta = P.load_dataset(folder)
    assert as_text(val, meta) == "another validation text<|endoftext|>"


# -- what must not happen

@pytest.fixture
def good(tmp_path):
    return P.prepare(write_jsonl(tmp_path / "good.jsonl", documents(60)), "bpe:300", tmp_path / "good", quiet=True)


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta.update(changes)
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if v != "gone"}), encoding="utf-8")


@pytest.mark.parametrize("damage,error,message", [
    (lambda f: (f / "meta.json").unlink(), FileNotFoundError, "meta.json is missing"),
    (lambda f: (f / "meta.json").write_text("{", encoding="utf-8"), ValueError, "can't be used"),
    (lambda f: (f / "meta.json").write_text("3", encoding="utf-8"), ValueError, "can't be used"),
    (lambda f: edit_meta(f, sha256="gone", eot="gone"), ValueError, "lacks eot, sha256"),
    (lambda f: (f / "val.bin").unlink(), FileNotFoundError, "val.bin is missing"),
    (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, "tokenizer.json is missing"),
    (lambda f: os.truncate(f / "train.bin", 100), ValueError, "has 100 bytes, but meta.json tells"),
    (lambda f: edit_meta(f, vocab_size=200), ValueError, "holds the id .* has 200"),
])
def test_load_refuses_a_damaged_data_set(good, damage, error, message):
    P.load_dataset(good)
    damage(good)
    with pytest.raises(error, match=message):
        P.load_dataset(good)


@pytest.mark.parametrize("name,content,message", [
    ("a.txt", b"", "no text"),
    ("a.txt", b" \n\t\n", "no text"),
    ("a.txt", b"x", "too short"),
    ("a.txt", b"good\n<|endoftext|>\nbad \xff here", r"a\.txt is not UTF-8: byte 23 is 0xff"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"a\.jsonl, line 2: expected .*text"),
    ("a.jsonl", b'{"text": 3}\n', "line 1"),
    ("a.jsonl", b"[]\n", "line 1"),
    ("a.jsonl", b"{text}\n", "line 1"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1.*surrogate"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xfe"}\n', "byte 24 is 0xfe"),
    ("a.txt.xz", b"not packed", "damaged"),
    ("a.txt.gz", b"not packed", "damaged"),
])
def test_bad_text_leaves_nothing_and_the_old_data_set(tmp_path, good, name, content, message):
    (tmp_path / name).write_bytes(content)
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    listing = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        P.prepare(tmp_path / name, "bytes", good, quiet=True)
    assert sorted(tmp_path.iterdir()) == listing
    assert {file.name: file.read_bytes() for file in good.iterdir()} == before


@pytest.mark.parametrize("arguments,message", [
    ({"tokenizer": "bpe:256"}, "257 to 65536"), ({"tokenizer": "bpe:65537"}, "257 to 65536"),
    ({"tokenizer": "bpe:x"}, "unknown tokenizer"), ({"tokenizer": "gpt3"}, "unknown tokenizer"),
    ({"source": "no-such-thing"}, "no-such-thing.*expected stories, python"), ({"val": "no-such-file"}, "no-such-file"),
    ({"source": "fineweb-edu", "shards": 0}, "1 to 99"), ({"source": "fineweb-edu", "shards": 100}, "1 to 99"),
    ({"source": "fineweb-edu", "tokenizer": "bytes"}, "gpt2"), ({"sample_mb": 0}, "sample_mb"),
])
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        P.prepare(**{"out": tmp_path / "out", "quiet": True, **arguments})
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_never_replaced(tmp_path, good):
    (good / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other files \(thesis.txt\)"):
        P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    assert (good / "thesis.txt").exists()


def test_interruption_keeps_the_old_data_set(tmp_path, good, monkeypatch):
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
    assert (good / "meta.json").read_bytes() == before and not list(tmp_path.glob("*.old*")) + list(tmp_path.glob("*.part*"))


def test_prepare_again_replaces(tmp_path, good):
    P.prepare(tmp_path / "good.jsonl", "bytes", good, quiet=True)
    assert P.load_dataset(good)[2]["vocab_size"] == 257 and not (good / "tokenizer.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "good.jsonl"]


def test_command_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", documents(60))

    def run(*arguments):
        return subprocess.run([sys.executable, str(REPO / "data" / "prepare.py"), *arguments], cwd=tmp_path, check=False,
                              capture_output=True, text=True, encoding="utf-8")
    done = run("a.jsonl", "--tokenizer", "bytes", "--out", "made")
    assert done.returncode == 0 and "bytes per token" in done.stdout and "sha256" in done.stdout, done.stderr
    assert P.load_dataset(tmp_path / "made")[2]["source"] == "a.jsonl"
    bad = run("missing.txt")
    assert bad.returncode == 1 and bad.stderr.startswith("prepare.py: 'missing.txt' is no source")
    assert bad.stderr.count("\n") == 1
    usage = run("-h")
    assert usage.returncode == 0 and all(flag in usage.stdout for flag in ("--shards", "--val", "--sample_mb", "bpe:2048"))


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


@pytest.mark.parametrize("ranges", [True, False])
def test_download_resumes(server, tmp_path, ranges):
    body = os.urandom(5000)
    server.files["/f"], server.ranges, server.break_after = body, ranges, 2000
    path, check = tmp_path / "f", (lambda file: None)
    with pytest.raises(ConnectionError, match="can't download .*Run the same command again"):
        D.download(server.url + "f", path, check, quiet=True)
    assert not path.exists() and (tmp_path / "f.part").read_bytes() == body[:2000]
    server.break_after = 1 << 30
    D.download(server.url + "f", path, check, quiet=True)
    assert path.read_bytes() == body and server.requests[1] == ("/f", "bytes=2000-") and not (tmp_path / "f.part").exists()


def test_a_stale_part_is_dropped(server, tmp_path):
    server.files["/f"] = b"short"
    (tmp_path / "f.part").write_bytes(b"longer than the file")
    with pytest.raises(ConnectionError, match="416"):
        D.download(server.url + "f", tmp_path / "f", lambda file: None, quiet=True)
    D.download(server.url + "f", tmp_path / "f", lambda file: None, quiet=True)
    assert (tmp_path / "f").read_bytes() == b"short"


def test_shakespeare_download(server, tmp_path, monkeypatch):
    text = ("To be, or not to be.\n" * 50).encode()
    monkeypatch.setattr(D, "SHAKESPEARE_URL", server.url + "input.txt")
    monkeypatch.setattr(D, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    server.files["/input.txt"] = b"<html>sign in to this hotel's network</html>"
    with pytest.raises(ValueError, match="something else .its sha256 is .*place the right file"):
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

    def check(file):
        if file.read_bytes() != b"right":
            raise ValueError
    for _ in range(2):
        D.download(server.url + "f", tmp_path / "f", check, quiet=True)
    assert (tmp_path / "f").read_bytes() == b"right" and len(server.requests) == 1


def test_offline(server, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")  # nobody listens there
    with pytest.raises(ConnectionError, match=r"tinyshakespeare.txt by hand.*prepare.py python"):
        P.prepare("shakespeare", out=tmp_path / "s", quiet=True)
    monkeypatch.setattr(D, "SHAKESPEARE_URL", server.url + "nothing")
    with pytest.raises(ConnectionError, match="HTTP Error 404"):
        P.prepare("shakespeare", out=tmp_path / "s", quiet=True)
    assert not list(D.DOWNLOADS.iterdir())


def test_fineweb_shards(server, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "FINEWEB_URL", server.url)
    contents = {"val_000000": [50256, 1, 2, 3], "train_000001": [50256, 4, 5], "train_000002": [50256, 6, 50256, 7]}
    server.files = {f"/finewebedu_{name}.bin": shard(ids) for name, ids in contents.items()}
    one = P.load_dataset(P.prepare("fineweb-edu", out=tmp_path / "one", quiet=True))
    two = P.load_dataset(P.prepare("fineweb-edu", out=tmp_path / "two", shards=2, quiet=True))
    assert one[0].tolist() == contents["train_000001"]
    assert two[0].tolist() == contents["train_000001"] + contents["train_000002"]
    assert one[1].tolist() == two[1].tolist() == contents["val_000000"]
    assert len(server.requests) == 3 and two[2]["documents"] == 4 and two[2]["val_documents"] == 1
    assert two[2]["vocab_size"] == 50257 and two[2]["tokenizer"] == {"kind": "gpt2"}


def test_fineweb_byte_counts(server, tmp_path, monkeypatch):
    gpt2 = tokenizer_of("gpt2", monkeypatch)
    monkeypatch.setattr(D, "FINEWEB_URL", server.url)
    ids = [gpt2.eot, *gpt2.encode("a café\n")]
    server.files = {f"/finewebedu_{name}.bin": shard(ids) for name in ("val_000000", "train_000001")}
    meta = P.load_dataset(P.prepare("fineweb-edu", out=tmp_path / "one", quiet=True))[2]
    assert meta["val_bytes"] == meta["train_bytes"] == len("a café\n".encode())


@pytest.mark.parametrize("body", [b"<!doctype html><title>Rate limited</title>" * 50, b"", shard([1, 2, 3], count=4),
                                  shard([1])[:900], b"\0" * 2000])
def test_a_wrong_shard_is_never_kept(server, tmp_path, monkeypatch, body):
    monkeypatch.setattr(D, "FINEWEB_URL", server.url)
    server.files = {"/finewebedu_val_000000.bin": body}
    with pytest.raises(ValueError, match="something else"):
        P.prepare("fineweb-edu", out=tmp_path / "f", quiet=True)
    assert not list(D.DOWNLOADS.iterdir()) and not (tmp_path / "f").exists()


def test_a_shard_with_foreign_ids(server, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "FINEWEB_URL", server.url)
    server.files = {f"/finewebedu_{name}.bin": shard([1, 60000]) for name in ("val_000000", "train_000001")}
    with pytest.raises(ValueError, match="holds the id 60000"):
        P.prepare("fineweb-edu", out=tmp_path / "f", quiet=True)
    assert not list(D.DOWNLOADS.iterdir()) and not (tmp_path / "f").exists()
