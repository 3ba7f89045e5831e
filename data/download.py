"""The published texts: TinyShakespeare, and FineWeb-Edu as shards of GPT-2 tokens. Each file is
kept in data/downloads, resumed after a break, and checked as a whole before it gets its name.
"""
import contextlib
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.errors import UserError
from data.temporary import leftovers, temporary

# kept between runs; may be deleted at any time
DOWNLOADS = Path(__file__).resolve().parent / "downloads"
SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/finewebedu10B-gpt2/resolve/main/"
FINEWEB_SHARDS = 99
GPT2_EOT = 50256
OFFLINE_HINT = "without a network `python data/prepare.py` (stories) and your own text file work"


def transfer(url, part, name, quiet):
    """Append to part what it lacks of url, or write all of it where the server can't resume."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        content_range = answer.headers.get("Content-Range", "")
        if answer.status != 206 or not content_range.startswith(f"bytes {start}-"):
            start = 0  # a server without Range sends all of it again
        size = answer.headers.get("Content-Length")
        total = None if size is None else start + int(size)
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=quiet)
        with bar, open(part, "ab" if start else "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"it broke off after {part.stat().st_size:,} of {total:,} bytes")


def is_whole(path, check):
    """Whether a file is there and right."""
    try:
        check(path)
    except (UserError, FileNotFoundError):
        return False
    return True


def download(url, path, check, quiet=False):
    """Fetch url into path, unless it is there. A cut-off transfer stays as path.part and is resumed
    by the next call; while it runs, its name is this process's own.

    `check(file)` raises UserError for a wrong file: one that is there is fetched again, one that
    came is deleted. Raises UserError for a wrong answer, and for none (no network, 404, a full
    disk).
    """
    if is_whole(path, check):
        return
    rest = path.with_name(path.name + ".part")
    part = temporary(path, "part")
    for left in [rest, *leftovers(path, "part")]:
        with contextlib.suppress(FileNotFoundError):  # another run may have taken it
            os.replace(left, part)
            break
    try:
        if not is_whole(part, check):  # it is, if killed between its last byte and its name
            fetch(url, path, part, check, quiet)
        os.replace(part, path)
    finally:
        if part.exists():
            os.replace(part, rest)


def fetch(url, path, part, check, quiet):
    """Complete part, which is deleted if it is wrong."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        transfer(url, part, path.name, quiet)
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416:  # nothing is left to send, but the part is wrong
            part.unlink(missing_ok=True)
        raise UserError(f"can't download {url} to {path.parent} ({error}). Run the same command "
                        f"again, which resumes where it stopped, or place the file at {path} by "
                        f"hand; {OFFLINE_HINT}") from None
    try:
        check(part)
    except UserError as error:
        part.unlink()
        raise UserError(f"{url} sent something else ({error}); it was deleted. Try again, or "
                        f"place the right file at {path}; {OFFLINE_HINT}") from None


def check_shakespeare(path):
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise UserError(f"its sha256 is {found}, expected {SHAKESPEARE_SHA256}")


def fetch_shakespeare(quiet):
    path = DOWNLOADS / "tinyshakespeare.txt"
    download(SHAKESPEARE_URL, path, check_shakespeare, quiet)
    return path


def read_shard(path):
    """The ids of a published shard: 256 int32 (20240520, 1, count, 0...), then uint16 ids. Raises
    UserError."""
    header = np.fromfile(path, dtype="<i4", count=256)
    size = path.stat().st_size
    if header[:2].tolist() != [20240520, 1] or size < 1026:
        raise UserError(f"no token shard: {size:,} bytes that start with {header[:2].tolist()}, "
                        "expected [20240520, 1] and ids")
    if size != 1024 + 2 * int(header[2]):
        raise UserError(f"{size:,} bytes, but its header says {header[2]:,} ids")
    ids = np.fromfile(path, dtype="<u2", offset=1024)
    if ids.max() > GPT2_EOT:
        raise UserError(f"it holds the id {ids.max()}, expected at most {GPT2_EOT}")
    return ids


def fetch_fineweb(shards, quiet):
    """Paths of the validation shard and of that many training shards."""
    names = ["finewebedu_val_000000.bin"]
    names += [f"finewebedu_train_{i:06d}.bin" for i in range(1, shards + 1)]
    for name in names:
        download(FINEWEB_URL + name, DOWNLOADS / name, read_shard, quiet)
    return [DOWNLOADS / name for name in names]
