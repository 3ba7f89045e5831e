"""
lab.py: the exercises of tests/README.md, for students and for who teaches them.

    python tests/lab.py list              the exercises, and which functions are empty now
    python tests/lab.py start 3           empty the functions of exercise 3; their docstrings stay
    python tests/lab.py check 3           run its tests: what to look at, then the traceback
    python tests/lab.py solve 3           the original again; your version is kept in .lab/
    python tests/lab.py handout DIR       a copy for students, exercises 1 to 7 emptied, no answers
    python tests/lab.py handout DIR 3 4   the same with these two

`start` keeps what it takes out in .lab/answers.json. `handout` writes that file beside DIR: give it
to the students afterwards, as .lab/answers.json, and `solve` works in their copies, too.
"""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = "left out:"  # so begins what a function raises that a hand-out empties beside the answer
PLAIN_FORM = r"^ *# in plain PyTorch:\n( *#  .*\n)+"  # above a kernel of fast/loss.py


class Exercise(NamedTuple):
    goal: str
    minutes: int
    functions: list = []  # file::function, emptied by `start`
    needs: list = []      # exercises whose functions the tests of this one call
    tests: list = []      # beside those named test_N_.. in test_exercises.py
    twins: list = []      # functions and files that give the answer away: a hand-out lacks them


CORE = [1, 2, 3, 4, 5, 6, 7]
EXERCISES = {
    1: Exercise("who sees what: the causal mask", 45, ["model.py::Attention.forward"],
                twins=["tests/test_model.py::ref_block", "tests/test_pretrained.py::llama"]),
    2: Exercise("the cascade of heads", 40, ["model.py::GPT.cascade"],
                twins=["tests/test_model.py::ref_logits", "tests/test_extend.py::cascade_by_hand"]),
    3: Exercise("the TopN divergence and the stop-gradient", 45, ["distill.py::topn_divergence"],
                twins=["tests/test_distill.py::slow_kl", "tests/test_distill.py::"
                       "test_a_new_divergence_is_one_function_and_one_entry"]),
    4: Exercise("alignment by target, and the whole loss", 45,
                ["distill.py::aligned", "distill.py::mtp_d_loss"], needs=[3],
                twins=["tests/test_distill.py::slow_loss",
                       "tests/test_train.py::slow_evaluation",
                       "tests/test_distill.py::"
                       "test_the_plain_loss_is_the_loss_of_logits_that_are_aligned"]),
    5: Exercise("acceptance: AR and CAR", 30, ["decode.py::accepted_lengths", "decode.py::rates"],
                twins=["tests/test_decode.py::test_acceptance_equals_a_loop_over_positions",
                       "tests/test_train.py::slow_evaluation", "results/bench.py::rates",
                       "results/bench.py::accept_probs", "tests/test_bench.py",
                       "tests/test_decode.py::"
                       "test_the_benchs_acceptance_is_that_of_restricted_heads"]),
    6: Exercise("two simple accept rules", 30, ["decode.py::match", "decode.py::point"],
                twins=["tests/test_decode.py::emits_from_p_after_a_fixed_draft"]),
    7: Exercise("the residual rule", 45, ["decode.py::residual"],
                twins=["tests/test_decode.py::accepts_by_q", "tests/test_decode.py::emits_from_p",
                       "decode.py::speculative_round"]),
    8: Exercise("a whole round, without a cache", 60, ["decode.py::speculative_round"],
                needs=[1, 2]),
    9: Exercise("positions and the cache", 40, ["model.py::rotate"], needs=[1, 2],
                tests=["test_model.py::test_cached_steps_with_rollbacks_equal_the_full_forward"],
                twins=["tests/test_model.py::ref_turn"]),
    10: Exercise("a divergence of your own", 45,
                 ["distill.py::reverse_kl", "distill.py::total_variation"],
                 twins=["tests/test_distill.py::slow_kl"]),
    11: Exercise("when to stop drafting", 45),
    12: Exercise("the draft window", 40),
    13: Exercise("looped heads", 30, ["extend.py::loop_heads"], needs=[1, 2],
                 tests=["test_extend.py::test_heads_are_copied_and_not_shared",
                        "test_extend.py::test_the_copy_is_the_cascade_with_repeated_heads"]),
    14: Exercise("predict the speed-up, then measure it", 45),
    15: Exercise("heads on the frozen real model", 60),
}


def stop(text):
    sys.exit(f"lab.py: {text}")


def get_exercise(number):
    if number not in EXERCISES:
        stop(f"there is no exercise {number}; give one of 1 to {max(EXERCISES)}")
    return EXERCISES[number]


# -----------------------------------------------------------------------------
# functions in a source text. A function is named file::name or file::Class.name


