"""Text <-> ids: single bytes, a byte-pair vocabulary learned here (`train_bpe`), or GPT-2's.

    ranks = train_bpe(texts, 1024)
    tokenizer = Tokenizer(bpe_spec(ranks))
    tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"

The last id is always end-of-text: prepare.py puts it after documents, and no text encodes to it.
"""
import base64
import heapq
import os
import re
from collections import Counter
from functools import cached_property

import numpy as np
from tqdm import tqdm

from data.errors import UserError
from data.reader import EOT_TEXT

# how text is cut before merges are learned; a token never crosses these cuts. every character fits
# one of the alternatives (tiktoken drops what none matches), and the bounds keep one endless run
# from costing quadratic time
PATTERN = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]{1,64}|"   # letters with the space, dot... before them
    r"\p{N}{1,3}|"                                  # up to three digits
    r" ?[^\s\p{L}\p{M}\p{N}]{1,64}|"                # punctuation with the space before it
    r"\s{0,64}[\r\n][^\S\r\n]{0,64}|"               # line ends with the next line's indentation
    r"[^\S\r\n]{1,64}(?!\S)|[^\S\r\n]{1,64}"        # other whitespace, without a last space
)
# where a long text is cut for encoding: before a line end after a visible character, which no token
# crosses
SECTION = re.compile(r"(?s).{1,262144}(?:(?<=\S)(?=\r?\n)|\Z)|.{1,262144}")


class Tokenizer:
    """Text <-> ids. `spec` is plain JSON and all that is needed to build the same tokenizer again:
    {"kind": "bytes"} | {"kind": "gpt2"} |
    {"kind": "bpe", "pattern": regex, "ranks": [base64 of a token's bytes, by id]} |
    {"kind": "pretrained", ..} (data/pretrained.py makes it).

    Attributes: vocab_size (end-of-text included), eot (its id, the last one but for pretrained),
    end (the id after which a model's answer is over: eot, but for pretrained), tokens (bytes by
    id), spec. Raises UserError for a spec that can't work, and when GPT-2's files can't be fetched.
    """

    def __init__(self, spec):
        kind = spec.get("kind") if isinstance(spec, dict) else None
        self.spec = spec
        if kind == "bytes":
            tokens = [bytes([i]) for i in range(256)]
        elif kind == "gpt2":
            token_bytes = self.engine.decode_single_token_bytes
            tokens = [token_bytes(i) for i in range(self.engine.eot_token)]
        elif kind == "bpe":
            tokens = bpe_tokens(spec)
        elif kind == "pretrained":
            self.order, tokens = pretrained_order(spec)
        else:
            raise UserError(f"unknown tokenizer {spec!r:.80}: expected a dict whose kind is bytes, "
                            "gpt2, bpe or pretrained")
        self.eot = spec.get("eot", len(tokens))
        self.end = spec.get("end", self.eot)
        self.tokens = tokens if kind == "pretrained" else tokens + [EOT_TEXT.encode()]
        self.vocab_size = len(self.tokens)
        if kind == "bpe" and spec["pattern"] != PATTERN:
            self.engine  # a pattern that isn't known to work is compiled now

    @cached_property
    def engine(self):
        """What encodes, or None for bytes. Built at first use: its pattern takes 0.2 s."""
        if self.spec["kind"] == "bpe":
            return load_bpe(self.spec["pattern"], self.tokens[:-1])
        if self.spec["kind"] == "pretrained":
            single = [bytes([byte]) for byte in range(256)]
            merged = [self.tokens[i] for i in self.order[256:]]
            return load_bpe(self.spec["pattern"], single + merged)
        return load_gpt2() if self.spec["kind"] == "gpt2" else None

    def encode(self, text):
        """Ids of a string, never the end-of-text id. Raises UserError for text that UTF-8 can't
        hold."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """The same for a list of strings, in threads: a list of lists of ids."""
        try:  # half a surrogate pair, which tiktoken would replace: of bytes in a command line
            data = [text.encode("utf-8") for text in texts]
        except UnicodeEncodeError as error:
            raise UserError(f"the text can't be UTF-8 ({error}); type or save it again as "
                            "UTF-8") from None
        if self.engine is None:
            return [list(text) for text in data]
        threads = min(16, os.cpu_count() or 1)
        rows = self.engine.encode_ordinary_batch(texts, num_threads=threads)
        if self.spec["kind"] == "pretrained":
            rows = [[self.order[rank] for rank in row] for row in rows]
        return rows

    def encode_special(self, form, text=""):
        """Ids of a form (of a pretrained vocabulary) in which special tokens count as such; {}
        stands for the text, in which none does."""
        special = self.spec["special"]
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, special)) + ")", form):
            if part in special:
                ids.append(special[part])
            else:
                ids += self.encode(part.replace("{}", text))
        return ids

    def encode_chat(self, text):
        """Ids of a user's message in the model's own template, up to where its answer begins."""
        if not self.spec.get("chat"):
            raise UserError("this model has no chat template; give it a text to continue")
        return self.encode_special(self.spec["chat"], text)

    def decode(self, ids):
        """Text of ids. Bytes that are no UTF-8, and ids past the vocabulary (a model's may be
        padded), become U+FFFD."""
        unknown = "\ufffd".encode()
        data = b"".join(self.tokens[i] if 0 <= i < self.vocab_size else unknown for i in ids)
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, id):
        """The bytes that one id stands for. Raises ValueError outside 0..vocab_size-1."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"id {id} is outside the vocabulary 0..{self.vocab_size - 1}")
        return self.tokens[id]


