"""lab.py: what start takes out comes back, a hand-out holds no answer, check says what to look at;
slow: right and wrong solutions, the answers of the guide."""

import ast
import functools
import json
import lzma
import math
import os
import re
import shutil
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import decode
import distill
import lab
import mutations
import pytest
import torch
from lab import CORE, EXERCISES, ROOT
from solutions import SOLUTIONS

WITH_FUNCTIONS = [n for n in EXERCISES if EXERCISES[n].functions]
GUIDE = lab.read(ROOT / "tests/README.md")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """a copy of the repository in which nothing changes"""
    folder = tmp_path_factory.mktemp("original")
    mutations.copy_to(folder)
    for path in [*ROOT.glob("*.md"), *ROOT.glob("tests/*.md"), *ROOT.glob("tests/*.svg")]:
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


@pytest.fixture
def root(tmp_path, original):
    """a copy to work in"""
    return Path(shutil.copytree(original, tmp_path / "repository"))


@pytest.fixture(autouse=True)
def each_text_is_parsed_once(monkeypatch):
    """it is nearly all that takes time here"""
    monkeypatch.setattr(ast, "parse", functools.lru_cache(20)(ast.parse))


def contents(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and ".lab" not in p.parts]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def secret_lines(numbers):
    functions = [f for n in numbers for f in EXERCISES[n].functions]
    return lab.answer_lines(lab.get_body(ROOT, f) for f in functions)


def pretend_pytest_says(monkeypatch, code, output=""):
    """-> the commands that lab.py runs"""
    commands = []

    def run(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=code, stdout=output, stderr="")
    monkeypatch.setattr(subprocess, "run", run)
    return commands


# ---- the table


def test_the_table_names_what_exists():
    for exercise in EXERCISES.values():
        assert set(exercise.needs) < set(EXERCISES) and exercise.minutes >= 30
        for file, name in (f.split("::") for f in [*exercise.functions, *exercise.twins]):
            assert lab.read(ROOT / file).count(f"def {name.split('.')[-1]}(") >= 1, name
    assert CORE == list(range(1, 8)) and set(CORE) < set(WITH_FUNCTIONS)
    tests = ast.parse(lab.read(ROOT / "tests/test_exercises.py")).body
    tests = [t for t in tests if re.match(r"test_\d+_", getattr(t, "name", ""))]
    assert {int(t.name.split("_")[1]) for t in tests} == set(WITH_FUNCTIONS)
    for test in tests:
        assert ast.get_docstring(test), f"{test.name} must say what to look at"


def test_the_guide_has_the_exercises_of_the_table():
    headings = re.findall(r"^## (\d+)\. (.+?)( ★)? \((\d+) min\)$", GUIDE, re.MULTILINE)
    assert [int(number) for number, *_ in headings] == list(EXERCISES)
    for number, goal, star, minutes in headings:
        exercise = EXERCISES[int(number)]
        assert goal.lower() == exercise.goal.lower() and int(minutes) == exercise.minutes
        assert bool(star) == (int(number) not in CORE)


# ---- start and solve


@pytest.mark.parametrize("number", WITH_FUNCTIONS)
def test_a_stub_holds_no_answer_fails_and_becomes_the_original(root, number, monkeypatch, capsys):
    before, functions = contents(root), EXERCISES[number].functions
    lab.start(root, number)
    after = contents(root)
    assert {f for f in before if before[f] != after[f]} == {f.split("::")[0] for f in functions}
    for function in functions:
        lines, node, _ = lab.find(root, function)
        _, original, _ = lab.find(ROOT, function)
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        assert not [line for line in secret_lines([number]) if line in text]
        assert node.body[-1].exc.args[0].value == f"exercise {number}"
        assert ast.dump(node.args) == ast.dump(original.args)
        assert ast.get_docstring(node) == ast.get_docstring(original)
    pretend_pytest_says(monkeypatch, 0)
    assert lab.state(root, number) == "empty" and lab.check(root, number) == 1
    assert f"write {functions[0]} first (exercise" in capsys.readouterr().out
    lab.solve(root, number)
    assert contents(root) == before and lab.state(root, number) == "original"


