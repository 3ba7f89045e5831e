"""results/acceptance.py: its walk against the decoder's own rounds, its rows against slow ones."""

import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch
from test_bench import as_flags, call, interrupted_call

import common
import decode
from data import prepare as P
from model import GPT, GPTConfig
from results import acceptance, bench

LETTERS = "abcde"
FLAGS = {"tokens": 12, "count": 4, "device": "cpu", "dtype": "float64"}


def random_model(seed, V, K, T=48):
    """its heads are often right: they read the last token as the trunk does, and a bit of the
    hidden state"""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(V, T, 1, 1, 8, K)).double().eval()
    for weight in model.parameters():
        weight.data.copy_(torch.randn(weight.shape) * 0.5 + (weight.dim() == 1))
    for head in model.heads:
        head.block.load_state_dict(model.blocks[0].state_dict())
        head.norm_out.load_state_dict(model.norm.state_dict())
        head.norm_embed.weight.data.fill_(0.5)
        head.mix.weight.data[:, :8] *= 0.2
        head.mix.weight.data[:, 8:] = torch.eye(8)
    return model


def config(**changes):
    return bench.AcceptConfig(**{**FLAGS, **changes})


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """a checkpoint with three heads whose greedy text has five letters, one with one head, one
    without, and a text"""
    folder = tmp_path_factory.mktemp("acceptance")
    text = "".join(np.random.default_rng(0).choice(list(LETTERS), 2000))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    P.prepare(folder / "text.txt", "bytes", folder / "text", quiet=True)
    for name, K in (("ckpt", 3), ("one", 1), ("plain", 0)):
        model = random_model(5, 257, K)
        others = [i for i in range(257) if chr(i) not in LETTERS]
        model.weight.data *= 2
        model.weight.data[others] = 0
        train_config = dict(data=str(folder / "text"), block_size=8)
        common.save_checkpoint(folder / f"{name}.pt", model, tokenizer={"kind": "bytes"},
                               train_config=train_config)
    return folder


@pytest.fixture
def accept(toy, monkeypatch, capsys):
    """-> the result of one checkpoint"""
    def accept(prompts="", **changes):
        if prompts:
            changes["prompts"] = toy / "prompts.txt"
            changes["prompts"].write_text("\n".join(prompts), encoding="utf-8")
        flags = as_flags({**FLAGS, **changes})
        out = call(monkeypatch, capsys, "accept", toy / "ckpt.pt", "--json", *flags)
        (result,) = json.loads(out.splitlines()[-1])
        return result
    return accept


def of(rows, kind):
    return [row for row in rows if row["text"] == kind]


# -----------------------------------------------------------------------------
# the walk


