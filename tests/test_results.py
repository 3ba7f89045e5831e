"""results/: acceptance by entropy against slow loops, the tables' arithmetic, logs that were cut
off in a line, the check, what heads cost, and what fits on which card."""
import ast
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import distill
import train
from common import UserError, save_checkpoint
from model import GPT, GPTConfig
from results import bench, cards

RESULTS = Path(__file__).resolve().parents[1] / "results"
sys.path.insert(0, str(RESULTS))
import check  # noqa: E402
import entropy  # noqa: E402
import plain  # noqa: E402
import reproduce  # noqa: E402
import tables  # noqa: E402

CPU = torch.device("cpu")
HARDWARE = dict(device="toy", torch="2", python="3")


def row(name, part, result, **labels):
    return dict(name=name, part=part, result=result, **labels, **HARDWARE)


def effect_row(method, seed, loss, car):
    result = dict(loss=[loss, 9 - loss], ar=[car], car=[car], tokens_per_forward=1 + car)
    labels = dict(text="toy", K=1, method=method, seed=seed)
    return row(f"effect {method} {seed}", "effect", result, **labels)


def entropy_row(method, seed, accepted, K=1):
    """two of three bins have positions: 30 and 10"""
    low, high = accepted
    head = dict(head=1, count=[30, 0, 10], entropy=[0.5, None, 4.0], accepted=[low, None, high],
                overlap=[0.9, None, 0.4])
    result = [dict(checkpoint="toy", edges=[0, 1, 2], heads=[head] * min(K, 2))]
    labels = dict(text="toy", K=K, method=method, seed=seed)
    return row(f"entropy {method} {seed}", "entropy", result, **labels)


def cost_row(*points, title="heads, toy"):
    lines = []
    for K, beta, ms, gib in points:
        lines.append(dict(n_mtp=K, beta=beta, top_n=1, ms=ms, tokens_per_s=1.0, peak_gib=gib))
    return row("cost", "cost", {title: lines, "decoding": [dict(batch=1, heads=0, ms=1.0)]})


@pytest.fixture
def written(tmp_path, monkeypatch, capsys):
    """rows -> (the text of tables.md, what was printed); no figures"""
    monkeypatch.setattr(tables, "figures", lambda folder, rows: None)

    def write(rows):
        tables.write(tmp_path, rows)
        path = tmp_path / "tables.md"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return text, capsys.readouterr().out
    return write


def cells(text, *first):
    """the cells of the one line of a table that begins with these"""
    found = []
    for line in text.splitlines():
        own = [cell.strip() for cell in line.split("|")[1:-1]]
        if line.startswith("| ") and own[: len(first)] == list(first):
            found.append(own[len(first) :])
    (line,) = found
    return line


def test_lines_and_functions_have_an_end():
    for path in [*RESULTS.glob("*.py"), Path(__file__)]:
        text = path.read_text(encoding="utf-8")
        assert max(map(len, text.splitlines())) <= 100, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)


def test_the_expected_speed_of_looped_models(written):
    """1 + sum CAR over the cost of a round in plain steps, and over the 1-head MTP model of the
    same seed"""
    rest = dict(checkpoint="a/b", batch=1, tokens_per_forward=1.0, tokens_per_s=1.0, speedup=1.0,
                predicted_speedup=1.0, over_one=None, looping=0, prompts=1)
    speed = []
    for temperature, heads, ms in (
        (0, 0, 2.0), (0, 1, 2.5), (0, 2, 4.0), (0, "auto", None), (1, 2, 99.0)
    ):
        speed.append(dict(rest, temperature=temperature, heads=heads, ms_round=ms))
    rows = [effect_row("MTP", 1, 4.0, 0.5), effect_row("MTP", 2, 4.0, 0.25),
            row("speed python", "speed", speed)]
    for seed, car in ((1, 0.1), (2, 0.3), (3, 0.9)):       # seed 3 has no 1-head MTP
        result = dict(before=dict(car=[0.9, 0.9]), after=dict(car=[0.5, car]))
        rows.append(row(f"loop {seed}", "extend", result, text="toy", n=2, method="MTP-D",
                        seed=seed))
    text, _ = written(rows)
    text = text[text.index("## Speed expected") : text.index("## Decoding")]
    # 1.5 and 1.25 tokens per forward over 1.25; 1.6 and 1.8 over 2, then over 1.2 and 1
    assert cells(text, "toy", "1", "MTP") == [
        "2", "1.25 (1.25 to 1.25)", "1.10 ±0.10", "1.00 ±0.00"]
    assert cells(text, "toy", "2", "MTP-D") == [
        "2", "2.00 (2.00 to 2.00)", "0.85 ±0.05", "0.78 ±0.12"]


# -----------------------------------------------------------------------------
# entropy.py


def test_rows_are_sorted_into_bins_by_the_main_heads_entropy():
    broad = [0.4, 0.2, 0.2, 0.2]                           # 1.332 nats
    main = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], broad, broad], dtype=torch.float64)
    draft = torch.tensor([[0.75, 0.25, 0, 0], [0, 0.25, 0.75, 0], [0.3, 0.3, 0.4, 0], broad],
                         dtype=torch.float64)
    got = entropy.by_bin(entropy.tally(main.log(), draft.log()))
    close = pytest.approx
    nats = -0.4 * math.log(0.4) - 0.6 * math.log(0.2)
    assert got["count"] == [1, 0, 1, 2] + [0] * 7
    assert got["accepted"][:4] == [1, None, 0, 0.5]
    assert got["overlap"][:4] == [close(0.75), None, close(0.25), close(0.85)]
    assert got["entropy"][:4] == [0, None, close(math.log(2)), close(nats)]
    assert all(got[key][4:] == [None] * 7 for key in ("accepted", "overlap", "entropy"))


@pytest.fixture
def toy(float64):
    """a model of 5 tokens and two heads whose choices differ, and its validation text"""
    model = GPT(GPTConfig(5, 8, 1, 1, 8, 2))
    for p in model.parameters():
        p.data *= 8 if p.dim() > 1 else 1
    cfg = train.make_config(dict(preset="tiny", n_mtp=2, block_size=8, eval_windows=9, top_n=3.0))
    return model, np.random.default_rng(0).integers(0, 5, 100).astype(np.uint16), cfg


def slow_pairs(model, val, by):
    """{head: (entropy or confidence, accepted, overlap) of each pair that it is measured on}"""
    pairs = {1: [], 2: []}
    for w in range(9):
        tokens = torch.from_numpy(val[8 * w : 8 * w + 8].astype(np.int64))
        main, *heads = [x[0].softmax(-1) for x in model.all_logits(tokens[None])]
        for i in range(8):
            good = True
            for k in (1, 2):
                if i + k < 8 and good:
                    p = main[i + k].tolist()
                    q = heads[k - 1][i].tolist()
                    good = p.index(max(p)) == q.index(max(q))
                    nats = -sum(x * math.log(x) for x in p)
                    key = nats if by == "entropy" else max(q)
                    pairs[k].append((key, good, sum(map(min, p, q))))
    return pairs


@pytest.mark.parametrize("by,edges", [("entropy", entropy.EDGES),
                                      ("confidence", entropy.CONFIDENCE_EDGES)])
def test_the_curves_are_those_of_slow_loops(toy, by, edges):
    model, val, cfg = toy
    pairs = slow_pairs(model, val, by)
    got = entropy.curves(model, val, cfg, CPU, torch.float64, by)
    assert [head["head"] for head in got] == [1, 2] and sum(got[0]["count"]) == 9 * 7
    for head in got:
        for b, (low, high) in enumerate(zip(edges, [*edges[1:], math.inf])):
            mine = [x for x in pairs[head["head"]] if low <= x[0] < high]
            assert head["count"][b] == len(mine)
            for key, column in ((by, 0), ("accepted", 1), ("overlap", 2)):
                mean = pytest.approx(sum(x[column] for x in mine) / max(1, len(mine)))
                assert head[key][b] == (mean if mine else None)
        assert sum(n > 0 for n in head["count"]) > 1       # or else the bins were not tried


