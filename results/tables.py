"""
tables.py: tables.md and the figures of a scale, from its runs.jsonl. Called by reproduce.py, or
alone:

    python results/tables.py gpu
"""

import json
import re
import statistics
import sys
from pathlib import Path


def spread(values, scale=1, digits=3):
    """mean and half the range over seeds, as text"""
    if not values:
        return ""
    text = f"{statistics.mean(values) * scale:.{digits}f}"
    if len(values) > 1:
        text += f" ±{(max(values) - min(values)) / 2 * scale:.{digits}f}"
    return text


def ranged(values, scale=1, digits=2):
    """mean and range over seeds, as text"""
    if not values:
        return ""
    mean, low, high = [f"{v * scale:.{digits}f}"
                       for v in (statistics.mean(values), min(values), max(values))]
    return f"{mean} ({low} .. {high})" if len(values) > 1 else mean


def group(rows, parts, *keys):
    """rows of a part, or of several, with a result, by their labels; of a run that was made again
    on the same device, the last"""
    parts = (parts,) if isinstance(parts, str) else parts
    last = {(row.get("name", i), row.get("device")): row for i, row in enumerate(rows)}
    groups = {}
    for row in last.values():
        if row.get("part") in parts and all(k in row for k in keys):
            groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    return groups


def markdown(title, head, lines):
    if not lines:
        return ""
    out = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for line in lines:
        out.append("| " + " | ".join(map(str, line)) + " |")
    return "\n".join(out) + "\n\n"


def column(runs, measure, scale=1, digits=3):
    """spread of a measure of the runs' results"""
    return spread([measure(row["result"]) for row in runs], scale, digits)


def paired(groups, key, other, measure):
    """differences to the runs of `other` with the same seed, in the order of the seeds. From one
    GPU to another, losses differ by more than what is compared: these are left out"""
    def same(row):
        return row["seed"], row["device"], row["torch"]

    base = {same(row): measure(row) for row in groups.get(other, [])}
    runs = sorted(groups[key], key=lambda row: row["seed"])
    return [measure(row) - base[same(row)] for row in runs if same(row) in base]


def main_loss(row):
    return row["result"]["loss"][0]


def first_head_loss(row):
    return row["result"]["loss"][1]


def first_ar(row):
    return row["result"]["ar"][0]


TRAINED = ("effect", "deep", "undetached", "gpt2")


def trained(rows):
    """{(text, K, method): the rows of the models that were trained whole}"""
    return group(rows, TRAINED, "text", "K", "method")


def effect_table(rows):
    groups = trained(rows)
    lines = []
    for text, K, method in sorted(groups):
        runs = groups[text, K, method]
        difference = own = ""
        if method != "MTP":
            pair = (text, K, method), (text, K, "MTP")
            difference = spread(paired(groups, *pair, main_loss), digits=4)
            own = ", ".join(f"{v:+.3f}" for v in paired(groups, *pair, first_head_loss))
        lines.append([
            text, K, method, len(runs), column(runs, lambda r: r["loss"][0], digits=4), difference,
            column(runs, lambda r: r["ar"][0], 100, 2),
            column(runs, lambda r: r["car"][-1], 100, 2),
            column(runs, lambda r: r["tokens_per_forward"]), own,
        ])
    head = ["text", "K", "method", "seeds", "main head's val loss", "difference to MTP, same seed",
            "AR_1 %", "CAR_K %", "tokens per forward, from CAR",
            "head 1's own loss, to MTP, each seed"]
    return markdown("MTP against MTP-D (mean over seeds ± half their range)", head, lines)


def plain_table(rows):
    """what heads cost the main head: K = 4 beside GPTs without heads, all on the same targets"""
    effect = group(rows, "effect", "text", "K", "method")
    heads = {(text, method): runs for (text, K, method), runs in effect.items() if K == 4}
    bare = group(rows, "plain", "text", "method")
    facts = {row["name"]: row for row in rows if row.get("part") == "plain"}
    lines = []
    for text in sorted({text for text, _ in bare}):
        groups = {**bare, **heads}
        steps, time = [(text, f"no heads, same {kind}") for kind in ("steps", "time")]
        for key in (steps, time, (text, "MTP"), (text, "MTP-D")):
            runs = groups.get(key, [])
            if not runs:
                continue
            logs = [facts.get(row["name"].removesuffix(", loss"), row) for row in runs]
            if key in heads and key[1] == "MTP-D":         # on a GPU, one more alone says the time
                logs += [row for name, row in facts.items() if f"{text} K4 MTP-D alone" in name]
            ms = [log["ms_per_step"] for log in logs if "ms_per_step" in log]
            lines.append([
                *key, len(runs), spread([log["steps"] for log in logs if "steps" in log], digits=0),
                spread(ms, digits=1),
                spread(list(map(main_loss, runs)), digits=4),
                spread(paired(groups, key, steps, main_loss), digits=4),
                spread(paired(groups, key, time, main_loss), digits=4),
            ])
    head = ["text", "model", "seeds", "steps", "ms per step", "main head's val loss",
            "to no heads, same steps, same seed", "to no heads, same time, same seed"]
    return markdown("What heads cost the main head: K = 4, and no heads (targets 4 .. T-1)", head,
                    lines)


