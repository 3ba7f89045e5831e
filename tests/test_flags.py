"""what is configured arrives: each flag, by the command line, changes what it should; seeds."""
import dataclasses
import functools
import json
import re
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import common
import decode
import distill
import extend
import fast.decode
import fast.loss
import train
from data import prepare as P
from model import GPT, GPTConfig

CPU = torch.device("cpu")
SAMPLE = train.sample
TEXT = "the cat sat on the mat, and that was that. " * 60
TOY = dict(
    preset="tiny", device="cpu", dtype="float64", compile="off",
    n_layer=2, n_head=2, n_embd=8, n_mtp=2, block_size=16,
    steps=4, batch_size=8, micro_batch=0, warmup=2, lr=0.01, clip=0.2, kl_start=0.0, kl_ramp=0.0,
    eval_every=100, eval_windows=2, log_every=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """three datasets; all windows of `same` are the same"""
    folder = tmp_path_factory.mktemp("flags")
    texts = {"text": TEXT, "other": TEXT.replace("cat", "dog"), "same": "a" * 3000}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        P.prepare(folder / f"{name}.txt", "bytes", folder / name, quiet=True)
    return folder


@pytest.fixture(autouse=True)
def undo_globals(monkeypatch, tmp_path):
    monkeypatch.setattr(P, "HERE", tmp_path / "data")          # where prepared datasets are kept
    monkeypatch.setattr(common, "git_commit", lambda: "1234567")
    monkeypatch.setattr(train, "sample", lambda *args: "")     # at the end of each run
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def call(main, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, argv)])
        main()


def as_flags(values):
    """{"a": 1, "b": False} -> ["--a=1", "--no-b"]"""
    flags = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags.append(f"--{name}={value}")
    return flags


class Run:
    """what train.py or extend.py left in a folder"""

    def __init__(self, out):
        self.path = Path(out) / "ckpt.pt"
        self.meta = torch.load(self.path, weights_only=True)
        self.weights = self.meta["model"]
        text = (Path(out) / "log.jsonl").read_text(encoding="utf-8")
        self.header, *rows = [json.loads(line) for line in text.splitlines()]
        self.rows = [row for row in rows if "loss" in row]
        self.losses = [round(row["loss"], 9) for row in self.rows]
        self.val = [row["val"] for row in rows if "val" in row]

    @functools.cached_property
    def model(self):
        return common.load_checkpoint(self.path)[0]

    def difference(self, other):
        """the largest difference between weights of one name; inf where shapes or names differ"""
        mine, theirs = [{name: w.shape for name, w in run.weights.items()} for run in (self, other)]
        if mine != theirs:
            return float("inf")
        differences = [(w.double() - other.weights[name].double()).abs().max()
                       for name, w in self.weights.items()]
        return float(max(differences))


def trained(folder, out, **changes):
    call(train.main, *as_flags({**TOY, "data": folder / "text", "out": out, **changes}))
    return Run(out)


@pytest.fixture(scope="module")
def base(folder):
    return trained(folder, folder / "base")


# ---- train.py

TRAIN_FLAGS = {f.name for f in dataclasses.fields(train.TrainConfig)}
CHANGES_WEIGHTS = dict(
    preset="shakespeare", data="other", tokenizer="bpe:258", dtype="float32",
    n_layer=1, n_head=1, n_embd=16, n_mtp=1, block_size=12, dropout=0.5, embed_std=0.2,
    steps=5, schedule_steps=9, batch_size=4, lr=0.02, min_lr=0.5, warmup=4, weight_decay=0.5,
    beta2=0.5, clip=0.1, seed=2,
    alpha="0.5", beta="0.9", top_n=3, kl="reverse", detach_teacher=False,
    kl_start=0.5, kl_ramp=0.8)
KEEPS_WEIGHTS = dict(
    out="x", eval_every=1, eval_windows=1, keep_best=True, log_every=3, micro_batch=2)