def test_the_last_heads_bins_add_up_to_the_acceptance_of_evaluate(toy):
    model, val, cfg = toy
    last = entropy.curves(model, val, cfg, CPU, torch.float64)[-1]
    accepted = sum(n * rate for n, rate in zip(last["count"], last["accepted"]) if n)
    ar = train.evaluate(model, val, cfg, CPU, torch.float64)["ar"]
    assert 0 < ar[1] < 1 and accepted / sum(last["count"]) == pytest.approx(ar[1])


# -----------------------------------------------------------------------------
# tables.py


def test_effect_has_means_half_ranges_and_differences_within_a_seed(written):
    rows = [effect_row("MTP", 1, 3.0, 0.4), effect_row("MTP", 2, 3.3, 0.6),
            effect_row("MTP-D", 2, 3.4, 0.7), effect_row("MTP-D", 1, 3.05, 0.5),
            effect_row("MTP-D", 3, 5.0, 0.6)]              # seed 3 has no partner
    text, _ = written(rows)
    assert cells(text, "toy", "1", "MTP") == [
        "2", "3.1500 ±0.1500", "", "50.00 ±10.00", "50.00 ±10.00", "1.500 ±0.100", ""]
    assert cells(text, "toy", "1", "MTP-D") == [
        "3", "3.8167 ±0.9750", "0.0750 ±0.0250", "60.00 ±10.00", "60.00 ±10.00", "1.600 ±0.100",
        "-0.050, -0.100"]


def test_a_run_that_was_made_again_counts_once(written):
    """by its name, on one device"""
    first, again = effect_row("MTP", 1, 3.0, 0.4), effect_row("MTP", 1, 3.5, 0.4)
    text, _ = written([{**first, "name": "a"}, {**again, "name": "a"}])
    assert cells(text, "toy", "1", "MTP")[:2] == ["1", "3.5000"]


def test_losses_of_different_hardware_are_not_compared(written):
    rows = [effect_row("MTP", 1, 3.0, 0.5), dict(effect_row("MTP", 2, 3.2, 0.5), device="other"),
            effect_row("MTP-D", 1, 3.1, 0.6), effect_row("MTP-D", 2, 3.1, 0.6)]
    text, _ = written(rows)
    assert cells(text, "toy", "1", "MTP-D")[:3] == ["2", "3.1000 ±0.0000", "0.1000"]


def test_the_entropy_table_has_shares_means_and_differences_within_a_seed(written):
    text, _ = written([
        entropy_row("MTP", 1, (0.8, 0.2)), entropy_row("MTP", 2, (0.9, 0.4)),
        entropy_row("MTP-D", 1, (0.9, 0.4)), entropy_row("MTP-D", 2, (0.9, 0.5)),
    ])
    assert cells(text, "0 to 1") == [
        "75.0 ±0.0", "85.0 ±5.0", "90.0 ±0.0", "5.0 ±5.0", "90.0 ±0.0", "90.0 ±0.0"]
    assert cells(text, "from 2") == [
        "25.0 ±0.0", "30.0 ±10.0", "45.0 ±5.0", "15.0 ±5.0", "40.0 ±0.0", "40.0 ±0.0"]
    assert "1 to 2" not in text                            # a bin without positions has no line


def test_a_part_without_rows_has_no_table(tmp_path, written):
    titles = {"MTP against MTP-D": effect_row("MTP", 1, 3.0, 0.5),
              "Acceptance by": entropy_row("MTP", 1, (0.8, 0.2), K=4),
              "Cost: heads, toy": cost_row((0, 0, 10.0, None))}
    for left_out in [*titles, None]:
        text, _ = written([r for title, r in titles.items() if title != left_out])
        for title in titles:
            assert (f"## {title}" in text) == (title != left_out)
    (tmp_path / "tables.md").unlink()
    text, said = written([])
    assert not text and "no rows" in said


def test_a_speed_without_one_head_says_nothing_about_it(written):
    r = dict(checkpoint="a/b.pt", temperature=1.0, batch=8, heads=4, tokens_per_forward=2,
             tokens_per_s=10, speedup=1, predicted_speedup=1, over_one=None, ms_round=1, looping=0,
             prompts=8)
    text, _ = written([row("speed", "speed", [r])])
    assert cells(text, "a")[7] == ""
    r.update(heads="auto", predicted_speedup=None, ms_round=None, over_one=1.5)
    text, _ = written([row("speed", "speed", [r])])
    assert cells(text, "a")[2:] == ["auto", "2.00", "10", "1.00", "", "1.50", "", "0/1"]
    one_kind = dict(r, kind="code")                       # as many prompts once more
    text, _ = written([row("speed", "speed", [r, one_kind])])
    assert cells(text, "a")[2] == "auto"                  # one line