def ablation_table(rows):
    out = ""
    everything = group(rows, "ablation", "text", "variant")
    for text in sorted({text for text, _ in everything}):
        groups = {variant: runs for (t, variant), runs in everything.items() if t == text}
        lines = []
        for variant, runs in groups.items():
            loss = paired(groups, variant, "MTP", main_loss)
            ar = paired(groups, variant, "MTP", first_ar)
            lines.append([
                variant, len(runs), column(runs, lambda r: r["loss"][0], digits=4),
                spread(loss, digits=4), column(runs, lambda r: r["ar"][0], 100, 2),
                spread(ar, 100, 2),
            ])
        head = ["variant", "seeds", "main head's val loss", "to MTP", "AR_1 %", "to MTP, points"]
        out += markdown(f"Ablation at K = 1, {text} (differences to MTP with the same seed)",
                        head, lines)
    return out


def nanogpt_table(rows):
    """the lowest validation loss of each run of the part nanogpt that has its curve"""
    runs = [row for row in rows if row.get("part") == "nanogpt" and "val" in row["result"]]
    lines = []
    for row in runs:
        val, step = min(zip(row["result"]["val"], row["result"]["step"]))
        lines.append([row["name"], val, step, row["result"]["step"][-1], row["device"]])
    return markdown("TinyShakespeare by bytes (nanoGPT's published loss: 1.4697)",
                    ["run", "lowest val loss", "at step", "last step measured", "device"], lines)


LOOPED = ("extend", "deep", "undetached")


def extend_table(rows):
    lines = []
    for (text, n, method), runs in sorted(group(rows, LOOPED, "text", "n", "method").items()):
        half = n // 2
        for stage, name in (("before", "copied"), ("after", "trained")):
            car = [r["result"][stage]["car"] for r in runs]
            lines.append([
                text, f"{half} -> {n}", method, name, len(runs),
                spread([c[half] for c in car], 100, 2), spread([c[-1] for c in car], 100, 2),
                spread([1 + sum(c) for c in car]),
            ])
    head = ["text", "heads", "method", "new heads", "seeds", "CAR of the first new head %",
            "CAR of the last %", "tokens per forward, from CAR"]
    return markdown("Looped extension", head, lines)


def pilot_table(rows):
    """the paper's pilot: one head, copied without training"""
    paper = {"MTP": "0.6", "MTP-D": "26.7"}
    lines = []
    for (text, n, method), runs in sorted(group(rows, "pilot", "text", "n", "method").items()):
        car = [row["result"]["before"]["car"] for row in runs]
        lines.append([text, f"1 -> {n}", method, len(runs),
                      *[ranged([c[k - 1] for c in car], 100) for k in (1, 2, 3, 4, n)],
                      ranged([1 + sum(c) for c in car]), paper[method]])
    head = ["text", "heads", "method", "seeds", "CAR_1 %", "CAR_2 %", "CAR_3 %", "CAR_4 %",
            "CAR of the last %", "tokens per forward, from CAR", "paper's CAR_3 % (AGIEval)"]
    return markdown("Pilot: one head copied, no training (mean, range over seeds)", head, lines)


# -----------------------------------------------------------------------------
# in the paper's unit: over a model that was trained with one head, by plain MTP

PAPER = {4: 2.07, 8: 3.05, 16: 3.20}                       # heads of MTP-D -> its "speedup"
# 4 heads of MTP-D over 4 of MTP: as stated, and what its own CARs give
PAPER_OVER_MTP = "1.23, from its CARs 1.04"
CHECKPOINT = re.compile(r"(.+)_K(\d+)_(MTP|MTP-D|undetached)_seed(\d+)(-\d+)?")
OWN_TEXT = ("greedy", "no loops", "T = 1")                 # as bench.py accept calls it
GIVEN = "given"                                            # validation text, there
VALIDATION = "from CAR"                                    # the same, by the evaluation of train.py


def model_of(row, result):
    """what a row measured -> (its text, K, method, seed); None for what is no model of effect, deep
    or undetached. Folders are called python_deep_K4_MTP-D_seed1-16"""
    folder = Path(result["checkpoint"].replace("\\", "/")).parent.name
    found = CHECKPOINT.fullmatch(folder)
    if found is None:
        return None
    text, K, method, seed, _ = found.groups()
    return row.get("text", text.replace("_", " ")), int(K), method, int(seed)


def key_of(model, heads):
    """("one", 1) for the model that was trained with one head by MTP, which others are compared
    with, (method, heads) for others with more heads; else None"""
    _, K, method, _ = model
    if K == 1:
        return ("one", 1) if (method, heads) == ("MTP", 1) else None
    return method, heads


def put(values, kind, model, heads, value):
    """values[text, kind][key_of][seed] = value"""
    key = key_of(model, heads)
    if key:
        text, _, _, seed = model
        values.setdefault((text, kind), {}).setdefault(key, {})[seed] = value


