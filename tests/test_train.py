"""train.py: steps against undivided ones, exact resume, two processes, evaluation, flags,
checkpoints, bad input."""
import dataclasses
import json
import math
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_two
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import common
import train
from data import prepare as P
from model import GPT, GPTConfig

REPO = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TEXT = "the cat sat on the mat, and that was that. " * 80
TOY = dict(
    n_layer=1, n_head=2, n_embd=8, n_mtp=2, block_size=16, batch_size=8, steps=4, warmup=2, lr=1e-2,
    eval_every=100, eval_windows=4, log_every=1, device="cpu", compile="off", dtype="float64",
    kl_start=0.0, kl_ramp=0.0)


def make_data(folder, text=TEXT, name="text"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return P.prepare(folder / f"{name}.txt", "bytes", folder / name, quiet=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def undo_globals(monkeypatch):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(common, "git_commit", lambda: "1234567")          # a process each time
    yield
    torch.set_float32_matmul_precision(before)


def config(data, out, **changes):
    return train.make_config({**TOY, "data": str(data), "out": str(out), **changes})


def new_model(cfg, vocab=257):
    torch.manual_seed(cfg.seed)
    return GPT(train.model_config(cfg, vocab)).double()


def fit(cfg, model=None):
    model = model or new_model(cfg)
    train.train(model, cfg, *train.open_data(cfg))
    return model


@pytest.fixture(scope="module")
def two_steps(data, tmp_path_factory):
    """the checkpoint of two steps, to read"""
    out = tmp_path_factory.mktemp("two_steps")
    fit(config(data, out, steps=2))
    return out / "ckpt.pt"


def flags(data, out, **changes):
    values = {**TOY, "data": data, "out": out, **changes}
    return [f"--{name}={value}" for name, value in values.items()]


def call(monkeypatch, *argv, main=train.main):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    main()


def log_rows(out):
    text = (Path(out) / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def curve(out, key="loss"):
    return torch.tensor([row[key] for row in log_rows(out) if key in row], dtype=torch.float64)


def test_a_row_of_the_log_is_the_mean_of_its_steps(data, tmp_path):
    for every in (1, 2):
        fit(config(data, tmp_path / str(every), log_every=every))
    for key in ("loss", "ce", "kl"):
        single, pairs = curve(tmp_path / "1", key), curve(tmp_path / "2", key)
        means = (single[0::2] + single[1::2]) / 2
        torch.testing.assert_close(pairs, means, rtol=0, atol=1e-12)
        assert not torch.equal(single[0], single[1])


def largest_difference(model, other):
    """between weights of one name"""
    theirs = dict(other.named_parameters())
    names = [name for name, _ in model.named_parameters() if name in theirs]
    return max(float((model.get_parameter(name) - theirs[name]).detach().abs().max())
               for name in names)


def same(model, other):
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


# ---- the step


@pytest.mark.parametrize("changes", [{}, {"clip": 0.1},
                                     {"clip": 0.0, "alpha": "0.3,0"}])
def test_accumulation_does_not_change_the_result(data, tmp_path, changes):
    whole, parts = [fit(config(data, tmp_path / str(micro), micro_batch=micro, **changes))
                    for micro in (8, 1)]
    assert largest_difference(whole, parts) < 1e-9  # a step moves weights by 1e-2
    for key in ("loss", "ce", "kl"):
        one, other = curve(tmp_path / "8", key), curve(tmp_path / "1", key)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_large_vocabulary_is_padded_to_a_multiple_of_64(data, tmp_path):
    cfg = config(data, tmp_path)
    sizes = [len(train.new_model(cfg, size).weight) for size in (257, 1024, 1025)]
    assert sizes == [257, 1024, 1088]


def test_heads_without_weight_leave_the_main_head_alone(data, tmp_path):
    plain, heads = [config(data, tmp_path / str(K), n_mtp=K, alpha="0", beta="0", steps=8)
                    for K in (0, 3)]
    start = new_model(plain)
    model = new_model(heads)
    fresh = {name: w.clone() for name, w in model.heads.state_dict().items()}
    model.load_state_dict(start.state_dict(), strict=False)              # the same trunk
    fit(heads, model)
    assert largest_difference(fit(plain, start), model) < 1e-10
    main, again = curve(plain.out, "ce")[:, 0], curve(heads.out, "ce")[:, 0]
    torch.testing.assert_close(main, again, rtol=0, atol=1e-12)
    assert curve(plain.out)[-1] < curve(plain.out)[0] - 0.1  # there is something to agree on
    assert all(torch.equal(w, fresh[name]) for name, w in model.heads.state_dict().items())


def test_beta_zero_is_plain_mtp(data, tmp_path):
    plain = fit(config(data, tmp_path / "a", beta="0"))
    assert same(plain, fit(config(data, tmp_path / "b", kl_start=1.0)))  # the KL never sets in
    assert largest_difference(plain, fit(config(data, tmp_path / "c"))) > 1e-4
    assert curve(tmp_path / "a", "kl").abs().max() == 0 < curve(tmp_path / "c", "kl").min()


def test_the_kl_sets_in_when_asked_and_costs_nothing_before(data, tmp_path, monkeypatch):
    seen, loss = [], train.distill.mtp_loss

    def spy(hidden, *args, **options):
        out = loss(hidden, *args, **options)
        seen.append((options["ramp"], bool(out[2].any())))
        return out
    monkeypatch.setattr(train.distill, "mtp_loss", spy)
    fit(config(data, tmp_path, steps=8, kl_start=0.5, kl_ramp=0.25))
    assert seen == [(0, False)] * 5 + [(0.5, True)] + [(1, True)] * 2


def test_learning_rate_and_ramp_at_their_corners():
    cfg = train.TrainConfig(steps=100, warmup=10, lr=2.0, min_lr=0.1, kl_start=0.5, kl_ramp=0.2)
    assert [train.lr_at(cfg, s) for s in (0, 4, 9, 10)] == [0.2, 1.0, 2.0, 2.0]
    assert train.lr_at(cfg, 55) == pytest.approx(2.0 * 0.55)
    assert train.lr_at(cfg, 100) == train.lr_at(cfg, 150) == 0.2
    assert all(train.lr_at(cfg, s) > train.lr_at(cfg, s + 1) for s in range(10, 99))
    assert [train.ramp_at(cfg, s) for s in (0, 49, 50, 70, 99)] == [0, 0, 0, pytest.approx(1), 1]
    assert train.ramp_at(cfg, 60) == pytest.approx(0.5)
    sudden = dataclasses.replace(cfg, kl_ramp=0.0, warmup=0)
    assert [train.ramp_at(sudden, s) for s in (49, 50)] == [0, 1] and train.lr_at(sudden, 0) == 2.0
    never = dataclasses.replace(cfg, kl_start=1.0, kl_ramp=0.0)
    assert not any(train.ramp_at(never, s) for s in (0, 99, 100, 1000))
    longer = dataclasses.replace(cfg, steps=300, schedule_steps=100)
    for step in range(100):
        assert train.lr_at(longer, step) == train.lr_at(cfg, step)
        assert train.ramp_at(longer, step) == train.ramp_at(cfg, step)
    assert {train.lr_at(longer, s) for s in (100, 200, 299)} == {0.2}
    assert {train.ramp_at(longer, s) for s in (100, 200, 299)} == {1}
    short = dataclasses.replace(cfg, steps=5, warmup=50)
    assert 0 < train.lr_at(short, 4) < 2.0


def test_what_the_optimizer_holds(data, tmp_path):
    cfg = config(data, tmp_path, weight_decay=0.5, beta2=0.9, clip=0.25)
    model = new_model(cfg)
    model.blocks.requires_grad_(False)
    decayed, other = train.make_optimizer(model, cfg).param_groups
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.5, 0)
    assert decayed["betas"] == (0.9, 0.9)
    free = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in decayed["params"] + other["params"]} == free
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in other["params"]} == {1}


