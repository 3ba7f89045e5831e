"""
pictures.py: the pictures of README.md in this folder, as SVG.

    python tests/pictures.py        writes round.svg, alignment.svg and loop.svg beside this file
"""

import html
from pathlib import Path

INK, GREY, LIGHT = "#222", "#888", "#ddd"
MAIN, HEADS = "#dfe8f5", ["#d9efdc", "#fdeed3", "#f3dff0"]
GOOD, BAD = "#1a7f37", "#c0392b"
SUB = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086"   # subscripts 0 to 6
SUPER = "\u2070\u00b9\u00b2\u00b3\u2074\u2075"        # and superscripts


class Picture:
    def __init__(self, width, height):
        self.size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        self.parts = []

    def text(self, x, y, text, size=14, anchor="middle", color=INK, more=""):
        self.parts.append(f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" '
                          f'fill="{color}" {more}>{html.escape(text)}</text>')

    def box(self, x, y, w, h, text="", fill="#fff", line=INK, color=INK, size=14, more=""):
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" '
                          f'stroke="{line}" {more}/>')
        if text:
            self.text(x + w / 2, y + h / 2 + size * 0.35, text, size, color=color)

    def arrow(self, x1, y1, x2, y2, color=INK, more=""):
        self.parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" '
                          f'stroke-width="1.5" marker-end="url(#end)" {more}/>')

    def svg(self):
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" {self.size} font-family="sans-serif">\n'
                '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker>'
                '</defs>\n<rect width="100%" height="100%" fill="#fff"/>\n')
        return head + "\n".join(self.parts) + "\n</svg>\n"


def label(picture, y, text, more=""):
    """what a line of the picture shows, at its left"""
    picture.text(14, y, text, anchor="start")
    picture.text(14, y + 18, more, 12, "start", GREY)


def round_picture():
    """one round with K = 3: tokens, drafts, rows of verify, what is emitted and rebuilt"""
    p = Picture(850, 520)
    left, step, wide = 220, 84, 76

    def x(offset):                                 # the column of position n + offset
        return left + (offset + 2) * step

    label(p, 30, "position")
    for offset in range(-2, 5):
        p.text(x(offset) + wide / 2, 30, f"n{offset:+}" if offset else "n", color=GREY)
    label(p, 68, "known tokens")
    for offset, name in [(-2, ".."), (-1, "t\u2099\u208b\u2081"), (0, "t\u2099")]:
        p.box(x(offset), 48, wide, 30, name, MAIN)

    label(p, 118, "draft", "each head reads the one before")
    p.arrow(x(0) + wide / 2, 80, x(1) + 14, 103)
    for k in range(1, 4):
        p.box(x(k), 105, wide, 30, f"d{SUB[k]}", HEADS[k - 1])
        p.text(x(k) + wide / 2, 150, f"head {k}", 11, color=GREY)
        if k < 3:
            p.arrow(x(k) + wide, 120, x(k + 1), 120)

    label(p, 193, "verify", "one forward pass of the main model")
    label(p, 256, "p", "the main head's distributions")
    for i, name in enumerate(["t\u2099", "d\u2081", "d\u2082", "d\u2083"]):
        p.box(x(i), 178, wide, 30, name, MAIN)
        p.arrow(x(i) + wide / 2, 210, x(i + 1) + wide / 2 - 8, 236)
        p.box(x(i + 1), 238, wide, 30, f"p{SUB[i + 1]}")

    label(p, 318, "accept", "until the first rejection")
    struck = 'text-decoration="line-through"'
    verdicts = [("accepted", GOOD, ""), ("rejected", BAD, struck),
                ("after a rejection", GREY, struck)]
    for k, (word, color, more) in enumerate(verdicts, 1):
        p.text(x(k) + wide / 2, 318, f"d{SUB[k]}", color=color, more=more)
        p.text(x(k) + wide / 2, 336, word, 11, color=color)

    label(p, 374, "emit", "1 + accepted tokens")
    p.box(x(1), 354, wide, 30, "d\u2081", HEADS[0])
    p.box(x(2), 354, wide, 30, "y", MAIN)
    p.text(x(3), 367, "y is sampled from (p\u2082 - q\u2082)\u208a;", 12, "start", GREY)
    p.text(x(3), 383, "had none been rejected, from p\u2084", 12, "start", GREY)

    label(p, 428, "rollback", "the trunk's cache")
    label(p, 478, "the heads' caches", "rebuilt as the next round drafts")
    for offset in range(-2, 2):
        p.box(x(offset), 412, wide, 30, "stays", size=12)
        p.box(x(offset), 462, wide, 30, "run again", "#fff4e0", "#c77700", size=12)
    for offset in (2, 3):
        p.box(x(offset), 412, wide, 30, "overwritten", "#fff", LIGHT, GREY, 12)
    p.text(x(2), 474, "K+1 rows: some are new, others", 12, "start", GREY)
    p.text(x(2), 490, "had read a draft that was rejected", 12, "start", GREY)
    return p


