"""decode.py: whatever the heads draft, the text is the main head's. Random outcomes are
enumerated, not sampled."""
import itertools
import math
import random
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

import decode
from decode import (
    Decoder,
    accepted_lengths,
    generate,
    probabilities,
    rates,
    run_decoder,
    speculative_round,
)
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("float64")
RULES = ["residual", "point", "match"]


LLAMA = dict(n_kv_head=1, swiglu=6, rope_base=50.0, norm_eps=0.01)  # as pretrained models have


def acceptance(model, tokens):
    """tokens (B, T) of some text -> (AR, CAR), as train.evaluate has them"""
    choices = [logits.argmax(-1) for logits in model.all_logits(tokens)]
    lengths = accepted_lengths(choices).flatten()
    return rates(torch.bincount(lengths, minlength=model.config.n_mtp + 1).tolist())


def make_model(vocab=5, block=12, K=3, layers=1, seed=0, heads=1, **options):
    """a toy in eval mode with large random weights: every error shows, but few drafts are
    accepted"""
    config = GPTConfig(vocab, block, layers, heads, n_embd=8, n_mtp=K, **options)
    model = GPT(config).requires_grad_(False)
    gen = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=gen) * 0.5 + (weight.dim() == 1))
    return model.eval()


def counting_model(K=4, block=32, noise=0.0, seed=0):
    """a toy built to say 0 1 .. 6 0 1 .., as its heads do: all drafts are accepted. Noise makes
    some err"""
    model = make_model(7, block, K)
    for weight in model.parameters():
        weight.fill_(1.0 if weight.dim() == 1 else 0.0)
    model.embed.weight.copy_(torch.eye(7, 8))
    # the MLP adds e_{t+1} to e_t
    for part in [*model.blocks, *(head.block for head in model.heads)]:
        part.fc.weight[:8] = torch.eye(8)
        part.proj.weight[:7, :7] = torch.eye(7).roll(1, 0)
    for head in model.heads:
        head.mix.weight.copy_(torch.cat((torch.eye(8) / 2, torch.eye(8)), 1))
    gen = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight += torch.randn(weight.shape, generator=gen) * noise
    return model


def copy(model, **changes):
    """the same weights under another config: fewer heads, or a longer context (rotary positions
    have no weights)"""
    other = GPT(replace(model.config, **changes)).requires_grad_(False)
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


# ---- the slow, obvious decoders, by all_logits alone


def choice(model, text, k=0):
    """the argmax of head k's last row: its draft of the token k places after the next one"""
    return int(model.all_logits(torch.tensor([text]))[k][0, -1].argmax())


def plain(model, prompts, new, stop=None):
    """one token a forward, of a model that never had heads"""
    model, texts = copy(model, n_mtp=0), []
    for prompt in prompts:
        text, end = list(prompt), min(len(prompt) + new, model.config.block_size)
        while len(text) < end and (len(text) == len(prompt) or text[-1] != stop):
            text.append(choice(model, text))
        texts.append(text[len(prompt):])
    return texts


def by_hand(model, prompt, new, heads, stop=None):
    """speculative decoding without any cache -> new ids, histogram, and of each round (n, its
    drafts)"""
    end = min(len(prompt) + new, model.config.block_size)
    # drafts may lie past the end of the context
    model = copy(model, block_size=model.config.block_size + heads)
    main = copy(model, n_mtp=0)
    text, accepted, rounds = [*prompt, choice(main, prompt)], [0] * (heads + 1), []
    while len(text) < end and text[-1] != stop:
        drafts = []
        for k in range(1, heads + 1):
            drafts.append(choice(model, text + drafts, k))
        rounds.append((len(text) - 1, drafts))
        good = 0
        choices = main.all_logits(torch.tensor([text + drafts]))[0][0].argmax(-1).tolist()
        for draft in [*drafts, None]:
            text.append(choices[len(text) - 1])
            good += text[-1] == draft
            if text[-1] != draft or text[-1] == stop or len(text) == end:
                break
        accepted[good] += 1
    return text[len(prompt):], accepted, rounds


def distribution_of(logits, temperature, top_k=None):
    """logits (V,) -> the distribution of a token, as a list"""
    logits = [float(x) for x in logits]
    kept = sorted(range(len(logits)), key=lambda v: -logits[v])[:top_k]
    weights = [0.0] * len(logits)
    for v in kept:
        weights[v] = math.exp((logits[v] - max(logits)) / temperature)
    return [w / sum(weights) for w in weights]


def spy_on_rounds(monkeypatch):
    """a list that fills with (row, n, text, drafts, q) of every sequence that isn't finished, as
    each accept finds it"""
    seen, accept = [], Decoder.accept

    def spy(self, logits, at, read, q):
        for b, (n, limit) in enumerate(zip(self.n.tolist(), self.limit.tolist())):
            if n < limit:
                text = self.buffer[b, : n + 1].tolist()
                drafts = self.buffer[b, n + 1 : n + 1 + self.heads].tolist()
                seen.append((b, n, text, drafts, None if q is None else q[b]))
        accept(self, logits, at, read, q)
    monkeypatch.setattr(Decoder, "accept", spy)
    return seen


def assert_same_as_by_hand(model, prompts, new, stop, seen):
    """text, counts and every draft of every round -> Stats, and the n of the rounds"""
    seen.clear()
    got, stats = generate(model, prompts, new, stop_token=stop)
    K = model.config.n_mtp
    texts, counts, rounds = zip(*(by_hand(model, p, new, K, stop) for p in prompts))
    for b in range(len(prompts)):
        assert [(n, drafts) for row, n, _, drafts, _ in seen if row == b] == rounds[b]
    assert got == list(texts) and stats.accepted == torch.tensor(counts).sum(0).tolist()
    return stats, [n for row in rounds for n, _ in row]


# ---- greedy


