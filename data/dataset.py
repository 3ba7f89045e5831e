"""A prepared dataset is a folder: train.bin and val.bin (token ids, uint16 little-endian),
meta.json (counts, the text's source and sha256) and, for bpe:N, tokenizer.json. prepare.py writes
it; it is opened and checked here.
"""
import json
from pathlib import Path

import numpy as np

from data.errors import UserError
from data.tokenizer import Tokenizer

FILES = {"train.bin", "val.bin", "meta.json", "tokenizer.json"}
META_KEYS = {
    "tokenizer": dict, "vocab_size": int, "eot": int, "source": str, "sha256": str, "python": str,
    "train_tokens": int, "val_tokens": int, "train_bytes": int, "val_bytes": int,
    "documents": int, "val_documents": int,
}
UNKNOWN_BYTES = ("train_bytes", "val_bytes")  # None where GPT-2's vocabulary was not at hand
IN_MEMORY = 10**9  # bytes of ids; a longer file stays on disk and is mapped


def read_json(path):
    if not path.exists():
        raise UserError(f"{path.name} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is damaged ({error})") from None


def check_meta(meta):
    """Raise UserError unless meta.json holds everything that training and evaluation use, in the
    right types."""
    if not isinstance(meta, dict):
        raise UserError(f"meta.json is damaged (it holds {meta!r:.60}, expected an object)")
    missing = [key for key in META_KEYS if key not in meta]
    if missing:
        raise UserError(f"meta.json lacks {', '.join(missing)}")
    for key, kind in META_KEYS.items():
        value = meta[key]
        if key in UNKNOWN_BYTES and value is None:
            continue
        least = 1 if key in UNKNOWN_BYTES else 0
        if type(value) is not kind or kind is int and value < least:
            raise UserError(f"meta.json says {value!r:.60} for {key}, expected a {kind.__name__} "
                            "in range")


def read_ids(path, count, vocab_size):
    """The ids of train.bin or val.bin."""
    if not path.exists():
        raise UserError(f"{path.name} is missing")
    size = path.stat().st_size
    if size != 2 * count or count == 0:
        raise UserError(f"{path.name} has {size:,} bytes, but meta.json says {2 * count:,}")
    # a mapped file that another program cuts short would end training without a message
    if size < IN_MEMORY:
        ids = np.fromfile(path, dtype="<u2")
    else:
        ids = np.memmap(path, dtype="<u2", mode="r")
    if ids.max() >= vocab_size:
        raise UserError(f"{path.name} holds the id {ids.max()}, but the vocabulary has "
                        f"{vocab_size:,}")
    return ids


def open_files(folder):
    meta = read_json(folder / "meta.json")
    check_meta(meta)
    if "file" in meta["tokenizer"]:
        meta["tokenizer"] = read_json(folder / str(meta["tokenizer"]["file"]))
    train, val = [read_ids(folder / f"{name}.bin", meta[f"{name}_tokens"], meta["vocab_size"])
                  for name in ("train", "val")]
    return train, val, meta


def load_dataset(folder):
    """(train, val, meta) of a prepared folder: two arrays of uint16 ids and the dict of meta.json,
    in which meta["tokenizer"] is the full spec. Raises UserError when something is missing, damaged
    or disagrees.
    """
    folder = Path(folder)
    again = "prepare it again with `python data/prepare.py`"
    try:
        train, val, meta = open_files(folder)
    except UserError as error:
        raise UserError(f"{folder} is not a complete dataset: {error}; {again}") from None
    except OSError as error:
        raise UserError(f"can't read {error.filename or folder} "
                        f"({error.strerror or error})") from None
    try:
        # now: a tokenizer that can't be built must not be found after training
        tokenizer = Tokenizer(meta["tokenizer"])
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if (tokenizer.vocab_size, tokenizer.eot) != (meta["vocab_size"], meta["eot"]):
        raise UserError(f"{folder}: meta.json says {meta['vocab_size']:,} ids with end-of-text "
                        f"{meta['eot']:,}, but its tokenizer has {tokenizer.vocab_size:,} with "
                        f"{tokenizer.eot:,}; {again}")
    return train, val, meta
