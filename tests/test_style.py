"""how much code there is, and how full its lines are: what a reader feels. Counted in tokens,
without comments and docstrings"""
import ast
import io
import os
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEART = ["model.py", "distill.py", "decode.py", "train.py", "extend.py", "common.py"]
HEART_TOKENS = 16_500  # of HEART together: a new option should replace code, not add to it
SKIP = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENDMARKER)
# the way from the command line to the loss: each function calls the next one
CALLS = [("train.py", "main"), ("train.py", "train"), ("train.py", "train_step"),
         ("distill.py", "mtp_loss")]
RETIRED = {"where", "law", "coin", "draw", "best_token", "far", "gap", "wide", "leading", "pick",
           "back", "ahead", "knob", "windows", "whole_step", "fit", "few_rows", "early",
           "order_of"}


# a student's change must not turn the suite red for its size
size = pytest.mark.skipif(not os.environ.get("CI"), reason="the project's CI alone asks for this")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def code_tokens(text):
    """-> the line of each token of code; an f-string is one token on every version of Python"""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines, inside = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        inside += (name == "FSTRING_START") - (name == "FSTRING_END")
        if name == "FSTRING_END" or inside > (name == "FSTRING_START"):
            continue
        if token.type not in SKIP and token.start[0] not in docstrings:
            lines.append(token.start[0])
    return lines


@size
def test_how_many_tokens_and_how_full_the_lines_are():
    tokens = {name: code_tokens(read(name)) for name in HEART}
    full = {name: len(lines) / len(set(lines)) for name, lines in tokens.items()}
    counts = {name: len(lines) for name, lines in tokens.items()}
    assert sum(counts.values()) <= HEART_TOKENS, counts
    assert max(full.values()) <= 11.5, full
    lines = sum(len(set(lines)) for lines in tokens.values())
    assert sum(counts.values()) / lines <= 10.5, full


def test_what_a_token_is():
    code = '"""docs"""\nx = f"{a + b} c" "d"  # a comment\n\n\ndef f(x):\n    """docs"""\n'
    assert code_tokens(code) == [2] * 4 + [5] * 6


def test_few_calls_lead_from_the_command_line_to_the_loss():
    for (name, function), (_, called) in zip(CALLS, CALLS[1:]):
        nodes = {node.name: node for node in ast.walk(ast.parse(read(name)))
                 if isinstance(node, ast.FunctionDef)}
        calls = [node.func for node in ast.walk(nodes[function]) if isinstance(node, ast.Call)]
        names = {getattr(call, "attr", getattr(call, "id", None)) for call in calls}
        assert called in names, (function, called)


@size
@pytest.mark.parametrize("name", [*HEART, "fast/loss.py", "fast/decode.py", "fast/heads.py"])
def test_lines_and_functions_have_an_end(name):
    text = read(name)
    assert max(map(len, text.splitlines())) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < (60 if name in HEART else 70), node.name


@pytest.mark.parametrize("name", HEART)
def test_names_that_were_retired_and_arrows_that_point_down(name):
    text = read(name)
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    assert not names & RETIRED
    # fast/ is imported inside a function
    assert not re.search(r"^(from|import) (results|fast)\b", text, re.M)
    assert "import results" not in text and "from results" not in text