def test_the_schedule_reaches_the_optimizer(data, tmp_path, monkeypatch):
    cfg = config(data, tmp_path, steps=4, warmup=2, lr=1e-2, min_lr=0.0, weight_decay=0.0, clip=0.0)
    seen, make = [], train.make_optimizer

    def spy(*args):
        optimizer = make(*args)
        def rates(*_):
            seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.register_step_pre_hook(rates)
        return optimizer
    monkeypatch.setattr(train, "make_optimizer", spy)
    fit(cfg)
    assert seen == [[train.lr_at(cfg, step)] * 2 for step in range(4)]
    assert curve(tmp_path, "lr").tolist() == [train.lr_at(cfg, step) for step in range(4)]
    assert [rate for rate, _ in seen] == pytest.approx([0.005, 0.01, 0.01, 0.005])


@pytest.mark.parametrize("clip", [0.0, 0.01, 0.02])
def test_the_norm_of_all_gradients_is_clipped(data, tmp_path, monkeypatch, clip):
    norms, make = [], train.make_optimizer

    def spy(model, *args):
        def norm(optimizer, *_):
            norms.append(sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5)
        optimizer = make(model, *args)
        optimizer.register_step_pre_hook(norm)
        return optimizer
    monkeypatch.setattr(train, "make_optimizer", spy)
    fit(config(data, tmp_path, clip=clip))
    assert norms == pytest.approx([clip] * 4, rel=1e-3) if clip else min(norms) > 0.02


def test_batches_are_a_function_of_seed_and_step(data, tmp_path):
    cfg = config(data, tmp_path, batch_size=400)
    starts = train.batch_starts(cfg, 3, 60)
    np.random.seed(0)
    torch.manual_seed(5)
    again = dataclasses.replace(cfg, micro_batch=2, n_mtp=0, steps=9, lr=1.0)
    assert (train.batch_starts(again, 3, 60) == starts).all()
    assert set(starts) == set(range(60 - 16))  # all windows of 17 tokens, also the last
    assert (train.batch_starts(cfg, 4, 60) != starts).any()
    assert (train.batch_starts(dataclasses.replace(cfg, seed=2), 3, 60) != starts).any()
    assert not train.batch_starts(cfg, 0, 17).any()
    ids = np.arange(60, dtype=np.uint16)
    cut = train.get_batch(ids, [0, 43], 16, torch.device("cpu"))
    assert cut.tolist() == [list(range(17)), list(range(43, 60))]


# ---- evaluation


@torch.no_grad()
def slow_evaluation(model, val, cfg):
    K, T, loss, right, kl, lengths = model.config.n_mtp, cfg.block_size, {}, {}, {}, []
    for start in list(range(0, len(val) - T, T))[: cfg.eval_windows]:
        window = [int(t) for t in val[start : start + T + 1]]
        logits = [rows[0] for rows in model.all_logits(torch.tensor([window[:-1]]))]
        for k in range(K + 1):
            for i in range(K - k, T - k):  # all heads on the same targets, K .. T-1
                row, target = logits[k][i], window[i + k + 1]
                loss.setdefault(k, []).append(-float(row.log_softmax(-1)[target]))
                right.setdefault(k, []).append(float(row.argmax() == target))
                top = logits[0][i + k].argsort()[-int(cfg.top_n):]
                q, p = logits[0][i + k][top].softmax(-1), row[top].softmax(-1)
                kl.setdefault(k, []).append(float((q * (q / p).log()).sum()))
        for i in range(T - K):  # a round with t_0 .. t_{i+1} known
            length = 0
            main = [int(row.argmax()) for row in logits[0][i:]]
            while length < K and logits[length + 1][i].argmax() == main[length + 1]:
                length += 1
            lengths.append(length)
    reached = [sum(n >= k for n in lengths) for k in range(K + 1)]
    sums = {"loss": loss, "accuracy": right, "kl": kl}
    out = {name: [sum(x[k]) / len(x[k]) for k in range(K + 1)] for name, x in sums.items()}
    out["kl"] = out["kl"][1:]
    out["ar"] = [after / before for before, after in zip(reached, reached[1:])]
    out["car"] = [n / len(lengths) for n in reached[1:]]
    out["tokens_per_forward"] = sum(n + 1 for n in lengths) / len(lengths)
    return out


def test_evaluation_against_a_slow_loop(data, tmp_path, monkeypatch):
    cfg = config(data, tmp_path, eval_windows=11, top_n=3, dropout=0.5)
    model = new_model(cfg, vocab=4).train()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    val = np.random.default_rng(0).integers(0, 4, 500).astype(np.uint16)
    seen = []
    get_batch = train.get_batch

    def spy(ids, starts, *rest):
        seen.extend(starts)
        return get_batch(ids, starts, *rest)
    monkeypatch.setattr(train, "get_batch", spy)
    first, second = [train.evaluate(model, val, cfg, CPU, torch.float64) for _ in range(2)]
    assert model.training and first == second  # no counter leaks from one call into the next
    assert seen == [16 * i for i in range(11)] * 2  # fixed, and none overlaps another
    want = slow_evaluation(model.eval(), val, cfg)
    assert set(first) == set(want) and min(want["ar"]) > 0
    for name, value in want.items():
        assert first[name] == pytest.approx(value, abs=1e-5), name
    short = train.evaluate(model, val[:40], cfg, CPU, torch.float64)  # two windows and a rest
    want = slow_evaluation(model.eval(), val[:40], cfg)
    assert short["loss"] == pytest.approx(want["loss"], abs=1e-5)