def test_without_matplotlib_there_are_tables_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    tables.write(tmp_path, [effect_row("MTP", 1, 3.0, 0.5)])
    assert [p.name for p in tmp_path.iterdir()] == ["tables.md"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no figures")]
    assert said == ["no figures: matplotlib is not installed (pip install matplotlib, or the extra "
                    "`plots`)"]


# in the paper's unit


def deep_path(name, seed, loop=""):
    return str(Path("work", f"python_deep_{name}_seed{seed}{loop}", "ckpt.pt"))


def accept_row(seed, text, *values):
    """as bench.py accept gives it; values: (kind of text, checkpoint's name, its loop, heads,
    tokens per forward)"""
    result = []
    for kind, name, loop, heads, tokens in values:
        own = [dict(text=kind, heads=heads, tokens_per_forward=tokens, interval=[tokens, tokens]),
               dict(text="given", heads=heads, tokens_per_forward=heads / 4 + 1)]
        result.append(dict(checkpoint=deep_path(name, seed, loop), acceptance=own, predictions=[]))
    return row(f"accept {seed}, {text}", "accept", result, seed=seed, text=text)


def timed_row(seed, temperature, *values, looping=1, prompts=4, name="speed"):
    """values: (checkpoint's name, heads, tokens per second, ms of a round)"""
    result = []
    for own, heads, speed, ms in values:
        loop = "" if own.startswith("K1") else "-16"
        result.append(dict(
            checkpoint=deep_path(own, seed, loop), heads=heads, tokens_per_s=speed, ms_round=ms,
            temperature=temperature, batch=1, kind="", looping=looping, prompts=prompts,
            tokens_per_forward=1.0, speedup=1.0, predicted_speedup=1.0, over_one=None))
    return row(f"{name} seed{seed}", "speed", result, seed=seed, text=reproduce.UNSEEN)


def unit(text):
    """the first table of tables.md, without those after it"""
    return text[text.index("## In the paper's unit") :].split("\n\n##")[0]


def own_rows(text="python deep"):
    """two seeds: 2 and 6 tokens per forward with loops, 1 and 2 without; 6 and 15, 3 and 3"""
    rows = []
    for seed, numbers in ((1, (2.0, 6.0, 1.0, 2.0)), (2, (6.0, 15.0, 3.0, 3.0))):
        one, eight, one_rest, eight_rest = numbers
        rows.append(accept_row(
            seed, text, ("greedy", "K1_MTP", "", 1, one), ("greedy", "K4_MTP-D", "-16", 8, eight),
            ("no loops", "K1_MTP", "", 1, one_rest),
            ("no loops", "K4_MTP-D", "-16", 8, eight_rest)))
    return rows


def test_the_table_in_the_papers_unit_is_a_ratio_within_a_seed(written):
    """8 heads: seed 1 6 / 2, seed 2 15 / 6; without loops 2 / 1 and 3 / 3"""
    text, _ = written(own_rows())
    line = cells(unit(text), "python deep", "MTP-D", "8")
    assert line == ["3.05", "2", "2.75 (2.50 .. 3.00)", "1.50 (1.00 .. 2.00)", "",
                    "2.40 (2.40 .. 2.40)", *[""] * 6]


def test_the_clock_is_over_the_one_head_that_was_timed_beside_it(written):
    """a round of 8 heads takes 1.5 times as long; so 3 times the tokens are twice the speed. Of two
    timings, that with more prompts counts; one without the model with one head counts nowhere"""
    one, eight, auto = ("K1_MTP", 1, 100, 2.0), ("K4_MTP-D", 8, 160, 3.0), (
        "K4_MTP-D", "auto", 150, None)
    few = timed_row(1, 0, ("K1_MTP", 1, 100, 2.0), ("K4_MTP-D", 8, 500, 3.0), looping=3)
    lonely = timed_row(1, 0, ("K4_MTP-D", 8, 999, 3.0), looping=0)
    plain_step = ("K4_MTP-D", 0, 50, 1.0)
    good = timed_row(1, 0, ("K1_MTP", 0, 50, 1.0), one, plain_step, eight, auto)
    warm = timed_row(1, 1, one, ("K4_MTP-D", 8, 120, 3.0), name="warm")
    good["result"] += timed_row(1, 0, ("K4_MTP-D", 8, 999, 3.0))["result"]      # looped further
    for order in ([few, good, lonely, warm], [warm, lonely, good, few]):
        text, _ = written([*own_rows(reproduce.UNSEEN)[:1], *own_rows(), *order])
        line = cells(unit(text), reproduce.UNSEEN, "MTP-D", "8")
        assert line == [
            "3.05", "1", "3.00", "2.00", "", "2.40", "", "2.00", "3", "1.60", "", "1.20"]
        line = cells(unit(text), reproduce.UNSEEN, "MTP-D", "auto")
        assert line == ["", "1", *[""] * 6, "3", "1.50", "", ""]
        assert "| MTP-D | 0 |" not in unit(text)


def test_the_table_of_a_frozen_model_is_by_kind_and_over_seeds(written):
    def of(seed, tokens, speed):
        result = []
        for kind, more in (("", 0), ("code", 1)):
            for heads, temperature in ((0, 0.0), (4, 0.0), (4, 1.0)):
                result.append(dict(
                    heads=heads, temperature=temperature, kind=kind, looping=seed, prompts=9,
                    tokens_per_forward=tokens + more + temperature, speedup=speed))
        return row(f"speed model 4 heads KL seed{seed}", "pretrained", result, seed=seed)
    text, _ = written([of(1, 2.0, 1.5), of(2, 2.2, 1.7)])
    assert cells(text, "model 4 heads KL", "all") == [
        "2", "1, 2 of 9", "2.10 (2.00 .. 2.20)", "1.60 (1.50 .. 1.70)", "3.10 (3.00 .. 3.20)",
        "1.60 (1.50 .. 1.70)"]
    assert cells(text, "model 4 heads KL", "code")[2] == "3.10 (3.00 .. 3.20)"


def test_the_table_says_where_columns_have_different_seeds(written):
    one, eight = ("K1_MTP", 1, 100, 2.0), ("K4_MTP-D", 8, 160, 3.0)
    text, _ = written([*own_rows(reproduce.UNSEEN), timed_row(1, 0, one, eight)])
    assert cells(unit(text), reproduce.UNSEEN, "MTP-D", "8")[1] == "1 to 2"


def test_validation_text_is_compared_from_the_logs_of_training(written):
    def model(K, method, *car):
        result = dict(loss=[3.0, 3.1], ar=[car[0]], car=list(car), tokens_per_forward=1 + sum(car))
        return row(f"{K} {method}", "deep", result, text="python deep", K=K, method=method, seed=1)

    loop = dict(before=dict(car=[0.0] * 8), after=dict(car=[0.5] * 8))
    text, _ = written([
        model(1, "MTP", 0.6), model(4, "MTP-D", 0.7, 0.5, 0.3, 0.1),
        model(4, "MTP", 0.5, 0.5, 0.3, 0.1), model(1, "MTP-D", 0.9),
        row("loop", "deep", loop, text="python deep", n=8, method="MTP-D", seed=1)])
    for heads, tokens in (("1", 1.7), ("2", 2.2), ("4", 2.6), ("8", 5.0)):
        line = cells(unit(text), "python deep", "MTP-D", heads)
        assert line[6] == f"{tokens / 1.6:.2f}" and line[2:6] + line[7:] == [""] * 9
    over = text[text.index("## Tokens per forward of MTP-D over") :].split("\n\n##")[0]
    assert cells(over, "python deep", "4") == [
        "1.23, from its CARs 1.04", "1", "", "", "", "", f"{2.6 / 2.4:.3f}"]
    assert "| python |" not in text


def test_the_pilot_is_shown_before_any_training(written):
    def pilot(method, seed, third):
        car = [0.5, 0.25, third, *[0.01] * 5]
        result = dict(before=dict(car=car), after=dict(car=[0.9] * 8))
        return row(f"pilot {method} {seed}", "pilot", result, text="toy", n=8, method=method,
                   seed=seed)

    text, _ = written([pilot("MTP", 1, 0.02), pilot("MTP", 2, 0.04), pilot("MTP-D", 1, 0.125)])
    assert cells(text, "toy", "1 -> 8", "MTP") == [
        "2", "50.00 (50.00 .. 50.00)", "25.00 (25.00 .. 25.00)", "3.00 (2.00 .. 4.00)",
        "1.00 (1.00 .. 1.00)", "1.00 (1.00 .. 1.00)", "1.83 (1.82 .. 1.84)", "0.6"]
    assert cells(text, "toy", "1 -> 8", "MTP-D")[3] == "12.50"


@pytest.fixture
def plt():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


def drawn(fig):
    """{label: its points} of the first panel"""
    result = {}
    for line in fig.axes[0].lines:
        result[line.get_label()] = [tuple(map(float, point)) for point in line.get_xydata()]
    return result


def test_cost_is_drawn_over_that_of_no_heads(plt):
    # K = 0 took 20 ms in the mean
    points = (0, 0, 10.0, 2.0), (0, 0, 30.0, 2.0), (4, 0, 50.0, 3.0), (4, 0.5, 60.0, 4.0)
    assert drawn(tables.cost_figure(plt, [cost_row(*points)])) == {
        "MTP, time": [(0, 0.5), (0, 1.5), (4, 2.5)], "MTP-D, time": [(4, 3.0)],
        "MTP, peak memory": [(0, 1), (0, 1), (4, 1.5)], "MTP-D, peak memory": [(4, 2.0)]}
    unmeasured = tables.cost_figure(plt, [cost_row((0, 0, 10.0, None), (4, 0, 20.0, None))])
    assert drawn(unmeasured) == {"MTP, time": [(0, 1), (4, 2)]}
    assert tables.cost_figure(plt, [cost_row(*points[2:])]) is None        # nothing to compare with


def test_entropy_is_drawn_as_the_mean_of_the_seeds(plt):
    fig = tables.entropy_figure(plt, [
        entropy_row("MTP", 1, (0.8, 0.2)), entropy_row("MTP", 2, (0.9, 0.4)),
        entropy_row("MTP-D", 1, (1.0, 0.5)),
    ])
    close = pytest.approx
    assert drawn(fig)["MTP, argmax"] == [(0.5, close(85)), (4, close(30))]
    assert drawn(fig)["MTP-D, argmax"] == [(0.5, 100), (4, 50)]
    assert drawn(fig)["MTP, sampled"] == [(0.5, close(90)), (4, close(40))]
    assert [bar.get_height() for bar in fig.axes[0].patches] == [75, 0, 25]


def test_the_figure_that_says_it_all(plt):
    """with own text and the clock; with either alone; with neither, none"""
    close = pytest.approx
    one = ("K1_MTP", 1, 100, 2.0)
    speed = [timed_row(1, 0, one, ("K4_MTP-D", 8, 160, 3.0), ("K4_MTP-D", "auto", 150, None))]
    paper = [(4, close(2.07)), (8, close(3.05)), (16, close(3.20))]
    fig = tables.paper_figure(plt, own_rows() + own_rows(reproduce.UNSEEN) + speed)
    left = drawn(fig)
    assert left["MTP-D, own greedy text (2 seeds)"] == [(8, close(2.75))]
    assert left["MTP-D, own greedy text that does not loop (2 seeds)"] == [(8, close(1.5))]
    assert left['the paper\'s "speedup"'] == paper
    right = {line.get_label(): line.get_ydata() for line in fig.axes[-1].lines}
    assert list(right["MTP-D, greedy, with texts that loop, computed (1 seed)"]) == [2.0]
    assert list(right["MTP-D, greedy, without these (1 seed)"]) == [1.6]
    segments = [line.get_xydata().tolist() for line in fig.axes[-1].lines]
    assert [[27, 1.5], [38, 1.5]] in segments              # auto
    alone = drawn(tables.paper_figure(plt, speed))
    assert alone['the paper\'s "speedup"'] == paper
    assert "MTP-D, own greedy text (2 seeds)" in drawn(tables.paper_figure(plt, own_rows()))
    assert tables.paper_figure(plt, []) is None
    assert tables.paper_figure(plt, [timed_row(1, 0, ("K4_MTP-D", 8, 160, 3.0))]) is None


# -----------------------------------------------------------------------------
# runs.jsonl


def test_a_half_line_is_left_out_and_the_next_row_begins_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    path = tmp_path / "results" / "tiny" / "runs.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "a", "part": "x"}\n\n{"name": "b", "par', encoding="utf-8")
    assert [r["name"] for r in tables.read(path)] == ["a"]
    assert capsys.readouterr().out == f"{path}, line 3: not a whole row, left out\n"
    reproduce.Runner("tiny", "work", 1).add(name="b", part="x")
    assert [r["name"] for r in tables.read(path)] == ["a", "b"]
    assert tables.read(tmp_path / "none.jsonl") == []


def start(monkeypatch, tmp_path, *argv):
    """reproduce.py as a command, with its files in tmp_path"""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "git_commit", lambda: "1234567")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *argv])
    reproduce.run(reproduce.main)


