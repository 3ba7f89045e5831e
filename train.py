"""
train.py: train a GPT with MTP heads, self-distilled (MTP-D), on real text.

    python train.py                                    preset tiny on a CPU, small on a CUDA GPU; prepares its own data
    python train.py --preset shakespeare --n_mtp 0     nanoGPT's shakespeare_char run, as a plain GPT
    python train.py --data my.txt --beta 0             your text; without distillation (plain MTP)
    python train.py --resume out/tiny/ckpt.pt          go on exactly where the checkpoint was written
    torchrun --nproc_per_node=4 train.py --preset gpt2 data-parallel on 4 GPUs of one machine
    python train.py --preset gpt2 --bench              time and memory of a training step for K = 0, 1, 2, 4
    python train.py -h                                 every flag, its default and its meaning

Writes OUT/ckpt.pt (weights, config, tokenizer, optimizer: all that decode.py and extend.py need), OUT/log.jsonl and,
with --keep_best, OUT/best.pt, the checkpoint of the lowest validation loss.
Ends with a table (per head: loss, acceptance) and a sample drawn by speculative decoding.
"""

import dataclasses
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import decode
import distill
from common import Log, autocast, knob, load_checkpoint, parse, pick_device, pick_dtype, processes, run, save_checkpoint
from data.prepare import Tokenizer, find_dataset, load_dataset
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# every knob, with its default and meaning; presets below change some of them, flags change any


@dataclass
class TrainConfig:
    preset: str = knob("", "tiny | small | shakespeare | gpt2; empty: small with CUDA, else tiny")
    data: str = knob("stories", "a dataset folder, or a source or path for data/prepare.py")
    tokenizer: str = knob("", "bytes | bpe:N | gpt2; default: the source's standard tokenizer")
    out: str = knob("", "folder for ckpt.pt and log.jsonl; empty: out/PRESET")
    # model
    n_layer: int = knob(6, "transformer blocks in the trunk")
    n_head: int = knob(6, "attention heads of a block")
    n_embd: int = knob(384, "width d")
    n_mtp: int = knob(4, "MTP heads K; 0: a plain GPT")
    block_size: int = knob(256, "context length T, in tokens")
    dropout: float = knob(0.0, "dropout rate")
    embed_std: float = knob(0.02, "spread of the embedding's initial weights; narrow models learn faster with more")
    # optimisation
    steps: int = knob(1000, "optimizer steps")
    batch_size: int = knob(32, "windows of T tokens per optimizer step, over all GPUs")
    micro_batch: int = knob(0, "windows per forward; fewer need less memory and give the same result (but for dropout); 0: all at once")
    lr: float = knob(1e-3, "peak learning rate (AdamW)")
    min_lr: float = knob(0.1, "final learning rate, as a fraction of the peak")
    warmup: int = knob(100, "steps of linear warm-up")
    weight_decay: float = knob(0.1, "AdamW's, on matrices only")
    beta2: float = knob(0.99, "AdamW's second-moment decay")
    clip: float = knob(1.0, "largest gradient norm; 0: no clipping")
    clip_apart: bool = knob(False, "clip the gradients of the MTP heads and of the rest separately")
    seed: int = knob(1, "seed of weights, batches and dropout")
    # the loss (distill.py)
    alpha: str = knob("0.3", "weight of the heads' cross-entropy: a number, or K numbers with commas")
    beta: str = knob("0.5", "weight of the heads' KL to the main head; 0: plain MTP without distillation")
    top_n: float = knob(0.1, "N of the TopN KL: a count, or a fraction of the vocabulary below 1")
    kl: str = knob("forward", "forward | reverse | tv")
    detach_teacher: bool = knob(True, "stop-gradient on the teacher")
    kl_grad: str = knob("full", "full | heads: where the KL's gradient ends; heads keeps it out of trunk and output head")
    kl_start: float = knob(0.75, "fraction of training after which the KL sets in")
    kl_ramp: float = knob(0.1, "fraction of training over which beta then rises to its full value")
    # evaluation and the machine
    eval_every: int = knob(250, "steps between evaluations; a checkpoint is written at each")
    keep_best: bool = knob(False, "write OUT/best.pt too, whenever the validation loss is the lowest so far")
    eval_windows: int = knob(64, "validation windows: always the same, non-overlapping, from the start")
    log_every: int = knob(10, "steps between rows of log.jsonl")
    device: str = knob("auto", "cpu | cuda | mps")
    dtype: str = knob("auto", "float32 | bfloat16 | float64; auto: bfloat16 autocast where the GPU has it")
    compile: str = knob("auto", "off | blocks (compiles faster) | model (runs faster); auto: model on CUDA, else off")


