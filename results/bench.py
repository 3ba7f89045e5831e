"""
bench.py: is the decoded text the same, how fast is decoding, and what does a training step cost?

    python results/bench.py check CKPT       greedy text with heads against ordinary decoding
    python results/bench.py decode CKPT ..   ordinary decoding, 1 .. 4 heads and heads="auto" on the
                                             same prompts
    python results/bench.py accept CKPT ..   how many drafts are accepted, on four kinds of text;
                                             tokens per forward, predicted and measured: see
                                             acceptance.py
    python results/bench.py costs CKPT --out FILE  how long rounds take here, for decode.py --costs
    python results/bench.py train            a training step for several K, with and without KL
    python results/bench.py train --memory_gb 8    what fits on a card of 8 GB, see cards.py
    python results/bench.py decode -h        every flag, its default and its meaning

Prompts are pieces of the validation text, or those of --prompts. Training steps run on random
tokens and fresh weights. All times are medians of the wall clock, of things that take turns: run
it with the computer to itself. Ctrl-C ends a measurement early: what was measured is still printed.

To time a divergence of your own: enter it in distill.DIVERGENCES, then
`python results/bench.py train --heads 4 --kl forward,yours`.
"""

import dataclasses
import gc
import json
import math
import statistics
import sys
import time
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decode  # noqa: E402
import train  # noqa: E402
from common import (  # noqa: E402
    JSON_FLAG, DeviceFlags, UserError, check_flags, flag, parse, pick_device, pick_dtype, run,
)
from data.errors import check_kind, show, write_file  # noqa: E402
from data.reader import read_prompt_rows  # noqa: E402
from fast.heads import HEAD_COUNTS  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