def tokens_per_forward(rows):
    """{(text, kind): {key_of: {seed: tokens per forward}}}"""
    values = {}
    for (text, K, method), runs in trained(rows).items():
        for row in runs:
            for heads in sorted({1, 2, 4, K} & set(range(1, K + 1))):
                put(values, VALIDATION, (text, K, method, row["seed"]), heads,
                    1 + sum(row["result"]["car"][:heads]))
    for (text, n, method), runs in group(rows, LOOPED, "text", "n", "method").items():
        for row in runs:
            put(values, VALIDATION, (text, 4, method, row["seed"]), n,
                1 + sum(row["result"]["after"]["car"]))
    for row in rows:
        for checkpoint in row["result"] if row.get("part") == "accept" else ():
            model = model_of(row, checkpoint)
            for r in checkpoint["acceptance"] if model else ():
                put(values, r["text"], model, r["heads"], r["tokens_per_forward"])
    return values


def clock(rows):
    """{(text, temperature): {key_of: {seed: dict}}}: tokens per second over those of the model with
    one head that was timed beside it, and the time of a round over its. Of several timings, the one
    with the most prompts that don't loop; in one row, the first: of the model with the fewest heads
    """
    values = {}
    for row in rows:
        if row.get("part") not in ("speed", "undetached") or not isinstance(row["result"], list):
            continue
        beside = {}                                        # -> {key_of: a dict of bench.py decode}
        for r in row["result"]:
            model = model_of(row, r)
            alone = r["batch"] == 1 and not r.get("kind")
            if model and alone and r["heads"] and key_of(model, r["heads"]):
                text, _, _, seed = model
                own = beside.setdefault((text, r["temperature"], seed), {})
                own.setdefault(key_of(model, r["heads"]), r)
        for (text, temperature, seed), own in beside.items():
            one = own.pop(("one", 1), None)
            for key, r in own.items() if one else ():
                seeds = values.setdefault((text, temperature), {}).setdefault(key, {})
                used = r["prompts"] - r["looping"]
                if used >= seeds.get(seed, {}).get("used", 0):
                    ms = r["ms_round"] and r["ms_round"] / one["ms_round"]
                    speed = r["tokens_per_s"] / one["tokens_per_s"]
                    seeds[seed] = dict(used=used, over_one=speed, round=ms)
    return values


def over_one(values):
    """{key_of: {seed: number}} -> {(method, heads): numbers over those of the model with one head,
    by seed}"""
    one = values.get(("one", 1), {})
    result = {}
    for key, seeds in values.items():
        ratios = {seed: seeds[seed] / one[seed] for seed in sorted(seeds) if seed in one}
        if ratios and key != ("one", 1):
            result[key] = ratios
    return result


def in_papers_unit(rows):
    """{text: {column of the table: {(method, heads): a number for each seed}}}"""
    result = {}
    forwards = {key: over_one(values) for key, values in tokens_per_forward(rows).items()}
    for (text, kind), values in forwards.items():
        lists = {key: list(seeds.values()) for key, seeds in values.items()}
        result.setdefault(text, {})[kind] = lists
    for (text, temperature), values in clock(rows).items():
        columns = result.setdefault(text, {})
        for key, seeds in values.items():
            order = sorted(seeds)
            speeds = [seeds[seed]["over_one"] for seed in order]
            columns.setdefault(("clock", temperature), {})[key] = speeds
            if temperature > 0:
                continue
            columns.setdefault("used", {})[key] = [seeds[seed]["used"] for seed in order]
            tokens = forwards.get((text, "greedy"), {}).get(key, {})
            both = [seed for seed in order if seed in tokens and seeds[seed]["round"]]
            computed = [tokens[seed] / seeds[seed]["round"] for seed in both]
            if computed:
                columns.setdefault(("clock", "loops"), {})[key] = computed
    return result


PAPER_COLUMNS = {
    "greedy": "own greedy text", "no loops": "own greedy text that does not loop",
    "T = 1": "own text, T = 1", GIVEN: "validation text",
    VALIDATION: "validation text, 1 + sum of CAR",
    ("clock", "loops"): "clock, greedy: tokens per forward, loops included, over the time of a "
                        "round",
    "used": "prompts that don't loop", ("clock", 0): "clock, greedy, on these",
    ("clock", 0.7): "clock, T = 0.7",
    ("clock", 1): "clock, T = 1",
}


def in_order(key):
    method, heads = key
    return method, 99 if heads == "auto" else heads