PRESETS = {
    "tiny": dict(n_layer=12, n_head=3, n_embd=96, embed_std=0.05, block_size=128, batch_size=8, steps=600, lr=3e-3, warmup=40,
                 eval_every=300, eval_windows=128, tokenizer="bpe:2048"),
    "small": dict(data="python", tokenizer="bpe:8192", n_layer=8, n_head=8, n_embd=512, block_size=512,
                  batch_size=32, micro_batch=16, steps=1500, lr=1e-3, warmup=100),
    "shakespeare": dict(data="shakespeare", tokenizer="bytes", n_layer=6, n_head=6, n_embd=384, block_size=256,
                        dropout=0.2, batch_size=64, steps=2000, lr=1e-3, warmup=100, eval_windows=10000, keep_best=True),
    "gpt2": dict(data="fineweb-edu", tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024,
                 batch_size=480, micro_batch=12, steps=5000, lr=6e-4, warmup=300, beta2=0.95, eval_every=500),
}


def make_config(given):
    """defaults < preset < given flags"""
    preset = given.get("preset") or ("small" if torch.cuda.is_available() else "tiny")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    cfg = TrainConfig(**{**PRESETS[preset], **given, "preset": preset})
    if "tokenizer" not in given and cfg.data != PRESETS[preset].get("data", TrainConfig.data):
        cfg.tokenizer = ""                                     # the preset's vocabulary was chosen for the preset's text
    cfg.out = cfg.out or f"out/{preset}"
    if cfg.steps < 1:
        raise ValueError(f"--steps is {cfg.steps}; it must be at least 1")
    return check(cfg)


def check(cfg):
    for name, least in dict(steps=0, batch_size=1, micro_batch=0, eval_every=1, eval_windows=1, log_every=1, warmup=0, clip=0).items():
        if getattr(cfg, name) < least:
            raise ValueError(f"--{name} is {getattr(cfg, name)}; it must be at least {least}")
    for name, values in dict(kl=distill.DIVERGENCES, kl_grad=("full", "heads"), compile=("auto", "off", "blocks", "model"),
                             dtype=("auto", "float32", "bfloat16", "float64")).items():
        if getattr(cfg, name) not in values:
            raise ValueError(f"--{name} is {getattr(cfg, name)!r}; choose one of {', '.join(values)}")
    if cfg.micro_batch and cfg.batch_size % cfg.micro_batch:
        raise ValueError(f"--batch_size {cfg.batch_size} is not a multiple of --micro_batch {cfg.micro_batch}")
    distill.count_top_n(cfg.top_n, 1)
    weights(cfg)
    return cfg


def weights(cfg):
    """the flags --alpha and --beta -> two lists of K numbers"""
    out = []
    for name in ("alpha", "beta"):
        try:
            value = [float(x) for x in str(getattr(cfg, name)).split(",")]
        except ValueError:
            raise ValueError(f"--{name} is {getattr(cfg, name)!r}; give a number, or {cfg.n_mtp} numbers with commas") from None
        out.append(distill.per_head(value[0] if len(value) == 1 else value, cfg.n_mtp, f"--{name}"))
    return out


# -----------------------------------------------------------------------------
# the machine