@pytest.mark.skipif(os.name == "nt", reason="no pthread_kill there")
def test_ctrl_c_keeps_the_rows_and_starts_no_other_command(tmp_path, monkeypatch):
    calls, stopped = [], threading.Event()

    class Pool(reproduce.ThreadPoolExecutor):
        def __exit__(self, *error):
            stopped.set()
            return super().__exit__(*error)

    def run(command, **_):
        calls.append(command)
        if len(calls) == 2:
            time.sleep(0.2)                      # by now the main thread waits
            # Ctrl-C in a terminal: it ends the command, too
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            stopped.wait(20)
        return SimpleNamespace(returncode=len(calls) - 1, stdout="[1.0]", stderr="interrupted")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(reproduce, "ThreadPoolExecutor", Pool)
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, tmp_path, "--part", "effect")
    path = tmp_path / "results" / "tiny" / "runs.jsonl"
    assert stop.value.code.strip().startswith(f"reproduce.py: interrupted; {path} has the rows")
    assert len(tables.read(path)) == 1 and len(calls) == 2


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def refuse(row):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(reproduce.json, "dumps", refuse)
    done = SimpleNamespace(returncode=0, stdout="[1]", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(SystemExit, match="could not write .*runs.jsonl .*No space left"):
        start(monkeypatch, tmp_path, "--part", "cost")


def test_a_log_with_half_a_line_gives_its_curve(tmp_path, monkeypatch):
    log = tmp_path / "out" / "reproduce" / "shakespeare0" / "log.jsonl"
    log.parent.mkdir(parents=True)
    rows = [dict(config=dict(steps=10)), dict(step=9, ms=2.0), dict(step=10, val=dict(loss=[1.5]))]
    text = "\n".join(map(json.dumps, rows[:2])) + '\n{"step": 1\n\n' + json.dumps(rows[2])
    log.write_text(text, encoding="utf-8")
    done = SimpleNamespace(returncode=0, stdout="[1]", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    start(monkeypatch, tmp_path, "--part", "nanogpt", "--shakespeare", "x")
    table = tables.read(tmp_path / "results" / "tiny" / "runs.jsonl")
    curve = dict(step=[10], val=[1.5], ms_per_step=2.0)
    assert [r["result"] for r in table if "curve" in r["name"]] == [curve]


def test_entropy_runs_once_for_each_checkpoint_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    calls = []
    broken = "MTP-D_seed2"

    def run(command, **_):
        calls.append(command[2])
        return SimpleNamespace(returncode=int(broken in command[2]), stderr="no checkpoint",
                               stdout="text\n" + json.dumps([1.0]))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(reproduce, "git_commit", lambda: "1234567")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    begin = list(reproduce.PARTS)
    assert begin.index("entropy") == begin.index("effect") + 1
    args = SimpleNamespace(scale="gpu", seeds=(1, 2, 3))
    for expected in (6, 1):                                # the second time, only what failed
        calls.clear()
        runner = reproduce.Runner("gpu", "work", 1)
        reproduce.entropy(args, runner, {"python": ("python", "")})
        assert len(calls) == expected
        assert str(Path("work/python_K4_MTP-D_seed2/ckpt.pt")) in calls
    rows = tables.read(tmp_path / "results" / "gpu" / "runs.jsonl")
    assert len(rows) == 5 and all(row["commit"] == "1234567" for row in rows)


def test_a_checkpoint_that_is_gone_is_made_again(tmp_path, monkeypatch):
    """only where a run needs it, only if it has been made before, with what it needs itself first;
    and without a row"""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    write = ("import sys; from pathlib import Path; o = Path(sys.argv[-1]); o.mkdir(); "
             "(o / 'ckpt.pt').write_text('x'); print(1)")
    read = "import sys; print(len(open(sys.argv[1]).read()))"
    a, b = [tmp_path / name for name in "ab"]
    first = ("first", "effect", ["-c", write, "one", "--out", str(a)], {})
    second = ("second", "extend", ["-c", write, str(a / "ckpt.pt"), "--out", str(b)], {})
    runner = reproduce.Runner("tiny", tmp_path, 2)
    runner.makers = {a: first, b: second}
    runner.rows = [{"name": "first"}, {"name": "second"}]
    runner.all([("third", "speed", ["-c", read, str(b / "ckpt.pt")], {})])
    assert (a / "ckpt.pt").exists() and (b / "ckpt.pt").exists() and not runner.failed
    assert [row["name"] for row in runner.rows] == ["first", "second", "third"]
    (a / "ckpt.pt").unlink()
    runner.all([("third", "speed", [], {}), second])       # all have rows: nothing runs
    assert not (a / "ckpt.pt").exists()


def test_the_checkpoint_of_a_run_that_stopped_is_not_measured(tmp_path, monkeypatch, capsys):
    """train.py writes one at each evaluation: such a run is made again, and where it stops again,
    nothing that reads it runs"""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    write = ("import json, sys; from pathlib import Path; o = Path(sys.argv[-1]); "
             "o.mkdir(exist_ok=True); (o / 'ckpt.pt').write_text('x'); step = int(sys.argv[1]); "
             "rows = dict(config=dict(steps=9)), dict(step=step, val=1); "
             "(o / 'log.jsonl').write_text('\\n'.join(map(json.dumps, rows))); "
             "print(1); sys.exit(step != 9)")
    a = tmp_path / "a"
    reader = ("reads", "speed", ["-c", "print(2)", str(a / "ckpt.pt")], {})
    for stops in (5, 9):
        training = ("trains", "effect", ["-c", write, str(stops), "--out", str(a)], {})
        runner = reproduce.Runner("tiny", tmp_path, 1)
        runner.makers = {a: training}
        runner.all([training])
        runner.all([reader])
        assert runner.failed == ({"trains", "reads"} if stops == 5 else set())
        names = [row["name"] for row in runner.rows]
        assert names == (["trains", "reads"] if stops == 9 else [])
    said = capsys.readouterr().out
    assert said.count("trains FAILED") == said.count("reads FAILED: ['it reads what trains") == 1
    # stopped when it was made again: there is a row, and a checkpoint of step 5
    training[2][2] = "5"
    runner.start(training[2], 0)
    training[2][2] = "9"
    runner.all([("reads again", *reader[1:])])
    assert json.loads((a / "log.jsonl").read_text().splitlines()[-1])["step"] == 9
    assert runner.rows[-1]["name"] == "reads again" and not runner.failed


# -----------------------------------------------------------------------------
# the parts of reproduce.py, called alone


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """[the commands that reproduce.py ran, as lists of words]: pretended ones, which write a
    checkpoint, stop where one that they read is not there, and say how long their steps took"""
    ran = []

    def run(command, **_):
        words = command[1:]
        ran.append(words)
        read = [tmp_path / word for word in words if word.endswith("ckpt.pt")]
        missing = [str(path) for path in read if not path.exists()]
        if "--out" in words and words[0] in ("train.py", "extend.py"):
            flags = dict(zip(words, words[1:]))
            out = tmp_path / flags["--out"]
            out.mkdir(parents=True, exist_ok=True)
            (out / "ckpt.pt").write_text("", encoding="utf-8")
            steps = int(flags.get("--steps", 600))
            log = [dict(config=dict(steps=steps)), dict(step=steps, val={}),
                   dict(ms=20.0 if flags.get("--n_mtp") == "0" else 30.0)]
            (out / "log.jsonl").write_text("\n".join(map(json.dumps, log)), encoding="utf-8")
        return SimpleNamespace(returncode=len(missing), stdout="[1]", stderr=" ".join(missing))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(tables, "write", lambda folder, rows: None)
    for name in [*reproduce.PRETRAINED, reproduce.CODE]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    return ran


def part(monkeypatch, tmp_path, name, *flags):
    """one part of the gpu scale -> {name: row} of all rows there are"""
    start(monkeypatch, tmp_path, "--scale", "gpu", "--part", name, *flags)
    rows = tables.read(tmp_path / "results" / "gpu" / "runs.jsonl")
    result = {row["name"]: row for row in rows}
    assert len(result) == len(rows)                        # no run has two rows
    return result


def flags_of(row):
    words = row["command"].split()
    return dict(zip(words, words[1:]))


@pytest.mark.parametrize("name", [
    "presets", "entropy", "plain", "pilot", "extend", "deep", "accept", "undetached", "speed",
    "clock", "pretrained",
])
def test_a_part_alone_makes_what_it_reads(name, tmp_path, monkeypatch, commands):
    """from nothing; and where rows are there but no checkpoint, as on another computer"""
    rows = part(monkeypatch, tmp_path, name, "--commit", "7654321")
    ran = len(commands)
    assert ran == len(rows) and all(row["commit"] == "7654321" for row in rows.values())
    part(monkeypatch, tmp_path, name)
    assert len(commands) == ran                            # all have rows
    path = tmp_path / "results" / "gpu" / "runs.jsonl"
    read = {word for row in rows.values() for word in row["command"].split()}
    last = []                                              # those that read, and are not read
    for row in rows.values():
        reads = "ckpt.pt" in row["command"].replace("smollm2/ckpt.pt", "")
        if reads and str(Path(flags_of(row).get("--out", "none"), "ckpt.pt")) not in read:
            last.append(row)
    for gone in last[:3]:
        shutil.rmtree(tmp_path / "out" / "reproduce")
        kept = [row for row in rows.values() if row is not gone]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        commands.clear()
        assert set(part(monkeypatch, tmp_path, name)) == set(rows)
        assert " ".join(commands[-1]) == gone["command"].removeprefix("python ")
        assert 1 < len(commands) == len(set(map(tuple, commands))) < len(rows)
    assert last


@pytest.mark.parametrize("name", ["deep", "clock"])
def test_rows_of_an_earlier_build_do_not_stand_for_todays(name, tmp_path, monkeypatch, commands):
    """with the rows of the repository's log there"""
    log = RESULTS / "gpu" / "runs.jsonl"
    if not log.exists():
        pytest.skip("a copy without the logs")
    path = tmp_path / "results" / "gpu" / "runs.jsonl"
    path.parent.mkdir(parents=True)
    shutil.copyfile(log, path)
    start(monkeypatch, tmp_path, "--scale", "gpu", "--part", name)
    rows = tables.read(path)
    keys = {(row.get("text"), row.get("K"), row.get("method"), row.get("seed")) for row in rows}
    for seed in (1, 2, 3):
        for K, method in ((1, "MTP"), (4, "MTP"), (4, "MTP-D")):
            assert name == "clock" or ("python deep", K, method, seed) in keys
        timed = [flags_of(row)["--temperature"] for row in rows
                 if (row.get("text"), row["part"], row.get("seed"))
                 == (reproduce.UNSEEN, "speed", seed)]
        assert name == "deep" or sorted(timed) == ["0", "0.7,1"]


def test_only_the_runs_that_are_named(tmp_path, monkeypatch, commands):
    rows = part(monkeypatch, tmp_path, "pilot", "--only", "MTP-D seed1,MTP seed3")
    assert {name for name in rows if "pilot" in name} == {
        "pilot python MTP-D seed1", "pilot python MTP seed3"}
    assert {name for name in rows if "pilot" not in name} == {
        "python K1 MTP-D seed1", "python K1 MTP seed3"}    # which these read


def test_the_pilot_copies_one_head_to_eight_and_trains_none(tmp_path, monkeypatch, commands):
    row = part(monkeypatch, tmp_path, "pilot", "--seeds", "2")["pilot python MTP-D seed2"]
    flags = flags_of(row)
    assert (flags["--heads"], flags["--steps"]) == ("8", "0")
    assert flags["extend.py"].endswith(str(Path("python_K1_MTP-D_seed2", "ckpt.pt")))
    assert row["part"] == "pilot" and row["n"] == 8


def test_the_teacher_that_is_not_detached(tmp_path, monkeypatch, commands):
    """from the first step; looped to 8 heads; timed over 1-head MTP, on more prompts greedily"""
    rows = part(monkeypatch, tmp_path, "undetached", "--seeds", "2")
    training = rows["python deep K4 undetached seed2"]
    flags = flags_of(training)
    assert "--no-detach_teacher" in training["command"] and training["part"] == "undetached"
    assert (flags["--kl_start"], flags["--kl_ramp"], flags["--beta"]) == ("0", "0", "0.5")
    loop = rows["python deep 8 heads undetached seed2"]
    assert flags_of(loop)["extend.py"] == flags["--out"] + os.sep + "ckpt.pt"
    for name, temperatures, count in (("", "0.7,1", "96"), (", greedy", "0", "164")):
        row = rows[f"speed python deep undetached seed2{name}"]
        assert flags_of(row)["--temperature"] == temperatures and flags_of(row)["--count"] == count
        one, ours = [word for word in row["command"].split() if word.endswith("ckpt.pt")]
        assert "K1_MTP_seed2" in one and Path(ours).parent == Path(flags_of(loop)["--out"])


def test_own_text_after_the_validation_text_and_after_other_problems(
    tmp_path, monkeypatch, commands
):
    rows = part(monkeypatch, tmp_path, "accept", "--seeds", "2")
    texts = {"": "python deep", ", code": reproduce.UNSEEN}
    for name, text in texts.items():
        row = rows[f"accept python deep seed2{name}"]
        folders = [Path(word).parent.name for word in row["command"].split() if "ckpt" in word]
        assert folders == ["python_deep_K1_MTP_seed2", "python_deep_K4_MTP_seed2-16",
                           "python_deep_K4_MTP-D_seed2-16"]
        assert (row["part"], row["text"]) == ("accept", text)
        assert (flags_of(row).get("--prompts") == reproduce.CODE) == (name != "")


def test_without_prompts_the_clock_says_what_makes_them(tmp_path, monkeypatch, commands, capsys):
    (tmp_path / reproduce.CODE).unlink()
    assert not part(monkeypatch, tmp_path, "clock") and not commands
    assert "python results/prompts.py --count 164" in capsys.readouterr().out


def test_the_tiny_scale_reads_no_prose(tmp_path, monkeypatch, commands):
    with pytest.raises(SystemExit, match="give --scale gpu"):
        start(monkeypatch, tmp_path, "--part", "effect", "--prose", "text.txt")


def test_gpt2_wants_prose_in_gpt2s_vocabulary(tmp_path, monkeypatch, commands, capsys):
    folder = tmp_path / "prose-bpe4096"
    folder.mkdir()
    meta = folder / "meta.json"
    meta.write_text('{"tokenizer": {"kind": "bpe"}}', encoding="utf-8")
    for flags, message in (((), "give --prose"), (("--prose", str(folder)), "another tokenizer")):
        assert not part(monkeypatch, tmp_path, "gpt2", *flags)
        assert message in capsys.readouterr().out
    rows = part(monkeypatch, tmp_path, "gpt2", "--prose", "text.txt", "--gpt2_steps", "7")
    assert [(row["method"], flags_of(row)["--beta"]) for row in rows.values()] == [
        ("MTP", "0"), ("MTP-D", "0.5")]
    for row in rows.values():
        flags = flags_of(row)
        assert (flags["--tokenizer"], flags["--steps"], flags["--data"]) == (
            "gpt2", "7", "text.txt")
        assert (flags["--preset"], flags["--n_mtp"]) == ("gpt2", "4")
    meta.write_text('{"tokenizer": {"kind": "gpt2"}}', encoding="utf-8")
    (tmp_path / "results" / "gpu" / "runs.jsonl").unlink()
    for row in part(monkeypatch, tmp_path, "gpt2", "--prose", str(folder)).values():
        assert "--tokenizer" not in row["command"]


def test_on_a_gpu_what_is_timed_for_plain_runs_alone(tmp_path, monkeypatch, commands):
    """1,000 steps of 30 ms are 1,500 of 20 ms, whatever the runs of effect say: they share a GPU"""
    seen = []
    both = reproduce.Runner.side_by_side

    def side_by_side(self, function, jobs, each):
        seen.append((each, [job[0] for job in jobs]))
        both(self, function, jobs, each)

    monkeypatch.setattr(reproduce.Runner, "side_by_side", side_by_side)
    rows = part(monkeypatch, tmp_path, "plain", "--seeds", "1,2")
    alone = [jobs for each, jobs in seen if each == 1 and jobs]
    assert alone == [["python K0 same steps seed1"], ["python K4 MTP-D alone seed1"]]
    for seed in (1, 2):
        assert flags_of(rows[f"python K0 same time seed{seed}"])["--steps"] == "1500"
        assert rows[f"python K0 same time seed{seed}, loss"]["method"] == "no heads, same time"
    with_times = {name for name, row in rows.items() if "ms_per_step" in row}
    assert with_times == {"python K0 same steps seed1", "python K4 MTP-D alone seed1"}


def test_a_row_that_two_parts_share_keeps_its_machine(tmp_path, monkeypatch, commands):
    path = tmp_path / "results" / "gpu" / "runs.jsonl"
    path.parent.mkdir(parents=True)
    origin = dict(device="another", torch="2.0", python="3.9", commit="old")
    twin = dict(origin, name="python K1 MTP-D seed1", part="effect", text="python", K=1,
                method="MTP-D", seed=1, result={})
    path.write_text(json.dumps(twin) + "\n", encoding="utf-8")
    gpu = ("--scale", "gpu", "--part", "ablation", "--only")
    start(monkeypatch, tmp_path, *gpu, "no such run")
    assert len(tables.read(path)) == 1
    start(monkeypatch, tmp_path, *gpu, "default seed1")
    copy, = [row for row in tables.read(path) if row["part"] == "ablation"]
    assert copy["variant"] == "default" and {key: copy[key] for key in origin} == origin


def test_divergences_of_the_ablation_exist():
    named = [text.split("--kl ")[1].split()[0] for text in reproduce.ABLATION.values()
             if "--kl " in text]
    assert sorted(named) == ["hybrid", "reverse", "tv"] and set(named) <= set(distill.DIVERGENCES)


# -----------------------------------------------------------------------------
# check.py


SEEDS = [1, 2, 3, 4, 5]
HEADER = dict(torch="2", commit="1234567", data_sha256="aa")


def evaluation(shift=0.0):
    """as train.py prints it, of one head"""
    return dict(loss=[4.0 + shift, 4.5], kl=[0.2], ar=[0.7], car=[0.7], tokens_per_forward=1.7)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """a record of five seeds whose main losses are 4.01 .. 4.05, as on another CPU 4.00, and a
    train.py that finds `results` -> (its path, what train.py was called with, results)"""
    path = tmp_path / "check.json"
    calls = []
    results = {seed: evaluation(seed / 100) for seed in SEEDS}

    def trained(seed, flags, work, environment=None):
        calls.append((seed, flags, environment))
        return (evaluation() if environment else results[seed]), dict(HEADER)

    monkeypatch.setattr(check, "train", trained)
    monkeypatch.setattr(check, "record_path", lambda quick: path)
    check.make_record([], True, SEEDS, "work")
    return path, calls, results


def reproduced(monkeypatch, *flags):
    """-> the exit code of reproduce.py --check"""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--check", *flags])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    return end.value.code


def test_a_record_has_every_seed_and_one_of_them_as_on_another_cpu(recorded):
    path, calls, _ = recorded
    assert [seed for seed, *_ in calls] == [*SEEDS, 1]
    assert [environment for *_, environment in calls] == [{}] * 5 + [check.OTHER_CPU]
    assert calls[0][1] == check.TINY + check.QUICK
    record = check.read_record(path)
    assert record["values"]["loss main"] == [4.01, 4.02, 4.03, 4.04, 4.05, 4.0]
    assert list(record["values"]) == [
        "loss main", "loss 1", "KL 1", "AR 1", "CAR 1", "tokens per forward"]
    assert record["seeds"] == SEEDS and record["data_sha256"] == "aa"
    assert (record["commit"], record["torch"]) == ("commit 1234567", "torch 2")


# 0.00 .. 0.05 have a standard deviation of 0.0187: allowed are -0.0561 to 0.1061
@pytest.mark.parametrize("shift, outside", [
    (0.1061, None), (0.1062, "+0.0001"), (-0.0561, None), (-0.0562, "-0.0001"), (math.nan, "+nan")])
def test_the_check_is_outside_beyond_three_standard_deviations_of_the_range(
    shift, outside, recorded, monkeypatch, capsys
):
    _, calls, results = recorded
    results[6] = evaluation(shift)                       # the first seed that is not in the record
    assert reproduced(monkeypatch, "--quick") == (0 if outside is None else 1)
    out = capsys.readouterr().out
    assert calls[-1] == (6, check.TINY + check.QUICK, None)
    assert ("OUTSIDE" in out) == (outside is not None)
    assert outside is None or f"OUTSIDE by {outside}\n" in out
    assert f"{5 if outside else 6} of 6 measures are inside" in out


def test_the_check_hands_flags_on_and_wants_a_new_seed_and_the_same_text(
    recorded, monkeypatch, capsys
):
    _, calls, results = recorded
    results[9] = evaluation(0.03)
    assert reproduced(monkeypatch, "--seed", "9", "--beta", "0") == 0
    assert calls[-1][:2] == (9, [*check.TINY, *check.QUICK, "--beta", "0"])
    monkeypatch.setitem(HEADER, "data_sha256", "bb")
    assert reproduced(monkeypatch, "--seed", "9") == 1
    assert "OUTSIDE: the text is another one" in capsys.readouterr().out
    results[9] = {**evaluation(), "ar": []}
    few = "different seeds, with commas, at least 5"
    for flags, message in (
        (["--seed", "3"], "is one of the record's"), (["--seed", "9"], "--n_mtp"),
        (["--record", "1,2,3,4,5,5"], few), (["--record", "1,2,3,4"], few),
    ):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--check", *flags])
        with pytest.raises(UserError, match=message):
            reproduce.main()


def test_the_checks_flags_without_it_are_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--beta", "0"])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    assert end.value.code == 2 and "go with --check" in capsys.readouterr().err


@pytest.mark.parametrize("option", [
    ("--part", "effect"), ("--only", "seed1"), ("--seeds", "12"), ("--scale", "gpu"),
    ("--parallel", "4"), ("--commit", "abc"), ("--out", "out/mine"),
    ("--seed beside --record", "9", "--seed", "9", "--record", "1,2,3,4,5")])
def test_the_check_takes_no_part(option, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.check, "compare_new_run", None)         # else minutes of training
    monkeypatch.setattr(reproduce.check, "make_record", None)
    given = option[2:] or option
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--check", *given])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    assert end.value.code == 2 and f"without {option[0]}" in capsys.readouterr().err


def test_a_run_of_train_py_is_read(tmp_path, monkeypatch):
    """results from its last line, the rest from its log; what stops it stops the check"""
    script = """
import json, os, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(given["--out"])
out.mkdir(parents=True)
(out / "log.jsonl").write_text('{"torch": "2"}\\n{}\\n')
print("text")
print(json.dumps([given["--seed"], given["--steps"], os.environ["X"]]))
"""
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    result, header = check.train(3, ["--steps", "1"], "work", {"X": "7"})
    assert (result, header) == (["3", "1", "7"], {"torch": "2"})
    with pytest.raises(UserError, match="train.py stopped"):
        check.train(3, ["--steps", "1"], "work", {"X": "7"})             # its folder is there


# -----------------------------------------------------------------------------
# cards.py


@pytest.fixture
def small_card(monkeypatch):
    """-> (a model on the CPU, its config, [GiB of memory], the sizes tried): a pretended GPU of 80
    GiB, where a micro-batch of n windows takes 1 + n / 2 GiB"""
    cfg = train.make_config(dict(
        preset="tiny", n_layer=1, n_head=2, n_embd=16, n_mtp=1, block_size=8, batch_size=30,
        compile="off", steps=10,
    ))
    memory = [80.0]
    tried = []
    step = train.train_step

    def pretend(net, model, optimizer, cfg, at, parts, dtype, grad_function):
        tried.append((len(parts[0]), len(parts)))
        if 1 + len(parts[0]) / 2 > memory[0]:
            model.weight.grad = torch.ones_like(model.weight)             # of a first micro-batch
            raise torch.OutOfMemoryError("pretended")
        return step(net, model, optimizer, cfg, at, parts, dtype, grad_function)

    def limit(share):
        memory[0] = share * 80

    monkeypatch.setattr(train, "train_step", pretend)
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (0, 80 * 2**30))
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", limit)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: (1 + tried[-1][0] / 2) * 2**30)
    monkeypatch.setattr(cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    return train.new_model(cfg, 11), cfg, memory, tried


def test_the_micro_batch_is_halved_until_two_steps_fit(small_card):
    model, cfg, memory, tried = small_card
    before = [p.clone() for p in model.parameters()]
    for gib, size in ((16, 30), (15.9, 15), (8, 6), (3, 3), (2, 1), (1, None)):
        memory[0] = gib
        peak = None if size is None else 1 + size / 2
        assert cards.pick_micro_batch(model, cfg, torch.float32, 30) == (size, peak)
    # whole steps, twice, of two micro-batches where there are two
    assert tried[:2] == [(30, 1)] * 2 and tried[2:5] == [(30, 1), (15, 2), (15, 2)]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))     # nothing learned


