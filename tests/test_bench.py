"""results/bench.py: acceptance against a slow loop, its rows by a clock that counts, its flags."""
import inspect
import json
import math
import sys
import time

import pytest
import torch

import common
import decode
import train
from data import prepare as P
from model import GPT, GPTConfig
from results import bench

TEXTS = {
    "text": "the cat sat on the mat, and that was that. " * 60,
    "other": "we say: 12, 34 and 56! " * 90}
FLAGS = dict(tokens=20, count=2, prompt_tokens=8, device="cpu", dtype="float64")


def as_flags(values):
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """two prepared texts, and ckpt.pt with two heads, some of whose drafts are accepted"""
    folder = tmp_path_factory.mktemp("bench")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        P.prepare(folder / f"{name}.txt", "bytes", folder / name, quiet=True)
    values = dict(
        preset="tiny", device="cpu", dtype="float64", compile="off",
        data=folder / "text", out=folder,
        n_layer=1, n_head=2, n_embd=16, n_mtp=2, block_size=48,
        batch_size=8, steps=80, warmup=5, lr=0.02, eval_every=100, eval_windows=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "git_commit", lambda: "1234567")
        patch.setattr(sys, "argv", ["train.py", *as_flags(values)])
        train.main()
    return folder


@pytest.fixture
def clock(monkeypatch):
    """time is the number of embeddings looked up: 1 second for the trunk, 1 for each head"""
    seconds = [0.0]
    forward = torch.nn.Embedding.forward
    milliseconds = bench.milliseconds

    def count(self, tokens):
        seconds[0] += 1
        return forward(self, tokens)
    monkeypatch.setattr(torch.nn.Embedding, "forward", count)
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    # measured by this clock, one repetition tells as much as 20
    monkeypatch.setattr(bench, "milliseconds", lambda x, device, *_: milliseconds(x, device, 1))


@pytest.fixture
def rows(folder, clock, monkeypatch, capsys):
    """the benchmark's rows, given more checkpoints and changed flags"""
    def call(*more, **changes):
        argv = [folder / "ckpt.pt", *more, "--bench", "--json", *as_flags({**FLAGS, **changes})]
        monkeypatch.setattr(sys, "argv", ["decode.py", *map(str, argv)])
        capsys.readouterr()
        decode.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    return call


def column(table, *names):
    return [[row[name] for name in names] for row in table]


# ---- acceptance


def distribution(logits, temperature, top_k):
    """logits -> {token: probability}, of the top k alone"""
    weights = {v: math.exp(x / temperature) for v, x in enumerate(logits.tolist())}
    kept = sorted(weights, key=weights.get, reverse=True)[:top_k]
    total = sum(weights[v] for v in kept)
    return {v: weights[v] / total for v in kept}


def acceptance_rate(p, q, accept):
    """of a draft: sum_v min(p, q) where it is sampled from q, p(argmax q) where it is the argmax"""
    if accept == "residual":
        return sum(min(p.get(v, 0), q[v]) for v in q)
    return p.get(max(q, key=q.get), 0)


@pytest.mark.parametrize("accept", ["residual", "match", "point"])
@pytest.mark.parametrize("temperature, top_k, draft_vocab", [
    (1.0, None, None), (1.0, 2, None), (1.0, None, 3), (0.5, 3, 4)])
def test_acceptance_when_sampling_equals_a_slow_loop(accept, temperature, top_k, draft_vocab):
    torch.manual_seed(3)
    model = GPT(GPTConfig(6, 24, 1, 1, 8, 2)).double().eval()
    for weight in model.parameters():
        weight.data.copy_(torch.randn(weight.shape) * 0.5 + (weight.dim() == 1))
    prompt, ids = [1, 2], [0, 3, 5, 4, 1, 0, 2, 0]
    tokens = torch.tensor([prompt + ids[:-1]])
    main, *heads = [logits[0] for logits in model.all_logits(tokens)]
    products = []
    for i in range(len(prompt) - 1, tokens.size(1) - 2):  # the rounds that have both drafts
        rates = []
        for k, logits in enumerate(heads, 1):
            p = distribution(main[i + k], temperature, top_k)
            q = distribution(logits[i][:draft_vocab], temperature, top_k)
            rates.append(acceptance_rate(p, q, accept))
        products.append([rates[0], rates[0] * rates[1]])
    first, both = [sum(x) / len(products) for x in zip(*products)]
    ar, car = bench.text_acceptance(model, [(prompt, ids)], temperature, top_k, accept, draft_vocab)
    assert car == pytest.approx([first, both]) and ar == pytest.approx([first, both / first])


