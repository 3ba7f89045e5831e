"""
decode.py: speculative decoding with the model's own MTP heads. The text is exactly the main head's, only faster.

    python decode.py out/tiny/ckpt.pt --prompt "def main(" --tokens 100      continue a prompt
    python decode.py out/tiny/ckpt.pt --trace                                colour each token by the head that guessed it
    python decode.py out/tiny/ckpt.pt --check                                compare with plain decoding, token by token
    python decode.py out/tiny/ckpt.pt out/other/ckpt.pt --bench              speed by the number of heads, checkpoints side by side
    python decode.py out/small/ckpt.pt --compile kernels                     the fast path, on an NVIDIA GPU (kernels.py)
    python decode.py -h                                                      every flag, its default and its meaning

One round, with t_0 .. t_n known and h^0 verified up to position n-1:

    draft    head 1 reads h^0_{n-1} and t_n, and guesses d_1; head 2 reads h^1_{n-1} and d_1, and guesses d_2; .. d_K
    verify   the trunk runs once over [t_n, d_1 .. d_K]; row i gives p_i, the main head's law after d_1 .. d_i
    accept   keep d_1 .. d_a while the rule says so, and emit one more token from row a: a+1 tokens for one forward
    rollback nothing to do: caches are indexed by position, and the next round overwrites what was refused

Row i of head k consumed Emb(t_{i+k}), which for the last k-1 rows was a draft; and up to K+1 rows are new since the last round.
So every head runs again over K+1 rows; its guess is the same as without any cache.

Symbols: B batch, K heads used, V vocabulary, d draft, y emitted token; p target law (the main head's probability
distribution), q draft law (an MTP head's).
"""

import json
import time
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F

import kernels
from common import knob, load_checkpoint, parse, pick_device, pick_dtype, run, stream, trace
from data.prepare import Tokenizer
from model import Cache

# -----------------------------------------------------------------------------
# chance: the only two places where a random number is drawn, and the law that logits stand for


def coin(prob, generator=None):
    """True with the given probabilities, elementwise"""
    return torch.rand(prob.shape, generator=generator, device=prob.device, dtype=prob.dtype) < prob


def draw(weights, generator=None):
    """one index from weights (..., V) >= 0 that need not sum to 1: the first of V exponential clocks to ring (no host
    sync, unlike torch.multinomial). Weight 0 never rings"""
    clock = torch.empty_like(weights).exponential_(generator=generator).clamp_min(torch.finfo(weights.dtype).tiny)
    return (weights / clock).argmax(-1)


def best(logits, in_pieces=None):
    """the likeliest token, (..., V) -> (...). In two steps on a GPU, which reads a long row in parallel if it is cut in pieces"""
    if not (logits.is_cuda and logits.size(-1) > 8192 if in_pieces is None else in_pieces) or logits.size(-1) % 128:
        return logits.argmax(-1)
    value, index = logits.unflatten(-1, (-1, 128)).max(-1)
    piece = value.argmax(-1, keepdim=True)
    return (piece * 128 + index.gather(-1, piece)).squeeze(-1)


def probabilities(logits, temperature, top_k=None):
    """logits (..., V) -> the law tokens are drawn from, for target and draft alike; temperature 0: all on the argmax"""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)    # no overflow at tiny temperatures


# -----------------------------------------------------------------------------
# three exact accept rules. p (B, K+1, V), q (B, K, V), d (B, K) -> accepted a (B,), emitted token y (B,).
# Each emits tokens with the law p whatever q is; they differ in how often they accept:
#   residual sum_v min(p, q), for d drawn from q;  match and point p(d), for any fixed d (here the argmax of q)


def leading(ok):
    """(B, K) -> how many are True before the first False, (B,)"""
    return ok.int().cumprod(1).sum(1)


def pick(x, index):
    """x (B, R, ...), index (B,) -> row index[b] of each batch row"""
    return x[torch.arange(len(x), device=x.device), index]