class Alive(TorchDispatchMode):
    """counts the numbers that are alive at once in tensors whose last dimension is `size`"""

    def __init__(self, size):
        super().__init__()
        self.size, self.held, self.most = size, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.size(-1) == self.size:
                storage = tensor.untyped_storage()                       # views share one
                count = storage.nbytes() // tensor.element_size()
                self.held[storage.data_ptr()] = StorageWeakRef(storage), count
        self.held = {at: held for at, held in self.held.items() if not held[0].expired()}
        self.most = max(self.most, sum(count for _, count in self.held.values()))
        return out


def test_evaluation_keeps_the_logits_of_one_window(data, tmp_path):
    V = 4099  # no other dimension is 4099
    cfg = config(data, tmp_path, eval_windows=8, block_size=32, n_mtp=3, top_n=5)
    model = new_model(cfg, vocab=V).float()
    val = np.random.default_rng(0).integers(0, V, 32 * 8 + 1).astype(np.uint16)
    with Alive(V) as alive:
        all_windows = train.evaluate(model, val, cfg, CPU, torch.float32)
    one = 4 * 32 * V  # as all_logits makes them, then aligned, their log-softmax and its gather
    assert one < alive.most < 6 * one
    one_window = dataclasses.replace(cfg, eval_windows=1)
    parts = [train.evaluate(model, val[32 * i :], one_window, CPU, torch.float32)
             for i in range(8)]
    for name in ("loss", "accuracy", "kl", "car"):
        mean = np.mean([part[name] for part in parts], axis=0)
        assert all_windows[name] == pytest.approx(mean, rel=1e-4), name


def test_bits_per_byte_in_the_table():
    result = {"loss": [math.log(2), 1.0], "accuracy": [0.5, 0.25], "ar": [0.8], "car": [0.8],
              "tokens_per_forward": 1.8}
    # 1 bit a token, 4 bytes a token
    text = train.table(result, {"val_bytes": 400, "val_tokens": 100})
    for part in ("0.250 bits per byte", "1.80 tokens per forward", "token +2"):
        assert part in text
    assert "bits per byte" not in train.table(result, {"val_bytes": None, "val_tokens": 100})


# ---- a whole run


def stop_at(monkeypatch, step):
    """Ctrl-C when the batch of this step is asked for"""
    def batch_starts(cfg, at, length, original=train.batch_starts):
        if at == step:
            signal.raise_signal(signal.SIGINT)
        return original(cfg, at, length)
    monkeypatch.setattr(train, "batch_starts", batch_starts)