# ---- the rows


def test_what_the_numbers_of_a_row_have_to_do_with_each_other(folder, rows):
    table = rows(count=1)
    model = common.load_checkpoint(folder / "ckpt.pt")[0]
    read = sum(p.numel() for p in [*model.blocks.parameters(), model.weight]) * 8    # bytes
    assert column(table, "temperature", "heads") == [[t, k] for t in (0, 1) for k in (0, 1, 2)]
    for plain, one, two in (table[:3], table[3:]):
        assert one["ar"] == one["car"] and two["car"] == pytest.approx(one["ar"] * two["ar"])
        assert 0 < two["car"] < one["car"] < 1 < two["tokens_per_forward"]
        expected = [1, 1 + one["car"], 1 + one["car"] + two["car"]]
        for k, row in enumerate((plain, one, two)):
            cost = 1 + k                                       # seconds of a round
            assert row["ms_round"] == 1000 * cost
            assert row["ms_draft"] == 1000 * k and row["ms_verify"] == 1000
            assert row["tokens_per_s"] == pytest.approx(row["tokens_per_forward"] / cost)
            assert row["predicted_tokens_per_forward"] == pytest.approx(expected[k])
            assert row["predicted_speedup"] == pytest.approx(expected[k] / cost)
            assert row["model_speedup"] == pytest.approx(row["tokens_per_forward"] / cost)
            assert row["speedup"] == pytest.approx(row["tokens_per_s"] / plain["tokens_per_s"])
            assert row["over_one"] == pytest.approx(row["tokens_per_s"] / one["tokens_per_s"])
            assert row["gb_per_s"] == pytest.approx(read / cost / 1e9)


def test_a_second_checkpoint_is_compared_with_one_head_of_the_first(folder, rows, tmp_path):
    model, meta = common.load_checkpoint(folder / "ckpt.pt")
    torch.manual_seed(0)
    for weight in model.heads.parameters():  # drafts that are hardly ever accepted
        weight.data.normal_(std=0.1)
    common.save_checkpoint(tmp_path / "worse.pt", model, **meta)
    table = rows(tmp_path / "worse.pt", count=1)
    one = {row["temperature"]: row["tokens_per_s"] for row in table[:6] if row["heads"] == 1}
    for row in table[6:]:
        assert row["over_one"] == pytest.approx(row["tokens_per_s"] / one[row["temperature"]])
    assert table[7]["tokens_per_s"] < 0.9 * one[0]


def test_repetitive_outputs_are_left_out_of_the_medians(rows, monkeypatch, tmp_path):
    for name, lines in (("both", "the cat\nand that"), ("second", "and that")):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    lengths = []
    monkeypatch.setattr(bench, "loops", lambda ids: lengths.append(len(ids)))
    names = "tokens_per_forward", "car", "speedup"
    second = column(rows(prompts=tmp_path / "second")[:3], *names)
    both = column(rows(prompts=tmp_path / "both")[:3], *names)
    assert lengths == [FLAGS["tokens"]] * 6  # of one prompt and two, at two temperatures
    answers = iter([True, False] * 2)
    monkeypatch.setattr(bench, "loops", lambda ids: next(answers))
    table = rows(prompts=tmp_path / "both")[:3]
    assert column(table, *names) == second != both
    assert column(table, "looping", "prompts") == [[1, 2]] * 3


# ---- the flags

OTHERS = dict(accept="match", draft_vocab=100, seed=2, tokens=12, count=1, prompt_tokens=3, batch=2,
              data="other", heads=2, top_k=1)
base_rows = []  # made by the first test that needs them