def residual(p, q, d, generator=None):
    """accept d ~ q with min(1, p(d)/q(d)); on the first refusal emit from (p - q)+; all accepted: from p_K.
    Source: Leviathan et al., arXiv 2211.17192, and Chen et al., arXiv 2302.01318"""
    pd, qd = (x.gather(-1, d.unsqueeze(-1)).squeeze(-1) for x in (p[:, :-1], q))
    a = leading(coin(pd / qd, generator))                    # qd > 0, for d was drawn from q
    rest = (p[:, :-1] - q).clamp_min(0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:, :-1])     # p == q: no refusal, and no 0/0 either
    return a, draw(pick(torch.cat((rest, p[:, -1:]), 1), a), generator)


def point(p, q, d, generator=None):
    """the draft is a fixed token: accept it with p(d); else emit from p without d"""
    index = d.unsqueeze(-1)
    a = leading(coin(p[:, :-1].gather(-1, index).squeeze(-1), generator))
    rest = p[:, :-1].scatter(-1, index, 0)
    return a, draw(pick(torch.cat((rest, p[:, -1:]), 1), a), generator)


def match(p, q, d, generator=None):
    """draw y ~ p at every row and emit it; go on while y is the draft. Greedy decoding is this rule with one-hot p"""
    y = draw(p, generator)                                   # (B, K+1)
    a = leading(y[:, :-1] == d)
    return a, pick(y, a)


COMPILE = ("off", "kernels")
RULES = {"residual": residual, "point": point, "match": match}


# -----------------------------------------------------------------------------
# acceptance, defined in this one place (paper section 4)


def accepted_lengths(choices):
    """the argmax tokens of all_logits, entry k (B, T-k) -> how many drafts a round at each position would accept,
    (B, T-K): head 1's if it is the main head's choice one position on, head 2's if also .. (teacher-forced)"""
    K, T = len(choices) - 1, choices[0].size(1)
    ok = torch.ones_like(choices[0][:, : T - K])
    length = torch.zeros_like(ok)
    for k in range(1, K + 1):
        ok = ok * (choices[k][:, : T - K] == choices[0][:, k : T - K + k])
        length += ok
    return length


def rates(histogram):
    """how often 0 .. K drafts were accepted -> AR_k (of head k, given that heads 1..k-1 were accepted) and CAR_k (of
    heads 1..k together), k = 1..K. Tokens per forward = 1 + sum of CAR"""
    reached = [sum(histogram[k:]) for k in range(len(histogram))]
    ar = [b / a if a else 0.0 for a, b in zip(reached, reached[1:])]
    return ar, [b / reached[0] if reached[0] else 0.0 for b in reached[1:]]


@torch.no_grad()
def acceptance(model, tokens):
    """tokens (B, T) of some text -> (AR, CAR), K numbers each, against the main head's own argmax, teacher-forced"""
    if tokens.size(1) <= model.config.n_mtp:
        raise ValueError(f"got {tokens.size(1)} tokens; the acceptance of {model.config.n_mtp} heads needs at least "
                         f"{model.config.n_mtp + 1}")
    lengths = accepted_lengths([logits.argmax(-1) for logits in model.all_logits(tokens)])
    return rates(torch.bincount(lengths.flatten(), minlength=model.config.n_mtp + 1).tolist())


@dataclass
class Stats:
    """what a call of generate did. A forward is one run of the main model for one sequence, after its prefill; a draft
    that max_new_tokens or the stop token cut off counts as neither emitted nor accepted"""

    forwards: int = 0
    accepted: list = field(default_factory=list)             # accepted[a]: forwards that accepted a drafts, a = 0..K
    tokens: int = 0                                          # emitted, each sequence's first one (of the prefill) included
    seconds: float = 0.0                                     # without the prefill
    sequences: int = 1

    @property
    def tokens_per_forward(self):
        return (self.tokens - self.sequences) / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self):
        return (self.tokens - self.sequences) / self.seconds if self.seconds else 0.0


# -----------------------------------------------------------------------------
# the decoder


