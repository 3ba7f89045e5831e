"""
cards.py: with which micro_batch a preset fits on cards of 6 to 16 GB, and about how long it trains
there. Called by bench.py:

    python results/bench.py train --memory_gb 6,8,12,16      smaller cards, emulated on this GPU
    python results/bench.py train --memory_gb 0              this GPU as it is: send us its rows
    python results/bench.py train --memory_gb 8 --preset gpt2 --dtype bfloat16,float32

A card of N GB is emulated: PyTorch may take 0.91 N GiB of this GPU's memory (USABLE), for the CUDA
context and the display take the rest. The micro_batch is the largest, halved from --batch_size, of
which whole training steps run there without torch.compile, which needs less.

The estimate for other cards: FLOPs and bytes of a training step are counted (see count_work), and
the time that both would take at this GPU's published peaks, one after the other, is compared with
the measured time. The same share of the peaks is assumed of the other card. The two numbers in
brackets are bounds: if only bandwidth mattered, and if only matrix products did.
"""

import dataclasses
import gc
import math
from typing import NamedTuple

import torch

import train
from common import UserError, git_commit, pick_dtype
from data.prepare import DEFAULT_TOKENIZER, PATH_TOKENIZER
from data.tokenizer import parse_tokenizer
from results import bench

USABLE = 0.91


class Peaks(NamedTuple):
    """published: dense matrix products with float32 sums, TFLOP/s, and memory, GB/s"""

    bfloat16: float           # 0: this GPU trains in float32
    float32: float            # TF32, where the GPU has it
    bandwidth: float


PEAKS = {                     # how torch.cuda.get_device_name() ends
    "H100 80GB HBM3": Peaks(989, 495, 3350),
    "H200": Peaks(989, 495, 4800),
    "RTX 3060": Peaks(25.5, 12.7, 360),
    "RTX 4070": Peaks(58.3, 29.1, 504),
    "T4": Peaks(0, 8.1, 320),
}
CARDS = ("RTX 3060", "RTX 4070", "T4")                     # whose time is estimated


# -----------------------------------------------------------------------------
# what fits


def limit_memory(gb):
    """let PyTorch take what a card of so many GB would leave it; 0: this GPU -> GiB"""
    _, total = torch.cuda.mem_get_info()
    usable = USABLE * (gb * 2**30 or total)
    if usable > total:
        raise UserError(f"--memory_gb is {gb:g}; this GPU has {total / 2**30:.1f} GiB, and can "
                        "only emulate smaller ones")
    torch.cuda.set_per_process_memory_fraction(usable / total)
    return usable / 2**30


