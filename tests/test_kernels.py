"""kernels.py against distill.py: on a GPU as it is; without one, by Triton's interpreter (tests/conftest.py asks for it)."""
import pytest
import torch

import distill
import kernels

pytestmark = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed (it comes with PyTorch for CUDA)")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
def test_border_is_the_nth_largest(n):
    """of both signs, zeros of both signs, and equals: all that are no smaller than the n-th largest count"""
    V = 64
    special = torch.tensor([0.0, -0.0, 2.0, 2.0, 2.0, -1.0, -1.0, 1e-30])
    row = torch.cat((torch.randn(V - len(special), generator=torch.Generator().manual_seed(1)), special))
    n = int((row > 0).sum()) + 1 if n == "zero" else n         # zero: the border is 0.0, and -0.0 is no smaller
    logits = row.bfloat16().expand(1, 2, V).contiguous().to(DEVICE)
    out = torch.zeros(3, 2, device=DEVICE)
    kernels.teacher_sums[(2,)](logits, out, n, 2, V, 64)
    z = logits[0, 0].double()
    border = z.topk(n).values[-1]
    kept = z[z >= border]
    assert (out[0].double() == border).all()
    torch.testing.assert_close(out[1].double(), kept.logsumexp(0).expand(2), rtol=1e-5, atol=1e-5)
    q = kept.softmax(0)
    torch.testing.assert_close(out[2].double(), (q * q.log()).sum().expand(2), rtol=1e-4, atol=1e-5)


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