# -----------------------------------------------------------------------------
# results


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while something was measured; `result` is what was measured until then"""

    def __init__(self, result):
        super().__init__()
        self.result = result


def finite(value):
    """the same result with None for numbers that JSON does not have: nan and the infinities"""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -----------------------------------------------------------------------------
# the clock


def now(device):
    """the time, once the device has done all that it was asked for"""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median(values):
    return statistics.median(values) if values else 0.0


def milliseconds(functions, device, repeats=20):
    """median time of one call of each function, called in turns: what slows the computer down for
    a while slows all of them"""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, own_times in zip(functions, times):
            begin = now(device)
            function()
            own_times.append(1000 * (now(device) - begin))
    return [median(own_times) for own_times in times]


def repeated(function, times):
    def several():
        for _ in range(times):
            function()

    return several


# -----------------------------------------------------------------------------
# checkpoints and prompts


@dataclass
class CheckConfig(DeviceFlags):
    prompts: str = flag(
        "", "file of prompts, one per line, or a .jsonl with the field text, prompt or question; "
        "empty: pieces of the validation text",
    )
    data: str = flag("", "dataset to take the prompts from; empty: the checkpoint's")
    count: int = flag(8, "prompts", min=1)
    prompt_tokens: int = flag(64, "tokens of a prompt from the validation text", min=1)
    tokens: int = flag(200, "tokens to emit for each prompt, the prefill's one among them", min=2)
    heads: decode.number_or_auto = flag(-1, "MTP heads that draft, or auto; -1: all", min=-1)
    draft_vocab: int = flag(0, "draft only among the first so many ids; 0: all", min=0)


@dataclass
class DecodeConfig(CheckConfig):
    heads: str = flag(
        "", "numbers of MTP heads that draft, with commas, auto among them; empty: 1 .. 4, or 4, "
        "8, 16, 32 where there are more, and auto",
    )
    temperature: str = flag("0,1", "temperatures, with commas; 0 is greedy")
    batch: int = flag(1, "prompts that are continued side by side", min=1)
    top_k: int = flag(0, "sample among the k most likely tokens only; 0: all", min=0)
    accept: str = flag(
        "residual", "accept rule: residual | match | point", choices=tuple(decode.RULES)
    )
    seed: int = flag(1, "seed of the random numbers")
    costs: str = flag("", "for heads auto: times that `bench.py costs` wrote")


@dataclass
class AcceptConfig(DeviceFlags):
    prompts: str = flag(
        "", "file of prompts, as for decode; the row on given text is left out. Empty: pieces of "
        "the validation text",
    )
    data: str = flag("", "dataset to take the prompts from; empty: the checkpoint's")
    count: int = flag(128, "prompts", min=2)
    prompt_tokens: int = flag(64, "tokens of a prompt from the validation text", min=1)
    tokens: int = flag(128, "tokens of each text, without its prompt", min=1)
    heads: str = flag(
        "", "numbers of MTP heads that draft, with commas; empty: 1, 2, 4, 8, 16, as far as there "
        "are so many, and all",
    )
    batch: int = flag(0, "texts that are written side by side; 0: 16, on a GPU 128", min=0)
    seed: int = flag(1, "seed of the texts at temperature 1")


@dataclass
class CostsConfig(DeviceFlags):
    batch: str = flag("1", "numbers of sequences, with commas")
    temperature: float = flag(1.0, "of the rounds that are timed; 0 is greedy", min=0)
    prompt_tokens: int = flag(64, "tokens of a prompt", min=1)
    draft_vocab: int = flag(0, "draft only among the first so many ids; 0: all", min=0)
    out: str = flag("", "write the times to this file, as JSON")


class Checkpoint(NamedTuple):
    path: str
    model: GPT
    tokenizer: decode.Tokenizer
    meta: dict


def load(paths, cfg):
    """-> list of Checkpoints, after checking that they can be compared"""
    checkpoints = [Checkpoint(path, *decode.load(path, cfg.device, cfg.dtype)) for path in paths]
    first = checkpoints[0]
    for other in checkpoints:
        if other.tokenizer.spec != first.tokenizer.spec:
            raise UserError(
                f"{first.path} and {other.path} have different tokenizers, so that their tokens "
                "per second can't be compared: give checkpoints of one dataset"
            )
    return checkpoints


def pick_prompts(checkpoint, cfg, context):
    """-> prompts as lists of ids: of --prompts, or pieces of the validation text, spread evenly;
    and the kind of each, as --prompts says, else "". A context takes them and --tokens new tokens;
    of a short one, they leave at least half"""
    room = max(context - cfg.tokens, context // 2)
    if cfg.prompts:
        rows = read_prompt_rows(cfg.prompts)[: cfg.count]
        prompts = encode(checkpoint.tokenizer, rows, room)
        return prompts, [str(row.get("kind", "")) for _, row in rows]
    pieces = validation_pieces(checkpoint, cfg, min(cfg.prompt_tokens, room))
    return pieces, [""] * cfg.count


def validation_pieces(checkpoint, cfg, tokens):
    """--count pieces of the validation text, spread evenly, as lists of ids; of a short text they
    are half as long as it, at most"""
    train_cfg = train.stored_config(checkpoint.meta)
    if cfg.data:
        train_cfg = dataclasses.replace(train_cfg, data=cfg.data, tokenizer="")
    _, val_ids, data_meta = train.open_data(train_cfg)
    train.check_data(checkpoint.path, train_cfg, data_meta, checkpoint.meta, same_text=False)
    n = min(tokens, len(val_ids) // 2)
    starts = torch.linspace(0, len(val_ids) - n - 1, cfg.count).long().tolist()
    return [val_ids[start : start + n].tolist() for start in starts]


def shared_prompts(checkpoints, cfg):
    """-> prompts for all checkpoints and their kinds, see pick_prompts; and cfg, with no more
    --tokens than the shortest context takes after them"""
    context = min(checkpoint.model.config.block_size for checkpoint in checkpoints)
    prompts, kinds = pick_prompts(checkpoints[0], cfg, context)
    tokens = min(cfg.tokens, context - max(map(len, prompts)))
    if tokens < cfg.tokens:
        print(f"the shortest context, {context} tokens, leaves room for {tokens} new ones")
        cfg = dataclasses.replace(cfg, tokens=tokens)
    return prompts, kinds, cfg


def encode(tokenizer, rows, room):
    """[(text, row of the file)] -> the first ids of each text, at most `room`; where the row says
    "chat": true, it is a message in the chat template, shortened until all fits"""
    prompts = [ids[:room] for ids in tokenizer.encode_batch([text for text, _ in rows])]
    for i, (text, row) in enumerate(rows):
        if not row.get("chat"):
            continue
        # a character may be several tokens: of all beginnings, the longest that fits
        longest = bisect_right(
            range(len(text)), room, key=lambda n: len(tokenizer.encode_chat(text[: n + 1]))
        )
        prompts[i] = tokenizer.encode_chat(text[:longest])[:room]
    return prompts


def make_decoder(model, prompts, cfg, heads, batch=1, temperature=0.0, generator=None):
    """a decoder for any `batch` of these prompts"""
    top_k = getattr(cfg, "top_k", 0) or None
    accept = getattr(cfg, "accept", "residual")
    options = [temperature, top_k, accept]
    draft_vocab = cfg.draft_vocab or None
    length = decode.context_length(model, prompts, cfg.tokens)
    costs = getattr(cfg, "costs", "") or None if heads == "auto" else None
    return decode.make_decoder(
        model, batch, length, heads, *options, None, generator, draft_vocab, costs, fast=cfg.fast
    )


# -----------------------------------------------------------------------------
# check: is the text the same?


@torch.no_grad()
def check(checkpoint, cfg):
    """greedy decoding with and without heads -> dict: how many continuations are the same, and for
    each of the others how nearly the two tokens were tied at the first difference"""
    model = checkpoint.model
    heads = model.config.n_mtp if cfg.heads == -1 else cfg.heads
    if heads == 0 or model.config.n_mtp == 0:
        raise UserError(
            "without heads there is nothing to compare ordinary decoding with; give --heads 1 or "
            "more, and a checkpoint that has heads"
        )
    prompts, _ = pick_prompts(checkpoint, cfg, model.config.block_size)
    plain = make_decoder(model, prompts, cfg, 0)
    drafting = make_decoder(model, prompts, cfg, heads)
    print(f"{heads} heads on {model.weight.device}: {drafting.why}")
    differences = []
    done = 0
    stopped = False
    try:
        for i, prompt in enumerate(tqdm(prompts, "check", unit="prompt")):
            (expected,), _ = decode.run_decoder(plain, [prompt], cfg.tokens)
            (found,), _ = decode.run_decoder(drafting, [prompt], cfg.tokens)
            if found != expected:
                row = dict(prompt=i, **first_difference(model, prompt, expected, found))
                print_difference(row, checkpoint.tokenizer)
                differences.append(row)
            done += 1
    except KeyboardInterrupt:
        stopped = True
    same = done - len(differences)
    print(f"{same} of {done} greedy continuations are identical to ordinary decoding, "
          f"token by token ({str(model.weight.dtype)[6:]})")
    result = dict(same=same, prompts=done, differences=differences)
    if stopped:
        raise Interrupted(result)
    return result


def first_difference(model, prompt, expected, found):
    """-> dict: where two continuations part, the two tokens, the gap between the main head's two
    largest logits there, and one rounding step at their size"""
    at = 0
    while expected[at] == found[at]:
        at += 1
    tokens = torch.tensor([prompt + expected[:at]], device=model.weight.device)
    logits = model.all_logits(tokens)[0][0, -1].float()   # (V,)
    first, second = logits.topk(2).values.tolist()
    rounding = abs(first) * torch.finfo(model.weight.dtype).eps
    return dict(at=at, tokens=[expected[at], found[at]], gap=first - second, rounding=rounding)


def print_difference(row, tokenizer):
    expected, found = [repr(tokenizer.decode([token])) for token in row["tokens"]]
    tie = ""
    if row["gap"] <= 4 * row["rounding"]:
        tie = ": a near-tie (README.md says why)"
    tqdm.write(f"prompt {row['prompt']} differs at token {row['at']}: {expected} or {found}. The "
               f"main head's two largest logits are {row['gap']:.4g} apart; one rounding step at "
               f"their size is {row['rounding']:.4g}{tie}")


# -----------------------------------------------------------------------------
# decode: how fast is it?


def bench_checkpoints(checkpoints, cfg):
    """bench_decoding at each temperature; prints a table for each checkpoint -> all rows, those of
    the first checkpoint first"""
    prompts, kinds, cfg = shared_prompts(checkpoints, cfg)
    for checkpoint in checkpoints:                        # before the first is measured
        check_decoding(checkpoint, prompts, cfg)
    found = [[] for _ in checkpoints]
    for temperature in split("temperature", cfg.temperature, float):
        try:
            models = [checkpoint.model for checkpoint in checkpoints]
            tables = bench_decoding(models, prompts, cfg, temperature, kinds)
        except KeyboardInterrupt:
            raise Interrupted(sum(found, [])) from None
        one_head = {}        # by kind: tokens/s with 1 head, of the first checkpoint with one
        for (path, model, _, _), rows, own in zip(checkpoints, tables, found):
            for row in rows:
                if row["heads"] == 1:
                    one_head.setdefault(row["kind"], row["tokens_per_s"])
            for row in rows:
                one = one_head.get(row["kind"])
                row["over_one"] = one and row["tokens_per_s"] / one
            if model.config.n_mtp == 0:
                show(f"{path} has no MTP heads: decoding without drafts, one token per forward")
            print_decoding(path, [row for row in rows if not row["kind"]])
            print_kinds([row for row in rows if row["kind"]])
            own += [dict(checkpoint=str(path), **row) for row in rows]
        if rows[0]["prompts"] < len(prompts) // cfg.batch * cfg.batch:
            raise Interrupted(sum(found, []))
    return sum(found, [])


def check_decoding(checkpoint, prompts, cfg):
    """raises a UserError for what bench_decoding can't do"""
    path, model, _, _ = checkpoint
    counts = head_counts(model.config.n_mtp, cfg.heads)
    if cfg.costs and counts and "auto" not in counts:
        raise UserError(f"--costs {cfg.costs} has no effect without auto among --heads")
    if cfg.heads not in ("", "0") and model.config.n_mtp and not counts:
        raise UserError(f"--heads is {cfg.heads}, but {path} has {model.config.n_mtp} heads: give "
                        "numbers from 0 to that, or auto, with commas")
    if len(prompts) < cfg.batch:
        raise UserError(f"--batch {cfg.batch} needs at least as many prompts; got {len(prompts)}: "
                        "give more (--count)")
    if counts and cfg.tokens <= model.config.n_mtp:
        raise UserError(f"no continuation is longer than {cfg.tokens} tokens, so the acceptance of "
                        f"{path}'s {model.config.n_mtp} heads can't be measured: give more "
                        "--tokens or shorter prompts")
    small = dataclasses.replace(cfg, fast="off")          # without the kernels of a fast decoder
    for temperature in split("temperature", cfg.temperature, float):
        for heads in [0, *counts]:
            make_decoder(model, prompts, small, heads, temperature=temperature)    # checks flags


