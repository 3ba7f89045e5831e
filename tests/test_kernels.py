"""kernels.py against distill.py: on a GPU as it is; without one, by Triton's interpreter (tests/conftest.py asks for it)."""
import os
import subprocess
import sys

import pytest
import torch

import decode
import distill
import kernels
import model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDED = (3, 5) if DEVICE == "cuda" else (3, 7)                # before 3.7, the interpreter stumbles over today's NumPy
pytestmark = pytest.mark.skipif(kernels.version() < NEEDED, reason=f"needs Triton {NEEDED[0]}.{NEEDED[1]} (it comes with PyTorch for CUDA)")


def distinct(*shape, V, seed):
    """bf16 logits without equals in a row: a border between them is clear"""
    gen = torch.Generator().manual_seed(seed)
    values = torch.linspace(-6, 6, V).bfloat16()
    assert len(values.unique()) == V
    rows = [values[torch.randperm(V, generator=gen)] for _ in range(torch.Size(shape).numel())]
    return torch.stack(rows).view(*shape, V).to(DEVICE)


def slow(logits, targets, alpha, beta, n):
    """distill.py's functions, in float64"""
    logits, alpha, beta = logits.double(), alpha.double(), beta.double()
    ce, grad = distill.cross_entropy_grad(logits, targets, alpha)
    kl = torch.zeros_like(beta)
    if n:
        top = logits[0].topk(n).indices
        kl, _ = distill.add_divergence_grad(grad[1:], logits[1:], logits[0], top, beta, "forward")
    return ce, kl, grad