def read(path):
    return path.read_bytes().decode("utf-8")  # line endings stay as they are


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(text.encode("utf-8"))
    os.replace(part, path)


def file_of(function):
    return function.split("::")[0]


@functools.lru_cache(100)
def parse(source, file):
    try:
        return ast.parse(source)
    except SyntaxError as error:
        stop(f"{file} is not Python, line {error.lineno}: {error.msg}; mend that line first")


def find(source, function):
    """the syntax tree of a function"""
    file, name = function.split("::")
    node = parse(source, file)
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", "") == part), None)
        if node is None:
            stop(f"there is no {function}; was it renamed?")
    return node


def body_lines(source, function):
    """where the body of a function begins and ends, without its docstring: lines[begin:end]"""
    node = find(source, function)
    first, lines = node.body[0], source.split("\n")
    if ast.get_docstring(node) is not None:
        return first.end_lineno, node.end_lineno
    begin = first.lineno - 1
    while begin > node.lineno and lines[begin - 1].strip()[:1] in ("", "#"):
        begin -= 1
    return begin, node.end_lineno


def get_body(source, function):
    begin, end = body_lines(source, function)
    return "\n".join(source.split("\n")[begin:end])


def set_body(source, function, body):
    begin, end = body_lines(source, function)
    lines = source.split("\n")
    return "\n".join([*lines[:begin], body, *lines[end:]])


def stub(source, function, message):
    indent = " " * find(source, function).body[0].col_offset
    return set_body(source, function, f'{indent}raise NotImplementedError("{message}")')


def bodies(root, number):
    """{function: its body} of an exercise, as they are now"""
    functions = get_exercise(number).functions
    return {f: get_body(read(root / file_of(f)), f) for f in functions}


def empty_functions(root, number, message=""):
    """those whose first statement still raises what `start` or `handout` put there"""
    begin = f'raise NotImplementedError("{message}'
    return [f for f, body in bodies(root, number).items() if body.strip().startswith(begin)]


# -----------------------------------------------------------------------------
# list, start, solve


def read_answers(root):
    """{function: body}; in a hand-out {function: None}"""
    path = root / ".lab/answers.json"
    return json.loads(read(path)) if path.is_file() else {}


def state(root, number):
    answers = read_answers(root)
    if not EXERCISES[number].functions:
        return "changes of your own"
    if empty_functions(root, number, LEFT_OUT):
        return "left out"
    if empty_functions(root, number):
        return "empty"
    changed = [f for f, body in bodies(root, number).items() if answers.get(f, body) != body]
    return "written" if changed else "original"


def offered(root):
    """the exercises, without those that this hand-out leaves out"""
    return [n for n in EXERCISES if state(root, n) != "left out"]


def show_list(root):
    for number in offered(root):
        exercise = EXERCISES[number]
        goal = exercise.goal
        if exercise.needs:
            goal += f" (needs {', '.join(map(str, exercise.needs))})"
        star = " " if number in CORE else "★"
        print(f"{number:2} {star} {goal:55} {exercise.minutes} min   {state(root, number)}")


def start(root, number):
    found = bodies(root, number)
    now = state(root, number)
    if not found:
        stop(f"exercise {number} empties nothing; tests/README.md says what to do")
    if now == "empty":
        stop(f"exercise {number} is empty already: write it, then `check {number}`")
    if now == "written":
        stop(f"exercise {number} is begun, and start would destroy what you wrote; "
             f"`solve {number}` keeps a copy of that and gives the original back")
    write(root / ".lab/answers.json", json.dumps({**read_answers(root), **found}, indent=1))
    for function in found:
        path = root / file_of(function)
        write(path, stub(read(path), function, f"exercise {number}"))
        print(f"emptied {function}")
    print(f"write it again, then: python tests/lab.py check {number}")


def solve(root, number):
    mine = bodies(root, number)
    answers = read_answers(root)
    known = [f for f in mine if answers.get(f)]
    twins = [f for f in EXERCISES[number].twins if answers.get(f)]
    twins = [f for f in twins if LEFT_OUT in get_body(read(root / file_of(f)), f)]
    if not known:
        stop(f"there is no answer of exercise {number} here: it was not started in this folder, or "
             "your teacher has the answers (a file that becomes .lab/answers.json)")
    kept = root / f".lab/exercise_{number}.txt"
    write(kept, "\n\n".join(f"# {f}\n{body}" for f, body in mine.items()))
    for function in known + twins:
        path = root / file_of(function)
        write(path, set_body(read(path), function, answers[function]))
        print(f"the original is back: {function}")
    print(f"your version is kept in .lab/{kept.name}")


# -----------------------------------------------------------------------------
# check