def head_counts(K, wanted):
    """with how many heads to decode, beside none: those of --heads that a model with K has"""
    if K == 0:
        return []
    if wanted:
        counts = split("heads", wanted, decode.number_or_auto)
        return [k for k in counts if k == "auto" or 0 < k <= K]
    return [k for k in ((1, 2, 3, 4) if K <= 4 else (4, 8, 16, 32)) if k <= K] + ["auto"]


WARM_UP = 16       # tokens that are decoded before the clock starts


class Timed(NamedTuple):
    """a model, its decoders by their number of heads, and what they did with each group of prompts
    """

    model: torch.nn.Module
    decoders: dict
    times: dict    # heads: (milliseconds of a round, of its drafts)
    stats: dict    # heads: list of Stats
    seconds: dict  # heads: list of how long it took, the reading of the prompt included
    texts: list    # the continuations without heads
    kept: list     # count_accepted on these, added up


@torch.no_grad()
def bench_decoding(models, prompts, cfg, temperature, kinds=()):
    """
    ordinary decoding and several numbers of heads on the same prompts, of all models in turns for
    each prompt, because the speed of a computer changes within minutes
    -> a list for each model, of rows (dicts), first for all prompts, kind "", then for each kind if
    there are several. All but `looping` is without the prompts whose ordinary output is repetitive,
    unless all are; times begin after the prompt has been read, but for speedup_with_prompt:

    tokens_per_forward   of all prompts together
    tokens_per_s, speedup, speedup_with_prompt   medians over prompts; the latter two of the ratio
              to ordinary decoding
    ar, car   of the last head, and ars of all, teacher-forced, on the ordinary output (see
              count_accepted)
    predicted tokens per forward from car; speedup from it and from the times of one round
    gb_per_s  weights of the main model, read once per round
    drafted   how many forwards 0 .. K heads drafted for

    heads="auto" has no round of its own, so its row lacks what is about one
    """
    B = cfg.batch
    groups = [prompts[i : i + B] for i in range(0, len(prompts) - B + 1, B)]
    timed = []
    for model in models:
        generator = torch.Generator(device=model.weight.device).manual_seed(cfg.seed)
        decoders = {}
        for heads in [0, *head_counts(model.config.n_mtp, cfg.heads)]:
            decoders[heads] = make_decoder(model, prompts, cfg, heads, B, temperature, generator)
            decode.run_decoder(decoders[heads], groups[0], min(WARM_UP, cfg.tokens))
        fixed = {heads: decoder for heads, decoder in decoders.items() if heads != "auto"}
        times = time_rounds(fixed, groups[0], cfg.tokens)
        stats, seconds = [{heads: [] for heads in decoders} for _ in range(2)]
        timed.append(Timed(model, decoders, times, stats, seconds, [], []))
    options = [temperature, cfg.top_k or None, cfg.accept, cfg.draft_vocab or None]
    count = run_in_turns(timed, groups, cfg.tokens, options)
    return [model_rows(own, count, B, kinds, temperature) for own in timed]


