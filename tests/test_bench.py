"""results/bench.py: acceptance against a slow loop, how its rows relate, where its flags arrive."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import decode
import distill
import train
from data import prepare as P
from fast.heads import read_costs
from model import GPT, GPTConfig
from results import bench

CPU = torch.device("cpu")
FLAGS = {"tokens": 20, "count": 2, "prompt_tokens": 8, "device": "cpu", "dtype": "float64"}


def as_flags(values):
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """a checkpoint with two heads whose drafts are sometimes accepted, one without heads, one with
    another tokenizer, and another text"""
    folder = tmp_path_factory.mktemp("bench")
    texts = {"text": "the cat sat on the mat, and that was that. " * 60,
             "other": "we say: 12, 34, 56 and 78! " * 80}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        P.prepare(folder / f"{name}.txt", "bytes", folder / name, quiet=True)
    values = dict(n_layer=1, n_head=2, n_embd=16, n_mtp=2, block_size=48, batch_size=4, steps=80,
                  warmup=5, lr=0.02, eval_every=100, eval_windows=4, device="cpu", dtype="float64",
                  compile="off", preset="tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "git_commit", lambda: "1234567")
        values.update(data=folder / "text", out=folder)
        patch.setattr(sys, "argv", ["train.py", *as_flags(values)])
        train.main()
    model, meta = common.load_checkpoint(folder / "ckpt.pt")
    del meta["optimizer"]                                 # half of what each test would read
    common.save_checkpoint(folder / "ckpt.pt", model, **meta)
    plain = GPT(dataclasses.replace(model.config, n_mtp=0)).double()
    common.save_checkpoint(folder / "plain.pt", plain, **meta)
    meta["tokenizer"] = {**meta["tokenizer"], "name": "x"}
    common.save_checkpoint(folder / "bpe.pt", plain, **meta)
    return folder


def call(monkeypatch, capsys, *argv):
    """-> what `bench.py ..` prints"""
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, argv)])
    capsys.readouterr()
    bench.main()
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """no test compares times of the wall clock: one call is timed, not the median of many"""
    milliseconds = bench.milliseconds
    monkeypatch.setattr(bench, "WARM_UP", 2)
    monkeypatch.setattr(bench, "milliseconds",
                        lambda functions, device, repeats=1: milliseconds(functions, device, 1))


@pytest.fixture
def clock(monkeypatch):
    """time is counted in embeddings looked up: the main model takes half a second, a head, too"""
    seconds = [0.0]
    forward = torch.nn.Embedding.forward

    def count(self, tokens):
        seconds[0] += 0.5
        return forward(self, tokens)
    monkeypatch.setattr(torch.nn.Embedding, "forward", count)
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])

@pytest.fixture
def rows(toy, clock, monkeypatch, capsys):
    def decode_rows(*checkpoints, **changes):
        out = call(monkeypatch, capsys, "decode", toy / "ckpt.pt", *checkpoints, "--json",
                   *as_flags({**FLAGS, **changes}))
        return json.loads(out.splitlines()[-1])
    return decode_rows


def numbers(table):
    """what doesn't depend on the time"""
    names = ("heads", "tokens_per_forward", "ar", "car", "looping", "batch")
    return [[row[name] for name in names] for row in table]


# -----------------------------------------------------------------------------
# acceptance


def distribution(logits, temperature, top_k):
    weights = {v: math.exp(x / temperature) for v, x in enumerate(logits.tolist())}
    kept = sorted(weights, key=weights.get)[-top_k if top_k else 0 :]
    total = sum(weights[v] for v in kept)
    return {v: weights[v] / total for v in kept}


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"draft_vocab": 3},
                                     {"temperature": 0.5, "top_k": 3, "draft_vocab": 4}])
@pytest.mark.parametrize("accept", ["residual", "match", "point", "a rule of your own"])
def test_acceptance_when_sampling_against_a_slow_loop(accept, options):
    torch.manual_seed(3)
    model = GPT(GPTConfig(6, 24, 1, 1, 8, 2)).double().eval()
    for weight in model.parameters():
        weight.data.copy_(torch.randn(weight.shape) * 0.5 + (weight.dim() == 1))
    options = {"temperature": 1.0, **options}
    T, top_k = options["temperature"], options.get("top_k")
    prompt, ids = [1, 2], [0, 3, 5, 4, 1, 0, 2, 0]
    text = prompt + ids[:-1]
    logits = [x[0] for x in model.all_logits(torch.tensor([text]))]
    want = []
    for i in range(len(prompt) - 1, len(text) - 2):     # rounds that have both drafts
        kept = [1.0]
        for k in (1, 2):                                # head k's row i and the main head's row i+k
            p = distribution(logits[0][i + k], T, top_k)
            q = distribution(logits[k][i][: options.get("draft_vocab")], T, top_k)
            draft = max(q, key=q.get)
            rate = p.get(draft, 0)
            if accept not in ("match", "point"):
                rate = sum(min(p.get(v, 0), q[v]) for v in q)
            kept.append(kept[-1] * rate)
        want.append(kept[1:])
    car = [sum(column) / len(want) for column in zip(*want)]
    got_ar, got_car = bench.text_acceptance(model, [(prompt, ids)], accept=accept, **options)
    assert got_car == pytest.approx(car) and got_ar == pytest.approx([car[0], car[1] / car[0]])