def get_tests(root, number):
    """{test: the sentence that says what to look at, which is its docstring}"""
    tests = {}
    for wanted in [*EXERCISES[number].tests, f"test_exercises.py::test_{number}_"]:
        file, name = wanted.split("::")
        for node in parse(read(root / "tests" / file), file).body:
            found = getattr(node, "name", "")
            if found == name or (name.endswith("_") and found.startswith(name)):
                tests[f"tests/{file}::{found}"] = ast.get_docstring(node) or ""
    return tests


def next_exercise(root, number):
    after = [n for n in offered(root) if n > number]
    following = [n for n in after if empty_functions(root, n)] or after
    if not following:
        return "that was the last exercise"
    number = following[0]
    command = ""
    if state(root, number) == "original":
        command = f" (python tests/lab.py start {number})"
    return f"next: exercise {number}, {EXERCISES[number].goal}{command}"


def raised(root, number, output):
    """by pytest's short traceback: a line on what the student's function raised, or nothing"""
    frames = re.findall(r"^(.+\.py):(\d+): in ", output, re.MULTILINE)
    frames = [(Path(root, path).resolve(), int(line)) for path, line in frames]
    error = re.search(r"^E +(\w+)(?:: (.*))?$", output, re.MULTILINE)
    mine = set()
    for function in EXERCISES[number].functions:
        node = find(read(root / file_of(function)), function)
        lines = range(node.lineno, node.end_lineno + 1)
        mine |= {((root / file_of(function)).resolve(), line) for line in lines}
    last = [frame for frame in frames if frame in mine][-1:]
    # an assertion of a test's stand-in, called by the function, says what is wrong by itself
    if not last or not error or error[1] == "AssertionError" and last != frames[-1:]:
        return ""
    path, line = last[0]
    return f"your code raised {error[1]} in {path.name}, line {line}: {error[2] or ''}\n"


def check(root, number):
    """-> 0 if all tests of the exercise pass, else 1"""
    for other in [number, *get_exercise(number).needs]:
        for function in empty_functions(root, other):
            needed = "" if other == number else f", which exercise {number} needs"
            print(f"exercise {other}: nothing is written in {function} yet{needed}")
            return 1
    tests = get_tests(root, number)
    if not tests:
        stop(f"exercise {number} has no tests of its own; tests/README.md says what to run")
    options = ["-x", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], cwd=root, capture_output=True,
        text=True, encoding="utf-8", errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode == 0:
        print(f"exercise {number}: all tests pass\n{next_exercise(root, number)}")
        return 0
    failed = re.search(r"^(?:FAILED|ERROR) ([\w/.]+::\w+)", done.stdout, re.MULTILINE)
    name = failed[1] if failed else ""
    look = " ".join(tests.get(name, "").split())
    other = re.search(r"NotImplementedError: exercise (\d+)", done.stdout)
    if other:
        look = f"a function of exercise {other[1]} is called, and is empty: write that one first"
    print(f"exercise {number}: not yet. {name}\n{raised(root, number, done.stdout)}"
          f"look at this: {look or 'the traceback below'}\n\n{done.stdout}{done.stderr}")
    return 1


# -----------------------------------------------------------------------------
# hand-outs

PATTERNS = ("*.*", "LICENSE", "data/*.*", "fast/*.py", "results/**/*.*", "tests/*.*")
# these hold answers, or test the text that a hand-out changes
NOT_COPIED = ("tests/solutions.py", "tests/mutations.py", "tests/test_mutations.py",
              "tests/test_changes.py", "tests/test_lab.py", "tests/test_readme.py",
              "tests/test_style.py")