def model_rows(own, count, B, kinds, temperature):
    """the rows of a Timed model, of its first `count` groups of B prompts"""
    repetitive = [any(map(loops, texts)) for texts in own.texts[:count]]
    main = [*own.model.blocks.parameters(), own.model.weight]
    weights = sum(p.numel() * p.element_size() for p in main)
    by_kind = {"": list(range(count))}
    for kind in dict.fromkeys(kinds):
        if kind and B == 1 and len(set(kinds)) > 1:       # rows of the only kind are those above
            by_kind[kind] = [i for i in range(count) if kinds[i] == kind]
    rows = []
    for kind, members in by_kind.items():
        if not members:                                   # after Ctrl-C
            continue
        used = [i for i in members if not repetitive[i]] or members
        stats = {heads: [own.stats[heads][i] for i in used] for heads in own.decoders}
        shared = dict(kind=kind, prompts=len(members) * B, batch=B,
                      looping=sum(repetitive[i] for i in members))
        kept = sum(own.kept[i] for i in used)
        own_rows = decoding_rows(own.decoders, stats, kept, own.times, weights, shared, temperature)
        for row in own_rows:
            pairs = [(own.seconds[0][i], own.seconds[row["heads"]][i]) for i in used]
            row.update(speedup_with_prompt=median([plain / (whole or 1) for plain, whole in pairs]))
        rows += own_rows
    return rows


def decoding_rows(decoders, stats, kept, times, weights, shared, temperature):
    """rows of bench_decoding, one for each decoder: {heads: the Stats of the prompts}, the sum of
    their count_accepted, {heads: (ms of a round, of its drafts)}, the main model's bytes, and
    entries that all rows have"""
    ar, car = rates_of_sums(kept) if len(decoders) > 1 else ([], [])
    rows = []
    for heads in decoders:
        row = dict(heads=heads, temperature=temperature, decoder=decoders[heads].why, **shared)
        row.update(speeds(stats[heads], stats[0]))
        row.update(dict.fromkeys(OF_A_ROUND))
        if heads != "auto":
            row.update(predictions(
                1 + sum(car[:heads]), row["tokens_per_forward"], times[0], times[heads]
            ))
            row.update(gb_per_s=weights / row["ms_round"] / 1e6)
            if heads:
                row.update(ar=ar[heads - 1], car=car[heads - 1], ars=ar[:heads])
        rows.append(row)
    return rows


def run_in_turns(timed, groups, tokens, options):
    """decode each group of prompts with all decoders of all Timed models, which fill -> how many
    groups all of them have done. Ctrl-C ends it early, if there is such a group"""
    bar = tqdm(groups, "decode", unit="prompt" if len(groups[0]) == 1 else "batch")
    try:
        for group in bar:
            for model, decoders, _, stats, seconds, texts, kept in timed:
                for heads, decoder in decoders.items():
                    begin = time.perf_counter()
                    ids, own = decode.run_decoder(decoder, group, tokens)
                    seconds[heads].append(time.perf_counter() - begin)
                    stats[heads].append(own)
                    if heads == 0:
                        texts.append(ids)
                pairs = zip(group, texts[-1])
                kept.append(sum(count_accepted(model, *pair, *options) for pair in pairs))
            bar.set_postfix({f"{k} heads": f"{own[-1].tokens_per_second:.0f} tokens/s"
                             for k, own in stats.items()})
    except KeyboardInterrupt:
        bar.close()
    count = min(len(own.kept) for own in timed)
    if count == 0:
        raise KeyboardInterrupt
    return count


