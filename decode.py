"""
decode.py: speculative decoding with the model's own MTP heads. The output is the main head's.

    python decode.py out/tiny/ckpt.pt --prompt "Once upon a time" --tokens 100
    python decode.py out/tiny/ckpt.pt --trace          color each token by the head that drafted it
    python decode.py out/tiny/ckpt.pt --heads 0        ordinary decoding, one token per forward pass
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import (
    UserError, check_flags, flag, load_checkpoint, parse, pick_device, pick_dtype, run,
)
from data.errors import printable
from data.prepare import Tokenizer
from model import Cache

# -----------------------------------------------------------------------------
# one round, in its plain form


@torch.no_grad()
def speculative_round(model, tokens, heads, temperature, generator=None):
    """tokens, a list of ids -> the list of the a+1 new ids of one round, by the rule `residual`"""
    device = model.weight.device
    room = model.config.block_size - len(tokens)          # tokens that the context can still take
    assert room > 0, "the context is full"
    heads = min(heads, room - 1)                          # and one place for the emitted token
    if len(tokens) == 1:
        heads = 0                                         # head 1 reads h^0_{n-1}: there is none
    noise = draw_noise("residual", 1, heads, model.weight, generator)

    def probs(k, ids):                                    # head k's, for each position of ids
        logits = model.all_logits(torch.tensor([ids], device=device))[k]
        return probabilities(logits, temperature)         # (1, positions, V)

    # draft: each head proposes one token
    drafts, draft_probs = [], []
    for k in range(1, heads + 1):
        draft_probs.append(probs(k, tokens + drafts)[:, -1])
        drafts.append(int(sample(draft_probs[-1], noise.draft[:, k - 1])))

    # verify: one pass of the main head over all of them
    target_probs = probs(0, tokens + drafts)[:, len(tokens) - 1 :]      # (1, heads + 1, V)

    # accept draft x with probability min(1, p(x) / q(x)), until one is rejected
    accepted = 0
    while accepted < heads:
        p = target_probs[:, accepted, drafts[accepted]]
        q = draft_probs[accepted][:, drafts[accepted]]
        if not bernoulli(p / q, noise.accept[:, accepted]):
            break
        accepted += 1

    # emit one more token: after a rejection from (p - q)+, else from p
    p = target_probs[:, accepted]
    if accepted < heads:
        p = residual_probs(p, draft_probs[accepted])
    return drafts[:accepted] + [int(sample(p, noise.emit[:, 0]))]


# -----------------------------------------------------------------------------
# randomness. All random numbers of a round are drawn in one call before it; only bernoulli and
# sample read them. So the functions of this section (but draw_noise) and the accept rules are pure


class Noise(NamedTuple):
    """random numbers of a round, from the exponential distribution of mean 1"""

    draft: torch.Tensor   # (B, K, V) to sample the drafts; K = 0 where a rule takes the argmax
    accept: torch.Tensor  # (B, K) to accept them; none for the rule `match`
    emit: torch.Tensor    # (B, R, V) to sample from the target: R = 1, or K+1 for `match`


def noise_sizes(rule, heads, V):
    """how many random numbers of a sequence are for draft, accept and emit"""
    if rule == "match":
        return [0, 0, (heads + 1) * V]
    return [heads * V if rule == "residual" else 0, heads, V]


def split_noise(numbers, rule, heads, V):
    """numbers (B, sum of noise_sizes) -> Noise"""
    draft, accept, emit = numbers.split(noise_sizes(rule, heads, V), dim=1)
    return Noise(draft.unflatten(1, (-1, V)), accept, emit.unflatten(1, (-1, V)))


def draw_noise(rule, B, heads, like, generator=None):
    """-> Noise; `like` is the output head (V, d), which gives V, the device and the dtype"""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    n = sum(noise_sizes(rule, heads, len(like)))
    numbers = torch.empty(B, n, dtype=dtype, device=like.device)
    return split_noise(numbers.exponential_(generator=generator), rule, heads, len(like))


def bernoulli(prob, noise):
    """True with the given probabilities, elementwise: exp(-noise) is uniform in (0, 1)"""
    return torch.exp(-noise) < prob


def sample(probs, noise):
    """one index from probs (.., V), which need not sum to 1 but must not be all 0. An exponential
    race (the Gumbel-max trick): noise_v / probs_v is exponential with rate probs_v, and the
    smallest is v with probability in proportion to its rate. The code takes the largest inverse,
    so that a probability of 0 is never drawn. No host sync, unlike torch.multinomial"""
    return (probs / noise.clamp_min(torch.finfo(noise.dtype).tiny)).argmax(-1)


def probabilities(logits, temperature, top_k=None):
    """logits (.., V) -> the distribution that tokens are sampled from, for target and draft alike.
    Temperature 0: all on the argmax"""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    if top_k is not None and top_k < logits.size(-1):
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    logits = logits - logits.amax(-1, keepdim=True)       # no overflow at tiny temperatures
    return (logits / max(temperature, 1e-30)).softmax(-1)  # 1e-46 would be 0 in float32


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
    """probs (B, K, V), drafts (B, K) -> the probability of each draft, (B, K)"""
    return probs.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)


def residual_probs(p, q):
    """(p - q)+, not normalised. Where p == q, only rounding can reject a draft: then p, not 0/0"""
    rest = (p - q).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def residual(target_probs, draft_probs, drafts, noise):
    """accept x ~ q with probability min(1, p(x)/q(x)); on the first rejection emit from (p - q)+;
    if all are accepted, from row K. Source: Leviathan et al., arXiv 2211.17192, algorithm 1, and
    Chen et al., arXiv 2302.01318"""
    p = of_drafts(target_probs[:, :-1], drafts)
    q = of_drafts(draft_probs, drafts)                    # > 0, for the draft was sampled from q
    accepted = num_accepted(bernoulli(p / q, noise.accept))
    rejected_probs = residual_probs(target_probs[:, :-1], draft_probs)
    emit_probs = torch.cat((rejected_probs, target_probs[:, -1:]), dim=1)      # (B, K+1, V)
    return accepted, sample(select_row(emit_probs, accepted), noise.emit[:, 0])


def point(target_probs, draft_probs, drafts, noise):
    """the draft is a fixed token: accept it with probability p(draft), else emit from the rest"""
    p = of_drafts(target_probs[:, :-1], drafts)
    accepted = num_accepted(bernoulli(p, noise.accept))
    one_hot = F.one_hot(drafts, target_probs.size(-1)).to(p.dtype)
    rejected_probs = residual_probs(target_probs[:, :-1], one_hot)
    emit_probs = torch.cat((rejected_probs, target_probs[:, -1:]), dim=1)
    return accepted, sample(select_row(emit_probs, accepted), noise.emit[:, 0])


def match(target_probs, draft_probs, drafts, noise):
    """sample y ~ p at every row and emit it; continue while y equals the draft. Greedy decoding is
    this rule with one-hot p"""
    tokens = sample(target_probs, noise.emit)             # (B, K+1)
    accepted = num_accepted(tokens[:, :-1] == drafts)
    return accepted, select_row(tokens, accepted)


RULES = {"residual": residual, "point": point, "match": match}


# -----------------------------------------------------------------------------
# acceptance, defined in this one place (paper, section 4)


def accepted_lengths(choices):
    """the argmax tokens of all_logits, entry k (B, T-k) -> how many drafts a round at each position
    would accept, (B, T-K): head k's draft counts if it equals the main head's choice k positions
    on, and those of heads 1 .. k-1 count, too. All read the given text (teacher-forced)"""
    K = len(choices) - 1
    T = choices[0].size(1)
    ok = torch.ones_like(choices[0][:, : T - K])
    length = torch.zeros_like(ok)
    for k in range(1, K + 1):
        ok = ok * (choices[k][:, : T - K] == choices[0][:, k : T - K + k])
        length += ok
    return length


def rates(histogram):
    """how often 0 .. K drafts were accepted -> AR_k (of head k, given that heads 1..k-1 were
    accepted) and CAR_k (of heads 1..k together), k = 1..K. Tokens per forward = 1 + sum of CAR"""
    reached = [sum(histogram[k:]) for k in range(len(histogram))]
    ar = []
    car = []
    for before, after in zip(reached, reached[1:]):
        ar.append(after / before if before else 0.0)
        car.append(after / reached[0] if reached[0] else 0.0)
    return ar, car


@torch.no_grad()
def acceptance(model, tokens):
    """tokens (B, T) of some text -> (AR, CAR), K numbers each, against the main head's own argmax,
    teacher-forced. The model should be in eval mode; T is at most block_size"""
    K = model.config.n_mtp
    if tokens.size(1) <= K:
        raise UserError(
            f"got {tokens.size(1)} tokens; the acceptance of {K} heads needs at least {K + 1}"
        )
    choices = [logits.argmax(-1) for logits in model.all_logits(tokens)]
    lengths = accepted_lengths(choices).flatten()
    return rates(torch.bincount(lengths, minlength=K + 1).tolist())


@dataclass
class Stats:
    """what a call of generate did. A forward is one run of the main model for one sequence, after
    its prefill; a draft that max_new_tokens or the stop token cut off counts as neither emitted nor
    accepted"""

    forwards: int = 0
    accepted: list = field(default_factory=list)  # accepted[a]: forwards that accepted a drafts
    drafted: list = field(default_factory=list)   # drafted[k]: forwards for which k heads drafted
    tokens: int = 0                               # emitted, each sequence's first one included
    seconds: float = 0.0                          # without the prefill
    sequences: int = 1

    @property
    def tokens_per_forward(self):
        """the prefill's token is not a forward's: it is left out"""
        return (self.tokens - self.sequences) / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self):
        return (self.tokens - self.sequences) / self.seconds if self.seconds else 0.0


# -----------------------------------------------------------------------------
# the same with caches, for a batch, and without a host sync


PREFILL = 256  # tokens of a prompt that are read at a time: attention is (PREFILL x slots) there


class Decoder:
    """
    the state of B sequences and the functions that advance it. A round is of fixed shape and
    without a host sync; prefill and remaining are not. fast.decode.FastDecoder is the same, with
    the round as a replayed CUDA graph.

    model   does the steps: a GPT, or fast.decode's wrapper of one
    buffer  (B, slots) tokens: t_0 .. t_n, then the current round's drafts
    n       (B,) position of the last known token;  limit (B,) the largest n may become
    done    (B,) whether a sequence is finished: later rounds leave its n alone
    accepted  (K+1,) histogram: how many forwards accepted 0 .. K drafts;  emitted (B,) tokens
    why     which decoder this is, and why, in words (see make_decoder)
    """

    why = "plain PyTorch"

    def __init__(
        self, model, batch, length, heads, temperature=0.0, top_k=None, accept="residual",
        stop_token=None, generator=None, draft_vocab=None,
    ):
        weight = model.weight
        device = weight.device
        self.model = model
        self.heads = heads
        self.temperature = temperature
        self.top_k = top_k
        # with one-hot p and q the three rules are one; without heads there is nothing to reject
        self.rule = "match" if temperature == 0 or heads == 0 else accept
        self.stop_token = stop_token
        self.generator = generator
        self.draft_vocab = draft_vocab
        slots = length + model.config.n_mtp + 1   # a finished sequence writes K+1 past the end
        self.cache = Cache(model.config, batch, slots, device, weight.dtype, heads)
        self.buffer = torch.zeros(batch, slots, dtype=torch.long, device=device)
        self.drafts = torch.zeros(batch, heads, dtype=torch.long, device=device)
        # prefill sets these; until then they are valid positions, for a round may be recorded
        self.n = torch.ones(batch, dtype=torch.long, device=device)
        self.limit = torch.full_like(self.n, length - 1)
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self.accepted = torch.zeros(heads + 1, dtype=torch.long, device=device)
        self.emitted = torch.zeros_like(self.n)
        self.row = torch.arange(batch, device=device)[:, None]
        self.draft_offsets = torch.arange(-heads - 1, 0, device=device)
        self.verify_offsets = torch.arange(heads + 1, device=device)
        # tensors, so that torch.compile makes one function for all k
        self.head_ids = [torch.tensor(k, device=device) for k in range(heads + 1)]
        self.noise = torch.zeros(
            batch, sum(noise_sizes(self.rule, heads, len(weight))), device=device,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
        )

    @torch.no_grad()
    def prefill(self, prompts, max_new_tokens):
        """read the prompts (lists of ids, right-padded here), emit each one's first token"""
        model = self.model
        device = self.n.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.buffer.zero_()
        for b, prompt in enumerate(prompts):
            self.buffer[b, : len(prompt)] = torch.tensor(prompt, device=device)
        last = model.weight.new_empty(len(prompts), model.config.n_embd)
        end = int(lengths.max())
        for start in range(0, end, PREFILL):
            pos = torch.arange(start, min(end, start + PREFILL), device=device)
            pos = pos.expand(len(prompts), -1)                            # (B, T)
            positions = model.positions(self.cache, pos)
            h0 = model.trunk_step(self.buffer[self.row, pos], self.cache, positions)
            # h^0 of each prompt's last token, if it is among these
            index = (lengths - 1 - start).clamp(0, pos.size(1) - 1)
            here = (lengths > start) & (lengths <= start + PREFILL)
            last = torch.where(here[:, None], select_row(h0, index), last)
            for k in range(1, self.heads + 1):
                # a row whose token t_{i+k} isn't known yet is rebuilt by draft()
                next_pos = (pos + k).clamp(max=self.buffer.size(1) - 1)
                model.head_step(k, self.buffer[self.row, next_pos], self.cache, positions)
        probs = probabilities(model.logits(0, last), self.temperature, self.top_k)
        noise = draw_noise("match", len(prompts), 0, model.weight, self.generator)
        first = sample(probs, noise.emit[:, 0])
        self.buffer[self.row[:, 0], lengths] = first
        self.n.copy_(lengths)
        self.limit.copy_((lengths + max_new_tokens).clamp(max=model.config.block_size) - 1)
        self.done.copy_(self.n >= self.limit)
        if self.stop_token is not None:
            self.done |= first == self.stop_token
        self.accepted.zero_()
        self.emitted.fill_(1)

    def round(self):
        """draw the random numbers, then draft, verify and accept"""
        if self.temperature > 0:
            self.noise.exponential_(generator=self.generator)
        self.advance()

    @torch.no_grad()
    def advance(self):
        noise = split_noise(self.noise, self.rule, self.heads, len(self.model.weight))
        draft_probs = self.draft(noise) if self.heads else None
        pos, tokens, logits = self.verify()
        self.accept(logits, pos, tokens, draft_probs, noise)

    def window(self, offsets, shift):
        """positions n + offsets, (B, T), and the tokens `shift` places after them"""
        pos = (self.n[:, None] + offsets).clamp_min(0)
        return pos, self.buffer[self.row, pos + shift]

    def draft(self, noise):
        """heads 1 .. K propose d_1 .. d_K, into buffer[n+1 ..] -> draft_probs (B, K, V)

        Why every head runs over rows n-K-1 .. n-1, not over row n-1 alone: the last round began at
        n' = n-a-1, so the a+1 rows n' .. n-1 are new. Of older rows, head k's row i read t_{i+k},
        which may have been a draft since rejected: row i is right if i+k < n, and the last k rows
        may be wrong. In all max(a+1, k) <= K+1 rows. Near the start of a text row 0 stands in for
        the missing ones, several times, with the same result."""
        pos, tokens = self.window(self.draft_offsets, 1)  # (B, K+1); head k reads t_{pos+k}
        positions = self.model.positions(self.cache, pos)
        draft_probs = []
        for k in range(1, self.heads + 1):
            hidden = self.model.head_step(k, tokens, self.cache, positions)
            logits = self.model.logits(k, hidden[:, -1], self.draft_vocab)         # (B, V)
            own_noise = noise.draft[:, k - 1] if self.rule == "residual" else None
            probs, tokens = self.propose(logits, pos, self.head_ids[k], own_noise)
            draft_probs.append(probs)
        return torch.stack(draft_probs, 1) if self.rule == "residual" else None

    def propose(self, logits, pos, k, noise):
        """logits of head k (B, V) -> draft_probs (B, V) if the rule asks for them (the others want
        one fixed token), and the tokens that head k+1 reads (B, K+1); writes d_k into the buffer"""
        probs = None
        if self.rule == "residual":
            probs = probabilities(logits, self.temperature, self.top_k)
            probs = F.pad(probs, (0, len(self.model.weight) - probs.size(-1)))     # draft_vocab
            draft = sample(probs, noise)
        else:
            draft = self.argmax(logits)
        at = pos + k + 1                                  # the last of these places is d_k's
        is_draft = at == at[:, -1:]
        # same as reading after the write, but saves a kernel launch
        tokens = torch.where(is_draft, draft[:, None], self.buffer[self.row, at])
        self.buffer[self.row[:, 0], at[:, -1]] = draft
        return probs, tokens

    def verify(self):
        """one forward of the main model over [t_n, d_1 .. d_K] -> positions and tokens (B, K+1) and
        its logits (B, K+1, V)"""
        pos, tokens = self.window(self.verify_offsets, 0)  # n .. n+K
        positions = self.model.positions(self.cache, pos)
        hidden = self.model.trunk_step(tokens, self.cache, positions)
        return pos, tokens, self.model.logits(0, hidden)

    def accept(self, logits, pos, tokens, draft_probs, noise):
        """apply the accept rule, emit tokens, count them"""
        K = self.heads
        drafts = tokens[:, 1:]                            # (B, K)
        self.drafts.copy_(drafts)                         # for --trace
        if self.temperature == 0:
            choices = self.argmax(logits)                 # (B, K+1): `match` with one-hot p
            accepted = num_accepted(choices[:, :-1] == drafts)
            token = select_row(choices, accepted)
        else:
            target_probs = probabilities(logits, self.temperature, self.top_k)
            accepted, token = RULES[self.rule](target_probs, draft_probs, drafts, noise)
        self.buffer[self.row[:, 0], self.n + accepted + 1] = token

        # emit accepted+1 tokens, or fewer: up to the limit, up to the stop token, none once done
        count = torch.minimum(accepted + 1, self.limit - self.n)
        stopped = torch.zeros_like(self.done)
        if self.stop_token is not None:
            is_stop = self.buffer[self.row, pos + 1] == self.stop_token            # (B, K+1)
            first_stop = torch.where(is_stop.any(1), is_stop.int().argmax(1) + 1, K + 2)
            stopped = first_stop <= count
            count = torch.minimum(count, first_stop)
        active = ~self.done
        emitted_drafts = torch.minimum(accepted, count)
        self.accepted.scatter_add_(0, emitted_drafts, active.long())
        self.emitted += count * active
        self.n += count * active
        self.done |= stopped | (self.n >= self.limit)

    def argmax(self, logits):
        return logits.argmax(-1)

    def remaining(self):
        """a lower bound on the remaining rounds (synchronises with the device)"""
        left = int(((self.limit - self.n) * ~self.done).max())
        if self.stop_token is not None:
            return min(left, 1)
        return -(-left // (self.heads + 1))


# -----------------------------------------------------------------------------
# requests


def check_request(model, prompts, max_new_tokens, heads, temperature, top_k, accept, draft_vocab):
    """raises a UserError for what generate() can't do"""
    V = model.config.vocab_size
    K = model.config.n_mtp
    T = model.config.block_size
    longest = max(map(len, prompts), default=0)
    if not prompts or not all(map(len, prompts)):
        raise UserError("a prompt is empty; give at least one token for each")
    if longest >= T:
        raise UserError(
            f"a prompt has {longest} tokens; the context takes {T}, one of them for a new token: "
            "give a shorter one"
        )
    unknown = next((t for prompt in prompts for t in prompt if not 0 <= t < V), None)
    if unknown is not None:
        raise UserError(
            f"a prompt holds id {unknown}; this model's vocabulary is 0 .. {V - 1}: was it made "
            "with another tokenizer?"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not 0 <= heads <= K:
        raise UserError(
            f"heads is {heads}; this model has {K} MTP heads, so give 0 (ordinary decoding) to {K}"
        )
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more, and finite")
    for name, value in (("top_k", top_k), ("draft_vocab", draft_vocab)):
        if value is not None and not 1 <= value <= V:
            raise UserError(f"{name} is {value}; it must be from 1 to {V} (the vocabulary)")
    if accept not in RULES:
        raise UserError(f"unknown accept rule {accept!r}; choose one of {', '.join(RULES)}")


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


@torch.no_grad()
def generate(
    model, prompts, max_new_tokens, *, heads=None, temperature=0.0, top_k=None, accept="residual",
    stop_token=None, generator=None, draft_vocab=None, watch=None, fast="auto",
):
    """
    continue each prompt by up to max_new_tokens tokens, or to the end of the context (block_size),
    or to stop_token (which is emitted too)

    prompts      list of lists of token ids; each is continued independently of the others
    heads        MTP heads that draft: None all, 0 ordinary decoding
    temperature  0 is greedy;  top_k  sample among the k most likely tokens (and ties with the k-th)
    accept       "residual" | "match" | "point": all exact
    generator    on the model's device; the same seed and prompts give the same text
    draft_vocab  draft only among the first so many ids; the output's distribution stays the same
    watch        called with the Decoder after the prefill and after each round
    fast         "auto" | "on" | "off": fast/decode.py, on a CUDA GPU
    -> (list of lists of new ids, Stats). Raises UserError on a bad request. Never prints.
    """
    heads = model.config.n_mtp if heads is None else heads
    check_request(
        model, prompts, max_new_tokens, heads, temperature, top_k, accept, draft_vocab
    )
    length = min(model.config.block_size, max(map(len, prompts)) + max_new_tokens)
    training = model.training
    model.eval()
    try:
        decoder = make_decoder(
            model, len(prompts), length, heads, temperature, top_k, accept, stop_token, generator,
            draft_vocab, fast=fast,
        )
        return run_decoder(decoder, prompts, max_new_tokens, watch)
    finally:
        model.train(training)


@torch.no_grad()
def run_decoder(decoder, prompts, max_new_tokens, watch=None):
    """decode with a Decoder that was made for such a batch (it can serve again)"""
    decoder.prefill(prompts, max_new_tokens)
    rounds = decoder.remaining()
    if watch:
        watch(decoder)
    start = time.perf_counter()
    while rounds:
        for _ in range(1 if watch else rounds):
            decoder.round()
        if watch:
            watch(decoder)
        rounds = decoder.remaining()
    seconds = time.perf_counter() - start
    new = []
    for b, prompt in enumerate(prompts):
        new.append(decoder.buffer[b, len(prompt) : int(decoder.n[b]) + 1].tolist())
    accepted = decoder.accepted.tolist()
    forwards = sum(accepted)
    drafted = [0] * decoder.heads + [forwards]
    tokens = int(decoder.emitted.sum())
    return new, Stats(forwards, accepted, drafted, tokens, seconds, len(prompts))


# -----------------------------------------------------------------------------
# what is shown


def stream(tokenizer, prompt):
    """print the prompt -> a `watch` for generate() that prints the text as it comes"""
    shown = ""
    print(printable(tokenizer.decode(prompt)), end="", flush=True)

    def watch(decoder):
        nonlocal shown
        ids = decoder.buffer[0, len(prompt) : int(decoder.n[0]) + 1].tolist()
        # half a character waits for its other half
        text = tokenizer.decode(ids).rstrip("\ufffd")
        print(printable(text[len(shown) :]), end="", flush=True)
        shown = text

    return watch


# main head, heads 1 .. 8 (9 and more as 8): the terminal's codes, and the same for an SVG
COLORS = [0, 32, 36, 34, 35, 33, 92, 96, 94]
SVG_COLORS = "#222 #1a7f37 #0b7285 #1f4fd8 #8b2fb0 #9a6700 #2da44e #1098ad #4c6ef5".split()


class Trace:
    """a `watch` for generate(): one line per round, each new token with the head that drafted it
    (0 is the main head), then the rejected drafts"""

    def __init__(self, tokenizer, prompt):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.known = len(prompt) - 1                      # the position n that the last round left
        self.rounds = []                                  # lists of (text, head, rejected)

    def __call__(self, decoder):
        before = self.known
        self.known = int(decoder.n[0])
        new = decoder.buffer[0, before + 1 : self.known + 1].tolist()
        drafts = [] if before < len(self.prompt) else decoder.drafts[0].tolist()
        accepted = 0
        while accepted < min(len(new), len(drafts)) and new[accepted] == drafts[accepted]:
            accepted += 1
        row = []
        for i, token in enumerate(new):
            row.append((self.quote(token), i + 1 if i < accepted else 0, False))
        if accepted < len(new):     # else the limit or a stop token ended the round in the drafts
            for i in range(accepted, len(drafts)):
                row.append((self.quote(drafts[i]), i + 1, True))
        self.rounds.append(row)
        print("  ".join(self.paint(*part) for part in row))

    def quote(self, token):
        return repr(self.tokenizer.decode([token]))[1:-1]

    def paint(self, text, head, rejected):
        if not sys.stdout.isatty():
            return f"{text}|{'rejected' if rejected else head or 'main'}"
        code = "9;31" if rejected else COLORS[min(head, 8)]
        return f"\033[{code}m{text}\033[0m"

    def svg(self):
        """the rounds as a picture, one line each; rejected drafts struck through"""
        height = 20 * len(self.rounds) + 12
        lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" '
                 'font-family="monospace" font-size="14" xml:space="preserve">',
                 '<rect width="100%" height="100%" fill="#fff"/>']
        for i, row in enumerate(self.rounds):
            spans = []
            for text, head, rejected in row:
                style = f'fill="{SVG_COLORS[min(head, 8)]}"'
                if rejected:
                    style = 'fill="#bbb" text-decoration="line-through"'
                spans.append(f"<tspan {style}>{html.escape(text)}</tspan>")
            lines.append(f'<text x="8" y="{20 * i + 20}">' + " ".join(spans) + "</text>")
        return "\n".join([*lines, "</svg>\n"])


# -----------------------------------------------------------------------------
# the command line


@dataclass
class DecodeConfig:
    prompt: str = flag("Once upon a time", "text to continue")
    tokens: int = flag(200, "tokens to emit", min=1)
    temperature: float = flag(0.8, "0 is greedy", min=0)
    top_k: int = flag(0, "sample among the k most likely tokens only; 0: all", min=0)
    heads: int = flag(-1, "MTP heads that draft; 0: ordinary decoding; -1: all", min=-1)
    accept: str = flag("residual", "accept rule: residual | match | point", choices=tuple(RULES))
    seed: int = flag(1, "seed of the random numbers")
    device: str = flag("auto", "cpu | cuda | mps")
    dtype: str = flag(
        "auto", "float32 | bfloat16 | float64; auto: bfloat16 where the GPU has it",
        choices=("auto", "float32", "bfloat16", "float64"),
    )
    fast: str = flag(
        "auto", "fast path on a CUDA GPU: auto | on | off", choices=("auto", "on", "off")
    )
    draft_vocab: int = flag(
        0, "draft only among the first so many ids (for BPE, the most frequent); 0: all", min=0
    )
    svg: str = flag("", "with --trace: write the trace to this file, as a picture")


def load(path, device, dtype):
    """-> (model on the device in its dtype, tokenizer, metadata)"""
    device = pick_device(device)
    model, meta = load_checkpoint(path, device)
    model = model.to(pick_dtype(dtype, device)[0])
    return model, Tokenizer(meta["tokenizer"]), meta


def continue_prompt(model, tokenizer, cfg, traced):
    """continue --prompt, print the text as it comes (or its trace) -> text, ids and statistics"""
    prompt = tokenizer.encode(cfg.prompt)
    if not prompt:
        raise UserError("--prompt is empty; give at least one character")
    K = model.config.n_mtp
    heads = K if cfg.heads < 0 else cfg.heads
    options = [cfg.temperature, cfg.top_k or None, cfg.accept]
    check_request(model, [prompt], cfg.tokens, heads, *options, cfg.draft_vocab or None)
    length = min(model.config.block_size, len(prompt) + cfg.tokens)
    if length < len(prompt) + cfg.tokens:
        print(f"the context of {length} tokens leaves room for {length - len(prompt)} new ones")
    generator = torch.Generator(device=model.weight.device).manual_seed(cfg.seed)
    decoder = make_decoder(
        model, 1, length, heads, *options, None, generator, cfg.draft_vocab or None, fast=cfg.fast
    )
    print(f"decoding on {model.weight.device} with {heads} of {K} heads: {decoder.why}\n")
    watch = Trace(tokenizer, prompt) if traced else stream(tokenizer, prompt)
    (ids,), stats = run_decoder(decoder, [prompt], cfg.tokens, watch)
    text = tokenizer.decode(ids)
    if traced:
        print("\n" + printable(tokenizer.decode(prompt) + text))
    if cfg.svg:
        Path(cfg.svg).write_text(watch.svg(), encoding="utf-8")
    print(
        f"\n--- 1 token by the prefill, then {stats.tokens - 1} in {stats.forwards} forward passes "
        f"({stats.tokens_per_forward:.2f} each), {stats.tokens_per_second:.0f} tokens/s; "
        f"drafts accepted 0..K: {stats.accepted}"
    )
    return dict(text=text, ids=ids, **asdict(stats))


def main():
    extra = [
        ("checkpoint", dict(metavar="CKPT", help="checkpoint written by train.py or extend.py")),
        ("--trace", dict(action="store_true", help="one line per round: who drafted each token")),
        ("--json", dict(action="store_true", help="print the result as JSON on the last line")),
    ]
    given, rest = parse(DecodeConfig, __doc__, extra)
    cfg = DecodeConfig(**given)
    check_flags(cfg)
    if cfg.svg and not rest["trace"]:
        raise UserError("--svg is the picture of a trace: give --trace, too")
    model, tokenizer, _ = load(rest["checkpoint"], cfg.device, cfg.dtype)
    result = continue_prompt(model, tokenizer, cfg, rest["trace"])
    if rest["json"]:
        print(json.dumps(result))


if __name__ == "__main__":
    run(main)