def compile_model(model, mode, tokens, cfg):
    """compile in place, and try the loss with its KL once: where that fails, say so in one line and go on without"""
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)    # head k reads windows of a length of its own
    try:
        if mode == "model":
            model.compile(dynamic=False)
        else:
            for part in [*model.blocks, *model.heads]:
                part.compile(dynamic=False)
        distill.compile_kernels()
        micro_step(model, model, cfg, tokens, 1.0, 1.0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no Triton, an old GPU: the reasons are many and none of them is fatal
        print(f"torch.compile failed ({type(error).__name__}: {' '.join(str(error).splitlines()[:1])[:100]}); going on without it")
        for part in [model, *model.blocks, *model.heads]:
            part._compiled_call_impl = None
        distill.compile_kernels(False)
    model.zero_grad(set_to_none=True)


# -----------------------------------------------------------------------------
# data


def open_data(cfg):
    """the data set of --data, prepared first if need be -> (train ids, val ids, meta)"""
    train, val, meta = load_dataset(find_dataset(cfg.data, cfg.tokenizer))
    for name, ids in (("training", train), ("validation", val)):
        if len(ids) < cfg.block_size + 1:
            raise ValueError(f"the {name} text has {len(ids)} tokens; a window takes {cfg.block_size + 1} (block_size + 1): "
                             "give more text or a smaller --block_size")
    return train, val, meta


def windows(ids, starts, T, device):
    """token windows (B, T+1) that begin at `starts`"""
    batch = torch.from_numpy(np.stack([ids[s : s + T + 1] for s in starts]).astype(np.int64))
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


def batch_starts(cfg, step, length):
    """where the windows of a step begin: a function of seed and step alone, so that resuming, accumulating and several
    processes all see the same batches"""
    return np.random.default_rng((cfg.seed, step)).integers(0, length - cfg.block_size, cfg.batch_size)


def train_mode(model):
    """dropout on, but not in frozen parts: an extension's teacher must not be noisy"""
    model.train()
    for part in (*model.blocks, *model.heads):
        part.train(any(p.requires_grad for p in part.parameters()))
    model.drop.train(model.weight.requires_grad)               # it drops embeddings


@torch.no_grad()
def evaluate(model, val, cfg, device, dtype):
    """
    the main head and every MTP head on fixed validation windows -> dict of floats and lists (K+1 or K long)

    loss      cross-entropy per head, nats per token (entry 0: the main head)
    accuracy  share of the text's own tokens predicted, per head
    kl        TopN KL from the main head, per MTP head
    ar, car   acceptance against the main head's own argmax (decode.rates); tokens_per_forward = 1 + sum of car
    """
    model.eval()
    K, T, W = model.config.n_mtp, cfg.block_size, model.weight
    starts = np.arange(0, len(val) - T, T)[: cfg.eval_windows]
    count = len(starts) * (T - torch.arange(K + 1, device=device))         # targets of each head: head k has k rows fewer
    loss, right, kl = (torch.zeros(n, device=device) for n in (K + 1, K + 1, K))       # sums over targets
    accepted = torch.zeros(K + 1, dtype=torch.long, device=device)
    for at in range(0, len(starts), 8):
        tokens, choices = windows(val, starts[at : at + 8], T, device), []
        with autocast(device, dtype):
            for k, hidden in enumerate(model(tokens[:, :-1])):
                logits, target = hidden @ W.T.to(hidden.dtype), tokens[:, k + 1 :]     # (B, T-k, V) and (B, T-k)
                choices.append(logits.argmax(-1))
                loss[k] += torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="sum")
                right[k] += (choices[k] == target).sum()
                if k == 0:
                    teacher = logits
                else:
                    kl[k - 1] += distill.topn_kl(logits, teacher[:, k:], cfg.top_n, cfg.kl) * target.numel()
        accepted += torch.bincount(decode.accepted_lengths(choices).flatten(), minlength=K + 1)
    train_mode(model)
    ar, car = decode.rates(accepted.tolist())
    return dict(loss=(loss / count).tolist(), accuracy=(right / count).tolist(), kl=(kl / count[1:]).tolist(),
                ar=ar, car=car, tokens_per_forward=1 + sum(car))


# -----------------------------------------------------------------------------
# the loop


