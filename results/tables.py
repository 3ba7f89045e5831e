"""
tables.py: tables.md and the figures of a scale, from its runs.jsonl. Called by reproduce.py, or alone:

    python results/tables.py gpu
"""

import json
import statistics
import sys
from pathlib import Path


def spread(values, scale=1, digits=3):
    """mean and half the range over seeds, as text"""
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values) * scale:.{digits}f}" + (f" ±{half * scale:.{digits}f}" if len(values) > 1 else "")


def group(rows, part, *keys):
    """rows of a part with a result, by their labels"""
    groups = {}
    for row in rows:
        if row.get("part") == part and all(k in row for k in keys):
            groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    return groups


def markdown(title, head, lines):
    if not lines:
        return ""
    out = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(out + ["| " + " | ".join(str(x) for x in line) + " |" for line in lines]) + "\n\n"


def paired(groups, key, other, measure):
    """differences to the runs of `other` with the same seed"""
    base = {row["seed"]: measure(row) for row in groups.get(other, [])}
    return [measure(row) - base[row["seed"]] for row in groups[key] if row["seed"] in base]


def effect_table(rows):
    groups, lines = group(rows, "effect", "text", "K", "method"), []
    for text, K, method in sorted(groups):
        runs = groups[text, K, method]
        line = [text, K, method, len(runs), spread([r["result"]["loss"][0] for r in runs], digits=4)]
        line.append("" if method == "MTP" else spread(paired(groups, (text, K, method), (text, K, "MTP"), lambda r: r["result"]["loss"][0]), digits=4))
        line += [spread([r["result"]["ar"][0] for r in runs], 100, 2), spread([r["result"]["car"][-1] for r in runs], 100, 2),
                 spread([r["result"]["tokens_per_forward"] for r in runs])]
        lines.append(line)
    return markdown("MTP against MTP-D (mean over seeds ± half their range)",
                    ["text", "K", "method", "seeds", "main head's val loss", "difference to MTP, same seed", "AR_1 %", "CAR_K %", "tokens per forward, from CAR"], lines)


def ablation_table(rows):
    groups = group(rows, "ablation", "variant")
    base = groups.get(("MTP",), [])
    lines = []
    for (variant,), runs in groups.items():
        loss = paired(groups, (variant,), ("MTP",), lambda r: r["result"]["loss"][0]) if base else []
        ar = paired(groups, (variant,), ("MTP",), lambda r: r["result"]["ar"][0]) if base else []
        lines.append([variant, len(runs), spread([r["result"]["loss"][0] for r in runs], digits=4), spread(loss, digits=4),
                      spread([r["result"]["ar"][0] for r in runs], 100, 2), spread(ar, 100, 2)])
    return markdown("Ablation at K = 1 (differences to MTP with the same seed)", ["variant", "seeds", "main head's val loss", "to MTP", "AR_1 %", "to MTP, points"], lines)


def extend_table(rows):
    lines = []
    for (text, n, method), runs in sorted(group(rows, "extend", "text", "n", "method").items()):
        half = n // 2
        for stage in ("before", "after"):
            car = [r["result"][stage]["car"] for r in runs]
            lines.append([text, f"{half} -> {n}", method, "copied" if stage == "before" else "trained", len(runs), spread([c[half] for c in car], 100, 2),
                          spread([c[-1] for c in car], 100, 2), spread([1 + sum(c) for c in car])])
    return markdown("Looped extension", ["text", "heads", "method", "new heads", "seeds", "CAR of the first new head %", "CAR of the last %", "tokens per forward, from CAR"], lines)


def speed_table(rows):
    out = ""
    for row in rows:
        if row.get("part") == "speed" and isinstance(row["result"], list):
            lines = [[Path(r["checkpoint"]).parent.name, r["temperature"], r["batch"], r["heads"], f"{r['tokens_per_forward']:.2f}", f"{r['tokens_per_s']:.0f}", f"{r['speedup']:.2f}",
                      f"{r['predicted_speedup']:.2f}", f"{r['over_one'] or 0:.2f}", f"{r['ms_round']:.3f}", f"{r['looping']}/{r['prompts'] // r['batch']}"] for r in row["result"]]
            out += markdown(f"Decoding: {row['name']}, {row['device']}", ["checkpoint", "temperature", "batch", "heads", "tokens per forward", "tokens/s", "x plain", "predicted", "x 1 head", "ms a round",
                                                                          "looping, left out"], lines)
        if row["name"].startswith("check"):
            out += f"`{row['command']}`: {row['result']['same']} of {row['result']['prompts']} greedy continuations identical; the others part at near-ties.\n\n"
    return out