def test_flops_are_those_that_pytorch_counts():
    """but for attention: here PyTorch multiplies the masked half, too"""
    cfg = train.make_config(dict(preset="tiny", batch_size=4, block_size=32))
    for K, tolerance in ((0, 1e-9), (2, 0.04)):            # head k has k rows less; not counted
        config = GPTConfig(64, 32, 2, 2, 16, K)
        model = GPT(config)
        tokens = torch.randint(64, (4, 33))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            hidden = model(tokens[:, :-1])
            distill.mtp_loss(hidden, model.weight, tokens[:, 1:])[0].backward()
        flops, _ = cards.count_work(config, cfg, 4, 4)
        masked = 6 * 4 * 32 * (2 + K) * 16 * 32
        assert flops + masked == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_bytes_of_a_step():
    """by hand, for one block without heads: d = 16, V = 64, 4 windows of 32 tokens"""
    cfg = train.make_config(dict(preset="tiny", batch_size=4, block_size=32))
    weights = 12 * 16 * 16 + 64 * 16
    for width, size in ((2, 4), (4, 4), (4, 1)):
        _, moved = cards.count_work(GPTConfig(64, 32, 1, 2, 16, 0), cfg, size, width)
        activations = 128 * width * (3 * 16 * 42 + 5 * 64)
        assert moved == activations + weights * (20 * 4 // size + 28)


def test_the_estimate_takes_the_same_share_of_the_other_cards_peaks():
    # at the peaks 1 + 0.5 s in bf16; it takes 3 s: half
    row = dict(device="NVIDIA H100 80GB HBM3", dtype="bfloat16", flops=989e12, bytes=1675e9,
               s_per_step=3.0, minutes=60.0)
    cards.add_estimates(row)
    assert row["share"] == pytest.approx(0.5) and list(row["estimates"]) == ["RTX 3060", "RTX 4070"]
    ideal = 989 / 25.5 + 1675 / 360
    expected = [20 * 2 * ideal, 60 * 3350 / 360, 60 * 989 / 25.5]
    assert row["estimates"]["RTX 3060"] == pytest.approx(expected)
    row["dtype"] = "float32"
    cards.add_estimates(row)
    assert list(row["estimates"]) == ["T4"] and row["share"] == pytest.approx((989 / 495 + 0.5) / 3)
    for name in ("NVIDIA GeForce RTX 3060 Ti", "Tesla P40"):             # no published peak
        row["device"] = name
        cards.add_estimates(row)
        assert row["share"] is None and row["estimates"] == {}


def test_cards_are_emulated_timed_and_printed(small_card, monkeypatch, capsys):
    _, cfg, memory, _ = small_card
    timed = dict(ms=500.0, peak_gib=1.5, tokens_per_s=7.0, loss="plain")
    monkeypatch.setattr(bench, "time_steps", lambda models, *rest: [timed])
    found = cards.measure([cfg], CPU, [4, 8, 1], 1)
    assert [(r["memory_gb"], r["usable_gib"], r["micro_batch"]) for r in found["fits"]] == [
        (8, pytest.approx(7.28), 6), (4, pytest.approx(3.64), 3), (1, pytest.approx(0.91), None)]
    assert memory == [80]                                                         # lifted again
    fits = cards.measure([cfg], CPU, [8, 0], 1)["fits"]         # 0, the whole GPU, is the largest
    assert [r["memory_gb"] for r in fits] == [0, 8] and fits[0]["micro_batch"] > 6
    (row,) = found["times"]
    assert (row["micro_batch"], row["s_per_step"]) == (6, 1.25)       # on 8 GB: five, two are timed
    out = capsys.readouterr().out
    assert "| 4 GB, emulated: 3.64 GiB | tiny | float32 | 3 | 2.50 |" in out
    assert "does not fit" in out and "T4: about" in out and "ESTIMATES, not measured" in out
    with pytest.raises(UserError, match="--memory_gb is 90"):
        cards.limit_memory(90)
    cards.limit_memory(0)
    assert memory == [pytest.approx(72.8)]                                        # this GPU's own


def test_a_vocabulary_is_that_of_the_presets_tokenizer():
    sizes = {name: cards.vocabulary(train.make_config(dict(preset=name))) for name in train.PRESETS}
    assert sizes["tiny"] == 1024 and sizes["gpt2"] == 50257 and sizes["shakespeare"] == 257


# -----------------------------------------------------------------------------
# plain.py, and its part and table


def test_a_plain_gpt_is_measured_on_the_targets_of_a_model_with_heads(
    tmp_path, monkeypatch, float64
):
    config = GPTConfig(5, 8, 1, 1, 8, 0)
    model = GPT(config)
    for p in model.parameters():
        p.data *= 8 if p.dim() > 1 else 1
    cfg = train.make_config(dict(
        preset="tiny", n_mtp=0, block_size=8, eval_windows=3, device="cpu", dtype="float64"))
    val = np.random.default_rng(0).integers(0, 5, 100).astype(np.uint16)
    save_checkpoint(tmp_path / "ckpt.pt", model, train_config=dataclasses.asdict(cfg))
    monkeypatch.setattr(train, "open_data", lambda cfg: (val, val, {}))
    monkeypatch.setattr(train, "check_data", lambda *args, **options: None)
    windows = np.stack([val[8 * w : 8 * w + 9] for w in range(3)])
    windows = torch.from_numpy(windows.astype(np.int64))   # (3, 9)
    logits = model.all_logits(windows[:, :-1])[0].transpose(1, 2)
    losses = F.cross_entropy(logits, windows[:, 1:], reduction="none")            # (3, 8)
    expected = pytest.approx(losses[:, 3:].mean().item())
    assert plain.measure(tmp_path / "ckpt.pt", 3)["loss"] == [expected]
    heads = GPT(dataclasses.replace(config, n_mtp=2))
    save_checkpoint(tmp_path / "heads.pt", heads, train_config=dataclasses.asdict(cfg))
    with pytest.raises(UserError, match="has 2 heads"):
        plain.measure(tmp_path / "heads.pt", 3)
    for K in (-1, 0, 8):
        with pytest.raises(UserError, match="it must be from 1 to 7"):
            plain.measure(tmp_path / "ckpt.pt", K)


def test_the_run_without_heads_has_the_same_steps_then_the_same_time(tmp_path, monkeypatch, capsys):
    """600 steps of 30 ms with heads are 900 of 20 ms without; the first steps are not counted, for
    they compile"""
    commands = []

    def run(command, **_):
        commands.append(command[1:])
        if command[1] == "train.py":
            out = tmp_path / command[command.index("--out") + 1]
            out.mkdir(parents=True)
            steps = int(command[command.index("--steps") + 1]) if "--steps" in command else 600
            log = [dict(config=dict(steps=steps)), dict(ms=99.0), dict(ms=15.0), dict(ms=25.0),
                   dict(step=steps, val={})]
            (out / "log.jsonl").write_text("\n".join(map(json.dumps, log)), encoding="utf-8")
            (out / "ckpt.pt").write_text("", encoding="utf-8")
        return SimpleNamespace(returncode=0, stdout=json.dumps(dict(loss=[3.0])))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(reproduce, "git_commit", lambda: "1234567")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    runner = reproduce.Runner("tiny", "work", 1)
    args = SimpleNamespace(scale="tiny", seeds=(7,))
    heads = dict(name="toy K4 MTP-D seed7")
    for rows in ([], [heads]):                             # none; one without its time
        runner.rows += rows
        reproduce.plain(args, runner, {"toy": ("toy", "--lr 1")})
        assert [c[0] for c in commands] == ["train.py", "results/plain.py"]
        assert "there is no run of the same time" in capsys.readouterr().out
    heads.update(steps=600, ms_per_step=30.0)
    reproduce.plain(args, runner, {"toy": ("toy", "--lr 1")})
    # the first has a row
    assert [c[0] for c in commands[2:]] == ["train.py", "results/plain.py"]
    for command, steps in ((commands[0], None), (commands[2], "900")):
        flags = dict(zip(command[1::2], command[2::2]))
        assert (flags["--n_mtp"], flags["--seed"], flags["--lr"]) == ("0", "7", "1")
        assert flags.get("--steps") == steps
    row = reproduce.find_row(runner, "toy K0 same time seed7")
    assert (row["steps"], row["ms_per_step"]) == (900, 20.0)


def test_what_heads_cost_is_a_difference_within_a_seed(written):
    rows = []
    for seed in (1, 2):
        for kind, loss, steps in (("steps", 3.0, 600), ("time", 2.9, 900)):
            name = f"toy K0 same {kind} seed{seed}"
            log = row(name, "plain", dict(loss=[9.0]), text="toy", seed=seed)
            rows.append(dict(log, steps=steps, ms_per_step=20.0))
            rows.append(row(f"{name}, loss", "plain", dict(loss=[loss + seed]), text="toy",
                            method=f"no heads, same {kind}", seed=seed))
        heads = effect_row("MTP-D", seed, 3.01 + seed, 0.5)
        rows.append(dict(heads, K=4, steps=600, ms_per_step=30.0))
        rows.append(dict(effect_row("MTP", seed, 3.5 + seed, 0.5), K=1))          # not K = 4
    text, _ = written(rows)
    text = text[text.index("## What heads cost") :]
    assert cells(text, "toy", "MTP-D") == [
        "2", "600 ±0", "30.0 ±0.0", "4.5100 ±0.5000", "0.0100 ±0.0000", "0.1100 ±0.0000"]
    assert cells(text, "toy", "no heads, same time") == [
        "2", "900 ±0", "20.0 ±0.0", "4.4000 ±0.5000", "-0.1000 ±0.0000", "0.0000 ±0.0000"]
    assert "| toy | MTP |" not in text


def test_on_a_gpu_the_time_of_a_step_is_that_of_the_run_alone(written):
    heads = dict(effect_row("MTP-D", 1, 3.0, 0.5), K=4, steps=600)
    loss = row("toy K0 same steps seed1, loss", "plain", dict(loss=[3.1]), text="toy", seed=1,
               method="no heads, same steps")
    alone = row("toy K4 MTP-D alone seed1", "plain", dict(loss=[3.0]), text="toy", seed=1)
    text, _ = written([heads, loss, dict(alone, steps=600, ms_per_step=30.0)])
    text = text[text.index("## What heads cost") :]
    assert cells(text, "toy", "MTP-D")[:3] == ["1", "600 ±0", "30.0"]


def test_cards_have_a_column_per_size_and_estimates_with_bounds(written):
    fits = [dict(preset="small", dtype="bfloat16", memory_gb=gb, micro_batch=size, peak_gib=size)
            for gb, size in ((8, 4), (6, None))]
    timed = dict(preset="small", dtype="bfloat16", device="H100", micro_batch=4, s_per_step=0.05,
                 minutes=1.5, share=0.4, estimates={"T4": [60.0, 20.0, 90.0]})
    unknown = dict(timed, dtype="float32", share=None, estimates={})
    result = dict(fits=fits, times=[timed, unknown])
    text, _ = written([row("cards", "cards", result)])
    assert "| preset | dtype | 6 GB | 8 GB |" in text
    assert "| small | bfloat16 | does not fit | 4 (4.00 GiB) |" in text
    assert cells(text, "small", "bfloat16", "H100") == [
        "4", "0.0500", "1.5", "40%", "60 (20 to 90)"]
    assert cells(text, "small", "float32", "H100") == ["4", "0.0500", "1.5", "", ""]


# -----------------------------------------------------------------------------
# bench.py train


def call_bench(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bench.py", "train", *flags])
    bench.main()


def test_a_training_step_is_timed_in_each_dtype(monkeypatch, capsys):
    flags = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, batch_size=2, vocab_size=11,
                 repeats=1, micro_batch=2, heads=1, top_n=3, compile="off", device="cpu")
    seen = []
    step = train.train_step

    def spy(net, model, optimizer, cfg, at, parts, dtype, grad_function):
        seen.append((dtype, model.weight.dtype))
        return step(net, model, optimizer, cfg, at, parts, dtype, grad_function)

    monkeypatch.setattr(train, "train_step", spy)
    call_bench(monkeypatch, "--json", "--dtype=float32,bfloat16,float64",
               *(f"--{name}={value}" for name, value in flags.items()))
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["dtype"], row["beta"]) for row in table] == [
        (dtype, beta) for dtype in ("float32", "bfloat16", "float64") for beta in (0.0, 0.5)]
    assert list(dict.fromkeys(seen)) == [
        (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64)]