def some_request(rng, seed, K):
    """-> model, prompts, max_new_tokens, stop token: half of the models random, half built to be
    accepted often"""
    block = rng.randint(K + 2, K + 6)
    if seed % 2:
        V, start = rng.choice([2, 3, 11]), 0
        shape = dict(layers=1 + seed % 3 // 2, heads=1 + seed % 4 // 2)
        options = LLAMA if seed % 8 > 3 else {}
        model = make_model(V, block, K, seed=1000 * K + seed, **shape, **options)
    else:
        V, start = 7, rng.randrange(7)
        model = counting_model(K, block, rng.choice([0.05, 0.1, 0.15]), seed)
    prompts = []
    for _ in range(rng.randint(1, 5)):
        length = rng.choice([1, rng.randint(1, block - 1)])
        prompts.append([(start + i) % 7 if V == 7 else rng.randrange(V) for i in range(length)])
    new = rng.choice([block, block, rng.randint(1, 6)])
    stop = rng.choice([None, None, rng.randrange(V)])
    return model, prompts, new, stop


@pytest.mark.parametrize("K", [0, 1, 2, 3, 4, pytest.param(5, marks=pytest.mark.slow), 6])
def test_greedy_text_is_that_of_plain_decoding(K):
    rng, lengths = random.Random(K), torch.zeros(K + 1, dtype=torch.long)
    for seed in range(24 if K < 4 else 20):                 # 156 models in all
        model, prompts, new, stop = some_request(rng, seed, K)
        heads = K if seed % 5 else rng.randint(0, K)
        got, stats = generate(model, prompts, new, heads=heads, stop_token=stop)
        assert got == plain(model, prompts, new, stop), (seed, heads)
        assert stats.tokens == sum(map(len, got)) and stats.sequences == len(prompts)
        assert stats.forwards == sum(stats.accepted) and len(stats.accepted) == heads + 1
        # a round emits its accepted drafts and one token more; only a sequence's last round may
        # lack the latter
        full = len(prompts) + sum((a + 1) * times for a, times in enumerate(stats.accepted))
        assert full - len(prompts) <= stats.tokens <= full
        if heads == 0:
            assert stats.forwards == stats.tokens - len(prompts)
        if seed % 6 == 0:
            for prompt, text in zip(prompts, got):
                assert generate(model, [prompt], new, heads=heads, stop_token=stop)[0] == [text]
        if heads == K:
            lengths += torch.tensor(stats.accepted)
    assert lengths.min() > 0, f"some number of drafts was never accepted: {lengths.tolist()}"


@pytest.mark.parametrize("K", [1, 2, 3])
def test_cached_drafts_texts_and_counts_equal_those_by_hand(K, monkeypatch):
    # 1-token prompts: the first round has n = 1 < K, so a head's rows reach back past the start of
    # the text
    seen, lengths, near_start = spy_on_rounds(monkeypatch), torch.zeros(K + 1, dtype=torch.long), 0
    for seed in range(6):
        options = LLAMA if seed > 2 else {}
        random_one = make_model(3, 8 + K, K, layers=2, seed=seed + 50 * K, heads=2, **options)
        # much noise: one stale row is then enough to change a draft
        noise = 0.3 / (6 - seed) if K > 1 else 0.3
        model = counting_model(K, 8 + K, noise, seed) if seed % 2 else random_one
        prompts = [[1], [0, 1, 2, 0, 1, 2][: 1 + seed], [0, 1, 2] * 2]
        stop = {2: 2, 3: 2, 4: 0}.get(seed)
        stats, starts = assert_same_as_by_hand(model, prompts, 99, stop, seen)
        lengths += torch.tensor(stats.accepted)
        near_start += sum(n < K for n in starts)
    assert lengths.min() > 0 and (near_start or K == 1), (lengths, near_start)


@pytest.mark.parametrize("prompts", [
    [1, 2, 0], [[1, 2, 0]], torch.tensor([1, 2, 0]), torch.tensor([[1, 2, 0]]),
    [torch.tensor([1, 2, 0])], np.array([1, 2, 0]), [np.array([1, 2, 0])],
], ids=str)
def test_a_prompt_may_be_a_list_or_a_tensor(prompts):
    model = make_model()
    assert generate(model, prompts, 5)[0] == generate(model, [[1, 2, 0]], 5)[0]


def test_prompts_longer_than_a_piece_of_the_prefill(monkeypatch):
    model, gen = make_model(3, 530, 2, seed=3), torch.Generator().manual_seed(1)
    prompts = []
    for length in (1, 255, 256, 257, 513):
        prompts.append(torch.randint(3, (length,), generator=gen).tolist())
    assert_same_as_by_hand(model, prompts, 4, None, spy_on_rounds(monkeypatch))


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_draft_distribution_is_that_of_its_head(top_k, monkeypatch):
    # exact numbers, not argmaxes. The accept rules forgive any q, so the distribution of a text
    # would not show a wrong one
    seen, K, gen = spy_on_rounds(monkeypatch), 3, torch.Generator().manual_seed(1)
    model = counting_model(K, 24, noise=0.15, seed=5)
    roomy = copy(model, block_size=24 + K)
    _, stats = generate(model, [[0], [1, 2, 0, 1]], 99, temperature=0.3, top_k=top_k, generator=gen)
    assert min(stats.accepted) > 0
    for _, n, text, drafts, q in seen:
        for k in range(1, K + 1):
            logits = roomy.all_logits(torch.tensor([text + drafts[: k - 1]]))[k][0, -1]
            want = distribution_of(logits, 0.3, top_k)
            assert q[k - 1].tolist() == pytest.approx(want, abs=1e-10), (n, k)


def test_the_end_of_the_context_is_reached_and_not_passed():
    # all drafts are right, so the last rounds overshoot by every amount; finished rows wait beside
    # unfinished ones
    model = counting_model(block=16)
    for heads in range(5):
        lengths = (1, *range(9, 16))
        got, _ = generate(model, [[i % 7 for i in range(n)] for n in lengths], 10**6, heads=heads)
        assert got == [[i % 7 for i in range(n, 16)] for n in lengths], heads


@pytest.mark.parametrize("new, stop, accepted, tokens", [
    (6, None, [0, 0, 0, 0, 1], 6),    # 1 | 2 3 4 5 6: one round, nothing to cut
    # and 0 of the next block: one draft emitted, three and the bonus cut
    (7, None, [0, 1, 0, 0, 1], 7),
    (9, None, [0, 0, 0, 1, 1], 9),
    (10, None, [0, 0, 0, 0, 2], 10),  # the bonus token alone is cut
    (4, None, [0, 0, 0, 1, 0], 4),
    (1, None, [0, 0, 0, 0, 0], 1),    # the prefill's token was all
    (20, 1, [0, 0, 0, 0, 0], 1),      # which may be the stop token
    (20, 2, [0, 1, 0, 0, 0], 2),      # a stop token among the accepted drafts: first,
    (20, 4, [0, 0, 0, 1, 0], 4),      # middle,
    (20, 5, [0, 0, 0, 0, 1], 5),      # last,
    (20, 6, [0, 0, 0, 0, 1], 6),      # or as the bonus token
    (20, 0, [0, 1, 0, 0, 1], 7),
    (3, 4, [0, 0, 1, 0, 0], 3),       # the limit comes before the stop token
    (4, 4, [0, 0, 0, 1, 0], 4),
])
def test_what_is_cut_from_an_accepted_block_is_neither_emitted_nor_counted(
    new, stop, accepted, tokens
):
    counting, rounds = counting_model(), []
    got, stats = generate(
        counting, [[5, 6, 0]], new, stop_token=stop, watch=lambda decoder: rounds.append(1)
    )
    assert len(rounds) == stats.forwards + 1              # none after a stop token
    assert got == [[(1 + i) % 7 for i in range(tokens)]]
    assert (stats.accepted, stats.forwards, stats.tokens) == (accepted, sum(accepted), tokens)
    # beside a row that goes on longer: once done, a row counts no more
    got, both = generate(counting, [[5, 6, 0], [0, 1, 2]], new, stop_token=stop)
    _, other = generate(counting, [[0, 1, 2]], new, stop_token=stop)
    assert got[0] == [(1 + i) % 7 for i in range(tokens)]
    assert both.tokens == tokens + other.tokens
    assert both.accepted == [a + b for a, b in zip(stats.accepted, other.accepted)]


def test_tokens_per_forward_leaves_the_prefill_out():
    _, stats = generate(counting_model(), [[0], [3]], 11)
    assert (stats.forwards, stats.tokens, stats.sequences) == (4, 22, 2)
    assert stats.tokens_per_forward == 5
    assert stats.tokens_per_second == pytest.approx(20 / stats.seconds)
    _, stats = generate(counting_model(), [[0], [3]], 1)
    assert stats.forwards == stats.tokens_per_forward == stats.tokens_per_second == 0


def same_counts(stats, other):
    """all of the Stats but the time and which decoder it was"""
    changes = dict(seconds=0, tokens_per_second=0, decoder="")
    return replace(stats, **changes) == replace(other, **changes)


def test_a_decoder_used_again_remembers_nothing():
    model = make_model(3, 14, 3, seed=8)
    first, second = [[0, 1, 2, 0, 1, 2, 0], [1]], [[2], [1, 0, 0]]
    decoder = Decoder(model, 2, 14, 3)
    run_decoder(decoder, first, 99)
    got, stats = run_decoder(decoder, second, 99)
    want, fresh = generate(model, second, 99)
    assert got == want and same_counts(stats, fresh)


def test_watch_sees_the_prefill_and_every_round_and_changes_nothing(monkeypatch):
    model, seen, rounds, verify = make_model(3, 14, 2, seed=2), [], [], Decoder.verify
    monkeypatch.setattr(Decoder, "verify", lambda self: rounds.append(1) or verify(self))

    def watch(decoder):
        seen.append(decoder.n.tolist())

    watched = generate(model, [[0], [1, 2]], 99, watch=watch)[0]
    assert seen[0] == [1, 2] and seen[-1] == [13, 13]
    assert all(sum(b) > sum(a) for a, b in zip(seen, seen[1:]))
    # unwatched, many rounds run without a look at the result, but none too many
    assert watched == generate(model, [[0], [1, 2]], 99)[0] and len(rounds) == 2 * (len(seen) - 1)


# ---- randomness, by enumeration: every branch of the tree of outcomes is a row of one batch


class Branches:
    """stands in for decode.bernoulli and decode.sample: row r takes branch r of all outcomes,
    weight[r] is its probability"""

    def __init__(self, monkeypatch, rows):
        self.rest, self.weight, self.branches = torch.arange(rows), torch.ones(rows), 1
        monkeypatch.setattr(decode, "bernoulli", self.bernoulli)
        monkeypatch.setattr(decode, "sample", self.sample)

    def choose(self, probs):
        """probs (rows, n) -> an outcome a row: the next digit of the row's number, in base n"""
        n = probs.size(1)
        outcome, self.rest, self.branches = self.rest % n, self.rest // n, self.branches * n
        factor = probs.gather(1, outcome[:, None])[:, 0]
        # an impossible branch stays impossible, even if a 0/0 follows
        self.weight = torch.where(self.weight > 0, self.weight * factor, 0.0)
        return outcome

    def bernoulli(self, prob, noise):
        columns = []
        for p in prob.clamp(0, 1).view(len(prob), -1).unbind(1):
            columns.append(self.choose(torch.stack((1 - p, p), 1)))
        return torch.stack(columns, 1).bool().view_as(prob)

    def sample(self, probs, noise):
        probs = probs / probs.sum(-1, keepdim=True)
        if probs.dim() == 2:
            return self.choose(probs)
        return torch.stack([self.choose(p) for p in probs.unbind(1)], 1)

    def distribution(self, texts):
        """texts, one a row -> how probable each is"""
        # with fewer branches than rows, each of them is there several times
        copies, left = divmod(len(texts), self.branches)
        assert left == 0, (
            "this tree counts the outcomes of `bernoulli` on (B,) or (B, K) and of `sample` once on "
            "(B, V), for `match` on (B, K+1, V); `lab.py check 6` and 7 accept other ways")
        found = defaultdict(float)
        for text, weight in zip(texts, self.weight.tolist()):
            found[tuple(text)] += weight / copies
        assert sum(found.values()) == pytest.approx(1, abs=1e-12)
        return found


def branches_of_a_round(rule, V, K):
    of_a_sampled_draft = V**K * 2**K * V        # residual, and a rule of your own
    return {"point": 2**K * V, "match": V ** (K + 1)}.get(rule, of_a_sampled_draft)


def some_distributions(kind, shape, gen):
    """p and q, distributions over the last dimension"""
    p, q = ((torch.randn(shape, generator=gen) * 2).softmax(-1) for _ in range(2))
    even = torch.arange(shape[-1]) % 2 == 0
    if kind == "zeros":  # token 0 keeps both from being empty everywhere
        first = torch.arange(shape[-1]) == 0
        p = p * ((torch.rand(shape, generator=gen) < 0.5) | first)
        q = q * ((torch.rand(shape, generator=gen) < 0.5) | first)
    elif kind == "equal":
        q = p * (torch.arange(shape[-1]) > 0)
        p = q.clone()
    elif kind == "disjoint":
        p, q = p * even, q * ~even
    elif kind.startswith("one-hot"):
        p = torch.nn.functional.one_hot(p.argmax(-1), shape[-1]).double()
        if kind == "one-hot":
            q = torch.nn.functional.one_hot(q.argmax(-1), shape[-1]).double()
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["random", "zeros", "equal", "disjoint", "one-hot", "one-hot p"])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_emits_the_target_distribution_and_accepts_as_often_as_it_should(
    rule, kind, monkeypatch
):
    gen = torch.Generator().manual_seed(0)
    for V, K in [(2, 1), (5, 1), (3, 2), (4, 2), (3, 3)] * 2:
        # p_i and q_i, one distribution for each d_1 .. d_i: the target isn't independent from token
        # to token
        P, Q = zip(*(some_distributions(kind, [V] * (i + 1), gen) for i in range(K + 1)))
        rows = branches_of_a_round(rule, V, K)
        tree, d, q = Branches(monkeypatch, rows), [], []
        for i in range(K):
            q.append(Q[i][tuple(d)].expand(rows, V))
            d.append(tree.sample(q[i], None) if rule == "residual" else q[i].argmax(-1))
        p = torch.stack([P[i][tuple(d[:i])].expand(rows, V) for i in range(K + 1)], 1)
        d = torch.stack(d, 1)
        noise = decode.make_noise(rule, rows, K, torch.zeros(V, 1))    # Branches reads none of it
        a, y = decode.RULES[rule](p, torch.stack(q, 1), d, noise)
        blocks = []
        for drafts, n, token in zip(d.tolist(), a.tolist(), y.tolist()):
            blocks.append([*drafts[:n], token])
        found = tree.distribution(blocks)
        for i in range(K + 1):
            # if s was emitted and the block goes on, then by P_i(s)
            for s in itertools.product(range(V), repeat=i):
                reached = sum(w for block, w in found.items() if len(block) > i and block[:i] == s)
                for v in range(V):
                    begins = sum(w for block, w in found.items() if block[: i + 1] == (*s, v))
                    want = reached * float(P[i][s][v])
                    assert begins == pytest.approx(want, abs=1e-12), (V, K, s, v)
                if i < K:
                    longer = [block for block in found if len(block) > i + 1 and block[:i] == s]
                    on = sum(found[block] for block in longer)
                    want = P[i][s][Q[i][s].argmax()]
                    if rule == "residual":
                        want = torch.minimum(P[i][s], Q[i][s]).sum()
                    assert on == pytest.approx(reached * float(want), abs=1e-12), (V, K, s)