def cost_table(rows):
    out = ""
    for row in rows:
        if row.get("part") == "cost":
            for title, lines in row["result"].items():
                if lines:
                    head = list(lines[0])
                    out += markdown(f"Cost: {title} ({row['device']})", head, [[shorter(line[k]) for k in head] for line in lines])
    return out


def shorter(x):
    return f"{x:.4g}" if isinstance(x, float) else x


# -----------------------------------------------------------------------------


def figures(folder, rows):
    try:
        import matplotlib
    except ImportError:
        return print("no figures: matplotlib is not installed (pip install matplotlib, or the extra `plots`)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(fig, name):
        fig.tight_layout()
        fig.savefig(folder / name, dpi=110)
        plt.close(fig)

    colour = {"MTP": "#888888", "MTP-D": "#d1495b"}
    groups = {key: runs for key, runs in group(rows, "effect", "text", "K", "method").items() if key[1] > 1}
    texts = sorted({key[0] for key in groups})
    if texts:
        fig, axes = plt.subplots(1, len(texts), figsize=(5 * len(texts), 3.6), squeeze=False)
        for ax, text in zip(axes[0], texts):
            for method in ("MTP", "MTP-D"):
                for i, run in enumerate(groups.get((text, 4, method), [])):
                    car = [100 * x for x in run["result"]["car"]]
                    ax.plot(range(1, len(car) + 1), car, "o-", color=colour[method], alpha=0.7, label=method if i == 0 else None)
            ax.set(title=f"{text}: drafts 1..k all accepted (a line a seed)", xlabel="head k", ylabel="CAR_k, %", xticks=range(1, 5))
            ax.legend()
        save(fig, "car.png")
    groups = group(rows, "ablation", "variant")
    if groups:
        fig, ax = plt.subplots(figsize=(7, 4.4))
        for (variant,), runs in groups.items():
            x = statistics.mean(r["result"]["loss"][0] for r in runs)
            y = statistics.mean(100 * r["result"]["ar"][0] for r in runs)
            ax.plot(x, y, "o", color=colour["MTP" if variant == "MTP" else "MTP-D"])
            ax.annotate(variant, (x, y), textcoords="offset points", xytext=(6, 3), fontsize=8)
        ax.set(xlabel="main head's validation loss (nats): left is better", ylabel="AR_1, %: up is better", title="K = 1: acceptance is bought, and this is the price")
        ax.margins(x=0.3)
        save(fig, "tradeoff.png")
    speeds = [r for row in rows if row.get("part") == "speed" and isinstance(row["result"], list) for r in row["result"] if r["batch"] == 1]
    sampled = [r for r in speeds if r["temperature"] == 1.0]
    if sampled:
        fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
        for i, name in enumerate(sorted({r["checkpoint"] for r in sampled})):
            mine = sorted((r for r in sampled if r["checkpoint"] == name), key=lambda r: r["heads"])
            x, label = [r["heads"] for r in mine], Path(name).parent.name
            left.plot(x, [r["tokens_per_forward"] for r in mine], "o-", color=f"C{i}", label=label)
            right.plot(x, [r["speedup"] for r in mine], "o-", color=f"C{i}", label="measured" if i == 0 else None)
            right.plot(x, [r["predicted_speedup"] for r in mine], ":", color=f"C{i}", label="predicted" if i == 0 else None)
        left.set(title="temperature 1, batch 1", xlabel="heads that draft", ylabel="tokens per forward")
        right.set(title="wall-clock", xlabel="heads that draft", ylabel="speed over plain decoding")
        right.axhline(1, color="#cccccc", lw=1)
        left.legend(fontsize=7)
        right.legend(fontsize=7)
        save(fig, "speed.png")


def write(folder, rows):
    rows = [row for row in rows if "result" in row]
    text = "".join(table(rows) for table in (effect_table, ablation_table, extend_table, speed_table, cost_table))
    if not text:
        return print(f"no rows in {folder} yet")
    where = sorted({f"{r['device']}, torch {r['torch']}, Python {r['python']}" for r in rows})
    (folder / "tables.md").write_text(f"# {folder.name}: made by `python results/reproduce.py --scale {folder.name}` from runs.jsonl\n\n"
                                      f"Hardware: {'; '.join(where)}. Every row of runs.jsonl has its command and seed.\n\n{text}", encoding="utf-8")
    figures(folder, rows)
    print(f"wrote {folder}/tables.md")


if __name__ == "__main__":
    place = Path(__file__).resolve().parent / (sys.argv[1] if len(sys.argv) > 1 else "gpu")
    write(place, [json.loads(line) for line in open(place / "runs.jsonl", encoding="utf-8")])