ELSEWHERE = {"compile", "device", "fast"}  # test_train.py, and below


@pytest.mark.parametrize("name", sorted(CHANGES_WEIGHTS))
def test_a_flag_of_training_changes_the_weights(folder, base, tmp_path, name):
    changes = {name: CHANGES_WEIGHTS[name]}
    if name == "data":
        changes = {"data": folder / "other"}
    if name == "tokenizer":
        changes["data"] = folder / "text.txt"
    run = trained(folder, tmp_path, **changes)
    assert run.difference(base) > 1e-7
    stored = run.meta["train_config"][name]
    assert stored == type(stored)(changes[name])
    if name in run.header["model"]:
        assert run.meta["config"][name] == changes[name]
    if name == "tokenizer":
        assert run.meta["config"]["vocab_size"] == 258


@pytest.mark.parametrize("name", KEEPS_WEIGHTS)
def test_a_flag_of_the_rest_keeps_them(folder, base, tmp_path, name):
    changes = {"out": tmp_path}
    if name != "out":
        changes[name] = KEEPS_WEIGHTS[name]
    run = trained(folder, **changes)
    assert run.difference(base) < 1e-9
    assert len(run.val) == (4 if name == "eval_every" else 1)
    assert len(run.rows) == (2 if name == "log_every" else 4)
    assert (tmp_path / "best.pt").exists() == (name == "keep_best")
    difference = abs(run.val[-1]["loss"][0] - base.val[-1]["loss"][0])
    assert difference > 1e-4 if name == "eval_windows" else difference < 1e-6


def test_every_flag_of_train_is_tested():
    assert TRAIN_FLAGS == {*CHANGES_WEIGHTS, *KEEPS_WEIGHTS, *ELSEWHERE}


def test_the_first_step_has_the_schedules_learning_rate(folder, tmp_path):
    """AdamW's first step moves each weight by the learning rate, without decay"""
    plain = dict(steps=1, warmup=5, clip=0, weight_decay=0)
    run = trained(folder, tmp_path / "run", **plain)
    start = trained(folder, tmp_path / "start", **{**plain, "lr": 1e-15})
    assert run.difference(start) == pytest.approx(TOY["lr"] / 5, rel=1e-3)
    assert run.rows[0]["lr"] == pytest.approx(TOY["lr"] / 5)


def test_clip_is_a_bound_and_0_is_none(folder, base, tmp_path):
    loose = trained(folder, tmp_path / "loose", clip=1e9)
    none = trained(folder, tmp_path / "none", clip=0)
    assert loose.difference(none) < 1e-9 and none.difference(base) > 1e-7


def test_micro_batch_and_block_size_are_the_shape_of_a_forward(folder, tmp_path, monkeypatch):
    shapes = []
    forward = GPT.forward

    def spy(model, tokens, *args, **options):
        if model.training:
            shapes.append(tuple(tokens.shape))
        return forward(model, tokens, *args, **options)
    monkeypatch.setattr(GPT, "forward", spy)
    trained(folder, tmp_path, micro_batch=2, steps=1)
    assert shapes == [(2, 16)] * 4


def test_the_seed_reaches_the_initial_weights(folder, tmp_path):
    one, again, two = [trained(folder, tmp_path / name, steps=1, lr=1e-15, seed=seed)
                       for name, seed in (("one", 1), ("again", 1), ("two", 2))]
    assert one.difference(again) == 0 and one.difference(two) > 1e-3


def test_the_seed_and_the_step_reach_the_dropout(folder, tmp_path):
    same = dict(data=folder / "same", lr=1e-15)  # one window again and again, and no learning
    still = trained(folder, tmp_path / "still", **same)
    noisy = trained(folder, tmp_path / "noisy", dropout=0.5, **same)
    assert len(set(still.losses)) == 1 and len(set(noisy.losses)) == 4
    # the same weights continue with another seed
    for name, dropout in (("still", 0.0), ("noisy", 0.5)):
        ends = []
        for seed in (1, 2):
            out = tmp_path / f"{name}{seed}"
            call(train.main, "--resume", tmp_path / name / "ckpt.pt", "--steps=5", f"--seed={seed}",
                 f"--out={out}")
            ends.append(Run(out).losses[-1])
        assert (ends[0] != ends[1]) == (dropout > 0)


