"""tests of the tests: mutations.py's list fits the code, every mistake in it is caught, no test writes into the repository."""
import os
import subprocess
import sys
from pathlib import Path

import conftest
import mutations
import pytest
import torch
from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("n", range(len(MUTATIONS)))
def test_the_snippet_occurs_once_and_the_named_tests_exist(n):
    what, file, snippet, mistake, tests = MUTATIONS[n]
    times = (ROOT / file).read_text(encoding="utf-8").count(snippet)
    if times != 1 and not os.environ.get("CI"):
        pytest.skip(f"{file} holds {snippet!r} {times} times: it was written anew")
    assert times == 1, f"{what}: look for {snippet!r} in {file}"
    assert snippet != mistake and tests
    for test in tests:
        name, function = test.split("[")[0].split("::")
        assert f"def {function}(" in (ROOT / "tests" / name).read_text(encoding="utf-8"), test


def test_a_line_that_was_written_anew_is_skipped_but_not_in_ci(tmp_path, monkeypatch):
    """a student's own solution must not turn the suite red"""
    test = test_the_snippet_occurs_once_and_the_named_tests_exist
    monkeypatch.setattr(sys.modules[__name__], "MUTATIONS", [("gone", "model.py", "no such line", "x", ["test_model.py::test_x"])])
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="model.py holds 'no such line' 0 times"):
        test(0)
    assert mutations.check("model.py", "no such line", "x", []) == "skipped: written anew"
    monkeypatch.setenv("CI", "true")
    with pytest.raises(AssertionError, match="look for 'no such line' in model.py"):
        test(0)
    assert mutations.check("model.py", "no such line", "x", []).startswith("SNIPPET NOT FOUND")


@pytest.mark.slow
def test_every_mutation_is_caught(capsys):
    assert mutations.main(range(len(MUTATIONS))) == 0, capsys.readouterr().out


# ---- a test writes under tmp_path only


@pytest.mark.parametrize("write", [
    lambda path: path.write_text("x"), lambda path: open(path, "ab"), lambda path: path.mkdir(),
    lambda path: os.open(path, os.O_RDWR | os.O_CREAT), lambda path: Path("x").rename(path),
    lambda path: path.unlink(missing_ok=True)])
def test_a_write_into_the_repository_fails(write):
    for name in ("ckpt.pt", "out", "data/mine"):
        with pytest.raises(AssertionError, match="under tmp_path only"):
            write(conftest.ROOT / name)
        assert conftest.guard["found"].pop() == str(conftest.ROOT / name)
        assert not (conftest.ROOT / name).is_file()


def test_relative_paths_and_those_of_other_processes_lie_under_tmp_path(tmp_path):
    Path("here.txt").write_text("x", encoding="utf-8")
    torch.save([1], "here.pt")
    subprocess.run([sys.executable, "-c", "open('there.txt', 'w')"], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"here.txt", "here.pt", "there.txt"}
