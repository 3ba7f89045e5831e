"""data/reader.py: the one reader of training texts and prompts, and what it refuses."""
import gzip
import io
import lzma
import os
import tarfile

import pytest

from data import prepare as P
from data.errors import UserError
from data.reader import read_prompts

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name,content,expected", [
    ("a.txt", BOM + b"one\n", ["one\n"]),
    ("a.txt", BOM + b"<|endoftext|>\ntwo", ["two"]),
    ("a.txt.gz", gzip.compress(BOM + b"packed"), ["packed"]),
    ("a.jsonl", BOM + b'{"text": "row"}\n', ["row"]),
    ("a.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
    ("a.JSONL", b'{"text": "row"}\n', ["row"]),
    ("a.ndjson", b'{"text": "row"}\n', ["row"]),
    ("A.JSONL.GZ", gzip.compress(b'{"text": "row"}\n'), ["row"]),
    ("a.jsonl.xz", lzma.compress(b'{"text": "row"}\n'), ["row"]),
    ("a.txt", "x\u2028<|endoftext|>\u2028y".encode(), ["x\u2028<|endoftext|>\u2028y"]),
    ("a.txt", b"x\n" + BOM + b"y", ["x\n\ufeffy"]),
    ("a.txt", b"mid\xef\xbb\xbfdle", ["mid\ufeffdle"]),
])
def test_one_reader(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert list(P.read_source(tmp_path / name, set())) == expected
    assert list(P.read_source(tmp_path, set())) == expected


def tar(name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        data = b"some text\n" * 50
        info = tarfile.TarInfo(name)
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("name,content,message", [
    ("a.tar", tar("a.txt"), "is an archive"),
    ("a.tar.gz", gzip.compress(tar("a.txt")), "is an archive"),
    ("a.txt", tar("a.txt"), "is an archive"),
    ("a.gz", gzip.compress(tar("a.txt")), "is an archive"),
    ("a.tgz", gzip.compress(tar("a.txt")), "is packed with gzip"),
    ("a.txt.gz", gzip.compress(gzip.compress(b"twice")), "is packed with gzip"),
    ("a.zip", b"PK\x03\x04rest", "is a zip archive"),
    ("a.txt", b"PK\x03\x04rest", "is a zip archive"),
    ("a.tar", b"an old tar without a signature", "is an archive"),
    ("a.txt", b"BZh91AY", "is packed with bzip2"),
    ("a.txt", b"%PDF-1.7\n", "is a PDF"),
    ("a.txt", b"{\\rtf1\\ansi some text}", "is an RTF document, .*pass the text files"),
    ("a.parquet", b"PAR1 text PAR1", "is a Parquet table"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git"),
    ("a.txt", "hello\n".encode("utf-16-le"), "line 1 holds a zero byte"),
    ("a.txt", b"fine\n\0", "line 2 holds a zero byte"),
    ("a.txt.gz", gzip.compress(b"cut" * 1000)[:-10], "damaged"),
    ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, "line 2: expected .* no JSON"),
    ("a.jsonl", b'{"text": null}', 'line 1: expected .*found None in "text"'),
    ("a.jsonl", b'{"text": ["x"]}', "line 1: expected"),
    ("a.jsonl", b'{"text": NaN}', "line 1: expected .*found nan"),
    ("a.jsonl", b"null", "line 1: expected .*found null"),
    ("a.jsonl", b'"text"', 'line 1: expected .*found "text"'),
])
def test_what_is_no_text_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for call in (lambda: P.prepare(tmp_path / name, "bytes", tmp_path / "out", quiet=True),
                 lambda: read_prompts(tmp_path / name)):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_paths_that_can_not_be_read(tmp_path, monkeypatch, symlink):
    symlink(tmp_path / "link.txt", tmp_path / "nothing")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some text", encoding="utf-8")
    for call in (read_prompts, lambda path: P.prepare(path, "bytes", tmp_path / "out", quiet=True)):
        with pytest.raises(UserError, match="is a link to .*nothing, which does not exist"):
            call(tmp_path / "link.txt")
    with pytest.raises(UserError, match="'.*gone.jsonl' is not an existing file"):
        read_prompts(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="x" * 300):  # too long for most systems
        read_prompts("x" * 300)
    with pytest.raises(UserError, match="is a folder; expected a file of prompts"):
        read_prompts(tmp_path / "in")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")  # opening it would wait for ever
        with pytest.raises(UserError, match="neither a file nor a folder"):
            read_prompts(tmp_path / "pipe.txt")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch:  # a folder on the way may not be entered
        patch.setattr(os, "lstat", refuse)
        with pytest.raises(UserError, match=r"can't read .*a.txt .Permission denied"):
            P.check_arguments(str(tmp_path / "in/a.txt"), "bytes", 1, 2.0, None)
    monkeypatch.setitem(P.read_documents.__globals__, "open", refuse)
    with pytest.raises(UserError, match=r"can't read .*a.txt .Permission denied"):
        P.prepare(tmp_path / "in", "bytes", tmp_path / "out", quiet=True)


def test_a_folder_that_can_not_be_listed_is_not_left_out(tmp_path, monkeypatch):
    def walk(path, onerror):
        onerror(PermissionError(13, "Permission denied", str(path / "private")))
        return []
    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UserError, match=r"can't read .*private .Permission denied"):
        P.prepare(tmp_path, "bytes", tmp_path.with_name("out"), quiet=True)


@pytest.mark.parametrize("name,content", [
    ("p.txt", BOM + "first \u2028 one\r\n\n  \nsecond\n".encode()),
    ("p", "first \u2028 one\nsecond".encode()),
    ("p.txt.gz", gzip.compress("first \u2028 one\nsecond\n".encode())),
    ("p.jsonl", '{"text": "first \u2028 one"}\n\n{"question": "second", "answer": 3}\n'.encode()),
    ("p.JSONL", BOM + '{"prompt": "first \u2028 one"}\n{"text": " "}\n{"text": "second"}'.encode()),
    ("p.jsonl.gz", gzip.compress(b'{"text": "first \\u2028 one"}\n{"prompt": "second"}')),
    ("p.jsonl.xz", lzma.compress(b'{"text": "first \\u2028 one"}\n{"prompt": "second"}')),
])
def test_prompts(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == ["first \u2028 one", "second"]
    assert read_prompts(str(tmp_path / name)) == ["first \u2028 one", "second"]


@pytest.mark.parametrize("row", [
    "5", "null", "true", '"text"', "NaN", "[]", "{}", "{text}", '{"answer": "x"}', '{"text": null}',
    '{"prompt": ["x"]}', '{"question": 3}', '{"text": {}}', '{"text": "\\ud800"}',
])
def test_prompt_rows_that_are_refused(tmp_path, row):
    (tmp_path / "p.jsonl").write_text('{"text": "fine"}\n' + row + "\n", encoding="utf-8")
    with pytest.raises(UserError, match='p.jsonl, line 2: expected .*"text" or "prompt" or "quest'):
        read_prompts(tmp_path / "p.jsonl")


def test_no_prompts(tmp_path):
    for content in ("", "\n \n"):
        (tmp_path / "p.txt").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="holds no prompt: expected lines of text"):
            read_prompts(tmp_path / "p.txt")