def load_gpt2():
    import tiktoken  # it downloads GPT-2's files on first use
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, a wrong hash
        raise UserError(f"tiktoken can't load GPT-2's vocabulary ({type(error).__name__}): "
                        "connect once, or set TIKTOKEN_CACHE_DIR to a folder that holds its files; "
                        "`bytes` and `bpe:N` work offline") from None


def stored_tokens(spec, name):
    try:
        return [base64.b64decode(token, validate=True) for token in spec[name]]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(error) from None


def pretrained_order(spec):
    """(ids by rank: those of the 256 bytes, then those of the merged tokens; the tokens' bytes by
    id). Raises UserError for a vocabulary that can't work."""
    tokens = stored_tokens(spec, "tokens")
    order = spec.get("order", [])
    if len(order) < 256 or not all(0 <= i < len(tokens) for i in order):
        raise damaged("expected the ids of 256 bytes and of the merged tokens")
    if len({tokens[i] for i in order[256:]}) != len(order) - 256:
        raise damaged("expected no token twice")
    return order, tokens


def bpe_tokens(spec):
    """The tokens' bytes by id. Raises UserError for a vocabulary that can't work."""
    tokens = stored_tokens(spec, "ranks")
    # tiktoken's engine panics without these, and no `except Exception` would catch it
    known = set(tokens)
    all_bytes = all(bytes([i]) in known for i in range(256))
    if len(known) != len(tokens) or b"" in known or not all_bytes:
        raise damaged("expected 256 single bytes and no token twice")
    if not isinstance(spec.get("pattern"), str):
        raise damaged("it has no pattern")
    return tokens


def damaged(reason):
    return UserError(f"this bpe vocabulary is damaged ({reason}); prepare the dataset again, or "
                     "take another copy of the checkpoint")


def load_bpe(pattern, tokens):
    import tiktoken  # here, because `bytes` works without it
    ranks = {token: i for i, token in enumerate(tokens)}
    try:
        return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={EOT_TEXT: len(tokens)})
    except ValueError as error:  # the pattern is no regular expression
        raise damaged(error) from None


def parse_tokenizer(name):
    """'bytes' | 'gpt2' | 'bpe:N' -> (kind, N or None). Raises UserError."""
    if name in ("bytes", "gpt2"):
        return name, None
    match = re.fullmatch(r"bpe:(\d{1,6})", name, re.ASCII)
    if match and 257 <= int(match[1]) <= 65536:  # 256 bytes + end-of-text; uint16
        return "bpe", int(match[1])
    raise UserError(f"unknown tokenizer {name!r}: expected bytes, gpt2 or bpe:N with N from 257 "
                    "to 65536")


def bpe_spec(ranks):
    """The spec of a vocabulary that `train_bpe` learned."""
    encoded = [base64.b64encode(token).decode("ascii") for token in ranks]
    return {"kind": "bpe", "pattern": PATTERN, "ranks": encoded}


# -----------------------------------------------------------------------------
# learning a byte-pair vocabulary
#
# all distinct pieces of the text (what PATTERN cuts) lie one after the other in an array with a
# cell for each byte. a token's id stands in the first and in the last cell of its bytes, so that
# both neighbours of a token are one look-up away. merging a pair touches the places of that pair
# alone, all of them at once

EMPTY = 65535  # no token: between two pieces, or where one began that is merged; ids end before


def byte_cells(texts):
    """-> (ids: each distinct piece as bytes after an EMPTY cell, times: how often the cell's piece
    occurs)"""
    import regex  # tiktoken's own dependency: re knows no \p{L}
    pattern = regex.compile(PATTERN)
    pieces = Counter()
    for text in texts:
        pieces.update(pattern.findall(text))
    data = [piece.encode("utf-8") for piece in pieces]
    sizes = np.array([len(piece) + 1 for piece in data], dtype=np.int64)
    cells = b"".join(b"\0" + piece for piece in data) + b"\0"
    ids = np.frombuffer(cells, dtype=np.uint8).astype(np.uint16)
    ids[np.cumsum(np.append(0, sizes))] = EMPTY
    return ids, np.repeat(np.fromiter(pieces.values(), dtype=np.int32), sizes)