def try_steps(model, cfg, size, dtype):
    """two training steps in micro-batches of `size` windows, at learning rate 0
    -> their peak memory in GiB, None where it is not enough"""
    trial = dataclasses.replace(cfg, lr=0.0, compile="off")
    device = model.weight.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optimizer = train.make_optimizer(model, trial)
    grad_function, _ = train.pick_loss(trial, device, dtype)
    tokens = torch.zeros(size, cfg.block_size + 1, dtype=torch.long, device=device)
    # a second micro-batch finds gradients in the memory, a second step AdamW's moments
    parts = [tokens] * min(2, cfg.batch_size // size)
    try:
        for _ in range(2):
            train.train_step(
                model, model, optimizer, trial, trial.steps, parts, dtype, grad_function
            )
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() / 2**30


def pick_micro_batch(model, cfg, dtype, size):
    """-> (the largest micro-batch that fits, halved from `size`, and its peak memory in GiB); None
    and None where not even one window fits"""
    while size:
        peak = try_steps(model, cfg, size, dtype)
        if peak is not None:
            return size, peak
        divisors = [n for n in range(1, size // 2 + 1) if cfg.batch_size % n == 0]
        size = max(divisors, default=0)
    return None, None


# -----------------------------------------------------------------------------
# what it takes


def count_work(config, cfg, micro_batch, width):
    """
    of one optimizer step, with numbers of `width` bytes
    -> (FLOPs of the matrix products, bytes to and from memory, where operations are fused as
    torch.compile does it)
    """
    d, V, K = config.n_embd, config.vocab_size, config.n_mtp
    blocks = config.n_layer + K                            # each 12 d^2 weights
    matrices = blocks * 12 * d * d + K * 2 * d * d
    tokens = cfg.batch_size * cfg.block_size
    # 2 per weight and token forward, 4 backward; W is used K+1 times
    flops = 6 * tokens * (matrices + (K + 1) * V * d)
    flops += 6 * tokens * blocks * d * cfg.block_size      # attention, causal: half of 12 T d
    # a block reads and writes 42 numbers per token and d forward: norms 4, qkv and rotation 8,
    # attention 4, the three other products 12, squared ReLU 8, sums 6; twice that backward. A
    # head's projection and norms: 11. Logits: written, read, overwritten by gradients, read twice
    numbers = 3 * d * (42 * blocks + 11 * K) + 5 * (K + 1) * V
    # a weight per micro-batch: cast, read twice, its gradient added; per step AdamW's 7 numbers
    weights = matrices + V * d
    per_weight = 20 * (cfg.batch_size // micro_batch) + 28
    return flops, tokens * width * numbers + weights * per_weight


def ideal_seconds(row, peaks):
    """the time of a step at a GPU's peaks: its products, then its memory traffic"""
    flops_per_s = 1e12 * getattr(peaks, row["dtype"])
    return row["flops"] / flops_per_s + row["bytes"] / (1e9 * peaks.bandwidth)


def add_estimates(row):
    """add to a row of time_preset: the share of this GPU's peaks, and for the cards that train in
    the row's dtype {card: [minutes, lower bound, upper bound]}"""
    row.update(share=None, estimates={})
    own = [peaks for name, peaks in PEAKS.items() if row["device"].endswith(name)]
    if not own or not getattr(own[0], row["dtype"], 0):
        return
    row["share"] = ideal_seconds(row, own[0]) / row["s_per_step"]
    for card in CARDS:
        peaks = PEAKS[card]
        if row["dtype"] != ("bfloat16" if peaks.bfloat16 else "float32"):
            continue
        minutes = row["minutes"] * ideal_seconds(row, peaks) / ideal_seconds(row, own[0])
        bounds = [own[0].bandwidth / peaks.bandwidth,
                  getattr(own[0], row["dtype"]) / getattr(peaks, row["dtype"])]
        row["estimates"][card] = [minutes, *(row["minutes"] * bound for bound in sorted(bounds))]


# -----------------------------------------------------------------------------
# measuring


def vocabulary(cfg):
    """how many ids the preset's tokenizer has"""
    name = cfg.tokenizer or DEFAULT_TOKENIZER.get(cfg.data, PATH_TOKENIZER)
    kind, size = parse_tokenizer(name)
    return size or {"bytes": 257, "gpt2": 50257}[kind]


def new_model(cfg, device):
    """a fresh model, and no other in the memory"""
    torch._dynamo.reset()                                  # else compiled code keeps the last one
    gc.collect()
    return train.new_model(cfg, vocabulary(cfg)).to(device)


def fit_preset(cfg, device, dtype, sizes):
    """-> a row per size of memory, the largest first"""
    model = new_model(cfg, device)
    rows = []
    size = cfg.batch_size
    for gb in sorted(sizes, key=lambda gb: gb or math.inf, reverse=True):      # 0: the whole GPU
        usable = limit_memory(gb)
        size, peak = pick_micro_batch(model, cfg, dtype, size or 0)
        rows.append(dict(preset=cfg.preset, dtype=str(dtype)[6:], memory_gb=gb, usable_gib=usable,
                         micro_batch=size, peak_gib=peak))
    torch.cuda.set_per_process_memory_fraction(1.0)
    return rows


def time_preset(cfg, device, dtype, micro_batch, repeats):
    """a training step with the KL, compiled as train.py does it -> a row with its estimates"""
    model = new_model(cfg, device)
    cfg = dataclasses.replace(cfg, micro_batch=micro_batch)
    micro_batches = cfg.batch_size // micro_batch
    parts = min(2, micro_batches)
    (timed,) = bench.time_steps([(model, cfg)], device, dtype, repeats, parts)
    seconds = timed["ms"] / 1000 * micro_batches / parts
    width = torch.finfo(dtype).bits // 8
    flops, moved = count_work(model.config, cfg, micro_batch, width)
    row = dict(
        device=torch.cuda.get_device_name(), torch=torch.__version__, commit=git_commit(),
        preset=cfg.preset, dtype=str(dtype)[6:], micro_batch=micro_batch, steps=cfg.steps,
        s_per_step=seconds, minutes=cfg.steps * seconds / 60, peak_gib=timed["peak_gib"],
        tokens_per_s=timed["tokens_per_s"], loss=timed["loss"], flops=flops, bytes=moved,
    )
    add_estimates(row)
    return row


def print_fits(rows):
    print("| card | preset | dtype | micro_batch | peak GiB |\n|" + " --- |" * 5)
    for row in rows:
        card = f"{row['memory_gb']:g} GB, emulated" if row["memory_gb"] else "this GPU"
        fit = "does not fit | "
        if row["micro_batch"]:
            fit = f"{row['micro_batch']} | {row['peak_gib']:.2f}"
        print(f"| {card}: {row['usable_gib']:.2f} GiB | {row['preset']} | {row['dtype']} | {fit} |")


def print_times(rows):
    print("\n| GPU | preset | dtype | micro_batch | s per step | training, minutes | peak GiB "
          "| loss | torch, commit |\n|" + " --- |" * 9)
    for row in rows:
        print(f"| {row['device']} | {row['preset']} | {row['dtype']} | {row['micro_batch']} "
              f"| {row['s_per_step']:.4f} | {row['minutes']:.2f} | {row['peak_gib']:.2f} "
              f"| {row['loss']} | {row['torch']}, {str(row['commit'])[:9]} |")
    print("(all steps with the KL; without data preparation, compilation and evaluation)")
    for row in rows:
        if row["estimates"]:
            print(f"\nESTIMATES, not measured: {row['preset']} in {row['dtype']} reaches "
                  f"{row['share']:.0%} of this GPU's peaks; at the same share of theirs")
        for card, (minutes, low, high) in row["estimates"].items():
            print(f"  {card}: about {minutes:.1f} minutes (between {low:.1f} and {high:.1f})")
    print("\nAnother card? Please send the two tables of\n"
          f"  python results/bench.py train --memory_gb 0 --preset {rows[0]['preset']}")


def measure(cfgs, device, sizes, repeats):
    """configs of one preset, which differ in their dtype -> {"fits": rows, "times": rows}"""
    dtypes = [pick_dtype(cfg.dtype, device)[0] for cfg in cfgs]
    fits = []
    for cfg, dtype in zip(cfgs, dtypes):
        fits += fit_preset(cfg, device, dtype, sizes)
    print_fits(fits)
    times = []
    for cfg, dtype, row in zip(cfgs, dtypes, fits[:: len(sizes)]):
        if row["micro_batch"]:                             # that of the largest card
            times.append(time_preset(cfg, device, dtype, row["micro_batch"], repeats))
    if times:
        print_times(times)
    return dict(fits=fits, times=times)
