"""extend.py: heads copied and looped, the old ones untouched, resume, exact decoding, bad input."""
import dataclasses
import json
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import run_two

import common
import decode
import extend
import train
from data import prepare as P
from extend import loop_heads
from model import GPT, GPTConfig

REPO = Path(__file__).resolve().parents[1]
TEXT = "one two three four five six. " * 120  # soon learned, so that heads guess right
BASE = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "n_mtp": 2, "block_size": 24, "dropout": 0.1,
    "batch_size": 4, "steps": 60, "warmup": 5, "lr": 2e-2, "eval_every": 100, "eval_windows": 6,
    "log_every": 1, "device": "cpu", "compile": "off", "dtype": "float64", "alpha": "0.3,0.2",
    "beta": "0.5", "kl_start": 0.5}
SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "n_mtp", "dropout")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """a checkpoint with two trained heads"""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    data = P.prepare(folder / "text.txt", "bytes", folder / "text", quiet=True)
    cfg = train.make_config({**BASE, "data": str(data), "out": str(folder / "toy")})
    torch.manual_seed(1)
    model = GPT(GPTConfig(257, **{name: BASE[name] for name in SHAPE})).double()
    train.train(model, cfg, *train.open_data(cfg))
    path = folder / "toy/ckpt.pt"
    model, meta = common.load_checkpoint(path)
    meta["optimizer"] = {}                     # half of what each test would read
    common.save_checkpoint(path, model, **meta)
    return path


@pytest.fixture(autouse=True)
def undo_globals(monkeypatch):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(common, "git_commit", lambda: "1234567")          # a process each time
    yield
    torch.set_float32_matmul_precision(before)


def make_model(m, seed=0):
    """random, large weights: every head differs from every other"""
    gen = torch.Generator().manual_seed(seed)
    config = GPTConfig(vocab_size=11, block_size=20, n_layer=1, n_head=1, n_embd=8, n_mtp=m)
    model = GPT(config).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=gen, dtype=torch.float64) * 0.4)
    return model.eval()


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["extend.py", *map(str, argv)])
    extend.main()


def extended(monkeypatch, base, out, *argv):
    call(monkeypatch, base, "--out", out, *argv)
    return common.load_checkpoint(Path(out) / "ckpt.pt")


def evaluate_every(monkeypatch, steps):
    original = extend.extension_config
    monkeypatch.setattr(extend, "extension_config",
                        lambda *args: dataclasses.replace(original(*args), eval_every=steps))


def stop_at(monkeypatch, step, visit=1):
    """Ctrl-C when the batch of this step is asked for, the first time or a later one"""
    visits = []

    def batch_starts(cfg, at, length, original=train.batch_starts):
        visits.extend([at] if at == step else [])
        if at == step and len(visits) == visit:
            signal.raise_signal(signal.SIGINT)
        return original(cfg, at, length)
    monkeypatch.setattr(train, "batch_starts", batch_starts)


def weights(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


def moved(before, after, name=""):
    """names of the weights that changed"""
    old = {n for n in after if n in before and torch.equal(before[n], after[n])}
    return {n for n in after if n.startswith(name)} - old


def names(model, heads):
    starts = tuple(f"heads.{k}." for k in heads)
    return {name for name in model.state_dict() if name.startswith(starts)}


def old_part(result, m):
    """what an evaluation says of the main head and heads 1 .. m"""
    per_row = [result[name][: m + 1] for name in ("loss", "accuracy")]
    return per_row + [result[name][:m] for name in ("kl", "ar", "car")]


# ---- the copy


@pytest.mark.parametrize("m,n", [(1, 8), (4, 6), (2, 5), (3, 4)])
def test_heads_are_copied_and_not_shared(m, n):
    model = make_model(m)
    before = weights(model)
    new = loop_heads(model, n)
    assert new.config == dataclasses.replace(model.config, n_mtp=n)
    assert len(new.heads) == n and not new.training
    assert loop_heads(model.train(), n).training
    for name, weight in new.state_dict().items():
        part, _, rest = name.partition(".")
        k, _, inner = rest.partition(".")
        source = name if part != "heads" else f"heads.{int(k) % m}.{inner}"
        assert torch.equal(weight, before[source]) and weight.dtype == torch.float64, name
    places = [w.data_ptr() for w in [*model.parameters(), *new.parameters()]]
    assert len(set(places)) == len(places)
    with torch.no_grad():
        new.heads[m].mix.weight.zero_()
    assert not moved(before, weights(model))
    assert not moved(before, {name: w for name, w in weights(new).items() if name in before})


@torch.no_grad()
def cascade_by_hand(model, n, tokens):
    """the trained heads applied round and round, each to what the one before it left"""
    embed, W = model.embed(tokens), model.embed.weight
    hidden = model.trunk(embed, model.angles(embed.size(1)))
    out = [F.linear(model.norm(hidden), W)]
    for k in range(1, n + 1):
        head, T = model.heads[(k - 1) % len(model.heads)], tokens.size(1) - k
        hidden = head(hidden[:, :T], embed[:, k:], model.angles(T))
        out.append(F.linear(head.norm_out(hidden), W))
    return out


@pytest.mark.parametrize("m,n", [(1, 8), (4, 6)])
def test_the_copy_is_the_cascade_with_repeated_heads(m, n):
    model = make_model(m)
    tokens = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(3))
    got, want = loop_heads(model, n).all_logits(tokens), cascade_by_hand(model, n, tokens)
    assert len(got) == len(want) == n + 1 and all(map(torch.equal, got, want))