def by_key(keys, places, times):
    """Group places by key -> list of (key, occurrences in the text, its places)."""
    if not len(keys):
        return []
    order = np.argsort(keys, kind="stable")
    keys, places = keys[order], places[order]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    totals = np.add.reduceat(times[places], starts, dtype=np.int64)
    ends = np.append(starts[1:], len(keys))
    return [(key, total, places[start:end])
            for key, total, start, end in zip(keys[starts].tolist(), totals.tolist(), starts, ends)]


def without_overlaps(places, size):
    """Of places in a run (`aaa` holds the pair (a, a) twice) every other one, from the left."""
    places = np.sort(places)
    is_start = np.append(True, np.diff(places) != size)
    run_start = np.maximum.accumulate(np.where(is_start, np.arange(len(places)), 0))
    return places[(np.arange(len(places)) - run_start) % 2 == 0]


def merge_pair(ids, times, places, pair, new, sizes):
    """Write token `new` over a pair in all the places where its left token begins.
    -> (lost, gained): the pairs on both sides, (pair, count) before, (pair, count, places) after.
    """
    left, right = pair
    still_there = (ids[places] == left) & (ids[places + sizes[left]] == right)
    places = places[still_there]
    if left == right:
        places = without_overlaps(places, sizes[left])
    middle = places + sizes[left]
    end = places + sizes[new]
    old_before = ids[places - 1]
    old_after = ids[end]
    ids[middle] = EMPTY  # no token begins here any more
    ids[places] = new
    ids[end - 1] = new
    before = ids[places - 1]
    after = ids[end]

    # where two merged pairs touch, the pair between them counts once: as the one before the second
    has_before = before != EMPTY
    has_after = (after != EMPTY) & (after != new)
    first = places[has_before]
    last = places[has_after]
    before = before[has_before]
    after = after[has_after]
    lost, gained = [], []
    for other, count, _ in by_key(old_before[has_before], first, times):
        lost.append(((other, left), count))
    for other, count, _ in by_key(old_after[has_after], last, times):
        lost.append(((right, other), count))
    for other, count, begins in by_key(before, first - sizes[before], times):
        gained.append(((other, new), count, begins))
    for other, count, begins in by_key(after, last, times):
        gained.append(((new, other), count, begins))
    return lost, gained


def train_bpe(texts, vocab_size, quiet=True):
    """Learn byte-pair merges (Sennrich et al. 2016) from strings.

    Returns the tokens' bytes by rank: all 256 bytes, then one token per merge; vocab_size - 1 of
    them, as end-of-text takes the last id, or fewer when no pair is left that occurs twice. The
    most frequent pair is merged first; among equals the smallest pair of bytes, so that the same
    text gives the same vocabulary everywhere.
    """
    ids, times = byte_cells(texts)
    tokens = [bytes([b]) for b in range(256)]
    sizes = np.ones(vocab_size, dtype=np.int32)  # bytes of a token, by id
    counts = {}  # pair of ids -> its occurrences in the text
    where = {}   # pair -> the cells where it begins, or began until another merge took a part
    heap = []    # (-count, left bytes, right bytes, pair); counts only fall, old ones are too high

    def add(pair, count, places):
        if count > 1:  # one that occurs once is never merged
            counts[pair] = count
            where[pair] = places
            heapq.heappush(heap, (-count, tokens[pair[0]], tokens[pair[1]], pair))

    begins = np.flatnonzero((ids[:-1] != EMPTY) & (ids[1:] != EMPTY)).astype(np.int32)
    for key, count, places in by_key(ids[begins] * 256 + ids[begins + 1], begins, times):
        add(divmod(key, 256), count, places)
    del begins

    bar = tqdm(total=vocab_size - 257, desc="bpe", unit=" token", disable=quiet)
    while heap and len(tokens) < vocab_size - 1:
        count, _, _, pair = heapq.heappop(heap)
        if counts[pair] != -count:
            if counts[pair] > 1:
                heapq.heappush(heap, (-counts[pair], tokens[pair[0]], tokens[pair[1]], pair))
            continue
        # never a token that we have: the same bytes between the same cuts always merge along the
        # same pairs
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        sizes[new] = len(tokens[new])
        lost, gained = merge_pair(ids, times, where.pop(pair), pair, new, sizes)
        del counts[pair]
        for old, count in lost:
            if old in counts:
                counts[old] -= count
        for entry in gained:
            add(*entry)
        bar.update()
    bar.close()
    return tokens