def seed_counts(cells):
    """how many seeds these lists hold: "3", or "1 to 3" where they differ"""
    counts = sorted({len(cell) for cell in cells if cell})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def paper_table(rows):
    lines = []
    for text, columns in sorted(in_papers_unit(rows).items()):
        keys = {key for values in columns.values() for key in values}
        for method, heads in sorted(keys, key=in_order):
            cells = [columns.get(name, {}).get((method, heads), []) for name in PAPER_COLUMNS]
            paper = ""
            if method == "MTP-D" and heads in PAPER:
                paper = f"{PAPER[heads]:.2f}"
            shown = [ranged(cell, digits=0 if name == "used" else 2)
                     for name, cell in zip(PAPER_COLUMNS, cells)]
            lines.append([text, method, heads, paper, seed_counts(cells), *shown])
    head = ["text", "method", "heads", "paper", "seeds", *PAPER_COLUMNS.values()]
    return markdown("In the paper's unit: tokens per forward, and per second, over those of a "
                    "model trained with 1 head by MTP, same seed (mean, range)", head, lines)


def over_mtp_table(rows):
    """MTP-D over MTP with as many heads"""
    texts = (*OWN_TEXT, GIVEN, VALIDATION)
    found = {}
    for (text, kind), values in tokens_per_forward(rows).items():
        for (method, heads), seeds in values.items():
            plain = values.get(("MTP", heads), {})
            both = sorted(set(seeds) & set(plain))
            ratios = [seeds[seed] / plain[seed] for seed in both]
            if method == "MTP-D" and heads > 1 and ratios:
                found.setdefault((text, heads), {})[kind] = ratios
    lines = []
    for (text, heads), kinds in sorted(found.items()):
        cells = [kinds.get(kind, []) for kind in texts]
        lines.append([text, heads, PAPER_OVER_MTP if heads == 4 else "", seed_counts(cells),
                      *[ranged(cell, digits=3) for cell in cells]])
    head = ["text", "heads", "paper", "seeds",
            *[PAPER_COLUMNS[kind] for kind in texts]]
    return markdown("Tokens per forward of MTP-D over those of MTP with as many heads, same seed "
                    "(mean, range)", head, lines)


# -----------------------------------------------------------------------------


def round_costs(rows):
    """the costs of a greedy round in ordinary steps, as measured in "speed python"
    -> {heads: list, an entry per checkpoint}"""
    plain = {}
    costs = {}
    for row in rows:
        for r in row["result"] if row["name"] == "speed python" else ():
            if r["temperature"] == 0 and r["heads"] != "auto":
                plain.setdefault(r["checkpoint"], r["ms_round"])       # heads 0 comes first
                costs.setdefault(r["heads"], []).append(r["ms_round"] / plain[r["checkpoint"]])
    return costs


def loop_speed_table(rows):
    """what 1 + sum CAR and the measured cost of a greedy round make of every model: weights hardly
    change the cost"""
    costs = round_costs(rows)
    cost = {heads: statistics.median(ratios) for heads, ratios in costs.items()}
    runs = {}                                              # -> expected tokens per forward
    for row in rows:
        result = row["result"]
        if row.get("part") == "effect":
            runs[row["text"], row["K"], row["method"], row["seed"]] = 1 + sum(result["car"])
        if row.get("part") == "extend":
            car = result["after"]["car"]
            runs[row["text"], row["n"], row["method"], row["seed"]] = 1 + sum(car)
    lines = []
    for text, n, method in sorted({key[:3] for key in runs}):
        same = [key[3] for key in runs if key[:3] == (text, n, method)]
        seeds = [seed for seed in same if (text, 1, "MTP", seed) in runs]
        if n not in cost or 1 not in cost or not seeds:
            continue
        speed = [runs[text, n, method, seed] / cost[n] for seed in seeds]
        first = [runs[text, 1, "MTP", seed] / cost[1] for seed in seeds]
        lines.append([
            text, n, method, len(seeds),
            f"{cost[n]:.2f} ({min(costs[n]):.2f} to {max(costs[n]):.2f})", spread(speed, digits=2),
            spread([a / b for a, b in zip(speed, first)], digits=2),
        ])
    head = ["text", "heads", "method", "seeds",
            "a round, in plain steps: median (range over checkpoints)",
            "vs plain (± CAR over seeds)", "vs 1-head MTP, same seed"]
    return markdown("Speed expected of every model: 1 + sum CAR, over the cost of a greedy round "
                    "as measured in \"speed python\"", head, lines)


def pretrained_table(rows):
    """heads for a frozen model: decoding of its prompts, all of them and by kind"""
    found = {}                                             # -> {temperature: list of dicts}
    for row in rows:
        if row.get("part") == "pretrained" and row["name"].startswith("speed"):
            name = re.sub(r"^speed | seed\d+", "", row["name"])
            for r in row["result"]:
                if r["heads"]:
                    key = name, r["kind"] or "all"
                    found.setdefault(key, {}).setdefault(r["temperature"], []).append(r)
    lines = []
    for (name, kind), by_temperature in found.items():
        cells = []
        for temperature in (0.0, 1.0):
            same = by_temperature.get(temperature, [])
            cells += [ranged([r[key] for r in same]) for key in ("tokens_per_forward", "speedup")]
        first = next(iter(by_temperature.values()))
        loops = ", ".join(str(r["looping"]) for r in first)
        lines.append([name, kind, len(first), f"{loops} of {first[0]['prompts']}", *cells])
    head = ["heads", "prompts", "seeds", "repetitive, excluded", "tokens per forward, greedy",
            "vs plain, greedy", "tokens per forward, T = 1", "vs plain, T = 1"]
    return markdown("Heads for a frozen, pretrained model (mean, range)", head, lines)


