"""
fast/heads.py: how many MTP heads pay? heads="auto" of decode.py, on every device. Optional.

A round with k heads emits 1 + AR_1 + AR_1 AR_2 + .. + AR_1 AR_2 .. AR_k tokens on average, where
AR_j is how often head j's draft is accepted, given that those before it were; it is counted while
decoding. Between rounds, the number of heads is chosen with which the rest of the text takes the
least time, the catching up of heads that sat out included. How long a round takes stands in a
table: timed in the call itself, it would make the text depend on the clock, not on the seed alone.
"""
import json
from pathlib import Path

import numpy as np

from data.errors import UserError

MEMORY = 64        # forwards that are remembered, or 4 of each sequence: older counts are forgotten
PRIOR = 0.8        # mean AR before anything is known,
PRIOR_DRAFTS = 32  # with the weight of so many drafts (pseudo-counts)
HEAD_DRAFTS = 8    # a head's AR is drawn to the mean of all, with the weight of so many drafts
SWITCH = 0.05      # hysteresis: another number of heads must be so much better, for AR is noisy
CATCH_UP = 4       # to fill the cache of a head that sat out takes as long as so many of its drafts
SHORT = 16         # with fewer tokens left, no change is worth a look at the counts
# on a GPU the choice is among these and all heads, for each has a CUDA graph of its own
HEAD_COUNTS = (0, 1, 2, 4, 6, 8, 12, 16)
FREE_ROWS = 16     # with so many rows, a matrix product takes as long as with one,
DOUBLE_ROWS = 200  # with so many more twice as long (24 layers of 384 on an H100)


class HeadChoice:
    """
    costs   (K+1,) times of a round with 0 .. K heads, in any unit; inf: never chosen
    memory  forwards that are remembered, about
    past    (K+1, K+1) the part of all counts that has been forgotten, or 0
    """

    def __init__(self, model, batch, draft_vocab=None, costs=None):
        """costs: a file that `results/bench.py costs` wrote, or what it holds. Where it has nothing
        for this batch, round_costs"""
        if isinstance(costs, (str, Path)):
            costs = read_costs(costs)
        costs = (costs or {}).get(str(batch)) or round_costs(model, batch, draft_vocab)
        self.costs = np.array(costs, dtype=float)
        self.past = 0
        self.memory = max(MEMORY, 4 * batch)
        K = model.config.n_mtp
        if len(costs) != K + 1:
            raise UserError(f"the costs are those of 0 .. {len(costs) - 1} heads; this model has "
                            f"{K}: measure its own with `results/bench.py costs`")

    def choose(self, accepted, now, left):
        """accepted (K+1, K+1), at [k, a]: how many forwards with k heads accepted a drafts, since
        the prefill; now: how many heads run, or -1; left: how many tokens, at most, a sequence
        still lacks -> how many heads should run next"""
        if now < 0:                                       # a new text
            self.past = 0
        elif left < SHORT:
            return now
        recent = accepted.numpy(force=True) - self.past
        self.past = self.past + recent * max(0, 1 - self.memory / max(1, recent.sum()))
        reached = recent.sum(0)[::-1].cumsum()[::-1]               # [k]: k drafts or more accepted
        judged = (reached - recent.diagonal())[:-1]                # of them, where head k+1 drafted
        kept = reached[1:]
        together = (kept.sum() + PRIOR_DRAFTS * PRIOR) / (judged.sum() + PRIOR_DRAFTS)
        # a head that has not run for long gets the mean
        ar = (kept + HEAD_DRAFTS * together) / (judged + HEAD_DRAFTS)
        tokens = np.append(1, 1 + ar.cumprod().cumsum())
        times = self.costs * (left / tokens).clip(1)      # of the rest: one round at least
        if now >= 0:
            times += CATCH_UP * (self.costs - self.costs[now]).clip(0)
            times[now] /= 1 + SWITCH
        return int(times.argmin())


def round_costs(model, batch, draft_vocab=None):
    """times of a round with 0 .. K heads in ordinary steps, as its weights suggest: to read them
    once is what takes time, and every row after FREE_ROWS takes a little more"""
    K = model.config.n_mtp
    sizes = model.count_parameters()
    main = sizes["trunk"] + sizes["embedding"]
    head = sizes["heads"] / max(1, K) + model.weight[:draft_vocab].numel()
    costs = []
    for k in range(K + 1):
        rows = batch * (k + 1)
        costs.append((main + k * head) * (1 + max(0, rows - FREE_ROWS) / DOUBLE_ROWS))
    return [cost / costs[0] for cost in costs]


def read_costs(path):
    """what `results/bench.py costs` wrote: {batch, as text: times of a round with 0 .. K heads}"""
    try:
        costs = json.loads(Path(path).read_text(encoding="utf-8"))
        if all(isinstance(times, list) and times for times in costs.values()):
            if all(time > 0 for times in costs.values() for time in times):    # never true of nan
                return costs
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror})") from None
    except (AttributeError, TypeError, ValueError):       # not JSON, or of another shape
        pass
    raise UserError(f"{path} does not hold times above 0: give a file that `results/bench.py "
                    "costs` wrote")
