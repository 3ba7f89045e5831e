"""
entropy.py: where are drafts accepted? Acceptance of the MTP heads against the entropy of the main head that judges them.

    python results/entropy.py CKPT [CKPT ...] --json       called by reproduce.py --part entropy

Each checkpoint is run on the validation windows that train.py evaluates it on, teacher-forced. Row i of head k and row i+k
of the main head predict the same token (decode.accepted_lengths); the second one's entropy, in nats, puts the pair in a bin.
Two heads are judged: head 1 wherever there is a row for it, and head K where the drafts of heads 1 .. K-1 were the main
head's choice. With K > 1, head 1 has K-1 more rows a window here than in train.evaluate, which wants all K drafts.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill  # noqa: E402
import train  # noqa: E402

EDGES = (0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8)       # nats, where each bin begins; it ends before the next; the last is open


def tally(main, draft):
    """
    logits of the main head and of a draft for the same tokens, (n, V) each -> (4, bins) sums by the entropy of the main head:
    how many rows, their entropy, how many argmaxes are equal, and sum of min(p, q) = 1 - TV: how often a sampled draft is kept
    """
    p, q = distill.wide(main).softmax(-1), distill.wide(draft).softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    values = torch.ones_like(entropy), entropy, (main.argmax(-1) == draft.argmax(-1)), torch.minimum(p, q).sum(-1)
    place = torch.bucketize(entropy.cpu(), torch.tensor(EDGES[1:], dtype=entropy.dtype), right=True)
    return torch.stack([torch.bincount(place, v.cpu().double(), len(EDGES)) for v in values])


def by_bin(sums):
    """tally's sums, (4, bins) -> dict of lists, an entry a bin; means are None where a bin is empty"""
    count, *sums = sums.tolist()
    means = [[s / n if n else None for s, n in zip(row, count)] for row in sums]
    return dict(count=[round(n) for n in count], **dict(zip(("entropy", "accepted", "overlap"), means)))


@torch.no_grad()
def curves(model, val, cfg, device, dtype):
    """head 1 and head K on the windows of train.evaluate -> a dict for each, see by_bin, with its number"""
    model.eval()
    K, T, W = model.config.n_mtp, cfg.block_size, model.weight
    starts = np.arange(0, len(val) - T, T)[: cfg.eval_windows]
    sums = {k: torch.zeros(4, len(EDGES), dtype=torch.float64) for k in {1, K}}
    for at in range(0, len(starts), 8):
        tokens = train.get_batch(val, starts[at : at + 8], T, device)
        with train.autocast(device, dtype):
            hidden = model(tokens[:, :-1])
            main = hidden[0] @ W.T.to(hidden[0].dtype)                         # (B, T, V)
            reached = torch.ones_like(main[..., 0], dtype=torch.bool)          # were the drafts before this head's accepted?
            for k in range(1, K + 1):
                draft, judge, reached = hidden[k] @ W.T.to(hidden[k].dtype), main[:, k:], reached[:, :-1]     # T-k rows
                if k in sums:
                    sums[k] += tally(judge[reached], draft[reached])
                reached = reached & (draft.argmax(-1) == judge.argmax(-1))
    return [dict(head=k, **by_bin(sums[k])) for k in sorted(sums)]


def measure(path):
    """a checkpoint on its own validation data -> dict(checkpoint, edges, heads)"""
    model, meta = train.load_checkpoint(path)
    cfg = train.stored_config(meta)
    device = train.pick_device(cfg.device)
    if not model.config.n_mtp:
        raise ValueError(f"{path} is a plain GPT: it has no heads, and so no drafts")
    _, val, data_meta = train.open_data(cfg)
    if data_meta["tokenizer"] != meta["tokenizer"]:
        raise ValueError(f"{cfg.data} was made with another tokenizer than {path}")
    return dict(checkpoint=str(path), edges=list(EDGES), heads=curves(model.to(device), val, cfg, device, train.pick_dtype(cfg.dtype, device)[0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints of train.py or extend.py with MTP heads")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document on the last line")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")                                 # as train.py evaluates
    out = []
    for path in args.checkpoints:
        out.append(measure(path))
        for head in out[-1]["heads"]:
            print(f"{path}, head {head['head']}\n{'nats from':>10} {'positions':>10} {'accepted':>9} {'1 - TV':>7}")
            for edge, n, a, o in zip(EDGES, head["count"], head["accepted"], head["overlap"]):
                print(f"{edge:>10} {n:>10}" + (f" {a:9.3f} {o:7.3f}" if n else ""))
    if args.json:
        print(json.dumps(out))


if __name__ == "__main__":
    train.run(main)
