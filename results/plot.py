"""
plot.py: how training went: the main head's loss and the acceptance of each head, by step.

    python results/plot.py out/tiny                       writes out/tiny/plot.svg
    python results/plot.py out/tiny out/mtp --svg a.svg   two runs in one picture, into a file

Each OUT is a folder with the log.jsonl that train.py or extend.py wrote, or the log itself. Left:
cross-entropy of the main head, thin on the training batches, dots on the validation windows. Right:
AR of each head at each evaluation, head 1 strongest. Any browser shows the picture.
"""

import argparse
import html
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, run  # noqa: E402
from data.errors import write_file  # noqa: E402

COLORS = ["#1f4fd8", "#c0392b", "#1a7f37", "#8b2fb0", "#9a6700", "#0b7285"]
WIDTH, HEIGHT = 420, 260           # of a panel
LEFT, TOP = 56, 40                 # its margins


def read_log(path):
    """-> {"train": [(step, main head's loss)], "val": the same, "ar": [(step, AR of each head)]}"""
    path = Path(path)
    if path.is_dir():
        path = path / "log.jsonl"
    if not path.is_file():
        raise UserError(f"there is no log at {path}; give the folder of a run (its --out)")
    rows = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no log; give the folder of a run (its --out)") from None
    for number, line in enumerate(lines, 1):
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError):
            print(f"{path}, line {number}: not a whole row, left out")
            continue
        if "step" in row:          # else a header; a resumed run writes its steps again
            rows[row["step"], "val" in row] = row
    found = {"train": [], "val": [], "ar": []}
    for (step, is_val), row in sorted(rows.items()):
        if is_val:
            found["val"].append((step, row["val"]["loss"][0]))
            found["ar"].append((step, row["val"]["ar"]))
        else:
            found["train"].append((step, row["ce"][0]))
    if not rows:
        raise UserError(f"{path} has no rows yet; a row comes every --log_every steps")
    return found


def ticks(low, high):
    """about five round numbers from low to high"""
    raw = (high - low) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = min((1, 2, 5, 10), key=lambda m: abs(m * size - raw)) * size
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def limits(values):
    """the range of an axis: a little more than that of the values"""
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


class Panel:
    """one diagram: data coordinates to places on the picture"""

    def __init__(self, left, title, points):
        self.left = left
        self.x_range = limits([step for step, _ in points])
        self.y_range = limits([value for _, value in points])
        self.parts = [f'<text x="{left}" y="{TOP - 14}">{html.escape(title)}</text>',
                      f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" '
                      'stroke="#888"/>']
        for value in ticks(*self.y_range):
            _, y = self.place((self.x_range[0], value))
            self.parts.append(f'<line x1="{left}" y1="{y}" x2="{left + WIDTH}" y2="{y}" '
                              'stroke="#ddd"/>')
            self.parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:.4g}'
                              '</text>')
        for value in ticks(*self.x_range):
            x, _ = self.place((value, self.y_range[0]))
            self.parts.append(f'<text x="{x}" y="{TOP + HEIGHT + 18}" text-anchor="middle">'
                              f'{value:.6g}</text>')

    def place(self, point):
        shares = []
        for value, (low, high) in zip(point, (self.x_range, self.y_range)):
            shares.append((value - low) / (high - low))
        x = self.left + shares[0] * WIDTH
        y = TOP + (1 - shares[1]) * HEIGHT
        return round(x, 1), round(y, 1)

    def line(self, points, color, width=1.5, opacity=1.0):
        places = " ".join(f"{x},{y}" for x, y in map(self.place, points))
        self.parts.append(f'<polyline points="{places}" fill="none" stroke="{color}" '
                          f'stroke-width="{width}" opacity="{opacity:.2f}"/>')

    def dots(self, points, color, opacity=1.0):
        for x, y in map(self.place, points):
            self.parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}" '
                              f'opacity="{opacity:.2f}"/>')


def draw(runs):
    """{name: what read_log found} -> the picture as SVG"""
    losses = [point for found in runs.values() for point in found["train"] + found["val"]]
    panels = [Panel(LEFT, "main head's loss, nats, by step", losses)]
    rates = []
    for found in runs.values():
        rates += [(step, rate) for step, ar in found["ar"] for rate in ar]
    if rates:
        panels.append(Panel(2 * LEFT + WIDTH + 20, "AR of each head, by step", rates))
    for color, found in zip(COLORS, runs.values()):
        panels[0].line(found["train"], color, 1)
        panels[0].line(found["val"], color, 2)
        panels[0].dots(found["val"], color)
        heads = max((len(ar) for _, ar in found["ar"]), default=0)
        for k in range(heads):
            points = [(step, ar[k]) for step, ar in found["ar"] if k < len(ar)]
            opacity = 1 - 0.8 * k / heads
            panels[1].line(points, color, 2, opacity)
            panels[1].dots(points, color, opacity)
    width = 2 * (LEFT + WIDTH) + 40
    height = TOP + HEIGHT + 40 + 18 * len(runs)
    names = []
    for i, (color, name) in enumerate(zip(COLORS, runs)):
        names.append(f'<text x="{LEFT}" y="{TOP + HEIGHT + 44 + 18 * i}" fill="{color}">'
                     f'{html.escape(name)}</text>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        *[part for panel in panels for part in panel.parts], *names, "</svg>\n",
    ])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="OUT", help="folder of a run, or its log.jsonl")
    parser.add_argument("--svg", help="file to write (default: plot.svg beside the first log)")
    args = parser.parse_args()
    if len(args.runs) > len(COLORS):
        raise UserError(f"got {len(args.runs)} runs; one picture shows {len(COLORS)} at most")
    runs = {str(path): read_log(path) for path in args.runs}
    first = Path(args.runs[0])
    target = Path(args.svg or (first if first.is_dir() else first.parent) / "plot.svg")
    write_file(target, draw(runs), "--svg")
    print(f"wrote {target}")


if __name__ == "__main__":
    run(main)
