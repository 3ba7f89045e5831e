"""heads="auto": fast/heads.py's choice, and decode.Decoder under any choice: whatever number of
heads runs, the text is the main head's, and heads that sat out draft as if they had not."""
import json
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from test_decode import (
    Branches,
    branches_of_a_round,
    choice,
    copy,
    counting_model,
    distance,
    distribution_of,
    make_model,
    plain,
    some_request,
)

import decode
from common import UserError
from decode import Decoder, generate
from fast.heads import MEMORY, HeadChoice, read_costs, round_costs

pytestmark = pytest.mark.usefixtures("float64")
RULES = ["residual", "point", "match"]


def scripted(monkeypatch, ks):
    """let the rounds run ks[0], ks[1], .. heads, the last number from then on"""
    ks = list(ks)
    monkeypatch.setattr(
        HeadChoice, "choose", lambda self, accepted, now, left: ks.pop(0) if len(ks) > 1 else ks[0]
    )


def accepting(monkeypatch):
    """a list that fills with (row, k, text, drafts, q) of every unfinished sequence, as each accept
    finds it"""
    seen, accept = [], Decoder.accept

    def spy(self, logits, at, drafts, q):
        for b, (n, limit) in enumerate(zip(self.n.tolist(), self.limit.tolist())):
            if n < limit:
                text = self.buffer[b, : n + 1].tolist()
                seen.append((b, self.k, text, drafts[b].tolist(), None if q is None else q[b]))
        accept(self, logits, at, drafts, q)
    monkeypatch.setattr(Decoder, "accept", spy)
    return seen


def assert_drafts_are_without_a_cache(model, seen):
    """each draft is the argmax of all_logits. One batch for all that `accepting` has seen: what
    stands after a token changes nothing before it, see test_model.py"""
    tokens = torch.zeros(len(seen), model.config.block_size, dtype=torch.long)
    for row, (_, _, text, drafts, _) in enumerate(seen):
        tokens[row, : len(text) + len(drafts)] = torch.tensor(text + drafts)
    choices = [logits.argmax(-1) for logits in model.all_logits(tokens)]
    for row, (b, k, text, drafts, _) in enumerate(seen):
        # head j predicts token i + j + 1 at row i, and its draft is token len(text) + j - 1
        want = [int(choices[j][row, len(text) - 2]) for j in range(1, k + 1)]
        assert drafts == want, (b, len(text), k)


# ---- any sequence of numbers of heads


