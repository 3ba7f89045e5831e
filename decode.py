"""
decode.py: speculative decoding with the model's own MTP heads. The output is the main head's.

    python decode.py out/tiny/ckpt.pt --prompt "Once upon a time" --tokens 100
    python decode.py out/tiny/ckpt.pt --trace          color each token by the head that drafted it
    python decode.py out/tiny/ckpt.pt --heads 0        ordinary decoding, one token per forward pass
    python decode.py out/tiny/ckpt.pt --heads auto     as many heads as pay, chosen between rounds
    python decode.py out/smollm2-4/ckpt.pt --chat "Name three primary colours."
    python decode.py -h                                every flag, its default and its meaning

Is the output identical, and how fast is it? `python results/bench.py check CKPT`, and
`python results/bench.py decode CKPT`.

One round, with tokens t_0 .. t_n known and h^0 computed up to position n-1:

    draft    head 1 reads h^0_{n-1} and t_n and proposes d_1; head 2 reads h^1_{n-1} and d_1 and
             proposes d_2; .. d_K
    verify   the trunk runs once over [t_n, d_1 .. d_K]; row i gives the main head's distribution
             after d_1 .. d_i
    accept   keep d_1 .. d_a while the rule says so, and emit one more token from row a:
             a+1 tokens for one forward pass
    rollback nothing to do: caches are indexed by position, and the next round overwrites what was
             rejected

speculative_round does this for one sequence, without a cache. The Decoder does the same with
caches, for batches, and without waiting for the device; tests/test_decode.py compares the two.

Shapes in comments: B batch, K heads used, V vocabulary. In the rules, p is the target distribution
(the main head's) and q the draft distribution (an MTP head's), as in the papers on speculative
decoding (distill.py follows its own paper: there Q is the main head's).
"""

import html
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import (
    JSON_FLAG, DeviceFlags, UserError, check_flags, flag, load_checkpoint, parse,
    pick_device, pick_dtype, run,
)
from data.errors import show, write_file
from data.prepare import Tokenizer
from model import Cache

# -----------------------------------------------------------------------------
# one round, in its plain form


@torch.no_grad()
def speculative_round(model, tokens, heads, temperature, generator=None):
    """tokens, a list of ids -> the list of the a+1 new ids of one round, by the rule `residual`"""
    room = model.config.block_size - len(tokens)          # tokens that the context can still take
    assert room > 0, "the context is full"
    heads = min(heads, room - 1)                          # one place is the emitted token's
    if len(tokens) == 1:
        heads = 0                                         # head 1 reads h^0_{n-1}: there is none
    # all random numbers of the round, which sample and bernoulli turn into choices
    noise = make_noise("residual", 1, heads, model.weight)
    noise.numbers.exponential_(generator=generator)

    def probs(k, ids):                                    # head k's distributions, (positions, V)
        ids = torch.tensor([ids], device=model.weight.device)
        return probabilities(model.all_logits(ids)[k][0], temperature)

    # draft: each head proposes one token
    drafts, draft_probs = [], []
    for k in range(heads):
        draft_probs.append(probs(k + 1, tokens + drafts)[-1])
        drafts.append(int(sample(draft_probs[k], noise.draft[0, k])))

    # verify: one pass of the main head over all of them
    target_probs = probs(0, tokens + drafts)[len(tokens) - 1 :]         # (heads + 1, V)

    # accept draft x with probability min(1, p(x) / q(x)); after a rejection, emit from (p - q)+
    for k, x in enumerate(drafts):
        p, q = target_probs[k], draft_probs[k]
        if not bernoulli(p[x] / q[x], noise.accept[0, k]):
            return drafts[:k] + [int(sample(residual_probs(p, q), noise.emit[0]))]

    # all accepted: emit one more token, from the last row
    return drafts + [int(sample(target_probs[-1], noise.emit[0]))]


# -----------------------------------------------------------------------------
# randomness. All random numbers of a round are drawn in one call before it; only bernoulli and
# sample read them. So the functions of this section and the accept rules are pure


class Noise(NamedTuple):
    """random numbers of a round, from the exponential distribution of mean 1. The rule `match`
    samples all of its K+1 tokens with `numbers`"""

    numbers: torch.Tensor  # (B, n) all of them; the other three are parts of it
    draft: torch.Tensor    # (B, K, V) to sample the drafts; none for the rule `point`
    accept: torch.Tensor   # (B, K) to accept them; none for `match`
    emit: torch.Tensor     # (B, V) to sample the token after them