def speed_line(r):
    predicted = ""
    ms = ""
    if r["heads"] != "auto":                               # else it has no round of its own
        predicted = f"{r['predicted_speedup']:.2f}"
        ms = f"{r['ms_round']:.3f}"
    return [Path(r["checkpoint"]).parent.name, r["temperature"], r["batch"], r["heads"],
            f"{r['tokens_per_forward']:.2f}", f"{r['tokens_per_s']:.0f}", f"{r['speedup']:.2f}",
            predicted, f"{r['over_one']:.2f}" if r["over_one"] else "", ms,
            f"{r['looping']}/{r['prompts'] // r['batch']}"]


def speed_table(rows):
    head = ["checkpoint", "temperature", "batch", "heads", "tokens per forward", "tokens/s",
            "vs plain", "predicted", "vs 1 head", "ms per round", "repetitive, excluded"]
    out = ""
    for row in rows:
        result = row["result"]
        if row.get("part") in ("speed", "undetached") and isinstance(result, list):
            out += markdown(f"Decoding: {row['name']}, {row['device']}", head,
                            [speed_line(r) for r in result if not r.get("kind")])
        if row["name"].startswith("check"):
            tied = [d["gap"] <= 4 * d["rounding"] for d in result["differences"]]
            rest = ""
            if tied and all(tied):
                rest = "; the others differ where two tokens are nearly tied"
            out += (f"`{row['command']}`: {result['same']} of {result['prompts']} greedy "
                    f"continuations identical{rest}.\n\n")
    return out


def entropy_runs(rows):
    """{(text, K): {method: {seed: [head 1, head K]}}} and the bins' edges"""
    runs, edges = {}, []
    groups = group(rows, "entropy", "text", "K", "method")
    for (text, K, method), group_rows in sorted(groups.items()):
        methods = runs.setdefault((text, K), {})
        for row in group_rows:
            (result,) = row["result"]
            methods.setdefault(method, {})[row["seed"]] = result["heads"]
            edges = result["edges"]
    return runs, edges