def lr_at(cfg, step):
    """linear warm-up, then a cosine down to min_lr * lr"""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def ramp_at(cfg, step):
    """0 before kl_start, then linearly up to 1 within kl_ramp (both fractions of the training)"""
    done = step / max(1, cfg.steps) - cfg.kl_start
    if done < 0:
        return 0.0
    return min(1.0, done / cfg.kl_ramp) if cfg.kl_ramp > 0 else 1.0


def make_optimizer(model, cfg):
    """AdamW on what requires a gradient; decay on matrices, none on the norms' vectors"""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in params if p.dim() > 1], weight_decay=cfg.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=model.weight.device.type in ("cuda", "cpu"))


def clip_gradients(model, cfg):
    heads = list(model.heads.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("heads.")]
    for group in (heads, rest) if cfg.clip_apart else (heads + rest,):
        torch.nn.utils.clip_grad_norm_(group, cfg.clip)


def micro_step(net, model, cfg, tokens, ramp, share):
    """forward and backward of one micro-batch (B, T+1), whose loss counts for `share` of the step"""
    alpha, beta = weights(cfg)
    cut = cfg.kl_grad == "heads" and ramp > 0 and any(beta)
    hidden = net(tokens[:, :-1], cut_heads=cut)
    hidden, kl_hidden = hidden if cut else (hidden, None)
    loss, ce, kl = distill.mtp_loss(hidden, model.weight, tokens[:, 1:], alpha=alpha, beta=beta, ramp=ramp, top_n=cfg.top_n,
                                    kl=cfg.kl, detach_teacher=cfg.detach_teacher, kl_hidden=kl_hidden,
                                    # a CPU has small caches; a plain GPT on a GPU makes all of its logits at once
                                    chunk_logits=2**21 if not tokens.is_cuda else 2**28 if model.config.n_mtp else 2**30)
    (loss * share).backward()
    return torch.cat((loss.detach()[None], ce, kl)) * share


