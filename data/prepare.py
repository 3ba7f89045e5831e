"""Text -> token files. Makes a data-set folder with train.bin, val.bin (ids, uint16 little-endian) and meta.json.

    python data/prepare.py                              stories: the children's books in this folder, bpe:2048
    python data/prepare.py python                       the standard library of this Python, bpe:2048
    python data/prepare.py python+packages              the same and the .py files of the installed packages
    python data/prepare.py shakespeare                  TinyShakespeare (1.1 MB download), bytes
    python data/prepare.py fineweb-edu --shards 10      10 x 100M GPT-2 tokens (200 MB each), of 99
    python data/prepare.py my.txt                       a file, a .jsonl with "text" fields or a folder of them, bpe:4096
    python data/prepare.py my.txt.xz --val other.txt    .xz and .gz are read as they are; the validation text is given
    python data/prepare.py my.txt --tokenizer bpe:8192 --out data/mine

Tokenizers: `bytes` (257 ids), `bpe:N` (N ids, learned here on the training text), `gpt2` (50,257 ids, its files are
downloaded on first use). The last id is always end-of-text, which follows every document; a text can never produce it.
In plain text a line that is exactly <|endoftext|> separates two documents.

Which documents are for validation depends on nothing but their own text (5 % of all hashes), so more text never moves a
document across. If one split would be empty, the first 90 % of the characters are for training and the rest for validation.
From Python: `folder = prepare("stories")`, then `train, val, meta = load_dataset(folder)` and `Tokenizer(meta["tokenizer"])`.
"""
import argparse
import gzip
import hashlib
import json
import lzma
import os
import platform
import shutil
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __package__:  # `from data.prepare import prepare`
    from .download import FINEWEB_SHARDS, GPT2_EOT, fetch_fineweb, fetch_shakespeare, read_shard
    from .tokenizer import EOT_TEXT, PIECE, Tokenizer, bpe_spec, parse_tokenizer, train_bpe
else:            # `python data/prepare.py`
    from download import FINEWEB_SHARDS, GPT2_EOT, fetch_fineweb, fetch_shakespeare, read_shard
    from tokenizer import EOT_TEXT, PIECE, Tokenizer, bpe_spec, parse_tokenizer, train_bpe

# -----------------------------------------------------------------------------
HERE = Path(__file__).resolve().parent
VAL_FRACTION = 0.05                             # of the documents
TRAIN_CHARACTERS = 0.9                          # of the text, when the split is by position; nanoGPT's numbers
STORIES = (HERE / "stories.train.txt.xz", HERE / "stories.val.txt.xz")  # README.md says what they are
DEFAULT_TOKENIZER = {"stories": "bpe:2048", "python": "bpe:2048", "python+packages": "bpe:2048",
                     "shakespeare": "bytes", "fineweb-edu": "gpt2"}
PATH_TOKENIZER = "bpe:4096"
META_KEYS = ("tokenizer", "vocab_size", "eot", "source", "sha256", "python", "train_tokens", "val_tokens",
             "train_bytes", "val_bytes", "documents", "val_documents")
FILES = {"train.bin", "val.bin", "meta.json", "tokenizer.json"}
# folders left out of the Python sources. tests repeat one call with many literals; encodings, pydoc_data and the
# build settings are tables; idlelib is a window program with its manual; distutils and lib2to3 are gone in newer Pythons
NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
            "encodings", "pydoc_data", "idlelib", "distutils", "lib2to3"}


# -----------------------------------------------------------------------------
# sources. each reader is a generator of documents (str), so that a large text is never in memory at once

