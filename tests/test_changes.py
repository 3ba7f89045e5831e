"""the researcher's table of README.md: each change is made in a copy, which then trains three steps
and decodes (slow)."""

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import lab
import mutations
import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = "One two three four five. The cat sat on the mat, and the dog did not.\n" * 60
SMALL = (
    "--n_layer 1 --n_head 2 --n_embd 16 --n_mtp 2 --block_size 24 --batch_size 4 --steps 3 "
    "--warmup 1 --eval_every 3 --eval_windows 4 --log_every 1 --device cpu --compile off "
    "--tokenizer bytes --kl_start 0 --kl_ramp 0"
).split()


# ---- ways to touch a file that don't depend on how its functions are written


def append(source, text):
    return source.rstrip("\n") + "\n\n\n" + textwrap.dedent(text).strip("\n") + "\n"


def after_assignment(source, name, text):
    """behind the top-level assignment to a name"""
    assignments = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    (node,) = [node for node in assignments if ast.unparse(node.targets[0]) == name]
    lines = source.split("\n")
    text = textwrap.dedent(text).strip("\n")
    return "\n".join([*lines[: node.end_lineno], "\n", text, *lines[node.end_lineno :]])


def statements(source, function):
    """the syntax trees of a function's body, without its docstring"""
    node = ast.parse(source)
    for name in function.split("::")[1].split("."):
        (node,) = [n for n in node.body if getattr(n, "name", "") == name]
    return node.body[1:] if ast.get_docstring(node) else node.body


def before_return(source, function, text):
    """before the last statement of a function, which returns its result"""
    node = statements(source, function)[-1]
    assert isinstance(node, ast.Return)
    lines = source.split("\n")
    text = textwrap.indent(textwrap.dedent(text).strip("\n"), " " * node.col_offset)
    return "\n".join([*lines[: node.lineno - 1], text, *lines[node.lineno - 1 :]])


def at_the_beginning(source, function, text):
    node = statements(source, function)[0]
    lines = source.split("\n")
    text = textwrap.indent(textwrap.dedent(text).strip("\n"), " " * node.col_offset)
    return "\n".join([*lines[: node.lineno - 1], text, *lines[node.lineno - 1 :]])


def instead(source, function, text):
    body = statements(source, function)
    lines = source.split("\n")
    text = textwrap.indent(textwrap.dedent(text).strip("\n"), " " * body[0].col_offset)
    return "\n".join([*lines[: body[0].lineno - 1], text, *lines[body[-1].end_lineno :]])


def replace(source, old, new):
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times"
    return source.replace(old, new)


# ---- the changes: the table's first column -> (file, edit, its arguments), ..


CHANGES = {
    "the divergence": [("distill.py", after_assignment, "DIVERGENCES", """
        def jensen_shannon(log_p, log_q):
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            return (forward_kl(log_m, log_p) + forward_kl(log_m, log_q)) / 2


        DIVERGENCES["js"] = jensen_shannon
        """)],
    "a term of the loss": [("distill.py", before_return, "distill.py::mtp_d_loss", """
        loss = loss + 1e-4 * logits.logsumexp(-1).square().mean()      # keeps logits small (z-loss)
        """)],
    "the head": [("model.py", instead, "model.py::MTPHead.forward", """
        both = torch.cat((self.norm_hidden(hidden), self.norm_embed(embed)), dim=-1)
        return self.block(hidden + self.mix(both), positions, cache)
        """)],
    "the accept rule": [("decode.py", after_assignment, "RULES", """
        def lenient(target_probs, draft_probs, drafts, noise):
            top = target_probs[:, :-1].topk(2, dim=-1).indices             # (B, K, 2)
            accepted = num_accepted((top == drafts.unsqueeze(-1)).any(-1))
            return accepted, sample(select_row(target_probs, accepted), noise.emit)


        RULES["lenient"] = lenient
        """)],
    "a metric of the evaluation": [
        ("train.py", replace, "tokens_per_forward=1 + sum(car))",
         "tokens_per_forward=1 + sum(car), mean_ar=sum(ar) / max(1, K))"),
    ],
    "a metric of each step": [
        ("train.py", replace, "metrics = dict(loss=loss.detach(), ce=ce, kl=kl)",
         "metrics = dict(loss=loss.detach(), ce=ce, kl=kl, worst=ce.amax())"),
    ],
    "the data": [("data/prepare.py", at_the_beginning, "data/prepare.py::read_source", """
        if str(source).endswith(".csv"):
            import csv
            with open(source, encoding="utf-8", newline="") as file:
                return [row["text"] for row in csv.DictReader(file)]
        """)],
    "the feed-forward": [
        ("model.py", instead, "model.py::Block.__init__", """
        super().__init__()
        self.norm1 = RMSNorm(config)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config)
        self.experts = Experts(config)
        self.drop = nn.Dropout(config.dropout)
        """),
        ("model.py", instead, "model.py::Block.forward", """
        x = x + self.drop(self.attn(self.norm1(x), positions, cache))
        return x + self.drop(self.experts(self.norm2(x)))
        """),
        ("model.py", replace, "\nclass Block(nn.Module):", '''
class Experts(nn.Module):
    """a mixture of 4 experts, (.., d) -> (.., d): each token goes to the 2 that its router prefers.
    The choice depends on the token's own state alone, so cached steps equal the whole forward"""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.router = nn.Linear(d, 4, bias=False)
        self.up = nn.ModuleList(nn.Linear(d, 2 * d, bias=False) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(2 * d, d, bias=False) for _ in range(4))

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        best = weights.topk(2, dim=-1)
        gates = torch.zeros_like(weights).scatter(-1, best.indices, best.values)      # (.., 4)
        gates = gates / gates.sum(-1, keepdim=True)
        y = 0
        for i in range(4):                      # all experts on all tokens: plain, not fast
            y = y + gates[..., i : i + 1] * self.down[i](F.relu(self.up[i](x)).square())
        return y


class Block(nn.Module):''')],
}
FLAGS = {"the divergence": ["--kl", "js"], "the data": ["--data", "text.csv"]}