# -----------------------------------------------------------------------------
# bench.py decode: the rows


def test_acceptance_is_that_of_the_model_and_not_of_what_does_its_steps(rows, monkeypatch):
    """on the fast path a decoder's model is a wrapper, which has the steps alone"""
    class Steps:
        def __init__(self, model):
            self.model = model

        def __getattr__(self, name):
            assert name != "all_logits"
            return getattr(self.model, name)

    def make_decoder(*args, **options):
        decoder = original(*args, **options)
        decoder.model = Steps(decoder.model)
        return decoder
    original = decode.make_decoder
    expected = rows(heads=2, count=1)
    monkeypatch.setattr(decode, "make_decoder", make_decoder)
    assert numbers(rows(heads=2, count=1)) == numbers(expected) and expected[1]["car"] > 0


def test_rows_with_a_clock_that_counts_forwards(toy, rows):
    table = rows(count=1)
    model = common.load_checkpoint(toy / "ckpt.pt")[0]
    weights = 8 * sum(p.numel() for p in [*model.blocks.parameters(), model.weight])     # float64
    for plain, *some, auto in (table[:4], table[4:]):
        assert auto["heads"] == "auto" and plain["ms_round"] is not None
        assert [auto[name] for name in bench.OF_A_ROUND] == [None] * len(bench.OF_A_ROUND)
        assert auto["speedup"] == pytest.approx(auto["tokens_per_s"] / plain["tokens_per_s"])
        # as many tokens per forward as the heads allow that ran
        assert sum(auto["drafted"]) * auto["tokens_per_forward"] == pytest.approx(19)
        assert some[0]["ar"] == some[0]["car"]
        assert some[1]["car"] == pytest.approx(some[0]["ar"] * some[1]["ar"])
        assert 0 < some[1]["car"] < some[0]["car"] < 1
        for row in (plain, *some):
            k = row["heads"]
            times = [row[name] for name in ("ms_round", "ms_draft", "ms_verify")]
            assert times == [500 * (1 + k), 500 * k, 500]
            expected = 1 + sum(r["car"] for r in some[:k])
            assert row["tokens_per_s"] == pytest.approx(2 * row["tokens_per_forward"] / (1 + k))
            assert row["speedup"] == pytest.approx(row["tokens_per_s"] / plain["tokens_per_s"])
            assert row["predicted_tokens_per_forward"] == pytest.approx(expected)
            assert row["predicted_speedup"] == pytest.approx(expected / (1 + k))
            assert row["model_speedup"] == pytest.approx(row["tokens_per_forward"] / (1 + k))
            assert row["over_one"] == pytest.approx(row["tokens_per_s"] / some[0]["tokens_per_s"])
            # every head reads the prompt, too
            whole = 0.5 * (1 + k) * (19 / row["tokens_per_forward"] + 1)
            assert row["speedup_with_prompt"] == pytest.approx(0.5 * 20 / whole)
            assert row["gb_per_s"] == pytest.approx(2 * weights / (1 + k) / 1e9)
    assert table[1]["tokens_per_forward"] > 1.2
    assert [row["temperature"] for row in table] == [0] * 4 + [1] * 4


def test_a_second_checkpoint_is_compared_with_one_head_of_the_first(toy, rows):
    model, meta = common.load_checkpoint(toy / "ckpt.pt")
    torch.manual_seed(0)
    for weight in model.heads.parameters():             # its drafts are never right
        weight.data.normal_(std=0.1)
    common.save_checkpoint(toy / "worse.pt", model, **meta)
    table = rows(toy / "worse.pt", count=1, heads=1)
    first, second = table[:4], table[4:]
    for row in second:
        one = first[1 if row["temperature"] == 0 else 3]
        assert row["over_one"] == pytest.approx(row["tokens_per_s"] / one["tokens_per_s"])
    assert second[1]["tokens_per_s"] < 0.9 * first[1]["tokens_per_s"]