def speeds(stats, plain_stats):
    """what the clock says: Stats of the same prompts with heads and without"""
    ratios = []
    for own, plain in zip(stats, plain_stats):
        ratios.append(own.tokens_per_second / (plain.tokens_per_second or 1))
    return dict(
        # all tokens over all forwards: a median of short continuations takes few values
        tokens_per_forward=sum(own.tokens - own.sequences for own in stats)
        / max(1, sum(own.forwards for own in stats)),
        tokens_per_s=median([own.tokens_per_second for own in stats]),
        speedup=median(ratios),
        drafted=[sum(counts) for counts in zip(*(own.drafted for own in stats))],
    )


def predictions(expected, measured, plain_times, times):
    """
    expected, measured: tokens per forward, from CAR and as counted;  times: milliseconds of a round
    and of its drafts alone. A round emits so many tokens, ordinary decoding one per (shorter) step:
    speedup = tokens per forward * ms of a step / ms of a round
    """
    ms_step, _ = plain_times
    ms_round, ms_draft = times
    return dict(
        ms_round=ms_round, ms_draft=ms_draft, ms_verify=ms_round - ms_draft,
        predicted_tokens_per_forward=expected,
        predicted_speedup=expected * ms_step / ms_round,
        model_speedup=measured * ms_step / ms_round,
    )


