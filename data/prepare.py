"""Text -> token files. Makes a dataset folder with train.bin, val.bin (ids, uint16 little-endian)
and meta.json.

    python data/prepare.py                            stories: the books in this folder, bpe:1024
    python data/prepare.py python                     this Python's standard library, bpe:4096
    python data/prepare.py python+packages            the same and the installed packages' .py files
    python data/prepare.py shakespeare                TinyShakespeare (1.1 MB download), bytes
    python data/prepare.py fineweb-edu --shards 10    10 x 100M GPT-2 tokens (200 MB each), of 99
    python data/prepare.py my.txt                     a file, a .jsonl with "text" fields or a
                                                      folder of them, bpe:4096
    python data/prepare.py my.txt.xz --val other.txt  .xz and .gz are read as they are; the
                                                      validation text is given
    python data/prepare.py my.txt --tokenizer bpe:8192 --out data/mine

Tokenizers: `bytes` (257 ids), `bpe:N` (N ids, learned here on the training text), `gpt2` (50,257
ids, its files are downloaded on first use). The last id is always end-of-text, which follows every
document; a text can never produce it. In plain text a line that is exactly <|endoftext|> separates
two documents.

Which documents are for validation depends on nothing but their own text (5 % of all hashes), so
more text never moves a document across. With few documents, or very unequal ones, their share can
come out at less than a quarter or more than four times that: then the first 90 % of the characters
are for training and the rest for validation.

From Python: `folder = prepare("stories")`, then
`train, val, meta = load_dataset(folder)` and `Tokenizer(meta["tokenizer"])`.
"""
import argparse
import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
if not __package__:  # run as a script: make the package of this file importable
    sys.path.insert(0, str(HERE.parent))

from data.dataset import FILES, META_KEYS, load_dataset, read_json  # noqa: F401 (for others)
from data.download import FINEWEB_SHARDS, GPT2_EOT, fetch_fineweb, fetch_shakespeare, read_shard
from data.errors import UserError, printable, show
from data.reader import EOT_TEXT, check_path, read_documents, text_files
from data.temporary import leftovers, temporary
from data.tokenizer import SECTION, Tokenizer, bpe_spec, parse_tokenizer, train_bpe

# -----------------------------------------------------------------------------
VAL_FRACTION = 0.05     # of the documents
TRAIN_CHARACTERS = 0.9  # of the text, when the split is by position; nanoGPT's numbers
# README.md says what they are
STORIES = (HERE / "stories.train.txt.xz", HERE / "stories.val.txt.xz")
DEFAULT_TOKENIZER = {"stories": "bpe:1024", "python": "bpe:4096", "python+packages": "bpe:2048",
                     "shakespeare": "bytes", "fineweb-edu": "gpt2"}
PATH_TOKENIZER = "bpe:4096"
# folders left out of the Python sources. tests repeat one call with many literals; encodings,
# pydoc_data and the build settings are tables; idlelib is a window program with its manual;
# distutils and lib2to3 are gone in newer Pythons
NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
            "encodings", "pydoc_data", "idlelib", "distutils", "lib2to3"}


# -----------------------------------------------------------------------------
# sources: generators of documents (str). one document at a time is in memory, two to three times.
# Python holds all of it in 1, 2 or 4 bytes for each character, by the one that needs most

def read_python(packages, skipped):
    roots = [sysconfig.get_path("stdlib")]
    if packages:  # pure and compiled packages mostly share one folder
        site_packages = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
        roots += sorted({os.path.realpath(path) for path in site_packages})
    for root in map(Path, roots):
        # by POSIX path: the same order on every system
        for name in sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py")):
            if not NOT_CODE.isdisjoint(name.split("/")) or "_sysconfigdata" in name:
                continue
            try:
                # bytes: open() would turn \r\n into \n. sig: without a byte-order mark
                yield (root / name).read_bytes().decode("utf-8-sig")
            except (UnicodeDecodeError, OSError):  # a few old files, dangling links; none matters
                skipped.add(root / name)


