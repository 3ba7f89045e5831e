"""
extend.py: looped extension, from m MTP heads to more (MTP-D, arXiv 2603.23911, section 3).

    python extend.py out/tiny/ckpt.pt --heads 8            train 4 more heads -> out/tiny-8/ckpt.pt
    python extend.py out/tiny/ckpt.pt --heads 8 --steps 0  the training-free pilot: only the copy
    python extend.py out/tiny-8/ckpt.pt --heads 16         and again
    python extend.py --resume out/tiny-8/ckpt.pt           continue an extension that was stopped
    python extend.py -h                                    every flag, its default and its meaning

Head m+j starts as a copy of head j, and reads the head before it, so that the cascade goes on:

    trained   h^0 -> head 1 -> .. -> head m               frozen, like trunk, embedding, output head
    looped       -> head m+1 (copy of 1) -> head m+2 (copy of 2) -> ..            these alone train

A head learned to turn h^{k-1} and one more token into h^k, whatever k is, so a copy is a good
start. Frozen parts run without a gradient and keep no activations: a step costs about half of one
that trains everything.
"""

import dataclasses
import json
from pathlib import Path

import torch

import train
from common import (
    UserError,
    check_flags,
    flag,
    keep_old,
    load_checkpoint,
    parse,
    pick_device,
    pick_dtype,
    processes,
    run,
    save_checkpoint,
)
from model import GPT


def loop_heads(model, n_mtp):
    """a new GPT with n_mtp heads: head m+j copies head j, as often as needed, the last round maybe
    cut short. Weights are copied, never shared. Raises ValueError if the model has no heads, or
    n_mtp is not more than it has"""
    m = model.config.n_mtp
    if m == 0:
        raise ValueError("this model has no MTP heads to copy; train one with --n_mtp 1 or more")
    if n_mtp <= m:
        raise ValueError(f"heads is {n_mtp}; this model has {m} already, so give more than {m}")
    config = dataclasses.replace(model.config, n_mtp=n_mtp)
    new = GPT(config).to(model.weight.device, model.weight.dtype)
    state = model.state_dict()
    for k in range(m, n_mtp):
        for name, weight in model.heads[k % m].state_dict().items():
            state[f"heads.{k}.{name}"] = weight
    new.load_state_dict(state)
    return new.train(model.training)


def freeze_all_but(model, heads):
    """only the given heads (indices from 0) keep a gradient"""
    model.requires_grad_(False)
    for k in heads:
        model.heads[k].requires_grad_(True)


@dataclasses.dataclass
class ExtendConfig:
    heads: int = flag(0, "how many MTP heads the new model has; 0: twice as many", min=0)
    steps: int = flag(-1, "optimizer steps; 0: only copy; -1: a fifth of the steps that trained "
                      "the first heads", min=-1)
    out: str = flag("", "folder for ckpt.pt and log.jsonl; empty: the checkpoint's folder with "
                    "-HEADS added, or the resumed checkpoint's folder")
    data: str = flag("", "dataset folder or source; empty: the one the checkpoint was trained on")
    lr: float = flag(0.0, "peak learning rate; 0: the checkpoint's", min=0)
    beta: str = flag("", "weight of the KL to the main head; empty: the checkpoint's")
    batch_size: int = flag(0, "windows per step; 0: the checkpoint's", min=0)
    micro_batch: int = flag(-1, "windows per forward; -1: the checkpoint's", min=-1)
    eval_every: int = flag(0, "steps between evaluations and checkpoints; 0: the checkpoint's",
                           min=0)
    eval_windows: int = flag(0, "validation windows; 0: the checkpoint's", min=0)
    seed: int = flag(0, "seed of the batches; 0: the checkpoint's", min=0)
    device: str = flag("auto", "cpu | cuda | mps (untested); auto: cuda if there is one, else cpu")
    fast: str = flag("auto", "fused loss (fast/loss.py), on CUDA: auto | on | off",
                     choices=("auto", "on", "off"))
    compile: str = flag("auto", "off | blocks | model; auto: model on CUDA where that works, else "
                        "off", choices=("auto", "off", "blocks", "model"))