def make_noise(rule, B, K, like):
    """-> Noise of zeros: numbers.exponential_() fills it. `like` is the output head (V, d), which
    gives V, the device and the dtype"""
    V = len(like)
    to_draft = 0 if rule == "point" else K * V
    to_accept = 0 if rule == "match" else K
    dtype = torch.promote_types(like.dtype, torch.float32)
    numbers = like.new_zeros(B, to_draft + to_accept + V, dtype=dtype)
    draft, accept, emit = numbers.split([to_draft, to_accept, V], dim=1)
    return Noise(numbers, draft.unflatten(1, (-1, V)), accept, emit)


def bernoulli(prob, noise):
    """True with the given probabilities, elementwise: exp(-noise) is uniform in (0, 1)"""
    return torch.exp(-noise) < prob


def sample(probs, noise):
    """one index from probs (.., V), which need not sum to 1 but must not be all 0. An exponential
    race (the Gumbel-max trick): noise_v / probs_v is exponential with rate probs_v, and the
    smallest is v with probability in proportion to its rate. The code takes the largest inverse,
    so that a probability of 0 is never drawn. No host sync, unlike torch.multinomial"""
    return argmax(probs / noise.clamp_min(torch.finfo(noise.dtype).tiny))


def argmax(x):
    """(.., V) -> (..). A long row in two steps: a GPU reads it in parallel only if it is cut into
    pieces"""
    if x.size(-1) <= 8192 or x.size(-1) % 128:
        return x.argmax(-1)
    value, index = x.unflatten(-1, (-1, 128)).max(-1)
    piece = value.argmax(-1, keepdim=True)
    return (piece * 128 + index.gather(-1, piece)).squeeze(-1)


