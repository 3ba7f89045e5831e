"""
extend.py: looped extension, from m MTP heads to more (MTP-D, arXiv 2603.23911, section 3).

    python extend.py out/tiny/ckpt.pt --heads 8              4 -> 8 heads, training the new ones; writes out/tiny-8/ckpt.pt
    python extend.py out/tiny/ckpt.pt --heads 8 --steps 0    the training-free pilot: only the copy
    python extend.py out/tiny-8/ckpt.pt --heads 16           and again
    python extend.py --resume out/tiny-8/ckpt.pt             go on with an extension that was stopped
    python extend.py -h                                      every flag, its default and its meaning

Head m+j starts as a copy of head j, and reads the head before it, so that the cascade goes on:

    trained   h^0 -> head 1 -> .. -> head m           frozen, like the trunk, the embedding and the output head
    looped                              -> head m+1 (copy of 1) -> head m+2 (copy of 2) -> ..     these alone train

A head learned to turn h^{k-1} and one more token into h^k, whatever k is, so a copy is a good start. Frozen parts run
without a gradient and keep no activations: a step costs about half of one that trains everything (README.md).
"""

import dataclasses
import json
from pathlib import Path

import torch

import train
from model import GPT


def loop_heads(model, n_mtp):
    """a new GPT with n_mtp heads: head m+j copies head j, as often as needed, the last round perhaps cut short. Weights
    are copied, never shared. Raises ValueError if the model has no heads, or n_mtp is not more than it has"""
    m = model.config.n_mtp
    if m == 0:
        raise ValueError("this model has no MTP heads to copy; train one with --n_mtp 1 or more")
    if n_mtp <= m:
        raise ValueError(f"heads is {n_mtp}; this model has {m} already, so give more than {m}")
    new = GPT(dataclasses.replace(model.config, n_mtp=n_mtp)).to(model.weight.device, model.weight.dtype)
    state = model.state_dict()
    for k in range(m, n_mtp):
        state.update({f"heads.{k}.{name}": w for name, w in model.heads[k % m].state_dict().items()})
    new.load_state_dict(state)
    return new.train(model.training)


def freeze_all_but(model, heads):
    """only the given heads (indices from 0) keep a gradient"""
    model.requires_grad_(False)
    for k in heads:
        model.heads[k].requires_grad_(True)


@dataclasses.dataclass
class ExtendConfig:
    heads: int = train.knob(0, "how many MTP heads the new model has; 0: twice as many")
    steps: int = train.knob(-1, "optimizer steps; 0: only copy; -1: a fifth of the steps that trained the first heads")
    out: str = train.knob("", "folder for ckpt.pt and log.jsonl; empty: the checkpoint's folder with -HEADS added")
    one_at_a_time: bool = train.knob(False, "train the new heads one after the other, not as a group (the paper's way)")
    data: str = train.knob("", "data-set folder or source; empty: the one that the checkpoint was trained on")
    lr: float = train.knob(0.0, "peak learning rate; 0: the checkpoint's")
    beta: str = train.knob("", "weight of the KL to the main head; empty: the checkpoint's")
    batch_size: int = train.knob(0, "windows per step; 0: the checkpoint's")
    micro_batch: int = train.knob(-1, "windows per forward; -1: the checkpoint's")
    eval_every: int = train.knob(0, "steps between evaluations, each with a checkpoint; 0: the checkpoint's")
    eval_windows: int = train.knob(0, "validation windows; 0: the checkpoint's")
    seed: int = train.knob(0, "seed of the batches; 0: the checkpoint's")
    device: str = train.knob("auto", "cpu | cuda | mps")
    compile: str = train.knob("auto", "off | blocks | model; auto: model on CUDA, else off")