def test_prompts_that_end_in_a_loop_are_left_out(toy, rows, monkeypatch):
    for name, lines in (("both", ["the cat", "and that"]), ("second", ["and that"])):
        (toy / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.delitem(FLAGS, "prompt_tokens")         # of no use with --prompts
    monkeypatch.setattr(bench, "loops", lambda ids: False)
    second, both = [rows(prompts=toy / f"{name}.txt", heads=2)[:2] for name in ("second", "both")]
    looping = iter([True, False, True, False])
    monkeypatch.setattr(bench, "loops", lambda ids: next(looping))
    left = rows(prompts=toy / "both.txt", heads=2)[:2]
    assert [(row["looping"], row["prompts"]) for row in left] == [(1, 2)] * 2
    for name in ("tokens_per_forward", "car", "speedup"):
        got, want, other = [[row[name] for row in table] for table in (left, second, both)]
        assert got == want != other


def test_where_all_prompts_end_in_a_loop_none_is_left_out(toy, monkeypatch, capsys):
    base = None
    flags = as_flags({**FLAGS, "heads": 2})
    for found, shown in ((False, "0 of 2 were excluded"), (True, "all have repetitive output")):
        monkeypatch.setattr(bench, "loops", lambda ids: found)
        out = call(monkeypatch, capsys, "decode", toy / "ckpt.pt", "--json", *flags)
        table = json.loads(out.splitlines()[-1])
        assert out.count(shown) == 2 and ("excluded" in out) != found
        assert [(row["looping"], row["prompts"]) for row in table] == [(2 * found, 2)] * 4
        got = [[row[name] for name in ("tokens_per_forward", "ar", "car")] for row in table]
        base = base or got
        assert got == base


def test_a_second_checkpoint_with_a_shorter_context(toy, rows, monkeypatch, capsys):
    model, meta = common.load_checkpoint(toy / "ckpt.pt")
    short = GPT(dataclasses.replace(model.config, block_size=24)).double()
    short.load_state_dict(model.state_dict())
    common.save_checkpoint(toy / "short.pt", short, **meta)
    table = rows(toy / "short.pt", tokens=18, heads=2)
    expected = rows(tokens=16, heads=2)                 # 24 without the prompts' 8, for both
    assert numbers(table) == numbers(expected) + numbers(expected)
    out = call(monkeypatch, capsys, "decode", *[toy / f"{name}.pt" for name in ("ckpt", "short")],
               *as_flags({**FLAGS, "tokens": 30, "prompt_tokens": 20, "heads": 1, "count": 1}))
    assert "the shortest context, 24 tokens, leaves room for 12 new ones" in out


def test_each_kind_has_its_own_one_head(toy, monkeypatch, capsys):
    rows = [dict(kind="a", text="the cat"), dict(kind="b", text="and that")]
    (toy / "kinds.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.delitem(FLAGS, "prompt_tokens")
    flags = as_flags({**FLAGS, "count": 2, "heads": "1,2", "prompts": toy / "kinds.jsonl"})
    out = call(monkeypatch, capsys, "decode", toy / "ckpt.pt", "--json", *flags)
    rows = json.loads(out.splitlines()[-1])
    one = {(row["kind"], row["temperature"]): row["tokens_per_s"] for row in rows
           if row["heads"] == 1}
    assert {kind for kind, _ in one} == {"", "a", "b"}
    for row in rows:
        own = one[row["kind"], row["temperature"]]
        assert row["over_one"] == pytest.approx(row["tokens_per_s"] / own)


@pytest.mark.parametrize("changes,message", [
    ({"heads": 3}, "--heads is 3, but .*two.pt has 2 heads: give numbers from 0"),
    ({"heads": -1}, "--heads is -1, but .*two.pt has 2 heads: give numbers from 0"),
    ({"batch": 3}, "--batch 3 needs at least"), ({"costs": "gone", "heads": 2}, "gone has no"),
    ({"draft_vocab": 258}, "draft_vocab is 258"), ({"tokens": 2}, "of .*two.pt's 2 heads"),
])
def test_what_a_later_checkpoint_can_not_do_is_told_first(toy, monkeypatch, changes, message):
    model, meta = common.load_checkpoint(toy / "plain.pt")
    two = GPT(dataclasses.replace(model.config, n_mtp=2)).double()
    common.save_checkpoint(toy / "two.pt", two, **meta)
    monkeypatch.setattr(bench, "bench_decoding", None)  # nothing is measured before
    argv = ["decode", toy / "plain.pt", toy / "two.pt", *as_flags({**FLAGS, **changes})]
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, argv)])
    with pytest.raises(common.UserError, match=message):
        bench.main()