def read_source(source, skipped):
    """Documents by name or path, but for blank ones. `skipped` collects the Python files that can't
    be read."""
    if source in ("python", "python+packages"):
        documents = read_python(source == "python+packages", skipped)
    else:
        documents = read_documents(source)
    return (document for document in documents if document.strip())


def is_val(text):
    # by the document's own bytes: neither its place nor its neighbours matter, and copies stay on
    # one side
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < VAL_FRACTION * 2**64


class Documents:
    """(document, for validation?) of a source and its validation text, counted and hashed in each
    pass over it."""

    def __init__(self, source, val):
        self.source = source
        self.val = val
        self.skipped = set()

    def __iter__(self):
        self.digest = hashlib.sha256()
        self.count = 0
        self.val_count = 0
        self.characters = 0
        self.bytes = 0
        self.val_bytes = 0
        for text in read_source(self.source, self.skipped):
            yield self.add(text, self.val is None and is_val(text))
        if self.val is not None:
            for text in read_source(self.val, self.skipped):
                yield self.add(text, True)

    def add(self, text, held_out):
        data = text.encode("utf-8")
        if self.count:  # between documents only: the hash of a single one is its file's own
            self.digest.update(f"{EOT_TEXT}\n".encode())
        self.digest.update(data)
        self.count += 1
        self.val_count += held_out
        self.characters += len(text)
        self.bytes += len(data)
        self.val_bytes += len(data) * held_out
        return text, held_out

    def read(self, quiet):
        """A pass that only counts and hashes; here no variable holds the last document after it."""
        for _ in tqdm(self, desc="read", unit=" doc", disable=quiet):
            pass

    def has_fair_split(self):
        """Whether the split by document gives about as much to validation as intended."""
        return VAL_FRACTION / 4 <= self.val_bytes / self.bytes <= VAL_FRACTION * 4


# -----------------------------------------------------------------------------
# text -> ids

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
        ends = count > 1  # one text alone needs no end-of-text
        yield text[:edge], "train", ends and edge >= len(text)
        yield text[edge:], "val", ends


def sample(parts, fraction):
    """That fraction of the training text, spread evenly: slices of 4,096 characters."""
    seen = 0
    taken = 0
    for text, name, _ in parts:
        for start in range(0, len(text) if name == "train" else 0, 4096):
            piece = text[start:start + 4096]
            if taken <= seen * fraction:
                yield piece
                taken += len(piece)
            seen += len(piece)


def batches(parts, size=1 << 22):
    """Lists of (section of a text, name, end-of-text after it?) of about `size` characters: bounded
    memory, and work for every thread."""
    batch = []
    waiting = 0
    for text, name, ends in parts:
        for match in SECTION.finditer(text):  # none in an empty part
            batch.append((match[0], name, ends and match.end() == len(text)))
            waiting += len(match[0])
            if waiting > size:
                yield batch
                batch = []
                waiting = 0
    yield batch


def write_ids(parts, size, tokenizer, folder, quiet):
    """Write train.bin and val.bin; returns their numbers of tokens and bytes for meta.json."""
    counts = dict(train_tokens=0, val_tokens=0, train_bytes=0, val_bytes=0)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val, tqdm(
            total=size, unit="B", unit_scale=True, desc="encode", disable=quiet) as bar:
        files = {"train": train, "val": val}
        for batch in batches(parts):
            all_ids = tokenizer.encode_batch([section for section, _, _ in batch])
            for ids, (section, name, ends) in zip(all_ids, batch):
                if ends:
                    ids.append(tokenizer.eot)
                files[name].write(np.array(ids, dtype="<u2").tobytes())
                length = len(section.encode("utf-8"))
                counts[f"{name}_tokens"] += len(ids)
                counts[f"{name}_bytes"] += length
                bar.update(length)
    return counts