def test_no_steps_is_only_the_copy(base, tmp_path, monkeypatch, capsys):
    model, meta = extended(monkeypatch, base, tmp_path, "--heads", 5, "--steps", 0, "--json")
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    old, first = common.load_checkpoint(base)
    assert all(map(torch.equal, weights(model).values(), weights(loop_heads(old, 5)).values()))
    assert result["before"] == result["after"] and len(result["after"]["car"]) == 5
    assert meta["step"] == 0 and meta["tokenizer"] == first["tokenizer"]
    assert "[1, 2, 1]" in out and "the trunk and 2 heads are frozen" in out
    car = result["before"]["car"]
    now = f"{1 + sum(car):.2f}"
    assert f"{1 + sum(car[:2]):.2f} with 2 heads, {now} before training, {now} after 0 steps" in out
    assert "trained" not in out
    assert out.count("token +6") == 2  # two tables of 5 heads


@pytest.mark.parametrize("n", [8, 16])
def test_decoding_is_still_the_plain_text(base, n):
    old = common.load_checkpoint(base)[0]
    model = loop_heads(old, n)
    for weight in model.heads[2].parameters():  # a head that has learned something of its own
        generator = torch.Generator().manual_seed(4)
        weight.data.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    prompts = [list(b"one t"), list(b"e"), list(b"six. one two")]
    got, stats = decode.generate(model, prompts, 16)
    for prompt, ids in zip(prompts, got):
        text = list(prompt)
        while len(text) < min(24, len(prompt) + 16):
            text.append(int(old.all_logits(torch.tensor([text]))[0][0, -1].argmax()))
        assert ids == text[len(prompt):]
    assert got == decode.generate(old, prompts, 16, heads=0)[0]
    assert got == decode.generate(model, prompts, 16, heads=5)[0]
    assert len(stats.accepted) == n + 1 and sum(stats.accepted[3:]) > 0  # new heads did take part


# ---- training


def test_training_moves_the_new_heads_alone(base, tmp_path, monkeypatch, capsys):
    old, first = common.load_checkpoint(base)
    start = weights(loop_heads(old, 4))
    # --heads: twice as many
    model, meta = extended(monkeypatch, base, tmp_path, "--steps", 8, "--json")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    # each of their tensors, and nothing else
    assert moved(start, weights(model)) == names(model, [2, 3])
    before, after = result["before"], result["after"]
    assert old_part(before, 2) == old_part(after, 2)
    assert min(before["ar"][:2]) > 0.3 and after["loss"][3:] != before["loss"][3:]
    assert after["tokens_per_forward"] != before["tokens_per_forward"]
    assert meta["extension"]["before"] == before
    held = [entry["exp_avg"].numel() for entry in meta["optimizer"]["state"].values()]
    assert sorted(held) == sorted(start[name].numel() for name in names(model, [2, 3]))
    plan, cfg = meta["extension"], meta["train_config"]
    assert plan["from_heads"] == 2
    assert (cfg["alpha"], cfg["beta"]) == ("0.0,0.0,0.2,0.2", "0.0,0.0,0.5,0.5")
    assert (cfg["kl_start"], cfg["kl_ramp"]) == (0, 0)
    assert (cfg["n_mtp"], cfg["steps"], cfg["lr"]) == (4, 8, first["train_config"]["lr"])
    header, *rows = log_rows(tmp_path)
    assert header["model"]["n_mtp"] == 4
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert rows[-1]["val"] == after
    assert all(row["kl"][:2] == [0, 0] and min(row["kl"][2:]) > 0 for row in rows if "kl" in row)
    longer = extended(monkeypatch, base, tmp_path, "--steps", 40, "--json")[1]["extension"]
    after = json.loads(capsys.readouterr().out.splitlines()[-1])["after"]
    assert sum(after["loss"][3:]) < sum(longer["before"]["loss"][3:]) - 0.1  # it is worth it


