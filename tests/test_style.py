"""how full the code is: what a reader feels. Counted as tokens per code line, without comments and docstrings"""
import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEART = ["model.py", "distill.py", "decode.py", "train.py", "extend.py", "common.py"]
SKIP = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_tokens(path):
    """-> the line of each token of code; an f-string counts as one token on every version of Python"""
    text = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
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


def test_how_full_the_lines_are():
    tokens = {name: code_tokens(ROOT / name) for name in HEART}
    full = {name: len(lines) / len(set(lines)) for name, lines in tokens.items()}
    assert max(full.values()) <= 11.5, full
    assert sum(map(len, tokens.values())) / sum(len(set(lines)) for lines in tokens.values()) <= 10.5, full


@pytest.mark.parametrize("name", [*HEART, "fast/loss.py", "fast/decode.py"])
def test_lines_and_functions_have_an_end(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < (60 if name in HEART else 70), node.name


@pytest.mark.parametrize("name", HEART)
def test_names_that_were_retired_and_arrows_that_point_down(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert not names & {"where", "law", "coin", "draw", "best_token", "far", "gap", "wide", "leading", "pick", "back", "ahead", "knob",
                        "windows", "whole_step", "fit", "few_rows", "early", "order_of"}
    assert not re.search(r"^(from|import) (results|fast)\b", text, re.M)                     # fast/ is imported inside a function
    assert "import results" not in text and "from results" not in text