def alignment_picture():
    """K+1 hidden states that predict the same target, K = 2"""
    p = Picture(760, 300)
    p.text(14, 30, "target", anchor="start", color=GREY)
    for j in range(1, 6):
        p.text(180 + j * 95, 30, f"t{SUB[j]}", 16)
    rows = [("main head", "the teacher Q", MAIN), ("head 1", "student P\u00b9", HEADS[0]),
            ("head 2", "student P\u00b2", HEADS[1])]
    for k, (name, role, fill) in enumerate(rows):
        y = 56 + 58 * k
        p.text(14, y + 18, name, anchor="start")
        p.text(14, y + 35, role, 12, "start", GREY)
        for j in range(1 + k, 6):
            p.box(140 + j * 95, y, 80, 38, f"h{SUPER[k]}{SUB[j - 1 - k]}", fill, size=17)
        for j in range(1, 1 + k):
            p.box(140 + j * 95, y, 80, 38, "none", "#fff", LIGHT, LIGHT, 12, 'stroke-dasharray="4"')
    p.box(140 + 3 * 95 - 7, 44, 94, 178, "", "none", BAD, more='stroke-width="2"')
    p.text(140 + 3 * 95 + 40, 242, "one column, one target:", 13, color=BAD)
    read = "all three have read t\u2080, t\u2081 and t\u2082"
    p.text(140 + 3 * 95 + 40, 260, read, 13, color=BAD)
    p.text(14, 288, "Column j of row k holds head k's state at position j-k. The loss compares "
           "down a column, never along a diagonal.", 12, "start", GREY)
    return p


def loop_picture():
    """2 trained heads, extended to 5"""
    p = Picture(820, 240)
    p.box(14, 70, 100, 46, "trunk", MAIN)
    for k in range(1, 6):
        x = 40 + k * 130
        trained = k <= 2
        fill = HEADS[(k - 1) % 2]
        more = "" if trained else 'stroke-dasharray="5" stroke-width="2"'
        p.box(x, 70, 100, 46, f"head {k}", fill, INK if trained else "#c77700", more=more)
        p.arrow(x - (56 if k == 1 else 30), 93, x - 3, 93)
        p.text(x - (28 if k == 1 else 15), 84, f"h{SUPER[k - 1]}", 14, color=GREY)
        p.arrow(x + 50, 40, x + 50, 67, GREY)
        p.text(x + 50, 34, f"t\u1d62\u208a{SUB[k]}", 14, color=GREY)
        p.arrow(x + 50, 118, x + 50, 143)
        p.text(x + 50, 160, f"token i+{k + 1}", 12)
        note = "trained, now frozen" if trained else f"copy of head {(k - 1) % 2 + 1}"
        p.text(x + 50, 184, note, 12, color=GREY if trained else "#c77700")
    p.arrow(64, 118, 64, 143)
    p.text(64, 160, "token i+1", 12)
    p.text(64, 184, "frozen", 12, color=GREY)
    p.text(14, 222, "Head m+j starts as a copy of head j (m = 2) and reads the head before it; "
           "only the copies are trained.", 12, "start", GREY)
    return p


PICTURES = {"round": round_picture, "alignment": alignment_picture, "loop": loop_picture}


def main():
    for name, draw in PICTURES.items():
        path = Path(__file__).with_name(f"{name}.svg")
        path.write_text(draw().svg(), encoding="utf-8", newline="\n")
        print(path)


if __name__ == "__main__":
    main()
