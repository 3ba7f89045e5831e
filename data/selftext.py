"""A model's own text -> a dataset folder, from which extend.py trains its first heads.

    python data/selftext.py out/smollm2/ckpt.pt                   -> data/smollm2-self
    python data/selftext.py out/tiny/ckpt.pt --tokens 500000      any checkpoint will do
    python data/selftext.py out/smollm2/ckpt.pt --prompts chat,start,chat:questions.txt,my.txt
    python data/selftext.py -h                                    every flag and its default

A head drafts what the main head would say, so the text to learn from is what the main head does
say. Each row of a batch begins with a prompt and goes on at random, without a stop, to --length
tokens. Prompts (a list with commas; the rows take them in turn):

    chat         the frame of a chat: the model writes the user's message, then the answer
    start        the end-of-text token: the model begins a text of its own
    val          the beginning of a window of the validation text that the model was trained with
    PATH         a line of a file (data/reader.py says which), to be continued
    chat:PATH    a line of a file as the user's message

With the same seed, flags and kind of device the text is the same.
"""
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
if not __package__:  # run as a script: make the project importable
    sys.path.insert(0, str(HERE.parent))

import decode
from common import UserError, check_flags, checkpoint_file, flag, parse, run
from data.errors import show
from data.prepare import find_dataset, load_dataset, system_errors
from data.reader import read_prompts
from data.temporary import leftovers, temporary

PROMPT = 32        # tokens, at most half a row
VAL_EVERY = 53     # one row of so many is for validation; a prime: of each kind of prompt


@dataclasses.dataclass
class SelfTextConfig:
    tokens: int = flag(52_000_000, "tokens to write, about", min=1000)
    prompts: str = flag("", "chat | start | val | PATH | chat:PATH, with commas; empty: chat,start "
                        "for a model with a chat template, start for another pretrained one, val "
                        "for one of train.py")
    temperature: str = flag("1", "one, or several with commas, for equal parts of the text")
    length: int = flag(512, "tokens of a row; at most the model's context", min=8)
    batch: int = flag(0, "rows at a time; 0: 512 on a GPU, else 16", min=0)
    seed: int = flag(1, "seed of prompts and text", min=0)
    out: str = flag("", "the folder to make; empty: data/NAME-self")
    device: str = flag("auto", "cpu | cuda | mps")
    dtype: str = flag("auto", "float32 | bfloat16; auto: bfloat16 where the GPU has it",
                      choices=("auto", "float32", "bfloat16"))
    fast: str = flag("auto", "fast path on a CUDA GPU: auto | on | off",
                     choices=("auto", "on", "off"))


# -----------------------------------------------------------------------------
# prompts


