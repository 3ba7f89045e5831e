"""results/prompts.py: prompts of several kinds, from files that are checked."""
import gzip
import hashlib
import json
import sys

import pytest

from common import UserError
from results import prompts

QUESTIONS = [dict(category=name, turns=[f"{name} {i}", "then"]) for name in
             ("writing", "qa", "rag", "translation", "summarization", "math_reasoning", "stem")
             for i in range(4)]
PROBLEMS = [dict(prompt=f"def f{i}():\n") for i in range(9)]
TEXT = "\n\n".join(f"Paragraph {i}. " + "word " * 200 for i in range(30))


def test_each_kind_has_its_share_of_the_rows():
    rows = prompts.collect(QUESTIONS, PROBLEMS, TEXT, 3)
    kinds = [row["kind"] for row in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ["chat", "question", "mathematics", "translation", "summary", "code", "story"], 3)
    texts = {row["kind"]: row["text"] for row in rows}
    # evenly over the set: two kinds of chat; a piece begins a paragraph
    assert [row["text"] for row in rows[:3]] == ["writing 0", "writing 2", "stem 1"]
    assert texts["code"].startswith("def f6") and texts["story"].startswith("Paragraph ")
    assert len(texts["story"]) == prompts.STORY_CHARACTERS
    assert {row["kind"] for row in rows if not row["chat"]} == {"code", "story"}


def test_a_story_does_not_go_on_into_the_next_book():
    """and the others stay where they were"""
    text = TEXT.replace("Paragraph 20. ", "end.\n<|endoftext|>\nParagraph 20. ")
    whole, cut = prompts.stories(TEXT, 3), prompts.stories(text, 3)
    assert [piece[:13] for piece in whole] == ["Paragraph 1. ", "Paragraph 10.", "Paragraph 20."]
    assert [piece[:13] for piece in cut] == ["Paragraph 1. ", "Paragraph 10.", "Paragraph 21."]
    assert all(len(piece) == prompts.STORY_CHARACTERS for piece in cut)


def test_a_set_with_too_few_prompts_gives_all_it_has():
    rows = prompts.collect(QUESTIONS, PROBLEMS, TEXT, 6)
    assert len([row for row in rows if row["kind"] == "question"]) == 4
    assert len([row for row in rows if row["kind"] == "chat"]) == 6


def test_downloads_are_checked_and_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "DOWNLOADS", tmp_path)
    data = gzip.compress(json.dumps(dict(prompt="x")).encode() + b"\n")
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    url = "http://localhost:9/a.jsonl.gz"
    monkeypatch.setitem(prompts.SHA256, url, hashlib.sha256(data).hexdigest())
    assert prompts.json_rows(prompts.fetch(url)) == [dict(prompt="x")]
    (tmp_path / "a.jsonl.gz").write_bytes(data + b"more")
    with pytest.raises(UserError, match="a.jsonl.gz"):
        prompts.fetch(url)


def test_only_the_kinds_that_were_asked_for(tmp_path, monkeypatch):
    """and only the files that these need"""
    lines = {prompts.SPEC_BENCH: QUESTIONS, prompts.HUMAN_EVAL: PROBLEMS}
    fetched = []

    def fetch(url):
        fetched.append(url)
        return "\n".join(map(json.dumps, lines[url])).encode()
    monkeypatch.setattr(prompts, "fetch", fetch)
    out = tmp_path / "code.jsonl"
    argv = ["prompts.py", "--count", "3", "--out", str(out), "--kinds"]
    monkeypatch.setattr(sys, "argv", [*argv, "story,code"])
    prompts.main()
    kinds = [json.loads(line)["kind"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert kinds == ["code"] * 3 + ["story"] * 3
    assert fetched == [prompts.HUMAN_EVAL]
    for kinds, needed in (("story", []), ("summary,chat", [prompts.SPEC_BENCH])):
        fetched.clear()
        monkeypatch.setattr(sys, "argv", [*argv, kinds])
        prompts.main()
        assert fetched == needed
    monkeypatch.setattr(sys, "argv", [*argv, "cod"])
    with pytest.raises(UserError, match="--kinds is cod; choose from chat, code"):
        prompts.main()