def test_resume_equals_uninterrupted(data, tmp_path, monkeypatch):
    options = {"steps": 6, "eval_every": 2, "dropout": 0.3}
    call(monkeypatch, *flags(data, tmp_path / "whole", **options))
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume"):
        stop_at(patch, 5)
        call(patch, *flags(data, tmp_path / "cut", **options), main=lambda: common.run(train.main))
    assert common.load_checkpoint(tmp_path / "cut/ckpt.pt")[1]["step"] == 4
    torch.manual_seed(99)
    tried, try_step = [], train.try_step
    monkeypatch.setattr(train, "try_step", lambda model, *more: (
        tried.append(model.blocks[0].training) or try_step(model, *more)))
    call(monkeypatch, "--resume", tmp_path / "cut/ckpt.pt")
    assert tried == [True]                     # what is compiled and sized is what will train
    (whole, a), (cut, b) = [common.load_checkpoint(tmp_path / name / "ckpt.pt")
                            for name in ("whole", "cut")]
    assert same(whole, cut) and a["best_loss"] == b["best_loss"] and a["step"] == b["step"] == 6
    for mine, other in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    # appended: a header, the evaluation of step 4, which may not have ended, then step 5 once more
    rows, again = log_rows(tmp_path / "whole"), log_rows(tmp_path / "cut")
    steps = [row.get("start", row.get("step")) for row in again]
    assert steps == [0, 1, 2, 2, 3, 4, 4, 5] + [4, 4, 5, 6, 6]
    assert again[9] == rows[6] and "val" in again[9]
    assert [row["loss"] for row in again[-3:-1]] == [row["loss"] for row in rows[-3:-1]]
    assert again[-1] == rows[-1]

    other, changed = other_tokenizer(tmp_path), make_data(tmp_path, TEXT[1:], "changed")
    for argv, message in [
        (["--n_mtp=3"], "--n_mtp 3 disagrees"),
        (["--n_layer=2", "--steps=9"], "--n_layer 2 disagrees with the checkpoint, which has 1"),
        (["--preset=gpt2", "--steps=9"], "--preset gpt2 disagrees.* 'tiny'"),
        (["--tokenizer=bytes", "--steps=9"], "--tokenizer bytes disagrees"),
        ([f"--data={changed}", "--steps=9"], "another text.*give --data"),
        ([f"--data={other}", "--steps=9"], "another tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(monkeypatch, "--resume", tmp_path / "cut/ckpt.pt", *argv)
    more = ("--steps=7", "--n_layer=1", f"--out={tmp_path / 'more'}")
    raw = torch.load(tmp_path / "cut/ckpt.pt", weights_only=True)
    torch.save({**raw, "best_loss": 0.5}, tmp_path / "better.pt")        # it was better once
    call(monkeypatch, "--resume", tmp_path / "better.pt", *more)
    meta = common.load_checkpoint(tmp_path / "more/ckpt.pt")[1]
    assert (meta["step"], meta["best_loss"]) == (7, 0.5)


def test_the_same_text_split_otherwise_is_not_resumed(tmp_path, monkeypatch):
    """what was trained on would be validated on; a text's sha256 says nothing about its split"""
    (tmp_path / "my").mkdir()
    for name in "ab":
        (tmp_path / f"my/{name}.txt").write_text(TEXT, encoding="utf-8")
    whole = P.prepare(tmp_path / "my", "bytes", tmp_path / "whole", quiet=True)
    given = P.prepare(tmp_path / "my/a.txt", "bytes", tmp_path / "given", quiet=True,
                      val=tmp_path / "my/b.txt")
    metas = [P.load_dataset(folder)[2] for folder in (whole, given)]
    assert metas[0]["sha256"] == metas[1]["sha256"]
    fit(config(whole, tmp_path / "out", steps=2))
    argv = ("--resume", tmp_path / "out", "--steps=3", f"--data={given}")
    with pytest.raises(common.UserError, match="split otherwise .train_tokens.*give --data"):
        call(monkeypatch, *argv)
    raw = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert raw.pop("data_train_tokens") == metas[0]["train_tokens"]
    torch.save(raw, tmp_path / "out/ckpt.pt")
    call(monkeypatch, *argv)                   # an older version's checkpoint can't tell


def test_no_steps_write_the_untrained_model(data, tmp_path, monkeypatch):
    call(monkeypatch, *flags(data, tmp_path, steps=0))
    model, meta = common.load_checkpoint(tmp_path / "ckpt.pt")
    assert meta["step"] == 0 and [row["step"] for row in log_rows(tmp_path)[1:]] == [0]
    assert same(model, new_model(config(data, tmp_path)))
    with pytest.raises(common.UserError, match="no optimizer, or"):
        call(monkeypatch, "--resume", tmp_path / "ckpt.pt", "--steps=3")


def test_a_run_at_its_end_is_evaluated_again(data, tmp_path, monkeypatch, capsys):
    model = fit(config(data, tmp_path))
    rows = log_rows(tmp_path)
    for steps in ([], ["--steps=2"]):
        capsys.readouterr()
        call(monkeypatch, "--resume", tmp_path / "ckpt.pt", *steps, "--json")
        out = capsys.readouterr().out
        assert json.loads(out.splitlines()[-1]) == rows[-1]["val"]
        assert "larger --steps" in out
        again, meta = common.load_checkpoint(tmp_path / "ckpt.pt")
        assert same(model, again) and meta["step"] == 4 and meta["optimizer"]["state"]


def test_a_moved_checkpoint_is_resumed_where_it_lies(data, tmp_path, monkeypatch):
    """.. and not where it once was, which may be another run's place by now"""
    fit(config(data, tmp_path / "a", steps=2))
    (tmp_path / "a").rename(tmp_path / "b")
    fit(config(data, tmp_path / "a", steps=3, seed=2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    call(monkeypatch, "--resume", tmp_path / "b/ckpt.pt", "--steps=3")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert common.load_checkpoint(tmp_path / "b/ckpt.pt")[1]["step"] == 3
    assert not list((tmp_path / "b").glob("*.old*"))  # a resumed run replaces its own
    assert [row.get("start") for row in log_rows(tmp_path / "b") if "start" in row] == [0, 2]
    monkeypatch.chdir(tmp_path / "b")  # a bare file name has a folder too
    call(monkeypatch, "--resume", "ckpt.pt", "--steps=4")
    assert common.load_checkpoint(tmp_path / "b/ckpt.pt")[1]["step"] == 4
    call(monkeypatch, "--resume", tmp_path / "b", "--steps=5")  # the folder stands for its file
    assert common.load_checkpoint(tmp_path / "b/ckpt.pt")[1]["step"] == 5


def test_resuming_overwrites_no_other_checkpoint(data, tmp_path, monkeypatch):
    fit(config(data, tmp_path / "a", steps=2, keep_best=True))
    fit(config(data, tmp_path / "b", steps=2))
    before = (tmp_path / "a/ckpt.pt").read_bytes(), (tmp_path / "b/ckpt.pt").read_bytes()
    for argv in (["a/best.pt"], ["a/ckpt.pt", f"--out={tmp_path / 'b'}"]):
        with pytest.raises(common.UserError, match="another checkpoint.*--out"):
            call(monkeypatch, "--resume", tmp_path / argv[0], "--steps=4", *argv[1:])
    assert before == ((tmp_path / "a/ckpt.pt").read_bytes(), (tmp_path / "b/ckpt.pt").read_bytes())
    call(monkeypatch, "--resume", tmp_path / "a/best.pt", "--steps=4", f"--out={tmp_path / 'c'}")
    assert common.load_checkpoint(tmp_path / "c/ckpt.pt")[1]["step"] == 4


def test_resuming_overwrites_no_other_best(data, tmp_path, monkeypatch):
    """.. that is all that another run left"""
    for seed, name in enumerate("ab"):
        fit(config(data, tmp_path / name, steps=2, seed=seed, keep_best=True))
    best = tmp_path / "b/best.pt"
    before = best.read_bytes()
    (tmp_path / "b/ckpt.pt").unlink()
    more = ("--steps=4", f"--out={tmp_path / 'b'}", "--keep_best")
    with pytest.raises(common.UserError, match="best.pt is another checkpoint.*--out"):
        call(monkeypatch, "--resume", tmp_path / "a/ckpt.pt", *more)
    assert best.read_bytes() == before and not (tmp_path / "b/ckpt.pt").exists()
    call(monkeypatch, "--resume", best, "--steps=3")     # its own run goes on beside it
    call(monkeypatch, "--resume", tmp_path / "b", "--steps=4")
    assert common.load_checkpoint(tmp_path / "b/ckpt.pt")[1]["step"] == 4


def test_a_new_run_keeps_the_old_one(data, tmp_path, capsys):
    names = ("ckpt", "best")
    kept = []
    for seed in (1, 2, 3):
        # the third has no best.pt to move
        fit(config(data, tmp_path, seed=seed, keep_best=seed == 1))
        lines = capsys.readouterr().out.splitlines()
        kept.append([line for line in lines if "earlier run" in line])
        for name in names if seed == 2 else ["ckpt"]:
            meta = common.load_checkpoint(tmp_path / f"{name}.old.pt")[1] if seed > 1 else None
            assert meta is None or meta["train_config"]["seed"] == seed - 1
        # a stale one would pass for this run's
        assert (tmp_path / "best.pt").exists() == (seed == 1)
    assert [len(lines) for lines in kept] == [0, 1, 1] and "ckpt.old.pt" in kept[1][0]
    assert not (tmp_path / "best.old.pt").exists()  # one generation: not that of seed 1
    assert log_rows(tmp_path)[0]["config"]["seed"] == 3
    old = json.loads((tmp_path / "log.old.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert old["config"]["seed"] == 2
    (tmp_path / "ckpt.pt").unlink()
    with pytest.raises(common.UserError, match="no checkpoint.*ckpt.old.pt"):
        common.load_checkpoint(tmp_path / "ckpt.pt")
    fit(config(data, tmp_path, seed=4))  # after a run that saved nothing, as it seems
    unsaved = (tmp_path / "log.unsaved.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(unsaved[0])["config"]["seed"] == 3 and "earlier" not in capsys.readouterr().out
    assert [row["config"]["seed"] for row in log_rows(tmp_path) if "config" in row] == [4]
    assert common.load_checkpoint(tmp_path / "ckpt.old.pt")[1]["train_config"]["seed"] == 2


def test_resume_does_what_the_flags_say(data, tmp_path, monkeypatch):
    fit(config(data, tmp_path / "a", steps=2))
    more = ("--steps=3", "--weight_decay=0.7", "--beta2=0.5", "--dtype=float32")
    call(monkeypatch, "--resume", tmp_path / "a/ckpt.pt", *more)
    model, meta = common.load_checkpoint(tmp_path / "a/ckpt.pt")
    decayed, other = meta["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.7, 0)
    assert decayed["betas"] == other["betas"] == (0.9, 0.5)
    assert model.weight.dtype == torch.float32
    state = meta["optimizer"]["state"][0]
    # the moments went on
    assert state["exp_avg"].dtype == torch.float32 and int(state["step"]) == 3


def test_more_steps_keep_what_was_reached(data, tmp_path, monkeypatch):
    options = {"steps": 4, "warmup": 0, "min_lr": 0.1, "kl_start": 0.5, "kl_ramp": 0.25}
    seen, loss = [], train.distill.mtp_loss

    def spy(*args, **options):
        seen.append(options["ramp"])
        return loss(*args, **options)
    monkeypatch.setattr(train.distill, "mtp_loss", spy)
    fit(config(data, tmp_path, **options))
    call(monkeypatch, "--resume", tmp_path / "ckpt.pt", "--steps=6")
    # once more: still the first length
    call(monkeypatch, "--resume", tmp_path / "ckpt.pt", "--steps=9")
    assert seen == [0, 0, 0, 1] + [1] * 5
    assert curve(tmp_path, "lr")[4:].tolist() == [pytest.approx(1e-3)] * 5


def test_an_evaluation_that_fails_loses_no_steps(data, tmp_path, monkeypatch, capsys):
    options = {"steps": 4, "eval_every": 2, "keep_best": True}
    whole = fit(config(data, tmp_path / "whole", **options))

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    for n, cut in enumerate((2, 4)):  # in the middle, and at the very end
        calls, evaluate = [], train.evaluate
        out = tmp_path / f"cut{n}"

        def fails_at(*args, calls=calls, cut=cut):
            calls.append(1)
            return out_of_memory() if len(calls) == cut // 2 else evaluate(*args)
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(train, "evaluate", fails_at)
            fit(config(data, out, **options))
        assert common.load_checkpoint(out / "ckpt.pt")[1]["step"] == cut
        call(monkeypatch, "--resume", out / "ckpt.pt")
        model, meta = common.load_checkpoint(out / "ckpt.pt")
        end = common.load_checkpoint(tmp_path / "whole/ckpt.pt")[1]
        assert same(model, whole) and meta["best_loss"] == end["best_loss"]
        found, want = log_rows(out), log_rows(tmp_path / "whole")
        assert [r["val"] for r in found if "val" in r] == [r["val"] for r in want if "val" in r]
        assert (out / "best.pt").exists() and "AR" in capsys.readouterr().out


@pytest.mark.parametrize("change,message", [
    ({"optimizer": {"state": {}, "param_groups": []}}, "no optimizer state"),
    ({"optimizer": {}}, "no optimizer state"), ({"optimizer": "x"}, "no optimizer, or"),
    ({"optimizer": {"state": "x"}}, "no optimizer state"),
    ({"step": -1}, "step -1"), ({"train_config": {"block_size": 17}}, "block_size 17"),
])
def test_what_can_not_be_resumed_exactly(two_steps, tmp_path, monkeypatch, change, message):
    raw = torch.load(two_steps, weights_only=True)
    config_too = {**raw["train_config"], **change.get("train_config", {})}
    torch.save({**raw, **change, "train_config": config_too}, tmp_path / "ckpt.pt")
    with pytest.raises(common.UserError, match=message):
        call(monkeypatch, "--resume", tmp_path / "ckpt.pt", "--steps=3")


def test_a_checkpoint_with_retired_flags_is_resumed(data, two_steps, tmp_path, monkeypatch):
    raw = torch.load(two_steps, weights_only=True)
    raw["train_config"].update(clip_apart=False, kl_grad="full")
    raw["evaluated"] = True
    del raw["train_config"]["schedule_steps"]
    torch.save(raw, tmp_path / "ckpt.pt")
    assert train.stored_config(raw) == config(data, two_steps.parent, steps=2)
    call(monkeypatch, "--resume", tmp_path / "ckpt.pt", "--steps=3")
    assert "clip_apart" not in common.load_checkpoint(tmp_path / "ckpt.pt")[1]["train_config"]


def other_tokenizer(tmp_path):
    (tmp_path / "other.txt").write_text(TEXT, encoding="utf-8")
    return P.prepare(tmp_path / "other.txt", "bpe:260", tmp_path / "other", quiet=True)


def test_log_checkpoint_and_json(data, tmp_path, monkeypatch, capsys):
    call(monkeypatch, *flags(data, tmp_path, steps=5, log_every=2, eval_every=3), "--json")
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    header, *rows = log_rows(tmp_path)
    assert set(header) == {"config", "model", "parameters", "start", "commit", "torch", "device",
                           "data_sha256"}
    meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
    assert (header["data_sha256"], header["config"]["steps"]) == (meta["sha256"], 5)
    assert header["torch"] == torch.__version__
    assert [row["step"] for row in rows] == [2, 3, 3, 4, 5, 5] and rows[-1]["val"] == result
    assert len(rows[0]["ce"]) == 3 and len(rows[0]["kl"]) == 2
    assert "bits per byte" in out and "a sample at temperature" in out
    raw = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert set(raw) >= {"config", "model", "tokenizer", "optimizer", "step", "train_config",
                        "best_loss", "data_sha256"}
    assert not any("_orig_mod" in name for name in raw["model"])
    assert raw["train_config"]["steps"] == 5
    model, loaded = common.load_checkpoint(tmp_path / "ckpt.pt")
    assert not model.training and model.weight.dtype == torch.float64
    assert loaded["tokenizer"] == {"kind": "bytes"}
    assert same(model, fit(config(data, tmp_path / "b", steps=5)))  # the command and fit() agree


@pytest.mark.parametrize("changes", [{"n_mtp": 0}, {"block_size": 3}, {"block_size": 2, "n_mtp": 1},
                                     {"block_size": 1, "n_mtp": 0}])
def test_the_closing_sample_of_tiny_models(data, tmp_path, monkeypatch, capsys, changes):
    call(monkeypatch, *flags(data, tmp_path, **{**changes, "steps": 1}))
    assert "tokens per forward" in capsys.readouterr().out


@pytest.mark.parametrize("n_mtp, proposed", [(0, False), (1, True), (2, True), (3, False)])
def test_what_is_proposed_at_the_end_is_possible(data, tmp_path, monkeypatch, capsys, n_mtp,
                                                 proposed):
    call(monkeypatch, *flags(data, tmp_path, n_mtp=n_mtp, block_size=5, steps=1))
    said = f"extend.py {tmp_path}/ckpt.pt --heads {2 * n_mtp} " in capsys.readouterr().out
    assert said == proposed


def test_two_processes_equal_one(data, tmp_path):
    out = tmp_path / "two"
    argv = ["train.py", *flags(data, out, micro_batch=2, **DDP)]
    said = run_two(train.main, argv, tmp_path / "log")
    assert [code for code, *_ in said] == [0, 0], said
    whole = config(data, tmp_path, **DDP)
    assert largest_difference(fit(whole), common.load_checkpoint(out / "ckpt.pt")[0]) < 1e-9
    for key in ("loss", "ce", "kl"):  # the mean over both, not rank 0's own windows
        torch.testing.assert_close(curve(out, key), curve(tmp_path, key), rtol=0, atol=1e-9)
    assert [row["step"] for row in log_rows(out) if "loss" in row] == [1, 2, 3]
    assert said[0][1].count("bits per byte") == 1 and said[1][1] == ""


@pytest.mark.parametrize("damage, message", [
    (lambda meta: meta["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "optimizer state"),
    (lambda meta: meta["optimizer"]["state"].update({0: None}), "optimizer state"),
    (lambda meta: meta["optimizer"]["state"][1].pop("exp_avg_sq"), "optimizer state"),
    (lambda meta: meta["optimizer"]["state"].pop(2), "optimizer state"),
    (lambda meta: meta["optimizer"]["state"][0].update(step=3), "optimizer state"),
    (lambda meta: meta["optimizer"]["state"][0].update(  # one number, as a whole matrix
        exp_avg=torch.zeros(1).expand(meta["optimizer"]["state"][0]["exp_avg"].shape)),
     "optimizer state"),
    (lambda meta: meta.update(optimizer=None), "no optimizer, or"),
    (lambda meta: meta.pop("tokenizer"), "no tokenizer"),
    (lambda meta: meta.update(train_config=[1]), "no train_config"),
    (lambda meta: meta.update(step="3"), "no step"),
    (lambda meta: meta.pop("best_loss"), "no best_loss"),
    (lambda meta: meta["train_config"].update(lr="high"), "--lr is 'high'; it must be of type float"),
    (lambda meta: meta["train_config"].update(eval_every=2.5), "--eval_every is 2.5.* int"),
])
def test_a_checkpoint_with_wrong_entries_is_not_resumed(two_steps, tmp_path, damage, message):
    """in one line, and before the optimizer reads past the end of a tensor"""
    model, meta = common.load_checkpoint(two_steps)
    damage(meta)
    common.save_checkpoint(tmp_path / "ckpt.pt", model, **meta)
    with pytest.raises(common.UserError, match=message):
        model, state, cfg = train.resume(tmp_path / "ckpt.pt", {"steps": 4})
        train.make_optimizer(model, cfg, state["optimizer"])


def test_heads_without_a_loss_so_far_do_not_prevent_resuming(data, tmp_path):
    """before the KL starts, heads with alpha = 0 have had no gradient, and so have no moments"""
    def some(out, steps):
        return config(data, tmp_path / out, steps=steps, schedule_steps=4, alpha="0", beta="0.5",
                      kl_start=0.5, kl_ramp=0.0, eval_every=2)
    whole = fit(some("whole", 4))
    fit(some("half", 2))
    model, state, cfg = train.resume(tmp_path / "half/ckpt.pt", {"steps": 4})
    train.train(model, cfg, *train.open_data(cfg), state)
    assert same(model, whole)


def test_device_cpu_takes_the_preset_for_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, preset in (("auto", "small"), ("cuda", "small"), ("cpu", "tiny"), ("mps", "tiny")):
        assert train.make_config({"device": device}).preset == preset


# a head that gets no gradient: DDP expects one
DDP = {"steps": 3, "alpha": "0.3,0", "beta": "0.5,0"}


def test_an_error_on_one_of_two_processes_is_shown_once(data, tmp_path):
    argv = ["train.py", *flags(data, tmp_path, **{**DDP, "micro_batch": 2, "lr": 1e18, "steps": 9})]
    said = run_two(train.main, argv, tmp_path / "log")
    text = "".join(out + err for _, out, err in said)
    assert [code for code, *_ in said] == [1, 1]
    assert text.count("the loss is nan at step") == 1, text
    assert "Traceback" not in text, text[-6000:]
    assert "rank 1 stopped, because another process did" in text


def test_an_error_that_all_processes_find_is_shown_by_one(monkeypatch):
    for rank, code in (("0", "test_train.py: --kl is 'gone'"), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(sys, "argv", ["test_train.py", "--kl=gone"])
        with pytest.raises(SystemExit) as stop:
            common.run(train.main)
        assert str(stop.value.code).startswith(str(code))


# ---- flags


def test_help_tells_every_flag_with_its_default(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "-h")
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines where it likes
    assert stop.value.code == 0 and "--resume" in text
    for f in dataclasses.fields(train.TrainConfig):
        assert "".join(f"{f.metadata['help']} (default {f.default!r})".split()) in text, f.name
        assert f"--{f.name}" in text


def test_defaults_then_preset_then_flags(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = train.make_config({"n_layer": 2, "lr": 0.5})
    assert (cfg.preset, cfg.out, cfg.n_layer, cfg.lr) == ("tiny", "out/tiny", 2, 0.5)
    assert (cfg.n_embd, cfg.weight_decay) == (80, 0.1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.make_config({}).preset == "small"
    assert train.make_config({"preset": "gpt2"}).beta2 == 0.95
    small = {"preset": "small"}
    assert train.make_config({**small, "data": "mine"}).tokenizer == ""
    assert train.make_config({**small, "data": "mine", "tokenizer": "bytes"}).tokenizer == "bytes"
    switch = [("--json", {"action": "store_true"})]
    argv = ["--no-detach_teacher", "--steps", "7"]
    given, rest = common.parse(train.TrainConfig, "", switch, argv)
    assert given == {"detach_teacher": False, "steps": 7} and rest == {"json": False}
    for preset in train.PRESETS:
        assert train.make_config({"preset": preset}).out == f"out/{preset}"


def test_weights_of_the_heads():
    cfg = train.TrainConfig(n_mtp=3, alpha="0.3", beta="1,0.5, 0")
    assert train.head_weights(cfg) == [[0.3] * 3, [1, 0.5, 0]]
    assert train.head_weights(train.TrainConfig(n_mtp=0)) == [[], []]


@pytest.mark.parametrize("given,message", [
    ({"preset": "huge"}, "--preset is 'huge'; it must be one of tiny"),
    ({"kl": "gone"}, "--kl is 'gone'; it must be one of forward"), ({"compile": "yes"}, "--compile"),
    ({"dtype": "float8"}, "--dtype"), ({"steps": -1}, "--steps is -1"),
    ({"batch_size": 0}, "--batch_size is 0"), ({"eval_every": 0}, "--eval_every"),
    ({"eval_windows": 0}, "--eval_windows"), ({"log_every": 0}, "--log_every"),
    ({"warmup": -1}, "--warmup"), ({"clip": -1.0}, "--clip"),
    ({"micro_batch": -1}, "--micro_batch"),
    ({"micro_batch": 3}, "--batch_size is 8; it must be a multiple of 3 .*--micro_batch"),
    ({"compile": "block"}, "--compile is 'block'"), ({"alpha": "a"}, "--alpha is 'a'"),
    ({"alpha": "1,2,3"}, "--alpha is .*2 heads"), ({"beta": "-1"}, "--beta"),
    ({"beta": "nan"}, "--beta"), ({"beta": "inf"}, "--beta"), ({"beta": ""}, "--beta"),
    ({"top_n": 0.0}, "--top_n is 0"), ({"top_n": 2.5}, "--top_n"),
    ({"n_mtp": -1}, "n_mtp is -1|--alpha"), ({"n_head": 3}, "n_embd"),
    ({"n_mtp": 16}, "block_size"),
    ({"kl_start": 75.0}, r"--kl_start is 75.0; it must be a finite number in \[0, 1\]"),
    ({"kl_start": -0.1}, "--kl_start"), ({"kl_ramp": -1.0}, "--kl_ramp"),
    ({"kl_ramp": "nan"}, "--kl_ramp is nan; it must be a finite number"),
    ({"min_lr": -1.0}, "--min_lr is -1.0"), ({"min_lr": "inf"}, "--min_lr is inf"),
    ({"min_lr": 1.5}, "--min_lr"), ({"lr": -1.0}, "--lr"), ({"lr": "nan"}, "--lr is nan"),
    ({"weight_decay": -0.1}, "--weight_decay"), ({"weight_decay": "inf"}, "--weight_decay"),
    ({"beta2": 1.0}, r"--beta2 is 1.0; .* in \[0, 0.9999\]"),
    ({"beta2": -0.1}, "--beta2"), ({"clip": "nan"}, "--clip"), ({"dropout": 1.0}, "--dropout"),
    ({"seed": -1}, "--seed"), ({"embed_std": "nan"}, "--embed_std"),
    ({"embed_std": 0.0}, "--embed_std"), ({"top_n": "nan"}, "--top_n"),
    ({"schedule_steps": -1}, "--schedule_steps"), ({"n_embd": 97}, "--n_embd is 97"),
    ({"n_layer": 0}, "--n_layer is 0"), ({"data": ""}, "no data is named"),
    ({"tokenizer": "bytes"}, "--tokenizer bytes has no effect.*already tokenized"),
    ({"device": "banana"}, "--device"), ({"data": "no-such-text"}, "no-such-text"),
])
def test_bad_flags(data, tmp_path, monkeypatch, given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(monkeypatch, *flags(**{"data": data, "out": tmp_path / "out", **given}))
    assert not (tmp_path / "out/ckpt.pt").exists()


# ---- bad data


def test_bad_data_sets(data, tmp_path, monkeypatch):
    for text, message in [("ab" * 8, "14 training and 2 validation tokens.* 17"),
                          ("ab" * 40, "72 training and 8 validation tokens.*--block_size")]:
        with pytest.raises(ValueError, match=message):
            train.open_data(config(make_data(tmp_path, text), tmp_path / "out"))
    folder = make_data(tmp_path)
    ids = np.fromfile(folder / "val.bin", dtype="<u2")
    ids[3] = 300
    ids.tofile(folder / "val.bin")
    with pytest.raises(ValueError, match="holds the id 300"):
        train.open_data(config(folder, tmp_path / "out"))
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="meta.json is missing"):
        train.open_data(config(folder, tmp_path / "out"))


@pytest.mark.parametrize("tokenizer", ["bytes", ""])
def test_own_text_is_the_text_of_now(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(P, "HERE", tmp_path / "data")  # prepared sets lie beside the script
    for name, text in (("a", TEXT), ("b", TEXT[1:] * 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my.txt").write_text(text, encoding="utf-8")
    cfg = [config(tmp_path / name / "my.txt", tmp_path, tokenizer=tokenizer) for name in "ab"]
    one, two = (train.open_data(c)[2] for c in cfg)
    assert one["sha256"] != two["sha256"]  # two files of one name are two texts
    (tmp_path / "a/my.txt").write_text("now " + TEXT, encoding="utf-8")
    assert train.open_data(cfg[0])[2]["sha256"] not in (one["sha256"], two["sha256"])
    monkeypatch.setenv("RANK", "1")  # the process that only waits must not write
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(P, "prepare", None)
    assert train.open_data(cfg[1])[2] == two


# ---- checkpoints: bad ones, and what happens when writing one fails


def test_bad_checkpoints(data, tmp_path, monkeypatch):
    cfg = config(data, tmp_path, steps=1)
    fit(cfg)
    path = tmp_path / "ckpt.pt"
    whole = path.read_bytes()
    (tmp_path / "text.pt").write_text("once upon a time", encoding="utf-8")
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in [
        ("text", "can't be loaded"), ("cut", "cut short"), ("foreign", "not a checkpoint"),
        ("list", "not a checkpoint"), ("none", "no checkpoint at"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call(monkeypatch, "--resume", tmp_path / f"{name}.pt")
    # a load that does nothing can't pass for one: such weights can't be used for anything
    monkeypatch.setattr(GPT, "load_state_dict", lambda *args, **options: None)
    assert all(w.is_meta for w in common.load_checkpoint(path)[0].parameters())


def full_disk(error):
    def save(what, path):
        Path(path).write_bytes(b"half")
        signal.raise_signal(signal.SIGINT) if error is KeyboardInterrupt else None
        raise error("no space left on device")
    return save


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
def test_an_interrupted_save_keeps_the_old_checkpoint(data, tmp_path, monkeypatch, error):
    shown = error if error is KeyboardInterrupt else common.UserError
    model = new_model(config(data, tmp_path))
    path = tmp_path / "deep" / "ckpt.pt"
    common.save_checkpoint(path, model, step=1)
    before = path.read_bytes()
    # torch says RuntimeError when the disk is full
    monkeypatch.setattr(torch, "save", full_disk(error))
    with pytest.raises(shown, match="free some space" if shown is common.UserError else None):
        common.save_checkpoint(path, model, step=2)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]


def test_a_real_limit_on_the_file_size(data, tmp_path):
    resource = pytest.importorskip("resource")                           # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(common.UserError, match="free some space"):
            common.save_checkpoint(tmp_path / "ckpt.pt", new_model(config(data, tmp_path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite(data, tmp_path, monkeypatch):
    calls, loss = [], train.distill.mtp_loss

    def spoiled(*args, **options):
        calls.append(1)
        value, ce, kl = loss(*args, **options)
        return value * (math.nan if len(calls) == 5 else 1), ce, kl
    monkeypatch.setattr(train.distill, "mtp_loss", spoiled)
    cfg = config(data, tmp_path, steps=8, eval_every=4, log_every=2)
    rate = f"{train.lr_at(cfg, 6):.2e}"  # a row of the log is the mean of steps 5 and 6
    with pytest.raises(common.UserError, match=rf"nan at step 6 \(learning rate {rate}\).*--lr"):
        fit(cfg)
    model, meta = common.load_checkpoint(tmp_path / "ckpt.pt")
    assert meta["step"] == 4 and all(w.isfinite().all() for w in model.parameters())


@pytest.mark.parametrize("eval_every", [1, 2, 3, 4])
def test_a_diverged_model_is_never_saved(data, tmp_path, eval_every):
    # be it a loss or an evaluation that shows it
    with pytest.raises(common.UserError, match="--lr"):
        fit(config(data, tmp_path, steps=8, lr=1e200, eval_every=eval_every))
    if (tmp_path / "ckpt.pt").exists():
        common.load_checkpoint(tmp_path / "ckpt.pt")  # which raises on weights that are not finite


def test_errors_end_in_one_line_and_an_exit_code(data, tmp_path, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore lines")
    monkeypatch.setattr(train, "train", out_of_memory)
    for argv, message in [(flags(data, tmp_path), "out of memory .*9 GiB.*--micro_batch"),
                          (["--preset=huge"], "^train.py: --preset is 'huge'")]:
        # a text: Python prints it and exits with 1
        with pytest.raises(SystemExit, match=message) as stop:
            call(monkeypatch, *argv, main=lambda: common.run(train.main))
        assert "\n" not in stop.value.code
    monkeypatch.setattr(sys, "argv", ["train.py", "--kl", "gone"])
    with pytest.raises(SystemExit, match="^train.py: --kl is 'gone'"):
        runpy.run_path(str(REPO / "train.py"), run_name="__main__")


def test_a_programmers_mistake_keeps_its_traceback(data, tmp_path, monkeypatch):
    """a student's mtp_loss that returns two values instead of three"""
    loss = train.distill.mtp_loss

    def planted(*args, **options):
        return loss(*args, **options)[:2]
    monkeypatch.setattr(train.distill, "mtp_loss", planted)
    with pytest.raises(ValueError, match="not enough values to unpack") as error:
        call(monkeypatch, *flags(data, tmp_path), main=lambda: common.run(train.main))
    assert not isinstance(error.value, common.UserError)
    assert error.traceback[-1].path.name == "train.py"


# ---- torch.compile


def break_compile(monkeypatch, how):
    """torch.compile works (but compiles nothing), or fails in one of several ways"""
    def broken(*args, **options):
        raise RuntimeError("no Triton here\nmore lines") if how != "raises_mute" else AssertionError

    def compile_module(self, **options):
        if how.startswith("raises"):
            broken()
        self._compiled_call_impl = broken if how == "fails_later" else None
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    monkeypatch.setattr(torch, "compile",
                        lambda kernel, **options: broken if how == "kernels_fail" else kernel)


HOW = ["works", "raises", "raises_mute", "fails_later", "kernels_fail"]


@pytest.mark.parametrize("how", HOW)
def test_auto_continues_without_torch_compile(data, tmp_path, monkeypatch, capsys, how, off=[]):
    with monkeypatch.context() as patch:
        break_compile(patch, how)
        patch.setattr(train, "pick_compile", lambda cfg, device: "model")  # as auto does on CUDA
        model = fit(config(data, tmp_path / "auto", compile="auto"))
    lines = [x for x in capsys.readouterr().out.splitlines() if "torch.compile" in x]
    assert len(lines) == (how != "works")
    assert all("continuing without it" in line for line in lines)
    off += [] if off else [fit(config(data, tmp_path / "off"))]
    assert same(model, off[0])


@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_compile_asked_for_by_name_raises(data, tmp_path, monkeypatch, mode):
    for how in HOW[1:]:
        with monkeypatch.context() as patch, pytest.raises((RuntimeError, AssertionError)):
            break_compile(patch, how)
            fit(config(data, tmp_path, compile=mode))


def test_as_many_windows_as_fit_into_memory(data, tmp_path, monkeypatch):
    """and a --micro_batch that was asked for is never changed"""
    def compile_model(model, cfg, tokens, dtype):
        tried.append(len(tokens))
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "function", "why"
    monkeypatch.setattr(train, "compile_model", compile_model)
    train_ids, _, meta = train.load_dataset(data)
    cfg = config(data, tmp_path, batch_size=12, micro_batch=0)
    model = train.new_model(cfg, meta["vocab_size"])
    tried = []
    assert train.try_step(model, cfg, train_ids, torch.float32) == (3, "function", "why")
    assert tried == [12, 6, 3]
    tried = []
    cfg.micro_batch = 6
    with pytest.raises(torch.OutOfMemoryError):
        train.try_step(model, cfg, train_ids, torch.float32)
    assert tried == [6]


def test_which_parts_are_compiled(data, tmp_path):
    cuda = torch.device("cuda")
    for mode in ("off", "blocks", "model"):
        cfg = config(data, tmp_path, compile=mode)
        assert train.pick_compile(cfg, CPU) == train.pick_compile(cfg, cuda) == mode
    for n_layer, mode in ((12, "model"), (13, "blocks")):
        cfg = config(data, tmp_path, compile="auto", n_layer=n_layer)
        assert train.pick_compile(cfg, CPU) == "off" and train.pick_compile(cfg, cuda) == mode


# ---- best.pt


def main_losses(monkeypatch, *losses):
    """the main head's loss in the next evaluations"""
    losses = iter(losses)
    evaluate = train.evaluate

    def changed(*args):
        result = evaluate(*args)
        result["loss"][0] = next(losses)
        return result
    monkeypatch.setattr(train, "evaluate", changed)


def steps_and_losses(folder):
    """of best.pt and ckpt.pt"""
    metas = [common.load_checkpoint(folder / name)[1] for name in ("best.pt", "ckpt.pt")]
    return [(meta["step"], meta["best_loss"]) for meta in metas]


def test_keep_best_keeps_the_lowest(data, tmp_path, monkeypatch):
    """best.pt is the checkpoint of the lowest validation loss, and stays when that rises again"""
    main_losses(monkeypatch, 3.0, 1.0, 2.0)
    fit(config(data, tmp_path, steps=6, eval_every=2, keep_best=True))
    assert steps_and_losses(tmp_path) == [(4, 1.0), (6, 1.0)]


def test_a_best_that_was_never_written_is_written_by_resume(data, tmp_path, monkeypatch):
    """killed between the two files, ckpt.pt must not hold a loss whose weights never came"""
    saved = []
    save = train.save_checkpoint

    def dies(path, *args, **meta):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(path, *args, **meta)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        main_losses(patch, 3.0, 1.0)
        patch.setattr(train, "save_checkpoint", dies)
        fit(config(data, tmp_path, steps=4, eval_every=2, keep_best=True))
    assert saved == ["ckpt.pt", "best.pt", "ckpt.pt"]  # each time, first before the evaluation
    assert steps_and_losses(tmp_path) == [(2, 3.0), (4, 3.0)]
    with monkeypatch.context() as patch:
        main_losses(patch, 1.0)
        call(patch, "--resume", tmp_path / "ckpt.pt")
    assert steps_and_losses(tmp_path) == [(4, 1.0), (4, 3.0)]
    (tmp_path / "best.pt").unlink()  # lost: the next one is the best there is
    main_losses(monkeypatch, 5.0)
    call(monkeypatch, "--resume", tmp_path / "ckpt.pt")
    assert steps_and_losses(tmp_path) == [(4, 5.0), (4, 3.0)]
