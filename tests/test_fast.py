"""fast/ against distill.py and decode.py: on a GPU as it is; without one, by Triton's
interpreter (conftest.py asks for it)."""
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import decode
import distill
import fast.decode
import fast.heads
import fast.loss
import model
import train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# before 3.7, the interpreter stumbles over today's NumPy
NEEDED = (3, 5) if DEVICE == "cuda" else (3, 7)
pytestmark = pytest.mark.skipif(
    fast.loss.triton_version() < NEEDED,
    reason=f"needs Triton {NEEDED[0]}.{NEEDED[1]} (it comes with PyTorch for CUDA)"
)


def distinct(*shape, V, seed):
    """bf16 logits without equals in a row: a border between them is clear"""
    gen = torch.Generator().manual_seed(seed)
    values = torch.linspace(-6, 6, V).bfloat16()
    assert len(values.unique()) == V
    rows = [values[torch.randperm(V, generator=gen)] for _ in range(torch.Size(shape).numel())]
    return torch.stack(rows).view(*shape, V).to(DEVICE)


def slow(logits, targets, alpha, beta, n):
    """distill.py's loss, in float64"""
    return distill.loss_and_grad(
        logits.double(), targets, alpha.double(), beta.double(), n, "forward", True
    )


@pytest.mark.parametrize(
    "R, V, n",
    [(1, 40, 0), (3, 40, 0), (3, 40, 7), (2, 40, 1), (3, 40, 40), (5, 70, 33), (2, 64, 63)]
)
def test_same_as_distill(R, V, n, monkeypatch):
    # rows take several blocks, the last one a part
    monkeypatch.setattr(fast.loss, "BLOCK", 16)
    C, gen = 2, torch.Generator().manual_seed(V + n + R)
    logits, targets = distinct(R, C, V=V, seed=n), torch.randint(V, (C,), generator=gen).to(DEVICE)
    alpha = torch.tensor([1.0, 0.3, 0.2, 0.0, 0.5], device=DEVICE)[:R]
    beta = torch.tensor([0.5, 0.7, 1.0, 0.1], device=DEVICE)[: R - 1]
    before = logits.clone()
    ce, kl, grad = fast.loss.loss_and_grad(logits, targets, alpha, beta, n)
    want = slow(logits, targets, alpha, beta, n)
    assert torch.equal(logits, before) and grad.dtype == torch.bfloat16
    torch.testing.assert_close(ce.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl.double(), want[1], rtol=1e-4, atol=1e-5)
    # bf16 keeps 8 bits; the interpreter cuts, a GPU rounds
    torch.testing.assert_close(grad.double(), want[2], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("n", [1, 5, "zero", 63, 64])
def test_the_border_lets_the_n_largest_in(n):
    """of both signs, zeros of both signs, and equals: all that are no smaller than the n-th
    largest count"""
    V = 64
    special = torch.tensor([0.0, -0.0, 2.0, 2.0, 2.0, -1.0, -1.0, 1e-30])
    gen = torch.Generator().manual_seed(1)
    row = torch.cat((torch.randn(V - len(special), generator=gen), special))
    # zero: the border is 0.0, and -0.0 is no smaller
    n = int((row > 0).sum()) + 1 if n == "zero" else n
    logits = row.bfloat16().expand(1, 2, V).contiguous().to(DEVICE)
    out = torch.zeros(3, 2, device=DEVICE)
    fast.loss.teacher_kernel[(2,)](logits, out, n, 2, V, 16)
    z = logits[0, 0].double()
    kept = z[z >= z.topk(n).values[-1]]
    assert all(torch.equal(z[z >= border], kept) for border in out[0].double())
    torch.testing.assert_close(out[1].double(), kept.logsumexp(0).expand(2), rtol=1e-5, atol=1e-5)
    q = kept.softmax(0)
    torch.testing.assert_close(out[2].double(), (q * q.log()).sum().expand(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("V, n", [(9, 0), (9, 4), (4096, 0)])
def test_a_vocabulary_shorter_than_a_block(V, n):
    """threads that never see a token add nothing"""
    logits = distinct(2, 1, V=V, seed=1) if V < 100 else rand(2, 1, V).bfloat16()
    targets = torch.tensor([V - 1], device=DEVICE)
    alpha, beta = torch.tensor([1.0, 0.3], device=DEVICE), torch.tensor([0.5], device=DEVICE)
    found = fast.loss.loss_and_grad(logits, targets, alpha, beta, n)
    for got, want in zip(found, slow(logits, targets, alpha, beta, n)):
        torch.testing.assert_close(got.double(), want.double(), rtol=2**-7, atol=1e-5)


def test_a_student_unlike_the_teacher():
    """N = 1: P~ and Q~ are both all on one token, however little the student gives it"""
    logits = torch.zeros(2, 1, 40, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 0, 3], logits[1, 0, 7], logits[1, 0, 3] = 4.0, 40.0, -40.0
    alpha, beta = torch.zeros(2, device=DEVICE), torch.ones(1, device=DEVICE)
    _, kl, grad = fast.loss.loss_and_grad(logits, torch.tensor([0], device=DEVICE), alpha, beta, 1)
    assert kl.abs().max() < 1e-4 and grad.abs().max() < 1e-2


def test_a_head_without_beta_has_no_kl():
    logits, targets = distinct(3, 2, V=40, seed=1), torch.tensor([3, 5], device=DEVICE)
    alpha = torch.tensor([1.0, 0.3, 0.3], device=DEVICE)
    beta = torch.tensor([0.0, 0.5], device=DEVICE)
    _, kl, grad = fast.loss.loss_and_grad(logits, targets, alpha, beta, 8)
    assert kl[0] == 0 and kl[1] > 0
    assert torch.equal(grad[1], fast.loss.loss_and_grad(logits, targets, alpha, 0 * beta, 0)[2][1])


def test_the_whole_loss_through_mtp_loss():
    """mtp_loss with the kernels equals mtp_loss without, on bf16 hidden states: values and
    gradients"""
    gen = torch.Generator().manual_seed(0)
    hidden = [torch.randn(2, 5 - k, 16, generator=gen).bfloat16().to(DEVICE) for k in range(3)]
    weight = torch.randn(50, 16, generator=gen).bfloat16().to(DEVICE)
    targets = torch.randint(50, (2, 5), generator=gen).to(DEVICE)
    results = []
    for function in (distill.loss_and_grad, fast.loss.loss_and_grad):
        leaves = [x.clone().requires_grad_() for x in (weight, *hidden)]
        options = dict(top_n=50, chunk_logits=400, grad_function=function)
        loss, ce, kl = distill.mtp_loss(leaves[1:], leaves[0], targets, **options)
        results.append([loss.detach(), ce, kl, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results):
        torch.testing.assert_close(got.float(), want.float(), rtol=0.03, atol=0.01)


def test_which_loss_runs_and_why(monkeypatch):
    def picked(dtype=torch.bfloat16, **changes):
        cfg = train.TrainConfig(compile="off", **changes)
        return train.pick_loss(cfg, torch.device(DEVICE), dtype)

    assert picked() == (fast.loss.loss_and_grad, "fused (fast/loss.py)")
    for changes, found in (
        ({"kl": "reverse"}, "forward KL"),
        ({"detach_teacher": False}, "detached teacher"),
        ({"fast": "off"}, "fast is off"),
        ({"dtype": torch.float32}, "not float32"),
    ):
        function, why = picked(**changes)
        assert function is distill.loss_and_grad and found in why
        if changes.get("fast") != "off":
            with pytest.raises(train.UserError, match="--fast on can't run here.*--fast auto"):
                picked(**{**changes, "fast": "on"})
    monkeypatch.setattr(fast.loss.triton, "__version__", "3.2.0")
    assert "Triton 3.3" in picked()[1]


# -----------------------------------------------------------------------------
# decoding. In float32, for the interpreter multiplies no bf16 matrices


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("many", [fast.decode.MAX_ROWS, 0])
@pytest.mark.parametrize("T, d_in, d_out, norm, activation, residual", [
    (1, 40, 24, False, None, False),
    (5, 40, 24, True, None, False),
    (3, 24, 40, True, "square_relu", False),
    (17, 40, 8, False, None, True),
    (5, 40, 24, True, "swiglu", False),
    (18, 24, 9, False, "swiglu", False),
    (100, 24, 40, True, None, True),
])
def test_linear_is_torchs(T, d_in, d_out, norm, activation, residual, many, monkeypatch):
    # 0: the path for many rows, by torch
    monkeypatch.setattr(fast.decode, "MAX_ROWS", many)
    x, weight = rand(1, T, d_in), rand(d_out * (1 + (activation == "swiglu")), d_in, seed=1)
    g, r = (rand(d_in, seed=2) if norm else None), (rand(1, T, d_out, seed=3) if residual else None)
    got = fast.decode.linear(x, weight, g, activation, r, eps=0.1)
    want = (F.rms_norm(x, (d_in,), g, 0.1) if norm else x) @ weight.T
    if activation == "square_relu":
        want = want.relu().square()
    if activation == "swiglu":
        want = F.silu(want[..., :d_out]) * want[..., d_out:]
    if residual:
        want = want + r
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("many", [fast.decode.MAX_ROWS, 0])
def test_linear_takes_rows_of_a_cache_and_of_a_table(many, monkeypatch):
    # 0: the path for many rows, by torch
    monkeypatch.setattr(fast.decode, "MAX_ROWS", many)
    norm, norm2 = rand(16, seed=3), rand(16, seed=4)
    rows, rows2 = torch.tensor([[[4, 0, 2], [1, 3, 1]], [[0, 0, 4], [2, 1, 4]]], device=DEVICE)
    cache, table = rand(2, 5, 16), rand(5, 16, seed=2)
    left, right = torch.stack([cache[b, rows[b]] for b in range(2)]), table[rows2]
    got = fast.decode.linear(cache, rand(8, 16), rows=rows)
    torch.testing.assert_close(got, left @ rand(8, 16).T, rtol=1e-4, atol=1e-4)
    left = F.rms_norm(left, (16,), norm, 1e-5)
    right = F.rms_norm(right, (16,), norm2, 1e-5)
    copy = torch.zeros(2, 6, 8, device=DEVICE)
    at = torch.tensor([[5, 1, 2], [0, 3, 4]], device=DEVICE)
    got = fast.decode.linear(
        cache, rand(8, 32, seed=5), norm, rows=rows, second=(table, norm2, rows2), copy=(copy, at)
    )
    want = torch.cat((left, right), -1) @ rand(8, 32, seed=5).T
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for b in range(2):
        assert torch.equal(copy[b, at[b]], got[b]) and copy[b].abs().sum(-1).count_nonzero() == 3


on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA GPU: the interpreter leaves products to numpy"
)


@on_a_gpu
def test_a_row_is_the_same_to_the_last_bit_whatever_is_beside_it():
    x = rand(1, 100, 40).bfloat16()
    weight = rand(24, 40, seed=1).bfloat16()
    g = rand(40, seed=2).bfloat16()
    together = fast.decode.linear(x, weight, norm=g)
    for rows in (slice(0, 1), slice(3, 8), slice(15, 18), slice(50, 100)):
        assert torch.equal(fast.decode.linear(x[:, rows], weight, norm=g), together[:, rows])
    gpt = model.GPT(model.GPTConfig(n_embd=32, n_head=2)).to(DEVICE)
    qkv, pos = rand(1, 5, 96, seed=4).bfloat16(), torch.arange(200, 205, device=DEVICE)[None]
    caches = [rand(2, 1, 2, 210, 16, seed=5).bfloat16().unbind(0) for _ in range(2)]
    together = fast.decode.attention(qkv, gpt.rope, caches[0], pos, 2)
    alone = []
    for row, p in zip(qkv.split(1, 1), pos.split(1, 1)):
        alone.append(fast.decode.attention(row.contiguous(), gpt.rope, caches[1], p, 2))
    assert torch.equal(torch.cat(alone, 1), together)


@pytest.mark.parametrize("G", [4, 2, 1])
def test_attention_is_the_models(G):
    """after a prefix, over a stale draft, rows of two sequences at positions of their own"""
    shape = dict(vocab_size=9, block_size=16, n_layer=1, n_head=4, n_embd=64, n_mtp=1)
    config = model.GPTConfig(**shape, n_kv_head=G, rope_base=50.0)
    attn, gpt = model.Attention(config).to(DEVICE), model.GPT(config).to(DEVICE)
    caches = [(rand(2, G, 16, 16, seed=4), rand(2, G, 16, 16, seed=5)) for _ in range(2)]
    x, pos = rand(2, 3, 64), torch.tensor([[5, 6, 7], [0, 0, 1]], device=DEVICE)
    # near the start of a text, a draft does row 0 repeatedly
    x[1, 1] = x[1, 0]
    positions = gpt.positions(model.Cache(gpt, 2, 16, 1), pos)
    with torch.no_grad():
        want = attn(x, positions, caches[0])
        qkv = attn.qkv(x)
        got = fast.decode.attention(qkv, gpt.rope, caches[1], pos, 4)
        torch.testing.assert_close(attn.proj(got), want, rtol=1e-5, atol=1e-5)
        for a, b in zip(caches[0], caches[1]):
            torch.testing.assert_close(a, b)


LLAMA = dict(n_head=2, n_kv_head=1, n_embd=32, swiglu=24, rope_base=50.0, norm_eps=0.1)
both_kinds = pytest.mark.parametrize("options", [{}, LLAMA], ids=["plain", "llama"])


def toy(**options):
    shape = dict(vocab_size=11, block_size=12, n_layer=1, n_head=1, n_embd=16, n_mtp=2)
    gpt = model.GPT(model.GPTConfig(**{**shape, **options})).to(DEVICE)
    with torch.no_grad():
        for p in gpt.parameters():
            p.copy_(rand(*p.shape, seed=p.numel()) / p.size(-1) ** 0.5)
    return gpt


@pytest.mark.parametrize("heads, temperature, rule", [
    (0, 0.0, "residual"),
    (2, 0.0, "residual"),
    (2, 1.0, "residual"),
    (2, 1.0, "point"),
    (2, 1.0, "match"),
    ("auto", 1.0, "residual"),
])
@both_kinds
def test_one_seed_is_one_text_with_and_without_the_fast_path(heads, temperature, rule, options):
    gpt, texts = toy(**options), {}
    for path in ("on", "off", "auto"):
        generator = torch.Generator(DEVICE).manual_seed(1)
        options = dict(heads=heads, temperature=temperature, accept=rule, generator=generator)
        texts[path], _ = decode.generate(gpt, [[1, 2, 3], [4]], 4, fast=path, **options)
    assert texts["on"] == texts["off"] == texts["auto"]


@pytest.mark.parametrize("rule", ["residual", "match"])
def test_changing_numbers_of_heads_are_those_of_the_plain_decoder(rule, monkeypatch):
    """heads sit out and come back; on a GPU each number has a graph of its own"""
    gpt, results = toy(block_size=40), []
    tokens = 9 if DEVICE == "cpu" else 30                 # a GPU changes every 8 rounds
    for path in ("on", "off"):
        ks = iter([0, 2, 0, 1, 2] * 9)
        monkeypatch.setattr(fast.heads.HeadChoice, "choose", lambda *args: next(ks))
        generator = torch.Generator(DEVICE).manual_seed(1)
        drafts = []
        text, stats = decode.generate(
            gpt, [[1, 2, 3], [4]], tokens, heads="auto", temperature=1.0, accept=rule, fast=path,
            generator=generator, watch=lambda decoder: drafts.append(decoder.n.tolist()),
        )
        results.append((text, stats.drafted, stats.accepted, drafts))
    assert results[0] == results[1]
    assert sum(count > 0 for count in results[0][1]) > 1


@pytest.mark.parametrize("B, ks", [(1, [2, 1] + [0] * 18 + [2, 2]),
                                   (3, [0] * 6 + [2, 1, 2, 0, 0, 2, 1] + [0] * 5 + [2, 2])])
def test_drafts_are_those_of_the_plain_decoder_after_a_pause(B, ks, monkeypatch):
    """heads run over 16 // B rows, and what they lack beyond is rebuilt, by the kernels or not"""
    gpt, results, rebuilt = toy(block_size=40), [], []
    rebuild = decode.Decoder.rebuild

    def spy(self, parts, rows):
        rebuilt.append((type(self), [*parts]))
        return rebuild(self, parts, rows)
    monkeypatch.setattr(decode.Decoder, "rebuild", spy)
    for path in ("on", "off"):
        wanted = iter(ks * 9)
        monkeypatch.setattr(fast.heads.HeadChoice, "choose", lambda *args: next(wanted))
        generator = torch.Generator(DEVICE).manual_seed(1)
        rounds, going = [], []

        def watch(decoder):
            for b in going:                               # at the beginning of the last round
                rounds.append((b, int(decoder.n[b]), decoder.drafts[b].tolist()))
            going[:] = (decoder.n < decoder.limit).nonzero().flatten().tolist()
        text, _ = decode.generate(
            gpt, [[1, 2, 3], [4], [5, 6]][:B], 26, heads="auto", temperature=1.0, fast=path,
            generator=generator, watch=watch,
        )
        results.append((text, rounds))
    assert results[0] == results[1]
    if DEVICE == "cpu":                                   # a GPU seldom changes
        assert (fast.decode.FastDecoder, [1, 2]) in rebuilt


def test_a_model_that_is_moved_leaves_the_angles_that_recorded_kernels_read():
    gpt = toy()
    wrapped = fast.decode.FastModel(gpt)
    gpt.to(DEVICE)                                        # makes another table of angles
    assert wrapped.rope is not gpt.rope and torch.equal(wrapped.rope, gpt.rope)
    cache = model.Cache(gpt, 1, 8, 2)
    assert wrapped.positions(cache, torch.zeros(1, 1, dtype=torch.long)).rope is wrapped.rope


def test_auto_chooses_among_the_numbers_that_have_a_graph():
    gpt = toy(n_mtp=11, block_size=40)
    decoder = decode.make_decoder(gpt, 1, 30, "auto", fast="on")
    allowed = [k for k in range(12) if decoder.auto.costs[k] < torch.inf]
    assert allowed == [0, 1, 2, 4, 6, 8, 11]
    assert decoder.least_width == 16 and decode.make_decoder(gpt, 3, 30, fast="on").least_width == 5
    assert decode.make_decoder(gpt, 1, 30, "auto", fast="off").auto.costs.max() < torch.inf


@both_kinds
def test_steps_are_the_models(options):
    """trunk, heads and logits, number by number"""
    gpt, results = toy(**options), []
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]], device=DEVICE)
    pos = torch.tensor([[0, 1, 2], [0, 1, 2]], device=DEVICE)
    for path in (gpt, fast.decode.FastModel(gpt)):
        cache = model.Cache(gpt, 2, 12, 2)
        with torch.no_grad():
            positions = path.positions(cache, pos)
            hidden = [path.trunk_step(tokens, cache, positions)]
            hidden += [path.head_step(k, tokens, cache, positions) for k in (1, 2)]
            logits = [path.logits(k, h) for k, h in enumerate(hidden)]
        results.append([*logits, *[x for pair in cache.kv for x in pair], *cache.hidden])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_in_the_model():
    """a model that was decoded fast is what it was"""
    gpt = toy()
    before = {name: dict(vars(module)) for name, module in gpt.named_modules()}
    decoder = decode.make_decoder(gpt, 1, 10, 2, fast="on")
    assert isinstance(decoder, fast.decode.FastDecoder) and "fast" in decoder.why
    decode.run_decoder(decoder, [[1, 2]], 6)
    after = {name: dict(vars(module)) for name, module in gpt.named_modules()}
    assert {n: v.keys() for n, v in before.items()} == {n: v.keys() for n, v in after.items()}
    for name, attributes in before.items():
        for key, value in attributes.items():
            assert isinstance(value, (bool, int, float)) or value is after[name][key]


