"""
cost.py: time and memory of training and decoding steps, on random tokens and fresh weights. Run it
with the computer to itself.

    python results/cost.py kl --json     one part, see below; reproduce.py --part cost calls all of
                                         its scale
"""

import argparse
import dataclasses
import json
from functools import partial

import torch

import bench  # first: it makes the scripts importable
import decode
import extend
import train
from common import pick_device, pick_dtype, run
from model import GPT, GPTConfig


def fresh(vocab, cfg, K):
    return GPT(GPTConfig(vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, K))


def extension(device, dtype):
    """a training step of all with K = 8 against one of the extension 4 -> 8, the same batch, in
    turns -> two rows"""
    torch.manual_seed(0)
    cfg = dataclasses.replace(train.make_config(dict(preset="gpt2")), **d512(16))
    joint = fresh(50304, cfg, 8)
    extended = fresh(50304, cfg, 8)
    extend.freeze_all_but(extended, range(4, 8))
    joint_cfg = dataclasses.replace(cfg, n_mtp=8, beta="0.5", top_n=512)
    extended_cfg = dataclasses.replace(
        joint_cfg, alpha="0,0,0,0,.3,.3,.3,.3", beta="0,0,0,0,.5,.5,.5,.5"
    )
    pairs = [(joint, joint_cfg), (extended, extended_cfg)]
    joint_row, extended_row = bench.time_steps(pairs, device, dtype)
    return [dict(name="joint training, K = 8", **joint_row),
            dict(name="extension 4 -> 8", **extended_row)]


def rounds(decoder, position, count):
    """`count` rounds, from a context of `position` tokens on"""
    decoder.n.fill_(position)
    for _ in range(count):
        decoder.round()


@torch.no_grad()
def decoding(device, dtype):
    """an ordinary step and whole rounds, at 124M parameters and 300 tokens of context, in turns
    -> rows"""
    torch.manual_seed(0)
    model = GPT(GPTConfig(50304, 1024, 12, 12, 768, 4)).to(device, dtype).eval()
    rows = []
    for batch in (1, 8, 32):
        kinds = [(0, None), (1, None), (4, None), (4, 8192)]
        functions = []
        for heads, draft_vocab in kinds:
            decoder = decode.make_decoder(model, batch, 512, heads, draft_vocab=draft_vocab)
            decoder.prefill([[1] * 256] * batch, 200)
            functions.append(partial(rounds, decoder, 300, 10))
        times = [ms / 10 for ms in bench.milliseconds(functions, device, 40)]
        for (heads, draft_vocab), ms in zip(kinds, times):
            rows.append(dict(batch=batch, heads=heads, draft_vocab=draft_vocab, ms=ms,
                             plain_steps=ms / times[0], rounds_per_s=1000 / ms))
            print(f"decode 124M batch {batch} heads {heads} draft_vocab {draft_vocab}: {ms:.3f} ms "
                  f"per round, {ms / times[0]:.2f} ordinary steps ({decoder.why})", flush=True)
    return rows


@torch.no_grad()
def shapes(device, dtype):
    """rounds with 0 .. 4 heads of a shallow and of a deep, narrow model, of about one speed, in
    turns -> rows"""
    rows = []
    for n_layer, n_head, n_embd in ((6, 4, 128), (12, 3, 96)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(2048, 128, n_layer, n_head, n_embd, 4)).to(device, dtype).eval()
        functions = []
        for heads in range(5):
            decoder = decode.make_decoder(model, 1, 128, heads, fast="off")
            decoder.prefill([[1] * 32], 90)
            functions.append(partial(rounds, decoder, 48, 1))
        times = bench.milliseconds(functions, device, 60)
        for heads, ms in enumerate(times):
            rows.append(dict(n_layer=n_layer, n_embd=n_embd, heads=heads, ms=ms,
                             plain_steps=ms / times[0]))
    return rows


def training(cases, steps=20, vocab=50304, preset="gpt2", **changes):
    """-> a part: bench_training with these changes of a preset"""

    def part(device, dtype):
        cfg = dataclasses.replace(train.make_config(dict(preset=preset)), **changes)
        return bench.bench_training(cfg, device, dtype, steps, cases, vocab)

    return part


def d512(windows):
    return dict(n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=windows,
                micro_batch=windows, compile="blocks")


WITHOUT_KL = [bench.Case(0), bench.Case(1), bench.Case(2), bench.Case(4)]
KL = [bench.Case(4), bench.Case(4, 0.5, 512), bench.Case(4, 0.5, 4096)]
PARTS = {                                                 # name: (title of its table, what to run)
    "kl": ("kl, 8 layers d=512 T=512, 32 windows", training(KL, steps=80, **d512(32))),
    "extension": ("extension, 8 layers d=512 T=512, 16 windows", extension),
    "heads": (
        "heads, 124M T=1024, 12 windows",
        training([*WITHOUT_KL, bench.Case(4, 0.5, 512)], compile="blocks"),
    ),
    "plain": (
        "plain GPT, 124M T=1024, 12 windows, whole model compiled",
        training([bench.Case(0)], compile="model"),
    ),
    "memory": (
        "124M T=1024, 8 windows", training([bench.Case(4)], compile="blocks", micro_batch=8),
    ),
    "decoding": ("decoding", decoding),
    "shapes": ("rounds of two shapes, V=2048, T=128, random weights", shapes),
    "tiny": (
        "heads, tiny",
        training([*WITHOUT_KL, bench.Case(4, 0.5, 205)], steps=5, vocab=2048, preset="tiny"),
    ),
}
SCALES = {
    "gpu": ["kl", "decoding", "plain", "extension", "heads", "memory"],
    "tiny": ["tiny", "shapes"],
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ", ".join(SCALES["gpu"])
    which = f"{parts}: for a GPU; tiny, shapes: for a CPU"
    parser.add_argument("part", choices=list(PARTS), help=which)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON at the end")
    args = parser.parse_args()
    device = pick_device("auto")
    torch.set_float32_matmul_precision("high")
    title, part = PARTS[args.part]
    rows = part(device, pick_dtype("auto", device)[0])
    if args.json or args.part in ("shapes", "extension"):     # these print no table themselves
        print(json.dumps({title: rows}))


if __name__ == "__main__":
    run(main)
