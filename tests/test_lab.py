"""lab.py: what start takes out comes back, a hand-out holds no answer, check says what to look at; slow: solutions, answers."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import lab
import pytest
from lab import CORE, EXERCISES
from solutions import SOLUTIONS

ROOT = Path(__file__).resolve().parent.parent
WITH_FUNCTIONS = [n for n in EXERCISES if EXERCISES[n].functions]


def copy_to(folder):
    for name in [*lab.files_to_copy(ROOT), *lab.LEFT_OUT]:
        if name.startswith(("results/gpu", "results/tiny", "results/search")):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """a copy of the repository in which nothing changes"""
    return copy_to(tmp_path_factory.mktemp("original"))


@pytest.fixture
def root(tmp_path, original):
    """a copy to work in"""
    return Path(shutil.copytree(original, tmp_path / "repository"))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".lab" not in p.parts}


def secret_lines(root, numbers):
    return lab.answer_lines(body for n in numbers for body in lab.bodies(root, n).values())


# ---- the table


def test_the_table_names_what_exists():
    for number, exercise in EXERCISES.items():
        assert set(exercise.needs) < set(EXERCISES) and exercise.minutes >= 30
        for function in [*exercise.functions, *exercise.twins]:
            lab.find(lab.read(ROOT / lab.file_of(function)), function)
        for test in exercise.tests:
            lab.find(lab.read(ROOT / "tests" / lab.file_of(test)), test)
        looks = lab.get_tests(ROOT, number)
        if exercise.functions:
            assert looks
        for test, look in looks.items():
            assert look or "test_exercises.py" not in test, f"{test} must say what to look at"
    assert CORE == list(range(1, 8)) and all(EXERCISES[n].functions for n in CORE)
    assert len(lab.answer_lines(["x = 1\n# a comment that is long, but gives nothing away"])) == 0


def test_the_guide_has_the_exercises_of_the_table():
    guide = lab.read(ROOT / "tests/README.md")
    headings = re.findall(r"^## (\d+)\. (.+?)( ★)? \((\d+) min\)$", guide, re.MULTILINE)
    assert [int(number) for number, *_ in headings] == list(EXERCISES)
    for number, goal, star, minutes in headings:
        exercise = EXERCISES[int(number)]
        assert goal.lower() == exercise.goal.lower() and int(minutes) == exercise.minutes
        assert bool(star) == (int(number) not in CORE)


# ---- start and solve


@pytest.mark.parametrize("number", WITH_FUNCTIONS)
def test_start_then_solve_is_the_identity_and_a_stub_holds_no_answer(root, number, capsys):
    before = contents(root)
    secret = secret_lines(root, [number])
    lab.start(root, number)
    assert lab.state(root, number) == "empty"
    changed = [name for name, content in contents(root).items() if before[name] != content]
    assert {name.as_posix() for name in changed} == {lab.file_of(f) for f in EXERCISES[number].functions}
    for function in EXERCISES[number].functions:
        source, old = lab.read(root / lab.file_of(function)), lab.read(ROOT / lab.file_of(function))
        node, original = lab.find(source, function), lab.find(old, function)
        text = "\n".join(source.split("\n")[node.lineno - 1 : node.end_lineno])
        assert not [line for line in secret if line in text]
        assert lab.get_body(source, function).strip() == f'raise NotImplementedError("exercise {number}")'
        kept = lab.ast.dump(original.args), lab.ast.get_docstring(original)
        assert (lab.ast.dump(node.args), lab.ast.get_docstring(node)) == kept
    lab.solve(root, number)
    assert contents(root) == before and lab.state(root, number) == "original"
    assert "the original is back" in capsys.readouterr().out


def test_what_was_written_is_never_lost(root):
    function = "decode.py::rates"
    lab.start(root, 5)
    source = lab.read(root / "decode.py")
    lab.write(root / "decode.py", lab.set_body(source, function, "    return [], []") + "# mine\n")
    for body in ("    return [], []", None):
        with pytest.raises(SystemExit, match="exercise 5 is begun|exercise 5 is empty"):
            lab.start(root, 5)
    lab.write(root / "decode.py", lab.set_body(lab.read(root / "decode.py"), "decode.py::accepted_lengths", "    return 0"))
    assert lab.state(root, 5) == "written"
    with pytest.raises(SystemExit, match="would destroy what you wrote"):
        lab.start(root, 5)
    with pytest.raises(SystemExit, match="`solve 5` first"):
        lab.handout(root, root.parent / "class", [5])
    lab.solve(root, 5)
    assert lab.read(root / "decode.py") == lab.read(ROOT / "decode.py") + "# mine\n"
    assert "    return [], []" in lab.read(root / ".lab/exercise_5.txt")
    lab.start(root, 5)


def test_bodies_without_docstring_and_with_comments():
    source = "class A:\n    @f\n    def g(self,\n          x):\n        # why\n\n        y = 1\n        return y\n\nlast = 0\n"
    want = 'class A:\n    @f\n    def g(self,\n          x):\n        raise NotImplementedError("m")\n\nlast = 0\n'
    assert lab.stub(source, "a.py::A.g", "m") == want
    assert lab.set_body(want, "a.py::A.g", lab.get_body(source, "a.py::A.g")) == source
    crlf = source.replace("\n", "\r\n")
    stubbed = lab.stub(crlf, "a.py::A.g", "m")
    assert lab.set_body(stubbed, "a.py::A.g", lab.get_body(crlf, "a.py::A.g")) == crlf


# ---- check


def test_check_on_a_stub_needs_no_tests(root, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    for number in WITH_FUNCTIONS:
        lab.start(root, number)
    for number in WITH_FUNCTIONS:
        assert lab.check(root, number) == 1
        assert f"exercise {number}: nothing is written in" in capsys.readouterr().out
    lab.solve(root, 4)
    assert lab.check(root, 4) == 1
    assert "topn_divergence yet, which exercise 4 needs" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 1])
def test_check_says_what_to_look_at_before_the_traceback_and_what_is_next(monkeypatch, capsys, code):
    name = "tests/test_exercises.py::test_5_rates"

    def run(command, cwd, **options):
        assert name in command and "tests/test_exercises.py::test_6_a_certain_token" not in command
        assert cwd == ROOT
        return SimpleNamespace(returncode=code, stdout=f"Traceback\nFAILED {name}[histogram0] - assert 1\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert lab.check(ROOT, 5) == code
    out = capsys.readouterr().out
    if code == 0:
        assert "all tests pass\nnext: exercise 6, two simple accept rules (python tests/lab.py start 6)" in out
    else:
        assert out.index("look at this: AR_k divides") < out.index("Traceback")


def test_a_file_that_is_not_python_is_named(root):
    lab.write(root / "decode.py", lab.read(root / "decode.py") + "def broken(:\n")
    for command in (lab.check, lab.solve, lab.start):
        with pytest.raises(SystemExit, match=r"decode.py is not Python, line \d+"):
            command(root, 5)


# ---- hand-outs


def assert_holds_no_answer(folder, secret):
    for name, content in contents(folder).items():
        if name.suffix in (".py", ".md", ".txt", ".toml", ".json"):
            text = content.decode("utf-8")
            assert not [line for line in secret if line in text], name


@pytest.mark.parametrize("numbers", [CORE, [7]], ids=str)
def test_a_handout_holds_no_answer(original, tmp_path, numbers):
    lab.handout(original, tmp_path / "class", numbers)
    folder = tmp_path / "class"
    assert_holds_no_answer(folder, secret_lines(original, numbers))
    assert not (folder / ".git").exists() and not (folder / "tests/mutations.py").exists()
    assert "<details>" not in lab.read(folder / "tests/README.md")
    assert set(json.loads(lab.read(folder / ".lab/answers.json")).values()) == {None}
    assert {n for n in WITH_FUNCTIONS if lab.state(folder, n) == "empty"} >= set(numbers)
    for number in numbers:
        assert lab.get_tests(folder, number) == lab.get_tests(original, number)
        with pytest.raises(SystemExit, match="your teacher has the answers"):
            lab.solve(folder, number)
    # what a student wrote is not taken for the original
    for function in EXERCISES[7].functions:
        path = folder / lab.file_of(function)
        lab.write(path, lab.set_body(lab.read(path), function, "    return 1"))
    assert lab.state(folder, 7) == "written"
    # the teacher's file gives everything back
    shutil.copyfile(tmp_path / "class-answers.json", folder / ".lab/answers.json")
    for number in {*numbers, 6, 8}:
        lab.solve(folder, number)
    after = contents(folder)
    for name in ("model.py", "distill.py", "decode.py", "train.py", "extend.py", "fast/decode.py"):
        assert after[Path(name)] == (original / name).read_bytes(), name


def test_a_handout_goes_into_an_empty_folder_and_from_a_whole_repository(root, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(SystemExit, match="not an empty folder"):
        lab.handout(root, tmp_path / "full", CORE)
    with pytest.raises(SystemExit, match="exercise 12 empties nothing"):
        lab.handout(root, tmp_path / "class", [12])
    lab.start(root, 3)
    with pytest.raises(SystemExit, match="exercise 3 is begun here"):
        lab.handout(root, tmp_path / "class", CORE)
    assert not (tmp_path / "class").exists() and (tmp_path / "full/thesis.txt").read_text(encoding="utf-8") == "x"


# ---- the command line


@pytest.mark.parametrize("arguments, found", [
    (["start"], "give list, start N"), (["start", "0"], "there is no exercise 0; give one of 1 to"),
    (["start", "three"], "exercises are numbers, not three"), (["start", "12"], "exercise 12 empties nothing"),
    (["check", "12"], "exercise 12 has no tests"), (["solve", "3"], "no answer of exercise 3 here"),
    (["handout"], "give list"), (["teach", "3"], "give list")])
def test_bad_commands_say_what_to_give(original, monkeypatch, arguments, found):
    monkeypatch.setattr(lab, "ROOT", original)
    with pytest.raises(SystemExit, match=found):
        lab.main(arguments)


def test_list_and_help(original, monkeypatch, capsys):
    monkeypatch.setattr(lab, "ROOT", original)
    assert not lab.main(["list"]) and not lab.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.endswith("original")]) == len(WITH_FUNCTIONS)
    assert "lab.py: the exercises of tests/README.md, for students and for who teaches them." in lines


# ---- slow: what a student may write


def check_solution(folder, number, function, body):
    """exercise `number` in a copy, its function written so -> exit code of check, and what it prints"""
    copy_to(folder)
    path = folder / lab.file_of(function)
    indent = 8 if "." in function.split("::")[1] else 4
    lab.write(path, lab.set_body(lab.read(path), function, textwrap.indent(body.strip("\n"), " " * indent)))
    done = subprocess.run([sys.executable, "tests/lab.py", "check", str(number)], cwd=folder, capture_output=True,
                          text=True, encoding="utf-8", errors="replace", timeout=120)
    shutil.rmtree(folder)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", CORE)
def test_right_solutions_pass_and_wrong_ones_do_not(tmp_path, number):
    tried = [(i, *solution) for i, solution in enumerate(SOLUTIONS) if solution[0] == number]
    assert sum(right for *_, right, _ in tried) >= 1 and sum(not right for *_, right, _ in tried) >= 2
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda s: check_solution(tmp_path / str(s[0]), s[1], s[2], s[4]), tried))
    wrong = []
    for (_, _, function, right, body), (code, output) in zip(tried, results):
        assert "look at this: " in output or code == 0, output
        if code != (0 if right else 1):
            wrong.append(f"{function}, {'right' if right else 'wrong'}, but check says {code}:\n{body}\n{output}")
    assert not wrong, "\n\n".join(wrong)