def read_python(packages, skipped):
    roots = [sysconfig.get_path("stdlib")]
    if packages:  # pure and compiled packages mostly share one folder
        roots += sorted({os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")})
    for root in map(Path, roots):
        # by POSIX path: the same order on every system
        for name in sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py")):
            if NOT_CODE.isdisjoint(name.split("/")) and "_sysconfigdata" not in name:
                try:
                    yield (root / name).read_bytes().decode("utf-8")  # bytes: open() would turn \r\n into \n
                except UnicodeDecodeError:  # a few old files; none of them matters
                    skipped.add(root / name)


def read_lines(path):
    """The lines of a file with their line ends; .xz and .gz are unpacked on the way."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    offset = 0
    try:
        with opener(path, "rb") as file:
            for line in file:
                yield line.decode("utf-8")
                offset += len(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {offset + error.start} is 0x{line[error.start]:02x}; "
                         "save it again as UTF-8") from None
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged or not a {path.suffix} file ({error}); copy or download it again") from None


def read_text(path):
    document = []
    for line in read_lines(path):
        if line.rstrip("\r\n") == EOT_TEXT:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def read_jsonl(path):
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                text.encode("utf-8")  # "\ud800" is legal JSON, but no text
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f'{path}, line {number}: expected a JSON object with a "text" string '
                                 f"({type(error).__name__}: {error})") from None
            yield text


def read_path(path):
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in sorted(files, key=lambda file: file.relative_to(path).as_posix()):
        suffix = Path(file.name.lower().removesuffix(".xz").removesuffix(".gz")).suffix
        if suffix == ".jsonl":
            yield from read_jsonl(file)
        elif suffix in (".txt", ".md", ".py") or file == path:  # whoever names a file means it
            yield from read_text(file)


def read_source(source, skipped):
    """Documents by name or path, but for blank ones. `skipped` collects the Python files that are not UTF-8."""
    if source in ("python", "python+packages"):
        documents = read_python(source == "python+packages", skipped)
    else:
        documents = read_path(Path(source))
    return (document for document in documents if document.strip())


# -----------------------------------------------------------------------------
# the data set

def is_val(text):
    # by the document's own bytes: neither its place nor its neighbours matter, and copies stay on one side
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") < VAL_FRACTION * 2**64


def read_documents(source, val, skipped):
    """Yield (document, for validation?)."""
    for text in read_source(source, skipped):
        yield text, val is None and is_val(text)
    if val is not None:
        for text in read_source(Path(val), skipped):
            yield text, True


def scan(documents, quiet):
    """The first pass: counts and the hash of the text for meta.json, its characters and bytes."""
    digest, count, val_count, characters, size = hashlib.sha256(), 0, 0, 0, 0
    for text, held_out in tqdm(documents, desc="read", unit=" doc", disable=quiet):
        data = text.encode("utf-8")
        if count:
            digest.update(f"{EOT_TEXT}\n".encode())  # between documents: for one document this is the file's own hash
        digest.update(data)
        count += 1
        val_count += held_out
        characters += len(text)
        size += len(data)
    return {"sha256": digest.hexdigest(), "documents": count, "val_documents": val_count}, characters, size


def split(documents, count, cut):
    """Yield (text, "train" or "val", end-of-text after it?), where a part may be empty.
    `cut` is how many characters are for training, or None for a split by document."""
    start = 0
    for text, held_out in documents:
        if cut is None:
            edge = 0 if held_out else len(text)
        else:
            edge = max(cut - start, 0)
        start += len(text)
        yield text[:edge], "train", count > 1 and edge >= len(text)  # one text alone needs no end-of-text
        yield text[edge:], "val", count > 1


def sample(parts, fraction):
    """That fraction of the training text, spread evenly: slices of 4,096 characters."""
    seen, taken = 0, 0
    for text, name, _ in parts:
        for start in range(0, len(text) if name == "train" else 0, 4096):
            piece = text[start:start + 4096]
            if taken <= seen * fraction:
                yield piece
                taken += len(piece)
            seen += len(piece)


def batches(parts, size=1 << 22):
    """Lists of (piece, name, end-of-text?) of about `size` characters: bounded memory, and work for every thread."""
    batch, waiting = [], 0
    for text, name, ends in parts:
        pieces = PIECE.findall(text)  # none of an empty part
        for number, piece in enumerate(pieces, 1):
            batch.append((piece, name, ends and number == len(pieces)))
            waiting += len(piece)
            if waiting > size:
                yield batch
                batch, waiting = [], 0
    yield batch


def prepare_text(source, tokenizer_name, folder, sample_mb, quiet, val):
    """Write train.bin and val.bin of a text into folder; returns its part of meta.json, and the tokenizer's spec."""
    kind, vocab_size = parse_tokenizer(tokenizer_name)
    tokenizer = Tokenizer({"kind": kind}) if kind != "bpe" else None  # before the long work: gpt2 may be out of reach
    skipped = set()
    meta, characters, size = scan(read_documents(source, val, skipped), quiet)
    count, val_count = meta["documents"], meta["val_documents"]
    if count == 0 or val is not None and val_count in (0, count):
        raise ValueError(f"{val if count and not val_count else source} holds no text: expected .txt, .md, .py "
                         "or .jsonl (or these as .xz or .gz) with a visible character")
    cut = int(TRAIN_CHARACTERS * characters) if val_count in (0, count) else None

    def parts():  # the documents once more, from the start
        return split(read_documents(source, val, skipped), count, cut)

    if kind == "bpe":
        tokenizer = Tokenizer(bpe_spec(train_bpe(sample(parts(), sample_mb * 1e6 / size), vocab_size)))
    meta.update(vocab_size=tokenizer.vocab_size, eot=tokenizer.eot, skipped_files=len(skipped),
                train_tokens=0, val_tokens=0, train_bytes=0, val_bytes=0)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as held_out, tqdm(
            total=size, unit="B", unit_scale=True, desc="encode", disable=quiet) as bar:
        for batch in batches(parts()):
            all_ids = tokenizer.encode_batch([piece for piece, _, _ in batch])
            for ids, (piece, name, ends) in zip(all_ids, batch):
                if ends:
                    ids.append(tokenizer.eot)
                (train if name == "train" else held_out).write(np.array(ids, dtype="<u2").tobytes())
                meta[f"{name}_tokens"] += len(ids)
                meta[f"{name}_bytes"] += len(piece.encode("utf-8"))
                bar.update(len(piece.encode("utf-8")))
    return meta, tokenizer.spec


def prepare_fineweb(shards, folder, quiet):
    """The same for published shards, whose ids are ready: GPT-2's vocabulary only serves to count bytes."""
    val, *train = fetch_fineweb(shards, quiet)
    spec, digest = {"kind": "gpt2"}, hashlib.sha256()  # of the ids: the text never came here
    try:
        lengths = np.array([len(token) for token in Tokenizer(spec).tokens[:GPT2_EOT]])
    except (ConnectionError, ImportError):
        lengths = None
    meta = {"vocab_size": GPT2_EOT + 1, "eot": GPT2_EOT, "skipped_files": 0, "documents": 0}
    for name, paths in (("train", train), ("val", [val])):
        counts = np.zeros(GPT2_EOT + 1, dtype=np.int64)  # how often each id occurs
        with open(folder / f"{name}.bin", "wb") as out:
            for path in tqdm(paths, desc=f"{name}.bin", unit=" shard", disable=quiet):
                ids = read_shard(path)
                out.write(ids)
                digest.update(ids)
                for block in np.array_split(ids, 8):  # bincount needs 8 bytes for each of these ids
                    counts += np.bincount(block, minlength=len(counts))
        meta[f"{name}_tokens"] = int(counts.sum())
        meta[f"{name}_bytes"] = None if lengths is None else int(counts[:GPT2_EOT] @ lengths)
        meta["val_documents"] = int(counts[GPT2_EOT])  # each document starts with one; the last round is val
        meta["documents"] += meta["val_documents"]
    return {**meta, "sha256": digest.hexdigest()}, spec


def prepare(source="stories", tokenizer=None, out=None, shards=1, sample_mb=2.0, quiet=False, val=None):
    """Make a data-set folder and return its path.

    The arguments are those of the command (`-h` tells them); None takes the default. sample_mb is in units of 1e6 bytes.
    An interruption or an error leaves no trace and an older data set as it was. Raises ValueError for an argument
    or a text that can't work, FileNotFoundError for a missing path, ConnectionError for a failed download.
    """
    source, named = str(source), str(source) in DEFAULT_TOKENIZER
    if not named and not Path(source).exists():
        raise FileNotFoundError(f"{source!r} is no source and no file or folder: expected {', '.join(DEFAULT_TOKENIZER)} "
                                "or the path of a text")
    if val is not None and not Path(val).exists():
        raise FileNotFoundError(f"the validation text {str(val)!r} is no file or folder")
    tokenizer = tokenizer or DEFAULT_TOKENIZER.get(source, PATH_TOKENIZER)
    parse_tokenizer(tokenizer)
    if source == "fineweb-edu" and (tokenizer != "gpt2" or val is not None or not 1 <= shards <= FINEWEB_SHARDS):
        raise ValueError(f"fineweb-edu comes as 1 to {FINEWEB_SHARDS} shards of gpt2 tokens with their own validation "
                         f"shard; found tokenizer {tokenizer}, shards {shards}, val {val}")
    if not sample_mb > 0:
        raise ValueError(f"sample_mb is {sample_mb}, expected MB above 0")
    title = source if named else Path(source).resolve().name.split(".")[0] or "text"
    out = Path(out or HERE / f"{title}-{tokenizer.replace(':', '')}").resolve()
    foreign = {file.name for file in out.iterdir()} - FILES if out.exists() else ()
    if foreign:  # the folder is replaced as a whole
        raise ValueError(f"{out} holds other files ({min(foreign)}): choose another folder with --out")

    part, old = [out.with_name(f"{out.name}.{word}-{os.getpid()}") for word in ("part", "old")]
    for folder in (part, old):  # of a killed process that had the same number
        shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        if source == "fineweb-edu":
            meta, spec = prepare_fineweb(shards, part, quiet)
        else:
            text = source
            if source == "stories":
                text, val = STORIES[0], val or STORIES[1]
            elif source == "shakespeare":
                text = fetch_shakespeare(quiet)
            meta, spec = prepare_text(text, tokenizer, part, sample_mb, quiet, val)
        for name in ("train", "val"):
            if meta[f"{name}_tokens"] < 2:
                raise ValueError(f"the text is too short: {meta[f'{name}_tokens']} tokens for {name}, expected 2 or more")
        if spec["kind"] == "bpe":  # long, so that it lies beside meta.json, which stays readable
            (part / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
            spec = {"kind": "bpe", "file": "tokenizer.json"}
        meta = {"tokenizer": spec, "source": source if named else Path(source).name, "python": platform.python_version(),
                **meta}
        (part / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        if out.exists():
            os.replace(out, old)  # aside, as no system replaces a folder that has files in it
        os.replace(part, out)
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)
    if not quiet:
        print_summary(meta, out)
    return out


def print_summary(meta, out):
    print(f"{out}: {meta['documents']:,} documents ({meta['val_documents']:,} for validation), {meta['skipped_files']:,} "
          f"files skipped as not UTF-8, vocabulary {meta['vocab_size']:,}")
    for name in ("train", "val"):
        tokens, size = meta[f"{name}_tokens"], meta[f"{name}_bytes"]
        text = f"{size:,} bytes, {size / tokens:.3f} bytes per token" if size else "bytes unknown without GPT-2's vocabulary"
        print(f"  {name:5} {tokens:,} tokens, {text}")
    print(f"  sha256 {meta['sha256']}, Python {meta['python']}")


def find_dataset(data, tokenizer=""):
    """the folder of a data set, given as that folder, a source or the path of a text; prepared here and now if it isn't there.
    The folder of one's own text is named after its files as they are now, so that a changed text is prepared anew."""
    path, name = Path(data), data
    if (path / "meta.json").exists() or (path / "train.bin").exists():
        return path
    if path.exists() and data not in DEFAULT_TOKENIZER:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        stamps = "".join(f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)
        name = f"{path.name.split('.')[0]}-{hashlib.sha256(stamps.encode()).hexdigest()[:8]}"
    folder = HERE / f"{name}-{tokenizer or DEFAULT_TOKENIZER.get(data, PATH_TOKENIZER)}".replace(":", "")
    return folder if (folder / "meta.json").exists() else prepare(data, tokenizer or None, folder)


def load_dataset(folder):
    """(train, val, meta) of a prepared folder: two np.memmap of uint16 ids and the dict of meta.json, in which
    meta["tokenizer"] is the full spec. Raises FileNotFoundError or ValueError when something is missing or disagrees.
    """
    folder = Path(folder)
    again = "prepare it again with `python data/prepare.py`"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        missing = [key for key in META_KEYS if key not in meta]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        if "file" in meta["tokenizer"]:
            meta["tokenizer"] = json.loads((folder / meta["tokenizer"]["file"]).read_text(encoding="utf-8"))
        splits = []
        for name in ("train", "val"):
            path, expected = folder / f"{name}.bin", 2 * meta[f"{name}_tokens"]
            if path.stat().st_size != expected or expected == 0:
                raise ValueError(f"{path} has {path.stat().st_size:,} bytes, but meta.json tells of {expected:,}")
            splits.append(np.memmap(path, dtype="<u2", mode="r"))
            if splits[-1].max() >= meta["vocab_size"]:
                raise ValueError(f"{path} holds the id {splits[-1].max()}, but the vocabulary has {meta['vocab_size']:,}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is no whole data set: {Path(error.filename).name} is missing; {again}") from None
    except (ValueError, TypeError) as error:  # TypeError: JSON, but no object
        raise ValueError(f"{folder} can't be used, meta.json is damaged or disagrees ({error}); {again}") from None
    return splits[0], splits[1], meta


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="stories", metavar="SOURCE",
                        help=f"{', '.join(DEFAULT_TOKENIZER)}, or the path of a text (default: stories)")
    parser.add_argument("--tokenizer", help="bytes, bpe:N or gpt2 (default: the one in the list above)")
    parser.add_argument("--out", help="the folder to make (default: data/SOURCE-TOKENIZER beside this script)")
    parser.add_argument("--val", help="path of the validation text (default: a part of SOURCE)")
    parser.add_argument("--shards", type=int, default=1,
                        help=f"fineweb-edu: files of 100M tokens, 1 to {FINEWEB_SHARDS} (default: 1)")
    parser.add_argument("--sample_mb", type=float, default=2.0,
                        help="MB of training text, spread evenly, on which bpe:N is learned (default: 2)")
    try:
        prepare(**vars(parser.parse_args()))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"prepare.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("prepare.py: interrupted; no half-written data set was left") from None


if __name__ == "__main__":
    main()