def test_what_was_written_is_never_lost(root):
    lab.start(root, 5)
    lab.set_body(root, "decode.py::rates", "    return [], []")
    with pytest.raises(SystemExit, match="exercise 5 is empty"):
        lab.start(root, 5)
    lab.set_body(root, "decode.py::accepted_lengths", "    return 0")
    lab.write(root / "decode.py", lab.read(root / "decode.py") + "# mine\n")
    for command in (lab.start, lambda *_: lab.handout(root, root.parent / "class", [5])):
        with pytest.raises(SystemExit, match="exercise 5 is written, .* `solve 5` keeps a copy"):
            command(root, 5)
    for _ in range(2):  # once more, and the copy is still there
        lab.solve(root, 5)
        assert lab.read(root / "decode.py") == lab.read(ROOT / "decode.py") + "# mine\n"
        assert "    return [], []" in lab.read(root / ".lab/exercise_5.txt")
    lab.start(root, 5)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_decorators_comments_and_line_endings_stay(tmp_path, newline):
    head = "class A:\n    @f\n    def g(self,\n          x):\n"
    body = "        y = 1\n\n        # why\n        return y\n"
    before = (head + body + "\nlast = 0\n").replace("\n", newline).encode()
    (tmp_path / "a.py").write_bytes(before)
    answer = lab.get_body(tmp_path, "a.py::A.g")
    lab.set_stub(tmp_path, "a.py::A.g", "raise f")
    assert lab.read(tmp_path / "a.py").split() == (head + "raise f last = 0").split()
    lab.set_body(tmp_path, "a.py::A.g", answer)
    assert (tmp_path / "a.py").read_bytes() == before


# ---- check

OUTPUT = """Traceback
E   ZeroDivisionError: division by zero
E   more of it
FAILED tests/test_exercises.py::test_5_rates[histogram0] - ZeroDivisionError: divis...
"""


@pytest.mark.parametrize("output", [OUTPUT, "Traceback\nERROR tests/test_exercises.py\n"])
def test_check_says_what_to_look_at_before_the_traceback(monkeypatch, capsys, output):
    commands = pretend_pytest_says(monkeypatch, 1, output)
    assert lab.check(ROOT, 5) == 1
    assert "test_5_" in commands[0]
    told, _ = capsys.readouterr().out.split("Traceback")
    if output == OUTPUT:
        assert "not yet. test_5_rates: ZeroDivisionError: division by zero\n" in told
        assert "look at this: AR_k divides the rounds" in told
    assert "look at th" in told


def test_a_skipped_test_is_not_passed(monkeypatch, capsys):
    pretend_pytest_says(monkeypatch, 0, "2 passed, 1 skipped in 0.1s")
    assert lab.check(ROOT, 5) == 1
    assert "exercise 5: not yet. A test was skipped" in capsys.readouterr().out


def test_a_function_on_one_line_is_not_taken_for_its_body(tmp_path):
    lab.write(tmp_path / "a.py", "def f(x): return x\n\n\ndef g(x):\n    return x\n")
    with pytest.raises(SystemExit, match="a.py, line 1: put the body of f on a line of its own"):
        lab.set_body(tmp_path, "a.py::f", "    return 2")
    lab.set_body(tmp_path, "a.py::g", "    return 2")
    assert lab.read(tmp_path / "a.py").endswith("def f(x): return x\n\n\ndef g(x):\n    return 2\n")


def test_check_says_what_is_next_and_what_is_needed(root, monkeypatch, capsys):
    pretend_pytest_says(monkeypatch, 0)
    assert lab.check(root, 5) == 0
    assert "all tests pass\nnext: exercise 6, two simple accept rules" in capsys.readouterr().out
    lab.start(root, 3)
    assert lab.check(root, 1) == 0
    assert "next: exercise 3, the TopN" in capsys.readouterr().out
    assert lab.check(root, 4) == 1
    assert "write distill.py::topn_divergence first (exercise 3): it is empty" in capsys.readouterr().out