def prepare_text(source, tokenizer_name, folder, sample_mb, quiet, val):
    """Write train.bin and val.bin of a text into folder; returns its part of meta.json, and the
    tokenizer's spec."""
    kind, vocab_size = parse_tokenizer(tokenizer_name)
    if kind != "bpe":  # before the long work: GPT-2's files may be out of reach
        tokenizer = Tokenizer({"kind": kind})
    documents = Documents(source, val)
    documents.read(quiet)
    count = documents.count
    val_count = documents.val_count
    size = documents.bytes
    digest = documents.digest.hexdigest()
    if count == 0 or val is not None and val_count in (0, count):
        raise UserError(f"{val if count and not val_count else source} holds no text: expected "
                        ".txt, .md, .py or .jsonl (also as .xz or .gz) with a visible character")
    rule = "by document"
    cut = None
    if val is not None:
        rule = "given"
    elif not documents.has_fair_split():
        rule = "by position"
        cut = int(TRAIN_CHARACTERS * documents.characters)

    if kind == "bpe":
        texts = sample(split(documents, count, cut), sample_mb * 1e6 / size)
        tokenizer = Tokenizer(bpe_spec(train_bpe(texts, vocab_size, quiet)))
    counts = write_ids(split(documents, count, cut), size, tokenizer, folder, quiet)
    if documents.digest.hexdigest() != digest:
        raise UserError(f"{source} changed while it was read; wait until it is complete and run "
                        "the command again")
    meta = {"sha256": digest, "documents": count, "val_documents": val_count,
            "split": rule, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
            "skipped_files": len(documents.skipped)}
    return {**meta, **counts}, tokenizer.spec


def prepare_fineweb(shards, folder, quiet):
    """The same for published shards, whose ids are ready: GPT-2's vocabulary only serves to count
    bytes."""
    val, *train = fetch_fineweb(shards, quiet)
    spec = {"kind": "gpt2"}
    digest = hashlib.sha256()  # of the ids: the text never came here
    try:
        lengths = np.array([len(token) for token in Tokenizer(spec).tokens[:GPT2_EOT]])
    except (UserError, ImportError):
        lengths = None
    meta = {"vocab_size": GPT2_EOT + 1, "eot": GPT2_EOT, "skipped_files": 0, "documents": 0,
            "split": "given"}
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
        # each document starts with an end-of-text; the last round is val
        meta["val_documents"] = int(counts[GPT2_EOT])
        meta["documents"] += meta["val_documents"]
    return {**meta, "sha256": digest.hexdigest()}, spec


# -----------------------------------------------------------------------------
# the folder

def check_arguments(source, tokenizer, shards, sample_mb, val):
    if source not in DEFAULT_TOKENIZER:
        if not source:
            raise UserError(f"the source is empty: expected {', '.join(DEFAULT_TOKENIZER)} or the "
                            "path of a text")
        try:
            os.lstat(source)  # lexists would also be False where it may not be read
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise UserError(f"{source!r} is neither a known source nor an existing file or "
                            f"folder: expected {', '.join(DEFAULT_TOKENIZER)} or the path of a "
                            "text") from None
        except OSError as error:
            raise UserError(f"can't read {source} ({error.strerror})") from None
        check_path(Path(source))
    if val is not None:
        if not str(val):  # Path("") is the current folder
            raise UserError("the path of the validation text is empty")
        check_path(Path(val))
        if source not in DEFAULT_TOKENIZER:
            both = paths_of(source) & paths_of(val)
            if both:
                raise UserError(f"{min(both)} belongs to {source} and to the validation text, and "
                                "would be trained on: move it out of one of them")
    parse_tokenizer(tokenizer)
    in_range = 1 <= shards <= FINEWEB_SHARDS
    if source == "fineweb-edu" and (tokenizer != "gpt2" or val is not None or not in_range):
        raise UserError(f"fineweb-edu comes as 1 to {FINEWEB_SHARDS} shards of gpt2 tokens with "
                        f"their own validation shard; found tokenizer {tokenizer}, shards "
                        f"{shards}, val {val}")
    if not sample_mb > 0:
        raise UserError(f"sample_mb is {sample_mb}, expected MB above 0")


