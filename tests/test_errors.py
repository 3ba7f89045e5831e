"""a user's error is one line that says what to do; a programmer's error keeps its traceback."""
import sys
import traceback

import pytest

import common
import decode
import distill
import extend
import train
from data import prepare as P

TOY = [
    "--preset=tiny", "--device=cpu", "--compile=off", "--dtype=float32", "--out=out",
    "--n_layer=1", "--n_head=2", "--n_embd=8", "--n_mtp=2", "--block_size=16",
    "--batch_size=4", "--steps=1", "--kl_start=0"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "my.txt").write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    return P.prepare(tmp_path / "my.txt", "bytes", tmp_path / "text", quiet=True)


def run(monkeypatch, script, *argv):
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
    common.run(script.main)


def planted(body):
    """a function mtp_loss with a mistake, as if it stood in distill.py"""
    names = {}
    source = f"def mtp_loss(hidden, *args, **options):\n    {body}"
    exec(compile(source, distill.__file__, "exec"), names)
    return names["mtp_loss"]


@pytest.mark.parametrize("body, error, message", [
    ("return hidden[0].sum(), 0", ValueError, "not enough values"),
    ("raise ValueError('my mistake')", ValueError, "my mistake"),
    ("return open('no such file')", OSError, "no such file"),
    ("import no_such_module", ImportError, "no_such_module"),
    ("return hidden[9]", IndexError, "out of range")])
def test_a_mistake_in_distill_keeps_its_traceback(text, monkeypatch, body, error, message):
    monkeypatch.setattr(distill, "mtp_loss", planted(body))
    with pytest.raises(error, match=message) as caught:  # a one-line end would be a SystemExit
        run(monkeypatch, train, f"--data={text}", *TOY)
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert train.__file__ in files
    if message != "not enough values":  # which is raised where the values are unpacked
        assert distill.__file__ in files


@pytest.mark.parametrize("script, argv, message", [
    (train, "--kl=gone", "gone.*forward"), (train, "--preset=huge", "huge.*tiny"),
    (train, "--n_embd=97", "97.*n_head"), (train, "--n_mtp=16", "block_size"),
    (train, "--dropout=2", "dropout"), (train, "--embed_std=0", "embed_std"),
    (train, "--beta=x", "--beta.*'x'"),
    (train, "--batch_size=1" + 18 * "0", "^out of memory"),
    (train, "--n_embd=6" + 17 * "0", "^out of memory.*overflowed"), (train, "--top_n=2.5", "2.5"),
    (train, "--device=gpu", "gpu"), (train, "--data=no-such-text", "no-such-text"),
    (train, "--resume=gone.pt", "gone.pt"), (train, "--resume=bad.pt", "bad.pt"),
    (extend, "gone.pt", "gone.pt"), (extend, "bad.pt", "bad.pt"),
    (decode, "gone.pt", "gone.pt"), (decode, "bad.pt", "bad.pt")])
def test_a_users_error_is_one_line(text, tmp_path, monkeypatch, script, argv, message):
    (tmp_path / "bad.pt").write_text("once upon a time", encoding="utf-8")
    before = [f"--data={text}", *TOY] if argv.startswith("--") and "resume" not in argv else []
    with pytest.raises(SystemExit, match=message) as caught:
        run(monkeypatch, script, *before, argv)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code.strip()
    assert not (tmp_path / "out/ckpt.pt").exists()


@pytest.mark.parametrize("script, before", [
    (train, ["--data=text", *TOY]), (train, ["--resume=out", "--steps=2"]),
    (extend, ["out", "--heads=4"])])
def test_an_out_that_is_empty_is_one_line(text, tmp_path, monkeypatch, script, before):
    """the current folder is nobody's choice then: a variable of the shell was not set"""
    run(monkeypatch, train, "--data=text", *TOY)
    listing = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="--out is empty; name a folder"):
        run(monkeypatch, script, *before, "--out=")
    assert sorted(tmp_path.rglob("*")) == listing


def test_an_out_that_is_a_file_is_one_line_and_the_file_stays(text, tmp_path, monkeypatch):
    out = tmp_path / "mine"
    out.write_text("mine", encoding="utf-8")
    for folder in (out, out / "new"):
        with pytest.raises(SystemExit, match="could not write .*choose another folder with --out"):
            run(monkeypatch, train, f"--data={text}", *TOY, f"--out={folder}")
    assert out.read_text(encoding="utf-8") == "mine"
