"""
prompts.py: prompts of seven kinds that no model here was trained on, for bench.py:

    python results/prompts.py                 20 of each kind -> out/prompts.jsonl
    python results/prompts.py --count 164 --kinds code --out out/code.jsonl
    python results/bench.py decode out/smollm2-4/ckpt.pt --prompts out/prompts.jsonl --count 140

Two files are downloaded into data/downloads, 0.75 MB, and checked by sha256 (or place them there by
hand): the first five kinds need one, code the other, story none. A row is {"kind", "text", "chat"}:
bench.py puts a text with chat = true into the model's chat template, and continues the others as
they are.

    chat, question, mathematics, translation, summary    Spec-Bench (Xia et al., arXiv 2401.07851):
               MT-bench's first turns, Natural Questions, GSM8K, WMT14 German to English, CNN/Daily
               Mail. Apache-2.0
    code       HumanEval (Chen et al., arXiv 2107.03374): the head of a function. MIT
    story      the bundled books that are for validation, spread over them
"""

import argparse
import gzip
import hashlib
import json
import lzma
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import UserError, run  # noqa: E402
from data.download import DOWNLOADS, download  # noqa: E402
from data.errors import write_file  # noqa: E402
from data.prepare import STORIES  # noqa: E402
from data.reader import EOT_TEXT  # noqa: E402

GITHUB = "https://raw.githubusercontent.com/"
SPEC_BENCH = GITHUB + ("hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf/"
                       "data/spec_bench/question.jsonl")
HUMAN_EVAL = GITHUB + ("openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/"
                       "data/HumanEval.jsonl.gz")
SHA256 = {
    SPEC_BENCH: "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
    HUMAN_EVAL: "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
}
# Spec-Bench's category -> kind; the first eight are MT-bench's
KINDS = {
    "writing": "chat", "roleplay": "chat", "reasoning": "chat", "math": "chat", "coding": "chat",
    "extraction": "chat", "stem": "chat", "humanities": "chat", "qa": "question",
    "math_reasoning": "mathematics", "translation": "translation", "summarization": "summary",
}
STORY_CHARACTERS = 400


def fetch(url):
    """the bytes of a downloaded file, unpacked"""

    def check(path):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != SHA256[url]:
            raise UserError(f"its sha256 is {found}, expected {SHA256[url]}")

    path = DOWNLOADS / url.rsplit("/", 1)[-1]
    download(url, path, check)
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def spread(items, count):
    """`count` of the items, evenly over all of them: the sets are sorted by difficulty or topic"""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def stories(text, count):
    """pieces of a text that begin a paragraph, spread over it; none goes on into the next book"""
    starts = [i + 2 for i in range(len(text) - STORY_CHARACTERS) if text[i : i + 2] == "\n\n"]
    pieces = [text[i : i + STORY_CHARACTERS] for i in starts]
    found = []
    for i in spread(range(len(pieces)), count):
        inside = [piece for piece in pieces[i:] if EOT_TEXT not in piece]
        found += inside[:1]
    return found


def collect(questions, problems, text, count):
    """the rows of Spec-Bench and of HumanEval, the validation text -> rows, kind by kind"""
    by_kind = {kind: [] for kind in KINDS.values()}
    for row in questions:
        if row["category"] in KINDS:
            by_kind[KINDS[row["category"]]].append(row["turns"][0])
    rows = []
    for kind, texts in by_kind.items():
        rows += [dict(kind=kind, text=text, chat=True) for text in spread(texts, count)]
    code = [row["prompt"] for row in problems]
    rows += [dict(kind="code", text=text, chat=False) for text in spread(code, count)]
    return rows + [dict(kind="story", text=text, chat=False) for text in stories(text, count)]


def json_rows(data):
    return [json.loads(line) for line in data.decode("utf-8").splitlines() if line]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20, help="prompts of each kind")
    parser.add_argument("--kinds", default="", help="only these, with commas")
    parser.add_argument("--out", default="out/prompts.jsonl", help="the file to write")
    args = parser.parse_args()
    if args.count < 1:
        raise UserError(f"--count is {args.count}; it must be at least 1")
    kinds = {*KINDS.values(), "code", "story"}
    wanted = set(args.kinds.split(",")) if args.kinds else kinds
    if wanted - kinds:
        raise UserError(f"--kinds is {args.kinds}; choose from {', '.join(sorted(kinds))}")
    # what isn't needed is not downloaded
    questions = json_rows(fetch(SPEC_BENCH)) if wanted & set(KINDS.values()) else []
    problems = json_rows(fetch(HUMAN_EVAL)) if "code" in wanted else []
    text = lzma.decompress(STORIES[1].read_bytes()).decode("utf-8")
    rows = collect(questions, problems, text, args.count)
    rows = [row for row in rows if row["kind"] in wanted]
    write_file(args.out, "".join(json.dumps(row) + "\n" for row in rows), "--out", ".jsonl")
    print(f"{args.out}: {len(rows)} prompts, at most {args.count} of each of {len(wanted)} kinds")


if __name__ == "__main__":
    run(main)