def test_auto_falls_back_and_on_does_not(monkeypatch):
    shape = dict(vocab_size=9, block_size=12, n_layer=1, n_embd=32, n_mtp=1)
    for n_head, dtype, found in ((4, torch.float32, "not 8"), (1, torch.float64, "float64")):
        gpt = model.GPT(model.GPTConfig(n_head=n_head, **shape)).to(DEVICE, dtype)
        with pytest.raises(decode.UserError, match=f"{found}.*auto or off"):
            decode.make_decoder(gpt, 1, 8, 1, fast="on")
        decoder = decode.make_decoder(gpt, 1, 8, 1, fast="auto")
        assert type(decoder) is decode.Decoder and found in decoder.why

    def broken(*args, **options):
        raise RuntimeError("no compiler here\nmore lines")
    gpt = toy()
    with monkeypatch.context() as patch:
        patch.setattr(fast.decode.FastDecoder, "__init__", broken)
        decoder = decode.make_decoder(gpt, 1, 8, 1, fast="auto")
        assert type(decoder) is decode.Decoder
        assert "no compiler here" in decoder.why and "more lines" not in decoder.why
        with pytest.raises(RuntimeError, match="no compiler"):
            decode.make_decoder(gpt, 1, 8, 1, fast="on")
    monkeypatch.setattr(fast.decode.triton, "__version__", "3.4.1")
    assert fast.decode.unsupported(gpt) == "needs Triton 3.5 or later, found Triton 3.4.1"
    with pytest.raises(decode.UserError, match="fast is 'maybe'"):
        decode.make_decoder(gpt, 1, 8, 1, fast="maybe")


