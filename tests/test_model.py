"""model.py: against a reference written with loops, who sees what, the cache, the wiring of the
heads, bad input."""
import math

import pytest
import torch

from model import GPT, Cache, GPTConfig

pytestmark = pytest.mark.usefixtures("float64")
SHAPE = {"vocab_size": 13, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 8}
# what current models have: heads that share keys, gated SiLU, another RoPE base and epsilon
LLAMA = dict(n_head=4, n_kv_head=2, n_embd=16, swiglu=10, rope_base=50.0, norm_eps=0.01)
both_kinds = pytest.mark.parametrize("kind", [{}, LLAMA], ids=["plain", "llama"])


def make_model(n_mtp=3, seed=1, **changes):
    """a toy in eval mode, all weights random and large: with fresh norms (all ones) none could
    be told from another"""
    model = GPT(GPTConfig(**{**SHAPE, "n_mtp": n_mtp, **changes}))
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=gen) * 0.4 + (weight.dim() == 1))
    return model.eval()


def random_tokens(*shape, seed=2):
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, atol, what):
    torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


# ---- the reference: the formulas of model.py's docstring, one position and one attention head at a
# time, from the named weights


def ref_norm(x, gain, eps):
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps) * gain


def ref_turn(x, position, base):
    """rotary: the pair (x_i, x_{i + half}) turns by position * base^(-2i/size)"""
    out, half = x.clone(), len(x) // 2
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return out


def ref_block(config, w, at, xs):
    """w: weights by name; at: the block's prefix; xs: one vector a position -> the same"""
    d, size = len(xs[0]), len(xs[0]) // config.n_head
    eps, base, groups = config.norm_eps, config.rope_base, config.n_kv_head
    qkv = [w[at + "attn.qkv.weight"] @ ref_norm(x, w[at + "norm1.weight"], eps) for x in xs]
    qs, ks, vs = zip(*(row.split([d, groups * size, groups * size]) for row in qkv))
    mid = []
    for i, x in enumerate(xs):
        seen = torch.zeros(d)
        for head in range(config.n_head):
            shared = head * groups // config.n_head       # which keys and values: 0 0 1 1 ..
            part = slice(head * size, (head + 1) * size)
            group = slice(shared * size, (shared + 1) * size)
            q = ref_turn(qs[i][part], i, base)
            keys = [ref_turn(ks[j][group], j, base) for j in range(i + 1)]
            scores = [float(q @ k) / math.sqrt(size) for k in keys]
            total = sum(math.exp(s) for s in scores)
            for j, score in enumerate(scores):
                seen[part] += math.exp(score) / total * vs[j][group]
        mid.append(x + w[at + "attn.proj.weight"] @ seen)
    out = []
    for x in mid:
        up = w[at + "fc.weight"] @ ref_norm(x, w[at + "norm2.weight"], eps)
        inner = [max(float(u), 0.0) ** 2 for u in up]
        if config.swiglu:
            pairs = zip(up[: config.swiglu].tolist(), up[config.swiglu :].tolist())
            inner = [gate / (1 + math.exp(-gate)) * value for gate, value in pairs]
        out.append(x + w[at + "proj.weight"] @ torch.tensor(inner))
    return out


def ref_logits(model, tokens):
    """tokens: a list of ids -> K+1 tensors (T-k, V)"""
    w, emb, config = model.state_dict(), model.state_dict()["embed.weight"], model.config

    def norm(x, name):
        return ref_norm(x, w[f"{name}.weight"], config.norm_eps)

    hidden = [emb[t] for t in tokens]
    for layer in range(config.n_layer):
        hidden = ref_block(config, w, f"blocks.{layer}.", hidden)
    out = [torch.stack([emb @ norm(h, "norm") for h in hidden])]
    for k in range(1, config.n_mtp + 1):
        at = f"heads.{k - 1}."
        mixed = []
        for i in range(len(tokens) - k):  # h'^k_i = M_k [ norm(h^{k-1}_i) ; norm(Emb(t_{i+k})) ]
            left = norm(hidden[i], at + "norm_hidden")
            right = norm(emb[tokens[i + k]], at + "norm_embed")
            mixed.append(w[at + "mix.weight"] @ torch.cat([left, right]))
        hidden = ref_block(config, w, at + "block.", mixed)
        out.append(torch.stack([emb @ norm(h, at + "norm_out") for h in hidden]))
    return out