class Decoder:
    """
    the state of B sequences and the functions that advance it, all of fixed shape and without a host sync: the same
    code runs as it stands on a CPU, and as a replayed CUDA graph on a GPU.

    buffer  (B, slots) tokens: t_0 .. t_n, and the drafts of the round after them
    n       (B,) position of the last token known;  limit (B,) the last one wanted;  done (B,)
    """

    def __init__(self, model, batch, length, heads, temperature=0.0, top_k=None, accept="residual", stop_token=None,
                 generator=None, compile="off", draft_vocab=None):
        self.model, self.heads, self.generator, self.draft_vocab = model, heads, generator, draft_vocab
        self.temperature, self.top_k, self.stop_token = temperature, top_k, stop_token
        # greedy, p and q are one-hot and the three rules are one; without heads there is nothing to refuse
        self.accept = RULES["match" if temperature == 0 or heads == 0 else accept]
        weight = model.weight
        slots = length + model.config.n_mtp + 1              # a round may write K tokens past the last one wanted
        self.cache = Cache(model.config, batch, slots, weight.device, weight.dtype, heads)
        zeros = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self.buffer = torch.zeros(batch, slots, dtype=torch.long, device=weight.device)
        self.n, self.limit, self.done = zeros + 1, zeros + length - 1, zeros.bool()
        self.accepted, self.emitted = torch.zeros(heads + 1, dtype=torch.long, device=weight.device), zeros.clone()
        self.row = torch.arange(batch, device=weight.device)[:, None]
        self.back = torch.arange(-heads - 1, 0, device=weight.device)       # offsets of the rows that draft() rebuilds
        self.ahead = torch.arange(heads + 1, device=weight.device)          # .. and of those that verify() reads
        self.number = [torch.tensor(k, device=weight.device) for k in range(heads + 1)]    # torch.compile makes one function for all k
        if compile == "kernels":                             # the model keeps them. The small operations around them are fused
            kernels.install(model)                           # (but for the draws: torch.compile can't take a Generator)
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096     # every Decoder is another
            self.window, self.guess, self.settle = (torch.compile(f, dynamic=False) for f in (self.window, self.guess, self.settle))
        self.step = self.capture(self.round) if weight.is_cuda else self.round

    @torch.no_grad()
    def capture(self, function):
        """record the kernels of one call, to be replayed by one launch -> the replay"""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")                # prompts come in all lengths: compiled blocks would be compiled for each
    def start(self, prompts, max_new_tokens):
        """prefill: read the prompts (lists of ids, right-padded here), emit each one's first token"""
        model, device = self.model, self.n.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.buffer.zero_()
        for b, p in enumerate(prompts):
            self.buffer[b, : len(p)] = torch.tensor(p, device=device)
        T, last = int(lengths.max()), torch.empty(len(prompts), model.config.n_embd, dtype=model.weight.dtype, device=device)
        for at in range(0, T, 256):                          # in pieces: attention here is (piece x slots)
            pos = torch.arange(at, min(T, at + 256), device=device).expand(len(prompts), -1)
            where = model.where(self.cache, pos)
            h0 = model.trunk_step(self.buffer[self.row, pos], self.cache, where)
            inside = (lengths > at) & (lengths <= at + 256)
            last = torch.where(inside[:, None], pick(h0, (lengths - 1 - at).clamp(0, pos.size(1) - 1)), last)
            for k in range(1, self.heads + 1):               # a row whose token t_{i+k} isn't there yet is rebuilt by draft()
                model.head_step(k, self.buffer[self.row, (pos + k).clamp(max=self.buffer.size(1) - 1)], self.cache, where)
        first = draw(probabilities(model.logits(0, last), self.temperature, self.top_k), self.generator)
        self.buffer[self.row[:, 0], lengths] = first
        self.n.copy_(lengths)
        self.limit.copy_((lengths + max_new_tokens).clamp(max=model.config.block_size) - 1)
        self.done.copy_((self.n >= self.limit) | (first == (-1 if self.stop_token is None else self.stop_token)))
        self.accepted.zero_()
        self.emitted.fill_(1)

    def window(self, offsets, shift):
        """positions n + offsets, (B, T), and the tokens `shift` places after them"""
        pos = (self.n[:, None] + offsets).clamp_min(0)
        return pos, self.buffer[self.row, pos + shift]

    def draft(self):
        """heads 1 .. K guess d_1 .. d_K into buffer[n+1 ..] -> their laws q, (B, K, V)"""
        # rows n-K-1 .. n-1. The last round began at n' = n-a-1, and left head k's row i < n' right if it consumed no
        # refused draft: i+k < n. So max(a+1, k) rows are new or wrong. Near the start of a text, row 0 is done repeatedly
        if not self.heads:
            return None
        pos, tokens = self.window(self.back, 1)              # head k reads t_{pos+k}
        where, laws = self.model.where(self.cache, pos), []
        for k in range(1, self.heads + 1):
            hidden = self.model.head_step(k, tokens, self.cache, where)
            q, tokens = self.guess(self.model.logits(k, hidden[:, -1], self.draft_vocab), pos, self.number[k])
            laws.append(q)
        return torch.stack(laws, 1) if self.accept is residual else None

    def guess(self, logits, pos, k):
        """logits of head k (B, V) -> q, if the rule asks for it (the others want one fixed token); d_k into the buffer; and
        what head k+1 reads"""
        q, at = None, pos + k + 1                            # the last of these places is d_k's
        if self.accept is residual:
            q = F.pad(probabilities(logits, self.temperature, self.top_k), (0, self.model.config.vocab_size - logits.size(-1)))
        d = best(logits) if q is None else draw(q, self.generator)
        tokens = torch.where(at == at[:, -1:], d[:, None], self.buffer[self.row, at])    # as if after the write: a kernel less
        self.buffer[self.row[:, 0], at[:, -1]] = d
        return q, tokens

    def verify(self, q=None):
        """one forward of the main model over [t_n, d_1 .. d_K]"""
        pos, tokens = self.window(self.ahead, 0)             # n .. n+K
        self.drafts = tokens[:, 1:]                          # kept for --trace
        self.settle(self.model.logits(0, self.model.trunk_step(tokens, self.cache, pos)), pos, tokens, q)

    def settle(self, logits, pos, tokens, q):
        """the main head's logits (B, K+1, V): accept, emit, count"""
        K, d = self.heads, tokens[:, 1:]
        if self.temperature == 0:
            y = best(logits)                                 # `match` with one-hot p
            a = leading(y[:, :-1] == d)
            y = pick(y, a)
        else:
            a, y = self.accept(probabilities(logits, self.temperature, self.top_k), q, d, self.generator)
        self.buffer[self.row[:, 0], self.n + a + 1] = y

        # emit a+1 tokens, or fewer: up to the stop token, up to the limit, none once the sequence is done
        count = torch.minimum(a + 1, self.limit - self.n)
        if self.stop_token is not None:
            stop = self.buffer[self.row, pos + 1] == self.stop_token         # (B, K+1)
            first = torch.where(stop.any(1), stop.int().argmax(1), K + 1) + 1
            stopped = first <= count
            count = torch.minimum(count, first)
        else:
            stopped = torch.zeros_like(self.done)
        active = ~self.done
        self.accepted.scatter_add_(0, torch.minimum(a, count).clamp_min(0), active.long())
        self.emitted += count * active
        self.n += count * active
        self.done |= stopped | (self.n >= self.limit)

    def round(self):
        self.verify(self.draft())

    def remaining(self):
        """a number of rounds that the longest sequence needs at least (here the host waits for the device)"""
        left = int(((self.limit - self.n) * ~self.done).max())
        return -(-left // (self.heads + 1)) if self.stop_token is None else min(left, 1)


def check_request(model, prompts, max_new_tokens, heads, temperature, top_k, accept, draft_vocab=None, compile="off"):
    """raises ValueError for what generate() can't do"""
    V, K, T, longest = model.config.vocab_size, model.config.n_mtp, model.config.block_size, max(map(len, prompts), default=0)
    stray = next((t for p in prompts for t in p if not 0 <= t < V), None)
    for wrong, message in (
            (not prompts or not all(map(len, prompts)), "a prompt is empty; give at least one token for each"),
            (longest >= T, f"a prompt has {longest} tokens; the context takes {T}, one of them for a new token: give a shorter one"),
            (stray is not None, f"a prompt holds id {stray}; this model's vocabulary is 0 .. {V - 1}: was it made with another tokenizer?"),
            (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}; it must be at least 1"),
            (not 0 <= heads <= K, f"heads is {heads}; this model has {K} MTP heads, so give 0 (plain decoding) to {K}"),
            (not temperature >= 0, f"temperature is {temperature}; it must be 0 (greedy) or more"),
            (top_k is not None and not 1 <= top_k <= V, f"top_k is {top_k}; it must be from 1 to {V} (the vocabulary)"),
            (draft_vocab is not None and not 1 <= draft_vocab <= V,
             f"draft_vocab is {draft_vocab}; it must be from 1 to {V} (the vocabulary)"),
            (accept not in RULES, f"unknown accept rule {accept!r}; choose one of {', '.join(RULES)}"),
            (compile not in COMPILE, f"unknown compile {compile!r}; choose one of {', '.join(COMPILE)}")):
        if wrong:
            raise ValueError(message)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, *, heads=None, temperature=0.0, top_k=None, accept="residual", stop_token=None,
             generator=None, compile="off", draft_vocab=None, watch=None):
    """
    continue each prompt by up to max_new_tokens tokens, or to the end of the context (block_size), or to stop_token
    (which is emitted too)

    prompts  list of lists of token ids, of any lengths; each is continued as if it were alone
    heads    MTP heads that draft: None all, 0 plain decoding;  temperature 0: greedy;  top_k: draw among the k likeliest
    accept   "residual" | "match" | "point": all exact (see above);  generator: same seed, same text
    compile  "off" | "kernels": run on kernels.py from now on (CUDA; seconds to start);  watch: called with the Decoder after each round
    draft_vocab  guess only among the first so many ids; None: all. The text's law stays what it is
    -> (list of lists of new ids, Stats). Raises ValueError on a bad request.
    """
    heads = model.config.n_mtp if heads is None else heads
    check_request(model, prompts, max_new_tokens, heads, temperature, top_k, accept, draft_vocab, compile)
    length = min(model.config.block_size, max(map(len, prompts)) + max_new_tokens)
    training, _ = model.training, model.eval()
    try:
        decoder = Decoder(model, len(prompts), length, heads, temperature, top_k, accept, stop_token, generator, compile, draft_vocab)
        return run_decoder(decoder, prompts, max_new_tokens, watch)
    finally:
        model.train(training)