def whole_step(net, model, optimizer, cfg, step, parts, dtype):
    """one optimizer step on micro-batches (B, T+1) -> the mean loss, and CE and KL of each head, (2K+2,)"""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(cfg, step)
    total = 0
    for i, tokens in enumerate(parts):
        # several processes average their gradients once, at the last micro-batch
        sync = nullcontext() if net is model or i == len(parts) - 1 else net.no_sync()
        with sync, autocast(tokens.device, dtype):
            total = total + micro_step(net, model, cfg, tokens, ramp_at(cfg, step), 1 / len(parts))
    if cfg.clip:
        clip_gradients(model, cfg)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def fit(model, cfg, train, val, meta, start=0, state=None, extra=None, append=False, quiet=False):
    """
    train `model` (on its device) for cfg.steps steps; only what requires a gradient moves (extend.py freezes the rest)
    start, state: the step and the checkpoint to go on from;  extra: more entries for the checkpoint;  append: to an existing log
    -> the last evaluation (see evaluate)
    """
    rank, world = processes()
    device, dtype = model.weight.device, pick_dtype(cfg.dtype, model.weight.device)[0]
    micro = cfg.micro_batch or -(-cfg.batch_size // world)
    if cfg.batch_size % (micro * world):
        raise ValueError(f"--batch_size {cfg.batch_size} can't be shared by {world} processes with micro-batches of {micro}")
    optimizer, best = make_optimizer(model, cfg), float("inf")
    if state:
        optimizer.load_state_dict(state["optimizer"])
        best = state["best_loss"]
    mode = ("model" if device.type == "cuda" else "off") if cfg.compile == "auto" else cfg.compile
    with autocast(device, dtype):
        distill.compile_kernels(False)
        if mode != "off":
            compile_model(model, mode, windows(train, batch_starts(cfg, 0, len(train))[:micro], cfg.block_size, device), cfg)
    net = model if world == 1 else DistributedDataParallel(model, find_unused_parameters=0.0 in sum(weights(cfg), []))

    log = Log(cfg, meta, model, start, append) if rank == 0 else None
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, disable=rank > 0 or quiet, desc="training", unit="step")
    train_mode(model)
    pending, clock, last = [], time.perf_counter(), None
    for step in bar:
        # dropout depends on seed and step alone, like the batches (and on the process: each has its own windows)
        torch.manual_seed(int(np.random.default_rng((cfg.seed, step, rank)).integers(2**62)))
        tokens = windows(train, batch_starts(cfg, step, len(train))[rank::world], cfg.block_size, device)
        row = whole_step(net, model, optimizer, cfg, step, tokens.split(micro), dtype)
        if rank == 0:
            pending.append(row)
        done = step + 1
        if rank or not (done % cfg.log_every == 0 or done % cfg.eval_every == 0 or done == cfg.steps):
            continue
        recent = torch.stack(pending)                          # the only place where the host waits for the device
        if not recent[:, 0].isfinite().all():
            bad = done - len(pending) + int((~recent[:, 0].isfinite()).nonzero()[0])
            raise FloatingPointError(diverged(cfg, "loss", recent[bad - done, 0].item(), bad))
        row, K = recent.mean(0).tolist(), model.config.n_mtp
        seconds, clock = (time.perf_counter() - clock) / len(pending), time.perf_counter()
        log.write(step=done, loss=row[0], ce=row[1 : K + 2], kl=row[K + 2 :], lr=lr_at(cfg, step), ms=1000 * seconds)
        pending = []
        bar.set_postfix(loss=f"{row[1]:.3f}", tok_s=f"{cfg.batch_size * cfg.block_size / seconds:.0f}")
        if done % cfg.eval_every == 0 or done == cfg.steps:
            last = evaluate(model, val, cfg, device, dtype)
            if not (all(map(math.isfinite, last["loss"])) and all(p.isfinite().all() for p in model.parameters())):
                raise FloatingPointError(diverged(cfg, "validation loss", last["loss"][0], done))
            lowest, best = last["loss"][0] < best, min(best, last["loss"][0])
            log.write(step=done, val=last)
            for name in ["ckpt.pt"] + ["best.pt"] * (cfg.keep_best and lowest):
                save_checkpoint(Path(cfg.out) / name, model, tokenizer=meta["tokenizer"], optimizer=optimizer.state_dict(), step=done,
                                train_config=dataclasses.asdict(cfg), best_loss=best, data_sha256=meta["sha256"], **(extra or {}))
            heads = " ".join(f"{x:.3f}" for x in last["ar"])
            bar.write(f"step {done}: val loss {last['loss'][0]:.4f}{' (lowest so far)' * lowest}, AR [{heads}], "
                      f"{last['tokens_per_forward']:.2f} tokens per forward")
            clock = time.perf_counter()
    return last


def diverged(cfg, what, value, step):
    return (f"the {what} became {value} at step {step} (learning rate {lr_at(cfg, step):.2e}); {cfg.out}/ckpt.pt, if there, is the last "
            "good state. Try a lower --lr, a longer --warmup, --clip 1, or --dtype float32")


# -----------------------------------------------------------------------------
# the end of a run, and the command line


def table(result, meta):
    """the closing table of an evaluation, as text"""
    lines = [f"{'head':>6} {'predicts':>10} {'val loss':>9} {'accuracy':>9} {'AR':>7} {'CAR':>7}"]
    for k, loss in enumerate(result["loss"]):
        rates = f"{result['ar'][k - 1]:7.3f} {result['car'][k - 1]:7.3f}" if k else ""
        lines.append(f"{k or 'main':>6} {f'token +{k + 1}':>10} {loss:9.4f} {result['accuracy'][k]:9.3f} {rates}")
    if meta.get("val_bytes"):
        bits = result["loss"][0] * meta["val_tokens"] / meta["val_bytes"] / math.log(2)
        lines.append(f"main head: {bits:.3f} bits per byte of validation text")
    return "\n".join(lines + [f"expected from CAR: {result['tokens_per_forward']:.2f} tokens per forward of the main model"])