def in_bin(runs, head, key, b):
    """{seed: value of bin b}; seeds without a position in the bin are left out"""
    values = {seed: heads[head][key][b] for seed, heads in runs.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def entropy_lines(pair, edges, columns):
    """pair: {seed: heads} of MTP and of MTP-D -> the lines of their table, a line per bin"""
    plain, distilled = pair
    lines = []
    for b, edge in enumerate(edges):
        counts = [heads[0]["count"] for own in pair for heads in own.values()]
        shares = [count[b] / sum(count) for count in counts]
        if not sum(shares):
            continue
        before = in_bin(plain, 0, "accepted", b)
        after = in_bin(distilled, 0, "accepted", b)
        difference = [after[seed] - before[seed] for seed in after if seed in before]
        line = [f"{edge:g} to {edges[b + 1]:g}" if b + 1 < len(edges) else f"from {edge:g}"]
        for values in (shares, before.values(), after.values(), difference):
            line.append(spread(list(values), 100, 1))
        for head, key in columns:
            for own in pair:
                line.append(spread(list(in_bin(own, head, key, b).values()), 100, 1))
        lines.append(line)
    return lines


def entropy_table(rows):
    out = ""
    runs, edges = entropy_runs(rows)
    for (text, K), methods in runs.items():
        pair = [methods.get("MTP", {}), methods.get("MTP-D", {})]
        columns = [(0, "overlap")]
        names = ["1 - TV of head 1 %"]
        if K > 1:
            columns += [(-1, "accepted"), (-1, "overlap")]
            names += [f"AR_{K} %", f"1 - TV of head {K} %"]
        head = ["entropy, nats", "of the positions %", "AR_1 %, MTP", "AR_1 %, MTP-D",
                "to MTP, same seed, points"]
        for name in names:
            head += [f"{name}, MTP", f"{name}, MTP-D"]
        seeds = max(map(len, pair))
        out += markdown(f"Acceptance by the main head's entropy: {text}, K = {K} "
                        f"(mean over {seeds} seeds ± half their range)", head,
                        entropy_lines(pair, edges, columns))
    return out


def cost_table(rows):
    out = ""
    for row in rows:
        if row.get("part") == "cost":
            for title, lines in row["result"].items():
                if lines:
                    head = list(lines[0])
                    cells = [[shorter(line[k]) for k in head] for line in lines]
                    out += markdown(f"Cost: {title} ({row['device']})", head, cells)
    return out


def cards_table(rows):
    fits = {}
    times = []
    for row in rows:
        if row.get("part") == "cards":
            for r in row["result"]["fits"]:
                cell = "does not fit"
                if r["micro_batch"]:
                    cell = f"{r['micro_batch']} ({r['peak_gib']:.2f} GiB)"
                fits.setdefault((r["preset"], r["dtype"]), {})[r["memory_gb"]] = cell
            times += row["result"]["times"]
    sizes = sorted({size for own in fits.values() for size in own})
    lines = [[*key, *(own.get(size, "") for size in sizes)] for key, own in fits.items()]
    out = markdown("Cards, emulated: micro_batch that fits, and peak memory",
                   ["preset", "dtype", *(f"{size:g} GB" for size in sizes)], lines)
    names = sorted({card for r in times for card in r["estimates"]})
    lines = []
    for r in times:
        line = [r["preset"], r["dtype"], r["device"], r["micro_batch"], f"{r['s_per_step']:.4f}",
                f"{r['minutes']:.1f}", "" if r["share"] is None else f"{r['share']:.0%}"]
        for name in names:
            minutes, low, high = r["estimates"].get(name, [None] * 3)
            line.append("" if minutes is None else f"{minutes:.0f} ({low:.0f} to {high:.0f})")
        lines.append(line)
    head = ["preset", "dtype", "measured on", "micro_batch", "s per step", "minutes of training",
            "share of its peaks", *(f"{name}, estimated minutes (bounds)" for name in names)]
    return out + markdown("The time of training, and an estimate for other cards", head, lines)


def shorter(x):
    if isinstance(x, (int, float)) and x >= 10000:
        return f"{x:,.0f}"
    return f"{x:.4g}" if isinstance(x, float) else "" if x is None else x


# -----------------------------------------------------------------------------


COLOUR = {"MTP": "#777777", "MTP-D": "#d1495b"}
LINES = {"greedy": "-", "no loops": "--", "T = 1": ":", VALIDATION: "-."}


def canvas(plt, panels=1, lines=1):
    """-> (figure, list of axes); one panel is 640 x 400 pixels, two side by side are 1000 x 400"""
    width = 5.33 if panels == 1 else 4.17 * panels
    fig, axes = plt.subplots(lines, panels, figsize=(width, 3.33 * lines), squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return fig, list(axes.flat)


def car_figure(plt, rows):
    groups = group(rows, "effect", "text", "K", "method")
    texts = sorted({text for text, K, _ in groups if K == 4})
    if not texts:
        return None
    fig, axes = canvas(plt, len(texts))
    for ax, text in zip(axes, texts):
        for method in COLOUR:
            for i, run in enumerate(groups.get((text, 4, method), [])):
                car = [100 * x for x in run["result"]["car"]]
                ax.plot(range(1, len(car) + 1), car, "o-", color=COLOUR[method], alpha=0.7, lw=1.2,
                        ms=4, label=method if i == 0 else None)
        ax.set(title=f"{text}, K = 4: one line per seed", xlabel="head k",
               ylabel="CAR_k: drafts 1..k accepted, %", xticks=range(1, 5), ylim=(0, None))
        ax.legend(frameon=False)
    return fig


def tradeoff_figure(plt, rows):
    everything = group(rows, "ablation", "text", "variant")
    if not everything:
        return None
    text = max((text for text, _ in everything), key=lambda t: t == "prose")
    points = {}
    for t, variant in everything:
        if t == text:
            ar = paired(everything, (t, variant), (t, "MTP"), first_ar)
            loss = paired(everything, (t, variant), (t, "MTP"), main_loss)
            if ar:
                points[variant] = [100 * statistics.mean(ar), statistics.mean(loss)]
    fig, (ax,) = canvas(plt)
    points = sorted((*xy, variant) for variant, xy in points.items())
    # the names stand in a column on the right, in the points' order
    arrow = dict(arrowstyle="-", color="#bbbbbb", lw=0.5, shrinkA=1, shrinkB=3, relpos=(0, 0.5))
    for i, (y, x, variant) in enumerate(points):
        colour = COLOUR["MTP" if variant == "MTP" else "MTP-D"]
        ax.plot(x, y, "o", ms=5, color=colour)
        ax.annotate(variant, (x, y), xytext=(1.03, (i + 0.5) / len(points)), fontsize=7,
                    textcoords="axes fraction", va="center", color=colour, arrowprops=arrow,
                    annotation_clip=False)
    ax.set(title=f"{text}, K = 1: differences to MTP", ylabel="AR_1, points (up: better)",
           xlabel="main head's validation loss, nats (left: better)")
    ax.margins(x=0.1, y=0.08)
    return fig


def speed_figure(plt, rows):
    groups = {}
    for row in rows:
        if row.get("part") != "speed" or not isinstance(row["result"], list):
            continue
        name = re.sub(r" seed\d+$", "", row["name"])
        for r in row["result"]:
            if r["batch"] == 1 and r["temperature"] == 1 and r["heads"] != "auto":
                groups.setdefault(name, {}).setdefault(r["checkpoint"], []).append(r)
    if not groups:
        return None
    fig, axes = canvas(plt, 2, len(groups))
    for n, (name, checkpoints) in enumerate(groups.items()):
        left, right = axes[2 * n : 2 * n + 2]
        for i, (path, mine) in enumerate(checkpoints.items()):
            mine = sorted(mine, key=lambda r: r["heads"])
            x, style = [r["heads"] for r in mine], dict(color=f"C{i}", lw=1.2)
            label = Path(path).parent.name.replace("_", " ")
            left.plot(x, [r["tokens_per_forward"] for r in mine], "o-", ms=4, label=label, **style)
            right.plot(x, [r["speedup"] for r in mine], "o-", ms=4, **style)
            right.plot(x, [r["predicted_speedup"] for r in mine], ":", **style)
        right.plot([], [], "ko-", lw=1.2, ms=4, label="measured")
        right.plot([], [], "k:", lw=1.2, label="predicted from CAR and times")
        right.axhline(1, color="#cccccc", lw=1, zorder=0)
        left.set(title=f"{name}: temperature 1, batch 1", ylabel="tokens per forward")
        right.set(title="wall-clock speed-up", ylabel="speed-up over ordinary decoding")
        for ax in (left, right):
            ax.set(xlabel="heads that draft")
            ax.set_xticks(sorted({r["heads"] for mine in checkpoints.values() for r in mine}))
            ax.legend(fontsize=7, frameon=False)
    return fig


def entropy_figure(plt, rows):
    runs, edges = entropy_runs(rows)
    if not runs:
        return None
    fig, axes = canvas(plt, len(runs))
    ends = [*edges[1:], edges[-1] + 1]          # the last bin is open; ln V is seldom much more
    for ax, ((text, K), methods) in zip(axes, runs.items()):
        counts = [heads[0]["count"] for seeds in methods.values() for heads in seeds.values()]
        shares = []
        for b in range(len(edges)):
            shares.append(statistics.mean(100 * count[b] / sum(count) for count in counts))
        widths = [high - low for low, high in zip(edges, ends)]
        ax.bar(edges, shares, widths, align="edge", color="#ececec", edgecolor="white",
               label="share of the positions", zorder=0)
        for method in COLOUR:
            entropy_curves(ax, method, methods.get(method, {}), len(edges))
        right = max(end for end, share in zip(ends, shares) if share)
        ax.set(title=f"{text}, K = {K}: head 1, mean and range of the seeds", ylim=(0, 103),
               xlim=(0, right), ylabel="drafts accepted, %",
               xlabel="entropy of the main head's distribution, nats")
        ax.legend(fontsize=7, frameon=False, loc="center left")
    return fig


def entropy_curves(ax, method, runs, bins):
    """two lines of one method, {seed: heads}, with the range of the seeds"""
    for key, line, what in (("accepted", "o-", "argmax"), ("overlap", ":", "sampled")):
        x = []
        y = []
        for b in range(bins):
            values = [100 * v for v in in_bin(runs, 0, key, b).values()]
            if values:
                x.append(statistics.mean(in_bin(runs, 0, "entropy", b).values()))
                y.append(values)
        if x:
            ax.plot(x, [statistics.mean(v) for v in y], line, color=COLOUR[method], lw=1.2, ms=3.5,
                    label=f"{method}, {what}")
            ax.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=COLOUR[method],
                            alpha=0.2, lw=0)


def cost_groups(rows):
    """{(title, device): lines} of the training steps that were timed with and without heads; a
    later row stands for an earlier one"""
    groups = {}
    for row in rows:
        for title, lines in row["result"].items() if row.get("part") == "cost" else ():
            lines = [line for line in lines if "n_mtp" in line]
            heads = [line["n_mtp"] for line in lines]
            if 0 in heads and any(heads):
                groups[title, row["device"]] = lines
    return groups


def cost_figure(plt, rows):
    groups = cost_groups(rows)
    if not groups:
        return None
    fig, axes = canvas(plt, len(groups))
    kinds = (("ms", "o", "full", "time"), ("peak_gib", "s", "none", "peak memory"))
    for ax, ((title, device), lines) in zip(axes, groups.items()):
        for key, marker, fill, what in kinds:
            base = [line[key] for line in lines if line["n_mtp"] == 0]
            if None in base:
                continue
            for method in COLOUR:
                own = [line for line in lines if (line["beta"] > 0) == (method == "MTP-D")]
                points = sorted((line["n_mtp"], line[key] / statistics.mean(base)) for line in own)
                if points:
                    ax.plot(*zip(*points), marker, ls="-" if method == "MTP" else "", ms=5, lw=0.8,
                            fillstyle=fill, color=COLOUR[method], label=f"{method}, {what}")
        ax.set(xlabel="MTP heads K", ylabel="a training step, over that of K = 0",
               xticks=sorted({line["n_mtp"] for line in lines}), ylim=(0, None))
        ax.set_title(f"{title} ({device})", fontsize=9)
        ax.legend(fontsize=7, frameon=False)
    return fig


def paper_figure(plt, rows):
    """over a model with one head, by the number of heads: tokens per forward and the clock, after
    problems of another source (the former else after validation text)"""
    unit = in_papers_unit(rows)
    clocks = unit.get("python deep, unseen code", {})
    columns, text = clocks, "; unseen code"
    if not any(clocks.get(kind) for kind in OWN_TEXT):
        columns, text = unit.get("python deep", {}), ""
    if not any([*columns.values(), *clocks.values()]):
        return None
    fig, (left, right) = canvas(plt, 2)
    kinds = [kind for kind in OWN_TEXT if columns.get(kind)] or [VALIDATION]
    for kind in kinds:
        for method in COLOUR:
            range_line(left, columns.get(kind, {}), method, LINES[kind],
                       f"{method}, {PAPER_COLUMNS[kind]}")
    left.plot(list(PAPER), list(PAPER.values()), "k*", ms=9, ls="", label='the paper\'s "speedup"')
    for name, kind, label in (
        ("loops", "greedy", "greedy, with texts that loop, computed"),
        (0, "no loops", "greedy, without these"), (1, "T = 1", "temperature 1"),
    ):
        range_line(right, clocks.get(("clock", name), {}), "MTP-D", LINES[kind],
                   f"MTP-D, {label}")
    left.set(title=f"tokens per forward, over 1-head MTP{text}")
    right.set(title="tokens per second, over 1-head MTP; unseen code")
    top = max(ax.get_ylim()[1] for ax in (left, right))
    for ax in (left, right):
        ax.axhline(1, color="#cccccc", lw=1, zorder=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks([1, 2, 4, 8, 16, 32] if ax is right else [1, 2, 4, 8, 16])
        ax.set_xticklabels(["1", "2", "4", "8", "16", "auto"][: len(ax.get_xticks())])
        ax.set(xlabel="heads that draft", ylim=(0, 1.1 * top))
        ax.minorticks_off()
        handles, labels = ax.get_legend_handles_labels()
        if handles:
            ax.legend(handles, labels, fontsize=7, frameon=False, loc="upper left")
    return fig


def range_line(ax, values, method, line, label):
    """the mean and the range of the seeds by heads; the heads that auto chose stand at 32"""
    points = {32 if heads == "auto" else heads: ratios
              for (own, heads), ratios in values.items() if own == method}
    for x, ratios in points.items():
        ax.plot([x, x], [min(ratios), max(ratios)], color=COLOUR[method], lw=3, alpha=0.3)
    seeds = max(map(len, points.values()), default=0)
    label += f" ({seeds} seed{'s' * (seeds > 1)})"
    fixed = sorted(set(points) - {32})
    if fixed:
        ax.plot(fixed, [statistics.mean(points[x]) for x in fixed], "o", ls=line, lw=1.3, ms=4,
                color=COLOUR[method], label=label)
    if 32 in points:
        ax.plot([27, 38], [statistics.mean(points[32])] * 2, line, lw=1.3, color=COLOUR[method])


FIGURES = {
    "paper": paper_figure, "car": car_figure, "tradeoff": tradeoff_figure,
    "entropy": entropy_figure, "speed": speed_figure, "cost": cost_figure,
}
TABLES = (
    paper_table, over_mtp_table, effect_table, plain_table, entropy_table, ablation_table,
    pilot_table, extend_table, loop_speed_table,
    nanogpt_table, speed_table, pretrained_table, cost_table, cards_table,
)


def figures(folder, rows):
    try:
        import matplotlib
    except ImportError:
        return print("no figures: matplotlib is not installed (pip install matplotlib, or the "
                     "extra `plots`)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "axes.titlesize": 10}):
        for name, draw in FIGURES.items():
            fig = draw(plt, rows)
            if fig:
                fig.tight_layout()
                fig.savefig(folder / f"{name}.png", dpi=120)
                plt.close(fig)


def read(path):
    """
    the rows of a runs.jsonl; none where there is no file. A line that is not a whole row (the
    computer stopped while it was written) is left out, and a line on the screen says so:
    reproduce.py then makes that row again
    """
    rows = []
    for number, row in json_lines(path):
        if isinstance(row, dict) and "name" in row:
            rows.append(row)
        else:
            print(f"{path}, line {number}: not a whole row, left out")
    return rows


def json_lines(path):
    """(line number, value) of the lines of a file that are not blank; of one that was written in
    part, None"""
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def write(folder, rows):
    rows = [row for row in rows if "result" in row]
    text = "".join(table(rows) for table in TABLES)
    if not text:
        return print(f"no rows in {folder} yet")
    hardware = sorted({f"{r['device']}, torch {r['torch']}, Python {r['python']}" for r in rows})
    head = (f"# {folder.name}: made by `python results/reproduce.py --scale {folder.name}` from "
            f"runs.jsonl\n\nHardware: {'; '.join(hardware)}. Every row of runs.jsonl has its "
            "command and seed.\n\n")
    (folder / "tables.md").write_text(head + text, encoding="utf-8")
    figures(folder, rows)
    print(f"wrote {folder}/tables.md")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["gpu"], ["tiny"]):
        sys.exit("usage: python results/tables.py [gpu | tiny]")
    place = Path(__file__).resolve().parent / (sys.argv[1] if len(sys.argv) > 1 else "gpu")
    write(place, read(place / "runs.jsonl"))
