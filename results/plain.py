"""
plain.py: the loss of a plain GPT on the targets on which a model with K heads is evaluated.

    python results/plain.py CKPT --heads 4 --json      reproduce.py --part plain calls it

train.py evaluates a model with K heads on targets K .. T-1 of each window, which all of its heads
predict, and a plain GPT on all targets. The first K have little context and are harder: the two
losses can't be compared. Here the plain GPT gets K untrained heads, so that the same evaluation
takes the same targets; what these heads predict is thrown away.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from common import UserError, load_checkpoint, pick_device, pick_dtype, run  # noqa: E402
from model import GPT  # noqa: E402


def with_heads(model, K):
    """a plain GPT -> the same with K untrained heads"""
    config = dataclasses.replace(model.config, n_mtp=K)
    result = GPT(config).to(model.weight.device, model.weight.dtype)
    missing, unexpected = result.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("heads.") for name in missing)
    return result


def measure(path, K):
    """-> dict(checkpoint, loss): a list of one number, in nats per token"""
    model, meta = load_checkpoint(path)
    if model.config.n_mtp:
        raise UserError(f"{path} has {model.config.n_mtp} heads; give a plain GPT (--n_mtp 0)")
    T = model.config.block_size
    if not 0 < K < T:
        raise UserError(f"--heads is {K}; it must be from 1 to {T - 1}, for the context is {T}")
    cfg = train.stored_config(meta)
    device = pick_device(cfg.device)
    _, val, data_meta = train.open_data(cfg)
    train.check_data(path, cfg, data_meta, meta, same_text=False)
    dtype, _ = pick_dtype(cfg.dtype, device)
    result = train.evaluate(with_heads(model.to(device), K), val, cfg, device, dtype)
    return dict(checkpoint=str(path), loss=result["loss"][:1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint without heads")
    parser.add_argument("--heads", type=int, default=4, help="K of the model to compare with")
    parser.add_argument("--json", action="store_true", help="print the result as JSON at the end")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")            # as train.py evaluates
    result = measure(args.checkpoint, args.heads)
    print(f"{args.checkpoint}: {result['loss'][0]:.4f} nats per token, on targets {args.heads} .. "
          "T-1")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run(main)
