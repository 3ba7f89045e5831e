"""
cost.py: time and memory of training and decoding steps, on random tokens and weights. Run it with the machine to itself.

    python results/cost.py kl --json       one part, see below; reproduce.py --part cost calls all of a scale
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decode  # noqa: E402
import extend  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from results import bench  # noqa: E402


def extension(cfg, device, dtype):
    """a joint training step with K = 8 against a step of the extension 4 -> 8, same batch, in turns -> two rows"""
    torch.manual_seed(0)
    joint, extended = (GPT(GPTConfig(50304, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, 8)) for _ in range(2))
    extend.freeze_all_but(extended, range(4, 8))
    c = dataclasses.replace(cfg, n_mtp=8, beta="0.5", top_n=512)
    new = dataclasses.replace(c, alpha="0,0,0,0,.3,.3,.3,.3", beta="0,0,0,0,.5,.5,.5,.5")
    rows = bench.time_steps([(joint, c), (extended, new)], device, dtype)
    return [dict(name=name, **row) for name, row in zip(("joint training, K = 8", "extension 4 -> 8"), rows)]


def ten(decoder):
    """rounds, from 300 tokens of context on"""
    decoder.n.fill_(300)
    for _ in range(10):
        decoder.step()


@torch.no_grad()
def decoding(device, dtype):
    """a plain step and whole rounds, at 124M parameters and 300 tokens of context, in turns -> rows"""
    torch.manual_seed(0)
    model = GPT(GPTConfig(50304, 1024, 12, 12, 768, 4)).to(device, dtype).eval()
    rows = []
    for batch in (1, 8, 32):
        decoders = []
        for heads, first in ((0, None), (1, None), (4, None), (4, 8192)):
            decoders.append((heads, first, decode.Decoder(model, batch, 512, heads, compile="kernels", draft_vocab=first)))
            decoders[-1][2].start([[1] * 256] * batch, 200)
        times = [ms / 10 for ms in bench.milliseconds([functools.partial(ten, d) for *_, d in decoders], device, 40)]
        for (heads, first, _), ms in zip(decoders, times):
            rows.append(dict(batch=batch, heads=heads, draft_vocab=first, ms=ms, plain_steps=ms / times[0], rounds_per_s=1000 / ms))
            print(f"decode 124M batch {batch} heads {heads} draft_vocab {first}: {ms:.3f} ms a round, {ms / times[0]:.2f} plain steps", flush=True)
    return rows


@torch.no_grad()
def shapes(device, dtype):
    """rounds with 0 .. 4 heads of a wide, shallow and a narrow, deep model of about one speed, in turns -> rows"""
    rows = []
    for n_layer, n_head, n_embd in ((6, 4, 128), (12, 3, 96)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(2048, 128, n_layer, n_head, n_embd, 4)).to(device, dtype).eval()
        decoders = [decode.Decoder(model, 1, 128, heads) for heads in range(5)]

        def one(decoder):
            decoder.n.fill_(48)
            decoder.step()
        for decoder in decoders:
            decoder.start([[1] * 32], 90)
        times = bench.milliseconds([functools.partial(one, decoder) for decoder in decoders], device, 60)
        rows += [dict(n_layer=n_layer, n_embd=n_embd, heads=k, ms=ms, plain_steps=ms / times[0]) for k, ms in enumerate(times)]
    return rows


def d512(base, windows):
    return dataclasses.replace(base, n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=windows, micro_batch=windows, compile="blocks")


KL = [(4, 0, 1), (4, 0.5, 512), (4, 0.5, 4096)]                # K, beta, N
HEADS = [(0, 0, 1), (1, 0, 1), (2, 0, 1), (4, 0, 1), (4, 0.5, 512)]
PARTS = {
    "kl": lambda base, *on: {"kl, 8 layers d=512 T=512, 32 windows": bench.bench_training(d512(base, 32), *on, steps=80, combos=KL)},
    "extension": lambda base, *on: {"extension, 8 layers d=512 T=512, 16 windows": extension(d512(base, 16), *on)},
    "heads": lambda base, *on: {"heads, 124M T=1024, 12 windows": bench.bench_training(dataclasses.replace(base, compile="blocks"), *on, combos=HEADS)},
    "plain": lambda base, *on: {"plain GPT, 124M T=1024, 12 windows, whole model compiled": bench.bench_training(
        dataclasses.replace(base, compile="model"), *on, combos=[(0, 0, 1)])},
    "memory": lambda base, *on: {"124M T=1024, 8 windows": bench.bench_training(dataclasses.replace(base, compile="blocks", micro_batch=8), *on, combos=[(4, 0, 1)])},
    "decoding": lambda base, *on: {"decoding": decoding(*on)},
    "shapes": lambda base, *on: {"rounds of two shapes, V=2048, T=128, random weights": shapes(*on)},
    "tiny": lambda base, *on: {"heads, tiny": bench.bench_training(train.make_config(dict(preset="tiny")), *on, steps=5, vocab=2048,
                                                                   combos=[(0, 0, 1), (1, 0, 1), (2, 0, 1), (4, 0, 1), (4, 0.5, 205)])},
}
SCALES = {"gpu": ["kl", "decoding", "plain", "extension", "heads", "memory"], "tiny": ["tiny", "shapes"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS), help="kl, extension, heads, plain, memory, decoding: for a GPU; tiny, shapes: for a CPU")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = train.pick_device("auto")
    torch.set_float32_matmul_precision("high")
    out = PARTS[args.part](train.make_config(dict(preset="gpt2")), device, train.pick_dtype("auto", device)[0])
    if args.json:
        print(json.dumps(out))


if __name__ == "__main__":
    main()