def test_a_rejection_that_only_rounding_can_cause_still_emits_a_possible_token(monkeypatch):
    # p == q leaves no residual: 0/0, or token 0 where nothing is left
    monkeypatch.setattr(decode, "bernoulli", lambda prob, noise: torch.zeros_like(prob).bool())
    p = torch.tensor([0.0, 0.5, 0.5, 0.0]).expand(500, 2, 4)
    noise = decode.make_noise("residual", 500, 1, torch.zeros(4, 1))
    noise.numbers.exponential_(generator=torch.Generator().manual_seed(0))
    a, y = decode.residual(p, p[:, :1], torch.ones(500, 1, dtype=torch.long), noise)
    assert a.eq(0).all() and set(y.tolist()) == {1, 2}


@pytest.mark.parametrize("rule", RULES)
def test_a_certain_token_is_emitted_whatever_the_random_numbers_are(rule):
    """exp(-noise) can round to 1, which rejects even a draft of probability 1: what is emitted
    then must still be possible"""
    p = torch.nn.functional.one_hot(torch.tensor([[3, 3]]), 5).double()
    drafts = torch.tensor([[3]])
    for value in (0.0, 1e-8, 1.0):
        noise = decode.make_noise(rule, 1, 1, torch.zeros(5, 1))
        noise.numbers.fill_(max(value, 0.5))
        noise.accept.fill_(value)
        _, token = decode.RULES[rule](p.float(), p[:, :1].float(), drafts, noise)
        assert token.tolist() == [3]