def change(folder, name):
    for file, edit, *arguments in CHANGES[name]:
        path = folder / file
        lab.write(path, edit(lab.read(path), *arguments))


def python(folder, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(folder, *flags):
    """three steps -> the evaluation"""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "text.csv").write_text(
        "text\n" + '"' + TEXT + '"\n' + '"Another text, but for validation."\n' * 9,
        encoding="utf-8",
    )
    data = [] if "--data" in flags else ["--data", "text.txt"]
    command = ["train.py", *SMALL, *data, "--out", "out/toy", "--json", *flags]
    return json.loads(python(folder, *command).splitlines()[-1])


def test_the_table_has_a_row_for_each_change():
    table = lab.read(ROOT / "tests/README.md").split("touch these lines")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert {name for name in rows if name in CHANGES} == set(CHANGES), rows


def test_the_changes_fit_the_code(tmp_path):
    """each is valid Python there, whoever wrote the functions anew"""
    mutations.copy_to(tmp_path)
    for name in CHANGES:
        change(tmp_path, name)
    for file in ("model.py", "distill.py", "decode.py", "train.py", "data/prepare.py"):
        assert ast.parse(lab.read(tmp_path / file), file)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_trains_three_steps_and_decodes(tmp_path, name):
    mutations.copy_to(tmp_path)
    before = train(tmp_path) if name in (
        "a term of the loss", "the head", "the feed-forward"
    ) else None
    change(tmp_path, name)
    result = train(tmp_path, *FLAGS.get(name, []))
    assert result["loss"] != (before or {}).get("loss"), "the change has no effect"
    assert ("mean_ar" in result) == (name == "a metric of the evaluation")
    if name == "a metric of the evaluation":
        assert '"mean_ar": ' in (tmp_path / "out/toy/log.jsonl").read_text(encoding="utf-8")
    if name == "a metric of each step":
        rows = lab.read(tmp_path / "out/toy/log.jsonl").splitlines()
        row = next(row for row in map(json.loads, rows) if "ms" in row)
        assert row["worst"] >= max(row["ce"]) > 0
    # greedy text is that of ordinary decoding, token by token
    out = python(
        tmp_path, "results/bench.py", "check", "out/toy/ckpt.pt", "--tokens", "12",
        "--prompt_tokens", "8", "--fast", "off",
    )
    assert "8 of 8 greedy continuations are identical" in out
    if name == "the accept rule":
        text = [
            "decode.py", "out/toy/ckpt.pt", "--prompt", "One", "--tokens", "12", "--json",
            "--accept",
        ]
        ids = {}
        for rule in ("lenient", "match"):
            ids[rule] = json.loads(python(tmp_path, *text, rule).splitlines()[-1])["ids"]
        assert len(ids["lenient"]) == 12 and ids["lenient"] != ids["match"]
    if name in ("the head", "the feed-forward"):
        output = mutations.run(tmp_path, [
            "test_model.py::test_cached_steps_with_rollbacks_equal_the_full_forward",
            "test_model.py::test_a_row_sees_exactly_the_tokens_before_its_target",
        ])
        assert "FAILED" not in output and " passed" in output, output


SHARED_BLOCK = """
        for head in self.heads:                 # all heads share one block
            head.block = self.heads[0].block
"""


@pytest.mark.slow
def test_heads_that_share_one_block_are_extended_or_refused(tmp_path):
    """what is printed as frozen must not change; a refusal is one line"""
    mutations.copy_to(tmp_path)
    source = lab.read(tmp_path / "model.py")
    end = statements(source, "model.py::GPT.__init__")[-1].end_lineno
    lines = source.split("\n")
    lab.write(
        tmp_path / "model.py", "\n".join([*lines[:end], SHARED_BLOCK.strip("\n"), *lines[end:]])
    )
    train(tmp_path)
    command = [
        "extend.py", "out/toy/ckpt.pt", "--heads", "4", "--steps", "3", "--lr", "0.1", "--out",
        "out/more", "--json",
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        assert done.stderr.strip().splitlines()[-1].startswith(
            "extend.py: "
        ) and "share" in done.stderr
        return
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["after"]["loss"][:3] == pytest.approx(result["before"]["loss"][:3]), (
        "frozen heads changed")