# flags that have no effect without training steps
TRAINING = ("lr", "batch_size", "micro_batch", "eval_every", "seed", "fast", "compile")


def first_steps(meta):
    """of the training that made the first heads"""
    before = meta.get("extension", {})
    return before.get("first_steps", train.stored_config(meta).steps)


def extension_config(meta, model, given, m):
    """the checkpoint's train config, changed for training heads m+1 .. of `model`"""
    flags = ExtendConfig(**given)
    base = train.stored_config(meta)
    steps = flags.steps if flags.steps >= 0 else max(1, first_steps(meta) // 5)
    kept = {}
    for name in ("data", "lr", "beta", "batch_size", "eval_every", "eval_windows", "seed"):
        if getattr(flags, name):
            kept[name] = getattr(flags, name)
    if flags.micro_batch >= 0:
        kept["micro_batch"] = flags.micro_batch
    elif "batch_size" in kept:
        kept["micro_batch"] = 0
    cfg = dataclasses.replace(
        base, **kept, n_mtp=m, out=flags.out, device=flags.device, fast=flags.fast,
        compile=flags.compile,
        steps=steps, schedule_steps=0, warmup=min(base.warmup, steps // 10),
        keep_best=False,           # the main head is frozen: its loss can't say which is best
        kl_start=0.0, kl_ramp=0.0, # the teacher is trained and frozen: learn from it at once
    )
    alpha, beta = train.head_weights(cfg)
    cfg.n_mtp = model.config.n_mtp
    cfg.alpha = new_weights(alpha, m, cfg.n_mtp)
    cfg.beta = new_weights(beta, m, cfg.n_mtp)
    return train.check(cfg)


def new_weights(old, m, n):
    """weights of m heads -> those of n, as a flag: the new ones have the weight of the last one
    that was trained, the frozen ones none (distill.py leaves out heads without a weight)"""
    last = next((weight for weight in reversed(old) if weight), 0.0)
    return ",".join(str(weight) for weight in [0.0] * m + [last] * (n - m))


def output_folder(path, out, n):
    """--out, or beside the checkpoint's folder: X/ckpt.pt -> X-8, X/best.pt -> X-best-8"""
    folder = path.resolve().parent if not path.parent.name else path.parent
    name = folder.name if path.stem == "ckpt" else f"{folder.name}-{path.stem}"
    target = Path(out) if out else folder.with_name(f"{name}-{n}")
    if target.resolve() == path.resolve().parent:
        raise UserError(f"--out {target} is the folder of {path} itself, which would be "
                        "overwritten; give another one")
    return str(target)


def begin(path, model, meta, given):
    """a new extension -> (looped model, TrainConfig, plan: what the checkpoint will say of it)"""
    m, flags = model.config.n_mtp, ExtendConfig(**given)
    check_flags(flags)
    useless = [f"--{name}" for name in TRAINING if name in given and flags.steps == 0]
    if useless:
        raise UserError(f"{', '.join(useless)} has no effect with --steps 0, which only copies; "
                        "leave it out")
    try:
        model = loop_heads(model, flags.heads or 2 * m)
    except ValueError as error:    # "heads is 2; this model has .."
        raise UserError(str(error)) from None
    n = model.config.n_mtp
    out = output_folder(path, flags.out, n)
    cfg = extension_config(meta, model, {**given, "out": out}, m)
    sources = meta.get("extension", {}).get("copied_from", [0] * m)
    copied_from = sources + [k % m + 1 for k in range(m, n)]
    return model, cfg, dict(from_heads=m, copied_from=copied_from, first_steps=first_steps(meta))


def resume(path, meta, given):
    """-> (TrainConfig, plan) of an extension that was stopped"""
    other = [f"--{name}" for name in given if name not in ("out", "device")]
    if "extension" not in meta:
        raise UserError(f"{path} was not written by extend.py: resume it with "
                        f"`python train.py --resume {path}`")
    if other:
        raise UserError("--resume continues the extension as it was begun; leave out "
                        f"{', '.join(other)}")
    plan, cfg = meta["extension"], train.stored_config(meta)
    if len(plan.get("stages", [0])) > 1:
        raise UserError(f"{path} trains its heads one at a time, which this version lacks; resume "
                        "it with the version that wrote it")
    cfg.out = given.get("out") or str(path.parent)
    cfg.device = given.get("device", cfg.device)
    if cfg.steps:
        train.check_resumable(path, cfg.out, meta)
    return cfg, plan


def comparison(before, after, m):
    lines = [f"{'head':>5} {'AR copied':>10} {'trained':>8}   {'CAR copied':>10} {'trained':>8}"]
    for k in range(len(after["ar"])):
        line = f"{k + 1:>5} {before['ar'][k]:10.3f} {after['ar'][k]:8.3f}   "
        line += f"{before['car'][k]:10.3f} {after['car'][k]:8.3f}"
        lines.append(line + ("   frozen" if k < m else ""))
    first = 1 + sum(before["car"][:m])
    copied, trained = before["tokens_per_forward"], after["tokens_per_forward"]
    lines.append(f"tokens per forward: {first:.2f} with {m} heads, {copied:.2f} copied, "
                 f"{trained:.2f} trained")
    return "\n".join(lines)


def main():
    given, rest = parse(ExtendConfig, __doc__, [
        ("checkpoint", dict(nargs="?", metavar="CKPT", help="the checkpoint to extend")),
        ("--resume", dict(metavar="CKPT", help="continue the extension that wrote this file")),
        ("--json", dict(action="store_true", help="print the results as JSON on the last line")),
    ])
    resumed = rest["resume"] is not None
    if resumed == (rest["checkpoint"] is not None):
        raise UserError("give one checkpoint: `extend.py CKPT --heads N`, "
                        "or `extend.py --resume CKPT`")
    if processes()[1] > 1:
        raise UserError("extend.py runs in one process; start it without torchrun")

    # model, plan and data
    path = Path(rest["resume"] if resumed else rest["checkpoint"])
    device = pick_device(given.get("device", "auto"))
    torch.set_float32_matmul_precision("high")
    model, meta = load_checkpoint(path, device)
    if resumed:
        cfg, plan = resume(path, meta, given)
    else:
        model, cfg, plan = begin(path, model, meta, given)
    data = train_ids, val_ids, data_meta = train.open_data(cfg)
    train.check_data(path, cfg, data_meta, meta, same_text=resumed)
    dtype, _ = pick_dtype(cfg.dtype, device)
    m, n = plan["from_heads"], model.config.n_mtp
    print(f"{m} -> {n} heads, new ones copied from heads {plan['copied_from'][m:]}; "
          f"writing to {cfg.out}")

    # evaluate the copy, train the new heads
    if "before" not in plan:
        plan["before"] = train.evaluate(model, val_ids, cfg, device, dtype)
    after = plan["before"]
    freeze_all_but(model, range(m, n))
    start, state = (meta["step"], meta) if resumed else (0, None)
    if cfg.steps == 0:
        if not resumed:
            keep_old(cfg.out)
            save_checkpoint(Path(cfg.out) / "ckpt.pt", model, tokenizer=meta["tokenizer"], step=0,
                            train_config=dataclasses.asdict(cfg), best_loss=after["loss"][0],
                            data_sha256=data_meta["sha256"], extension=plan)
    elif cfg.steps > start or not meta.get("evaluated", True):
        after = train.train(model, cfg, *data, start, state, extra={"extension": plan})
    else:  # an extension that was at its end already
        after = train.evaluate(model, val_ids, cfg, device, dtype)
    print(comparison(plan["before"], after, m))
    print(f"checkpoint {cfg.out}/ckpt.pt")
    if rest["json"]:
        print(json.dumps(dict(before=plan["before"], after=after)))


if __name__ == "__main__":
    run(main)