def test_a_file_that_is_not_python_is_named(root):
    lab.write(root / "decode.py", lab.read(root / "decode.py") + "def broken(:\n")
    done = subprocess.run(
        [sys.executable, "tests/lab.py", "check", "5"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(r"decode.py, line \d+: .*; mend that line first\n", done.stderr)


# ---- hand-outs


def test_nothing_that_python_or_a_run_left_behind_is_copied(root):
    before = lab.files_to_copy(root)
    for name in ("results/__pycache__/bench.cpython-311.pyc", "ckpt.pt", "decode.py.part"):
        lab.write(root / name, "")
    assert lab.files_to_copy(root) == before and root / "results/bench.py" in before


def assert_holds_no_answer(folder, numbers):
    secret = secret_lines(numbers)
    for name, content in contents(folder).items():
        if not name.endswith(".xz"):
            text = content.decode("utf-8")
            assert not [line for line in secret if line in text], name


def test_a_handout_holds_no_answer(original, tmp_path, capsys):
    folder = tmp_path / "new/class"
    lab.handout(original, folder, CORE)
    assert_holds_no_answer(folder, CORE)
    assert "teacher.topk(" in lab.read(original / "fast/loss.py")
    assert "teacher.topk(" not in lab.read(folder / "fast/loss.py")
    guide = lab.read(folder / "tests/README.md")
    assert "<details>" not in guide and "<!--" not in guide and "Handing it out" not in guide
    missing = {Path(name).name for name in set(contents(original)) - set(contents(folder))}
    assert missing == set(lab.NOT_COPIED) and not [name for name in missing if name in guide]
    for number in CORE:
        assert lab.state(folder, number) == "empty" and lab.check(folder, number) == 1
    # 8 shows the answer of 7
    assert lab.state(folder, 8) == "left out" and lab.check(folder, 8) == 1
    assert "speculative_round, which is left out" in capsys.readouterr().out
    assert lab.next_exercise(folder, 7).startswith("next: exercise 9")
    with pytest.raises(SystemExit, match="your teacher has the answers"):
        lab.solve(folder, 7)
    # what a student wrote is not taken for the original
    lab.set_body(folder, "decode.py::residual", "    return 1")
    assert lab.state(folder, 7) == "written"


@pytest.mark.parametrize("numbers", [[7], *(pytest.param(n, marks=pytest.mark.slow) for n in (
    CORE, [1], [2], [3], [4], [5], [6], [8], [9], [10], [13], [3, 10], [7, 8]))], ids=str)
def test_the_teachers_file_gives_everything_back(original, tmp_path, numbers):
    folder = tmp_path / "class"
    lab.handout(original, folder, numbers)
    assert_holds_no_answer(folder, numbers)
    shutil.copyfile(tmp_path / "class-answers.json", folder / ".lab/answers.json")
    for number in numbers:
        lab.solve(folder, number)
    before, after = contents(original), contents(folder)
    different = {name for name in after if after[name] != before[name]}
    assert different <= {"README.md", "tests/README.md", "fast/loss.py"}


def test_the_answer_of_one_exercise_does_not_overwrite_another(original, tmp_path):
    folder = tmp_path / "class"
    lab.handout(original, folder, [7])
    shutil.copyfile(tmp_path / "class-answers.json", folder / ".lab/answers.json")
    lab.solve(folder, 7)
    lab.start(folder, 8)
    lab.set_body(folder, "decode.py::speculative_round", "    return [1]")
    lab.solve(folder, 7)
    assert lab.get_body(folder, "decode.py::speculative_round") == "    return [1]"


def test_pytest_skips_what_calls_a_function_that_is_left_out(tmp_path):
    lab.write(tmp_path / "a.py", "def twin():\n    return 1\n")
    lab.set_stub(tmp_path, "a.py::twin", lab.LEFT_OUT)
    scope = {}
    exec(lab.read(tmp_path / "a.py"), scope)
    with pytest.raises(unittest.SkipTest, match="left out: it shows an exercise's answer"):
        scope["twin"]()


def test_a_teachers_own_files_stay_at_home(tmp_path, monkeypatch):
    """what git does not know, where there is git"""
    for name in ("model.py", "solutions_of_mine.md"):
        lab.write(tmp_path / name, "x")
    assert {path.name for path in lab.files_to_copy(tmp_path)} == {"model.py", "solutions_of_mine.md"}
    lab.write(tmp_path / ".git/HEAD", "")
    answer = subprocess.CompletedProcess([], 0, b"model.py\0data/prepare.py\0")
    monkeypatch.setattr(lab.subprocess, "run", lambda *args, **options: answer)
    assert [path.name for path in lab.files_to_copy(tmp_path)] == ["model.py"]


def test_a_handout_goes_into_an_empty_folder_and_from_a_whole_repository(root, tmp_path):
    folder = tmp_path / "class"
    lab.start(root, 3)
    with pytest.raises(SystemExit, match="exercise 3 is empty"):
        lab.handout(root, folder, CORE)
    assert not folder.exists()
    for name in ("class/thesis.txt", "class-answers.json"):
        lab.write(tmp_path / name, "x")
        with pytest.raises(SystemExit, match="not an empty folder, or class-answers.json is there"):
            lab.handout(root, folder, [1])
        assert lab.read(tmp_path / name) == "x"
        (tmp_path / name).unlink()


# ---- the command line


@pytest.mark.parametrize("arguments, found", [
    ([], "required: COMMAND"), (["start"], "required: number"), (["teach", "3"], "invalid choice"),
    (["start", "0"], "0 is not an exercise that"), (["check", "12"], "12 is not an exercise that"),
    (["start", "three"], "three is not"), (["handout"], "required: folder"),
    (["handout", "class", "3", "99"], "99 is not an exercise that empties a function")])
def test_bad_commands_say_what_to_give(capsys, arguments, found):
    with pytest.raises(SystemExit):
        lab.main(arguments)
    assert found in capsys.readouterr().err


def test_commands(original, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab, "ROOT", original)
    assert not lab.main(["list"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("-  ") and [line.endswith(" -") for line in lines] == [
        not exercise.functions for exercise in EXERCISES.values()]
    assert [int(line.split()[0]) for line in lines] == list(EXERCISES)
    assert lines[0].endswith("45 min   original")
    assert len([line for line in lines if line.endswith("original")]) == len(WITH_FUNCTIONS)
    monkeypatch.setattr(lab, "handout", lambda root, folder, numbers: numbers)
    assert lab.main(["handout", "class"]) == CORE
    assert lab.main(["handout", "class", "4", "9"]) == [4, 9]
    with pytest.raises(SystemExit, match="no answer of exercise 3 here"):
        lab.main(["solve", "3"])


# ---- slow: what a student may write


def check_solution(original, folder, number, function, body):
    """exercise `number` in a copy, its function written so -> exit code of check, what it prints"""
    shutil.copytree(original, folder)
    (folder / ".tmp").mkdir()
    lab.set_stub(folder, function, body.strip("\n"))
    done = subprocess.run(
        [sys.executable, "tests/lab.py", "check", str(number)], cwd=folder, capture_output=True,
        text=True, encoding="utf-8", errors="replace", timeout=600,
        # pytest numbers its temporary folders, and removes old ones: not those of other runs
        env={**os.environ, "PYTEST_DEBUG_TEMPROOT": str(folder / ".tmp")},
    )
    shutil.rmtree(folder)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", CORE)
def test_right_solutions_pass_and_wrong_ones_do_not(original, tmp_path, number):
    tried = [solution for solution in SOLUTIONS if solution[0] == number]
    assert {right for _, _, right, _ in tried} == {True, False} and len(tried) >= 3

    def check(i):
        number, function, _, body = tried[i]
        return check_solution(original, tmp_path / str(i), number, function, body)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(check, range(len(tried))))
    for (_, function, right, body), (code, output) in zip(tried, results):
        assert code == (0 if right else 1), f"{function}, right: {right}\n{body}\n{output}"
        assert code == 0 or "\nlook at this: " in output, output


# ---- the answers of the guide

LOOPS = "test_model.py::test_all_logits_equal_the_loop_reference"
ROLLBACKS = "test_model.py::test_cached_steps_with_rollbacks_equal_the_full_forward"
TAUGHT_NOTHING = (
    "test_distill.py::test_a_head_that_predicts_what_the_main_head_predicts_has_no_divergence")
RULE = ("test_decode.py::"
        "test_each_rule_emits_the_target_distribution_and_accepts_as_often_as_it_should")
ROUNDING = ("test_decode.py::"
            "test_a_rejection_that_only_rounding_can_cause_still_emits_a_possible_token")
BY_HAND = "test_decode.py::test_cached_drafts_texts_and_counts_equal_those_by_hand"
GREEDY = "test_decode.py::test_greedy_text_is_that_of_plain_decoding"
GUARD = "return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)"
WINDOW = "self.window(1 - self.width, 0)"
# (exercise, words of the guide, file, what they mean to change, into what, tests that its answer
# says fail, and tests that it says pass)
BREAKS = [
    (1, "Switch the mask off", "model.py",
     "is_causal=True, dropout_p", "is_causal=False, dropout_p",
     ["test_model.py::test_changing_a_token_changes_nothing_before_it",
      "test_model.py::test_a_row_sees_exactly_the_tokens_before_its_target", LOOPS, ROLLBACKS], []),
    (2, "one token too early", "model.py",
     "next_embed = embed[:, k:]", "next_embed = embed[:, k - 1 : -1]",
     [LOOPS, ROLLBACKS], []),
    (2, "swap the halves", "model.py",
     "torch.cat((hidden, embed), dim=-1)", "torch.cat((embed, hidden), dim=-1)",
     [LOOPS, "test_exercises.py::test_2_the_numbers"],
     ["test_model.py", "test_exercises.py::test_2_each_state_has_read_what_it_should",
      "test_exercises.py::test_2_gradients_reach_the_trunk"]),
    (3, "Let the student choose the tokens", "distill.py",
     "top = teacher.topk(n,", "top = student.topk(n,",
     ["test_distill.py::test_five_tokens_worked_by_hand"], []),
    (3, "Never detach the teacher", "distill.py", "if detach_teacher:", "if False:",
     ["test_distill.py::test_detach_keeps_the_teacher_out"], []),
    (4, "take the first T-K rows of every head", "distill.py",
     "hidden[k][:, K - k : T - k] for k in heads", "hidden[k][:, : T - K] for k in heads",
     [TAUGHT_NOTHING], []),
    (4, "weigh the heads' means as the main head's", "distill.py", '*per_head(alpha, K, "alpha")]',
     '*(main_share * a for a in per_head(alpha, K, "alpha"))]',
     ["test_distill.py::test_everything_is_a_mean"], [TAUGHT_NOTHING]),
    (5, "count every head that is right", "decode.py",
     "num_accepted(torch.stack(ok, dim=1)) - 1", "torch.stack(ok, dim=1).int().sum(1) - 1",
     ["test_decode.py::test_acceptance_of_a_handmade_example"], []),
    (7, "emit from p after a rejection", "decode.py", GUARD, "return p", [RULE], [ROUNDING]),
    (7, "Remove its guard", "decode.py", GUARD, "return rest", [ROUNDING], [RULE]),
    (9, "let the mask show each query one slot more", "model.py",
     "cache.slot > pos[:, None, :, None]", "cache.slot > pos[:, None, :, None] + 1",
     [ROLLBACKS], [LOOPS]),
    (9, "rotate by one position more", "model.py",
     "self.rope[:, pos].unsqueeze(2)", "self.rope[:, pos + 1].unsqueeze(2)",
     [], ["test_model.py", "test_decode.py"]),
    (9, "count positions from the start of the window", "model.py",
     "self.rope[:, pos].unsqueeze(2)", "self.rope[:, pos - pos[:, :1]].unsqueeze(2)",
     [ROLLBACKS, BY_HAND], [LOOPS]),
    (12, "keep only the last row of the window", "decode.py",
     WINDOW, "self.window(0, 0)", [BY_HAND], [GREEDY]),
    (12, "then all rows but the first", "decode.py",
     WINDOW, "self.window(2 - self.width, 0)", [BY_HAND], [GREEDY]),
    (12, "take the bonus token from the row before the last", "decode.py",
     "token = select_row(choices, accepted)",
     "token = select_row(choices, accepted.clamp_max(self.heads - 1))", [BY_HAND, GREEDY], []),
    (13, "leave out the line that freezes", "extend.py", "model.requires_grad_(False)", "pass",
     ["test_extend.py::test_training_moves_the_new_heads_alone"], []),
]
# what must be written beside an exercise, where all are empty, for its breaks to show
BREAK_NEEDS = {1: [2], 2: [1], 3: [1, 2, 4], 4: [1, 2, 3], 5: [1, 2], 7: [1, 2, 5, 6]}


def mistake_in(folder, file, snippet, mistake):
    """put the mistake in; a student may have written the line anew, but in CI it must be there"""
    source = lab.read(folder / file)
    times = source.count(snippet)
    if times != 1 and not os.environ.get("CI"):
        pytest.skip(f"{file} holds {snippet!r} {times} times")
    assert times == 1, f"{file} holds {snippet!r} {times} times: change the guide and BREAKS"
    if folder != ROOT:
        lab.write(folder / file, source.replace(snippet, mistake))


def failures(output):
    return set(re.findall(r"^(?:FAILED|ERROR) tests/([\w.]+(?:::\w+)?)", output, re.MULTILINE))


@pytest.mark.parametrize("n", range(len(BREAKS)))
def test_the_guide_describes_the_breaks_and_their_lines_exist(n):
    number, words, file, snippet, mistake, _, _ = BREAKS[n]
    section = GUIDE.split(f"\n## {number}. ")[1].split("\n## ")[0].split("\n---")[0]
    assert words in " ".join(section.split())
    # in words alone, for the line is a part of the answer
    assert snippet not in GUIDE and (mistake == "pass" or mistake not in GUIDE)
    mistake_in(ROOT, file, snippet, mistake)


@pytest.mark.slow
@pytest.mark.parametrize("n", range(len(BREAKS)))
def test_a_break_fails_what_the_guide_says(tmp_path, n):
    _, _, file, snippet, mistake, red, green = BREAKS[n]
    mutations.copy_to(tmp_path)
    mistake_in(tmp_path, file, snippet, mistake)
    output = mutations.run(tmp_path, [*red, *green])
    assert failures(output) == set(red), output


def named_tests(folder, name, word):
    """the tests of a file with this word in their names"""
    names = re.findall(r"^def (test_\w+)", lab.read(folder / "tests" / name), re.MULTILINE)
    return [f"{name}::{test}" for test in names if word in test]


def write_answers(folder, numbers):
    """as a student would write them: what else is left out stays so"""
    answers = json.loads(lab.read(folder.with_name(folder.name + "-answers.json")))
    for function in [f for n in numbers for f in EXERCISES[n].functions]:
        lab.set_body(folder, function, answers[function])


@pytest.mark.slow
@pytest.mark.parametrize("number", BREAK_NEEDS)
def test_a_break_shows_in_a_handout(original, tmp_path, number):
    """with what it needs written, and all other exercises empty: nothing fails before the break,
    and after it some of what the guide says (the others may be skipped)"""
    folder = tmp_path / "class"
    lab.handout(original, folder, CORE)
    write_answers(folder, [number, *BREAK_NEEDS[number]])
    breaks = [b for b in BREAKS if b[0] == number]
    (name,) = {b[5][0].split("::")[0] for b in breaks}     # as the guide says
    tests = named_tests(folder, name, "acceptance" if number == 5 else "")
    if number == 2:
        tests += named_tests(folder, "test_exercises.py", "test_2_")
    output = mutations.run(folder, tests)
    assert not failures(output) and " passed" in output, output
    for _, _, file, snippet, mistake, red, _ in breaks:
        source = lab.read(folder / file)
        mistake_in(folder, file, snippet, mistake)
        output = mutations.run(folder, red)
        assert failures(output) and failures(output) <= set(red), output
        lab.write(folder / file, source)


# ---- what is measured in the guide

SMALL_RUN = (
    "train.py --data text.txt --tokenizer bpe:512 --n_layer 2 --n_head 2 --n_embd 64 --n_mtp 3 "
    "--block_size 64 --batch_size 8 --steps 200 --warmup 10 --lr 5e-3 --eval_every 1000 "
    "--eval_windows 60 --embed_std 0.05 --device cpu --compile off --dtype float32 --fast off "
    "--json"
)


def small_run(code, name, *flags):
    """200 steps with the code in a folder -> the evaluation"""
    if not (code / "text.txt").exists():
        text = lzma.open(code / "data/stories.val.txt.xz", "rt", encoding="utf-8").read()[:400_000]
        (code / "text.txt").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *SMALL_RUN.split(), "--out", f"out/{name}", *flags], cwd=code,
        capture_output=True, text=True, encoding="utf-8", timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_the_guide_says_of_small_runs(tmp_path):
    mutations.copy_to(tmp_path / "code")
    right = small_run(tmp_path / "code", "right")
    assert right["loss"][0] == pytest.approx(3.85, abs=0.1)
    assert right["ar"][0] == pytest.approx(0.73, abs=0.05)
    assert right["kl"][0] == pytest.approx(0.07, abs=0.03)
    assert right["tokens_per_forward"] == pytest.approx(2.6, abs=0.15)
    # exercise 3: without the stop-gradient
    free = small_run(tmp_path / "code", "free", "--no-detach_teacher")
    assert free["loss"][0] == pytest.approx(right["loss"][0], abs=0.01)
    assert free["ar"][0] == pytest.approx(0.76, abs=0.05)
    assert free["ar"][0] > right["ar"][0] + 0.01
    # exercise 4: rows that are not aligned
    (_, _, file, snippet, mistake, *_), *_ = [b for b in BREAKS if b[0] == 4]
    mistake_in(tmp_path / "code", file, snippet, mistake)
    wrong = small_run(tmp_path / "code", "wrong")
    assert wrong["loss"][0] == pytest.approx(5.3, abs=0.2)
    assert wrong["loss"][3] == pytest.approx(4.3, abs=0.2) == min(wrong["loss"])
    assert wrong["ar"][0] == pytest.approx(0.89, abs=0.07)
    assert wrong["ar"][0] > right["ar"][0] + 0.05
    assert wrong["kl"][0] < right["kl"][0] / 2
    assert wrong["tokens_per_forward"] > right["tokens_per_forward"]


DRAFT_LOOP = """        draft_probs.append(probs(k + 1, tokens + drafts)[-1])
        drafts.append(int(sample(draft_probs[k], noise.draft[0, k])))
"""
DROP_A_DRAFT = """        draft_probs.append(probs(k + 1, tokens + drafts)[-1])
        draft = int(sample(draft_probs[k], noise.draft[0, k]))
        if draft_probs[k][draft] < 0.6:
            break
        drafts.append(draft)
"""
STOP_BEFORE = """        draft_probs.append(probs(k + 1, tokens + drafts)[-1])
        if draft_probs[k].max() < 0.6:
            break
        drafts.append(int(sample(draft_probs[k], noise.draft[0, k])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("loop, exact", [(DROP_A_DRAFT, False), (STOP_BEFORE, True)])
def test_dropping_a_draft_is_biased_and_stopping_before_it_is_exact(tmp_path, loop, exact):
    """exercise 11"""
    mutations.copy_to(tmp_path)
    mistake_in(tmp_path, "decode.py", DRAFT_LOOP, loop)
    test = "test_exercises.py::test_8_the_next_token_has_the_main_heads_distribution"
    output = mutations.run(tmp_path, [test])
    assert (f"FAILED tests/{test}" not in output) == exact and "ERROR" not in output, output


def test_numbers_of_the_guide_that_are_worked_out():
    # exercise 3: the student's 1 and 3, the teacher's 5 and 3
    p, q = [1 / 4, 3 / 4], [5 / 8, 3 / 8]
    forward = sum(b * math.log(b / a) for a, b in zip(p, q))
    reverse = sum(a * math.log(a / b) for a, b in zip(p, q))
    # and 10
    assert round(forward, 4) == 0.3128 and round((forward + reverse) / 2, 4) == 0.3018
    assert math.isclose(forward, 5 / 8 * math.log(5 / 2) - 3 / 8 * math.log(2))
    # exercise 4: target t_6 is column 5, and head k's row for it is 5 - k
    targets = torch.arange(1, 8)[None]
    hidden = [torch.arange(7 - k)[None, :, None] for k in range(4)]
    rows, labels = distill.aligned(hidden, targets, range(4))
    assert labels.tolist() == [4, 5, 6, 7] and rows[:, 2, 0].tolist() == [5, 4, 3, 2]
    # exercises 5 and 7
    choices = [[3, 1, 4, 1, 5, 9], [1, 4, 2, 5, 9], [4, 7, 5, 0]]
    lengths = decode.accepted_lengths([torch.tensor([row]) for row in choices])
    assert lengths.tolist() == [[2, 1, 0, 1]]
    assert round(1 + 0.8 + 0.8**2 + 0.8**3, 2) == 2.95
    p, q = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    accepted = sum(map(min, p, q))
    assert round(accepted, 9) == 0.6 and round(0.2 + (1 - accepted) * 0.75, 9) == 0.5
    assert [round(max(0, a - b) / (1 - accepted), 9) for a, b in zip(p, q)] == [0.75, 0.25, 0]
    # exercise 11: drafts below 0.25 are dropped
    q = [0.3, 0.2, 0.5]
    rest = [max(0, a - b) for a, b in zip(p, q)]
    emitted = [0.0] * 3
    for x in range(3):
        accept = 0 if q[x] < 0.25 else min(1, p[x] / q[x])
        other = p if q[x] < 0.25 else [r / sum(rest) for r in rest]
        for v in range(3):
            emitted[v] += q[x] * ((v == x) * accept + (1 - accept) * other[v])
    assert [round(e, 9) for e in emitted] == [0.6, 0.16, 0.24]
    # exercise 14
    two, four = 1 + 0.7 + 0.7**2, 1 + 0.7 + 0.7**2 + 0.7**3 + 0.7**4
    assert [round(x, 2) for x in (two, four, two / 1.24, four / 1.48)] == [2.19, 2.77, 1.77, 1.87]
    assert round((four - two) / (4 * two - 2 * four), 2) == 0.18


# ---- slow: a whole hand-out


@pytest.mark.slow
def test_a_handout_is_green_once_all_is_written(original, tmp_path):
    folder = tmp_path / "class"
    lab.handout(original, folder, CORE)
    for number in CORE:  # the tests themselves, not only the look at the stub
        output = mutations.run(folder, named_tests(folder, "test_exercises.py", f"test_{number}_"))
        assert "FAILED" in output, number
    write_answers(folder, CORE)
    for number in CORE:
        begin = os.times()
        assert lab.check(folder, number) == 0
        # seconds of processor time: on a busy machine the clock says nothing
        spent = sum(os.times()[2:4]) - sum(begin[2:4])
        assert spent < 15, f"check {number} takes {spent:.0f} s"
    output = mutations.run(folder, [""])  # the whole suite, without what is left out
    assert not failures(output) and " passed" in output and " skipped" in output, output


@pytest.mark.slow
def test_bench_in_a_handout(original, tmp_path):
    """check runs, decode says that it is left out, and runs again when the answers are back"""
    lab.handout(original, tmp_path / "class", [5])
    folder = tmp_path / "class"
    mutations.copy_to(tmp_path / "code")
    small_run(tmp_path / "code", "toy", "--steps", "20", "--eval_windows", "4")
    options = ["--tokens", "20", "--device", "cpu", "--prompts", "prompts.txt"]

    def bench(command):
        done = subprocess.run(
            [sys.executable, "results/bench.py", command, tmp_path / "code/out/toy/ckpt.pt",
             *options],
            cwd=folder, capture_output=True, text=True, encoding="utf-8", errors="replace",
        )
        return done.returncode, done.stdout + done.stderr

    (folder / "prompts.txt").write_text("Once upon a time\nThe cat sat\n", encoding="utf-8")
    code, output = bench("check")
    assert code == 0 and "2 of 2" in output, output
    write_answers(folder, [5])
    code, output = bench("decode")
    assert code == 1 and "left out: it shows an exercise's answer" in output, output
    shutil.copyfile(tmp_path / "class-answers.json", folder / ".lab/answers.json")
    lab.solve(folder, 5)
    code, output = bench("decode")
    assert code == 0, output