def test_temperatures_too_small_for_float32_are_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]]).float()
    for temperature in (1e-30, 1e-46, 1e-300):
        assert decode.probabilities(logits, temperature).tolist() == [[0.0, 1.0, 0.0]]


def end_to_end(
    monkeypatch, rule, heads, new, top_k=None, stop=None, V=3, temperature=0.7, draft_vocab=None
):
    """-> distribution of the texts by generate(), and by the main head's conditionals"""
    model, prompt = make_model(V, 12, heads, seed=4), [1, 0]
    rows = V * branches_of_a_round(rule, V, heads) ** (new - 1)
    with monkeypatch.context() as patch:
        tree = Branches(patch, rows)
        options = dict(top_k=top_k, accept=rule, stop_token=stop, draft_vocab=draft_vocab)
        texts, _ = generate(model, [prompt] * rows, new, temperature=temperature, **options)
    want = {(): 1.0}
    for _ in range(new):
        for text in [t for t in want if not t or t[-1] != stop]:
            weight = want.pop(text)
            logits = model.all_logits(torch.tensor([[*prompt, *text]]))[0][0, -1]
            for v, p in enumerate(distribution_of(logits, temperature, top_k)):
                want[(*text, v)] = weight * p
    return tree.distribution(texts), want


def distance(a, b):
    return max(abs(a.get(text, 0.0) - b.get(text, 0.0)) for text in {*a, *b})