def loops(ids):
    """whether a continuation ends in a piece that stands there three times or more, over at least
    12 tokens: in repetitive text every draft is accepted, and its speed says nothing"""
    if len(ids) < 12:
        return False
    for length in (1, 2, 3):
        if ids[-12:] == ids[-length:] * (12 // length):
            return True
    for length in range(4, len(ids) // 3 + 1):
        if ids[-3 * length :] == ids[-length:] * 3:
            return True
    return False


def text_acceptance(model, texts, *options, **more):
    """(AR, CAR), K numbers each, over all positions of pairs of a prompt and its continuation; the
    options are those of count_accepted"""
    return rates_of_sums(sum(count_accepted(model, *text, *options, **more) for text in texts))


def count_accepted(
    model, prompt, ids, temperature=0.0, top_k=None, accept="residual", draft_vocab=None
):
    """
    how often a round at each position of a continuation would accept drafts 1 .. k, teacher-forced
    -> (1+K,): the number of positions, then the sum over them for each k

    Greedy, it is exact: drafts are right or wrong. When sampling, draft k is accepted with
    probability sum_v min(p, q) by the rule `residual`, and p(argmax q) by the others. CAR_1 is the
    mean of that. CAR_k for k > 1 is an approximation, the mean product of the first k: here the
    heads have read the text's own tokens, in a round accepted drafts, which are not distributed as
    the text is.
    """
    K = model.config.n_mtp
    if K == 0 or len(ids) <= K:
        return torch.zeros(1 + K, dtype=torch.float64)
    tokens = torch.tensor([prompt + ids[:-1]], device=model.weight.device)
    logits = [x[0] for x in model.all_logits(tokens)]                    # (T-k, V) each
    drafted = [x[:, :draft_vocab] for x in logits[1:]]
    if temperature == 0:
        choices = [x.argmax(-1)[None] for x in [logits[0], *drafted]]
        length = decode.accepted_lengths(choices)[0]                      # (T-K,)
        kept = length[:, None] > torch.arange(K, device=length.device)
    else:
        p = decode.probabilities(logits[0], temperature, top_k)
        q = [decode.probabilities(x, temperature, top_k) for x in drafted]
        kept = accept_probs(p, q, accept).cumprod(1)
    kept = kept[len(prompt) - 1 :].cpu().double()                        # of the continuation
    return F.pad(kept.sum(0), (1, 0), value=len(kept))


def rates_of_sums(kept):
    """sums of count_accepted -> (AR, CAR)"""
    count, *sums = kept.tolist()
    car = [total / count for total in sums]
    ar = [after / before if before else 0.0 for before, after in zip([1.0, *car], car)]
    return ar, car


def accept_probs(target_probs, draft_probs, accept):
    """target_probs (T, V), draft_probs of head k (T-k, V or fewer) -> the probability that its
    draft is accepted, given that those before it were, (T-K, K)"""
    rows = len(target_probs) - len(draft_probs)           # those with all K drafts
    result = []
    for k, q in enumerate(draft_probs, 1):
        p = target_probs[k : k + rows]                    # of the same token
        q = F.pad(q[:rows], (0, p.size(1) - q.size(1)))   # draft_vocab
        if accept in decode.FIXED_DRAFT:
            result.append(p.gather(1, q.argmax(-1, keepdim=True))[:, 0])
        else:                                             # residual, as for a rule of your own
            result.append(torch.minimum(p, q).sum(-1))
    return torch.stack(result, 1)


def time_rounds(decoders, group, tokens):
    """{heads: decoder} -> {heads: (milliseconds of a whole round, of its drafts alone)}"""
    device = decoders[0].n.device
    # on a GPU the host only waits for the last one
    rounds = 8 if device.type == "cuda" else 1

    def measure(functions):
        for decoder in decoders.values():
            decoder.prefill(group, tokens)
        times = milliseconds([repeated(function, rounds) for function in functions], device)
        return [ms / rounds for ms in times]

    whole = measure([decoder.round for decoder in decoders.values()])
    drafts = measure([draft_function(decoder) for decoder in decoders.values()])
    drafts[0] = 0.0                                       # without heads
    return dict(zip(decoders, zip(whole, drafts)))


def draft_function(decoder):
    """-> a function that drafts, as in a round of this decoder: on the fast path, a graph"""
    if decoder.heads == 0:
        return lambda: None
    if type(decoder) is decode.Decoder or not decoder.n.is_cuda:
        return torch.no_grad()(decoder.draft)
    from fast.decode import capture

    return capture(decoder.draft)


OF_A_ROUND = (
    "ar", "car", "ars", "ms_round", "ms_draft", "ms_verify", "predicted_tokens_per_forward",
    "predicted_speedup", "model_speedup", "gb_per_s",
)
COLUMNS = [                                               # title, key, how it is printed
    ("heads", "heads", ">5"), ("AR", "ar", "6.3f"), ("CAR", "car", "6.3f"),
    ("tok/fwd", "tokens_per_forward", "8.2f"), ("expected", "predicted_tokens_per_forward", "9.2f"),
    ("tok/s", "tokens_per_s", "9.1f"), ("vs plain", "speedup", "9.2f"),
    ("+ prompt", "speedup_with_prompt", "9.2f"), ("predicted", "predicted_speedup", "10.2f"),
    ("vs 1 head", "over_one", "10.2f"), ("ms/round", "ms_round", "9.3f"),
    ("draft", "ms_draft", "7.3f"), ("GB/s", "gb_per_s", "6.1f"),
]


def print_decoding(name, rows):
    first = rows[0]
    groups = first["prompts"] // first["batch"]
    excluded = f"{first['looping']} of {groups} were excluded for repetitive output"
    if first["looping"] == groups:
        excluded = "all have repetitive output, so that the speeds say little"
    show(f"\n{name}, temperature {first['temperature']}, batch {first['batch']}, "
         f"{rows[-1]['decoder']}\n{groups} prompts (or batches of prompts): {excluded}")
    widths = [int(form.split(".")[0].lstrip(">")) for _, _, form in COLUMNS]
    print(" ".join(title.rjust(width) for (title, _, _), width in zip(COLUMNS, widths)))
    for row in rows:
        cells = []
        for (_, key, form), width in zip(COLUMNS, widths):
            cells.append(" " * width if row[key] is None else format(row[key], form))
        print(" ".join(cells), flush=True)
        if row["heads"] == "auto":
            print(f"auto: forwards for which 0 .. K heads drafted: {row['drafted']}", flush=True)


def print_kinds(rows):
    """a short table, a line for each kind of prompts and number of heads"""
    if rows:
        print(f"{'kind':>12} {'prompts':>7} {'excluded':>8} {'heads':>5} {'tok/fwd':>8} "
              f"{'vs plain':>9}  AR of the heads")
    for row in rows:
        if row["heads"]:
            ars = " ".join(f"{x:.3f}" for x in row["ars"] or [])
            found = f"{row['tokens_per_forward']:8.2f} {row['speedup']:9.2f}  {ars}"
            if row["looping"] == row["prompts"]:
                found = "  all have repetitive output, whose speed says nothing"
            show(f"{row['kind']:>12} {row['prompts']:7} {row['looping']:8} {row['heads']:>5} "
                 f"{found}", flush=True)


# -----------------------------------------------------------------------------
# costs: how long does a round take?


@torch.no_grad()
def bench_costs(checkpoint, cfg):
    """-> {batch, as text: times of a round with 0 .. K heads, in ordinary steps}, in the middle of
    the context; prints them. HEAD_COUNTS are timed; what lies between is interpolated"""
    model = checkpoint.model
    K = model.config.n_mtp
    if K == 0:
        raise UserError(f"{checkpoint.path} has no MTP heads; there is only one kind of round")
    n = min(cfg.prompt_tokens, model.config.block_size // 2)
    tokens = model.config.block_size - n
    options = [cfg.temperature, None, "residual", None, None, cfg.draft_vocab or None]
    costs = {}
    for batch in split("batch", cfg.batch, int):
        decoders = {}
        timed = [k for k in range(K + 1) if k in HEAD_COUNTS or k == K]
        for k in tqdm(timed, f"batch {batch}", unit="decoder"):
            decoders[k] = decode.make_decoder(
                model, batch, n + tokens, k, *options, fast=cfg.fast
            )
        prompts = [[1] * n] * batch
        time_rounds(decoders, prompts, tokens)                           # warm up
        times = time_rounds(decoders, prompts, tokens)
        ratios = [times[k][0] / times[0][0] for k in timed]
        costs[str(batch)] = np.interp(range(K + 1), timed, ratios).tolist()
        shown = " ".join(f"{cost:.2f}" for cost in costs[str(batch)])
        print(f"batch {batch}, temperature {cfg.temperature}, {decoders[K].why}: an ordinary step "
              f"takes {times[0][0]:.3f} ms, rounds with 0 .. {K} heads {shown} times that",
              flush=True)
    return costs


# -----------------------------------------------------------------------------
# train: what does a training step cost?


@dataclass
class LossFlags:
    """flags of `bench.py train` beside those of train.py"""

    heads: str = flag("0,1,2,4", "numbers K of MTP heads, with commas")
    kl: str = flag("forward", "divergences of distill.py for the KL term, with commas")
    top_n: str = flag(
        "512,4096", "N of the TopN, with commas: counts, or fractions of the vocabulary below 1"
    )
    fast: str = flag("auto", "fused loss (fast/loss.py): auto | on | off, with commas")
    dtype: str = flag(
        "auto", "auto | bfloat16 | float32 (TF32 where the GPU has it), with commas"
    )
    memory_gb: str = flag(
        "", "instead: which micro_batch fits on cards of so many GB, with commas, emulated on this "
        "GPU; 0: on this one as it is (preset: small)",
    )
    repeats: int = flag(20, "training steps of each kind that are timed", min=1)
    vocab_size: int = flag(50304, "vocabulary of the random tokens", min=2)


STEP_FLAGS = (                                            # of train.py, that a single step reads
    "preset", "n_layer", "n_head", "n_embd", "block_size", "dropout", "batch_size", "micro_batch",
    "detach_teacher", "device", "compile",
)


def flags_of_train():
    """STEP_FLAGS as train.py has them, help and limits included"""
    for own in dataclasses.fields(train.TrainConfig):
        if own.name in STEP_FLAGS:
            copy = dataclasses.field(default=own.default, metadata=own.metadata)
            yield own.name, own.type, copy


StepConfig = dataclasses.make_dataclass("StepConfig", flags_of_train(), bases=(LossFlags,))


class Case(NamedTuple):
    """a kind of training step; it is timed as the last one of a run, with the KL at full weight"""

    n_mtp: int
    beta: float = 0.0                                     # 0: without the KL
    top_n: float = 1
    kl: str = "forward"
    fast: str = "auto"

    def config(self, cfg):
        """cfg, changed to take such steps"""
        return dataclasses.replace(
            cfg, n_mtp=self.n_mtp, alpha="0.3", beta=str(self.beta), top_n=self.top_n, kl=self.kl,
            fast=self.fast,
        )


def split(name, text, kind):
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{name} is {text!r}; it must be numbers, with commas") from None


def cases(own):
    """StepConfig -> every Case, sorted by K"""
    result = []
    for K in sorted(set(split("heads", own.heads, int))):
        for fast in own.fast.split(","):
            result.append(Case(K, fast=fast))
            for kl in own.kl.split(","):
                for top_n in split("top_n", own.top_n, float):
                    if K > 0:
                        result.append(Case(K, 0.5, top_n, kl, fast))
    return result


def step_function(model, optimizer, cfg, tokens, dtype, grad_function, parts=1):
    """-> a function that takes a training step on random micro-batches, each as large as tokens"""

    def step():
        batches = [torch.randint_like(tokens, model.config.vocab_size) for _ in range(parts)]
        train.train_step(
            model, model, optimizer, cfg, cfg.steps, batches, dtype, grad_function
        )

    return step


def time_steps(models, device, dtype, steps=20, parts=1):
    """
    [(model, TrainConfig), ..] -> rows (dicts): the median time of a training step on random tokens,
    in so many parts (micro-batches), taken in turns; the peak memory, without that of the models
    before; which loss ran. One model may stand there with several configs
    """
    cuda = device.type == "cuda"
    many = 4 if cuda else 1                               # steps per reading of the clock
    if cuda:
        torch._dynamo.reset()
    before = {}
    optimizers = {}
    rows = []
    functions = []
    for model, cfg in models:
        B = cfg.micro_batch or cfg.batch_size
        tokens = torch.randint(model.config.vocab_size, (B, cfg.block_size + 1), device=device)
        if model in before:
            grad_function, why = train.pick_loss(cfg, device, dtype)
        else:
            gc.collect()                                  # an earlier model
            before[model] = torch.cuda.memory_allocated() if cuda else 0
            optimizers[model] = train.make_optimizer(model.to(device), cfg)
            grad_function, why = train.compile_model(model, cfg, tokens, dtype)
        step = step_function(model, optimizers[model], cfg, tokens, dtype, grad_function, parts)
        repeated(step, 5)()                               # warm up
        peak = None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = (torch.cuda.max_memory_allocated() - before[model]) / 2**30
        rows.append(dict(tokens_per_s=parts * B * cfg.block_size, peak_gib=peak, loss=why))
        functions.append(repeated(step, many))
    times = milliseconds(functions, device, -(-steps // many))
    result = []
    for ms, row in zip(times, rows):
        row["tokens_per_s"] *= 1000 * many / ms
        result.append(dict(ms=ms / many, **row))
    return result


def bench_training(cfg, device, dtype, steps=20, cases=(), vocab=50304):
    """time_steps of the cases -> rows; those with the same K take turns on one model"""
    rows = []
    for K in dict.fromkeys(case.n_mtp for case in cases):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, K))
        if dtype == torch.float64:
            model = model.double()                        # as train.py
        group = [case for case in cases if case.n_mtp == K]
        models = [(model, case.config(cfg)) for case in group]
        try:
            times = time_steps(models, device, dtype, steps)
        except KeyboardInterrupt:
            raise Interrupted(rows) from None
        for case, row in zip(group, times):
            kind = dict(n_mtp=K, beta=case.beta, top_n=case.top_n, kl=case.kl)
            rows.append({**kind, **row})
            print_step(rows[-1])
    return rows


def print_step(row):
    kind = "without KL"
    if row["beta"]:
        kind = f"{row['kl']} N={row['top_n']:g}"
    memory = "" if row["peak_gib"] is None else f", peak {row['peak_gib']:.2f} GiB"
    print(f"K={row['n_mtp']} {kind:>16}: {row['ms']:8.2f} ms per step, {row['tokens_per_s']:9.0f} "
          f"tokens/s{memory}; loss: {row['loss']}", flush=True)


# -----------------------------------------------------------------------------
# the command line


def main_train(given, _):
    own = StepConfig(**given)
    check_flags(own)
    if own.memory_gb:
        return main_cards(given, own)
    lists = {field.name for field in dataclasses.fields(LossFlags)}
    base = {name: value for name, value in given.items() if name not in lists}
    cfg = train.make_config({"preset": "gpt2", **base})
    wanted = cases(own)
    configs = [dataclasses.replace(cfg, dtype=name) for name in own.dtype.split(",")]
    for config in configs:
        for case in wanted:
            train.check(case.config(config))
    device = pick_device(cfg.device)
    torch.set_float32_matmul_precision("high")            # as train.py
    rows = []
    for config in configs:
        dtype, why = pick_dtype(config.dtype, device)
        print(f"device {device}, {str(dtype)[6:]} ({why}); preset {cfg.preset}")
        found = bench_training(config, device, dtype, own.repeats, wanted, own.vocab_size)
        rows += [dict(row, dtype=str(dtype)[6:]) for row in found]
    return rows


def main_cards(given, own):
    """bench.py train --memory_gb"""
    from results import cards

    for name in ("heads", "kl", "top_n", "vocab_size", "micro_batch"):
        if name in given:
            raise UserError(f"--{name} has no effect with --memory_gb, which takes the preset's "
                            "loss and vocabulary and looks for the micro-batch; leave it out")
    base = {name: value for name, value in given.items() if name in STEP_FLAGS}
    base["fast"] = own.fast
    configs = [train.make_config({**base, "dtype": name}) for name in own.dtype.split(",")]
    sizes = split("memory_gb", own.memory_gb, float)
    if not all(0 <= size < math.inf for size in sizes):
        raise UserError(f"--memory_gb is {own.memory_gb!r}; it must be sizes in GB, with commas")
    device = pick_device(configs[0].device)
    if device.type != "cuda":
        raise UserError(f"--memory_gb limits the memory of a CUDA GPU; the device is {device}")
    torch.set_float32_matmul_precision("high")            # as train.py
    return cards.measure(configs, device, sizes, own.repeats)


def read_config(cls, given):
    cfg = cls(**given)
    check_flags(cfg)
    for name in ("data", "prompt_tokens"):
        if cfg.prompts and name in given:
            raise UserError(f"--{name} has no effect with --prompts; leave one of them out")
    return cfg


def main_check(given, paths):
    cfg = read_config(CheckConfig, given)
    (checkpoint,) = load(paths, cfg)
    return check(checkpoint, cfg)


def main_decode(given, paths):
    cfg = read_config(DecodeConfig, given)
    return bench_checkpoints(load(paths, cfg), cfg)


def main_accept(given, paths):
    from results import acceptance

    cfg = read_config(AcceptConfig, given)
    results = []
    try:
        for result in acceptance.measure(load(paths, cfg), cfg):
            results.append(result)
    except KeyboardInterrupt:
        raise Interrupted(results) from None
    return results


def main_costs(given, paths):
    cfg = CostsConfig(**given)
    check_flags(cfg)
    if min(split("batch", cfg.batch, int)) < 1:
        raise UserError(f"--batch is {cfg.batch!r}; it must be numbers from 1 on, with commas")
    if cfg.out:
        check_kind(cfg.out, "--out", ".json")             # before the work
    (checkpoint,) = load(paths, cfg)
    costs = bench_costs(checkpoint, cfg)
    if cfg.out:
        write_file(cfg.out, json.dumps(costs, indent=1) + "\n", "--out", ".json")
    return costs


COMMANDS = {                                              # flags, number of checkpoints, what to do
    "check": (CheckConfig, 1, main_check),
    "decode": (DecodeConfig, "+", main_decode),
    "accept": (AcceptConfig, "+", main_accept),
    "costs": (CostsConfig, 1, main_costs),
    "train": (StepConfig, None, main_train),
}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        return print(__doc__)
    if name not in COMMANDS:
        raise UserError(f"the first argument is {name!r}; it must be one of {', '.join(COMMANDS)}")
    cls, checkpoints, command = COMMANDS[name]
    extra = [
        ("command", dict(choices=[name], help="what to measure")),
        JSON_FLAG,
    ]
    if checkpoints:
        extra.insert(1, ("checkpoints", dict(
            nargs=checkpoints, metavar="CKPT", help="checkpoint written by train.py or extend.py"
        )))
    given, rest = parse(cls, __doc__, extra)
    stopped = False
    try:
        result = command(given, rest.get("checkpoints"))
    except Interrupted as error:
        result = error.result
        stopped = True
    if rest["json"]:
        print(json.dumps(finite(result)))
    if stopped:
        sys.exit("bench.py: interrupted; what is printed was measured before")


if __name__ == "__main__":
    run(main)