def paths_of(text):
    """The files of a text, by one name each."""
    return {str(file.resolve()) for file in text_files(Path(text))}


@contextlib.contextmanager
def system_errors(place):
    """What the operating system refuses, as an error of the user: a full disk, a path that may not
    be read."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        hint = "choose another one"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # the disk or the user's share of it
            hint = "free some space"
        raise UserError(f"can't read or write {error.filename or place} ({error.strerror}): "
                        f"{hint}") from None


def clear_leftovers(out):
    """Remove what killed runs left beside out; one that was killed after it moved the old dataset
    aside is undone."""
    for word in ("old", "part"):
        for folder in leftovers(out, word):
            # another run may be clearing the same ones
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if set(os.listdir(folder)) - FILES:
                    continue
                if word == "old" and not out.exists():
                    os.replace(folder, out)
                else:
                    shutil.rmtree(folder, ignore_errors=True)


def name_of(source):
    return source if source in DEFAULT_TOKENIZER else Path(source).name


def check_same_source(out, source):
    """Two texts can have one name, and so the same folder where --out isn't given."""
    try:
        found = read_json(out / "meta.json").get("source")
    except (UserError, AttributeError):  # there is none, or it is damaged: nothing is lost
        return
    if found not in (None, name_of(source)):
        raise UserError(f"{out} holds another text ({found}): choose another folder with --out")


