"""
bench.py: is the decoded text the same, how fast is decoding, and what does a training step cost? Called by the scripts:

    python decode.py CKPT --check           greedy text with heads against plain decoding, token by token -> check
    python decode.py CKPT .. --bench        plain decoding and 1 .. 4 (8, 16, 32) heads on the same prompts -> bench_decoding
    python train.py --preset gpt2 --bench   a training step for several K, without and with the KL        -> bench_training

Prompts come from --prompts or from the validation text. Training steps run on random tokens and fresh weights, as
results/cost.py does. All times are medians of the wall clock, so run it with the machine to itself.
"""

import dataclasses
import gc
import itertools
import json
import statistics
import time
from pathlib import Path

import torch

import decode
import train
from model import GPT, GPTConfig

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
    """median time of one call of each function, called in turns: what slows the machine for a while slows all of them"""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, times):
            begin = now(device)
            function()
            own.append(1000 * (now(device) - begin))
    return [median(own) for own in times]


# -----------------------------------------------------------------------------
# prompts


def read_prompts(cfg, tokenizer, meta, model):
    """prompts as lists of ids: from --prompts, or pieces of the validation text, spread evenly"""
    # as long as leaves room for --tokens, or half of a short context
    room = max(model.config.block_size - cfg.tokens, model.config.block_size // 2)
    if cfg.prompts:
        lines = Path(cfg.prompts).read_text(encoding="utf-8").splitlines()
        if cfg.prompts.endswith(".jsonl"):
            rows = [json.loads(line) for line in lines if line.strip()]
            lines = [next((str(row[k]) for k in ("text", "prompt", "question") if k in row), "") for row in rows]
        prompts = [ids for ids in (tokenizer.encode(line)[:room] for line in lines) if ids]
        if not prompts:
            raise ValueError(f"{cfg.prompts} holds no prompt; expected lines of text, or .jsonl with a text, prompt or question field")
        return prompts[: cfg.count]
    train_cfg = train.stored_config(meta)
    if cfg.data:
        train_cfg = dataclasses.replace(train_cfg, data=cfg.data, tokenizer="")
    _, val, data_meta = train.open_data(train_cfg)
    if data_meta["tokenizer"] != meta["tokenizer"]:
        raise ValueError(f"{train_cfg.data} was made with another tokenizer than the checkpoint: pass --data or --prompts")
    n = min(cfg.prompt_tokens, room, len(val) // 2)
    return [val[s : s + n].tolist() for s in torch.linspace(0, len(val) - n - 1, cfg.count).long().tolist()]


def loops(ids):
    """whether a continuation ends in a piece repeated three times or more, over at least 12 tokens: in such a text every
    draft is accepted, and its speed says nothing"""
    return any(ids[-p:] == ids[-2 * p : -p] == ids[-3 * p : -2 * p] for p in range(4, len(ids) // 3 + 1)) or (
        len(ids) >= 12 and any(ids[-12:] == ids[-p:] * (12 // p) for p in (1, 2, 3)))


# -----------------------------------------------------------------------------
# decode.py --check


@torch.no_grad()
def check(model, tokenizer, meta, cfg):
    """greedy, with and without heads -> how many continuations agree; at the first difference, how near the tie was"""
    prompts, heads, same, rows = read_prompts(cfg, tokenizer, meta, model), None if cfg.heads < 0 else cfg.heads, 0, []
    for n, prompt in enumerate(prompts):
        (a,), _ = decode.generate(model, [prompt], cfg.tokens, heads=0, compile=cfg.compile)
        (b,), _ = decode.generate(model, [prompt], cfg.tokens, heads=heads, compile=cfg.compile, draft_vocab=cfg.draft_vocab or None)
        if a == b:
            same += 1
            continue
        at = next(i for i in range(len(a)) if a[i] != b[i])
        logits = model.all_logits(torch.tensor([prompt + a[:at]], device=model.weight.device))[0][0, -1].float()       # (V,)
        first, second = logits.topk(2).values.tolist()
        gap, rounding = first - second, abs(first * torch.finfo(model.weight.dtype).eps)
        rows.append(dict(prompt=n, at=at, gap=gap, rounding=rounding))
        print(f"prompt {n} differs at token {at}: {tokenizer.decode([a[at]])!r} or {tokenizer.decode([b[at]])!r}. "
              f"The main head's two best logits are {gap:.4g} apart; one rounding step at their size is {rounding:.4g}"
              + (": a near-tie (README.md, 'Is the text really identical?')" if gap <= 4 * rounding else ""))
    print(f"{same} of {len(prompts)} greedy continuations are identical to plain decoding, token by token ({str(model.weight.dtype)[6:]})")
    return dict(same=same, prompts=len(prompts), differences=rows)


# -----------------------------------------------------------------------------
# decode.py --bench


def compare(models, cfg):
    """bench_decoding at temperatures 0 and 1 for each of (path, model, tokenizer, meta), on prompts for the first of them;
    prints a table each -> all rows"""
    _, model, tokenizer, meta = models[0]
    prompts, baseline, result = read_prompts(cfg, tokenizer, meta, model), {}, []
    for path, model, _, _ in models:
        for temperature in (0.0, 1.0):
            rows = bench_decoding(model, prompts, cfg, temperature, baseline.get(temperature))
            baseline.setdefault(temperature, next((r["tokens_per_s"] for r in rows if r["heads"] == 1), None))
            print_decoding(path, rows)
            result += [dict(checkpoint=str(path), **row) for row in rows]
    return result


@torch.no_grad()
def bench_decoding(model, prompts, cfg, temperature, baseline=None):
    """
    plain decoding and 1 .. 4 heads (4, 8, 16, 32 of an extended model) on the same prompts, one after the other for each prompt -> rows (dicts), by heads.
    All but looping counts only the prompts whose plain continuation does not end in a loop:

    tokens_per_forward, tokens_per_s   medians over prompts;  speedup  median over prompts of the ratio to plain decoding
    ar, car   teacher-forced, on the plain continuations (see text_acceptance)
    predicted tokens per forward from car, and speedup from it and the times of one plain step, one draft, one verify
    over_one  against one head of the first checkpoint (the paper's baseline);  gb_per_s  weights read once a forward
    """
    device, K = model.weight.device, model.config.n_mtp
    length = min(model.config.block_size, max(map(len, prompts)) + cfg.tokens)
    counts = [cfg.heads] if cfg.heads > 0 else [] if cfg.heads == 0 else list(range(1, K + 1)) if K <= 4 else [k for k in (4, 8, 16, 32) if k <= K]
    groups = [prompts[i : i + cfg.batch] for i in range(0, len(prompts) - cfg.batch + 1, cfg.batch)]
    if not groups:
        raise ValueError(f"--batch {cfg.batch} needs at least as many prompts; got {len(prompts)} (--count)")
    generator = torch.Generator(device=device).manual_seed(cfg.seed)
    decoders = {k: decode.Decoder(model, cfg.batch, length, k, temperature, cfg.top_k or None, cfg.accept, None, generator, cfg.compile, cfg.draft_vocab or None)
                for k in [0, *counts]}
    for decoder in decoders.values():
        decode.run_decoder(decoder, groups[0], min(16, cfg.tokens))     # warm up
    runs, looping, plain = {k: [] for k in decoders}, [], []            # runs[k]: the Stats of each group; plain: its texts
    for group in groups:
        texts = {k: decode.run_decoder(decoder, group, cfg.tokens) for k, decoder in decoders.items()}
        looping.append(any(loops(ids) for ids in texts[0][0]))
        plain.append(list(zip(group, texts[0][0])))
        for k, (_, stats) in texts.items():
            runs[k].append(stats)
    good = [i for i in range(len(groups)) if not looping[i]] or range(len(groups))
    texts = [text for i in good for text in plain[i]]
    ar, car = text_acceptance(model, texts, temperature, cfg.top_k or None, cfg.accept, cfg.draft_vocab or None) if counts else ([], [])
    weights = sum(p.numel() * p.element_size() for p in [*model.blocks.parameters(), model.weight])
    rows, times = [], time_rounds(decoders, groups[0], cfg.tokens)
    for k in decoders:
        (step, _), (whole, draft) = times[0], times[k]                  # step: of plain decoding
        tpf = median([runs[k][i].tokens_per_forward for i in good])
        tps = median([runs[k][i].tokens_per_second for i in good])
        speedup = median([runs[k][i].tokens_per_second / (runs[0][i].tokens_per_second or 1) for i in good])
        expected = 1 + sum(car[:k])
        rows.append(dict(heads=k, temperature=temperature, tokens_per_forward=tpf, tokens_per_s=tps, speedup=speedup, ms_round=whole,
                         ms_draft=draft, ms_verify=whole - draft, ar=ar[k - 1] if k else None, car=car[k - 1] if k else None,
                         predicted_tokens_per_forward=expected, predicted_speedup=expected * step / whole,
                         model_speedup=tpf * step / whole, gb_per_s=weights / whole / 1e6,
                         prompts=len(groups) * cfg.batch, looping=sum(looping), batch=cfg.batch))
    one = baseline or next((row["tokens_per_s"] for row in rows if row["heads"] == 1), None)
    for row in rows:
        row["over_one"] = row["tokens_per_s"] / one if one else None
    return rows


def text_acceptance(model, texts, temperature=0.0, top_k=None, accept="residual", draft_vocab=None):
    """
    (AR, CAR), K numbers each, of the continuations in texts, pairs of a prompt and what came after it: how often a round
    at each position would accept drafts 1..k. Greedy: drafts are right or wrong. Sampled: draft k is accepted with probability sum_v min(p, q) by
    the rule `residual`, p(argmax q) by the others, and CAR_k is the mean product of the first k (on text drawn from p)
    """
    K, rows = model.config.n_mtp, []
    for prompt, ids in texts:
        if len(ids) <= K:
            continue
        logits = model.all_logits(torch.tensor([prompt + ids[:-1]], device=model.weight.device))
        logits[1:] = [x[..., :draft_vocab] for x in logits[1:]]
        T = len(prompt) + len(ids) - 1 - K                              # rows that have all K drafts
        if temperature == 0:
            length = decode.accepted_lengths([x.argmax(-1) for x in logits])[0]                          # (T,)
            kept = length[:, None] > torch.arange(K, device=length.device)                              # (T, K)
        else:
            p, *q = [decode.probabilities(x[0], temperature, top_k) for x in logits]
            pairs = [(p[k : k + T], torch.nn.functional.pad(law[:T], (0, p.size(-1) - law.size(-1)))) for k, law in enumerate(q, 1)]
            kept = torch.stack([torch.minimum(a, b).sum(-1) if accept == "residual" else a.gather(-1, b.argmax(-1, keepdim=True))[:, 0]
                                for a, b in pairs], 1).cumprod(1)
        rows.append(kept[len(prompt) - 1 :])
    if not rows:
        raise ValueError(f"no continuation is longer than {K} tokens, so the acceptance of {K} heads can't be measured: "
                         "give more --tokens or shorter prompts")
    car = torch.cat(rows).cpu().double().mean(0).tolist()
    return [b / a if a else 0.0 for a, b in zip([1.0, *car], car)], car


def time_rounds(decoders, group, tokens):
    """{heads: decoder} -> {heads: milliseconds of a whole round, and of its drafts alone (0 without heads)}"""
    device, rounds = decoders[0].n.device, 8 if decoders[0].n.is_cuda else 1     # on a GPU the host only waits for the last one

    def several(function):
        return lambda: [function() for _ in range(rounds)]

    for decoder in decoders.values():
        decoder.start(group, tokens)
    whole = milliseconds([several(decoder.step) for decoder in decoders.values()], device)
    for decoder in decoders.values():
        decoder.start(group, tokens)
    drafts = milliseconds([several(d.capture(d.draft) if rounds > 1 else d.draft) for d in decoders.values()], device)
    return {k: (w / rounds, d / rounds if k else 0.0) for k, w, d in zip(decoders, whole, drafts)}


def print_decoding(name, rows):
    first = rows[0]
    print(f"\n{name}, temperature {first['temperature']}, batch {first['batch']}: {first['prompts']} prompts; {first['looping']} groups "
          "whose plain continuation ends in a loop are left out of the medians"
          + (" (all loop: speeds say little)" if first["looping"] * first["batch"] >= first["prompts"] else ""))
    print(f"{'heads':>5} {'AR':>6} {'CAR':>6} {'tok/fwd':>8} {'expected':>9} {'tok/s':>9} {'x plain':>8} {'predicted':>10} {'x 1 head':>9} "
          f"{'ms/round':>9} {'draft':>7} {'GB/s':>6}")
    for r in rows:
        part = [f"{r[k]:6.3f}" if r[k] is not None else f"{'':6}" for k in ("ar", "car")]
        print(f"{r['heads']:>5} {part[0]} {part[1]} {r['tokens_per_forward']:8.2f} {r['predicted_tokens_per_forward']:9.2f} "
              f"{r['tokens_per_s']:9.1f} {r['speedup']:8.2f} {r['predicted_speedup']:10.2f} {r['over_one'] or 0:9.2f} "
              f"{r['ms_round']:9.3f} {r['ms_draft']:7.3f} {r['gb_per_s']:6.1f}")


# -----------------------------------------------------------------------------
# train.py --bench

BENCH = [(0, 0, 1), (1, 0, 1), (2, 0, 1), (4, 0, 1), (4, 0.5, 512), (4, 0.5, 4096)]       # K, beta, N


def time_steps(models, device, dtype, steps=20):
    """[(model, cfg), ..] -> a dict each: median time of a training step on random tokens, in turns, and the peak memory of the
    model's own. One model may stand there with several cfg"""
    def text(model, cfg, B):
        return torch.randint(model.config.vocab_size, (B, cfg.block_size + 1), device=device)

    turn, cuda = [], device.type == "cuda"
    many, before, optimizers, rows = 4 if cuda else 1, {}, {}, []            # on a GPU the clock is read at every fourth step
    if cuda:
        torch._dynamo.reset()
    for model, cfg in models:
        B = cfg.micro_batch or cfg.batch_size
        if model not in before:
            gc.collect()                                       # an earlier model, which its compiled parts hold in a cycle
            before[model] = torch.cuda.memory_allocated() if cuda else 0
            optimizers[model] = train.make_optimizer(model.to(device), cfg)
            if cuda and cfg.compile != "off":
                train.compile_model(model, cfg, text(model, cfg, B), dtype)

        def one(model=model, cfg=cfg, B=B):
            train.train_step(model, model, optimizers[model], cfg, cfg.steps, [text(model, cfg, B)], dtype)

        for _ in range(5):
            one()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            one()
        rows.append(dict(tokens=B * cfg.block_size, peak_gib=(torch.cuda.max_memory_allocated() - before[model]) / 2**30 if cuda else None))
        turn.append(lambda one=one: [one() for _ in range(many)])
    times = milliseconds(turn, device, -(-steps // many))
    return [dict(ms=t / many, tokens_per_s=1000 * many * r["tokens"] / t, peak_gib=r["peak_gib"]) for t, r in zip(times, rows)]


def bench_training(cfg, device, dtype, steps=20, combos=BENCH, vocab=50304):
    """time_steps for several K, without and with the KL -> rows; what has the same K is timed in turns, and then printed"""
    rows = []
    for K, group in itertools.groupby(combos, lambda combo: combo[0]):
        torch.manual_seed(0)
        model, group = GPT(GPTConfig(vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, K)), list(group)
        configs = [dataclasses.replace(cfg, n_mtp=K, beta=str(beta), top_n=top_n, alpha="0.3") for _, beta, top_n in group]
        for (_, beta, top_n), row in zip(group, time_steps([(model, c) for c in configs], device, dtype, steps)):
            rows.append(dict(n_mtp=K, beta=beta, top_n=top_n, **row))
            print(f"K={K} beta={beta} N={top_n if beta else '-':>4}: {row['ms']:8.2f} ms a step, {row['tokens_per_s']:9.0f} tokens/s"
                  + (f", peak {row['peak_gib']:.2f} GiB" if device.type == "cuda" else ""), flush=True)
    return rows