def log_rows(out):
    text = (Path(out) / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_frozen_parts_have_no_gradient_and_no_dropout(base, tmp_path, monkeypatch):
    seen, loss, make = [], train.distill.mtp_loss, train.make_optimizer

    def spy_loss(hidden, weight, *args, **options):
        seen.append(([h.requires_grad for h in hidden], weight.requires_grad, options["ramp"]))
        return loss(hidden, weight, *args, **options)

    def spy_optimizer(model, *args):
        def before_step(optimizer, *_):
            parts = [part.training for part in (*model.blocks, *model.heads, model.drop)]
            assert parts == [False, False, False, True, True, False]
            assert not any(part.training for part in model.heads[1].modules())
            assert model.heads[2].block.drop.training
            learn = {name for name, p in model.named_parameters() if p.grad is not None}
            assert learn == names(model, [2, 3])
        out = make(model, *args)
        out.register_step_pre_hook(before_step)
        held = {id(p) for group in out.param_groups for p in group["params"]}
        held_names = {name for name, p in model.named_parameters() if id(p) in held}
        assert held_names == names(model, [2, 3])
        return out
    monkeypatch.setattr(train.distill, "mtp_loss", spy_loss)
    monkeypatch.setattr(train, "make_optimizer", spy_optimizer)
    evaluate_every(monkeypatch, 1)  # .. nor do they come back after an evaluation
    extended(monkeypatch, base, tmp_path, "--steps", 3)
    assert seen == [([False, False, False, True, True], False, 1.0)] * 3


def test_extending_an_extension(base, tmp_path, monkeypatch):
    four = extended(monkeypatch, base, tmp_path / "4", "--steps", 4, "--heads", 4)[0]
    # a fifth of the first heads' steps, not of the last extension's
    assert extend.begin(tmp_path / "4/ckpt.pt", {}, 7)[2].steps == 60 // 5
    model, meta = extended(monkeypatch, tmp_path / "4/ckpt.pt", tmp_path / "7",
                           "--steps", 3, "--heads", 7, "--beta", "1.5", "--lr", 0.01)
    assert all(map(torch.equal, weights(four.heads[2]).values(), weights(model.heads[2]).values()))
    assert meta["extension"]["from_heads"] == 4 and meta["extension"]["first_steps"] == 60
    cfg = train.TrainConfig(**meta["train_config"])
    assert train.head_weights(cfg) == [[0] * 4 + [0.2] * 3, [0] * 4 + [1.5] * 3] and cfg.lr == 0.01
    assert moved(weights(loop_heads(four, 7)), weights(model)) == names(model, [4, 5, 6])


def both(monkeypatch, base, tmp_path, argv, stops):
    """the same extension without and with a stop -> (model, metadata) of each"""
    whole = extended(monkeypatch, base, tmp_path / "whole", *argv)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume"):
        stop_at(patch, *stops)
        common.run(lambda: extended(patch, base, tmp_path / "cut", *argv))
    torch.manual_seed(99)
    call(monkeypatch, "--resume", tmp_path / "cut/ckpt.pt")
    return whole, common.load_checkpoint(tmp_path / "cut/ckpt.pt")


def assert_same_end(whole, cut):
    assert all(map(torch.equal, weights(whole[0]).values(), weights(cut[0]).values()))
    for name in ("step", "best_loss", "extension"):
        assert whole[1][name] == cut[1][name], name
    same = {"out": "", "schedule_steps": 6}  # once resumed, the schedule's length is written out
    assert {**whole[1]["train_config"], **same} == {**cut[1]["train_config"], **same}


def test_resuming_an_extension_equals_not_stopping(base, tmp_path, monkeypatch):
    evaluate_every(monkeypatch, 2)
    whole, cut = both(monkeypatch, base, tmp_path, ["--steps", 6], (5,))
    assert_same_end(whole, cut)
    rows = [row for row in log_rows(tmp_path / "cut") if "val" not in row]
    assert [row.get("start", row.get("step")) for row in rows] == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    shown = []

    def comparison(before, after, *_):
        shown.append((before["loss"], after["loss"]))
    monkeypatch.setattr(extend, "comparison", comparison)
    # nothing is left to do, and nothing happens ..
    call(monkeypatch, "--resume", tmp_path / "cut/ckpt.pt")
    (before, after), = shown
    # .. but the trained heads are still shown as trained
    assert before[:3] == after[:3] and before[3:] != after[3:]
    assert_same_end(whole, common.load_checkpoint(tmp_path / "cut/ckpt.pt"))


def test_an_extension_is_resumed_where_it_lies(base, tmp_path, monkeypatch):
    extended(monkeypatch, base, tmp_path / "a", "--steps", 4)
    evaluate_every(monkeypatch, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 3)
        extended(patch, base, tmp_path / "b", "--steps", 4)
    (tmp_path / "b").rename(tmp_path / "c")
    extended(monkeypatch, base, tmp_path / "b", "--steps", 2)  # another run in its former place
    before = [(tmp_path / "b" / name).read_bytes() for name in ("ckpt.pt", "log.jsonl")]
    with pytest.raises(common.UserError, match="another checkpoint.*--out"):
        call(monkeypatch, "--resume", tmp_path / "c/ckpt.pt", "--out", tmp_path / "b")
    call(monkeypatch, "--resume", tmp_path / "c/ckpt.pt", "--out", tmp_path / "d",
         "--device", "cpu")
    call(monkeypatch, "--resume", tmp_path / "c/ckpt.pt")
    ends = [common.load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("a", "c", "d")]
    for model, meta in ends[1:]:
        assert meta["step"] == 4 and not moved(weights(ends[0][0]), weights(model))
    assert before == [(tmp_path / "b" / name).read_bytes() for name in ("ckpt.pt", "log.jsonl")]
    changed = tmp_path / "changed.txt"
    changed.write_text(TEXT[1:], encoding="utf-8")
    folder = P.prepare(changed, "bytes", tmp_path / "changed", quiet=True)
    raw = torch.load(tmp_path / "c/ckpt.pt", weights_only=True)
    raw["train_config"]["data"] = str(folder)
    torch.save({**raw, "step": 2}, tmp_path / "c/ckpt.pt")
    with pytest.raises(common.UserError, match="another text"):
        call(monkeypatch, "--resume", tmp_path / "c/ckpt.pt")


def test_nothing_of_another_run_is_overwritten(base, tmp_path, monkeypatch, capsys):
    source = tmp_path / "x"
    shutil.copytree(base.parent, source)
    shutil.copy(source / "ckpt.pt", source / "best.pt")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for steps in (0, 2):  # over its own source, by whatever name
        for name, out in (("ckpt.pt", source), ("best.pt", source),
                          ("ckpt.pt", source / ".." / "x")):
            with pytest.raises(common.UserError, match="is the folder of .* itself"):
                call(monkeypatch, source / name, "--out", out, "--steps", steps)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    for name, folder in (("ckpt.pt", "x-4"), ("best.pt", "x-best-4")):
        call(monkeypatch, source / name, "--steps", 0)
        assert (tmp_path / folder / "ckpt.pt").exists()
        assert not list((tmp_path / folder).glob("*.old*"))
    for steps in (1, 0):
        capsys.readouterr()
        before = (tmp_path / "x-4/ckpt.pt").read_bytes()
        call(monkeypatch, source / "ckpt.pt", "--steps", steps)
        # the earlier extension is kept
        assert (tmp_path / "x-4/ckpt.old.pt").read_bytes() == before
        assert "kept as ckpt.old.pt" in capsys.readouterr().out


# ---- the command


def config_of(meta, given, m, n):
    """the config of an extension from m heads to n"""
    plan = {"from_heads": m, "first_steps": meta["train_config"]["steps"]}
    return extend.extension_config(train.stored_config(meta), given, plan, n)


def test_defaults_come_from_the_checkpoint(base, tmp_path, monkeypatch):
    meta = common.load_checkpoint(base)[1]
    old = meta["train_config"]
    old["schedule_steps"] = 30  # of the training that is over
    cfg = config_of(meta, {"out": "x"}, 2, 4)
    assert cfg.schedule_steps == 0
    for name in ("data", "lr", "batch_size", "micro_batch", "eval_windows", "seed", "dtype",
                 "block_size", "top_n"):
        assert getattr(cfg, name) == old[name], name
    assert cfg.steps == 12 and cfg.warmup == 1  # a fifth, and a tenth of that
    given = {"out": "x", "steps": 9, "batch_size": 4, "lr": 0.5, "seed": 7, "eval_windows": 2}
    old.update(micro_batch=8, device="cuda", fast="on", compile="model")
    cfg = config_of(meta, {**given, "beta": "0"}, 2, 4)
    assert {name: getattr(cfg, name) for name in given} == given
    assert cfg.micro_batch == 0 and train.head_weights(cfg) == [[0, 0, 0.2, 0.2], [0] * 4]
    assert (cfg.device, cfg.fast, cfg.compile) == ("auto", "auto", "auto")
    assert config_of(meta, {"micro_batch": 4}, 2, 4).micro_batch == 4
    monkeypatch.chdir(base.parent)  # a bare file name has a folder too
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", lambda path, *args, **rest: seen.append(path))
        call(patch, "ckpt.pt", "--heads", 3, "--steps", 0)
        (base.parent / "deep").mkdir(exist_ok=True)
        patch.chdir(base.parent / "deep")
        call(patch, "../ckpt.pt", "--heads", 3, "--steps", 0)
        call(patch, base, "--heads", 3, "--steps", 0)
        call(patch, base.parent, "--heads", 3, "--steps", 0)
    assert [path.parent for path in seen] == [base.parent.resolve().with_name("toy-3")] * 4


def test_help_tells_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "-h")
    text = "".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(train.TrainConfig)}
    for name in extend.FLAGS:
        assert f"--{name}" in text and "".join(helps[name].split()) in text, name
    assert "default" not in "".join(helps[name] for name in extend.FLAGS if name != "out")
    assert "--heads" in text and "twiceasmany" in text