def files_to_copy(root):
    paths = [path for pattern in PATTERNS for path in sorted(root.glob(pattern))]
    names = [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    names = [n for n in names if n not in NOT_COPIED and "__pycache__" not in n]
    return [n for n in names if not n.endswith((".git", ".pt", ".part"))]


def twins_of(numbers):
    return [twin for number in numbers for twin in EXERCISES[number].twins]


def answer_lines(answers):
    """the lines of code that give an answer away: those of more than 30 characters"""
    lines = [line.split("  # ")[0].strip() for body in answers for line in body.splitlines()]
    return {line for line in lines if len(line) > 30 and not line.startswith("#")}


def holders(source, file, secret):
    """the functions that hold a line of the answers: file::name"""
    tree = parse(source, file)
    lines = source.split("\n")
    found = []
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        prefix = file + "::" + ("" if owner is tree else owner.name + ".")
        for node in owner.body:
            code = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if isinstance(node, ast.FunctionDef) and any(line in code for line in secret):
                found.append(prefix + node.name)
    return found


def without(source, file, names):
    """a test file without these definitions, and without all that use them"""
    tree = parse(source, file)
    gone = set(names)
    before = None
    while before != gone:
        before = set(gone)
        for node in tree.body:
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            if hasattr(node, "name") and used & gone:
                gone.add(node.name)
    lines = source.split("\n")
    for node in reversed(tree.body):
        if getattr(node, "name", None) in gone:
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            del lines[first - 1 : node.end_lineno]
    return "\n".join(lines)


def without_answers(text, secret):
    """Markdown without what is folded, what is for teachers, and code with a line of the answers"""
    text = re.sub(r"<details>.*?</details>\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- teachers -->.*?<!-- /teachers -->\s*", "", text, flags=re.DOTALL)

    def block(match):
        told = any(line in match[0] for line in secret)
        return "(This code is an exercise of tests/README.md.)" if told else match[0]

    return re.sub(r"^```.*?^```", block, text, flags=re.DOTALL | re.MULTILINE)


def hand_out_sources(root, numbers, names):
    """-> {file: text} of Python and Markdown without the answers, and the answers"""
    sources = {n: read(root / n) for n in names if n.endswith((".py", ".md"))}
    sources["fast/loss.py"] = re.sub(PLAIN_FORM, "", sources["fast/loss.py"], flags=re.MULTILINE)
    answers = {}
    for number in numbers:
        answers |= bodies(root, number)
    twins = [twin for twin in twins_of(numbers) if file_of(twin) in sources]
    secret = answer_lines(answers.values())
    for file in sources:
        if file.endswith(".py"):
            twins += holders(sources[file], file, secret)
    for function in twins:
        if not function.startswith("tests/"):
            answers[function] = get_body(sources[file_of(function)], function)
    secret = answer_lines(answers.values())
    for function in answers:
        owner = [n for n in numbers if function in EXERCISES[n].functions]
        message = f"exercise {owner[0]}" if owner else f"{LEFT_OUT} it shows an exercise's answer"
        sources[file_of(function)] = stub(sources[file_of(function)], function, message)
    exercised = {f for n in numbers for f in EXERCISES[n].functions}
    # of results/ only bench.py is emptied, and what tests that is named in `twins`
    others = [f for f in answers if f not in exercised and not f.startswith("results/")]
    emptied = [f.split("::")[1] for f in others]
    for file, text in sources.items():
        if file.startswith("tests/") and file.endswith(".py") and file != "tests/lab.py":
            gone = [f.split("::")[1] for f in twins if file_of(f) == file]
            sources[file] = without(text, file, [*gone, *emptied])
        elif file.endswith(".md"):
            sources[file] = without_answers(text, secret)
    return sources, answers


def handout(root, folder, numbers):
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        stop(f"{folder} is not an empty folder; give a new one")
    for number in numbers:
        if not get_exercise(number).functions:
            stop(f"exercise {number} empties nothing: it needs no hand-out")
        if state(root, number) != "original":
            stop(f"exercise {number} is begun here: `solve {number}` first, or the hand-out would "
                 "hold what you wrote")
    names = [n for n in files_to_copy(root) if n not in twins_of(numbers)]
    sources, answers = hand_out_sources(root, numbers, names)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in sources:
            write(folder / name, sources[name])
        else:
            shutil.copyfile(root / name, folder / name)
    write(folder / ".lab/answers.json", json.dumps(dict.fromkeys(answers), indent=1))
    beside = folder.with_name(folder.name + "-answers.json")
    write(beside, json.dumps(answers, indent=1))
    print(f"{folder}: {len(names)} files; emptied: exercises {', '.join(map(str, numbers))}\n"
          f"{beside}: the answers, for later. In a student's folder it becomes .lab/answers.json")


def main(arguments):
    command, *rest = arguments or ["-h"]
    numbers = rest[1:] if command == "handout" else rest
    if not all(n.isdecimal() for n in numbers):
        stop(f"exercises are numbers, not {' '.join(numbers)}")
    numbers = [int(n) for n in numbers]
    if command == "list" and not rest:
        return show_list(ROOT)
    if command in ("start", "check", "solve") and len(numbers) == 1:
        get_exercise(numbers[0])
        if command != "solve" and state(ROOT, numbers[0]) == "left out":
            stop("this hand-out leaves that exercise out, for it shows the answer of another one")
        return {"start": start, "check": check, "solve": solve}[command](ROOT, numbers[0])
    if command == "handout" and rest:
        return handout(ROOT, rest[0], sorted(set(numbers)) or CORE)
    if command in ("-h", "--help"):
        return print(__doc__.strip())
    stop("give list, start N, check N, solve N or handout DIR [N ..]; -h says more")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