def test_a_checkpoint_without_heads_and_the_printed_table(toy, monkeypatch, capsys):
    checkpoints = [toy / "ckpt.pt", toy / "plain.pt"]
    out = call(monkeypatch, capsys, "decode", *checkpoints, "--json", *as_flags(FLAGS))
    out, _, result = out.strip().rpartition("\n")
    assert [(r["heads"], r["temperature"]) for r in json.loads(result)] == [
        (k, t) for t in (0, 1) for k in (0, 1, 2, "auto")] + [(0, 0), (0, 1)]
    assert "plain.pt has no MTP heads" in out and out.count("plain PyTorch") == 4
    assert out.count("vs plain") == out.count("vs 1 head") == 4 and "repetitive output" in out


def test_loops_are_told_from_text():
    for text in ([1, 2, 3] + [5, 6, 7, 8] * 3, [9] * 12, [0, 1] * 6):
        assert bench.loops(text)
    for text in (list(range(40)), [7] * 5, []):
        assert not bench.loops(text)


# -----------------------------------------------------------------------------
# Ctrl-C, and the last line


def interrupted_call(monkeypatch, capsys, *argv):
    """-> what `bench.py .. --json` prints until the Ctrl-C that a test makes, and that JSON"""
    with pytest.raises(SystemExit, match="bench.py: interrupted"):  # not 0: the row is not whole
        call(monkeypatch, capsys, *argv, "--json")
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


@pytest.fixture
def decoded(monkeypatch):
    """Ctrl-C comes in the call of run_decoder whose number is decoded["stop"], from 1 on"""
    count = {"calls": 0, "stop": 0}
    run_decoder = decode.run_decoder

    def counted(*arguments):
        count["calls"] += 1
        if count["calls"] == count["stop"]:
            raise KeyboardInterrupt
        return run_decoder(*arguments)
    monkeypatch.setattr(decode, "run_decoder", counted)
    return count


@pytest.mark.parametrize("stop,tables,prompts", [
    (3 + 3 + 3, 2, 1),            # 3 to warm up, then 3 for each prompt: in the second prompt's
    (3 + 9 + 2, 2, 3),            # while the second temperature's decoders warm up
    (3 + 9 + 3 + 8, 4, 2),        # in the third prompt at the second temperature
])
def test_what_was_measured_before_ctrl_c_is_printed(
    toy, decoded, monkeypatch, capsys, stop, tables, prompts
):
    decoded["stop"] = stop
    flags = as_flags({**FLAGS, "count": 3, "heads": 2})
    argv = ["decode", toy / "ckpt.pt", toy / "plain.pt", *flags]
    out, table = interrupted_call(monkeypatch, capsys, *argv)
    assert out.count("tok/fwd") == tables and len(table) == 1.5 * tables
    last = [row for row in table if row["temperature"] == table[-1]["temperature"]]
    assert [row["heads"] for row in last] == [0, 2, 0]
    assert [row["prompts"] for row in last] == [prompts] * 3
    assert last[1]["tokens_per_forward"] > 1 and last[1]["car"] > 0


def test_checkpoints_decode_each_prompt_in_turns(toy, rows, monkeypatch):
    """of two that were timed one after the other, one may have had a slower computer"""
    order, run_decoder = [], decode.run_decoder

    def spy(decoder, *args):
        order.append(decoder.model.config.n_mtp)
        return run_decoder(decoder, *args)
    monkeypatch.setattr(decode, "run_decoder", spy)
    table = rows(toy / "plain.pt", count=3, heads=2, temperature="0")
    K = order[0]
    assert order == [K, K, 0] * 4 and K > 0               # one to warm up, then three prompts
    names = [Path(row["checkpoint"]).name for row in table]
    assert names == ["ckpt.pt", "ckpt.pt", "plain.pt"]


def test_ctrl_c_before_the_first_prompt(toy, decoded, monkeypatch, capsys):
    decoded["stop"] = 6
    out, table = interrupted_call(monkeypatch, capsys, "decode", toy / "ckpt.pt", *as_flags(FLAGS))
    assert table == [] and "tok/fwd" not in out


def test_ctrl_c_while_texts_are_compared(toy, decoded, monkeypatch, capsys):
    decoded["stop"] = 6
    flags = as_flags({**FLAGS, "count": 9})
    out, result = interrupted_call(monkeypatch, capsys, "check", toy / "ckpt.pt", *flags)
    assert result == dict(same=2, prompts=2, differences=[]) and "2 of 2 greedy" in out


