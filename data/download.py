"""The published texts: TinyShakespeare, and FineWeb-Edu as shards of GPT-2 tokens. Each file is kept in data/downloads,
resumed after a break, and checked as a whole before it gets its name.
"""
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

DOWNLOADS = Path(__file__).resolve().parent / "downloads"  # kept between runs; may be deleted at any time
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/finewebedu10B-gpt2/resolve/main/"
FINEWEB_SHARDS = 99
GPT2_EOT = 50256
OFFLINE_HINT = "without a network `python data/prepare.py python` and your own text file work"


def download(url, path, check, quiet=False):
    """Fetch url into path, unless it is there. A cut-off transfer stays as path.part and is resumed by the next call.

    `check(file)` raises ValueError for a wrong file: one that is there is fetched anew, one that came is deleted.
    Raises ValueError for a wrong answer, ConnectionError for none (no network, 404, a full disk).
    """
    if path.exists():
        try:
            return check(path)
        except ValueError:
            pass  # damaged: once more
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            start = start if resumed else 0  # a server without Range sends all of it again
            total = start + int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
            with open(part, "ab" if resumed else "wb") as file, tqdm(
                    total=total, initial=start, unit="B", unit_scale=True, desc=path.name, disable=quiet) as bar:
                while block := answer.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        if total is not None and part.stat().st_size < total:
            raise ConnectionError(f"it broke off after {part.stat().st_size:,} of {total:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416:  # nothing is left to send: the part is unchecked, or of another file
            part.unlink(missing_ok=True)
        raise ConnectionError(f"can't download {url} ({error}). Run the same command again, which goes on where it "
                              f"stopped, or place the file at {path} by hand; {OFFLINE_HINT}") from None
    try:
        check(part)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{url} sent something else ({error}); it was deleted. Try again, or place the right file at "
                         f"{path}; {OFFLINE_HINT}") from None
    os.replace(part, path)


def check_shakespeare(path):
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise ValueError(f"its sha256 is {found}, expected {SHAKESPEARE_SHA256}")


def fetch_shakespeare(quiet):
    path = DOWNLOADS / "tinyshakespeare.txt"
    download(SHAKESPEARE_URL, path, check_shakespeare, quiet)
    return path


def read_shard(path):
    """The ids of a published shard: 256 int32 (20240520, 1, count, 0...), then uint16 ids. Raises ValueError."""
    header, size = np.fromfile(path, dtype="<i4", count=256), path.stat().st_size
    if header[:2].tolist() != [20240520, 1] or size < 1026:
        raise ValueError(f"no token shard: {size:,} bytes that start with {header[:2].tolist()}, "
                         "expected [20240520, 1] and ids")
    if size != 1024 + 2 * int(header[2]):
        raise ValueError(f"{size:,} bytes, but its header tells of {header[2]:,} ids")
    ids = np.fromfile(path, dtype="<u2", offset=1024)
    if ids.max() > GPT2_EOT:
        raise ValueError(f"it holds the id {ids.max()}, expected at most {GPT2_EOT}")
    return ids


def fetch_fineweb(shards, quiet):
    """Paths of the validation shard and of that many training shards."""
    names = ["finewebedu_val_000000.bin"] + [f"finewebedu_train_{i:06d}.bin" for i in range(1, shards + 1)]
    for name in names:
        download(FINEWEB_URL + name, DOWNLOADS / name, read_shard, quiet)
    return [DOWNLOADS / name for name in names]