@torch.no_grad()
def run_decoder(decoder, prompts, max_new_tokens, watch=None):
    """decode with a Decoder made for such a batch (its compiled kernels and its graph can serve again)"""
    decoder.start(prompts, max_new_tokens)
    rounds = decoder.remaining()
    if watch:
        watch(decoder)
    begin = time.perf_counter()
    while rounds:
        for _ in range(1 if watch else rounds):
            decoder.step()
            if watch:
                watch(decoder)
        rounds = decoder.remaining()
    seconds = time.perf_counter() - begin
    new = [decoder.buffer[b, len(p) : int(decoder.n[b]) + 1].tolist() for b, p in enumerate(prompts)]
    accepted = decoder.accepted.tolist()
    return new, Stats(sum(accepted), accepted, int(decoder.emitted.sum()), seconds, len(prompts))


# -----------------------------------------------------------------------------
# the command line. For --check and --bench see results/bench.py, for --trace common.py


@dataclass
class DecodeConfig:
    prompt: str = knob("\n", "text to continue")
    prompts: str = knob("", "file of prompts for --check and --bench: lines of text, or .jsonl with a text, prompt or question field")
    data: str = knob("", "data-set folder whose validation text gives the prompts; empty: the one the checkpoint was trained on")
    tokens: int = knob(200, "tokens to emit")
    count: int = knob(8, "prompts for --check and --bench")
    prompt_tokens: int = knob(64, "length of the prompts that are taken from validation text")
    temperature: float = knob(0.8, "0 is greedy; --check is always greedy, --bench does 0 and 1")
    top_k: int = knob(0, "draw among the k likeliest tokens only; 0: all")
    heads: int = knob(-1, "MTP heads that draft; 0: plain decoding; -1: all")
    accept: str = knob("residual", "residual | match | point")
    batch: int = knob(1, "sequences decoded together in --bench")
    seed: int = knob(1, "seed of the draws")
    device: str = knob("auto", "cpu | cuda | mps")
    dtype: str = knob("auto", "float32 | bfloat16 | float64; auto: bfloat16 where the GPU has it")
    compile: str = knob("off", "off | kernels: decode on the kernels of kernels.py, much faster on CUDA")
    draft_vocab: int = knob(0, "heads guess only among the first so many ids, of a BPE the most frequent; 0: all")


