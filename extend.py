"""
extend.py: looped extension, from m MTP heads to more (MTP-D, arXiv 2603.23911, section 3).

    python extend.py out/tiny/ckpt.pt --heads 8            train 4 more heads -> out/tiny-8/ckpt.pt
    python extend.py out/tiny/ckpt.pt --heads 8 --steps 0  the training-free pilot: only the copy
    python extend.py out/tiny-8/ckpt.pt --heads 16         and again
    python extend.py --resume out/tiny-8/ckpt.pt           continue an extension that was stopped
    python extend.py out/smollm2/ckpt.pt --heads 4         the first heads of a model without any
    python extend.py -h                                    every flag and its meaning

A flag that is not given is as in the training that wrote the checkpoint, but for --steps (a fifth
of the steps that trained the first heads), --out (the checkpoint's folder with the number of heads
added), --device, --fast and --compile (auto). New heads get the last head's alpha and beta, or what
is given here: one number, or one for each of them. The KL starts at once, for the teacher is
trained; the warm-up is a tenth of the steps at most.

A model without heads (data/pretrained.py, train.py --n_mtp 0) gets random ones. They learn from its
own text (data/selftext.py), where the main head's whole distribution says more than the one token
that was sampled from it: by the KL to all of it alone (alpha 0, beta 1, top_n 65536). From m heads
on, the loop:

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
    JSON_FLAG, UserError, checkpoint_file, load_checkpoint, parse, pick_dtype, processes, run,
)
from data.errors import show
from model import GPT


def loop_heads(model, n_mtp):
    """a new GPT with n_mtp heads: head m+j copies head j, as often as needed, the last round maybe
    cut short; without heads to copy, they are random. Weights are copied, never shared. Raises
    UserError if n_mtp is not more than the model has"""
    m = model.config.n_mtp
    T = model.config.block_size
    if not m < n_mtp < T:
        raise UserError(f"heads is {n_mtp}; this model has {m} already, so give more than {m}, and "
                        f"fewer than its block_size, {T}")
    config = dataclasses.replace(model.config, n_mtp=n_mtp)
    new = GPT(config).to(model.weight.device, model.weight.dtype)
    new.load_state_dict(model.state_dict(), strict=False)      # all but heads m+1 ..
    for k in range(m, n_mtp if m else 0):
        new.heads[k].load_state_dict(model.heads[k % m].state_dict())
    return new.train(model.training)


def freeze_all_but(model, heads):
    """only the given heads (a range of indices from 0) keep a gradient"""
    model.requires_grad_(False)
    for k in heads:
        model.heads[k].requires_grad_(True)
    for head in model.heads[: heads[0]]:
        if any(p.requires_grad for p in head.parameters()):
            raise UserError("the heads share weights, so that training the new ones would change "
                            "the frozen ones; give each head its own")


# flags of train.py that are flags here, too
FLAGS = ("steps lr alpha beta top_n batch_size micro_batch data seed eval_every eval_windows out "
         "device fast compile").split()
# how they train: by the KL alone, to all of the main head's distribution
FIRST_HEADS = dict(alpha="0", beta="1", top_n=2.0**16)


def extension_config(base, given, plan, n):
    """the TrainConfig of a checkpoint, changed for training heads m+1 .. n"""
    m = plan["from_heads"]
    changes = dict(
        n_mtp=n - m, schedule_steps=0,         # for now, as alpha and beta are those of new heads
        device="auto", fast="auto", compile="auto",
        keep_best=False,           # the main head is frozen: its loss can't say which is best
        kl_start=0.0, kl_ramp=0.0, # the teacher is trained and frozen: learn from it at once
    )
    if m:
        changes["steps"] = max(1, plan["first_steps"] // 5)
        for name in ("alpha", "beta"):
            changes[name] = getattr(base, name).split(",")[-1]     # the last head's
    else:
        changes.update(FIRST_HEADS)
    if "batch_size" in given:
        changes["micro_batch"] = 0
    cfg = dataclasses.replace(base, **{**changes, **given})
    cfg.warmup = min(base.warmup, cfg.steps // 10)
    new = train.head_weights(cfg)
    if not any(map(any, new)):
        raise UserError("with alpha = beta = 0, as given or as the last head was trained, new "
                        "heads would learn nothing; give --beta")
    # the frozen ones have none (distill.py leaves out heads without a weight)
    cfg.alpha, cfg.beta = [",".join(map(str, [0.0] * m + weights)) for weights in new]
    cfg.n_mtp = n
    return train.check(cfg)


def begin(path, given, heads):
    """a new extension -> (looped model, entries of its checkpoint, TrainConfig)"""
    model, meta = load_checkpoint(path, tokenizer=dict, train_config=dict)
    m = model.config.n_mtp
    n = heads or 2 * m or 4
    base = train.stored_config(meta)
    torch.manual_seed(given.get("seed", base.seed) % 2**63)    # check refuses a larger one
    # float16 (of pretrained.py) is enough to store, not to train
    model.to(torch.promote_types(model.weight.dtype, torch.float32))
    model = loop_heads(model, n)
    plan = dict(from_heads=m,
                first_steps=meta.get("extension", {}).get("first_steps", base.steps))
    # beside the checkpoint's folder: X/ckpt.pt -> X-8, X/best.pt -> X-best-8
    folder = path.resolve().parent
    name = folder.name if path.stem == "ckpt" else f"{folder.name}-{path.stem}"
    out = str(folder.with_name(f"{name}-{n}"))
    data = base.data
    if m == 0:
        data = f"data/{folder.name}-self"
        if "data" not in given and not Path(data).is_dir():
            raise UserError(f"first heads learn from the model's own text, and {data} is not "
                            f"there: `python data/selftext.py {path}` writes it; or give --data")
    cfg = extension_config(base, {"out": out, "data": data, **given}, plan, n)
    if m == 0:
        plan["first_steps"] = cfg.steps
    if Path(cfg.out).resolve() == folder:
        raise UserError(f"--out {cfg.out} is the folder of {path} itself, which would be "
                        "overwritten; give another one")
    return model, dict(tokenizer=meta["tokenizer"], extension=plan), cfg


def resume(path, given, heads):
    """an extension that was stopped -> (model, the checkpoint's other entries, TrainConfig)"""
    other = [f"--{name}" for name in given if name not in ("out", "device")]
    if heads:
        other.append("--heads")
    if other:
        raise UserError("--resume continues the extension as it was begun; leave out "
                        f"{', '.join(other)}")
    return train.resume(path, given, "extend.py")


def comparison(before, after, m, steps, meta):
    """the tables before and after training, and what the new heads bring, as text"""
    first = 1 + sum(before["car"][:m])
    return (f"before training:\n{train.table(before, meta)}\n\n"
            f"after {steps} steps (the trunk and {m} heads are frozen):\n"
            f"{train.table(after, meta)}\n\ntokens per forward: {first:.2f} with {m} heads, "
            f"{before['tokens_per_forward']:.2f} before training, "
            f"{after['tokens_per_forward']:.2f} after {steps} steps")


def main():
    given, rest = parse(train.TrainConfig, __doc__, [
        ("checkpoint", dict(metavar="CKPT", help="checkpoint to extend, or of the extension")),
        ("--heads", dict(type=int, help="MTP heads of the new model; default, or 0: twice as "
                         "many, 4 at first")),
        ("--resume", dict(action="store_true", help="continue the extension that wrote CKPT")),
        JSON_FLAG,
    ], only=FLAGS)
    rank, _ = processes()

    # model, plan and data
    path = checkpoint_file(rest["checkpoint"])
    start = resume if rest["resume"] else begin
    model, state, cfg = start(path, given, rest["heads"])
    device = train.join_processes(cfg)
    train_ids, val_ids, data_meta = train.open_data(cfg)
    train.check_data(path, cfg, data_meta, state)
    dtype, _ = pick_dtype(cfg.dtype, device)
    model.to(device)
    plan = state["extension"]
    m, n = plan["from_heads"], model.config.n_mtp
    if rank == 0:
        source = f"copied from heads {[k % m + 1 for k in range(m, n)]}" if m else "random"
        show(f"{m} -> {n} heads, new ones {source}; writing to {cfg.out}")
        if "before" not in plan:               # the copy, not trained yet
            plan["before"] = train.evaluate(model, val_ids, cfg, device, dtype)

    # train the new heads
    freeze_all_but(model, range(m, n))
    after = train.train(model, cfg, train_ids, val_ids, data_meta, state)
    if rank == 0:
        print(comparison(plan["before"], after, m, cfg.steps, data_meta))
        show(f"checkpoint {cfg.out}/ckpt.pt")
        if rest["json"]:
            print(json.dumps(dict(before=plan["before"], after=after)))


if __name__ == "__main__":
    run(main)
