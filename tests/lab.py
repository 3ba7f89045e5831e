"""
lab.py: the exercises of tests/README.md, for students and for who teaches them.

    python tests/lab.py list              the exercises, and which functions are empty now
    python tests/lab.py start 3           empty the functions of exercise 3; their docstrings stay
    python tests/lab.py check 3           run its tests: what to look at, then the traceback
    python tests/lab.py solve 3           the original again; your version is kept in .lab/
    python tests/lab.py handout DIR       a copy for students, exercises 1 to 7 emptied, no answers
    python tests/lab.py handout DIR 3 4   the same with these two

`start` keeps what it takes out in .lab/answers.json. `handout` writes that file beside DIR: give it
to the students afterwards, into .lab/ (beside the answers.json there, which holds what their own
`start` took out), and `solve` works in their copies, too.
"""

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from exercises import CORE, EXERCISES

ROOT = Path(__file__).resolve().parent.parent
EMPTY = 'raise NotImplementedError("exercise {}")'
# pytest skips a test that calls what a hand-out leaves out
LEFT_OUT = """from unittest import SkipTest
raise SkipTest("left out: it shows an exercise's answer")"""


def read(path):
    return path.read_bytes().decode("utf-8")  # line endings stay as they are


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))


def find(root, function):
    """file::name or file::Class.name -> the lines of the file, the function's syntax tree, and
    which lines are its body, without the docstring"""
    file, name = function.split("::")
    source = read(root / file)
    node = ast.parse(source.lstrip("\ufeff"), file)   # Python takes a byte-order mark, too
    for part in name.split("."):
        named = [n for n in node.body if getattr(n, "name", "") == part]
        if not named:
            sys.exit(f"there is no {function}; was it renamed?")
        node = named[0]
    first = node.body[0]
    if first.lineno == node.lineno:
        sys.exit(f"{file}, line {node.lineno}: put the body of {name} on a line of its own")
    begin = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
    return source.split("\n"), node, slice(begin, node.end_lineno)


def get_body(root, function):
    lines, _, body = find(root, function)
    return "\n".join(lines[body])


def set_body(root, function, new):
    lines, _, body = find(root, function)
    lines[body] = [new]
    write(root / function.split("::")[0], "\n".join(lines))


def set_stub(root, function, stub):
    _, node, _ = find(root, function)
    set_body(root, function, textwrap.indent(stub, " " * node.body[0].col_offset))


def read_answers(root):
    """{function: body}; in a hand-out {function: None}. A teacher's *-answers.json comes last"""
    paths = [root / ".lab/answers.json", *(root / ".lab").glob("*-answers.json")]
    found = [json.loads(read(path)) for path in paths if path.is_file()]
    return {function: body for answers in found for function, body in answers.items()}


def function_state(root, function):
    body = get_body(root, function)
    if body.strip().startswith(EMPTY.split("{}")[0]):
        return "empty"
    if 'raise SkipTest("left out' in body:
        return "left out"
    return "original" if read_answers(root).get(function, body) == body else "written"


def state(root, number):
    if not EXERCISES[number].functions:
        return "-"                        # a change of the student's own; no function is emptied
    found = [function_state(root, f) for f in EXERCISES[number].functions]
    return next(s for s in ("left out", "empty", "written", "original") if s in found)


def show_list(root):
    for number, exercise in EXERCISES.items():
        goal = exercise.goal
        if exercise.needs:
            goal += f" (needs {', '.join(map(str, exercise.needs))})"
        star = " " if number in CORE else "★"
        print(f"{number:2} {star} {goal:55} {exercise.minutes} min   {state(root, number)}")
    print("-  nothing is emptied or checked: the exercise is a change of your own")


def require_original(root, number):
    now = state(root, number)
    if now != "original":
        sys.exit(f"exercise {number} is {now}, and this command would destroy what is there; "
                 f"`solve {number}` keeps a copy of that and gives the original back")


def start(root, number):
    require_original(root, number)
    found = {f: get_body(root, f) for f in EXERCISES[number].functions}
    write(root / ".lab/answers.json", json.dumps({**read_answers(root), **found}, indent=1))
    for function in found:
        set_stub(root, function, EMPTY.format(number))
        print(f"emptied {function}")
    print(f"write it again, then: python tests/lab.py check {number}")


def solve(root, number):
    answers = read_answers(root)
    functions = [f for f in EXERCISES[number].functions if answers.get(f)]
    if not functions:
        sys.exit(f"there is no answer of exercise {number} here: it was not started in this "
                 "folder, or your teacher has the answers (a file that goes into .lab/)")
    kept = root / f".lab/exercise_{number}.txt"
    with kept.open("a", encoding="utf-8", newline="") as file:
        file.writelines(f"# {f}\n{get_body(root, f)}\n\n" for f in functions)
    twins = [f for f in EXERCISES[number].twins if answers.get(f)]
    twins = [f for f in twins if function_state(root, f) == "left out"]
    for function in functions + twins:
        set_body(root, function, answers[function])
        print(f"the original is back: {function}")
    print(f"your version is kept in .lab/{kept.name}")


def next_exercise(root, number):
    states = {n: state(root, n) for n in EXERCISES if n > number}
    following = [n for n in states if states[n] == "empty"]
    following += [n for n in states if states[n] != "left out"]
    if not following:
        return "that was the last exercise"
    return f"next: exercise {following[0]}, {EXERCISES[following[0]].goal}"


