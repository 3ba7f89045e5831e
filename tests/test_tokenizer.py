"""data/tokenizer.py: round trips, byte-pair training against a slow one, damaged vocabularies."""
import heapq
import json
import os
import random
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import pytest

from data.errors import UserError
from data.tokenizer import PATTERN, SECTION, Tokenizer, bpe_spec, train_bpe

TEXT = ("def f(x):\n    return x + 1\n\n\nfor i in range(10):\n    if f(i) > 3:\n"
        "        print('café', i)\r\n\tdone 12345 !!\n")


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
                                  Path(__file__).read_text(encoding="utf-8")[:5000]])
def test_trainer_agrees_with_the_slow_definition(text):
    ranks = train_bpe([text], 420)
    assert ranks == slow_bpe(text, 420) and len(set(ranks)) == len(ranks)


def test_trainer_agrees_on_runs_and_few_letters():
    # pairs that touch or overlap, in pieces that occur often: places are easily counted twice
    rng = random.Random(0)
    for letters in ("a", "ab", "abc", "abcdefg"):
        words = ["".join(rng.choices(letters, k=rng.randint(1, 64))) for _ in range(30)]
        text = " ".join(rng.choices(words, k=90))
        assert train_bpe([text], 380) == slow_bpe(text, 380), letters


def test_trainer_pushes_only_new_pairs(monkeypatch):
    # long pieces that occur once: pushing all pairs of a touched piece took minutes for 2 MB
    pushes = []

    def heappush(heap, entry):
        pushes.append(entry)
        push(heap, entry)
    push = heapq.heappush
    monkeypatch.setattr(heapq, "heappush", heappush)
    dna = "".join(random.Random(0).choices("ACGT", k=100_000))
    assert len(train_bpe([dna], 1000)) == 999
    assert len(pushes) < 50_000  # with all pairs: millions


def test_trainer_shows_a_bar(capsys):
    train_bpe([TEXT * 3], 300, quiet=False)
    assert "bpe: 100%" in capsys.readouterr().err
    train_bpe([TEXT * 3], 300)
    assert capsys.readouterr().err == ""


def test_trainer_without_text():
    assert train_bpe([], 300) == train_bpe([""], 300) == [bytes([b]) for b in range(256)]


def test_trainer_sizes():
    assert len(train_bpe([TEXT * 3], 257)) == 256
    assert len(train_bpe([TEXT * 3], 300)) == 299
    ranks = train_bpe(["ab ab"], 300)  # no other pair occurs twice
    assert len(ranks) == 257 and ranks[-1] == b"ab"


def test_bpe_compresses_and_indentation_is_one_token():
    tokenizer = Tokenizer(bpe_spec(train_bpe([TEXT * 3], 320)))
    assert len(tokenizer.encode(TEXT)) < 0.7 * len(TEXT)
    ids = tokenizer.encode(":\n        print")
    assert b"\n        " in [tokenizer.token_bytes(i) for i in ids]


def tokenizer_of(kind):
    if kind == "gpt2":
        if not os.environ.get("TIKTOKEN_CACHE_DIR"):
            pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with GPT-2's files to run this")
        return Tokenizer({"kind": "gpt2"})
    return Tokenizer({"kind": "bytes"} if kind == "bytes" else bpe_spec(train_bpe([TEXT * 3], 400)))


@pytest.mark.parametrize("kind,vocab_size", [("bytes", 257), ("bpe", None), ("gpt2", 50257)])
def test_tokenizer_round_trip(kind, vocab_size):
    tokenizer = tokenizer_of(kind)
    assert tokenizer.vocab_size == (vocab_size or len(tokenizer.spec["ranks"]) + 1)
    assert tokenizer.eot == tokenizer.vocab_size - 1
    every = "".join(map(chr, range(0x3000))) + "日本語 🙂 한국어 e\u0301 \U0010ffff"
    long = " " * 500 + "x" * 500 + "\n" * 300 + "-" * 300
    for text in ["", TEXT, every, "<|endoftext|>", long, "\r\n \r\n\t\x1c\x85 \u2028"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
        assert tokenizer.eot not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
    ids = [tokenizer.encode(TEXT), [], tokenizer.encode(every)]
    assert tokenizer.encode_batch([TEXT, "", every]) == ids
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"
    half = next(i for i in range(256) if tokenizer.token_bytes(i) == "é".encode()[:1])
    assert tokenizer.decode([half]) == "\ufffd"
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="position 1: surrogates not allowed"):
            call("a\ud800b")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.token_bytes(bad)
    # the spec survives JSON, and pieces of a long text join to what the whole text gives
    again = Tokenizer(json.loads(json.dumps(tokenizer.spec)))
    text = ""
    for i in range(12000):
        text += f"line {i} of a ({i % 13}) long text.   \n\n\t{'  ' * (i % 5)}end{i}\r\n"
    pieces = SECTION.findall(text)
    assert len(pieces) > 1 and "".join(pieces) == text
    for before, after in pairwise(pieces):
        assert after[0] in "\r\n" and not before[-1].isspace()
    assert list(chain(*again.encode_batch(pieces))) == tokenizer.encode(text)


RANKS = bpe_spec(train_bpe([], 257))["ranks"]


@pytest.mark.parametrize("spec", [
    None, {}, {"kind": "words"}, ["bpe"], {"kind": "bpe"}, {"kind": "bpe", "pattern": "."},
    {"kind": "bpe", "pattern": ".", "ranks": ["YQ=="]},
    {"kind": "bpe", "pattern": ".", "ranks": ["YQ=="] * 256},
    {"kind": "bpe", "pattern": ".", "ranks": RANKS + ["YQ=="]},    # a token twice
    {"kind": "bpe", "pattern": ".", "ranks": RANKS + [""]},
    {"kind": "bpe", "pattern": ".", "ranks": RANKS + ["YWI=?"]},      # no base64
    {"kind": "bpe", "pattern": ".", "ranks": RANKS + [3]},
    {"kind": "bpe", "pattern": ".", "ranks": 3},
    {"kind": "bpe", "pattern": "(", "ranks": RANKS},
    {"kind": "bpe", "pattern": None, "ranks": RANKS},
])
def test_bad_spec(spec):
    with pytest.raises(UserError, match="unknown tokenizer|damaged"):
        Tokenizer(spec)


def test_gpt2_out_of_reach(monkeypatch):
    import tiktoken

    def no_network(name):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR.*bytes.*bpe:N"):
        Tokenizer({"kind": "gpt2"})