@on_a_gpu
def test_what_a_decoder_leaves_behind_is_not_freed_while_another_one_is_recorded():
    """the garbage collector would come in the middle of it"""
    gpt = toy(block_size=40)
    limits = gc.get_threshold()
    gc.set_threshold(20, 1, 1)
    try:
        texts = [decode.generate(gpt, [[1, 2]], 9, heads="auto", fast="on")[0] for _ in range(4)]
    finally:
        gc.set_threshold(*limits)
    assert texts == texts[:1] * 4 and gc.isenabled()


@on_a_gpu
@pytest.mark.parametrize("options", [{}, dict(n_kv_head=2, swiglu=512, rope_base=1e5)])
@pytest.mark.parametrize("heads", [1, 4, "auto"])
def test_in_bf16_the_text_is_plain_decodings_to_the_last_token(heads, options):
    torch.manual_seed(0)
    shape = dict(vocab_size=512, block_size=256, n_layer=4, n_head=4, n_embd=256, n_mtp=4)
    gpt = model.GPT(model.GPTConfig(**shape, **options)).to("cuda", torch.bfloat16)
    for n in range(8):
        prompt = torch.randint(512, (20 + n,)).tolist()
        texts = [decode.generate(gpt, [prompt], 150, heads=k, fast="on")[0] for k in (0, heads)]
        assert texts[0] == texts[1]