def test_bfloat16_reaches_training_and_evaluation(folder, tmp_path):
    low = trained(folder, tmp_path / "low", dtype="bfloat16")
    full = trained(folder, tmp_path / "full", dtype="float32")
    assert all(w.dtype == torch.float32 for w in low.weights.values())  # autocast alone
    assert low.losses[0] != full.losses[0]
    assert low.losses[0] == pytest.approx(full.losses[0], rel=0.01)
    cfg = train.TrainConfig(**low.meta["train_config"])
    val = train.open_data(cfg)[1]
    in_bf16, in_fp32 = [train.evaluate(low.model, val, cfg, CPU, dtype)["loss"]
                        for dtype in (torch.bfloat16, torch.float32)]
    assert low.val[-1]["loss"] == in_bf16 != in_fp32
    assert in_bf16 == pytest.approx(in_fp32, rel=0.01)


@pytest.mark.parametrize("changes", [dict(kl="reverse"), dict(kl="tv"), dict(top_n=200)], ids=str)
def test_the_evaluation_has_the_divergence_of_training(base, changes):
    cfg = train.TrainConfig(**{**base.meta["train_config"], "top_n": 7})
    val = train.open_data(cfg)[1]
    changed = dataclasses.replace(cfg, **changes)
    before, after = [train.evaluate(base.model, val, c, CPU, torch.float64)["kl"]
                     for c in (cfg, changed)]
    assert all(abs(a - b) > 1e-6 for a, b in zip(after, before))


def test_the_log_and_the_checkpoint_say_what_ran(folder, base, tmp_path):
    meta = json.loads((folder / "text/meta.json").read_text(encoding="utf-8"))
    call(train.main, "--resume", folder / "base/ckpt.pt", "--steps=5", f"--out={tmp_path}")
    for run, start, steps in ((base, 0, 4), (Run(tmp_path), 4, 5)):
        assert run.header["start"] == start and run.header["config"]["steps"] == steps
        assert run.header["data_sha256"] == run.meta["data_sha256"] == meta["sha256"]
        assert run.header["model"] == dataclasses.asdict(run.model.config)
        assert run.header["parameters"]["total"] == sum(w.numel() for w in run.model.parameters())


def test_matrix_products_in_float32_may_use_tf32():
    torch.set_float32_matmul_precision("highest")
    with pytest.raises((ValueError, OSError), match="no-such-text"):
        call(train.main, *as_flags({**TOY, "data": "no-such-text"}))
    assert torch.get_float32_matmul_precision() == "high"


def test_the_closing_sample_has_its_temperature(base, monkeypatch):
    asked = []
    generate = decode.generate

    def spy(*args, **options):
        asked.append(options["temperature"])
        return generate(*args, **options)
    monkeypatch.setattr(decode, "generate", spy)
    _, val, meta = train.open_data(train.TrainConfig(**base.meta["train_config"]))
    assert "temperature 0.8" in SAMPLE(base.model, val, meta)
    assert asked == [0.8]


# ---- model.py


def test_initial_weights():
    """0.02; embed_std for the embedding; 0.02 / sqrt(2 n_layer) for what adds to the residuals"""
    torch.manual_seed(0)
    shape = dict(vocab_size=400, block_size=8, n_layer=8, n_head=2, n_embd=64, n_mtp=2)
    model = GPT(GPTConfig(**shape, embed_std=0.3))
    residual = [name for name, _ in model.named_parameters() if name.endswith("proj.weight")]
    assert len(residual) == 2 * (8 + 2)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        want = 0.02
        if name in residual:
            want = 0.02 / 4
        if name == "embed.weight":
            want = 0.3
        assert weight.std().item() == pytest.approx(want, rel=0.05), name
        assert abs(weight.mean().item()) < want / 8, name