@both_kinds
@pytest.mark.parametrize("K", [0, 1, 3])
def test_all_logits_equal_the_loop_reference(K, kind):
    model, tokens = make_model(K, **kind), random_tokens(2, 7)
    got = model.all_logits(tokens)
    assert [tuple(x.shape) for x in got] == [(2, 7 - k, 13) for k in range(K + 1)]
    for b in range(2):
        for k, want in enumerate(ref_logits(model, tokens[b].tolist())):
            close(got[k][b], want, 1e-10, f"entry {k}")


# ---- who sees what


@both_kinds
def test_a_row_sees_exactly_the_tokens_before_its_target(kind):
    # row i of entry k predicts t_{i+k+1}: its gradient reaches the embedding of t_j if and only if
    # j <= i+k
    model, T, leaf = make_model(3, **kind), 7, []

    def cut(module, args, out):  # stands for the embeddings of the T tokens, each on its own
        leaf[:] = [out.detach().requires_grad_()]
        return leaf[0]

    model.embed.register_forward_hook(cut)
    for k, logits in enumerate(model.all_logits(random_tokens(1, T))):
        for i in range(T - k):
            grad = torch.autograd.grad(logits[0, i].square().sum(), leaf[0], retain_graph=True)[0]
            reached = [j for j in range(T) if grad[0, j].abs().max() > 1e-9]
            assert reached == list(range(i + k + 1)), f"entry {k} row {i}"
            assert not grad[0, i + k + 1 :].any(), f"entry {k} row {i}"


@both_kinds
def test_changing_a_token_changes_nothing_before_it(kind):
    model, tokens, T = make_model(3, **kind), random_tokens(2, 8), 8
    before = model.all_logits(tokens)
    for j in range(T):
        other = tokens.clone()
        other[:, j] = (other[:, j] + 1) % 13
        for k, (a, b) in enumerate(zip(before, model.all_logits(other), strict=True)):
            first = max(0, j - k)  # the first row with i + k >= j
            close(a[:, :first], b[:, :first], 1e-12, f"token {j}, entry {k}")
            if first < T - k:
                difference = (a[:, first] - b[:, first]).abs().amax(-1)
                assert difference.min() > 1e-6, f"token {j} should reach entry {k}"


# ---- the cache


def caches(model, batch, slots, heads):
    """filled with huge numbers: a stale slot that is seen, however faintly, shows (not NaN: 0 *
    NaN is NaN)"""
    cache = Cache(model, batch, slots, heads)
    for tensor in [t for pair in cache.kv for t in pair] + cache.hidden:
        tensor.fill_(1e6)
    return cache


@torch.no_grad()
@both_kinds
@pytest.mark.parametrize("seed", range(2))
def test_cached_steps_with_rollbacks_equal_the_full_forward(seed, kind):
    # rows of the batch stand at different positions, wrong tokens are fed and taken back, in chunks
    # of any size
    K, B, T = 3, 3, 14
    # T + K: each head has its last token
    model = make_model(K, block_size=T + K, **kind)
    tokens = random_tokens(B, T + K, seed=seed)
    # differs everywhere
    wrong = (tokens + 1 + random_tokens(B, T + K, seed=99) % 12) % 13
    want = model.all_logits(tokens)
    cache, gen = caches(model, B, T + K, K), torch.Generator().manual_seed(seed)
    done, checked = torch.zeros(B, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)
    row = torch.arange(B)[:, None]

    def feed(text, pos):
        at = model.positions(cache, pos)
        out = [model.logits(0, model.trunk_step(text[row, pos], cache, at))]
        for k in range(1, K + 1):
            out.append(model.logits(k, model.head_step(k, text[row, pos + k], cache, at)))
        return out

    for _ in range(60):
        size = int(torch.randint(1, 6, (), generator=gen))
        # up to two positions back
        start = (done - torch.randint(0, 3, (B,), generator=gen)).clamp(0, T - size)
        pos = start[:, None] + torch.arange(size)
        if torch.rand((), generator=gen) < 0.5:
            feed(wrong, pos)
            done = torch.minimum(done, start)  # what was right there is lost: go on from here
            continue
        for k, got in enumerate(feed(tokens, pos)):
            close(got, want[k][row, pos], 1e-10, f"entry {k}")
        done, checked[row, pos] = pos[:, -1] + 1, True
    assert checked.all()