@pytest.mark.parametrize("flags, message", [
    (["--memory_gb=8", "--device=cpu"], "limits the memory of a CUDA GPU; the device is cpu"),
    (["--memory_gb=8", "--heads=2"], "--heads has no effect with --memory_gb"),
    (["--memory_gb=-8"], "it must be sizes in GB"), (["--memory_gb=x"], "it must be numbers"),
    (["--memory_gb=8", "--dtype=float8"], "--dtype is 'float8'"),
    (["--dtype=float8"], "--dtype is 'float8'"),
])
def test_flags_of_the_cards_that_are_wrong(flags, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        call_bench(monkeypatch, *flags)


def test_the_cards_get_their_flags(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(bench, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(cards, "measure", lambda *arguments: given.append(arguments))
    call_bench(monkeypatch, "--memory_gb=6,8", "--preset=small", "--dtype=float32,bfloat16",
               "--fast=off", "--n_layer=3", "--repeats=7")
    ((cfgs, device, sizes, repeats),) = given
    assert [(cfg.dtype, cfg.preset, cfg.fast, cfg.n_layer) for cfg in cfgs] == [
        ("float32", "small", "off", 3), ("bfloat16", "small", "off", 3)]
    assert (device.type, sizes, repeats) == ("cuda", [6, 8], 7)


def test_a_part_of_cost_without_a_table_prints_its_rows(monkeypatch, capsys):
    from results import cost
    monkeypatch.setitem(cost.PARTS, "shapes", ("rounds", lambda device, dtype: [dict(ms=1.0)]))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["cost.py", "shapes"])
    cost.main()
    assert json.loads(capsys.readouterr().out) == {"rounds": [{"ms": 1.0}]}
