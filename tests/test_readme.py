"""README.md: its code is the project's and runs, its links and flags exist, it stays short."""

import ast
import inspect
import math
import re
import shlex
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
        assert (ROOT / path).parent.joinpath(link).exists(), link


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