# ---- extend.py

EXTEND_FLAGS = {*extend.FLAGS, "heads"}
CHANGES_EXTENSION = dict(heads=3, steps=3, data="other", lr=0.05, alpha="0.9", beta="0.9", top_n=3.0,
                         batch_size=4, seed=2)
KEEPS_EXTENSION = dict(micro_batch=2, eval_every=1, eval_windows=1)


@pytest.fixture(scope="module")
def extension(folder, base):
    return extended(folder / "base/ckpt.pt", folder / "more")


def extended(path, out, **changes):
    call(extend.main, path, *as_flags({"steps": 2, "out": out, "device": "cpu", **changes}))
    return Run(out)


@pytest.mark.parametrize("name", sorted(CHANGES_EXTENSION))
def test_a_flag_of_extend_changes_the_weights(folder, extension, tmp_path, name):
    value = folder / "other" if name == "data" else CHANGES_EXTENSION[name]
    assert extended(folder / "base/ckpt.pt", tmp_path, **{name: value}).difference(extension) > 1e-7


@pytest.mark.parametrize("name", KEEPS_EXTENSION)
def test_a_flag_of_the_rest_of_extend_keeps_them(folder, extension, tmp_path, name):
    run = extended(folder / "base/ckpt.pt", tmp_path, **{name: KEEPS_EXTENSION[name]})
    assert run.difference(extension) < 1e-9
    assert run.meta["train_config"][name] == KEEPS_EXTENSION[name]
    assert len(run.val) == (2 if name == "eval_every" else 1)
    difference = abs(run.val[-1]["loss"][0] - extension.val[-1]["loss"][0])
    assert difference > 1e-4 if name == "eval_windows" else difference < 1e-6


def test_every_flag_of_extend_is_tested():
    assert EXTEND_FLAGS == {*CHANGES_EXTENSION, *KEEPS_EXTENSION, "out", *ELSEWHERE}


def test_the_teacher_of_new_heads_teaches_from_the_first_step(folder, tmp_path):
    trained(folder, tmp_path / "late", kl_start=0.9, kl_ramp=0.05, steps=20, warmup=15, lr=1e-3)
    rows = extended(tmp_path / "late/ckpt.pt", tmp_path / "more", steps=20).rows
    assert all(min(row["kl"][2:]) > 0 for row in rows)
    assert [row["lr"] for row in rows[:2]] == pytest.approx([5e-4, 1e-3])  # a tenth is warm-up


@pytest.mark.parametrize("script", ["train", "extend"])
def test_fast_picks_the_fused_loss(folder, base, tmp_path, monkeypatch, capsys, script):
    """a stand-in for fast/loss.py: here is no GPU"""
    calls = []

    def fused(*args, **options):
        calls.append(1)
        return distill.loss_and_grad(*args, **options)

    def run(name, **changes):
        calls.clear()
        capsys.readouterr()
        if script == "train":
            trained(folder, tmp_path / name, steps=1, **changes)
        else:
            extended(folder / "base/ckpt.pt", tmp_path / name, steps=1, **changes)
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss: ")]
        assert len(said) == 1
        return bool(calls), said[0].rsplit("; ", 1)[0]

    monkeypatch.setattr(fast.loss, "loss_and_grad", fused)
    monkeypatch.setattr(fast.loss, "unsupported", lambda *args: None)
    for name, changes in (("default", {}), ("auto", {"fast": "auto"}), ("on", {"fast": "on"})):
        assert run(name, **changes) == (True, "loss: fused (fast/loss.py)")
    assert run("off", fast="off") == (False, "loss: plain (distill.py; fast is off)")
    monkeypatch.setattr(fast.loss, "unsupported", lambda *args: "no GPU today")
    assert run("not here", fast="auto") == (False, "loss: plain (distill.py; no GPU today)")
    with pytest.raises(ValueError, match="--fast on.*no GPU today"):
        run("impossible", fast="on")