@torch.no_grad()
@both_kinds
def test_a_position_twice_in_one_step_is_written_once_more_the_same(kind):
    # a draft past the end is clamped to the last slot (decode.py): the same position, token and
    # hidden state repeat
    model, tokens = make_model(1, **kind), random_tokens(1, 8)
    want = model.all_logits(tokens)
    cache = caches(model, 1, 8, 1)
    for pos in ([0, 1, 2, 3], [4, 5, 6, 6, 6]):
        pos = torch.tensor([pos])
        at = pos[0]
        positions = model.positions(cache, pos)
        got = model.logits(0, model.trunk_step(tokens[:, at], cache, positions))
        close(got, want[0][:, at], 1e-10, "trunk")
        got = model.logits(1, model.head_step(1, tokens[:, at + 1], cache, positions))
        close(got, want[1][:, at], 1e-10, "head")


@torch.no_grad()
@both_kinds
@pytest.mark.parametrize("heads", [0, 1])
def test_a_cache_for_fewer_heads_than_the_model_has(heads, kind):
    model, tokens, pos = make_model(2, **kind), random_tokens(1, 6), torch.arange(5)[None]
    cache, want = caches(model, 1, 6, heads), model.all_logits(tokens)
    assert (len(cache.kv), len(cache.hidden)) == (SHAPE["n_layer"] + heads, heads)
    pos = model.positions(cache, pos)
    got = model.logits(0, model.trunk_step(tokens[:, :5], cache, pos))
    close(got, want[0][:, :5], 1e-10, "trunk")
    if heads:
        got = model.logits(1, model.head_step(1, tokens[:, 1:], cache, pos))
        close(got, want[1], 1e-10, "head")


# ---- how the heads are wired to the rest


def test_heads_share_no_weights_and_the_embedding_is_the_output_head():
    model = make_model(3)
    # parameters() lists one shared by two modules only once
    places = [w.data_ptr() for w in model.parameters()]
    everything = list(model.named_parameters(remove_duplicate=False))
    assert len(places) == len(set(places)) == len(everything)
    before = model.all_logits(random_tokens(1, 6))
    with torch.no_grad():
        model.heads[2].mix.weight.mul_(2)
        after = model.all_logits(random_tokens(1, 6))
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert changed == [False, False, False, True]  # head 3 only
        # id 12 isn't in the text: as an embedding it goes unused ...
        model.embed.weight[12] = 0
        tokens = random_tokens(1, 6) % 12
        for logits in model.all_logits(tokens):
            # ... and as a row of W it gives logit 0
            assert not logits[..., 12].any() and logits[..., 11].all()


def test_without_heads_it_is_a_plain_gpt_and_heads_leave_the_main_logits_alone():
    plain, tokens = make_model(0), random_tokens(2, 7)
    assert len(plain.heads) == 0 and not [name for name in plain.state_dict() if "head" in name]
    assert len(plain.all_logits(tokens)) == 1
    model = make_model(3, seed=5)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("heads.") for name in missing)
    assert torch.equal(model.all_logits(tokens)[0], plain.all_logits(tokens)[0])


def test_count_parameters_adds_up():
    count, d = make_model(3).count_parameters(), 8
    block = 12 * d * d + 2 * d  # qkv 3, proj 1, fc 4, proj 4; two norms
    head = block + 2 * d * d + 3 * d
    total = sum(w.numel() for w in make_model(3).parameters())
    assert count == dict(embedding=13 * d, trunk=2 * block + d, heads=3 * head, total=total)
    d, F, shared = 16, 10, 8    # G hd
    block = 2 * d * d + 2 * d * shared + 3 * d * F + 2 * d
    assert make_model(1, **LLAMA).count_parameters()["trunk"] == 2 * block + d


def test_a_cache_holds_a_row_for_each_key_value_head():
    assert Cache(make_model(0, **LLAMA), 3, 5, 0).kv[0][0].shape == (3, 2, 5, 4)      # G, not H