def load(path, cfg):
    """-> (model on the device in its dtype, tokenizer, meta)"""
    device = pick_device(cfg.device)
    model, meta = load_checkpoint(path, device)
    return model.to(pick_dtype(cfg.dtype, device)[0]), Tokenizer(meta["tokenizer"]), meta


def speak(model, tokenizer, cfg, traced):
    """continue --prompt, print the text as it comes (or its trace) and the statistics -> both, as a dict"""
    prompt = tokenizer.encode(cfg.prompt)
    if not prompt:
        raise ValueError("--prompt is empty; give at least one character")
    watch = trace(tokenizer, prompt, model.config.n_mtp) if traced else stream(tokenizer, prompt)
    generator = torch.Generator(device=model.weight.device).manual_seed(cfg.seed)
    (ids,), stats = generate(model, [prompt], cfg.tokens, heads=None if cfg.heads < 0 else cfg.heads, temperature=cfg.temperature,
                             top_k=cfg.top_k or None, accept=cfg.accept, generator=generator, compile=cfg.compile,
                             draft_vocab=cfg.draft_vocab or None, watch=watch)
    if traced:
        print("\n" + tokenizer.decode(prompt + ids))
    print(f"\n--- {stats.tokens} tokens in {stats.forwards} forwards of the main model ({stats.tokens_per_forward:.2f} each), "
          f"{stats.tokens_per_second:.0f} tokens/s; drafts accepted 0..K: {stats.accepted}")
    return dict(text=tokenizer.decode(ids), ids=ids, **asdict(stats))