def test_bad_requests(base, tmp_path, monkeypatch):
    for m, n, message in [(4, 4, "4 already"), (4, 3, "more than 4"), (4, 20, "block_size")]:
        with pytest.raises(ValueError, match=message):
            loop_heads(make_model(m), n)
    (tmp_path / "text.pt").write_text("once upon a time", encoding="utf-8")
    (tmp_path / "other.txt").write_text(TEXT, encoding="utf-8")
    other = P.prepare(tmp_path / "other.txt", "bpe:260", tmp_path / "other", quiet=True)
    extended(monkeypatch, base, tmp_path / "ok", "--steps", 0)
    listing = sorted(tmp_path.iterdir())
    none, text, done = tmp_path / "none.pt", tmp_path / "text.pt", tmp_path / "ok/ckpt.pt"
    for argv, message in [
        ([base, "--heads", 2], "heads is 2.*more than 2"), ([base, "--heads", 1], "heads is 1"),
        ([base, "--heads", 24], "block_size"),
        ([none], "no checkpoint at"), ([text], "can't be loaded"), ([""], "no checkpoint"),
        (["--resume", base], "was written by train.py: resume it with `python train.py --resume"),
        (["--resume", ""], "no checkpoint"), ([base, "--compile", "yes"], "--compile"),
        (["--resume", done, "--steps", 3], "leave out --steps"),
        (["--resume", done, "--heads", 9, "--lr", 1], "leave out --lr, --heads"),
        (["--resume", done], "no optimizer, or"),
        ([base, "--beta", "x"], "--beta is 'x'"), ([base, "--lr", "nan"], "--lr is nan"),
        ([base, "--seed", -1], "--seed"), ([base, "--batch_size", 0], "--batch_size is 0"),
        ([base, "--seed", 10**23], "--seed is 1000.*in \\[0, 1e"),
        ([base, "--heads", -1], "heads is -1"), ([base, "--steps", -2], "--steps is -2"),
        ([base, "--data", other], "another tokenizer"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call(monkeypatch, *argv)
    assert sorted(tmp_path.iterdir()) == listing and not base.parent.with_name("toy-4").exists()
    monkeypatch.setattr(sys, "argv", ["extend.py", str(base), "--heads", "2"])
    with pytest.raises(SystemExit, match="^extend.py: heads is 2"):
        runpy.run_path(str(REPO / "extend.py"), run_name="__main__")
    for argv in ([], [base, "--resume", base], [base, "--n_layer", 3]):  # argparse says what
        with pytest.raises(SystemExit):
            call(monkeypatch, *argv)
    model, meta = common.load_checkpoint(done)
    common.save_checkpoint(done, model, **{**meta, "optimizer": {}})
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(done), "--steps", "9"])
    with pytest.raises(ValueError, match="extend.py --resume"):
        train.main()