def test_a_bar_shows_that_many_prompts_are_decoded(toy, monkeypatch, capsys):
    for command in ("decode", "check"):
        argv = [command, toy / "ckpt.pt", *as_flags({**FLAGS, "heads": 1, "tokens": 12})]
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, argv)])
        bench.main()
        shown = capsys.readouterr().err
        assert f"{command}: 100%" in shown and "2/2" in shown
        assert ("1 heads=" in shown and "tokens/s" in shown) == (command == "decode")


def test_the_last_line_is_json(toy, monkeypatch, capsys):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")
    result = [dict(a=math.nan, b=[math.inf, 1.5, {"c": -math.inf}], d="NaN", e=3, f=None, g=True)]
    monkeypatch.setattr(bench, "bench_checkpoints", lambda checkpoints, cfg: result)
    out = call(monkeypatch, capsys, "decode", toy / "ckpt.pt", "--json", "--device=cpu")
    assert json.loads(out.splitlines()[-1], parse_constant=refuse) == [
        dict(a=None, b=[None, 1.5, {"c": None}], d="NaN", e=3, f=None, g=True)]


# -----------------------------------------------------------------------------
# the flags


@pytest.mark.parametrize("changes", [
    {"accept": "match"}, {"draft_vocab": 100}, {"seed": 2}, {"tokens": 12}, {"count": 1},
    {"prompt_tokens": 3}, {"batch": 2}, {"data": "other"}, {"heads": 1}, {"top_k": 1},
], ids=str)
def test_each_flag_changes_the_rows(toy, rows, monkeypatch, changes, cached=[]):
    cached += [] if cached else [rows(heads=2)]
    base = cached[0]
    if "data" in changes:
        changes = {"data": toy / "other"}
    asked = set()
    count_accepted = bench.count_accepted

    def spy(model, prompt, ids, *options):
        asked.add(options)
        return count_accepted(model, prompt, ids, *options)
    monkeypatch.setattr(bench, "count_accepted", spy)
    got = rows(**{"heads": 2, **changes})
    assert numbers(got) != numbers(base)
    plain, *sampled = zip(got[2:], base[2:])
    if set(changes) & {"accept", "draft_vocab", "seed"}:     # in the rounds
        assert any(r["tokens_per_forward"] != b["tokens_per_forward"] for r, b in sampled)
    rule = changes.get("accept", "residual")                 # and in the teacher-forced rates
    more = changes.get("top_k"), rule, changes.get("draft_vocab")
    assert asked == {(0.0, *more), (1.0, *more)}
    assert plain[0]["heads"] == plain[1]["heads"] == 0
    assert [r["prompts"] for r in got] == [changes.get("count", 2)] * len(got)
    assert [r["batch"] for r in got] == [changes.get("batch", 1)] * len(got)
    assert [r["heads"] for r in got] == [0, changes.get("heads", 2)] * 2
    if "top_k" in changes:                              # the most likely token alone: greedy
        assert numbers(got)[2:] == numbers(got)[:2] == numbers(base)[:2]
    else:
        assert numbers(got)[2:] != numbers(got)[:2]


def test_prompts_come_from_the_data_and_have_the_length_that_was_asked_for(toy, monkeypatch):
    (checkpoint,) = bench.load([toy / "ckpt.pt"], bench.CheckConfig())
    for data in ("", "other"):
        cfg = bench.CheckConfig(count=3, prompt_tokens=7, tokens=20, data=data and str(toy / data))
        prompts, kinds = bench.pick_prompts(checkpoint, cfg, 48)
        assert kinds == [""] * 3
        text = (toy / f"{data or 'text'}.txt").read_text(encoding="utf-8")
        assert len(prompts) == 3
        for ids in prompts:
            assert len(ids) == 7 and checkpoint.tokenizer.decode(ids) in 3 * text
    (toy / "many.txt").write_text("a\n\nb\nc\n", encoding="utf-8")
    for count in (2, 9):
        # one by one they would start threads each: 14 s for 20,000
        monkeypatch.delattr(decode.Tokenizer, "encode", raising=False)
        cfg = bench.CheckConfig(count=count, prompts=str(toy / "many.txt"))
        assert bench.pick_prompts(checkpoint, cfg, 48)[0] == [[97], [98], [99]][:count]
    (toy / "q.jsonl").write_text(
        '{"question": "ab", "kind": "talk"}\n{"text": "c"}\n', encoding="utf-8")
    cfg = bench.CheckConfig(prompts=str(toy / "q.jsonl"))
    assert bench.pick_prompts(checkpoint, cfg, 48) == ([[97, 98], [99]], ["talk", ""])