def test_an_extension_of_a_bfloat16_run_is_evaluated_in_bfloat16(folder, tmp_path, capsys):
    low = trained(folder, tmp_path / "low", dtype="bfloat16")
    capsys.readouterr()
    argv = as_flags({"steps": 0, "out": tmp_path / "more", "device": "cpu", "json": True})
    call(extend.main, tmp_path / "low/ckpt.pt", *argv)
    before = json.loads(capsys.readouterr().out.splitlines()[-1])["before"]
    cfg = train.TrainConfig(**low.meta["train_config"])
    more = extend.loop_heads(low.model, 4)
    val = train.open_data(cfg)[1]
    assert before["loss"] == train.evaluate(more, val, cfg, CPU, torch.bfloat16)["loss"]


# ---- decode.py

DECODE_FLAGS = {f.name for f in dataclasses.fields(decode.DecodeConfig)}
OF_GENERATE = dict(prompt="on", tokens=9, temperature=3.0, top_k=2, heads=1, accept="match", seed=2,
                   draft_vocab=70, dtype="bfloat16")


@pytest.fixture(scope="module")
def learned(folder):
    """a checkpoint that has learned enough for some drafts to be accepted"""
    shape = dict(n_layer=1, n_embd=16, block_size=48)
    trained(folder, folder / "learned", steps=60, batch_size=4, lr=0.03, clip=1, log_every=60,
            **shape)
    path = folder / "learned/ckpt.pt"
    model, meta = common.load_checkpoint(path)
    del meta["optimizer"]                       # half of what each test would read
    common.save_checkpoint(path, model, **meta)
    return path


def by_command_and_by_generate(path, cfg, capsys):
    """-> new ids and histogram, which are the same by both ways"""
    capsys.readouterr()
    call(decode.main, path, *as_flags(cfg), "--device=cpu", "--json")
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = common.load_checkpoint(path)[0].to(getattr(torch, cfg["dtype"]))
    options = {k: v for k, v in cfg.items() if k not in ("prompt", "tokens", "seed", "dtype")}
    options["generator"] = torch.Generator().manual_seed(cfg["seed"])
    prompt = list(cfg["prompt"].encode())
    (ids,), stats = decode.generate(model, [prompt], cfg["tokens"], **options)
    assert got["ids"] == ids and got["accepted"] == stats.accepted
    return ids, stats.accepted


@pytest.mark.parametrize("name", sorted(OF_GENERATE))
def test_each_flag_of_decode_reaches_generate(learned, capsys, name, cached=[]):
    default = dict(prompt="the", tokens=16, temperature=0.8, seed=1, dtype="float32")
    cached += [] if cached else [by_command_and_by_generate(learned, default, capsys)]
    _, accepted = cached[0]
    assert 0 < accepted[1] < sum(accepted)      # some drafts were rejected, some were not
    changed = {**default, name: OF_GENERATE[name]}
    assert by_command_and_by_generate(learned, changed, capsys) != cached[0]


def test_every_flag_of_decode_is_tested():
    assert DECODE_FLAGS == {*OF_GENERATE, "device", "fast", "svg", "costs",
                            "chat", "stop"}    # test_first_heads.py


def test_costs_and_auto_reach_generate(learned, tmp_path, capsys):
    drafted = []
    for times in ([1, 9, 9], [1, 0.5, 0.5]):
        (tmp_path / "costs.json").write_text(json.dumps({"1": times}), encoding="utf-8")
        capsys.readouterr()
        call(decode.main, learned, "--heads=auto", f"--costs={tmp_path / 'costs.json'}", "--json",
             "--device=cpu", "--tokens=20", "--prompt=the")
        drafted.append(json.loads(capsys.readouterr().out.splitlines()[-1])["drafted"])
    assert drafted[0][0] == sum(drafted[0]) and drafted[1][0] == 0