@pytest.mark.parametrize("name", OTHERS)
def test_each_flag_changes_the_rows(folder, rows, name):
    if not base_rows:
        base_rows.extend(rows())
    got = rows(**{name: folder / "other" if name == "data" else OTHERS[name]})
    greedy, sampled = got[: len(got) // 2], got[len(got) // 2 :]
    counts = "heads", "tokens_per_forward", "ar", "car"
    assert column(got, *counts, "batch") != column(base_rows, *counts, "batch")
    assert all(row["prompts"] == (1 if name == "count" else 2) for row in got)
    assert all(row["batch"] == (2 if name == "batch" else 1) for row in got)
    if name == "heads":
        assert column(got, "heads") == [[0], [2]] * 2
    if name == "top_k":  # the most likely token alone is greedy
        assert column(sampled, *counts) == column(greedy, *counts) == column(base_rows[:3], *counts)
    else:
        assert column(sampled, *counts) != column(greedy, *counts)


def test_the_teacher_forced_acceptance_is_that_of_the_rounds(rows, monkeypatch):
    asked = []
    measure = bench.text_acceptance
    names = "temperature", "top_k", "accept", "draft_vocab"

    def spy(*args, **options):
        given = inspect.signature(measure).bind(*args, **options).arguments
        asked.append([given[name] for name in names])
        return measure(*args, **options)
    monkeypatch.setattr(bench, "text_acceptance", spy)
    rows(top_k=3, accept="match", draft_vocab=100, count=1)
    assert asked == [[0.0, 3, "match", 100], [1.0, 3, "match", 100]]


@pytest.mark.parametrize("data", TEXTS)
def test_prompts_are_pieces_of_the_data(folder, data):
    model, meta = common.load_checkpoint(folder / "ckpt.pt")
    tokenizer = P.Tokenizer(meta["tokenizer"])
    cfg = decode.DecodeConfig(count=3, prompt_tokens=7, tokens=20, data=str(folder / data))
    prompts = [tokenizer.decode(ids) for ids in bench.read_prompts(cfg, tokenizer, meta, model)]
    assert len(prompts) == 3 and all(len(text) == 7 and text in TEXTS[data] for text in prompts)


@pytest.mark.parametrize("count", [2, 9])
def test_prompts_are_lines_of_a_file(folder, tmp_path, count):
    model, meta = common.load_checkpoint(folder / "ckpt.pt")
    (tmp_path / "lines.txt").write_text("a\nb\nc\n", encoding="utf-8")
    cfg = decode.DecodeConfig(count=count, prompts=str(tmp_path / "lines.txt"))
    got = bench.read_prompts(cfg, P.Tokenizer(meta["tokenizer"]), meta, model)
    assert got == [[97], [98], [99]][:count]


def test_check_compares_plain_decoding_with_the_heads_asked_for(folder, monkeypatch):
    asked = []
    generate = decode.generate

    def spy(model, prompts, length, **options):
        asked.append((length, options))
        return generate(model, prompts, length, **options)
    monkeypatch.setattr(decode, "generate", spy)
    flags = as_flags({**FLAGS, "heads": 1, "draft_vocab": 9, "count": 1})
    monkeypatch.setattr(sys, "argv", ["decode.py", str(folder / "ckpt.pt"), "--check", *flags])
    decode.main()
    (length, plain), (also, drafted) = asked
    assert length == also == 20 and plain["heads"] == 0
    assert (drafted["heads"], drafted["draft_vocab"]) == (1, 9)
    assert plain.get("temperature", 0) == drafted.get("temperature", 0) == 0


def test_a_timed_training_step_is_the_one_that_its_row_names(monkeypatch):
    seen = []
    loss = train.distill.mtp_loss

    def spy(hidden, weight, targets, **options):
        seen.append((len(hidden) - 1, options["beta"][0], options["top_n"], len(targets)))
        return loss(hidden, weight, targets, **options)
    monkeypatch.setattr(train.distill, "mtp_loss", spy)
    shape = dict(n_layer=1, n_head=2, n_embd=8, block_size=8)
    cfg = train.TrainConfig(batch_size=4, micro_batch=2, compile="off", **shape)
    combos = [(1, 0, 1), (2, 0.5, 3)]
    bench.bench_training(cfg, torch.device("cpu"), torch.float32, steps=1, combos=combos, vocab=11)
    assert list(dict.fromkeys(seen)) == [(1, 0, 1, 2), (2, 0.5, 3, 2)]