@torch.compiler.set_stance("force_eager")                    # blocks compiled for training would be compiled again, for a few tokens
def sample(model, val, meta, temperature=0.8):
    """continue the beginning of the validation text by speculative decoding -> text to print"""
    tokenizer = Tokenizer(meta["tokenizer"])
    if model.config.block_size < 2:
        return "(a context of one token leaves no room for a sample)"
    prompt = [int(t) for t in val[: min(32, max(1, model.config.block_size // 4))]]
    generator = torch.Generator(device=model.weight.device).manual_seed(1)
    (ids,), stats = decode.generate(model, [prompt], 160, temperature=temperature, top_k=min(50, model.config.vocab_size),
                                    generator=generator)
    return (f"--- a sample at temperature {temperature}: {stats.tokens} tokens in {stats.forwards} forwards "
            f"({stats.tokens_per_forward:.2f} each)\n{tokenizer.decode(prompt)}[..]{tokenizer.decode(ids)}\n---")


def resumed(path, given):
    """-> (the checkpoint's model, its other entries, its config with the given flags)"""
    model, state = load_checkpoint(path)
    if "extension" in state:
        raise ValueError(f"{path} is an extension: `python extend.py --resume` goes on with it")
    for name, value in given.items():
        if name in dataclasses.asdict(model.config) and value != getattr(model.config, name):
            raise ValueError(f"--{name} {value} disagrees with the checkpoint, which has {getattr(model.config, name)}: "
                             "leave the flag out, or train from scratch without --resume")
    cfg = check(TrainConfig(**{**state["train_config"], **given}))
    if cfg.steps <= state["step"]:
        raise ValueError(f"{path} is at step {state['step']} of {cfg.steps} already; give a larger --steps to go on")
    return model, state, cfg


def main():
    given, rest = parse(TrainConfig, __doc__, [
        ("--resume", dict(default="", metavar="CKPT", help="go on from this checkpoint; its config holds, but for flags given")),
        ("--bench", dict(action="store_true", help="time training steps instead of training")),
        ("--json", dict(action="store_true", help="print the results as one JSON document on the last line"))])
    rank, world = processes()
    if rest["resume"]:
        model, state, cfg = resumed(rest["resume"], given)
        start = state["step"]
    else:
        model, state, cfg, start = None, None, make_config(given), 0
    device = pick_device(cfg.device)
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype, why = pick_dtype(cfg.dtype, device)
    torch.set_float32_matmul_precision("high")                 # tf32 for what stays in fp32 on a GPU
    if rank == 0:
        print(f"device {device}, {str(dtype)[6:]} ({why}); preset {cfg.preset}, writing to {cfg.out}")
    if rest["bench"]:
        from results import bench
        rows = bench.bench_training(cfg, device, dtype)
        if rest["json"]:
            print(json.dumps(rows))
        return
    if world > 1 and rank:
        torch.distributed.barrier()                            # rank 0 prepares the data, the others wait for it
    train, val, meta = open_data(cfg)
    if world > 1 and rank == 0:
        torch.distributed.barrier()
    if model is None:
        torch.manual_seed(cfg.seed)
        vocab = meta["vocab_size"] if meta["vocab_size"] < 1024 else -(-meta["vocab_size"] // 64) * 64
        model = GPT(GPTConfig(vocab, **{f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)[1:]}))
    elif meta["tokenizer"] != state["tokenizer"]:
        raise ValueError(f"{cfg.data} was made with another tokenizer than {rest['resume']}: pass the data set it was trained on")
    model = model.to(device, torch.float64 if dtype == torch.float64 else None)
    if rank == 0:
        parts = ", ".join(f"{name} {n / 1e6:.2f}M" for name, n in model.count_parameters().items())
        print(f"parameters: {parts}; data: {len(train) / 1e6:.2f}M train and {len(val) / 1e6:.3f}M val tokens of {meta['source']}")
    begin = time.perf_counter()
    result = fit(model, cfg, train, val, meta, start, state)
    if rank == 0:
        print(f"\ntrained {cfg.steps - start} steps in {time.perf_counter() - begin:.0f} s; checkpoint {cfg.out}/ckpt.pt\n")
        print(table(result, meta))
        if len(val) > 32:
            print(sample(model.eval(), val, meta))
        if rest["json"]:
            print(json.dumps(result))
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
