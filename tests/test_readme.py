"""README.md: its code is the project's and runs, its links and flags exist, it stays short."""

import ast
import inspect
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import data.prepare
import decode
import distill
import extend
import lab
import train
from common import save_checkpoint
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import tables  # noqa: E402

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    return [body for name, body in FENCE.findall(text) if name == language]


def without_docstring(function):
    source = inspect.getsource(function)
    docstring = ast.parse(source).body[0].body[0]
    lines = source.splitlines(keepends=True)
    return "".join(lines[: docstring.lineno - 1] + lines[docstring.end_lineno :])


@pytest.mark.parametrize("function, exercise", [(distill.mtp_d_loss, 4), (decode.speculative_round, 8)])
def test_the_idea_in_code_is_the_source(readme, function, exercise):
    if lab.state(ROOT, exercise) != "original":
        pytest.skip(f"exercise {exercise} is begun: a solution of one's own need not be README's")
    assert without_docstring(function) in blocks(readme, "python")


def test_the_divergence_of_the_example_trains(readme, monkeypatch):
    monkeypatch.setattr(distill, "DIVERGENCES", dict(distill.DIVERGENCES))
    (example,) = [body for body in blocks(readme, "python") if "DIVERGENCES[" in body]
    exec(example, dict(vars(distill)))                    # as if it stood in distill.py
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    mean = (p + q) / 2
    expected = ((p * (p / mean).log()).sum() + (q * (q / mean).log()).sum()) / 2
    found = distill.DIVERGENCES["js"](p.log(), q.log())
    assert math.isclose(found, expected, rel_tol=1e-12)

    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(2, 6 - k, 4, generator=generator, requires_grad=True) for k in range(3)]
    weight = torch.randn(11, 4, generator=generator, requires_grad=True)
    targets = torch.randint(11, (2, 6), generator=generator)
    loss, _, kl = distill.mtp_loss(hidden, weight, targets, top_n=5, kl="js")
    loss.backward()
    assert (kl > 0).all() and hidden[2].grad.abs().sum() > 0


def test_from_python(readme, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 80, 1, 2, 8, 2))
    save_checkpoint(tmp_path / "out/tiny/ckpt.pt", model, tokenizer={"kind": "bytes"})
    monkeypatch.chdir(tmp_path)
    (example,) = [body for body in blocks(readme, "python") if "load_checkpoint" in body]
    names = {}
    exec(example, names)
    assert len(names["ids"]) == 50
    assert capsys.readouterr().out.split()[-1] == str(names["stats"].tokens_per_forward)


@pytest.mark.parametrize("path", ["README.md", "results/README.md"])
def test_links_lead_somewhere(path):
    text = FENCE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = (ROOT / path).parent / file if file else ROOT / path
        assert target.exists(), link
        if anchor:                             # as GitHub makes them from headings
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            names = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in names, link


def test_commands_name_flags_that_exist(readme):
    lines = "\n".join(blocks(readme, "bash")).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    modules = {"train.py": train, "decode.py": decode, "extend.py": extend}
    modules["data/prepare.py"] = data.prepare
    seen = set()
    for _, script, *arguments in commands:
        if script == "-m":
            continue
        assert (ROOT / script).is_file(), script
        if script not in modules:
            continue
        seen.add(script)
        source = inspect.getsource(modules[script])
        for name in [a[2:] for a in arguments if a.startswith("--")]:
            assert re.search(rf'^    {name}: |"--{name}"', source, re.MULTILINE), (script, name)
    assert seen == set(modules)


def test_at_most_1600_words_of_prose(readme):
    text = FENCE.sub("", readme)
    prose = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
    assert len(" ".join(prose).split()) <= 1600


# ---- every number of the tables is in a log


NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"
# a number, alone, with half its range or with its range
QUANTITY = re.compile(
    rf"(?<![\w.])({NUMBER})(?:\s*±\s*({NUMBER}))?(?:\s*\(({NUMBER})\s*(?:to|\.\.)\s*({NUMBER})\))?"
)


def quantities(text):
    """each as (number, half its range, least, greatest), as text; what is not there is empty"""
    return [found.groups("") for found in QUANTITY.finditer(text)]


def rounds_to(exact, quoted):
    """whether a quantity of a log is this one, which may have fewer digits"""
    for own, other in zip(exact, quoted):
        if other:
            digits = len(other.partition(".")[2])
            a, b = [float(x.replace(",", "") or "nan") for x in (own, other)]
            if not abs(a - b) <= 0.5 * 10**-digits + 1e-9:
                return False
    return True


def in_section(quoted, section):
    """whether a section holds this quantity; a number that stands alone may be any of its"""
    if any(quoted[1:]):
        return any(rounds_to(exact, quoted) for exact in section)
    return any(rounds_to((number,), quoted[:1]) for exact in section for number in exact if number)


def sections_of_logs():
    """the tables that the logs of both scales give, one section for all seeds of a measurement ->
    list of quantities of each"""
    sections = {}
    for scale in ("gpu", "tiny"):
        rows = tables.read(ROOT / "results" / scale / "runs.jsonl")
        rows = [row for row in rows if "result" in row]
        text = "".join(table(rows) for table in tables.TABLES)
        for part in text.split("## ")[1:]:
            title, _, body = part.partition("\n")
            key = scale, re.sub(r" seed\d+|, greedy", "", title)
            sections.setdefault(key, []).extend(quantities(body))
    return list(sections.values())


def table_cells(text):
    """(first cell of the line, cell) of the tables, without what describes a line and without the
    paper's own numbers"""
    for block in re.findall(r"(?:^\|.*\n)+", FENCE.sub("", text), re.MULTILINE):
        head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]]
                           for line in block.splitlines()]
        for first, *cells in lines:
            for title, cell in zip(head[1:], cells):
                if quantities(cell) and not title.startswith("paper"):
                    yield first, cell


def unknown(text, sections):
    """the cells of the tables whose numbers are not all in one section"""
    result = []
    for first, cell in table_cells(text):
        wanted = quantities(cell)
        if not any(all(in_section(q, section) for q in wanted) for section in sections):
            result.append((first, cell))
    return result


def test_every_number_of_the_tables_is_in_a_log(readme):
    assert len(list(table_cells(readme))) > 10
    assert unknown(readme, sections_of_logs()) == []


def test_a_number_that_no_log_gives_is_noticed():
    line = "| claim, 4 heads | paper | here |\n| --- | --- | --- |\n| row 9 | 7.7 | {} |\n"
    sections = [quantities("| 2 | 64.98 ±0.53 | 1.68 (1.66 .. 1.75) | +0.0044 |"),
                quantities("| 70.00 ±0.53 | 1,234.5 |")]
    for cell in ("65.0 ±0.5 %", "64.98 ±0.5", "65", "1.7 (1.7 to 1.8)", "1.66 to 1.75", "+0.004",
                 "1.68; 65.0", "1,235 and 70.0 ±0.5", "no number", "K4"):
        assert unknown(line.format(cell), sections) == [], cell
    for cell in ("65.1 ±0.5", "65.0 ±0.6", "1.7 (1.6 to 1.8)", "1.69", "-0.004", "1.68; 70.0"):
        assert unknown(line.format(cell), sections) == [("row 9", cell)], cell