class InBrackets:
    """stands in for a tokenizer with a chat template"""

    def encode_batch(self, texts):
        return [list(map(ord, text)) for text in texts]

    def encode_chat(self, text):
        return self.encode_batch([f"<{text}>"])[0]


def test_a_message_is_shortened_within_its_template():
    rows = [("a message", dict(chat=True)), ("a message", {})]
    shown = ["".join(map(chr, ids)) for ids in bench.encode(InBrackets(), rows, 6)]
    assert shown == ["<a me>", "a mess"]


class InBytes(InBrackets):
    def encode_batch(self, texts):
        return [list(text.encode("utf-8")) for text in texts]


@pytest.mark.parametrize("room, kept", [(302, 100), (301, 99), (100, 32), (5, 1), (4, 0), (1, 0)])
def test_a_message_whose_characters_are_several_tokens(room, kept):
    ids, = bench.encode(InBytes(), [("日" * 100, dict(chat=True))], room)
    assert bytes(ids) == ("<" + "日" * kept + ">").encode("utf-8")[:room]


def test_a_table_for_each_kind_of_prompts(toy, monkeypatch, capsys):
    """all prompts first; then each kind is what it would be alone"""
    texts = dict(animals=["the cat", "a dog"], other=["and that"])
    both = [dict(kind=kind, text=text) for kind in texts for text in texts[kind]]
    monkeypatch.setattr(bench, "loops", lambda ids: False)
    monkeypatch.delitem(FLAGS, "prompt_tokens")         # of no use with --prompts

    def table(name, rows):
        (toy / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        flags = as_flags({**FLAGS, "count": 3, "heads": 2, "prompts": toy / name})
        out = call(monkeypatch, capsys, "decode", toy / "ckpt.pt", "--json", *flags)
        return out, [row for row in json.loads(out.splitlines()[-1]) if row["temperature"] == 0]

    out, rows = table("both.jsonl", both)
    assert [(row["kind"], row["heads"], row["prompts"]) for row in rows] == [
        ("", 0, 3), ("", 2, 3), ("animals", 0, 2), ("animals", 2, 2), ("other", 0, 1),
        ("other", 2, 1)]
    assert out.count("animals") == out.count("other") == 2 + 4   # printed, and in the JSON
    assert "whose speed" not in out
    monkeypatch.setattr(bench, "loops", lambda ids: True)
    assert table("both.jsonl", both)[0].count("all have repetitive output, whose speed") == 4
    monkeypatch.setattr(bench, "loops", lambda ids: False)
    for kind in texts:
        _, alone = table("one.jsonl", [dict(text=text) for text in texts[kind]])
        for got, want in zip([row for row in rows if row["kind"] == kind], alone, strict=True):
            for name in ("tokens_per_forward", "ar", "ars", "car", "drafted"):
                assert got[name] == want[name]
    out, rows = table("one.jsonl", both[:2])                     # all of one kind: said once
    assert [row["kind"] for row in rows] == ["", ""] and "animals" not in out


@pytest.mark.parametrize("argv,message", [
    (["check", "gone.pt"], "no checkpoint at"),
    (["check", "ckpt.pt", "--count", 0], "--count is 0"),
    (["check", "ckpt.pt", "--tokens", 1], "--tokens is 1"),  # the prefill's, in both cases
    (["costs", "gone.pt", "--out", "ckpt.pt"], "ckpt.pt exists, and is not what --out writes"),
    (["check", "ckpt.pt", "--heads", 3], "has 2 MTP heads"),
    (["check", "plain.pt"], "nothing to compare"),
    (["check", "ckpt.pt", "--prompts", "gone.txt"], "gone.txt"),
    (["check", "ckpt.pt", "--prompts", "bad.jsonl"], "bad.jsonl, line 2"),
    (["decode", "ckpt.pt", "--prompts", "x", "--prompt_tokens", 3], "--prompt_tokens has no"),
    (["decode", "ckpt.pt", "bpe.pt"], "different tokenizers"),
    (["decode", "ckpt.pt", "--tokens", 0], "--tokens is 0"),
    (["decode", "ckpt.pt", "--top_k", 999], "top_k is 999"),
    (["decode", "ckpt.pt", "--accept", "x"], "--accept is 'x'"),
    (["decode", "ckpt.pt", "--batch", 0], "--batch is 0"),
    (["decode", "ckpt.pt", "--batch", 9, "--tokens", 4], "--batch 9"),
    (["decode", "ckpt.pt", "--tokens", 2, "--prompt_tokens", 8], "no continuation is longer"),
    (["decode", "ckpt.pt", "--heads", "auto", "--costs", "gone.json"], "can't read gone.json"),
    (["decode", "ckpt.pt", "--heads", "1,x"], "--heads is '1,x'"),
    (["decode", "ckpt.pt", "--temperature", "0,-1"], "temperature is -1"),
    (["costs", "plain.pt"], "has no MTP heads"),
    (["costs", "ckpt.pt", "--batch", "0"], "--batch is '0'"),
    (["costs", "ckpt.pt", "--batch", "x"], "--batch is 'x'"),
    (["costs", "ckpt.pt", "--draft_vocab", 999], "draft_vocab is 999"),
    (["train", "--heads", "two"], "--heads is 'two'"),
    (["train", "--kl", "forward,x"], "--kl is 'x'"),
    (["train", "--heads", -1], "--n_mtp is -1"),
    (["train", "--n_embd", 97], "n_embd is 97"),
    (["--check"], "the first argument"),
    ([], "the first argument"),
])
def test_bad_requests(toy, monkeypatch, capsys, argv, message):
    (toy / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n', encoding="utf-8")
    argv = [toy / a if str(a).endswith((".pt", ".jsonl")) else a for a in argv]
    monkeypatch.setattr(bench, "bench_training", None)  # it would train a GPT-2
    with pytest.raises(common.UserError, match=message):
        call(monkeypatch, capsys, *argv)


def test_numbers_of_heads_and_temperatures_are_lists(rows):
    """numbers that a model does not have are left out, and those of 0 heads come first anyway"""
    table = rows(heads="2,0,1,9", temperature="0.5")
    assert [(row["heads"], row["temperature"]) for row in table] == [(0, 0.5), (2, 0.5), (1, 0.5)]


# -----------------------------------------------------------------------------
# bench.py decode with heads auto, bench.py costs


def test_auto_alone_and_the_costs_that_it_was_given(toy, monkeypatch, capsys):
    costs = toy / "costs.json"
    drafted = []
    for times in ([1, 9, 9], [1, 1, 9], [1, 9, 1]):
        costs.write_text(json.dumps({"1": times}), encoding="utf-8")
        flags = as_flags({**FLAGS, "heads": "auto", "costs": costs})
        out = call(monkeypatch, capsys, "decode", toy / "ckpt.pt", *flags, "--json")
        table = json.loads(out.splitlines()[-1])
        assert [row["heads"] for row in table] == [0, "auto"] * 2
        assert out.count("auto: forwards for which 0 .. K heads drafted: [") == 2
        drafted.append([row["drafted"].index(max(row["drafted"])) for row in table[1::2]])
    assert drafted == [[0, 0], [1, 1], [2, 2]]


def test_costs_are_the_times_of_rounds_in_ordinary_steps(toy, clock, monkeypatch, capsys):
    """by the clock that counts forwards, a head takes as long as the main model"""
    out = toy / "measured.json"
    more = ["--batch=1,3", f"--out={out}", "--json", "--device=cpu", "--dtype=float64"]
    printed = call(monkeypatch, capsys, "costs", toy / "ckpt.pt", *more)
    want = {"1": [1.0, 2.0, 3.0], "3": [1.0, 2.0, 3.0]}
    assert json.loads(printed.splitlines()[-1]) == want
    assert json.loads(out.read_text(encoding="utf-8")) == want
    assert "takes 500.000 ms, rounds with 0 .. 2 heads 1.00 2.00 3.00 times that" in printed
    assert read_costs(out) == want
    with pytest.raises(common.UserError, match="could not write .*give another file with --out"):
        call(monkeypatch, capsys, "costs", toy / "ckpt.pt", "--batch=1", f"--out={toy}")


# -----------------------------------------------------------------------------
# bench.py check


def test_check_finds_no_difference_in_float64(toy, monkeypatch, capsys):
    flags = as_flags({**FLAGS, "count": 3})
    out = call(monkeypatch, capsys, "check", toy / "ckpt.pt", "--json", *flags)
    auto = call(monkeypatch, capsys, "check", toy / "ckpt.pt", "--heads=auto", *flags)
    assert "3 of 3 greedy continuations are identical" in auto and "auto heads on cpu" in auto
    assert "3 of 3 greedy continuations are identical" in out
    assert "2 heads on cpu: plain PyTorch" in out
    assert json.loads(out.splitlines()[-1]) == dict(same=3, prompts=3, differences=[])


def test_check_compares_what_was_asked_for_and_shows_a_difference(toy, monkeypatch, capsys):
    asked = []
    run_decoder = decode.run_decoder

    def wrong(decoder, prompts, n):
        asked.append((decoder.heads, decoder.draft_vocab, decoder.temperature, n))
        (ids,), stats = run_decoder(decoder, prompts, n)
        if decoder.heads:
            ids[5] ^= 1
        return [ids], stats
    monkeypatch.setattr(decode, "run_decoder", wrong)
    more = as_flags({**FLAGS, "heads": 1, "draft_vocab": 9, "count": 2})
    out = call(monkeypatch, capsys, "check", toy / "ckpt.pt", *more)
    assert asked == [(0, 9, 0, 20), (1, 9, 0, 20)] * 2
    assert "0 of 2" in out and out.count("differs at token 5") == 2


# -----------------------------------------------------------------------------
# bench.py train


TOY_CONFIG = train.TrainConfig(
    n_layer=1, n_head=2, n_embd=8, block_size=8, batch_size=4, micro_batch=2, compile="off"
)


def test_a_training_step_is_timed_with_what_its_row_says(monkeypatch, capsys):
    seen = []
    loss = distill.mtp_loss

    def spy(hidden, weight, targets, **options):
        beta = options["ramp"] * options["beta"][0]
        seen.append((len(hidden) - 1, beta, options["top_n"], options["kl"], len(targets)))
        return loss(hidden, weight, targets, **options)
    monkeypatch.setattr(distill, "mtp_loss", spy)
    cases = [bench.Case(1), bench.Case(2, 0.5, 3), bench.Case(2, 0.5, 3, "tv")]
    table = bench.bench_training(TOY_CONFIG, CPU, torch.float32, 1, cases, vocab=11)
    assert list(dict.fromkeys(seen)) == [
        (1, 0, 1, "forward", 2), (2, 0.5, 3, "forward", 2), (2, 0.5, 3, "tv", 2)]
    for row, case in zip(table, cases, strict=True):
        assert (row["n_mtp"], row["beta"], row["top_n"], row["kl"]) == case[:4]
        assert row["ms"] > 0 and row["tokens_per_s"] * row["ms"] == pytest.approx(16_000)
        assert row["loss"].startswith("plain (distill.py; ")
    assert capsys.readouterr().out.count("ms per step") == 3
    assert TOY_CONFIG.beta == "0.5" and TOY_CONFIG.kl_start == 0.75     # unchanged


def test_a_registered_divergence_is_timed_beside_the_others(monkeypatch, capsys):
    """with the numbers of heads, the divergences, N and --fast that were asked for"""
    calls = []

    def js(log_p, log_q):
        calls.append(log_p.shape[-1])
        middle = torch.logaddexp(log_p, log_q) - math.log(2)
        return (distill.forward_kl(middle, log_q) + distill.forward_kl(middle, log_p)) / 2
    monkeypatch.setitem(distill.DIVERGENCES, "js", js)
    flags = dict(
        n_layer=1, n_head=2, n_embd=8, block_size=8, batch_size=2, micro_batch=2, vocab_size=11,
        repeats=1, heads="2,0", kl="forward,js", top_n="3,5", fast="auto,off", device="cpu",
    )
    out = call(monkeypatch, capsys, "train", "--json", *as_flags(flags))
    table = json.loads(out.splitlines()[-1])
    kinds = [(0.0, 1, "forward")] + [(0.5, n, kl) for kl in ("forward", "js") for n in (3, 5)]
    assert [(r["n_mtp"], r["beta"], r["top_n"], r["kl"]) for r in table] == [
        (0, 0.0, 1, "forward")] * 2 + [(2, *kind) for kind in kinds] * 2
    off = ["fast is off" in row["loss"] for row in table]
    assert off == [False, True] + [False] * 5 + [True] * 5
    assert set(calls) == {3, 5}


def test_ctrl_c_between_two_numbers_of_heads(monkeypatch, capsys):
    time_steps = bench.time_steps

    def stop(models, *arguments):
        if models[0][0].config.n_mtp == 2:
            raise KeyboardInterrupt
        return time_steps(models, *arguments)
    monkeypatch.setattr(bench, "time_steps", stop)
    flags = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, batch_size=2, micro_batch=2,
                 vocab_size=11, repeats=1, heads="0,1,2", top_n="3", device="cpu")
    _, table = interrupted_call(monkeypatch, capsys, "train", *as_flags(flags))
    assert [row["n_mtp"] for row in table] == [0, 1, 1]