def main():
    given, rest = parse(DecodeConfig, __doc__, [
        ("checkpoints", dict(nargs="+", metavar="CKPT", help="of train.py or extend.py; --bench takes several, the first is the baseline")),
        ("--trace", dict(action="store_true", help="a line a round: which head guessed each token, and what was refused")),
        ("--check", dict(action="store_true", help="compare with plain decoding, greedily, token by token")),
        ("--bench", dict(action="store_true", help="time plain decoding and 1 .. 4 heads (4, 8, 16, 32 of an extended model)")),
        ("--json", dict(action="store_true", help="print the results as one JSON document on the last line"))])
    cfg = DecodeConfig(**given)
    models = [(path, *load(path, cfg)) for path in rest["checkpoints"]]
    path, model, tokenizer, meta = models[0]
    other = next((p for p, _, t, _ in models if t.spec != tokenizer.spec), None)
    if other:
        raise ValueError(f"{path} and {other} have different tokenizers, so that their tokens per second can't be compared")
    if len(models) > 1 and not rest["bench"]:
        raise ValueError("several checkpoints only make sense with --bench")
    for name, least in dict(top_k=0, draft_vocab=0, count=1, batch=1, prompt_tokens=1).items():
        if getattr(cfg, name) < least:
            raise ValueError(f"--{name} is {getattr(cfg, name)}; it must be at least {least}")
    for p, m, _, _ in models:
        if m.config.n_mtp == 0:
            print(f"{p} has no MTP heads: decoding plainly, one token a forward")
        request = (max(0, cfg.heads), cfg.temperature, cfg.top_k or None, cfg.accept, cfg.draft_vocab or None, cfg.compile)
        check_request(m, [[0]], cfg.tokens, *request)
    if rest["check"] or rest["bench"]:
        from results import bench
        result = bench.check(model, tokenizer, meta, cfg) if rest["check"] else bench.compare(models, cfg)
    else:
        result = speak(model, tokenizer, cfg, rest["trace"])
    if rest["json"]:
        print(json.dumps(result))


if __name__ == "__main__":
    run(main)