def test_two_processes_extend_as_one_does(monkeypatch, base, tmp_path):
    """started as torchrun starts them; the losses equal one process's to rounding"""
    options = ["--heads", "4", "--steps", "3", "--batch_size", "4", "--json"]
    model, meta = common.load_checkpoint(base)
    model.config.dropout = meta["train_config"]["dropout"] = 0.0   # each process has its own
    base = tmp_path / "base/ckpt.pt"
    common.save_checkpoint(base, model, **meta)
    extended(monkeypatch, base, tmp_path / "one", *options)
    argv = ["extend.py", base, "--out", tmp_path / "two", *options, "--device", "cpu"]
    said = run_two(extend.main, argv, tmp_path / "log")
    assert [code for code, *_ in said] == [0, 0], said
    assert "2 -> 4 heads" in said[0][1] and said[1][1] == ""
    one, _ = common.load_checkpoint(tmp_path / "one/ckpt.pt")
    two, _ = common.load_checkpoint(tmp_path / "two/ckpt.pt")
    for ours, theirs in zip(one.parameters(), two.parameters()):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_heads_that_learned_nothing_can_not_be_extended_silently(monkeypatch, base, tmp_path):
    model, meta = common.load_checkpoint(base)
    meta["train_config"].update(alpha="0", beta="0")
    path = tmp_path / "zero/ckpt.pt"
    common.save_checkpoint(path, model, **meta)
    with pytest.raises(common.UserError, match="alpha = beta = 0.*--beta"):
        call(monkeypatch, path)
    extended(monkeypatch, path, tmp_path / "out", "--beta", "0.5", "--steps", "1")