def test_the_defaults_are_a_plain_gpt():
    """a checkpoint of an earlier version lacks these settings, and must load as what it is"""
    named = GPTConfig(**SHAPE, n_kv_head=2, swiglu=0, rope_base=10000.0, norm_eps=1e-5)
    assert GPTConfig(**SHAPE) == named


# ---- numbers and modes


def test_rotary_angles_stay_in_float32_or_better():
    model = make_model(1).to(torch.bfloat16)
    assert model.rope.dtype == torch.float32 and model.embed.weight.dtype == torch.bfloat16
    # and the activations stay in bf16
    assert model.all_logits(random_tokens(1, 6))[1].dtype == torch.bfloat16
    assert model.double().rope.dtype == torch.float64
    # size 4: pairs at 1 and 1/100 radian a position
    freq = 10000.0 ** (-torch.arange(0, 4, 2) / 4)
    # block_size, the head's reach, one more
    angle = torch.arange(12 + 1 + 1)[:, None] * freq
    close(model.rope, torch.stack((angle.cos(), angle.sin())).repeat(1, 1, 2), 1e-14, "the table")


def test_dropout_acts_in_training_only():
    model, tokens = make_model(1, dropout=0.5), random_tokens(1, 6)
    without = make_model(1).all_logits(tokens)
    for a, b in zip(model.all_logits(tokens), without, strict=True):
        assert torch.equal(a, b)
    model.train()
    assert not torch.equal(model.all_logits(tokens)[0], model.all_logits(tokens)[0])
    # each place by itself: one alone must already make a difference
    for name, module in model.named_modules():
        if hasattr(module, "dropout") or isinstance(module, torch.nn.Dropout):
            model.eval()
            module.train()
            assert not torch.equal(model.all_logits(tokens)[1], model.all_logits(tokens)[1]), name
    # and in a block both halves, each while the other adds nothing
    for silent in ("attn.proj.weight", "proj.weight"):
        block, x = make_model(1, dropout=0.5).blocks[0], torch.randn(1, 6, 8)
        block.get_parameter(silent).data.zero_()
        block.drop.train()
        assert not torch.equal(block(x, model.angles(6)), block(x, model.angles(6))), silent


@pytest.mark.parametrize("changes, found", [
    ({"vocab_size": 0}, "vocab_size is 0"), ({"block_size": -3}, "block_size is -3"),
    ({"n_layer": 0}, "n_layer is 0"),
    ({"n_head": 0}, "n_head is 0"), ({"n_embd": 0}, "n_embd is 0"), ({"n_mtp": -1}, "n_mtp is -1"),
    ({"n_embd": 9}, "n_embd is 9 with n_head 2"),
    ({"n_embd": 6}, "n_embd is 6 with n_head 2"),       # 6 / 2 is odd
    ({"n_mtp": 12}, "n_mtp is 12 with block_size 12"), ({"dropout": 1.0}, "dropout is 1.0"),
    ({"dropout": -0.1}, "dropout is -0.1"), ({"swiglu": -1}, "swiglu is -1"),
    ({"n_kv_head": 3}, "n_kv_head is 3; it must divide n_head 2"),
    ({"n_kv_head": -1}, "n_kv_head is -1"), ({"rope_base": 0.0}, "rope_base is 0.0"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0")])
def test_a_bad_config_says_what_is_wrong(changes, found):
    with pytest.raises(ValueError, match=found):
        GPTConfig(**{**SHAPE, "n_mtp": 3, **changes})


@pytest.mark.parametrize("T", [0, 13])
def test_input_of_a_wrong_length_says_so(T):
    with pytest.raises(ValueError, match=f"got {T} tokens.* 1 to 12"):
        make_model(3)(random_tokens(1, T))


def test_texts_too_short_for_a_head_give_it_no_rows():
    model, tokens = make_model(3), random_tokens(2, 12)
    want = model.all_logits(tokens)  # 12 is the longest: block_size
    for T in (1, 2, 3, 4):
        for k, got in enumerate(model.all_logits(tokens[:, :T])):
            assert got.shape == (2, max(0, T - k), 13)
            close(got, want[k][:, : max(0, T - k)], 1e-12, f"{T} tokens, entry {k}")