@pytest.mark.parametrize("ks", [(2, 0, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0), (2, 1, 2), (1, 0, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_the_distribution_stays_whatever_number_of_heads_runs(rule, ks, monkeypatch):
    """all random outcomes of three rounds, enumerated: the distribution of the texts that begin
    with the same token is that of the main head's conditionals"""
    new, prompt, temperature = 4, [1, 0], 0.7
    V = 3 if ks == (1, 0, 2) or rule != "residual" and ks.count(2) < 2 else 2
    model = make_model(V, 12, 2, seed=4)
    rows = 1
    for k in ks:
        rows *= branches_of_a_round(rule, V, k)
    scripted(monkeypatch, ks)
    tree = Branches(monkeypatch, rows)
    sample, calls = tree.sample, []

    def sample_in_rounds(probs, noise):
        calls.append(1)
        if len(calls) == 1:                    # the prefill's token: test_decode.py has all of them
            return probs.argmax(-1)
        return sample(probs, noise)
    monkeypatch.setattr(decode, "sample", sample_in_rounds)
    texts, stats = generate(
        model, [prompt] * rows, new, temperature=temperature, accept=rule, heads="auto"
    )
    assert {k for k, count in enumerate(stats.drafted) if count} == set(ks)
    want = {(choice(model, prompt),): 1.0}
    for _ in range(new - 1):
        for text in list(want):
            weight = want.pop(text)
            logits = model.all_logits(torch.tensor([[*prompt, *text]]))[0][0, -1]
            for v, p in enumerate(distribution_of(logits, temperature)):
                want[(*text, v)] = weight * p
    assert distance(tree.distribution(texts), want) < 1e-10


@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_greedy_text_is_plain_decodings_under_any_numbers_and_under_auto(K, monkeypatch):
    rng = random.Random(K)
    for seed in range(8):
        model, prompts, new, stop = some_request(rng, seed, K)
        want = plain(model, prompts, new, stop)
        got, _ = generate(model, prompts, new, heads="auto", stop_token=stop)
        assert got == want, seed
        with monkeypatch.context() as patch:
            scripted(patch, [rng.randint(0, K) for _ in range(40)])
            got, stats = generate(model, prompts, new, heads="auto", stop_token=stop)
        assert got == want, seed
        assert stats.forwards == sum(stats.drafted) == sum(stats.accepted)
        assert len(stats.drafted) == len(stats.accepted) == K + 1


@pytest.mark.parametrize("K, piece", [(1, 3), (2, 256), (4, 256), (4, 3)])
def test_drafts_are_those_without_a_cache_under_random_numbers_of_heads(K, piece, monkeypatch):
    """every draft of every round is the argmax of all_logits, also where a head comes back after
    it sat out; rows are rebuilt in pieces of 256 or of 3"""
    monkeypatch.setattr(decode, "PREFILL", piece)
    seen, rng, kinds = accepting(monkeypatch), random.Random(K), set()
    for seed in range(5):
        # little noise: drafts are often accepted; much: one stale row is enough to change a draft
        model = counting_model(K, 40, [0.05, 0.15, 0.3, 0.4, 0.5][seed], seed)
        if seed == 2:
            model = make_model(3, 40, K, layers=2, seed=seed, heads=2)
        ks = [rng.choice([0, 0, K, K, rng.randint(0, K)]) for _ in range(60)]
        roomy = copy(model, block_size=40 + K)
        seen.clear()
        with monkeypatch.context() as patch:
            scripted(patch, ks)
            generate(model, [[1], [0, 1, 2, 0, 1], [2, 0]], 99, heads="auto")
        assert_drafts_are_without_a_cache(roomy, seen)
        kinds.update(zip(ks, ks[1:]))
    assert {(0, K), (K, 0), (K, K)} <= kinds


def test_a_wide_draft_window_saves_rebuilding_and_changes_no_draft(monkeypatch):
    """as on the fast path: then a smaller number of heads needs no rebuilding"""
    rebuilt, rebuild = [], Decoder.rebuild
    monkeypatch.setattr(Decoder, "least_width", 7)

    def spy(self, parts, rows):
        rebuilt.append(tuple(parts))
        return rebuild(self, parts, rows)
    monkeypatch.setattr(Decoder, "rebuild", spy)
    test_drafts_are_those_without_a_cache_under_random_numbers_of_heads(3, 256, monkeypatch)
    # the prompt by the trunk; heads that were away for long, but not those before them
    assert {(0,), (3,), (2, 3), (1, 2, 3)} <= set(rebuilt)
    rebuilt.clear()
    scripted(monkeypatch, [3, 2, 1, 0, 1, 3])
    generate(counting_model(3, 40, 0.6, 1), [[0] * 9], 7, heads="auto")
    assert rebuilt == [(0,), (1, 2, 3)], rebuilt


@pytest.mark.parametrize("rule", RULES)
def test_draft_distributions_are_those_without_a_cache_under_random_numbers(rule, monkeypatch):
    """numbers, not argmaxes, and all three rules"""
    K, rng, seen = 3, random.Random(1), accepting(monkeypatch)
    model = counting_model(K, 30, noise=0.15, seed=5)
    roomy = copy(model, block_size=30 + K)
    scripted(monkeypatch, [rng.randint(0, K) for _ in range(60)])
    generator = torch.Generator().manual_seed(1)
    _, stats = generate(model, [[0], [1, 2, 0, 1]], 99, temperature=0.5, accept=rule, heads="auto",
                        generator=generator)
    assert min(stats.drafted) > 0
    for _, k, text, drafts, q in seen:
        for j in range(k):
            logits = roomy.all_logits(torch.tensor([text + drafts[:j]]))[j + 1][0, -1]
            if rule == "residual":
                assert q[j].tolist() == pytest.approx(distribution_of(logits, 0.5), abs=1e-10)
            else:
                assert drafts[j] == int(logits.argmax())


def test_a_round_draws_the_numbers_that_its_heads_need(monkeypatch):
    """while their number does not change, auto's text is that of a fixed number of heads"""
    model = counting_model(3, 30, noise=0.2, seed=2)

    def text(**options):
        generator = torch.Generator().manual_seed(7)
        return generate(model, [[0], [1, 2]], 99, temperature=0.8, generator=generator, **options)

    for k in range(4):
        want, stats = text(heads=k)
        with monkeypatch.context() as patch:
            scripted(patch, [k])
            got, other = text(heads="auto")
        assert got == want and other.accepted[: k + 1] == stats.accepted
        assert other.drafted[k] == other.forwards == stats.drafted[k]


class Reads(TorchDispatchMode):
    """what is computed reads: `found`, storages that were there before, by address"""

    def __init__(self):
        super().__init__()
        self.found, self.made = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = {tensor.untyped_storage().data_ptr() for tensor in self.made}
        for tensor in filter(torch.is_tensor, tree_leaves([args, kwargs])):
            address = tensor.untyped_storage().data_ptr()
            if address not in made:
                self.found[address] = tensor
        result = func(*args, **(kwargs or {}))
        # tensors stay alive here, so that no address is used twice
        self.made += [x for x in tree_leaves(result) if torch.is_tensor(x)]
        return result


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_round_reads_the_same_memory_whenever_its_number_of_heads_comes_again(temperature):
    """fast/decode.py records a round for each number of heads: what it read then must still be
    there, and still be what the decoder writes. The random numbers are kept with the recording"""
    decoder = Decoder(counting_model(3, 60), 1, 60, "auto", temperature)
    recorded = {}
    for count in range(2):
        decoder.prefill([[1, 2, 3]], 40)
        for k in (0, 1, 3, 2) if count == 0 else (2, 0, 3, 1):
            decoder.use(k)
            if count:
                decoder.noise = recorded[k][1]
            with torch.no_grad(), Reads() as reads:
                decoder.advance()
            before, _ = recorded.setdefault(k, (reads.found, decoder.noise))
            assert before.keys() == reads.found.keys(), k


# ---- auto


COSTS = {str(batch): [1.0, 1.3, 1.5, 1.7, 1.9] for batch in (1, 2)}


def sampled(model, prompts=([0], [3, 4]), seed=1, tokens=60, **options):
    generator = torch.Generator().manual_seed(seed)
    options = dict(temperature=0.9, heads="auto", generator=generator, costs=COSTS, **options)
    return generate(model, list(prompts), tokens, **options)


def test_the_same_seed_is_the_same_text_and_watching_changes_nothing():
    model = counting_model(4, 320, noise=0.2, seed=3)
    texts, stats = sampled(model)
    assert len([count for count in stats.drafted if count]) > 1
    seen = []
    again, other = sampled(model, watch=lambda decoder: seen.append(decoder.n.sum().item()))
    assert again == texts and other.drafted == stats.drafted and seen == sorted(seen)
    assert sampled(model, seed=2)[0] != texts
    # a decoder that is used again starts anew
    generator = torch.Generator().manual_seed(1)
    decoder = Decoder(model, 2, 320, "auto", 0.9, generator=generator, costs=COSTS)
    decode.run_decoder(decoder, [[5, 6], [1]], 150)
    assert decoder.auto.past.sum() > MEMORY               # so much of it was forgotten
    generator.manual_seed(1)
    got, last = decode.run_decoder(decoder, [[0], [3, 4]], 60)
    assert got == texts and last.drafted == stats.drafted


def test_several_numbers_of_heads_occur_on_a_mixed_set():
    """from heads that are never right to heads that always are: none, some and all of them run"""
    drafted = torch.zeros(5, dtype=torch.long)
    for noise in (0.0, 0.2, 0.3, 0.6):
        _, stats = sampled(counting_model(4, 120, noise, seed=3), [[0]], tokens=110)
        drafted += torch.tensor(stats.drafted)
    assert (drafted > 0).sum() >= 3 and drafted[0] > 0 and drafted[4] > 0, drafted


def test_the_first_choice_knows_where_the_context_ends(monkeypatch):
    model, lefts, choose = make_model(11, 40, 2), [], HeadChoice.choose
    monkeypatch.setattr(HeadChoice, "choose", lambda self, accepted, now, left: (
        lefts.append(left) or choose(self, accepted, now, left)))
    for prompts, left in (([[1] * 38], 1), ([[1] * 38, [2] * 10], 19), ([[1] * 5], 19)):
        lefts.clear()
        generate(model, prompts, 20, heads="auto")
        assert lefts[0] == left


def test_useless_heads_soon_sit_out_and_are_tried_again():
    model, seen = counting_model(4, 300), []
    for head in model.heads:
        head.norm_out.weight.neg_()                       # what is right is the last that they say
    _, stats = generate(model, [[0]], 250, heads="auto", costs=COSTS,
                        watch=lambda decoder: seen.append(decoder.k))
    assert stats.accepted[0] == 249 and stats.drafted[0] > 125
    assert seen.index(0) < 20 and max(seen[seen.index(0) :]) > 0


def test_a_decoder_that_is_used_again_reads_the_new_prompts(monkeypatch):
    model, seen = make_model(11, 60, 2, seed=3), accepting(monkeypatch)
    scripted(monkeypatch, [2] * 8 + [0] * 12 + [2])
    decoder, gen = Decoder(model, 2, 50, "auto"), torch.Generator().manual_seed(1)
    for length in (20, 28, 12):
        prompts = [torch.randint(11, (length + b,), generator=gen).tolist() for b in range(2)]
        decode.run_decoder(decoder, prompts, 20)
        assert_drafts_are_without_a_cache(model, seen)
        assert sum(k for _, k, *_ in seen) > 10
        seen.clear()


def test_nothing_is_rebuilt_for_sequences_that_are_finished(monkeypatch):
    """the last look at the counts comes after the last round"""
    rebuilt, rebuild = [], Decoder.rebuild

    def spy(self, parts, rows):
        rebuilt.append(rows)
        return rebuild(self, parts, rows)
    monkeypatch.setattr(Decoder, "rebuild", spy)
    model = make_model(11, 60, 2, seed=3)
    scripted(monkeypatch, [0] * 20 + [2])
    _, stats = generate(model, [list(range(9))], 21, heads="auto")
    assert stats.forwards == 20 and rebuilt == [9], rebuilt
    # of a long text that is finished and a short one that is not, the short one counts
    scripted(monkeypatch, [0] * 5 + [2])
    rebuilt.clear()
    generate(model, [list(range(9)) * 6, [1, 2]], 20, heads="auto")
    assert rebuilt == [54, 7], rebuilt


def test_a_prompt_and_a_long_pause_are_made_up_for_in_pieces(monkeypatch):
    """more rows than PREFILL, for one sequence of two"""
    model = make_model(11, 600, 2, seed=3)
    gen = torch.Generator().manual_seed(1)
    prompts = [torch.randint(11, (length,), generator=gen).tolist() for length in (280, 2)]
    scripted(monkeypatch, [2, 2] + [0] * 270 + [2])
    seen = accepting(monkeypatch)
    generate(model, prompts, 290, heads="auto")
    drafted = [row for row in seen if row[1] == 2]
    assert len(drafted) > 12
    assert_drafts_are_without_a_cache(model, drafted)


# ---- the choice


def chooser(costs, batch=1, **options):
    return HeadChoice(make_model(K=len(costs) - 1), batch, None, {"1": costs}, **options)


def counts(K, rows):
    """{(k, a): forwards} -> the histogram that a Decoder counts"""
    accepted = torch.zeros(K + 1, K + 1, dtype=torch.long)
    for (k, a), n in rows.items():
        accepted[k, a] = n
    return accepted


def test_the_number_with_the_most_tokens_per_time_is_chosen():
    choose, zero = chooser([1.0, 1.1, 1.2, 1.3]), counts(3, {})
    # nothing known: 0.8 each, 1 + .8 + .64 + .512 tokens
    assert choose.choose(zero, 3, 999) == 3
    assert chooser([1.0, 1.1, 1.2, 2.0]).choose(zero, 0, 999) == 2
    assert chooser([1.0, 2.0, 3.0, 4.0]).choose(zero, 3, 999) == 0
    # AR_1 = 0.9, AR_2 = 1/3, AR_3 = 0: 1 + .9 tokens with one head, 1 + .9 + .3 with two or three
    many = counts(3, {(3, 0): 100, (3, 1): 600, (3, 2): 300})
    for costs, want in (([1, 1.1, 1.2, 1.3], 2), ([1, 1.1, 1.4, 1.5], 1), ([1, 2.5, 3, 4], 0)):
        choose = chooser(costs)
        choose.choose(zero, 3, 999)
        assert choose.choose(many, 3, 999) == want, costs
    # AR_1 = 1/4, AR_2 = 1: a good head after a bad one, 1 + 1/4 + 1/4 tokens
    choose = chooser([1, 1.5, 1.8])
    choose.choose(counts(2, {}), 2, 999)
    assert choose.choose(counts(2, {(2, 0): 750, (2, 2): 250}), 2, 999) == 0


def test_rounds_with_fewer_heads_judge_only_the_heads_that_ran():
    """AR_1 = 0.5 from all rounds, AR_2 = 0.9 from those with two heads: one head alone tells
    nothing of the second"""
    choose = chooser([1.0, 1.3, 1.36])
    choose.choose(counts(2, {}), 2, 999)
    rows = {(1, 0): 500, (1, 1): 500, (2, 0): 50, (2, 1): 5, (2, 2): 45}
    assert choose.choose(counts(2, rows), 1, 999) == 2
    choose = chooser([1.0, 1.3, 1.36])
    choose.choose(counts(2, {}), 2, 999)
    assert choose.choose(counts(2, {**rows, (2, 1): 45, (2, 2): 5}), 1, 999) == 1


def test_what_was_counted_long_ago_fades_and_a_head_that_sat_out_is_tried_again():
    choose, accepted = chooser([1.0, 1.3, 1.6]), counts(2, {})
    choose.choose(accepted, 2, 999)
    accepted[2, 1] += 20                                  # head 1 is right, head 2 is not
    now = choose.choose(accepted, 2, 999)
    assert now == 1
    for rounds in range(1, 200):
        accepted[1, 1] += 1
        now = choose.choose(accepted, now, 999)
        if now == 2:
            break
    assert 10 < rounds < 150, rounds
    accepted[2, 1] += 20                                  # still wrong
    assert choose.choose(accepted, 2, 999) == 1


def test_a_large_batch_remembers_some_forwards_of_each_sequence():
    """three rounds of 60 sequences, the first with good heads, the others with bad ones"""
    looks = [{(1, 1): 60, (1, 0): bad} for bad in (0, 60, 120)]
    chosen = []
    for batch in (1, 60):
        choose = HeadChoice(make_model(K=1), batch, None, {str(batch): [1.0, 1.37]})
        now = choose.choose(counts(1, {}), -1, 999)
        for rows in looks:
            now = choose.choose(counts(1, rows), now, 999)
        chosen.append(now)
    assert chosen == [0, 1]            # 1.26 tokens, as it is of late, and 1.33, as it was in all


def test_a_small_difference_is_not_worth_a_switch():
    zero = counts(1, {})
    assert chooser([1.0, 1.78]).choose(zero, 1, 999) == 1 # 1.8 tokens / 1.78: 1 % better than none
    assert chooser([1.0, 1.78]).choose(zero, 0, 999) == 0
    assert chooser([1.0, 1.68]).choose(zero, 0, 999) == 1 # 7 %
    assert chooser([1.0, 1.78]).choose(zero, -1, 999) == 1                # nothing runs yet
    assert chooser([1.0, 1.85]).choose(zero, -1, 999) == 0


def test_a_change_must_pay_before_the_text_ends():
    zero = counts(1, {})
    # 1.8 tokens in 1.6 steps: 7 % better than none, but the caches take 4 * 0.6 steps
    assert chooser([1.0, 1.6]).choose(zero, 0, 33) == 0
    assert chooser([1.0, 1.6]).choose(zero, 0, 45) == 1
    # fewer heads need nothing, and save nothing but the time of their rounds
    assert chooser([1.0, 2.0]).choose(zero, 1, 33) == 0
    assert chooser([1.0, 1.85]).choose(zero, 1, 33) == 1  # 3 % worse than none
    # a last token takes a round, whose drafts would be cut off
    assert chooser([1.0, 1.1]).choose(zero, -1, 1) == 0
    assert chooser([1.0, 1.1]).choose(zero, -1, 2) == 1


def test_near_the_end_of_a_text_nothing_changes():
    zero = counts(1, {})
    assert chooser([1.0, 1.1]).choose(zero, 0, 15) == 0
    assert chooser([1.0, 1.1]).choose(zero, 0, 16) == 1
    assert chooser([1.0, 2.0]).choose(zero, 1, 15) == 1
    assert chooser([1.0, 1.1]).choose(zero, -1, 15) == 1  # a new text


def test_auto_is_told_how_much_is_left(monkeypatch):
    told = []
    monkeypatch.setattr(
        HeadChoice, "choose", lambda self, accepted, now, left: told.append(left) or 0
    )
    generate(make_model(), [[0, 1, 2], [1]], 7, heads="auto")
    assert told == [6, 5, 4, 3, 2, 1, 0], told


# ---- costs


def test_costs_by_the_weights_that_are_read():
    model = make_model(vocab=50, K=2, layers=3)
    main = sum(p.numel() for p in model.blocks.parameters()) + model.norm.weight.numel() + 50 * 8
    head = sum(p.numel() for p in model.heads[0].parameters())
    slope = (head + 50 * 8) / main
    assert round_costs(model, 1) == pytest.approx([1, 1 + slope, 1 + 2 * slope])
    short = round_costs(model, 1, draft_vocab=10)
    assert short[2] == pytest.approx(1 + 2 * (head + 10 * 8) / main)
    # 64 sequences: 64, 128, 192 rows, so 48, 112, 176 after the first 16
    many, one = round_costs(model, 64), round_costs(model, 1)
    assert many == pytest.approx([x * y / 248 for x, y in zip(one, (248, 312, 376))])
    assert round_costs(copy(model, n_mtp=0), 1) == [1.0]


def test_large_batches_decode_plainly_and_an_unmeasured_batch_by_the_weights():
    model = counting_model(4, 40)                         # all drafts would be accepted
    prompts = [[i % 7] for i in range(40)]
    texts, stats = generate(model, prompts, 20, heads="auto")
    assert stats.drafted == [stats.forwards, 0, 0, 0, 0] and texts == plain(model, prompts, 20)
    costs = {"40": [1.0] * 5, "2": [1.0] * 5}
    drafted = []
    for batch in (40, 2, 1):
        _, stats = generate(model, prompts[:batch], 20, heads="auto", costs=costs)
        drafted.append(stats.drafted)
    assert drafted[0][4] == 40 * 4 and drafted[1][4] == 2 * 4
    assert drafted[2] == generate(model, prompts[:1], 20, heads="auto")[1].drafted


def test_costs_from_a_file(tmp_path):
    (tmp_path / "costs.json").write_text(json.dumps({"1": [1, 9, 9, 9, 9]}), encoding="utf-8")
    model = counting_model(4, 40)
    for costs in (tmp_path / "costs.json", str(tmp_path / "costs.json")):
        assert generate(model, [[0]], 20, heads="auto", costs=costs)[1].drafted[0] == 19


@pytest.mark.parametrize("text", ["", "[1]", "{}x", '{"1": 3}', '{"1": [1, 0]}', '{"1": [1, null]}',
                                  '{"1": []}', '{"1": ["a"]}', "\xff", '{"1": [1, NaN, 2]}',
                                  '{"1": "12"}'])
def test_a_file_that_holds_no_costs(tmp_path, text):
    (tmp_path / "costs.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="costs.json does not hold times above 0.*bench.py"):
        read_costs(tmp_path / "costs.json")
    with pytest.raises(UserError, match="can't read .*gone.json"):
        read_costs(tmp_path / "gone.json")


def test_costs_of_another_model_and_a_model_without_heads():
    model = counting_model(4, 40)
    with pytest.raises(UserError, match=r"0 \.\. 2 heads; this model has 4: measure"):
        generate(model, [[0]], 20, heads="auto", costs={"1": [1, 2, 3]})
    bare = copy(model, n_mtp=0)
    assert generate(bare, [[0]], 20, heads="auto")[0] == generate(model, [[0]], 20)[0]
    assert generate(bare, [[0]], 20, heads="auto")[1].drafted == [19]