@pytest.mark.parametrize("flags", [["--alpha=0", "--beta=0"], ["--alpha=0,0", "--beta=0,0"]])
@pytest.mark.parametrize("heads", [0, 2])
def test_flags_by_which_new_heads_would_learn_nothing(monkeypatch, base, tmp_path, heads, flags):
    model, meta = common.load_checkpoint(base)
    trunk = GPT(dataclasses.replace(model.config, n_mtp=heads))
    common.save_checkpoint(tmp_path / "trunk/ckpt.pt", trunk, **meta)
    data = meta["train_config"]["data"]
    with pytest.raises(common.UserError, match="alpha = beta = 0.*--beta"):
        call(monkeypatch, tmp_path / "trunk", f"--heads={heads + 2}", f"--data={data}", *flags)


def test_a_weight_for_each_new_head(monkeypatch, base, tmp_path):
    _, meta = extended(monkeypatch, base, tmp_path, "--alpha=0.1,0.7", "--beta=0.4", "--steps=1")
    cfg = meta["train_config"]
    assert (cfg["alpha"], cfg["beta"]) == ("0.0,0.0,0.1,0.7", "0.0,0.0,0.4,0.4")
    with pytest.raises(common.UserError, match="--alpha is '1,2,3'.* for each of the 2 heads"):
        call(monkeypatch, base, "--alpha=1,2,3", f"--out={tmp_path / 'other'}")


def test_an_extension_keeps_no_best(base):
    """the main head is frozen: its loss, the same at every evaluation, says nothing"""
    meta = common.load_checkpoint(base)[1]
    meta["train_config"]["keep_best"] = True
    assert not config_of(meta, {}, 2, 3).keep_best
