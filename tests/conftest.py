"""shared by all tests: a fixed number of threads, no writes into the repository, float64."""
import gc
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # fast/ without a GPU, where Triton is installed

# a job in the background of a shell ignores Ctrl-C, which tests raise
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # toy sizes: threads would mostly wait for each other, ten times as long on a busy machine


# -----------------------------------------------------------------------------
# a test writes under tmp_path only: out/ and data/ hold the user's own models and datasets

ROOT = Path(__file__).resolve().parent.parent
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
guard = {"on": False, "temporary": ROOT / ".pytest", "found": []}


def is_forbidden(path):
    """whether path lies in the repository, but not in a cache or in pytest's temporary folder"""
    try:
        path = Path(os.path.abspath(os.fsdecode(path)))
    except TypeError:  # an open file's number
        return False
    if not path.is_relative_to(ROOT) or path.is_relative_to(guard["temporary"]):
        return False
    return not any(part[0] == "." or part == "__pycache__" for part in path.relative_to(ROOT).parts)


def forbid_writes(event, args):
    """an audit hook: Python calls it before it opens, renames or removes a file"""
    if not guard["on"]:
        return
    changed = ()
    if event == "open" and args[2] & WRITING:
        changed = args[:1]
    elif event in ("os.mkdir", "os.remove"):
        changed = args[:1]
    elif event == "os.rename":  # os.replace, too
        changed = args[:2]
    for path in filter(is_forbidden, changed):
        guard["found"].append(str(path))
        raise AssertionError(f"a test must write under tmp_path only, not to {path}")


sys.addaudithook(forbid_writes)


def files_of_the_user():
    return {path for name in ("out", "data") for path in (ROOT / name).glob("*/*")}


@pytest.fixture(scope="session", autouse=True)
def nothing_is_written_by_other_processes(tmp_path_factory):
    """the hook sees this process alone; what others leave behind is looked for at the end"""
    before, folder = files_of_the_user(), os.getcwd()
    guard.update(on=True, temporary=tmp_path_factory.getbasetemp())
    os.chdir(tmp_path_factory.mktemp("cwd"))  # for a module's fixtures, which come before a test's
    yield
    os.chdir(folder)
    guard["on"] = False
    new = [str(path) for path in files_of_the_user() - before if "__pycache__" not in path.parts]
    assert not new, f"appeared while the tests ran: {', '.join(sorted(new))}"


@pytest.fixture(autouse=True)
def nothing_is_written_outside_tmp_path(tmp_path, monkeypatch):
    """a relative path means tmp_path; a write into the repository fails, even if that is caught"""
    monkeypatch.chdir(tmp_path)
    guard["found"].clear()
    yield
    assert not guard["found"], f"written to: {', '.join(guard['found'])}"


@pytest.fixture
def symlink():
    """symlink(path, target). Windows lets some users alone make links; the test is skipped there"""
    def make(path, target):
        try:
            path.symlink_to(target)
        except OSError as error:
            if os.name != "nt":
                raise
            pytest.skip(f"symbolic links: {error}")
    return make


@pytest.fixture
def float64():
    """new tensors are float64, from a fixed seed: exactness tests see mistakes, not rounding. Undone afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def pytest_collection_finish():
    """what was imported until now stays: garbage collection need not look through it each time"""
    gc.freeze()