def probabilities(logits, temperature, top_k=None):
    """logits (.., V) -> the distribution that tokens are sampled from, for target and draft alike.
    top_k keeps exactly k; of ties at the k-th place, any. Temperature 0 (or too small for float32)
    puts all on the argmax"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature < 1e-20 or top_k == 1:
        return F.one_hot(argmax(logits), logits.size(-1)).to(logits.dtype)
    if top_k is not None:
        top = logits.topk(min(top_k, logits.size(-1)), dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)
    return (logits / temperature).softmax(-1)


# -----------------------------------------------------------------------------
# three exact accept rules: target_probs (B, K+1, V), draft_probs (B, K, V), drafts (B, K), noise
# -> number of accepted drafts (B,), emitted token (B,).
# Each emits tokens with distribution p whatever q is; they differ in how often they accept:
#   residual: sum_v min(p, q), for a draft sampled from q
#   match and point: p(draft), for any fixed draft (here the argmax of q)


def num_accepted(ok):
    """(B, K) -> how many are True before the first False, (B,)"""
    return ok.int().cumprod(1).sum(1)


def select_row(x, index):
    """x (B, R, ..), index (B,) -> row index[b] of each sequence, (B, ..)"""
    return x[torch.arange(len(x), device=x.device), index]


def of_drafts(probs, drafts):
    """probs (B, K or K+1, V), drafts (B, K) -> the probability of each draft, (B, K)"""
    return probs.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)


def residual_probs(p, q):
    """(p - q)+, not normalised. Where p == q, only rounding can reject a draft: then p, not 0/0"""
    rest = (p - q).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def residual(target_probs, draft_probs, drafts, noise):
    """accept x ~ q with probability min(1, p(x)/q(x)); on the first rejection emit from (p - q)+;
    if all are accepted, from row K. Source: Leviathan et al., arXiv 2211.17192, algorithm 1, and
    Chen et al., arXiv 2302.01318"""
    p = of_drafts(target_probs, drafts)
    q = of_drafts(draft_probs, drafts)                    # > 0, for the draft was sampled from q
    accepted = num_accepted(bernoulli(p / q, noise.accept))
    draft_probs = F.pad(draft_probs, (0, 0, 0, 1))        # in row K q is 0, and (p - 0)+ = p
    p = select_row(target_probs, accepted)                # (B, V)
    q = select_row(draft_probs, accepted)
    return accepted, sample(residual_probs(p, q), noise.emit)


def point(target_probs, draft_probs, drafts, noise):
    """the draft is a fixed token: accept it with probability p(draft), else emit from the rest of
    p. This is `residual` with q all on the draft"""
    draft_probs = F.one_hot(drafts, target_probs.size(-1)).to(target_probs.dtype)
    return residual(target_probs, draft_probs, drafts, noise)


def match(target_probs, draft_probs, drafts, noise):
    """sample y ~ p at every row and emit it; continue while y equals the draft. Greedy decoding is
    this rule with one-hot p"""
    tokens = sample(target_probs, noise.numbers.view_as(target_probs))         # (B, K+1)
    accepted = num_accepted(tokens[:, :-1] == drafts)
    return accepted, select_row(tokens, accepted)


RULES = {"residual": residual, "point": point, "match": match}
FIXED_DRAFT = ("point", "match")   # the other rules are given a draft that was sampled, and q


# -----------------------------------------------------------------------------
# acceptance, defined in this one place (paper, section 4)


def accepted_lengths(choices):
    """the argmax tokens of all_logits, entry k (B, T-k) -> how many drafts a round at each position
    would accept, (B, T-K): head k's draft counts if it equals the main head's choice k positions
    on, and those of heads 1 .. k-1 count, too. All read the given text (teacher-forced). With K = 0
    all are 0"""
    K = len(choices) - 1
    n = choices[0].size(1) - K
    ok = [choice[:, :n] == choices[0][:, k : k + n] for k, choice in enumerate(choices)]
    return num_accepted(torch.stack(ok, dim=1)) - 1       # k = 0 is equal to itself: not a draft


def rates(histogram):
    """how often 0 .. K drafts were accepted -> AR_k (of head k, given that heads 1..k-1 were
    accepted) and CAR_k (of heads 1..k together), k = 1..K. A rate of no rounds (0/0) is 0. Tokens
    per forward = 1 + sum of CAR"""
    reached = [sum(histogram[k:]) for k in range(len(histogram))]
    ar = [after / max(1, before) for before, after in zip(reached, reached[1:])]
    car = [after / max(1, reached[0]) for after in reached[1:]]
    return ar, car


@dataclass
class Stats:
    """what a call of generate did. A forward is one run of the main model for one sequence, after
    its prefill; a draft that max_new_tokens or the stop token cut off counts as neither emitted nor
    accepted"""

    forwards: int
    accepted: list             # accepted[a]: forwards that accepted a drafts
    drafted: list              # drafted[k]: forwards for which k heads drafted
    tokens: int                # emitted, each sequence's first one included
    seconds: float             # without the prefill
    sequences: int
    tokens_per_forward: float  # these two leave out the prefill's tokens, one per sequence
    tokens_per_second: float
    decoder: str               # which one ran, and why


# -----------------------------------------------------------------------------
# the same with caches, for a batch, and without a host sync


PREFILL = 256  # tokens of a prompt that are read at a time: attention is (PREFILL x slots) there


class Decoder:
    """
    the state of B sequences and the functions that advance it. A round is of fixed shape and
    without a host sync; prefill, choose and remaining are not. fast.decode.FastDecoder is the same,
    with the round as a replayed CUDA graph.

    model   does the steps: a GPT, or fast.decode's wrapper of one
    heads   the largest number of heads that a round may run
    k       how many run now, see use; K in the shapes of a round
    width   rows that each of them runs over in a round: K+1 (see draft), or least_width
    buffer  (B, slots) tokens: t_0 .. t_n, then the current round's drafts
    n       (B,) position of the last known token
    limit   (B,) the largest n may become; a sequence with n = limit is finished, rounds leave it
    valid   (heads+1, B) rows before valid[j] of head j <= k are in the cache, and correct
    drafts  (B, K) what the last round drafted, for --trace
    accepted  (heads+1, heads+1) at [k, a]: how many forwards with k heads accepted a drafts
    why     which decoder this is, and why, in words (see make_decoder)
    """

    why = "plain PyTorch"
    least_width = 1

    def __init__(
        self, model, batch, length, heads=None, temperature=0.0, top_k=None, accept="residual",
        stop_token=None, generator=None, draft_vocab=None, costs=None,
    ):
        """for `batch` prompts, whose continuations end before position `length`; see generate"""
        self.model = model
        self.heads = model.config.n_mtp if heads in (None, "auto") else heads
        self.auto = None
        if heads == "auto":
            from fast.heads import HeadChoice

            self.auto = HeadChoice(model, batch, draft_vocab, costs)
        elif costs is not None:
            raise UserError("costs have no effect without heads=\"auto\" (--heads auto)")
        self.temperature = temperature
        self.top_k = top_k
        self.accept_rule = accept
        self.stop_token = stop_token
        self.generator = generator
        self.draft_vocab = draft_vocab
        self.check_options()
        slots = length + model.config.n_mtp + 1   # a finished sequence writes K+1 past the end
        self.cache = Cache(model, batch, slots, self.heads)
        self.seq = self.cache.seq                 # (B, 1), integers, as all that follow
        self.buffer = self.seq.new_zeros(batch, slots)
        # prefill sets these; until then they are valid positions, for a round may be recorded
        self.n = self.seq.new_ones(batch)
        self.limit = torch.full_like(self.n, length - 1)
        self.accepted = self.seq.new_zeros(self.heads + 1, self.heads + 1)
        self.valid = self.seq.new_zeros(self.heads + 1, batch)

    def check_options(self):
        """raises a UserError for options that make no sense"""
        K = self.model.config.n_mtp
        V = self.model.config.vocab_size
        for name, low, high in (("heads", 0, K), ("top_k", 1, V), ("draft_vocab", 1, V)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(
                    f"{name} is {value}; it must be from {low} to {high} (this model has {K} MTP "
                    f"heads and a vocabulary of {V}; heads = 0 is ordinary decoding)"
                )
        if not 0 <= self.temperature < torch.inf:
            raise UserError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or more, and finite"
            )
        if self.accept_rule not in RULES:
            raise UserError(f"unknown accept rule {self.accept_rule!r}; choose one of "
                            f"{', '.join(RULES)}")

    @torch.no_grad()
    def prefill(self, prompts, max_new_tokens):
        """read the prompts (lists of ids), emit each one's first token"""
        self.n.copy_(torch.tensor([len(prompt) for prompt in prompts]))
        for b, prompt in enumerate(prompts):
            self.buffer[b, : len(prompt)] = torch.tensor(prompt)
        hidden = self.rebuild([0], int(self.n.max()))
        logits = self.model.logits(0, hidden[:, -1])                      # (B, V)
        probs = probabilities(logits, self.temperature, self.top_k)
        noise = torch.empty_like(probs).exponential_(generator=self.generator)
        token = sample(probs, noise)
        self.buffer[self.seq[:, 0], self.n] = token
        self.limit.copy_((self.n + max_new_tokens).clamp(max=self.model.config.block_size) - 1)
        if self.stop_token is not None:
            self.limit.copy_(torch.where(token == self.stop_token, self.n, self.limit))
        self.accepted.zero_()
        self.valid.zero_()
        self.k = -1                                       # not even 0: no head has read anything
        self.choose(self.remaining())

    def rebuild(self, parts, rows):
        """run the trunk (0) or heads (by number) over the last `rows` rows, PREFILL at a time. In
        front of a shorter text, position 0 is repeated, with the same result each time
        -> the trunk's last rows"""
        hidden = None
        for offsets in torch.arange(-rows, 0, device=self.n.device).split(PREFILL):
            pos = (self.n[:, None] + offsets).clamp_min(0)                # (B, PREFILL) or fewer
            positions = self.model.positions(self.cache, pos)
            for k in parts:
                tokens = self.buffer[self.seq, pos + k]
                if k == 0:
                    hidden = self.model.trunk_step(tokens, self.cache, positions)
                else:          # a row whose token t_{i+k} isn't known yet is rebuilt by draft()
                    self.model.head_step(k, tokens, self.cache, positions)
        return hidden

    @torch.no_grad()
    def use(self, k):
        """from now on, rounds run heads 1 .. k. What these lack in their caches (the prompt, rounds
        in which they did not run) is rebuilt first, but for the rows that the next round runs.
        At least one round lies between two calls"""
        self.valid[: self.k + 1] = self.n - self.k - 1    # the next round would rebuild the rest
        self.k = k
        self.width = max(k + 1, self.least_width)
        # with one-hot p and q the three rules are one; without heads there is nothing to reject
        self.rule = "match" if self.temperature == 0 or k == 0 else self.accept_rule
        self.noise = make_noise(self.rule, len(self.n), k, self.model.weight)
        # rows that head j lacks; finished sequences need none
        rows = ((self.n - self.valid) * (self.n < self.limit)).amax(1).tolist()
        lacking = [j for j in range(1, k + 1) if rows[j] > self.width]
        if lacking:                                       # the last one lacks most
            self.rebuild(range(lacking[0], k + 1), rows[k])

    def choose(self, left):
        """use all heads, or with heads="auto" as many as pay where so many tokens are left. That
        depends on past rounds alone, not on the drafts to come: so the distribution of the output
        stays the same"""
        k = self.auto.choose(self.accepted, self.k, left) if self.auto else self.heads
        if k != self.k:
            self.use(k)

    def round(self):
        """draw the random numbers, then draft, verify and accept"""
        if self.temperature > 0:
            self.noise.numbers.exponential_(generator=self.generator)
        self.advance()

    @torch.no_grad()
    def advance(self):
        draft_probs = self.draft() if self.k else None
        at, tokens, logits = self.verify()
        self.drafts = tokens[:, 1:]
        self.accept(logits, at, self.drafts, draft_probs)

    def window(self, first, last):
        """the places n + first .. n + last, (B, T), and the tokens there"""
        offsets = torch.arange(first, last + 1, device=self.n.device)
        at = (self.n[:, None] + offsets).clamp_min(1)
        return at, self.buffer[self.seq, at]

    def draft(self):
        """heads 1 .. K propose d_1 .. d_K, into buffer[n+1 ..] -> draft_probs (B, K, V)

        Why every head runs over rows n-K-1 .. n-1, not over row n-1 alone: the last round began at
        n' = n-a-1, so the a+1 rows n' .. n-1 are new. Of older rows, head k's row i read t_{i+k},
        which may have been a draft since rejected: row i is right if i+k < n, and the last k rows
        may be wrong. In all max(a+1, k) <= K+1 rows. Near the start of a text row 0 stands in for
        the missing ones, several times, with the same result."""
        at, tokens = self.window(1 - self.width, 0)       # (B, width): head 1 reads .. t_n
        positions = self.model.positions(self.cache, at - 1)
        draft_probs = []
        for k in range(1, self.k + 1):
            hidden = self.model.head_step(k, tokens, self.cache, positions)
            logits = self.model.logits(k, hidden[:, -1], self.draft_vocab)         # (B, V)
            probs, tokens, at = self.propose(logits, at, self.noise.draft[:, k - 1 : k])
            draft_probs.append(probs)
        return None if self.rule in FIXED_DRAFT else torch.stack(draft_probs, 1)

    def propose(self, logits, at, noise):
        """logits of head k (B, V), the places of the tokens it read (B, width), random numbers ->
        its probabilities (B, V) if the rule asks for them (the others want one fixed token), the
        tokens that head k+1 reads, and their places. Writes d_k into the buffer"""
        last = at[:, -1:] + 1                             # the place of d_k
        at = at + 1
        if self.rule in FIXED_DRAFT:
            probs = None
            draft = argmax(logits)
        else:
            probs = probabilities(logits, self.temperature, self.top_k)
            probs = F.pad(probs, (0, len(self.model.weight) - probs.size(-1)))     # draft_vocab
            draft = sample(probs, noise[:, 0])
        # same as reading after the write, but saves a kernel launch
        tokens = torch.where(at == last, draft[:, None], self.buffer[self.seq, at])
        self.buffer[self.seq, last] = draft[:, None]
        return probs, tokens, at

    def verify(self):
        """one forward of the main model over [t_n, d_1 .. d_K] -> places and tokens (B, K+1) and
        its logits (B, K+1, V)"""
        at, tokens = self.window(0, self.k)            # n .. n+K
        positions = self.model.positions(self.cache, at)
        hidden = self.model.trunk_step(tokens, self.cache, positions)
        return at, tokens, self.model.logits(0, hidden)

    def accept(self, logits, at, drafts, draft_probs):
        """apply the accept rule to drafts (B, K), emit tokens, count them"""
        if self.temperature == 0:
            choices = argmax(logits)                      # (B, K+1): `match` with one-hot p
            accepted = num_accepted(choices[:, :-1] == drafts)
            token = select_row(choices, accepted)
        else:
            target_probs = probabilities(logits, self.temperature, self.top_k)
            rule = RULES[self.rule]
            accepted, token = rule(target_probs, draft_probs, drafts, self.noise)
        self.buffer[self.seq[:, 0], self.n + accepted + 1] = token

        # accepted+1 tokens follow, or fewer: up to the limit, which the first stop token becomes
        if self.stop_token is not None:
            emitted = at <= (self.n + accepted)[:, None]                           # (B, K+1)
            is_stop = emitted & (self.buffer[self.seq, at + 1] == self.stop_token)
            stops = torch.where(is_stop, at + 1, self.limit[:, None])
            self.limit.copy_(torch.minimum(stops.amin(1), self.limit))
        count = torch.minimum(accepted + 1, self.limit - self.n)                   # 0 if finished
        emitted_drafts = torch.minimum(accepted, count)
        self.accepted[self.k].scatter_add_(0, emitted_drafts, (count > 0).long())
        self.n += count

    def remaining(self):
        """how many tokens are left, at most (synchronises with the device)"""
        return int((self.limit - self.n).max())

    def rounds(self, left):
        """how many rounds to run before the host looks again, if `left` tokens are left"""
        rounds = -(-left // (self.k + 1))
        if self.auto or self.stop_token is not None:       # to wait for a GPU costs about a round
            rounds = min(rounds, 8 if self.n.is_cuda else 1)
        return rounds

    def tokens_from(self, b, start):
        """the known tokens of sequence b from position `start` on, as a list"""
        return self.buffer[b, start : int(self.n[b]) + 1].tolist()


# -----------------------------------------------------------------------------
# requests


def token_lists(prompts):
    """one prompt or several, lists or tensors of ids -> list of lists of ids"""
    prompts = [p.tolist() if hasattr(p, "tolist") else p for p in prompts]
    if all(isinstance(p, int) for p in prompts):
        return [prompts]
    for prompt in prompts:
        if not isinstance(prompt, list) or not all(isinstance(t, int) for t in prompt):
            raise UserError("prompts are lists or tensors of token ids (int): encode a text first, "
                            "with Tokenizer(meta['tokenizer']).encode(text)")
    return prompts


def context_length(model, prompts, max_new_tokens):
    """-> how many tokens the longest prompt and its continuation take. Raises a UserError for
    prompts that can't be continued"""
    V = model.config.vocab_size
    T = model.config.block_size
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths, default=0) == 0:
        raise UserError("a prompt is empty; give at least one token for each")
    if max(lengths) >= T:
        raise UserError(
            f"a prompt has {max(lengths)} tokens; the context takes {T}, one of them for a new "
            "token: give a shorter one"
        )
    unknown = [t for prompt in prompts for t in prompt if not 0 <= t < V]
    if unknown:
        raise UserError(
            f"a prompt holds id {unknown[0]}; this model's vocabulary is 0 .. {V - 1}: was it made "
            "with another tokenizer?"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    return min(T, max(lengths) + max_new_tokens)


def make_decoder(model, *args, fast="auto", **options):
    """-> a Decoder, or the FastDecoder where it works; decoder.why says which and why"""
    if fast not in ("auto", "on", "off"):
        raise UserError(f"fast is {fast!r}; it must be auto, on or off")
    why = "fast is off"
    if fast != "off":
        from fast.decode import FastDecoder, unsupported

        why = unsupported(model)
        if why is None:
            try:
                return FastDecoder(model, *args, **options)
            except Exception as error:                    # a compiler has many ways to fail
                if fast == "on" or isinstance(error, torch.OutOfMemoryError):
                    raise
                why = f"the fast path failed: {type(error).__name__}: {error}".splitlines()[0]
        elif fast == "on":
            raise UserError(f"the fast path can't run here: {why}; use auto or off")
    decoder = Decoder(model, *args, **options)
    decoder.why = f"plain PyTorch ({why})"
    return decoder


def generate(
    model, prompts, max_new_tokens, *, heads=None, temperature=0.0, top_k=None, accept="residual",
    stop_token=None, generator=None, draft_vocab=None, watch=None, fast="auto", costs=None,
):
    """
    continue each prompt by up to max_new_tokens tokens, or to the end of the context (block_size),
    or to stop_token (which is emitted too)

    prompts      one or several lists of token ids; each is continued independently of the others
    heads        MTP heads that draft: None all, 0 ordinary decoding, "auto" as many as pay, chosen
                 between rounds
    temperature  0 is greedy;  top_k  sample among the k most likely tokens
    accept       "residual" | "match" | "point": all exact
    generator    on the model's device; the same seed and prompts give the same text
    draft_vocab  draft only among the first so many ids; the output's distribution stays the same
    watch        called with the Decoder after the prefill and after each round
    fast         "auto" | "on" | "off": fast/decode.py, on a CUDA GPU
    costs        for heads="auto": a file of `results/bench.py costs`, or what is in it
    -> (list of lists of new ids, Stats). Raises UserError on a bad request. Never prints.
    """
    prompts = token_lists(prompts)
    length = context_length(model, prompts, max_new_tokens)
    training = model.training
    model.eval()
    try:
        decoder = make_decoder(
            model, len(prompts), length, heads, temperature, top_k, accept, stop_token, generator,
            draft_vocab, costs, fast=fast,
        )
        return run_decoder(decoder, prompts, max_new_tokens, watch)
    finally:
        model.train(training)


def run_decoder(decoder, prompts, max_new_tokens, watch=None):
    """decode with a Decoder that was made for such a batch (it can serve again)"""
    decoder.prefill(prompts, max_new_tokens)
    left = decoder.remaining()                            # waits until the prefill is done
    start = time.perf_counter()
    while left > 0:                                       # < 0: all prompts fill the context
        for _ in range(decoder.rounds(left)):
            if watch:
                watch(decoder)
            decoder.round()
        left = decoder.remaining()
        decoder.choose(left)
    seconds = time.perf_counter() - start
    if watch:
        watch(decoder)
    new = [decoder.tokens_from(b, len(prompt)) for b, prompt in enumerate(prompts)]
    tokens = sum(map(len, new))
    later = tokens - len(prompts)                         # than the prefill
    accepted = decoder.accepted.sum(0).tolist()
    forwards = sum(accepted)
    return new, Stats(
        forwards=forwards,
        accepted=accepted,
        drafted=decoder.accepted.sum(1).tolist(),
        tokens=tokens,
        seconds=seconds,
        sequences=len(prompts),
        tokens_per_forward=later / max(1, forwards),
        tokens_per_second=later / max(1e-9, seconds),
        decoder=decoder.why,
    )


# -----------------------------------------------------------------------------
# what is shown


def stream(tokenizer):
    """-> a `watch` for generate() that prints the prompt, and the text as it comes"""
    shown = ""

    def watch(decoder):
        nonlocal shown
        text = tokenizer.decode(decoder.tokens_from(0, 0))
        if decoder.remaining():                           # half a character waits for the rest
            text = text.rstrip("\ufffd")
        show(text[len(shown) :], end="", flush=True)
        shown = text

    return watch


MAIN = 0
REJECTED = -1
# the terminal's codes for the main head, heads 1 .. 8 (9 and more as 8) and, as the last one, what
# was rejected; and the same for an SVG, with its background
COLORS = "0 32 36 34 35 33 92 96 94 9;31".split()
SVG_STYLE = """<style>
.h0 {fill: #222}     .h1 {fill: #1a7f37}  .h2 {fill: #0b7285}  .h3 {fill: #1f4fd8}
.h4 {fill: #8b2fb0}  .h5 {fill: #9a6700}  .h6 {fill: #2da44e}  .h7 {fill: #1098ad}
.h8 {fill: #4c6ef5}  .h-1 {fill: #bbb; text-decoration: line-through}
</style>
<rect width="100%" height="100%" fill="#fff"/>"""


def trace(tokenizer, prompt, rounds):
    """-> a `watch` for generate() that prints one line per round: each new token with the head that
    drafted it, then the rejected drafts. `rounds` fills with the same as lists of (text, head)"""
    known = len(prompt)

    def watch(decoder):
        nonlocal known
        new = decoder.tokens_from(0, known)
        if not new:                                       # a GPU is looked at every few rounds
            return
        known += len(new)
        drafts = decoder.drafts[0].tolist() if rounds else []            # the prefill has none
        parts = []
        for k, token in enumerate(new, 1):
            head = k if drafts[k - 1 : k] == [token] else MAIN
            parts.append((token, head))
        if head == MAIN:            # else the limit or a stop token ended the round in the drafts
            parts += [(token, REJECTED) for token in drafts[len(new) - 1 :]]
        row = [(repr(tokenizer.decode([token]))[1:-1], head) for token, head in parts]
        rounds.append(row)
        print("  ".join(paint(*part) for part in row))

    return watch


def paint(text, head):
    if sys.stdout.isatty():
        return f"\033[{COLORS[min(head, 8)]}m{text}\033[0m"
    names = {MAIN: "main", REJECTED: "rejected"}
    return f"{text}|{names.get(head, head)}"


def svg(rounds):
    """the rounds of a trace as a picture, one line each; rejected drafts struck through"""
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" font-family="monospace" font-size="14" '
             f'width="760" height="{20 * len(rounds) + 12}" xml:space="preserve">',
             SVG_STYLE]
    for i, row in enumerate(rounds):
        spans = [f'<tspan class="h{min(head, 8)}">{html.escape(text)}</tspan>'
                 for text, head in row]
        lines.append(f'<text x="8" y="{20 * i + 20}">{" ".join(spans)}</text>')
    return "\n".join([*lines, "</svg>\n"])