def make_room(out, part, old):
    """Make the folder `part`, and fail before the long work where it could not be put in the place
    of `out` after it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder with --out")
    try:
        foreign = {file.name for file in out.iterdir()} - FILES if out.exists() else set()
        if foreign:  # the folder is replaced as a whole
            raise UserError(f"{out} holds other files ({min(foreign)}): choose another folder "
                            "with --out")
        part.mkdir(parents=True)
        if out.exists():  # a mount point can't be moved, nor a folder in use on Windows
            os.replace(out, old)
            os.replace(old, out)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"can't make or replace {out} ({error.strerror or error}): choose another "
                        "folder with --out") from None


def put_in_place(part, out, old, tries=10):
    """Rename part to out, and what is there to old, as no system replaces a folder that has files
    in it. Another run may be doing the same: the last one stays."""
    for left in reversed(range(tries)):
        try:
            if out.exists():
                os.replace(out, old)
            os.replace(part, out)
            return
        except OSError:
            if left == 0:
                raise
            if out.exists():  # the other run's, newer than what lies in old
                shutil.rmtree(old, ignore_errors=True)


def write_dataset(source, tokenizer, part, shards, sample_mb, quiet, val):
    """Write all files into the folder `part` -> what meta.json holds."""
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
        tokens = meta[f"{name}_tokens"]
        if tokens < 2:
            raise UserError(f"{name_of(source)} is too short: {tokens} tokens for {name}, expected "
                            "2 or more; give more text")
    if spec["kind"] == "bpe":  # long, so that it lies beside meta.json, which stays readable
        (part / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        spec = {"kind": "bpe", "file": "tokenizer.json"}
    meta = {"tokenizer": spec, "source": name_of(source), "python": platform.python_version(),
            **meta}
    (part / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    return meta


def prepare(source="stories", tokenizer=None, out=None, shards=1, sample_mb=2.0, quiet=False,
            val=None):
    """Make a dataset folder and return its path.

    The arguments are those of the command (see -h); None takes the default. sample_mb is in units
    of 1e6 bytes. An interruption or an error leaves no trace and an older dataset as it was. Raises
    UserError for an argument, a path or a text that can't work, for a failed download and for a
    full disk.
    """
    source = str(source)
    tokenizer = tokenizer or DEFAULT_TOKENIZER.get(source, PATH_TOKENIZER)
    with system_errors(out or source):
        check_arguments(source, tokenizer, shards, sample_mb, val)
        title = source
        if source not in DEFAULT_TOKENIZER:
            title = Path(source).resolve().name.split(".")[0] or "text"
            if title in DEFAULT_TOKENIZER:  # its folder is the known source's
                title += "-text"
        asked = out is not None
        out = Path(out or HERE / f"{title}-{tokenizer.replace(':', '')}").resolve()
        if not out.name:
            raise UserError(f"{out} can't be replaced: choose another folder with --out")
        part, old = temporary(out, "part"), temporary(out, "old")
        clear_leftovers(out)
        if not asked:
            check_same_source(out, source)
        make_room(out, part, old)
        try:
            meta = write_dataset(source, tokenizer, part, shards, sample_mb, quiet, val)
            put_in_place(part, out, old)
        finally:
            if old.exists() and not out.exists():
                os.replace(old, out)
            for folder in (part, old):
                shutil.rmtree(folder, ignore_errors=True)
    if not quiet:
        print_summary(meta, out)
    return out


def print_summary(meta, out):
    show(f"{out}: {meta['documents']:,} documents ({meta['val_documents']:,} for validation), "
         f"{meta['skipped_files']:,} files skipped as not UTF-8, "
         f"vocabulary {meta['vocab_size']:,}")
    if meta["split"] == "by position":
        print("  split by position, the last 10 % are for validation: the documents are too few or "
              "too unequal for a split by document")
    for name in ("train", "val"):
        tokens = meta[f"{name}_tokens"]
        size = meta[f"{name}_bytes"]
        text = "bytes unknown without GPT-2's vocabulary"
        if size:
            text = f"{size:,} bytes, {size / tokens:.3f} bytes per token"
        print(f"  {name:5} {tokens:,} tokens, {text}")
    print(f"  sha256 {meta['sha256']}, Python {meta['python']}")


def find_dataset(data, tokenizer=""):
    """The folder of a dataset, given as that folder, a source or the path of a text; prepared here
    and now if it isn't there. The folder of one's own text is named after its files as they are
    now, so that a changed text is prepared again."""
    if not str(data):
        raise UserError("no data is named: expected a dataset folder, a source or the path of a "
                        "text")
    path = Path(data)
    name = data
    with system_errors(data):
        if (path / "meta.json").exists() or (path / "train.bin").exists():
            return path
        if path.exists() and data not in DEFAULT_TOKENIZER:
            name = f"{path.name.split('.')[0]}-{stamp_of(text_files(path))}"
        tokenizer = tokenizer or DEFAULT_TOKENIZER.get(data, PATH_TOKENIZER)
        folder = HERE / f"{name}-{tokenizer}".replace(":", "")
        if (folder / "meta.json").exists():
            return folder
    return prepare(data, tokenizer, folder)


def stamp_of(files):
    """Eight hex digits that change when one of these files does."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        stamp = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        digest.update(stamp.encode("utf-8", "backslashreplace"))  # a name may be no UTF-8
    return digest.hexdigest()[:8]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="stories", metavar="SOURCE",
                        help=f"{', '.join(DEFAULT_TOKENIZER)}, or the path of a text (default: "
                             "stories)")
    parser.add_argument("--tokenizer", help="bytes, bpe:N or gpt2 (default: the source's, see "
                                            "above)")
    parser.add_argument("--out", help="the folder to make (default: data/SOURCE-TOKENIZER beside "
                                      "this script)")
    parser.add_argument("--val", help="path of the validation text (default: a part of SOURCE)")
    parser.add_argument("--shards", type=int, default=1,
                        help=f"fineweb-edu: files of 100M tokens, 1 to {FINEWEB_SHARDS} (default: "
                             "1)")
    parser.add_argument("--sample_mb", type=float, default=2.0,
                        help="MB of training text, spread evenly, on which bpe:N is learned "
                             "(default: 2)")
    if hasattr(sys.stdout, "reconfigure"):  # a name that the output can't encode is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        prepare(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(f"prepare.py: {printable(str(error), sys.stderr)}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; no half-written dataset was left")


if __name__ == "__main__":
    main()