def extension_config(meta, model, given, m):
    """the checkpoint's train config, changed for training heads m+1 .. of `model`"""
    flags = dataclasses.asdict(ExtendConfig(**given))
    base = train.TrainConfig(**meta["train_config"])
    first = meta.get("extension", {}).get("first_steps", base.steps)       # of the training that made the first heads
    steps = flags["steps"] if flags["steps"] >= 0 else max(1, first // 5)
    kept = {name: flags[name] for name in ("data", "lr", "beta", "batch_size", "eval_every", "eval_windows", "seed") if flags[name]}
    if flags["micro_batch"] >= 0:
        kept["micro_batch"] = flags["micro_batch"]
    elif "batch_size" in kept:
        kept["micro_batch"] = 0
    cfg = dataclasses.replace(base, **kept, n_mtp=m, out=flags["out"], device=flags["device"], compile=flags["compile"], steps=steps,
                              keep_best=False,                 # the main head's loss is frozen: it can't say which is best
                              warmup=min(base.warmup, steps // 10),
                              kl_start=0.0, kl_ramp=0.0)       # the teacher is trained and frozen: learn from it at once
    alpha, beta = train.weights(cfg)
    cfg.n_mtp = model.config.n_mtp
    # the new heads weigh what the last trained one did; the frozen ones nothing
    cfg.alpha, cfg.beta = (",".join(str(next((x for x in reversed(w) if x), 0.0) if k >= m else 0.0) for k in range(cfg.n_mtp))
                           for w in (alpha, beta))
    return train.check(cfg)


def stage_config(cfg, heads):
    """cfg with alpha and beta 0 but for the given heads: distill.py skips rows that weigh nothing"""
    alpha, beta = (",".join(str(w if k in heads else 0.0) for k, w in enumerate(ws)) for ws in train.weights(cfg))
    return dataclasses.replace(cfg, alpha=alpha, beta=beta)


def comparison(before, after, m):
    lines = [f"{'head':>5} {'AR copied':>10} {'trained':>8}   {'CAR copied':>10} {'trained':>8}"]
    for k in range(len(after["ar"])):
        lines.append(f"{k + 1:>5} {before['ar'][k]:10.3f} {after['ar'][k]:8.3f}   {before['car'][k]:10.3f} {after['car'][k]:8.3f}"
                     + ("   frozen" if k < m else ""))
    return "\n".join(lines + [f"tokens per forward: {1 + sum(before['car'][:m]):.2f} with {m} heads, "
                              f"{before['tokens_per_forward']:.2f} copied, {after['tokens_per_forward']:.2f} trained"])


def main():
    given, rest = train.parse(ExtendConfig, __doc__, [
        ("checkpoint", dict(nargs="?", default="", metavar="CKPT", help="the checkpoint to extend")),
        ("--resume", dict(default="", metavar="CKPT", help="go on with the extension that wrote this checkpoint")),
        ("--json", dict(action="store_true", help="print the results as one JSON document on the last line"))])
    if bool(rest["checkpoint"]) == bool(rest["resume"]):
        raise ValueError("give one checkpoint: `extend.py CKPT --heads N`, or `extend.py --resume CKPT`")
    device = train.pick_device(given.get("device", "auto"))
    torch.set_float32_matmul_precision("high")
    path = Path(rest["resume"] or rest["checkpoint"])
    model, meta = train.load_checkpoint(path, device)
    if rest["resume"]:
        if "extension" not in meta:
            raise ValueError(f"{path} is no extension: `train.py --resume` goes on with it")
        if given:
            raise ValueError(f"--resume goes on with the extension as it was begun; leave out {', '.join(given)}")
        plan, cfg, state = meta["extension"], train.TrainConfig(**meta["train_config"]), meta
        first, start = plan["stage"], meta["step"]
    else:
        m, flags = model.config.n_mtp, ExtendConfig(**given)
        model = loop_heads(model, flags.heads or 2 * m)
        n = model.config.n_mtp
        folder = path.parent if path.parent.name else path.resolve().parent
        given["out"] = flags.out or str(folder.with_name(f"{folder.name}-{n}"))
        cfg, state, first, start = extension_config(meta, model, given, m), None, 0, 0
        new = list(range(m, n))
        sources = meta.get("extension", {}).get("copied_from", [0] * m)
        stages = [[k] for k in new] if flags.one_at_a_time else [new]
        plan = dict(from_heads=m, copied_from=sources + [k % m + 1 for k in new], stages=stages, stage=0, alpha=cfg.alpha, beta=cfg.beta,
                    first_steps=meta.get("extension", {}).get("first_steps", meta["train_config"]["steps"]))
        if flags.one_at_a_time:
            cfg.steps = -(-cfg.steps // len(new))
    data, val, data_meta = train.open_data(cfg)
    if data_meta["tokenizer"] != meta["tokenizer"]:
        raise ValueError(f"{cfg.data} was made with another tokenizer than {path}: pass --data with the set it was trained on")
    dtype, m = train.pick_dtype(cfg.dtype, device)[0], plan["from_heads"]
    print(f"{m} -> {model.config.n_mtp} heads, new ones copied from heads {plan['copied_from'][m:]}; writing to {cfg.out}")
    before = plan.get("before") or train.evaluate(model, val, cfg, device, dtype)
    plan["before"] = after = before
    cfg = dataclasses.replace(cfg, alpha=plan["alpha"], beta=plan["beta"])
    for stage in range(first, len(plan["stages"])):
        heads = plan["stages"][stage]
        freeze_all_but(model, heads)
        if cfg.steps > start:
            after = train.fit(model, stage_config(cfg, heads), data, val, data_meta, start, state,
                              extra={"extension": {**plan, "stage": stage}}, append=stage > 0)
        elif state:                                            # --resume of an extension that was at its end already
            after = train.evaluate(model, val, cfg, device, dtype)
        state, start = None, 0
    if cfg.steps == 0:
        train.save_checkpoint(Path(cfg.out) / "ckpt.pt", model, tokenizer=meta["tokenizer"], step=0, train_config=dataclasses.asdict(cfg),
                              best_loss=after["loss"][0], data_sha256=data_meta["sha256"], extension=plan)
    print(comparison(before, after, m))
    print(f"checkpoint {cfg.out}/ckpt.pt")
    if rest["json"]:
        print(json.dumps(dict(before=before, after=after)))


if __name__ == "__main__":
    train.run(main)