# -----------------------------------------------------------------------------
# the command line


def number_or_auto(text):
    """the type of --heads"""
    return text if text == "auto" else int(text)


@dataclass
class DecodeConfig(DeviceFlags):
    prompt: str = flag("Once upon a time", "text to continue")
    chat: str = flag("", "instead of --prompt: a message, in the model's own chat template")
    stop: bool = flag(True, "stop at the token that ends a text or an answer")
    tokens: int = flag(200, "tokens to emit", min=1)
    temperature: float = flag(0.8, "0 is greedy")
    top_k: int = flag(0, "sample among the k most likely tokens only; 0: all")
    heads: number_or_auto = flag(
        "", "MTP heads that draft; 0: ordinary decoding; -1: all; auto: as many as pay, chosen "
        "between rounds; empty: auto where there are more than 4, else all", min=-1,
    )
    costs: str = flag("", "for --heads auto: times that `results/bench.py costs` wrote")
    accept: str = flag("residual", "accept rule: residual | match | point", choices=RULES)
    seed: int = flag(1, "seed of the random numbers")
    draft_vocab: int = flag(
        0, "draft only among the first so many ids (for BPE, the most frequent); 0: all"
    )
    svg: str = flag("", "--trace, and write it to this file, as a picture")


def load(path, device, dtype):
    """-> (model on the device in its dtype, tokenizer, metadata)"""
    device = pick_device(device)
    model, meta = load_checkpoint(path, device, tokenizer=dict)
    model.to(pick_dtype(dtype, device)[0])
    return model, Tokenizer(meta["tokenizer"]), meta