COMPILE = '''
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import fast.decode, fast.loss, model

arch = int(sys.argv[1])
fast.decode.pdl_options = lambda: dict(PDL=arch >= 90)

class Compiled:
    """stands for a kernel: a launch is compiled for the GPU, with this launch's types and
    constants, and not run"""
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self.launch
    def launch(self, *args, num_warps=4, num_stages=3, **named):
        values = {**dict(zip(self.kernel.arg_names, args)), **named}
        kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        fixed, signature, even = {}, {}, {}
        for i, (n, v) in enumerate(values.items()):
            if torch.is_tensor(v):
                even[(i,)] = [["tt.divisibility", 16]]
            if v is None or n in named or n in constants or isinstance(v, int) and v == 1:
                fixed[n] = v
                signature[n] = "constexpr"
            else:
                signature[n] = kind[v.dtype] if torch.is_tensor(v) else "i32"
        source = ASTSource(self.kernel, signature, fixed, even)
        options = dict(num_warps=num_warps, num_stages=num_stages)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        shared = made.metadata.shared
        assert shared <= 99 * 1024, (self.kernel, signature, fixed, shared)
        fetches = "prefetch.global.L2" in made.asm["ptx"]
        assert fetches == (arch >= 90 and "skinny" in self.kernel.__name__)
        print("compiled", self.kernel.__name__)

for module in (fast.decode, fast.loss):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Compiled(getattr(module, name)))
for dtype in (torch.bfloat16, torch.float32):
    llama = dict(n_kv_head=3, swiglu=1536)
    for d, heads, options in ((384, 6, {}), (256, 2, {}), (1280, 10, {}), (576, 9, llama)):
        gpt = model.GPT(model.GPTConfig(9000, 32, 1, heads, d, 2, **options)).to(dtype)
        steps = fast.decode.FastModel(gpt)
        cache, pos = model.Cache(gpt, 1, 20, 2), torch.tensor([[4, 5, 6]])
        positions = steps.positions(cache, pos)
        steps.trunk_step(pos, cache, positions)
        steps.head_step(1, pos, cache, positions)
        steps.logits(0, torch.zeros(1, 3, d, dtype=dtype))
for K, n in ((4, 8), (0, 0)):
    logits = torch.zeros(K + 1, 2, 50304, dtype=torch.bfloat16)
    targets = torch.zeros(2, dtype=torch.long)
    fast.loss.loss_and_grad(logits, targets, torch.ones(K + 1), torch.ones(K), n)
'''


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_they_compile_for_a_gpu_that_is_not_there(arch):
    """the interpreter takes more Python than the compiler does; and a consumer GPU has 99 KB of
    shared memory"""
    root = Path(fast.__file__).parent.parent
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-c", COMPILE, str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(done.stdout.split("compiled ")[1:])
    assert {n.strip() for n in names} == {
        "skinny_matmul_kernel", "attention_kernel", "teacher_kernel", "loss_grad_kernel"
    }
