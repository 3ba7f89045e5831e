"""
entropy.py: where are drafts accepted? The acceptance of the MTP heads by the entropy of the main
head that verifies them.

    python results/entropy.py CKPT [CKPT ..] --json       called by reproduce.py --part entropy
    python results/entropy.py CKPT --by confidence        by the head's largest probability instead:
                                                          does a head know when it is right?

Each checkpoint is run on the validation windows that train.py evaluates it on, teacher-forced. Row
i of head k and row i+k of the main head predict the same token (decode.accepted_lengths); the
entropy of the second, in nats, puts the pair into a bin. Two heads are measured: head 1 wherever
there is a row for it, and head K where the drafts of heads 1 .. K-1 were the main head's choice.
With K > 1, head 1 has K-1 more rows per window here than in train.evaluate, which asks for all K
drafts.

Confidence is the largest probability that the head itself gives: unlike the entropy of the main
head it is known while drafting, so that a decoder could stop there.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from common import (  # noqa: E402
    UserError, autocast, load_checkpoint, pick_device, pick_dtype, run,
)
from distill import to_float32  # noqa: E402

# where each bin begins, in nats; it ends before the next one, the last is open
EDGES = (0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8)
CONFIDENCE_EDGES = tuple(i / 10 for i in range(10))


def tally(main, draft, by="entropy"):
    """
    logits of the main head and of a draft for the same tokens, (n, V) each -> (4, bins), sums by
    the entropy of the main head, or by the draft's confidence: the number of rows, their entropy or
    confidence, how many argmaxes are equal, and sum of min(p, q) = 1 - TV, the probability that a
    sampled draft is accepted
    """
    p = to_float32(main).softmax(-1)
    q = to_float32(draft).softmax(-1)
    if by == "entropy":
        key = torch.special.entr(p).sum(-1)
        edges = EDGES
    else:
        key = q.amax(-1)
        edges = CONFIDENCE_EDGES
    same = main.argmax(-1) == draft.argmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    bins = torch.bucketize(key.cpu(), torch.tensor(edges[1:], dtype=key.dtype), right=True)
    sums = []
    for values in (torch.ones_like(key), key, same, overlap):
        sums.append(torch.bincount(bins, values.cpu().double(), len(edges)))
    return torch.stack(sums)


def by_bin(sums, by="entropy"):
    """tally's sums, (4, bins) -> dict of lists, an entry per bin; means are None in an empty one"""
    count, *sums = sums.tolist()
    result = dict(count=[round(n) for n in count])
    for name, row in zip((by, "accepted", "overlap"), sums):
        result[name] = [total / n if n else None for total, n in zip(row, count)]
    return result


@torch.no_grad()
def curves(model, val, cfg, device, dtype, by="entropy"):
    """head 1 and head K on the windows of train.evaluate -> a dict for each, by_bin's"""
    model.eval()
    K = model.config.n_mtp
    T = cfg.block_size
    starts = np.arange(0, len(val) - T, T)[: cfg.eval_windows]
    sums = dict.fromkeys({1, K}, 0)
    for first in range(0, len(starts), 8):
        tokens = train.get_batch(val, starts[first : first + 8], T, device)
        with autocast(device, dtype):
            hidden = model(tokens[:, :-1])
            weight = model.weight.to(hidden[0].dtype)
            main = hidden[0] @ weight.T                   # (B, T, V)
            # were all drafts before this head's accepted?
            reached = torch.ones_like(main[..., 0], dtype=torch.bool)
            for k in range(1, K + 1):
                draft = hidden[k] @ weight.T              # (B, T-k, V)
                target = main[:, k:]
                reached = reached[:, :-1]
                if k in sums:
                    sums[k] = sums[k] + tally(target[reached], draft[reached], by)
                reached = reached & (draft.argmax(-1) == target.argmax(-1))
    return [dict(head=k, **by_bin(sums[k], by)) for k in sorted(sums)]


def measure(path, by="entropy"):
    """a checkpoint on its own validation data -> dict(checkpoint, edges, heads)"""
    model, meta = load_checkpoint(path)
    cfg = train.stored_config(meta)
    device = pick_device(cfg.device)
    if not model.config.n_mtp:
        raise UserError(f"{path} is a plain GPT; give a checkpoint with MTP heads")
    _, val, data_meta = train.open_data(cfg)
    train.check_data(path, cfg, data_meta, meta, same_text=False)
    dtype, _ = pick_dtype(cfg.dtype, device)
    heads = curves(model.to(device), val, cfg, device, dtype, by)
    edges = EDGES if by == "entropy" else CONFIDENCE_EDGES
    return dict(checkpoint=str(path), by=by, edges=list(edges), heads=heads)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints with MTP heads")
    parser.add_argument("--by", choices=("entropy", "confidence"), default="entropy",
                        help="of the main head, or of the draft")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON at the end")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")            # as train.py evaluates
    out = []
    for path in args.checkpoints:
        out.append(measure(path, args.by))
        for head in out[-1]["heads"]:
            print(f"{path}, head {head['head']}")
            unit = "nats from" if args.by == "entropy" else "from"
            print(f"{unit:>10} {'positions':>10} {'accepted':>9} {'1 - TV':>7}")
            columns = zip(out[-1]["edges"], head["count"], head["accepted"], head["overlap"])
            for edge, n, accepted, overlap in columns:
                print(f"{edge:>10} {n:>10}" + (f" {accepted:9.3f} {overlap:7.3f}" if n else ""))
    if args.json:
        print(json.dumps(out))


if __name__ == "__main__":
    run(main)