@pytest.mark.parametrize("R, V, n", [(1, 40, 0), (3, 40, 0), (3, 40, 7), (2, 40, 1), (3, 40, 40), (5, 70, 33), (2, 64, 63)])
def test_same_as_distill(R, V, n, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)                  # rows take several blocks, the last one a part
    C, gen = 2, torch.Generator().manual_seed(V + n + R)
    logits, targets = distinct(R, C, V=V, seed=n), torch.randint(V, (C,), generator=gen).to(DEVICE)
    alpha, beta = torch.tensor([1.0, 0.3, 0.2, 0.0, 0.5])[:R].to(DEVICE), torch.tensor([0.5, 0.7, 1.0, 0.1])[: R - 1].to(DEVICE)
    before = logits.clone()
    ce, kl, grad = kernels.loss_and_grad(logits, targets, alpha, beta, n)
    want = slow(logits, targets, alpha, beta, n)
    assert torch.equal(logits, before) and grad.dtype == torch.bfloat16
    torch.testing.assert_close(ce.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl.double(), want[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.double(), want[2], rtol=2**-7, atol=1e-6)       # bf16 keeps 8 bits; the interpreter cuts, a GPU rounds


@pytest.mark.parametrize("n", [1, 5, "zero", 63, 64])
def test_the_border_lets_the_n_largest_in(n):
    """of both signs, zeros of both signs, and equals: all that are no smaller than the n-th largest count"""
    V = 64
    special = torch.tensor([0.0, -0.0, 2.0, 2.0, 2.0, -1.0, -1.0, 1e-30])
    row = torch.cat((torch.randn(V - len(special), generator=torch.Generator().manual_seed(1)), special))
    n = int((row > 0).sum()) + 1 if n == "zero" else n         # zero: the border is 0.0, and -0.0 is no smaller
    logits = row.bfloat16().expand(1, 2, V).contiguous().to(DEVICE)
    out = torch.zeros(3, 2, device=DEVICE)
    kernels.teacher_sums[(2,)](logits, out, n, 2, V, 16)
    z = logits[0, 0].double()
    kept = z[z >= z.topk(n).values[-1]]
    assert all(torch.equal(z[z >= border], kept) for border in out[0].double())
    torch.testing.assert_close(out[1].double(), kept.logsumexp(0).expand(2), rtol=1e-5, atol=1e-5)
    q = kept.softmax(0)
    torch.testing.assert_close(out[2].double(), (q * q.log()).sum().expand(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("V, n", [(9, 0), (9, 4), (4096, 0)])
def test_a_vocabulary_shorter_than_a_block(V, n):
    """threads that never see a word add nothing"""
    logits, targets = distinct(2, 1, V=V, seed=1) if V < 100 else rand(2, 1, V).bfloat16(), torch.tensor([V - 1], device=DEVICE)
    alpha, beta = torch.tensor([1.0, 0.3], device=DEVICE), torch.tensor([0.5], device=DEVICE)
    for got, want in zip(kernels.loss_and_grad(logits, targets, alpha, beta, n), slow(logits, targets, alpha, beta, n)):
        torch.testing.assert_close(got.double(), want.double(), rtol=2**-7, atol=1e-5)


def test_a_student_far_from_the_teacher():
    """N = 1: P~ and Q~ are both all on one word, however little the student gives it"""
    logits = torch.zeros(2, 1, 40, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 0, 3], logits[1, 0, 7], logits[1, 0, 3] = 4.0, 40.0, -40.0
    alpha, beta = torch.zeros(2, device=DEVICE), torch.ones(1, device=DEVICE)
    _, kl, grad = kernels.loss_and_grad(logits, torch.tensor([0], device=DEVICE), alpha, beta, 1)
    assert kl.abs().max() < 1e-4 and grad.abs().max() < 1e-2


def test_a_head_without_beta_has_no_kl():
    logits, targets = distinct(3, 2, V=40, seed=1), torch.tensor([3, 5], device=DEVICE)
    alpha, beta = torch.tensor([1.0, 0.3, 0.3], device=DEVICE), torch.tensor([0.0, 0.5], device=DEVICE)
    _, kl, grad = kernels.loss_and_grad(logits, targets, alpha, beta, 8)
    assert kl[0] == 0 and kl[1] > 0
    assert torch.equal(grad[1], kernels.loss_and_grad(logits, targets, alpha, 0 * beta, 0)[2][1])


def test_chunk_loss_takes_them(monkeypatch):
    """chunk_loss with the kernels equals chunk_loss without, on bf16 hidden states; other losses stay with torch"""
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, 16, generator=gen).bfloat16().to(DEVICE), torch.randn(50, 16, generator=gen).bfloat16().to(DEVICE)
    targets = torch.randint(50, (4,), generator=gen).to(DEVICE)
    alpha, beta = torch.tensor([1.0, 0.3, 0.3], device=DEVICE), torch.tensor([0.5, 0.5], device=DEVICE)
    calls, real = [], kernels.loss_and_grad
    monkeypatch.setattr(kernels, "loss_and_grad", lambda *a: calls.append(1) or real(*a))

    def loss(fused, *options):
        monkeypatch.setattr(distill, "fused", fused)
        return distill.chunk_loss(hidden, weight, targets, alpha, beta, *options)

    for got, want in zip(loss(True, 50, "forward", True), loss(False, 50, "forward", True)):
        torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.02)
    assert calls == [1]
    for options in ((50, "reverse", True), (50, "tv", True), (50, "forward", False)):
        loss(True, *options)
    assert calls == [1]
    loss(True, 0, "reverse", False)                            # without the KL, its kind does not matter
    assert calls == [1, 1]


# -----------------------------------------------------------------------------
# decoding. In float32, for the interpreter multiplies no bf16 matrices

def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("T, d_in, d_out, norm, relu, residual", [
    (1, 40, 24, False, False, False), (5, 40, 24, True, False, False), (3, 24, 40, True, True, False), (17, 40, 8, False, False, True)])
def test_linear_is_torchs(T, d_in, d_out, norm, relu, residual):
    x, weight = rand(1, T, d_in), rand(d_out, d_in, seed=1)
    g, r = (rand(d_in, seed=2) if norm else None), (rand(1, T, d_out, seed=3) if residual else None)
    want = torch.nn.functional.linear(x if g is None else torch.nn.functional.rms_norm(x, (d_in,), g, 1e-5), weight)
    want = want.relu().square() if relu else want + r if residual else want
    torch.testing.assert_close(kernels.linear(x, weight, g, relu, r), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("many", [32, 0])
def test_linear_takes_rows_of_a_cache_and_of_a_table(many, monkeypatch):
    monkeypatch.setattr(kernels, "MANY", many)                 # 0: the way of the many rows, by torch
    norm, norm2 = rand(16, seed=3), rand(16, seed=4)
    rows, rows2 = torch.tensor([[[4, 0, 2], [1, 3, 1]], [[0, 0, 4], [2, 1, 4]]], device=DEVICE)
    cache, table = rand(2, 5, 16), rand(5, 16, seed=2)
    left, right = torch.stack([cache[b, rows[b]] for b in range(2)]), table[rows2]
    torch.testing.assert_close(kernels.linear(cache, rand(8, 16), rows=rows), left @ rand(8, 16).T, rtol=1e-4, atol=1e-4)
    both = torch.cat((torch.nn.functional.rms_norm(left, (16,), norm, 1e-5), torch.nn.functional.rms_norm(right, (16,), norm2, 1e-5)), -1)
    copy = torch.zeros(2, 6, 8, device=DEVICE)
    at = torch.tensor([[5, 1, 2], [0, 3, 4]], device=DEVICE)
    got = kernels.linear(cache, rand(8, 32, seed=5), norm, rows=rows, second=(table, norm2, rows2), copy=(copy, at))
    torch.testing.assert_close(got, both @ rand(8, 32, seed=5).T, rtol=1e-4, atol=1e-4)
    for b in range(2):
        assert torch.equal(copy[b, at[b]], got[b]) and copy[b].abs().sum(-1).count_nonzero() == 3


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the interpreter leaves products to numpy")


@on_a_gpu
def test_a_row_is_the_same_to_the_last_bit_whatever_is_beside_it():
    x, weight, g = rand(1, 18, 40).bfloat16(), rand(24, 40, seed=1).bfloat16(), rand(40, seed=2).bfloat16()
    together = kernels.linear(x, weight, norm=g)
    for rows in (slice(0, 1), slice(3, 8), slice(15, 18)):
        assert torch.equal(kernels.linear(x[:, rows], weight, norm=g), together[:, rows])
    gpt = model.GPT(model.GPTConfig(n_embd=32, n_head=2)).to(DEVICE)
    qkv, pos = rand(1, 5, 96, seed=4).bfloat16(), torch.arange(200, 205, device=DEVICE)[None]
    caches = [(rand(1, 2, 210, 16, seed=5).bfloat16(), rand(1, 2, 210, 16, seed=6).bfloat16()) for _ in range(2)]
    together = kernels.attention(qkv, gpt.rope, caches[0], pos, 2)
    alone = [kernels.attention(qkv[:, i : i + 1], gpt.rope, caches[1], pos[:, i : i + 1], 2) for i in range(5)]
    assert torch.equal(torch.cat(alone, 1), together)


def test_attention_is_the_models():
    """after a prefix, over a stale draft, rows of two sequences at positions of their own"""
    config = model.GPTConfig(vocab_size=9, block_size=16, n_layer=1, n_head=2, n_embd=32, n_mtp=1)
    attn, gpt = model.Attention(config).to(DEVICE), model.GPT(config).to(DEVICE)
    caches = [(rand(2, 2, 16, 16, seed=4), rand(2, 2, 16, 16, seed=5)) for _ in range(2)]
    x, pos = rand(2, 3, 32), torch.tensor([[5, 6, 7], [0, 0, 1]], device=DEVICE)
    x[1, 1] = x[1, 0]                                          # near the start of a text, a draft does row 0 repeatedly
    where = gpt.where(model.Cache(config, 2, 16, DEVICE), pos)
    with torch.no_grad():
        want = attn(x, where[3], caches[0], where)
        qkv = attn.qkv(x)
        got = kernels.attention(qkv, gpt.rope, caches[1], pos, 2)
        torch.testing.assert_close(attn.proj(got), want, rtol=1e-5, atol=1e-5)
        for a, b in zip(caches[0], caches[1]):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("heads, temperature", [(0, 0.0), (2, 0.0), (2, 1.0)])
def test_decoding_is_the_same(heads, temperature):
    gpt = model.GPT(model.GPTConfig(vocab_size=11, block_size=12, n_layer=1, n_head=1, n_embd=16, n_mtp=2)).to(DEVICE)
    with torch.no_grad():
        for p in gpt.parameters():
            p.copy_(rand(*p.shape, seed=p.numel()) / p.size(-1) ** 0.5)

    def text():
        generator = torch.Generator(DEVICE).manual_seed(1)
        return decode.generate(gpt, [[1, 2, 3], [4]], 4, heads=heads, temperature=temperature, generator=generator)
    want, _ = text()
    kernels.install(gpt)
    assert text()[0] == want


def test_models_that_they_can_not_take(monkeypatch):
    for changes, dtype, found in ((dict(n_head=4), torch.float32, "and 8"), ({}, torch.float64, "float64")):
        config = {**dict(vocab_size=9, block_size=12, n_layer=1, n_head=1, n_embd=32, n_mtp=1), **changes}
        gpt = model.GPT(model.GPTConfig(**config)).to(dtype)
        with pytest.raises(ValueError, match=f"{found}.*--compile off"):
            kernels.install(gpt)
    monkeypatch.setattr(kernels.triton, "__version__", "3.4.1")
    with pytest.raises(ValueError, match="Triton 3.5 or later.*found Triton 3.4.1"):
        kernels.install(model.GPT(model.GPTConfig(n_embd=32, n_head=2)).to(DEVICE))
    logits = torch.zeros(1, 1, 8, dtype=torch.bfloat16, device=DEVICE)
    assert kernels.usable(logits)
    monkeypatch.setattr(kernels.triton, "__version__", "3.2.0")            # then torch.compile does the loss
    assert not kernels.usable(logits)


@on_a_gpu
@pytest.mark.parametrize("heads", [1, 4])
def test_in_bf16_the_text_is_plain_decodings_to_the_last_token(heads):
    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(vocab_size=512, block_size=256, n_layer=4, n_head=4, n_embd=256, n_mtp=4)).to("cuda", torch.bfloat16)
    for n in range(8):
        prompt = torch.randint(512, (20 + n,)).tolist()
        texts = [decode.generate(gpt, [prompt], 150, heads=k, compile="kernels")[0] for k in (0, heads)]
        assert texts[0] == texts[1]


COMPILE = '''
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels, model

arch = int(sys.argv[1])
kernels.early = lambda: dict(PDL=arch >= 90)

class Compiled:
    """stands for a kernel: a launch is compiled for the GPU, with this launch's types and constants, and not run"""
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self.launch
    def launch(self, *args, num_warps=4, num_stages=3, **named):
        values = {**dict(zip(self.kernel.arg_names, args)), **named}
        fixed = {n: v for n, v in values.items() if v is None or n in named or isinstance(v, int) and v == 1}
        fixed.update({p.name: values[p.name] for p in self.kernel.params if p.is_constexpr})
        kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
        signature = {n: "constexpr" if n in fixed else kind[v.dtype] if torch.is_tensor(v) else "i32" for n, v in values.items()}
        even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(values) if torch.is_tensor(values[n])}
        made = triton.compile(ASTSource(self.kernel, signature, fixed, even), target=GPUTarget("cuda", arch, 32),
                              options=dict(num_warps=num_warps, num_stages=num_stages))
        assert made.metadata.shared <= 99 * 1024, (self.kernel, signature, fixed, made.metadata.shared)
        print("compiled", self.kernel.__name__)

for name in ("few_rows", "attend", "teacher_sums", "loss_grad"):
    setattr(kernels, name, Compiled(getattr(kernels, name)))
for dtype in (torch.bfloat16, torch.float32):
    for d, heads in ((384, 6), (256, 2), (1280, 10)):
        gpt = model.GPT(model.GPTConfig(9000, 32, 1, heads, d, 2)).to(dtype)
        for part in (gpt.blocks[0], gpt.heads[0].block):
            part.forward = __import__("functools").partial(kernels.block, part, kernels.tile_of(gpt))
        cache, pos = model.Cache(gpt.config, 1, 20, None, dtype), torch.tensor([[4, 5, 6]])
        where = kernels.where(gpt, cache, pos)
        gpt.blocks[0](torch.zeros(1, 3, d, dtype=dtype), where[3], cache.kv[0], where)
        kernels.head_step(gpt, 1, pos, cache, where)
        kernels.logits(gpt, 0, torch.zeros(1, 3, d, dtype=dtype))
for K, n in ((4, 8), (0, 0)):
    logits = torch.zeros(K + 1, 2, 50304, dtype=torch.bfloat16)
    kernels.loss_and_grad(logits, torch.zeros(2, dtype=torch.long), torch.ones(K + 1), torch.ones(K), n)
'''


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_they_compile_for_a_gpu_that_is_not_there(arch):
    """the interpreter takes more Python than the compiler does; and a consumer GPU has 99 KB of shared memory"""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE, str(arch)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(done.stdout.split("compiled ")[1:])
    assert {n.strip() for n in names} == {"few_rows", "attend", "teacher_sums", "loss_grad"}
