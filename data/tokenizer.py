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
from collections import Counter, defaultdict
from itertools import pairwise

EOT_TEXT = "<|endoftext|>"
# how text is cut before merges are learned; a token never crosses these cuts. every character fits one of the
# alternatives (tiktoken drops what none matches), and the bounds keep one endless run from costing quadratic time
PATTERN = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]{1,64}|"   # a word with the space, dot, underscore... before it
    r"\p{N}{1,3}|"                                  # up to three digits
    r" ?[^\s\p{L}\p{M}\p{N}]{1,64}|"                # punctuation with the space before it
    r"\s{0,64}[\r\n][^\S\r\n]{0,64}|"               # line ends together with the next line's indentation
    r"[^\S\r\n]{1,64}(?!\S)|[^\S\r\n]{1,64}"        # other whitespace; the last space stays with the word after it
)
# where a long text is cut for encoding: before a line end after a visible character, which no token here ever crosses
PIECE = re.compile(r"(?s).{1,262144}(?:(?<=\S)(?=\r?\n)|\Z)|.{1,262144}")


class Tokenizer:
    """Text <-> ids. `spec` is plain JSON and all that is needed to build the same tokenizer again:
    {"kind": "bytes"} | {"kind": "gpt2"} | {"kind": "bpe", "pattern": regex, "ranks": [base64 of a token's bytes, by id]}.

    Attributes: vocab_size (end-of-text included), eot (its id, the last one), tokens (bytes by id), spec.
    Raises ValueError for a spec that can't work, ConnectionError when GPT-2's files can't be fetched.
    """

    def __init__(self, spec):
        kind = spec.get("kind") if isinstance(spec, dict) else None
        self.spec, self.engine = spec, None
        if kind == "bytes":
            tokens = [bytes([i]) for i in range(256)]
        elif kind == "gpt2":
            self.engine = load_gpt2()
            tokens = [self.engine.decode_single_token_bytes(i) for i in range(self.engine.eot_token)]
        elif kind == "bpe":
            tokens = [base64.b64decode(rank) for rank in spec["ranks"]]
            ranks = {token: i for i, token in enumerate(tokens)}
            # tiktoken's engine panics without them, and no `except Exception` would catch it
            if len(ranks) != len(tokens) or any(bytes([i]) not in ranks for i in range(256)):
                raise ValueError("this bpe vocabulary is damaged: expected 256 single bytes and no token twice; "
                                 "prepare the data set again")
            import tiktoken  # here, because `bytes` works without it
            self.engine = tiktoken.Encoding("bpe", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                            special_tokens={EOT_TEXT: len(tokens)})
        else:
            raise ValueError(f"unknown tokenizer {spec!r:.80}: expected a dict whose kind is bytes, gpt2 or bpe")
        self.eot = len(tokens)
        self.vocab_size = len(tokens) + 1
        self.tokens = tokens + [EOT_TEXT.encode()]

    def encode(self, text):
        """Ids of a string, never the end-of-text id. Raises ValueError for text that UTF-8 can't hold."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """The same for a list of strings, in threads: a list of lists of ids."""
        data = [text.encode("utf-8") for text in texts]  # fails for half a surrogate pair; tiktoken would replace it
        if self.engine is None:
            return [list(text) for text in data]
        return self.engine.encode_ordinary_batch(texts, num_threads=min(16, os.cpu_count() or 1))

    def decode(self, ids):
        """Text of ids. Bytes that are no UTF-8, and ids past the vocabulary (a model's may be padded), become U+FFFD."""
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
        raise ConnectionError(f"tiktoken can't load GPT-2's vocabulary ({type(error).__name__}): connect once, or set "
                              "TIKTOKEN_CACHE_DIR to a folder that holds its files; `bytes` and `bpe:N` work offline"
                              ) from None


def parse_tokenizer(name):
    """'bytes' | 'gpt2' | 'bpe:N' -> (kind, N or None). Raises ValueError."""
    if name in ("bytes", "gpt2"):
        return name, None
    match = re.fullmatch(r"bpe:(\d+)", name, re.ASCII)
    if match and 257 <= int(match[1]) <= 65536:  # 256 bytes + end-of-text; uint16
        return "bpe", int(match[1])
    raise ValueError(f"unknown tokenizer {name!r}: expected bytes, gpt2 or bpe:N with N from 257 to 65536")


def bpe_spec(ranks):
    """The spec of a vocabulary that `train_bpe` learned."""
    return {"kind": "bpe", "pattern": PATTERN, "ranks": [base64.b64encode(token).decode("ascii") for token in ranks]}


def train_bpe(texts, vocab_size):
    """Learn byte-pair merges (Sennrich et al. 2016) from strings.

    Returns the tokens' bytes by rank: all 256 bytes, then one token per merge; vocab_size - 1 of them, as end-of-text
    takes the last id, or fewer when no pair is left that occurs twice. The most frequent pair is merged first;
    among equals the smallest pair of bytes, so that the same text gives the same vocabulary everywhere.
    """
    import regex  # tiktoken's own dependency: re knows no \p{L}
    pattern = regex.compile(PATTERN)
    pieces = Counter()
    for text in texts:
        pieces.update(pattern.findall(text))

    # every distinct piece once, as a list of tokens, with how often it occurs
    words = [[bytes([b]) for b in piece.encode("utf-8")] for piece in pieces]
    times = list(pieces.values())
    counts = Counter()          # pair of tokens -> occurrences in the text
    where = defaultdict(set)    # pair -> the words that hold it (or once held it)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += times[i]
            where[pair].add(i)

    ranks = [bytes([b]) for b in range(256)]
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size - 1:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            continue            # an old entry; a newer one of this pair is in the heap
        if -count < 2:
            break
        # never a token that we have: the same bytes between the same cuts always merge along the same pairs
        ranks.append(pair[0] + pair[1])
        changed = set()
        for i in where.pop(pair):
            merged = merge(words[i], pair)
            for old in pairwise(words[i]):
                counts[old] -= times[i]
                changed.add(old)
            for new in pairwise(merged):
                counts[new] += times[i]
                where[new].add(i)
                changed.add(new)
            words[i] = merged
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], other))
    return ranks


def merge(word, pair):
    merged, i = [], 0
    while i < len(word):
        width = 2 if tuple(word[i:i + 2]) == pair else 1
        merged.append(b"".join(word[i:i + width]))
        i += width
    return merged