def prompt_source(name, tokenizer, meta, length, rng):
    """-> function that returns one prompt, a list of ids"""
    size = min(PROMPT, length // 2)                # of a text that is to be continued
    if not name:
        raise UserError("--prompts has an empty name between its commas: take that comma away")
    if name == "val":
        config = meta["train_config"]
        folder = find_dataset(config["data"], config.get("tokenizer", ""))
        _, ids, prepared = load_dataset(folder)
        if prepared["tokenizer"] != tokenizer.spec:
            raise UserError(f"{folder} has another tokenizer than the checkpoint: it was prepared "
                            "again since; give other --prompts")
        last = max(1, len(ids) - size)

        def window():
            start = rng.integers(last)
            return ids[start : start + size].tolist()
        return window
    if name == "start":
        prompts = [[tokenizer.eot]]
    elif name == "chat":
        tokenizer.encode_chat("")                  # raises where there is no template
        prompts = [tokenizer.encode_special(tokenizer.spec["chat"].split("{}")[0])]
    elif name.startswith("chat:"):
        prompts = [tokenizer.encode_chat(text) for text in read_prompts(name.removeprefix("chat:"))]
    else:
        prompts = [ids[:size] for ids in tokenizer.encode_batch(read_prompts(name))]
    prompts = [prompt for prompt in prompts if 0 < len(prompt) <= length // 2]
    if not prompts:
        raise UserError(f"{name} has no prompt of at most {length // 2} tokens (half a row): give "
                        "shorter ones, or a larger --length")
    return lambda: prompts[rng.integers(len(prompts))]


def parse_temperatures(text):
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 < value < float("inf") for value in values):
        raise UserError(f"--temperature is {text!r}; it must be one number above 0, or several "
                        "with commas")
    return values


# -----------------------------------------------------------------------------
# text


def rows(model, cfg, sources, temperatures, bar):
    """yield rows of text, prompt and continuation, as lists of ids; no row is ended by a token"""
    generator = torch.Generator(device=model.weight.device).manual_seed(cfg.seed)
    length = min(cfg.length, model.config.block_size)
    written = 0                                    # the bar does not count where it is disabled
    for i, temperature in enumerate(temperatures, 1):
        decoder = decode.make_decoder(model, cfg.batch, length, 0, temperature,
                                      generator=generator, fast=cfg.fast)
        bar.write(f"temperature {temperature:g}: {decoder.why}")
        while written < cfg.tokens * i // len(temperatures):
            prompts = [sources[row % len(sources)]() for row in range(cfg.batch)]
            room = length - max(map(len, prompts))
            texts, stats = decode.run_decoder(decoder, prompts, room)
            for prompt, text in zip(prompts, texts):
                yield prompt + text
            written += stats.tokens
            bar.update(stats.tokens)
        del decoder                                # its cache, before the next one is made


def write_text(model, cfg, sources, temperatures, tokenizer, folder):
    """write train.bin and val.bin -> what meta.json says of them"""
    eot = tokenizer.eot
    sizes = np.array([len(token) for token in tokenizer.tokens])       # in bytes
    digest = hashlib.sha256()
    count = dict(documents=0, val_documents=0)
    for name in ("train", "val"):
        count.update({f"{name}_tokens": 0, f"{name}_bytes": 0})
    bar = tqdm(total=cfg.tokens, desc="self-text", unit="token", unit_scale=True)
    with bar, open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for row in rows(model, cfg, sources, temperatures, bar):
            if row[0] != eot:                      # rows are documents: one ends where one begins
                row.insert(0, eot)
            ids = np.array(row)
            ids[ids >= len(sizes)] = eot           # of a vocabulary that is padded
            data = ids.astype("<u2").tobytes()
            digest.update(data)
            for_val = count["documents"] % VAL_EVERY == 0
            (val if for_val else train).write(data)
            name = "val" if for_val else "train"
            count["documents"] += 1
            count["val_documents"] += for_val
            count[f"{name}_tokens"] += len(ids)
            count[f"{name}_bytes"] += int(sizes[ids].sum())
    return {**count, "sha256": digest.hexdigest()}


def write_dataset(path, cfg):
    """a checkpoint's own text -> the folder, which appears when it is complete"""
    path = checkpoint_file(path)
    checkpoint_sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    model, tokenizer, meta = decode.load(path, cfg.device, cfg.dtype)
    name = path.resolve().parent.name
    out = Path(cfg.out or f"data/{name}-self")
    if out.exists():
        raise UserError(f"{out} exists; remove it, or choose another folder with --out")
    usual = "start" if "source" in meta else "val"  # a pretrained model's text is not here
    prompts = cfg.prompts or ("chat,start" if tokenizer.spec.get("chat") else usual)
    temperatures = parse_temperatures(cfg.temperature)
    rng = np.random.default_rng(cfg.seed)
    length = min(cfg.length, model.config.block_size)
    sources = [prompt_source(name, tokenizer, meta, length, rng) for name in prompts.split(",")]
    cfg.batch = cfg.batch or (512 if model.weight.is_cuda else 16)
    for left in leftovers(out, "part"):            # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    part = temporary(out, "part")
    part.mkdir(parents=True)
    try:
        count = write_text(model, cfg, sources, temperatures, tokenizer, part)
        if count["documents"] < 2:
            raise UserError("that is one row, and both training and validation need some: give "
                            "more --tokens, a shorter --length or a larger --batch")
        (part / "tokenizer.json").write_text(json.dumps(tokenizer.spec), encoding="utf-8")
        described = {
            "tokenizer": {"kind": tokenizer.spec["kind"], "file": "tokenizer.json"},
            "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "split": "by row",
            "source": f"self-text of {name}", "python": platform.python_version(),
            "checkpoint_sha256": checkpoint_sha256, "prompts": prompts,
            "temperature": temperatures, "seed": cfg.seed, "length": length, "batch": cfg.batch,
            **count,
        }
        (part / "meta.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    show(f"{out}: {count['documents']:,} rows, {count['train_tokens']:,} tokens for training and "
         f"{count['val_tokens']:,} for validation; sha256 {count['sha256']}")


def main():
    given, rest = parse(SelfTextConfig, __doc__, [
        ("checkpoint", dict(metavar="CKPT", help="checkpoint of pretrained.py, train.py or "
                            "extend.py")),
    ])
    cfg = SelfTextConfig(**given)
    check_flags(cfg)
    try:
        with system_errors(cfg.out or "data"):
            write_dataset(Path(rest["checkpoint"]), cfg)
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory with {cfg.batch} rows; give a smaller --batch") from None
    except KeyboardInterrupt:
        sys.exit("selftext.py: interrupted; no half-written dataset was left")


if __name__ == "__main__":
    run(main)