@pytest.mark.parametrize("seed,V,K", [(0, 3, 1), (2, 5, 3), (3, 9, 6), (4, 6, 4)])
def test_a_greedy_walk_takes_the_decoders_own_forwards(seed, V, K):
    """prompt by prompt, for each number of heads"""
    model = random_model(seed, V, K)
    rows = np.random.default_rng(seed)
    prompts = [rows.integers(V, size=n).tolist() for n in (2, 9, 1)]
    counts = sorted({1, K // 2 + 1, K})
    cfg = config(tokens=14, batch=2)                      # the last group is filled up
    texts, _ = acceptance.write(model, prompts, cfg, 0, 0.0)
    sample = acceptance.examine(model, prompts, texts, 0, counts)
    for k in counts:
        want = []
        for prompt, text in zip(prompts, texts):
            (ids,), stats = decode.generate(model, [prompt], 14, heads=k)
            assert ids == text
            want.append(stats.forwards)
        assert sample.forwards[k].tolist() == want
        written, forwards = acceptance.write(model, prompts, cfg, k, 0.0)
        assert written == texts and forwards.tolist() == want
    assert sample.tokens.tolist() == [13] * 3
    assert sum(want) < 0.9 * 13 * 3                       # drafts were accepted
    # and over all positions it is what is accepted there
    assert sample.rates() == bench.text_acceptance(model, list(zip(prompts, texts)))


def test_the_last_group_of_texts_is_filled_up():
    prompts = [[1], [2], [0], [1, 2], [2, 1]]
    texts, _ = acceptance.write(random_model(0, 3, 1), prompts, config(tokens=5, batch=3), 1, 0.0)
    assert len(texts) == 5


def slow_rounds(model, text, end, K):
    """the expected number of rounds from `text` on until it has `end` tokens: of all drafts, all
    ways to accept them and all tokens after them"""
    if len(text) >= end:
        return 0

    def distributions(k, drafts):
        return model.all_logits(torch.tensor([text + list(drafts)]))[k][0].softmax(-1)

    total = 1.0
    V = model.config.vocab_size
    for drafts in itertools.product(range(V), repeat=K):
        targets = distributions(0, drafts)[len(text) - 1 :]
        proposed = [distributions(k + 1, drafts[:k])[-1] for k in range(K)]
        prob = 1.0                                        # of these drafts
        for q, x in zip(proposed, drafts):
            prob *= float(q[x])
        for a in range(K + 1):                            # of a accepted drafts
            rest = targets[a]
            rejected = 1.0
            if a < K:
                ratio = float(targets[a][drafts[a]] / proposed[a][drafts[a]])
                rejected = 1 - min(1.0, ratio)
                rest = (targets[a] - proposed[a]).clamp_min(0)
            for x in range(V):
                after = text + [*drafts[:a], x]
                share = prob * rejected * float(rest[x] / rest.sum())
                if share and len(after) < end:
                    total += share * cached(model, after, end, K)
            prob *= 1 - rejected if a < K else 1
    return total


def cached(model, text, end, K, known={}):
    key = (id(model), *text, end, K)
    if key not in known:
        known[key] = slow_rounds(model, text, end, K)
    return known[key]


@torch.no_grad()
def test_at_temperature_1_the_expected_rounds_are_those_of_all_ways_to_draft_and_accept():
    model = random_model(5, 2, 2)
    prompt = [0, 1]
    m = 5
    for first in (0, 1):
        want = cached(model, [*prompt, first], len(prompt) + m, 2)
        got = certain = 0.0
        for rest in itertools.product((0, 1), repeat=m - 1):
            ids = [first, *rest]
            probs = model.all_logits(torch.tensor([prompt + ids[:-1]]))[0][0].softmax(-1)
            prob = 1.0                                    # of this text, by the main head alone
            for p, x in zip(probs[len(prompt) :], rest):
                prob *= float(p[x])
            accepted = acceptance.reach_probs(model, prompt, ids, 1)
            assert accepted.shape == (m - 1, 2) and accepted[-1, 1] == 0     # it ends before
            got += prob * acceptance.expected_rounds(accepted)
            certain += prob
        assert certain == pytest.approx(1) and got == pytest.approx(want) and 2 < want < m - 1.1


@pytest.mark.parametrize("accepted,rounds", [
    ([[0], [0], [0]], 3), ([[1], [0], [1]], 2), ([[0], [1], [0]], 2), ([[1, 1], [0, 0], [0, 0]], 1),
    ([[0.5], [0], [0]], 2.5), ([[0.5], [0.5], [1.0]], 2.25), ([[0.9, 0.5], [0, 0], [0, 0]], 1.6),
])
def test_walks_by_hand(accepted, rounds):
    assert acceptance.expected_rounds(np.array(accepted, dtype=float)) == pytest.approx(rounds)


# -----------------------------------------------------------------------------
# totals and intervals


def sample_of(forwards, tokens=10):
    n = len(forwards)
    return acceptance.Sample(np.zeros(n, dtype=bool), np.full(n, tokens), np.full(n, tokens),
                             np.full((n, 1), tokens / 2), {1: np.array(forwards)})


def test_tokens_per_forward_are_totals():
    (row,) = acceptance.acceptance_rows("greedy", sample_of([10, 2, 2]))
    assert row["tokens_per_forward"] == 30 / 14 and (row["tokens"], row["forwards"]) == (30, 14)
    assert row["naive"] == 1.5 and row["ar"] == row["car"] == 0.5
    (row,) = acceptance.prediction_rows(0, sample_of([10, 2, 2]), sample_of([3, 3, 9]))
    assert (row["predicted"], row["measured"], row["naive"]) == (30 / 14, 2, 1.5)
    assert row["percent"] == pytest.approx(100 / 14) and row["naive_percent"] == -25
    # halves that have the same numbers by chance are still two
    (row,) = acceptance.prediction_rows(0, sample_of([10, 2, 2]), sample_of([10, 2, 2]))
    low, high = row["percent_interval"]
    assert row["percent"] == 0 and low < -20 < 20 < high


def test_intervals_hold_their_ratio_and_shrink_with_more_prompts():
    rows = np.random.default_rng(0)
    widths = []
    for n in (8, 32, 128, 512):
        forwards = rows.integers(4, 11, n)
        tokens = rows.integers(20, 25, n)
        ratios = acceptance.resampled(tokens, forwards)
        low, high = acceptance.interval(ratios)
        assert low < acceptance.ratio(tokens, forwards) < high
        inside = ((low <= ratios) & (ratios <= high)).mean()
        assert len(ratios) == 1000 and inside == pytest.approx(0.95, abs=0.003)
        widths.append(high - low)
        assert acceptance.interval(acceptance.resampled(tokens, forwards)) == [low, high]
    for wide, narrow in zip(widths, widths[1:]):
        assert 0.3 < narrow / wide < 0.75                 # about half
    # as the standard error says
    spread = (tokens - acceptance.ratio(tokens, forwards) * forwards).std() / forwards.mean()
    assert widths[-1] == pytest.approx(2 * 1.96 * spread / 512**0.5, rel=0.1)


def test_of_equal_prompts_the_interval_is_a_point():
    (row,) = acceptance.acceptance_rows("greedy", sample_of([4, 4, 4, 4]))
    assert row["interval"] == [2.5, 2.5] and row["car_interval"] == [0.5, 0.5]


# -----------------------------------------------------------------------------
# the command


def test_rows_of_a_prompts_file(toy, accept):
    """against the decoder, prompt by prompt: without given text, with K heads and fewer"""
    prompts = ["abc", "ed", "cadb", "a"]
    result = accept(prompts)
    model, _ = common.load_checkpoint(toy / "ckpt.pt")
    kinds = dict.fromkeys(row["text"] for row in result["acceptance"])
    assert "given" not in kinds and list(kinds)[0] == "greedy" and list(kinds)[-1] == "T = 1"
    rows = of(result["acceptance"], "greedy")
    assert [row["heads"] for row in rows] == [1, 2, 3]
    ids = [[ord(x) for x in prompt] for prompt in prompts]
    texts, _ = decode.generate(model, ids, 12, heads=0)
    ars, cars = bench.text_acceptance(model, list(zip(ids, texts)))
    for row in rows:
        k = row["heads"]
        _, stats = decode.generate(model, ids, 12, heads=k)
        assert (row["tokens"], row["forwards"]) == (4 * 11, stats.forwards)
        assert row["tokens_per_forward"] == stats.tokens_per_forward > 1.1
        assert (row["ars"], row["cars"]) == (ars[:k], cars[:k])
        assert (row["ar"], row["car"], row["naive"]) == (ars[k - 1], cars[k - 1], 1 + sum(cars[:k]))
        assert row["prompts"] == 4 and row["looping"] == sum(map(bench.loops, texts))
        low, high = row["car_interval"]
        assert low < row["car"] < high


def test_rows_at_temperature_1(toy, accept):
    """rates and the prediction are of text that ordinary decoding has sampled; the forwards are
    counted in rounds"""
    prompts = ["abc", "ed", "cadb", "a"]
    result = accept(prompts)
    model, _ = common.load_checkpoint(toy / "ckpt.pt")
    ids = [[ord(x) for x in prompt] for prompt in prompts]

    def sample(heads):
        generator = torch.Generator().manual_seed(1)
        return decode.generate(model, ids, 12, heads=heads, temperature=1.0, generator=generator)

    texts, _ = sample(0)
    probs = [acceptance.reach_probs(model, *text, 1) for text in zip(ids, texts)]
    kept = sum(x[: 12 - 3].sum(0) for x in probs) / (4 * (12 - 3))
    rows = of(result["acceptance"], "T = 1")
    for row, predicted in zip(rows, result["predictions"][3:], strict=True):
        k = row["heads"]
        _, stats = sample(k)
        assert (row["tokens"], row["forwards"]) == (44, stats.forwards)
        assert row["cars"] == pytest.approx(kept[:k].tolist())
        walk = sum(acceptance.expected_rounds(x[:, :k]) for x in probs[::2])
        assert predicted["predicted"] == pytest.approx(22 / walk)


def test_what_is_predicted_is_measured_by_decoding(accept, monkeypatch):
    """where decoding takes twice the forwards, the prediction is too high by 100 %"""
    write = acceptance.write

    def slow(model, prompts, cfg, heads, temperature):
        texts, forwards = write(model, prompts, cfg, heads, temperature)
        return texts, forwards * (2 if heads else 1)
    monkeypatch.setattr(acceptance, "write", slow)
    result = accept(["abc", "abc", "ed", "ed"])
    assert [row["percent"] for row in result["predictions"][:3]] == [100] * 3
    for row in of(result["acceptance"], "greedy"):        # no heads were needed for these
        assert row["tokens_per_forward"] == 2 * result["predictions"][row["heads"] - 1]["measured"]


def test_given_text_is_that_of_the_dataset(toy, accept):
    result = accept(prompt_tokens=5)
    (checkpoint,) = bench.load([toy / "ckpt.pt"], config())
    pieces = bench.validation_pieces(checkpoint, config(), 17)
    assert len({len(piece) for piece in pieces}) == 1 and len(pieces) == 4
    texts = [(piece[:5], piece[5:]) for piece in pieces]
    ars, cars = bench.text_acceptance(checkpoint.model, texts)
    given = of(result["acceptance"], "given")
    assert [row["car"] for row in given] == cars and [row["ar"] for row in given] == ars
    assert [row["heads"] for row in given] == [1, 2, 3] and given[0]["prompts"] == 4
    written, _ = decode.generate(checkpoint.model, [piece[:5] for piece in pieces], 12, heads=0)
    own = [(piece[:5], ids) for piece, ids in zip(pieces, written)]
    greedy = of(result["acceptance"], "greedy")
    assert [row["car"] for row in greedy] == bench.text_acceptance(checkpoint.model, own)[1] != cars


def test_looping_texts_are_left_out_of_their_own_row_alone(accept, monkeypatch):
    prompts = ["abc", "ed", "cadb", "a"]
    monkeypatch.setattr(bench, "loops", lambda ids: False)
    whole, rest = accept(prompts), accept(prompts[:1] + prompts[2:3])
    assert [row["text"] for row in whole["acceptance"]].count("no loops") == 3
    looping = iter([False, True, False, True] * 2)        # greedy, then sampled
    monkeypatch.setattr(bench, "loops", lambda ids: next(looping))
    mixed = accept(prompts)
    for kind in ("greedy", "T = 1"):
        got, want = of(mixed["acceptance"], kind), of(whole["acceptance"], kind)
        assert [row.pop("looping") for row in got + want] == [2] * 3 + [0] * 3
        assert got == want
    # two of the four: as if the file held these alone
    alone = [{**row, "text": "no loops"} for row in of(rest["acceptance"], "greedy")]
    assert of(mixed["acceptance"], "no loops") == alone
    assert alone != [{**row, "text": "no loops"} for row in of(whole["acceptance"], "greedy")]
    assert mixed["predictions"] == whole["predictions"]
    monkeypatch.setattr(bench, "loops", lambda ids: True)
    assert not of(accept(prompts)["acceptance"], "no loops")


def test_one_half_of_the_prompts_predicts_the_other(toy, accept):
    """and of two halves that are equal, greedily, exactly"""
    same = accept(["abc", "abc", "ed", "ed"])["predictions"]
    assert [(row["temperature"], row["heads"]) for row in same] == [
        (t, k) for t in (0, 1) for k in (1, 2, 3)]
    assert [row["percent"] for row in same[:3]] == [0] * 3
    one = accept(["abc", "cadb", "ed", "a"])["predictions"]
    other = accept(["cadb", "abc", "a", "ed"])["predictions"]
    for row, swapped in zip(one[:3], other[:3]):
        assert row["predicted"] == swapped["measured"] and row["measured"] == swapped["predicted"]
    assert any(row["percent"] for row in one[:3])
    greedy = of(accept(["abc", "ed"])["acceptance"], "greedy")
    assert [row["naive"] for row in greedy] == [row["naive"] for row in one[:3]]
    for row in same + one:
        low, high = row["percent_interval"]
        assert low <= row["percent"] <= high
        for name, x in (("percent", row["predicted"]), ("naive_percent", row["naive"])):
            assert row[name] == pytest.approx(100 * (x / row["measured"] - 1), abs=1e-9)


@pytest.mark.parametrize("changes", [
    {"seed": 2}, {"tokens": 20}, {"count": 3}, {"data": "other"}, {"prompt_tokens": 3},
    {"heads": "3,1,3"}, {"batch": 2},
], ids=str)
def test_each_flag_changes_the_rows(toy, accept, changes, cached=[]):
    cached += [] if cached else [accept(prompt_tokens=8)]
    base = cached[0]["acceptance"]
    if "data" in changes:
        (toy / "other.txt").write_text("abba ecce" * 200, encoding="utf-8")
        changes = {"data": P.prepare(toy / "other.txt", "bytes", toy / "other", quiet=True)}
    got = accept(**{"prompt_tokens": 8, **changes})["acceptance"]
    assert got != base
    if "heads" in changes:
        assert got == [row for row in base if row["heads"] in (1, 3)]
    for kind in ("given", "greedy"):
        if {"seed", "batch"} & set(changes):              # these change what is sampled alone
            assert of(got, kind) == of(base, kind)
        elif "heads" not in changes:
            assert of(got, kind) != of(base, kind)
    assert {row["prompts"] for row in got if row["text"] != "no loops"} == {changes.get("count", 4)}


def test_the_printed_tables_and_the_last_line(toy, monkeypatch, capsys):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")
    paths = [toy / "ckpt.pt", toy / "one.pt"]
    flags = as_flags({**FLAGS, "prompt_tokens": 24, "tokens": 99})
    few = call(monkeypatch, capsys, "accept", paths[1], *flags)
    assert few.count("(few texts)") > 8 and not re.search(r"\(.* \.\. ", few)      # 4 are too few
    monkeypatch.setattr(acceptance, "FEW", 1)
    out = call(monkeypatch, capsys, "accept", *paths, "--json", *flags)
    *lines, last = out.splitlines()
    results = json.loads(last, parse_constant=refuse)
    assert [result["checkpoint"] for result in results] == list(map(str, paths))
    assert [row["heads"] for row in of(results[1]["acceptance"], "T = 1")] == [1]
    table = "\n".join(lines)
    assert "the shortest context, 48 tokens, leaves room for 24 new ones" in table
    assert "ckpt.pt: 3 heads, 4 prompts, 24 tokens each, float64 on cpu" in table
    shown = [line for line in lines if " .. " in line]
    for result in results:
        rows = result["acceptance"]
        for row in rows:
            line = shown.pop(0)
            assert line[:9].strip() == row["text"]
            values = [row[name] for name in ("prompts", "looping", "heads")]
            values += [f"{x:.3f}" for x in (row["ar"], row["car"], *row["car_interval"])]
            values += [f"{x:.2f}" for x in (row["naive"], row["tokens_per_forward"],
                                            *row["interval"])]
            assert re.findall(r"[\d.]*\d", line[9:]) == list(map(str, values))
        shown = shown[len({row["text"] for row in rows}) :]              # the lines of all AR
        for row in result["predictions"]:
            values = [f"{row['temperature']}", f"{row['heads']}"]
            values += [f"{row[name]:.2f}" for name in ("measured", "predicted")]
            values += [f"{x:+.1f}" for x in (row["percent"], *row["percent_interval"])]
            values += [f"{row['naive']:.2f}", f"{row['naive_percent']:+.1f}"]
            assert re.findall(r"[-+\d.]*\d", shown.pop(0)) == values
    assert not shown
    ars = " ".join(f"{x:.3f}" for x in of(results[0]["acceptance"], "given")[-1]["ars"])
    assert f"given: AR of heads 1 .. 3: {ars}\n" in table


def test_ctrl_c_in_the_second_checkpoint(toy, monkeypatch, capsys):
    examine = acceptance.examine

    def stop(model, *arguments):
        if model.config.n_mtp == 1:
            raise KeyboardInterrupt
        return examine(model, *arguments)
    monkeypatch.setattr(acceptance, "examine", stop)
    argv = ["accept", toy / "ckpt.pt", toy / "one.pt", *as_flags(FLAGS)]
    out, (result,) = interrupted_call(monkeypatch, capsys, *argv)
    assert "1 + sum CAR" in out and result["checkpoint"].endswith("ckpt.pt")


@pytest.mark.parametrize("argv,message", [
    (["plain.pt"], "plain.pt has no MTP heads"),
    (["ckpt.pt", "plain.pt"], "plain.pt has no MTP heads"),
    (["ckpt.pt", "--heads", "1,4"], "--heads is 1,4, but .*ckpt.pt has heads 1 .. 3"),
    (["ckpt.pt", "--heads", "0,1"], "--heads is 0,1, but"),
    (["ckpt.pt", "one.pt", "--heads", "2"], "--heads is 2, but .*one.pt has heads 1 .. 1"),
    (["ckpt.pt", "--heads", "1,auto"], "--heads is '1,auto'; it must be numbers"),
    (["ckpt.pt", "--tokens", 3], "a text has 3 tokens after its prompt"),
    (["ckpt.pt", "--data", "short"], "a text has [012] tokens after its prompt"),
    (["ckpt.pt", "--count", 1], "--count is 1; it must be"),
    (["ckpt.pt", "--prompts", "single.txt"], "single.txt has one prompt"),
    (["ckpt.pt", "--prompts", "x", "--data", "y"], "--data has no effect"),
    (["ckpt.pt", "--batch", -1], "--batch is -1"),
])
def test_bad_requests(toy, monkeypatch, argv, message):
    (toy / "single.txt").write_text("abc\n", encoding="utf-8")
    (toy / "short.txt").write_text("abcde" * 24, encoding="utf-8")
    if "short" in argv:
        P.prepare(toy / "short.txt", "bytes", toy / "short", quiet=True)
    monkeypatch.setattr(acceptance, "measure_one", None)  # nothing is measured before
    argv = [toy / x if (toy / str(x)).exists() else x for x in argv]
    monkeypatch.setattr(sys, "argv", ["bench.py", "accept", "--device=cpu", *map(str, argv)])
    with pytest.raises(common.UserError, match=message):
        bench.main()