@pytest.mark.parametrize("heads", [0, 1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_the_distribution_of_a_whole_continuation_is_the_main_heads(rule, heads, monkeypatch):
    # 3 tokens: the prefill's, and 1 or 2 rounds, of which the last is often cut; 2 tokens or V = 2
    # where 3 takes long
    slow = {"new": 2} if (rule, heads) == ("residual", 2) else {}
    for case in [{}, {"top_k": 2}, {"stop": 1}, {"V": 4, "new": 2}, {"V": 2, "new": 3}]:
        got, want = end_to_end(monkeypatch, rule, heads, **{"new": 3, **slow, **case})
        assert distance(got, want) < 1e-10, case


@pytest.mark.parametrize("rule", RULES)
def test_the_distribution_stays_when_heads_draft_among_the_first_ids_only(rule, monkeypatch):
    got, want = end_to_end(monkeypatch, rule, 2, 2 if rule == "residual" else 3, draft_vocab=2)
    assert distance(got, want) < 1e-10


@pytest.mark.parametrize("first", [1, 3])
def test_heads_draft_among_the_first_ids_only_and_greedy_text_stays(first, monkeypatch):
    model, drafts, accept = make_model(6, 24, 3, seed=2), [], Decoder.accept

    def spy(self, *args):
        drafts.append(self.drafts.clone())
        accept(self, *args)

    monkeypatch.setattr(Decoder, "accept", spy)
    prompts = [[1, 2, 3], [4]]
    texts, stats = generate(model, prompts, 15, draft_vocab=first)
    assert texts == plain(model, prompts, 15)
    gen = torch.Generator().manual_seed(0)
    # fewer ids than top_k
    generate(model, prompts, 15, temperature=1.0, top_k=5, draft_vocab=first, generator=gen)
    assert torch.cat(drafts).max() < first
    _, stats = generate(model, prompts, 15, draft_vocab=6)
    assert stats.accepted == generate(model, prompts, 15)[1].accepted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_benchs_acceptance_is_that_of_restricted_heads(temperature):
    """with the first id alone, a draft is right where the main head chooses it, or with the
    probability it has there"""
    from results import bench
    model, text = make_model(5, 24, 2, seed=3), ([1, 2], [0, 3, 0, 4, 1, 0, 2, 0])
    ids = torch.tensor([text[0] + text[1][:-1]])
    # rows that head 1's drafts are judged by
    main = model.all_logits(ids)[0][0, len(text[0]) :]
    first = (main.argmax(-1) == 0).double() if temperature == 0 else main.softmax(-1)[:, 0]
    _, car = bench.text_acceptance(model, [text], temperature, draft_vocab=1)
    # .. and that have all K = 2 drafts
    rows = len(ids[0]) - 2 - (len(text[0]) - 1)
    both = first[:-1] * first[1:]
    assert car == pytest.approx([first[:rows].mean().item(), both[:rows].mean().item()])
    everything = bench.text_acceptance(model, [text], temperature, draft_vocab=5)
    assert everything == bench.text_acceptance(model, [text], temperature)


def accepts_by_q(p, q, d, noise):
    a = decode.num_accepted(decode.bernoulli(decode.of_drafts(q, d), noise.accept))
    rest = torch.cat(((p[:, :-1] - q).clamp_min(0), p[:, -1:]), 1)
    return a, decode.sample(decode.select_row(rest, a), noise.emit)


def emits_from_p(p, q, d, noise):
    ratio = decode.of_drafts(p[:, :-1], d) / decode.of_drafts(q, d)
    a = decode.num_accepted(decode.bernoulli(ratio, noise.accept))
    return a, decode.sample(decode.select_row(p, a), noise.emit)


def emits_from_p_after_a_fixed_draft(p, q, d, noise):
    a = decode.num_accepted(decode.bernoulli(decode.of_drafts(p[:, :-1], d), noise.accept))
    return a, decode.sample(decode.select_row(p, a), noise.emit)


@pytest.mark.parametrize("rule, wrong", [("residual", accepts_by_q), ("residual", emits_from_p),
                                         ("point", emits_from_p_after_a_fixed_draft)])
def test_negative_control_a_wrong_rule_is_caught(rule, wrong, monkeypatch):
    monkeypatch.setitem(decode.RULES, rule, wrong)
    for heads in (1, 2):
        got, want = end_to_end(monkeypatch, rule, heads, new=2)
        assert distance(got, want) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_p_and_q_are_made_by_one_function_with_one_temperature_and_top_k(rule, monkeypatch):
    calls = []

    def spy(logits, *args):
        calls.append((*logits.shape, *args))
        return probabilities(logits, *args)
    monkeypatch.setattr(decode, "probabilities", spy)
    generate(make_model(4, 12, 2), [[0], [1]], 2, temperature=0.6, top_k=3, accept=rule)
    drafts = [(2, 4, 0.6, 3)] * 2 if rule == "residual" else []
    # prefill, the drafts that are sampled, verify
    assert calls == [(2, 4, 0.6, 3), *drafts, (2, 3, 4, 0.6, 3)]


def test_probabilities():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, top_k in itertools.product([0.3, 1.0, 2.5], [None, 1, 2, 5, 6]):
        for row, p in zip(logits, probabilities(logits, temperature, top_k).tolist()):
            assert p == pytest.approx(distribution_of(row, temperature, top_k), abs=1e-14)
    assert torch.equal(probabilities(logits, 0.7, 6), probabilities(logits, 0.7))
    greedy = torch.nn.functional.one_hot(logits.argmax(-1), 6).double()
    assert torch.equal(probabilities(logits, 0), greedy)
    assert probabilities(logits.bfloat16(), 1.0).dtype == torch.float32


def test_top_k_keeps_exactly_k_of_equal_logits():
    logits = torch.tensor([2.0, 1.0, 2.0, 1.0, 1.0, 0.0])
    for k in range(1, 7):
        kept = probabilities(logits, 1.0, k) > 0
        assert kept.sum() == k
        assert logits[kept].sum() == logits.sort(descending=True).values[:k].sum()


@pytest.mark.parametrize("rule", RULES)
def test_top_k_of_one_is_greedy_where_logits_are_equal(rule):
    """in bf16 equal logits are common; here every token has a twin"""
    model = make_model(6, 24, 2, seed=3)
    model.embed.weight[3:] = model.embed.weight[:3]
    model = model.to(torch.bfloat16)
    greedy = generate(model, [[0], [1, 2]], 20)[0]
    for seed in range(3):
        gen = torch.Generator().manual_seed(seed)
        options = dict(temperature=1.0, top_k=1, accept=rule, generator=gen)
        assert generate(model, [[0], [1, 2]], 20, **options)[0] == greedy


# ---- true randomness: a chi-square that a right program fails with probability below 1e-6; the
# seeds are fixed


def tail(x, df):
    """P(chi-square with an even number df of degrees of freedom > x)"""
    return math.exp(-x / 2) * sum((x / 2) ** i / math.factorial(i) for i in range(df // 2))


def chi_square(counts, probs):
    """counts and probabilities by outcome -> how likely so large a deviation is"""
    assert all(probs[k] > 0 for k in counts), "an impossible outcome"
    N, cells = counts.total(), [k for k in probs if probs[k]]
    total = sum((counts[k] - N * probs[k]) ** 2 / (N * probs[k]) for k in cells)
    return tail(total, len(cells) - 1)


def exponential(*shape, gen):
    return torch.empty(shape).exponential_(generator=gen)


def test_sample_and_bernoulli_follow_their_probabilities():
    gen, probs = torch.Generator().manual_seed(0), torch.tensor([0.5, 0.0, 3.0, 1.5, 0.0, 1.0, 2.0])
    ids = decode.sample(probs.expand(100_000, 7), exponential(100_000, 7, gen=gen))
    sampled = Counter(ids.tolist())
    # 5 cells, 0 never
    assert chi_square(sampled, dict(enumerate((probs / probs.sum()).tolist()))) > 1e-6
    prob = torch.tensor([0.1, 0.4, 0.8, 0.97])
    yes = decode.bernoulli(prob.expand(50_000, 4), exponential(50_000, 4, gen=gen))
    deviation = yes.double().sum(0) - 50_000 * prob
    assert tail(float((deviation**2 / (50_000 * prob * (1 - prob))).sum()), 4) > 1e-6
    prob = torch.tensor([0.0, 1.0, 7.0])
    sure = decode.bernoulli(prob.expand(50_000, 3), exponential(50_000, 3, gen=gen))
    assert not sure[:, 0].any() and sure[:, 1:].all()
    tiny = torch.tensor([[0.0, 1e-300, 0.0]]).expand(1000, 3)
    assert decode.sample(tiny, exponential(1000, 3, gen=gen)).eq(1).all()
    # no 0/0, should a number be 0
    assert decode.sample(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2)).eq(1).all()


def test_a_rule_of_your_own_is_given_sampled_drafts_and_their_distributions(monkeypatch):
    monkeypatch.setitem(decode.RULES, "mine", decode.residual)
    texts = [generate(make_model(seed=3), [[0, 1]], 9, temperature=1.0, accept=rule,
                      generator=torch.Generator().manual_seed(0)) for rule in ("residual", "mine")]
    assert texts[0][0] == texts[1][0]


@pytest.mark.parametrize("rule", RULES)
def test_the_random_numbers_of_a_round_are_one_call_and_each_serves_one_purpose(rule):
    gen = torch.Generator().manual_seed(0)
    noise = decode.make_noise(rule, 3, 2, torch.zeros(5, 1))
    noise.numbers.exponential_(generator=gen)
    want = {"point": (0, 2), "match": (2, 0)}.get(rule, (2, 2))
    assert (noise.draft.size(1), noise.accept.size(1)) == want
    assert noise.draft.size(2) == noise.emit.size(1) == 5
    numbers = torch.cat([x.flatten() for x in noise[1:]])
    assert len(numbers.unique()) == len(numbers) == noise.numbers.numel()
    gen = torch.Generator().manual_seed(0)
    again = torch.empty(3, len(numbers) // 3).exponential_(generator=gen)
    assert torch.equal(numbers.sort().values, again.flatten().sort().values)


# ---- one round in its plain form


def emitted_by_a_round(monkeypatch, model, tokens, heads, temperature):
    """{new ids: probability} of speculative_round, over all outcomes of its random choices"""
    found, waiting = defaultdict(float), [[]]
    while waiting:
        outcomes = waiting.pop()
        step, weight = 0, 1.0

        def choose(probs):
            nonlocal step, weight
            if step == len(outcomes):
                waiting.extend([*outcomes, v] for v in range(1, len(probs)) if probs[v] > 0)
                first = next(v for v in range(len(probs)) if probs[v] > 0)
                # 0 is impossible: the first possible one, once
                if first:
                    waiting.remove([*outcomes, first])
                outcomes.append(first)
            weight *= probs[outcomes[step]]
            step += 1
            return torch.tensor([outcomes[step - 1]])

        def sample(probs, noise):
            return choose((probs / probs.sum()).tolist())

        def bernoulli(prob, noise):
            prob = min(1, float(prob))
            return choose([1 - prob, prob]).bool()

        with monkeypatch.context() as patch:
            patch.setattr(decode, "sample", sample)
            patch.setattr(decode, "bernoulli", bernoulli)
            found[tuple(speculative_round(model, tokens, heads, temperature))] += weight
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return found


@pytest.mark.parametrize("heads", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 2, 5, 10, 11])
def test_a_plain_round_emits_the_target_distribution(length, heads, monkeypatch):
    """enumerated: whatever was emitted before, the next token has the main head's distribution.
    1: a one-token prompt, which no head can draft from; 11: the context of 12 has room for one"""
    model = make_model(3, 12, 2, seed=4)
    tokens = [1, 0, 2, 2, 0, 1, 1, 2, 0, 0, 1][:length]
    found = emitted_by_a_round(monkeypatch, model, tokens, heads, 0.7)
    longest = min(heads, 11 - length) + 1 if length > 1 else 1
    assert max(map(len, found)) == longest
    for i in range(longest):
        for start in {block[:i] for block in found if len(block) > i}:
            logits = model.all_logits(torch.tensor([[*tokens, *start]]))[0][0, -1]
            reached = sum(w for block, w in found.items() if len(block) > i and block[:i] == start)
            for v, p in enumerate(distribution_of(logits, 0.7)):
                begins = sum(w for block, w in found.items() if block[: i + 1] == (*start, v))
                assert begins == pytest.approx(reached * p, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_plain_rounds_and_the_decoder_give_the_same_text(temperature):
    """the same seed: both see the same random numbers. From a one-token prompt to a full
    context"""
    for seed in range(6):
        model = counting_model(2, 16, noise=0.15, seed=seed)
        seen = []

        def watch(decoder):
            seen.append(decoder.tokens_from(0, 0))

        generator = torch.Generator().manual_seed(seed)
        options = dict(temperature=temperature, generator=generator, watch=watch)
        (want,), stats = generate(model, [[1]], 10**6, **options)
        generator = torch.Generator().manual_seed(seed)
        text, rounds = [1], []
        while len(text) < 16:
            text += speculative_round(model, text, 2, temperature, generator)
            rounds.append(list(text))
        if temperature == 0:
            assert text[1:] == want
        # the Decoder's last round may overshoot, and drafts more than the context can take
        same = [a == b for a, b in zip(rounds, seen)]
        assert all(same[: len(same) - 2]) and len(same) > 3, (seed, same)


@pytest.mark.parametrize("rule", RULES)
def test_texts_with_true_randomness_follow_the_distribution_and_the_seed(rule, monkeypatch):
    # near enough to uniform for a chi-square
    _, want = end_to_end(monkeypatch, "match", 2, new=3, temperature=5.0)
    assert min(want.values()) * 1200 > 10
    model = make_model(3, 12, 2, seed=4)

    def texts(seed, rows=40):
        gen = torch.Generator().manual_seed(seed)
        return generate(model, [[1, 0]] * rows, 3, temperature=5.0, accept=rule, generator=gen)[0]
    assert texts(1) == texts(1) != texts(2)
    assert chi_square(Counter(map(tuple, texts(1, 1200))), want) > 1e-6     # 27 cells


# ---- acceptance


@pytest.mark.parametrize("K", [0, 1, 3, 6])
def test_acceptance_equals_a_loop_over_positions(K):
    model, gen = make_model(2, 16, K, seed=K), torch.Generator().manual_seed(K)
    # not what the main head would say: only its choices count
    tokens = torch.randint(2, (6, 15), generator=gen)
    choices = [logits.argmax(-1) for logits in model.all_logits(tokens)]
    assert (choices[0][:, :-1] != tokens[:, 1:]).any()
    reached, accepted, lengths = [0] * K, [0] * K, []
    for b in range(6):
        for i in range(15 - K):
            length = 0
            for k in range(1, K + 1):
                reached[k - 1] += 1
                if choices[k][b, i] != choices[0][b, i + k]:
                    break
                accepted[k - 1] += 1
                length = k
            lengths.append(length)
    assert accepted_lengths(choices).flatten().tolist() == lengths
    for _ in range(2):                                      # the second call starts from zero again
        ar, car = acceptance(model, tokens)
        assert ar == pytest.approx([a / r if r else 0 for a, r in zip(accepted, reached)])
        assert car == pytest.approx([a / len(lengths) for a in accepted])
        assert car == pytest.approx([math.prod(ar[: k + 1]) for k in range(K)])


def test_acceptance_of_a_handmade_example():
    main = torch.tensor([[5, 6, 7, 8, 9]])                  # choices for targets 1 .. 5
    # for targets 2 .. 5: wrong at position 2
    head1 = torch.tensor([[6, 7, 0, 9]])
    # for targets 3 .. 5: wrong at 1; right at 2, but too late
    head2 = torch.tensor([[7, 0, 9]])
    assert accepted_lengths([main, head1, head2]).tolist() == [[2, 1, 0]]
    assert acceptance(counting_model(), torch.arange(28).view(2, 14) % 7) == ([1.0] * 4, [1.0] * 4)
    assert rates([1, 1, 1]) == ([2 / 3, 1 / 2], [2 / 3, 1 / 3])
    assert rates([4, 0, 0]) == ([0.0, 0.0], [0.0, 0.0])
    assert rates([0, 0]) == ([0.0], [0.0]) and rates([3]) == ([], [])


# ---- requests


@pytest.mark.parametrize("prompts, changes, found", [
    ("Once upon a time", {}, "encode a text first"),
    (["a text", "another"], {}, "encode a text first"),
    ([1.5, 2.5], {}, "encode a text first"), ([[1], 2], {}, "encode a text first"),
    ([], {}, "prompt is empty"), ([[1], []], {}, "prompt is empty; give at least one token"),
    ([[0] * 12], {}, "12 tokens; the context takes 12.*shorter"),
    ([[1], [0] * 13], {}, "13 tokens"),
    ([[0, 5]], {}, r"id 5.*vocabulary is 0 \.\. 4.*tokenizer"), ([[0], [-1]], {}, "id -1"),
    ([[0]], {"max_new_tokens": 0}, "max_new_tokens is 0.*at least 1"),
    ([[0]], {"max_new_tokens": -3}, "max_new_tokens is -3"),
    ([[0]], {"heads": 4}, "heads is 4.*from 0 to 3.*3 MTP heads"),
    ([[0]], {"heads": -1}, "heads is -1"),
    ([[0]], {"temperature": -0.1}, "temperature is -0.1.*0 .greedy. or more"),
    ([[0]], {"temperature": math.nan}, "temperature is nan"),
    ([[0]], {"top_k": 0}, "top_k is 0.*from 1 to 5"),
    ([[0]], {"top_k": 6}, "top_k is 6.*from 1 to 5"),
    ([[0]], {"accept": "greedy"}, "accept rule 'greedy'.*residual, point, match"),
])
def test_a_bad_request_says_what_was_found_and_what_to_do(prompts, changes, found):
    model = make_model().train()
    with pytest.raises(ValueError, match=found):
        generate(model, prompts, **{"max_new_tokens": 3, **changes})
    assert model.training


def test_requests_at_the_edge():
    model = make_model(vocab=5, block=12, K=3)

    def text(**options):
        gen = torch.Generator().manual_seed(3)
        return generate(model, [[1], [2, 3]], 99, generator=gen, **options)[0]

    assert [len(t) for t in text()] == [11, 10]             # up to the end of the context
    assert generate(model, [[0] * 11], 5)[0] == plain(model, [[0] * 11], 5)
    assert text(temperature=0.9, top_k=5) == text(temperature=0.9) != text()
    # greedy: the rules are one, and nothing is divided by 0
    for rule in RULES:
        assert text(accept=rule) == text(heads=0) == text()
        assert text(accept=rule, temperature=0.8, top_k=1) == text()
    # a checkpoint without heads decodes plainly
    bare = copy(model, n_mtp=0)
    assert generate(bare, [[1], [2, 3]], 99)[0] == text()


@pytest.mark.parametrize("training", [True, False])
def test_generate_decodes_in_eval_mode_and_leaves_the_mode_as_it_was(training):
    model = make_model(K=2)
    want, model.blocks[0].drop.p = generate(model, [[1]], 9)[0], 0.9
    assert generate(model.train(training), [[1]], 9)[0] == want
    assert model.training is training and model.blocks[0].drop.training is training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_equal_the_eager_cpu():
    prompts = [[0, 1, 2], [5], [0, 1, 1, 0, 1, 0]]
    models = counting_model(), counting_model(noise=0.1), make_model(2, 24, 4)
    for model, stop in itertools.product(models, (None, 1)):
        prompt = [[t % model.config.vocab_size for t in p] for p in prompts]
        for heads in range(5):
            want, stats = generate(model, prompt, 99, heads=heads, stop_token=stop)
            got, fast = generate(copy(model).cuda(), prompt, 99, heads=heads, stop_token=stop)
            assert got == want and same_counts(fast, stats)
        for rule in RULES:
            texts = []
            for seed in (1, 1, 2):
                gen = torch.Generator("cuda").manual_seed(seed)
                options = dict(temperature=1.0, accept=rule, generator=gen)
                texts.append(generate(copy(model).cuda(), prompt, 9, **options)[0])
            assert texts[0] == texts[1]


def test_compiled_parts_give_the_same_text():
    """traced by torch.compile as FastDecoder's are, run without its code generator: the same
    drafts, random numbers and text"""
    model, texts = counting_model(K=2, noise=0.2), []
    for compiled in (False, True):
        decoder = Decoder(model, 2, 14, 2, 1.0, generator=torch.Generator().manual_seed(5))
        if compiled:
            for name in ("window", "propose", "accept"):
                options = dict(backend="eager", dynamic=False, fullgraph=True)
                setattr(decoder, name, torch.compile(getattr(decoder, name), **options))
        texts.append(run_decoder(decoder, [[1, 2], [4]], 12))
    (want, stats), (got, counted) = texts
    assert got == want and counted.accepted == stats.accepted
    assert 0 < stats.accepted[0] < stats.forwards


def test_a_line_of_the_trace_ends_where_the_text_ends():
    """a draft that was accepted is not shown as rejected, too"""
    rounds = []
    watch = decode.trace(decode.Tokenizer({"kind": "bytes"}), [0], rounds)
    generate(counting_model(K=3), [[0]], 4, watch=watch)
    assert [[head for _, head in row] for row in rounds] == [[0], [1, 2, 3]]


def test_the_argmax_in_pieces_is_the_argmax():
    """of equals, any will do"""
    argmax = decode.argmax
    x = torch.randn(3, 5, 128 * 70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(argmax(x), x.argmax(-1))
    x = x.round()
    assert torch.equal(x.gather(-1, argmax(x).unsqueeze(-1)).squeeze(-1), x.amax(-1))
    # 8900 can't be cut
    assert torch.equal(argmax(x[..., :8900]), x[..., :8900].argmax(-1))