def main():
    given, rest = parse(DecodeConfig, __doc__, [
        ("checkpoint", dict(metavar="CKPT", help="checkpoint written by train.py or extend.py")),
        ("--trace", dict(action="store_true", help="one line per round: who drafted each token")),
        JSON_FLAG,
    ])
    cfg = DecodeConfig(**given)
    check_flags(cfg)
    model, tokenizer, _ = load(rest["checkpoint"], cfg.device, cfg.dtype)
    prompt = tokenizer.encode_chat(cfg.chat) if cfg.chat else tokenizer.encode(cfg.prompt)
    rounds = []
    tracing = rest["trace"] or cfg.svg
    watch = trace(tokenizer, prompt, rounds) if tracing else stream(tokenizer)
    heads = cfg.heads
    if heads == "" and model.config.n_mtp > 4:
        heads = "auto"
    (ids,), stats = generate(
        model, [prompt], cfg.tokens,
        heads=None if heads in ("", -1) else heads,
        temperature=cfg.temperature,
        top_k=cfg.top_k or None,
        accept=cfg.accept,
        stop_token=tokenizer.end if cfg.stop else None,
        generator=torch.Generator(model.weight.device).manual_seed(cfg.seed),
        draft_vocab=cfg.draft_vocab or None,
        watch=watch,
        fast=cfg.fast,
        costs=cfg.costs or None,
    )
    text = tokenizer.decode(ids)
    if tracing:
        show(f"\n{tokenizer.decode(prompt)}{text}")
    T = model.config.block_size
    if len(prompt) + len(ids) == T < len(prompt) + cfg.tokens:
        print(f"\nthe context of {T} tokens leaves room for {len(ids)} new ones")
    print(
        f"\ndecoding on {model.weight.device} with "
        f"{sum(k * n for k, n in enumerate(stats.drafted)) / max(1, stats.forwards):.3g} of "
        f"{model.config.n_mtp} heads: {stats.decoder}\n"
        f"1 token by the prefill, then {stats.tokens - 1} in {stats.forwards} forward passes "
        f"({stats.tokens_per_forward:.2f} each), {stats.tokens_per_second:.0f} tokens/s; "
        f"drafts accepted 0..K: {stats.accepted}"
    )
    if rest["json"]:
        print(json.dumps(dict(text=text, ids=ids, **asdict(stats))))
    if cfg.svg:
        write_file(cfg.svg, svg(rounds), "--svg")


if __name__ == "__main__":
    run(main)