def check(root, number):
    """-> 0 if all tests of the exercise pass, else 1"""
    for other in [number, *EXERCISES[number].needs]:
        for function in EXERCISES[other].functions:
            now = function_state(root, function)
            if now == "empty":
                print(f"write {function} first (exercise {other}): it is empty")
                return 1
            if now == "left out":
                print(f"exercise {number} needs {function}, which is left out (exercise {other})")
                return 1
    file = "tests/test_exercises.py"
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "pytest", file, "-k", f"test_{number}_", "-x",
         "--tb=short", "--color=no", "-p", "no:cacheprovider"],
        cwd=root, capture_output=True, text=True, encoding="utf-8", errors="replace",
    )
    if re.search(r"\d+ skipped", done.stdout):
        print(f"exercise {number}: not yet. A test was skipped, for something that it calls is "
              f"left out in this copy\n\n{done.stdout}")
        return 1
    if done.returncode == 0:
        print(f"exercise {number}: all tests pass\n{next_exercise(root, number)}")
        return 0
    failed = re.search(rf"^E +(.+)$[\s\S]*^FAILED {file}::(\w+)", done.stdout, re.MULTILINE)
    message = "look at the traceback"
    if failed:
        _, node, _ = find(root, f"{file}::{failed[2]}")
        look = " ".join(ast.get_docstring(node).split())
        message = f"{failed[2]}: {failed[1]}\nlook at this: {look}"
    print(f"exercise {number}: not yet. {message}\n\n{done.stdout}{done.stderr}")
    return 1


# the files of a hand-out
COPIED = ("*.*", "LICENSE", "data/*.*", "fast/*.py", "results/**/*.*", "tests/*.*")
# .. without those that hold answers, or test the text that it changes
NOT_COPIED = ("solutions.py", "mutations.py", "test_mutations.py", "test_changes.py", "test_lab.py",
              "test_readme.py", "test_style.py")
HIDDEN = (r"<details>.*?</details>\n?"
          r"|<!-- teachers -->.*?<!-- /teachers -->\s*"
          r"| `python tests/mutations\.py` puts[^.]*\."      # README names a file of the teacher's
          r"|^ *# in plain PyTorch:\r?\n(?: *#  [^\n]*\n)+")  # above a kernel of fast/loss.py


def files_to_copy(root):
    """in a clone, without what git does not know: a teacher's own files"""
    paths = [path for pattern in COPIED for path in root.glob(pattern) if path.is_file()]
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True)
    if (root / ".git").exists() and done.returncode == 0:
        known = {root / name for name in done.stdout.decode("utf-8").split("\0")}
        paths = [path for path in paths if path in known]
    return [p for p in paths if p.name not in (".git", *NOT_COPIED)
            and p.suffix not in (".pt", ".part", ".pyc")]


def answer_lines(bodies):
    """the lines of code that give an answer away: those of more than 30 characters"""
    lines = [line.split("  # ")[0].strip() for body in bodies for line in body.splitlines()]
    return {line for line in lines if len(line) > 30 and not line.startswith("#")}


def without_answers(text, secret):
    """without what is HIDDEN from students, and in Markdown code with a line of the answers"""
    def replace(block):
        told = any(line in block[0] for line in secret)
        return "(This code is an exercise of tests/README.md.)" if told else block[0]

    text = re.sub(HIDDEN, "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^```.*?^```", replace, text, flags=re.DOTALL | re.MULTILINE)


def handout(root, folder, numbers):
    folder = folder.resolve()
    beside = folder.with_name(folder.name + "-answers.json")
    if beside.exists() or folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"{folder} is not an empty folder, or {beside.name} is there; give a new name")
    for number in numbers:
        require_original(root, number)
    stubs = {f: EMPTY.format(n) for n in numbers for f in EXERCISES[n].functions}
    twins = [f for n in numbers for f in EXERCISES[n].twins]
    answers = {f: get_body(root, f) for f in [*stubs, *twins]}
    for path in files_to_copy(root):
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for function in answers:
        set_stub(folder, function, stubs.get(function, LEFT_OUT))
    # what only a test holds is no secret
    secret = answer_lines(answers[f] for f in answers if not f.startswith("tests/"))
    for path in [*folder.rglob("*.md"), folder / "fast/loss.py"]:
        write(path, without_answers(read(path), secret))
    write(folder / ".lab/answers.json", json.dumps(dict.fromkeys(answers), indent=1))
    write(beside, json.dumps(answers, indent=1))
    print(f"{folder}: emptied exercises {', '.join(map(str, numbers))}\n"
          f"{beside}: the answers, for later. It goes into .lab/ of a student's folder")


def exercise_number(text):
    if text in [str(n) for n in EXERCISES if EXERCISES[n].functions]:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not an exercise that empties a function: see list")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = dict(list=show_list, start=start, check=check, solve=solve, handout=handout)
    parsers = {name: subparsers.add_parser(name) for name in commands}
    for name in ("start", "check", "solve"):
        parsers[name].add_argument("number", type=exercise_number)
    parsers["handout"].add_argument("folder", type=Path)
    parsers["handout"].add_argument("numbers", type=exercise_number, nargs="*", default=CORE)
    args = vars(parser.parse_args(arguments))
    return commands[args.pop("command")](ROOT, **args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except SyntaxError as error:
        sys.exit(f"{error.filename}, line {error.lineno}: {error.msg}; mend that line first")
    except UnicodeDecodeError as error:
        sys.exit(f"a file is not UTF-8 ({error}); save it again as UTF-8")
