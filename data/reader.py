"""Text files -> documents and prompts: the one reader for training texts and for prompts.

Files are UTF-8, plain or packed as .xz or .gz. A byte-order mark at the start is dropped. What
can't be read is refused with a UserError that names file and line.
"""
import gzip
import json
import lzma
import os
import zlib
from itertools import chain
from pathlib import Path

from data.errors import UserError

EOT_TEXT = "<|endoftext|>"  # alone on a line: the border between two documents
UNPACK = {".xz": lzma.open, ".gz": gzip.open}
TEXT_SUFFIXES = {".txt", ".md", ".py"}
ROW_SUFFIXES = {".jsonl", ".ndjson"}
PROMPT_FIELDS = ("text", "prompt", "question")
BLOCK_LINES = 4096  # joined as they come: Python takes 50 bytes for each line beside its text
# archives and documents of other programs: refused by name, and by how they begin, whatever their
# name
ARCHIVES = {".tar", ".tgz", ".txz", ".zip", ".7z", ".rar", ".bz2", ".zst", ".pdf", ".docx", ".epub"}
SIGNATURES = {
    b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a rar archive",
    b"\x1f\x8b": "packed with gzip", b"\xfd7zXZ": "packed with xz", b"BZh": "packed with bzip2",
    b"\x28\xb5\x2f\xfd": "packed with zstd", b"%PDF": "a PDF document",
    b"{\\rtf": "an RTF document", b"PAR1": "a Parquet table",
    b"version https://git-lfs": "a pointer of Git LFS",
}


# -----------------------------------------------------------------------------
# files


def suffix_of(path):
    """The kind of a file by its name: the suffix in lower case, without .xz or .gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".xz").removesuffix(".gz")).suffix


def check_path(path):
    """Raise UserError unless there is a file or folder at path that can be read more than once."""
    try:
        exists = path.exists()
        is_link = path.is_symlink()
    except OSError as error:  # the name is too long, a folder on the way may not be entered
        raise UserError(f"can't read {path} ({error.strerror})") from None
    if is_link and not exists:
        raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    if not exists:
        raise UserError(f"{str(path)!r} is not an existing file or folder")
    if not path.is_file() and not path.is_dir():  # a pipe: each text is read several times
        raise UserError(f"{path} is neither a file nor a folder; save the text to a file first")


def text_files(path):
    """The text files of a folder, in the same order on every system; of a file, itself.
    Left out: other kinds, hidden files and folders (.git, ._x.txt), links that lead nowhere."""
    check_path(path)
    if path.is_file():  # whoever names a file means it, whatever its suffix
        return [path]

    def refuse(error):
        raise UserError(f"can't read {error.filename} ({error.strerror})")

    files = []
    for folder, folders, names in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in [Path(folder, name) for name in names if not name.startswith(".")]:
            if suffix_of(file) in TEXT_SUFFIXES | ROW_SUFFIXES and file.is_file():
                files.append(file)
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def check_head(path, head):
    """Raise UserError when a file's first bytes, unpacked, are those of something else than
    text."""
    kind = next((kind for start, kind in SIGNATURES.items() if head.startswith(start)), None)
    if head[257:262] == b"ustar" or suffix_of(path) in ARCHIVES:
        kind = kind or "an archive"
    if kind:
        raise UserError(f"{path} is {kind}, no text: pass the text files that it holds or stands "
                        "for (.xz and .gz of a single text are read as they are)")


def read_lines(path):
    """Yield (number, line) of a text file; lines end at \\n, which is kept, and nowhere else."""
    number = 0
    try:
        with UNPACK.get(path.suffix.lower(), open)(path, "rb") as file:
            check_head(path, file.peek(512)[:512])
            for number, data in enumerate(file, 1):
                line = data.decode("utf-8")
                if "\0" in line:
                    raise UserError(f"{path}, line {number} holds a zero byte: expected text in "
                                    "UTF-8, this is UTF-16 or no text")
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: line {number}, byte {error.start + 1} is "
                        f"0x{data[error.start]:02x}; save it again as UTF-8") from None
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is damaged or not a {path.suffix} file ({error}); "
                        "copy or download it again") from None
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror or error})") from None


# -----------------------------------------------------------------------------
# documents and prompts


def read_text(path):
    """Yield the documents of a plain text, separated by lines that are exactly <|endoftext|>."""
    blocks = []
    lines = []
    for _, line in chain(read_lines(path), [(0, EOT_TEXT)]):
        is_end = line.rstrip("\r\n") == EOT_TEXT
        if not is_end:
            lines.append(line)
        if is_end or len(lines) == BLOCK_LINES:
            blocks.append("".join(lines))
            lines.clear()
        if is_end:
            document = "".join(blocks)
            blocks.clear()  # before the yield: a large document is in memory once less
            yield document


def parse_row(line, fields, place):
    """The string of the first of these fields that the JSON object in a line has, and the whole
    object."""
    choices = " or ".join(f'"{name}"' for name in fields)
    expected = f"expected a JSON object with a string in {choices}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {expected}; this is no JSON ({error})") from None
    names = [name for name in fields if name in row] if isinstance(row, dict) else []
    if not names:
        raise UserError(f"{place}: {expected}; found {line.strip():.60}")
    text = row[names[0]]
    if not isinstance(text, str):
        raise UserError(f'{place}: {expected}; found {text!r:.60} in "{names[0]}"')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON, but no text
        raise UserError(f"{place}: {expected}; its text can't be UTF-8 ({error.reason})") from None
    return text, row


def read_rows(path, fields):
    """Yield (text, row) of each row of a .jsonl file; blank lines are skipped."""
    for number, line in read_lines(path):
        if line.strip():
            yield parse_row(line, fields, f"{path}, line {number}")


def read_documents(path):
    """Yield the documents (str) of a text file, a .jsonl file or a folder of them."""
    for file in text_files(Path(path)):
        if suffix_of(file) in ROW_SUFFIXES:
            yield from (text for text, _ in read_rows(file, ("text",)))
        else:
            yield from read_text(file)


def read_prompts(path):
    """The prompts of a file, a list of str."""
    return [text for text, _ in read_prompt_rows(path)]


def read_prompt_rows(path):
    """The prompts of a file, a list of (text, row): its lines, with an empty row, or of a .jsonl
    file the field "text", "prompt" or "question" of each row. Blank ones are left out. Raises
    UserError for a file that can't be read or holds none."""
    path = Path(path)
    check_path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file of prompts")
    if suffix_of(path) in ROW_SUFFIXES:
        prompts = read_rows(path, PROMPT_FIELDS)
    else:
        prompts = ((line.rstrip("\r\n"), {}) for _, line in read_lines(path))
    prompts = [(text, row) for text, row in prompts if text.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: expected lines of text, or .jsonl rows with a "
                        "text, prompt or question field")
    return prompts
