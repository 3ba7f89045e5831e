"""
acceptance.py: how many drafts are accepted, on four kinds of text, and the tokens per forward that
follow from it. Called by bench.py:

    python results/bench.py accept CKPT ..                  on pieces of the validation text
    python results/bench.py accept CKPT .. --prompts FILE   on these prompts

    given     validation text, teacher-forced: the main head's most likely tokens against the heads'
    greedy    the model's own greedy text, after the same prompts
    no loops  the same without the texts that end in a loop; left out where all do
    T = 1     the model's own text at temperature 1, drafts by the accept rule `residual`

AR_k and CAR_k are means over all positions. Rounds don't begin at all of them, but behind the
drafts that the last round accepted: where text is hard. So 1 + sum of CAR is not the tokens per
forward. These are counted along the rounds: of a walk over the text (see expected_rounds), and at
T = 1 of decoding. All are total tokens over total forwards. Intervals are those of the bootstrap.

The second table asks whether the walk predicts what it has not seen: it goes over the texts of
every other prompt (the even ones), and is compared with decoding on the rest.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import decode
from common import UserError
from data.errors import show
from distill import to_float32
from results import bench

RESAMPLES = 1000
FEW = 5            # with fewer texts no interval is shown

# -----------------------------------------------------------------------------
# one text


@torch.no_grad()
def reach_probs(model, prompt, ids, temperature):
    """
    the probability that a round which begins at ids[i] accepts drafts 1 .. k at least, given that
    this text is what comes out -> (len(ids) - 1, K); 0 where the text ends before draft k

    Greedy it is 0 or 1: head k's most likely token is the main head's, or it isn't. At temperature
    1 a token x comes out with probability p(x), and as an accepted draft with probability
    q(x) min(1, p(x) / q(x)) = min(p(x), q(x)). So, given x, it was one with probability
    min(1, q(x) / p(x)). On text that the model itself has sampled this is exact: head k has read
    the text, for the drafts before its own were accepted.
    """
    K = model.config.n_mtp
    tokens = torch.tensor([prompt + ids[:-1]], device=model.weight.device)
    accepted = tokens.new_zeros(len(ids) - 1, K, dtype=torch.float64)
    logits = [to_float32(x[0, len(prompt) - 1 :]) for x in model.all_logits(tokens)]
    for k in range(1, K + 1):
        p = logits[0][k:]                                 # (len(ids) - k, V): ids[k], ..
        q = logits[k]                                     # the same tokens
        if temperature == 0:
            prob = p.argmax(-1) == q.argmax(-1)
        else:
            x = tokens.new_tensor(ids[k:])
            log_ratio = -F.cross_entropy(q, x, reduction="none")
            log_ratio += F.cross_entropy(p, x, reduction="none")
            prob = log_ratio.clamp(max=0).exp()
        accepted[: len(prob), k - 1] = prob
    return accepted.cumprod(1).cpu().numpy()


def expected_rounds(accepted):
    """
    reach_probs of the first K heads (T, K) -> the expected number of rounds with K heads over the
    text. A round at i that accepts a drafts is followed by one at i + a + 1. No a is drawn, and
    none is replaced by its mean, which would end between two tokens: what is added up is the
    probability that a round begins at each position. Greedy, this is a walk over the text
    """
    T, K = accepted.shape
    reached = np.pad(accepted, ((0, 0), (1, 1)))
    reached[:, 0] = 1                                     # 0 drafts or more
    exactly = reached[:, :-1] - reached[:, 1:]            # (T, K+1): a drafts and no more
    begins = np.zeros(T + K + 1)
    begins[0] = 1
    for i in range(T):
        begins[i + 1 : i + K + 2] += begins[i] * exactly[i]
    return begins[:T].sum()


# -----------------------------------------------------------------------------
# one kind of text


class Sample(NamedTuple):
    """numbers of one kind of text, an entry for each of n prompts"""

    looping: np.ndarray    # (n,) whether the text ends in a loop
    tokens: np.ndarray     # (n,) what rounds emit: all but the first, which the prefill emits
    positions: np.ndarray  # (n,) where a round has all K drafts
    kept: np.ndarray       # (n, K) the sum over them of reach_probs
    forwards: dict         # number of heads: (n,), expected_rounds or as counted

    def select(self, chosen):
        """the same of these prompts alone"""
        forwards = {k: counts[chosen] for k, counts in self.forwards.items()}
        return Sample(*[numbers[chosen] for numbers in self[:-1]], forwards)

    def rates(self):
        """-> AR and CAR of heads 1 .. K"""
        return bench.rates_of_sums(np.array([self.positions.sum(), *self.kept.sum(0)]))


def examine(model, prompts, texts, temperature, counts):
    """continuations of the prompts -> Sample"""
    K = model.config.n_mtp
    probs = []
    bar = tqdm(zip(prompts, texts), "acceptance", len(prompts), leave=False, unit="text")
    for prompt, ids in bar:
        probs.append(reach_probs(model, prompt, ids, temperature))
    forwards = {k: np.array([expected_rounds(x[:, :k]) for x in probs]) for k in counts}
    lengths = np.array([len(ids) for ids in texts])
    kept = np.stack([x[: len(x) + 1 - K].sum(0) for x in probs])
    looping = np.array([bench.loops(ids) for ids in texts])
    return Sample(looping, lengths - 1, lengths - K, kept, forwards)


def write(model, prompts, cfg, heads, temperature):
    """decode with so many heads -> the continuations, and the forwards that each took, (n,)"""
    device = model.weight.device
    B = min(cfg.batch or (128 if device.type == "cuda" else 16), len(prompts))
    length = decode.context_length(model, prompts, cfg.tokens)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    decoder = decode.make_decoder(
        model, B, length, heads, temperature, generator=generator, fast=cfg.fast
    )
    texts = []
    forwards = []
    name = f"T = {temperature:g}, {heads} heads"
    for start in tqdm(range(0, len(prompts), B), name, leave=False, unit="batch"):
        group = prompts[start : start + B]
        counts = torch.zeros_like(decoder.n)
        full = (group * B)[:B]                            # the last group may be smaller
        ids, _ = decode.run_decoder(decoder, full, cfg.tokens, count_forwards(counts))
        texts += ids[: len(group)]
        forwards += counts[: len(group)].tolist()
    return texts, np.array(forwards)


def count_forwards(counts):
    """-> a `watch` for run_decoder: adds to counts (B,) the rounds in which a sequence went on"""
    before = None

    def watch(decoder):
        nonlocal before
        if before is not None:
            counts.add_(decoder.n > before)
        before = decoder.n.clone()

    return watch


# -----------------------------------------------------------------------------
# totals, intervals, rows


def ratio(top, bottom):
    """of the totals: not a mean or median over prompts"""
    return float(top.sum() / bottom.sum())


def resampled(top, bottom, seed=0):
    """the same for as many prompts, drawn with replacement -> (RESAMPLES,)"""
    n = len(top)
    picks = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    return top[picks].sum(1) / bottom[picks].sum(1)


def interval(ratios):
    """-> the bounds between which 95 % of them lie"""
    return np.percentile(ratios, [2.5, 97.5]).tolist()


def bounds(interval, texts, form):
    """an interval as text. Drawn from few texts it would be too narrow, from one of width 0"""
    return "(few texts)" if texts < FEW else form.format(*interval)


def acceptance_rows(kind, sample):
    """-> a row (dict) for each number of heads"""
    ars, cars = sample.rates()
    rows = []
    for k, forwards in sample.forwards.items():
        rows.append(dict(
            text=kind, heads=k, prompts=len(sample.tokens), looping=int(sample.looping.sum()),
            ar=ars[k - 1], car=cars[k - 1], ars=ars[:k], cars=cars[:k], naive=1 + sum(cars[:k]),
            car_interval=interval(resampled(sample.kept[:, k - 1], sample.positions)),
            tokens=int(sample.tokens.sum()), forwards=float(forwards.sum()),
            tokens_per_forward=ratio(sample.tokens, forwards),
            interval=interval(resampled(sample.tokens, forwards)),
        ))
    return rows


def prediction_rows(temperature, even, odd):
    """Samples of two halves, by the walk and as counted -> a row (dict) for each number of heads"""
    _, cars = even.rates()
    rows = []
    for k, forwards in even.forwards.items():
        naive = 1 + sum(cars[:k])
        predicted = ratio(even.tokens, forwards)
        measured = ratio(odd.tokens, odd.forwards[k])
        # another seed: the halves are drawn independently of each other
        ratios = resampled(even.tokens, forwards) / resampled(odd.tokens, odd.forwards[k], seed=1)
        rows.append(dict(
            temperature=temperature, heads=k, prompts=min(len(even.tokens), len(odd.tokens)),
            naive=naive, predicted=predicted, measured=measured,
            naive_percent=100 * (naive / measured - 1),
            percent=100 * (predicted / measured - 1),
            percent_interval=interval(100 * (ratios - 1)),
        ))
    return rows


def print_rows(rows):
    print(f"{'text':>9} {'prompts':>7} {'looping':>7} {'heads':>5} {'AR':>6} {'CAR':>6}  "
          f"{'(95 %)':14}  1 + sum CAR  tok/fwd  (95 %)")
    for row in rows:
        car = bounds(row["car_interval"], row["prompts"], "({:.3f} .. {:.3f})")
        own = bounds(row["interval"], row["prompts"], "({:.2f} .. {:.2f})")
        print(f"{row['text']:>9} {row['prompts']:7} {row['looping']:7} {row['heads']:5} "
              f"{row['ar']:6.3f} {row['car']:6.3f}  {car:16}"
              f"{row['naive']:12.2f} {row['tokens_per_forward']:8.2f}  {own}")
    for kind, row in {row["text"]: row for row in rows}.items():               # its last row
        print(f"{kind:>9}: AR of heads 1 .. {row['heads']}: "
              f"{' '.join(f'{ar:.3f}' for ar in row['ars'])}")


def print_predictions(rows):
    print("\npredicted from the texts of the even prompts, measured by decoding the odd ones\n"
          "temperature heads measured  predicted  too high  (95 %)"
          "              1 + sum CAR  too high")
    for row in rows:
        found = bounds(row["percent_interval"], row["prompts"], "({:+.1f} .. {:+.1f} %)")
        print(f"{row['temperature']:11} {row['heads']:5} {row['measured']:8.2f} "
              f"{row['predicted']:10.2f} {row['percent']:+7.1f} %  {found:20} "
              f"{row['naive']:10.2f} {row['naive_percent']:+7.1f} %", flush=True)


# -----------------------------------------------------------------------------
# measuring


def head_counts(checkpoint, cfg):
    """the numbers of heads that --heads asks for, in order"""
    K = checkpoint.model.config.n_mtp
    if K == 0:
        raise UserError(f"{checkpoint.path} has no MTP heads, so that nothing is drafted: give a "
                        "checkpoint with heads")
    if not cfg.heads:
        return [k for k in (1, 2, 4, 8, 16) if k < K] + [K]
    counts = sorted(set(bench.split("heads", cfg.heads, int)))
    if counts[0] < 1 or counts[-1] > K:
        raise UserError(f"--heads is {cfg.heads}, but {checkpoint.path} has heads 1 .. {K}")
    return counts


def measure_one(model, prompts, given, cfg, counts):
    """-> the rows of both tables; prints them"""
    def decoded(own_prompts, temperature):
        return {k: write(model, own_prompts, cfg, k, temperature)[1] for k in counts}

    rows = []
    if given:
        rows += acceptance_rows("given", examine(model, prompts, given, 0, counts))
    texts, _ = write(model, prompts, cfg, 0, 0.0)
    greedy = examine(model, prompts, texts, 0, counts)
    rows += acceptance_rows("greedy", greedy)
    if not greedy.looping.all():
        rows += acceptance_rows("no loops", greedy.select(~greedy.looping))
    texts, _ = write(model, prompts, cfg, 0, 1.0)
    walked = examine(model, prompts, texts, 1, counts)
    sampled = walked._replace(forwards=decoded(prompts, 1.0))
    rows += acceptance_rows("T = 1", sampled)
    print_rows(rows)
    even = slice(0, None, 2)
    odd = slice(1, None, 2)
    measured = greedy.select(odd)._replace(forwards=decoded(prompts[odd], 0.0))
    predictions = prediction_rows(0, greedy.select(even), measured)
    predictions += prediction_rows(1, walked.select(even), sampled.select(odd))
    print_predictions(predictions)
    return dict(acceptance=rows, predictions=predictions)


def measure(checkpoints, cfg):
    """Checkpoints of one dataset, on the same prompts -> one result (dict) after the other"""
    counts = [head_counts(checkpoint, cfg) for checkpoint in checkpoints]
    prompts, _, cfg = bench.shared_prompts(checkpoints, cfg)
    if len(prompts) < 2:
        raise UserError(f"{cfg.prompts} has one prompt; half of them are compared with the rest, "
                        "so give two or more")
    given = []
    if not cfg.prompts:
        n = len(prompts[0])
        pieces = bench.validation_pieces(checkpoints[0], cfg, n + cfg.tokens)
        prompts = [piece[:n] for piece in pieces]
        given = [piece[n:] for piece in pieces]
    shortest = min([cfg.tokens, *map(len, given)])
    K = max(checkpoint.model.config.n_mtp for checkpoint in checkpoints)
    if shortest <= K:
        raise UserError(f"a text has {shortest} tokens after its prompt, which leave no round with "
                        f"{K} drafts: give more --tokens, shorter prompts or a longer --data")
    for (path, model, _, _), own in zip(checkpoints, counts):
        show(f"\n{path}: {model.config.n_mtp} heads, {len(prompts)} prompts, {cfg.tokens} tokens "
             f"each, {str(model.weight.dtype)[6:]} on {model.weight.device}")
        yield dict(checkpoint=str(path), **measure_one(model, prompts, given, cfg, own))