def test_fast_picks_the_decoder(learned, monkeypatch, capsys):
    """a stand-in for fast/decode.py: here is no GPU"""
    class Fast(decode.Decoder):
        why = "the stand-in"

    def said(*argv):
        capsys.readouterr()
        call(decode.main, learned, "--tokens=2", "--device=cpu", *argv)
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if line.startswith("decoding on ")).split(": ")[1]

    monkeypatch.setattr(fast.decode, "FastDecoder", Fast)
    monkeypatch.setattr(fast.decode, "unsupported", lambda model: None)
    for argv in ([], ["--fast=auto"], ["--fast=on"]):
        assert said(*argv) == "the stand-in"
    assert said("--fast=off") == "plain PyTorch (fast is off)"
    monkeypatch.setattr(fast.decode, "unsupported", lambda model: "no GPU today")
    assert said() == "plain PyTorch (no GPU today)"
    with pytest.raises(ValueError, match="fast path.*no GPU today"):
        said("--fast=on")


def test_svg_is_the_trace_in_a_file(learned, capsys, tmp_path):
    path = tmp_path / "trace.svg"
    argv = [learned, "--prompt=the", "--tokens=20", "--device=cpu", "--trace"]
    call(decode.main, *argv)
    plain = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    call(decode.main, *argv, f"--svg={path}")
    assert without_time(capsys.readouterr().out) == without_time(plain)
    rows = [line.split("  ") for line in plain.splitlines() if re.search(r"\|(main|\d|rej)", line)]
    drawn = []
    for row in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text"):
        drawn.append([span.text for span in row])
    assert drawn == [[part.rsplit("|", 1)[0] for part in row] for row in rows]
    assert sum(len(row) > 1 for row in drawn) > 3


def without_time(out):
    return re.sub(r"\d+ tokens/s", "", out)


@pytest.mark.parametrize("script", [train, extend, decode])
def test_a_device_that_is_not_there(folder, learned, tmp_path, script):
    argv = [learned, "--device=banana"]
    if script is train:
        argv = as_flags({**TOY, "data": folder / "text", "out": tmp_path, "device": "banana"})
    with pytest.raises(ValueError, match="banana"):
        call(script.main, *argv)


@pytest.fixture
def clock(monkeypatch):
    """time is the number of embeddings looked up: 1 second for the trunk, 1 for each head"""
    seconds = [0.0]
    forward = torch.nn.Embedding.forward

    def count(self, tokens):
        seconds[0] += 1
        return forward(self, tokens)
    monkeypatch.setattr(torch.nn.Embedding, "forward", count)
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_stats_of_generate(learned, clock, heads):
    """of the rounds, without the prefill"""
    model = common.load_checkpoint(learned)[0]
    (ids,), stats = decode.generate(model, [[116] * 9], 20, heads=heads)
    assert stats.forwards == sum(stats.accepted) and stats.sequences == 1
    assert stats.tokens == len(ids) == 20
    assert stats.seconds == stats.forwards * (1 + heads) < clock[0]
    assert stats.tokens_per_forward == 19 / stats.forwards
    assert stats.tokens_per_second == 19 / stats.seconds
    texts, stats = decode.generate(model, [[116], [97], [32]], 20, heads=heads)
    assert stats.sequences == 3 and stats.tokens == sum(map(len, texts)) == 60
    assert stats.tokens_per_forward == 57 / stats.forwards
    assert stats.tokens_per_second == 57 / stats.seconds


def test_generate_has_its_stop_token_and_its_draft_vocabulary(learned):
    model = common.load_checkpoint(learned)[0]
    (ids,), stats = decode.generate(model, [[116]], 40)
    first = ids.index(ids[12])
    assert decode.generate(model, [[116]], 40, stop_token=ids[12])[0] == [ids[: first + 1]]
    few, narrow = decode.generate(model, [[116]], 40, draft_vocab=1)
    assert few == [ids] and narrow.accepted[0] == narrow.forwards > stats.forwards
