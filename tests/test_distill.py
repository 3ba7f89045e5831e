"""distill.py: against a slow, obvious loss and autograd; divergences by hand; who gets which
gradient; bad input."""
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import distill
from distill import chunk_size, count_top_n, mtp_d_loss, mtp_loss, topn_divergence
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("float64")
KINDS = ["forward", "reverse", "hybrid", "tv"]
V = 32


def make(K=2, B=2, T=9, seed=1):
    """a toy GPT with large random weights, and B texts of T+1 tokens"""
    gen = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=V, block_size=16, n_layer=1, n_head=1, n_embd=8, n_mtp=K))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=gen) * 0.4 + (weight.dim() == 1))
    return model, torch.randint(V, (B, T + 1), generator=gen)


def rand(*shape, seed=0, scale=2.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def close(got, want, atol, what=""):
    torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


def topn_kl(student, teacher, n, direction="forward", detach_teacher=True):
    """the mean of topn_divergence; n is a count or a fraction"""
    n = count_top_n(n, teacher.size(-1))
    return topn_divergence(student, teacher, n, direction, detach_teacher).mean()


# ---- the reference: every logit alive, one head after the other, gradients by autograd


def slow_kl(student, teacher, n, kind, detach=True):
    teacher = teacher.detach() if detach else teacher
    top = teacher.topk(min(n, V) if n >= 1 else round(n * V), dim=-1).indices
    q, p = teacher.gather(-1, top).softmax(-1), student.gather(-1, top).softmax(-1)
    if kind == "tv":
        return (p - q).abs().sum(-1).mean() / 2
    if kind == "hybrid":                                   # KL(q || p) and KL(p || q), half of each
        return ((q - p) * (q.log() - p.log())).sum(-1).mean() / 2
    if kind == "reverse":
        q, p = p, q
    return (q * (q.log() - p.log())).sum(-1).mean()


def slow_loss(
    hidden, weight, targets, *, alpha, beta, ramp=1.0, top_n=0.1, kl="forward",
    detach_teacher=True, shift_labels=0, shift_teacher=0,
):
    """alpha, beta: lists. The shifts are mistakes, made on purpose: see the alignment test"""
    K, T = len(hidden) - 1, targets.size(1)
    main = hidden[0] @ weight.T
    ce, divergence = [F.cross_entropy(main.flatten(0, 1), targets.flatten())], []
    for k in range(1, K + 1):
        # row i of head k predicts targets[:, i+k]; targets K..T-1 have a row of each head
        rows = slice(K - k, T - k)
        logits = hidden[k][:, rows] @ weight.T
        labels = targets.roll(shift_labels, 1)[:, K:]
        ce.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        teacher = main.roll(shift_teacher, 1)[:, K:]
        divergence.append(slow_kl(logits, teacher, top_n, kl, detach_teacher))
    loss = ce[0] + sum(a * c for a, c in zip(alpha, ce[1:], strict=True))
    loss = loss + ramp * sum(b * d for b, d in zip(beta, divergence, strict=True))
    return loss, torch.stack(ce), torch.stack(divergence)


def gradients(model, loss):
    """a weight that the loss never met counts as gradient 0"""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {}
    for name, w in model.named_parameters():
        found[name] = torch.zeros_like(w) if w.grad is None else w.grad
    return found


def compare(model, tokens, alpha, beta, chunk_logits=2**27, **options):
    """mtp_loss == slow_loss: the value, its parts, and the gradient of every parameter"""
    results = []
    for function, more in ((mtp_loss, {"chunk_logits": chunk_logits}), (slow_loss, {})):
        hidden = model(tokens[:, :-1])
        loss, ce, divergence = function(
            hidden, model.weight, tokens[:, 1:], alpha=alpha, beta=beta, **options, **more
        )
        results.append((loss, ce, divergence, gradients(model, loss)))
    (loss, ce, divergence, got), (want_loss, want_ce, want_divergence, want) = results
    close(loss, want_loss, 1e-11)
    # heads with both 0 are left out, and report 0
    used = [k for k in range(len(divergence)) if alpha[k] or beta[k]]
    close(ce[[0] + [k + 1 for k in used]], want_ce[[0] + [k + 1 for k in used]], 1e-11)
    if options.get("ramp", 1) and any(beta):
        close(divergence[used], want_divergence[used], 1e-11)
    for name in want:
        close(got[name], want[name], 1e-11, name)


@pytest.mark.parametrize("detach", [True, False], ids=["detach", "no_detach"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_all_gradients_equal_the_slow_loss(kind, detach):
    model, tokens = make()
    big, small = 2**27, 500  # all targets at once; five at a time, or three
    for n, chunk in (
        (1, big), (2, big), (2, small), (7, big), (7, small), (0.5, small), (V, big), (V + 8, small)
    ):
        compare(
            model, tokens, [0.3, 0.2], [0.5, 0.7], chunk, top_n=n, kl=kind, detach_teacher=detach
        )


@pytest.mark.parametrize("alpha, beta, ramp", [
    ([0.3, 0.1, 0.2], [0.5, 0.9, 0.7], 0.3),
    ([0.3, 0.1, 0.2], [0.5, 0.9, 0.7], 0),
    ([0, 0, 0], [0.5, 0.6, 0.7], 1),
    ([0.3, 0.1, 0.2], [0, 0, 0], 1),
    ([0, 0.1, 0.2], [0, 0.9, 0], 1),
    ([0.3, 0, 0], [0, 0, 0.8], 1),
])
def test_weights_per_head_zeros_and_the_ramp(alpha, beta, ramp):
    model, tokens = make(K=3)
    compare(model, tokens, alpha, beta, 300, ramp=ramp, detach_teacher=False)


def test_one_number_stands_for_every_head_and_the_defaults_are_the_papers():
    model, tokens = make()
    args = model(tokens[:, :-1]), model.weight, tokens[:, 1:]
    want = slow_loss(*args, alpha=[0.3, 0.3], beta=[0.5, 0.5], top_n=0.1)[0]
    for options in (
        {}, {"alpha": 0.3, "beta": 0.5}, {"alpha": [0.3, 0.3], "beta": (0.5, 0.5)}, {"top_n": 0.1}
    ):
        close(mtp_loss(*args, **options)[0], want, 1e-11)


# ---- the divergence, by hand


def test_five_tokens_worked_by_hand():
    # weights of the tokens before normalising (logits are their logarithms), N = 3:
    #             v0  v1  v2  v3  v4
    #   teacher    1   4   2   1   2      its 3 largest: v1, v2, v4   q = 1/2, 1/4, 1/4
    #   student    9   1   1   7   6      at those:      1,  1,  6     p = 1/8, 1/8, 6/8
    # forward  1/2 ln(1/2 : 1/8) + 1/4 ln(1/4 : 1/8) + 1/4 ln(1/4 : 6/8)
    #          = 1/2 ln 4 + 1/4 ln 2 + 1/4 ln 1/3   = 5/4 ln 2 - 1/4 ln 3 = 0.5918
    # reverse  1/8 ln(1/8 : 1/2) + 1/8 ln(1/8 : 1/4) + 6/8 ln(6/8 : 1/4)
    #          = -1/8 ln 4 - 1/8 ln 2 + 6/8 ln 3    = 3/4 ln 3 - 3/8 ln 2 = 0.5640
    # hybrid   the mean of these two                = 7/16 ln 2 + 1/4 ln 3 = 0.5779
    # tv       1/2 (|1/8 - 1/2| + |1/8 - 1/4| + |6/8 - 1/4|) = 1/2 (3/8 + 1/8 + 4/8) = 1/2
    teacher, student = torch.tensor([1.0, 4, 2, 1, 2]).log(), torch.tensor([9.0, 1, 1, 7, 6]).log()
    ln2, ln3 = math.log(2), math.log(3)
    want = {"forward": 5 / 4 * ln2 - 1 / 4 * ln3, "reverse": 3 / 4 * ln3 - 3 / 8 * ln2,
            "hybrid": 7 / 16 * ln2 + 1 / 4 * ln3, "tv": 0.5}
    for kind in KINDS:
        assert topn_kl(student, teacher, 3, kind).item() == pytest.approx(want[kind], abs=1e-14)
        # 2.75 tokens
        assert topn_kl(student, teacher, 0.55, kind).item() == pytest.approx(want[kind], abs=1e-14)
    assert [count_top_n(n, 5) for n in (1e-9, 0.55, 3, 3.0, 9)] == [2, 3, 3, 3, 5]
    # the mean with a row whose KL is 0
    both = topn_kl(torch.stack((student, teacher)), teacher.expand(2, 5), 3)
    assert both.item() == pytest.approx(want["forward"] / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_top_one_is_zero_equal_logits_give_zero_and_nothing_is_negative(kind):
    student, teacher = rand(200, V, seed=1), rand(200, V, seed=2)
    assert topn_kl(student, teacher, 1, kind).item() == 0
    for n in (1, 5, 0.5, V):
        # logits that differ by a constant: the same p
        assert topn_kl(teacher + 3, teacher, n, kind).abs() < 1e-14
        assert all(topn_kl(s, t, n, kind) >= 0 for s, t in zip(student, teacher, strict=True))
    assert topn_kl(student, teacher, 5, kind) > 0.1


def test_all_tokens_is_torchs_full_kl_and_more_than_all_is_the_same():
    student, teacher = rand(3, 4, V, seed=1), rand(3, 4, V, seed=2)
    p, q = student.log_softmax(-1).flatten(0, 1), teacher.log_softmax(-1).flatten(0, 1)
    for n in (V, V + 1, 10 * V):
        want = F.kl_div(p, q, log_target=True, reduction="batchmean")
        close(topn_kl(student, teacher, n), want, 1e-13)
        want = F.kl_div(q, p, log_target=True, reduction="batchmean")
        close(topn_kl(student, teacher, n, "reverse"), want, 1e-13)
    # total variation is 1 minus the acceptance of sampled drafts
    accepted = torch.minimum(p.exp(), q.exp()).sum(-1)
    close(topn_kl(student, teacher, V, "tv"), (1 - accepted).mean(), 1e-13)


def test_ties_at_the_border_take_exactly_n_tokens():
    student = torch.tensor([0.3, -1.0, 2.0, 0.9, -0.4, 1.5])
    for teacher, certain, tied in (
        ([3.0, 1, 1, 1, 0, 0], [0], [1, 2, 3]), ([2.0] * 6, [], [0, 1, 2, 3, 4, 5])
    ):
        teacher = torch.tensor(teacher)
        sets = [certain + list(more) for more in itertools.combinations(tied, 3 - len(certain))]
        # each way to break the tie
        allowed = [slow_kl(student[s], teacher[s], 3, "forward").item() for s in sets]
        assert min(abs(topn_kl(student, teacher, 3).item() - a) for a in allowed) < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_divergence(kind):
    student, teacher = rand(2, 8, seed=1).requires_grad_(), rand(2, 8, seed=2).requires_grad_()
    for n in (3, 8):  # finite differences
        assert torch.autograd.gradcheck(
            partial(topn_kl, n=n, direction=kind, detach_teacher=False), (student, teacher)
        )
    # the whole loss, with its explicit backward, against finite differences too
    model, tokens = make(B=1, T=4)
    hidden, targets = [h.detach().requires_grad_() for h in model(tokens[:, :-1])], tokens[:, 1:]
    options = dict(top_n=7, kl=kind, detach_teacher=False, chunk_logits=100)

    def loss(weight, *hidden):
        return mtp_loss(list(hidden), weight, targets, **options)[0]

    assert torch.autograd.gradcheck(
        loss, (model.weight.detach().requires_grad_(), *hidden), fast_mode=True
    )


# ---- who gets which gradient


@pytest.mark.parametrize("kind", KINDS)
def test_detach_keeps_the_teacher_out(kind):
    student, teacher = rand(4, V, seed=1).requires_grad_(), rand(4, V, seed=2).requires_grad_()
    topn_kl(student, teacher, 7, kind).backward()
    assert teacher.grad is None and student.grad.abs().max() > 1e-3
    topn_kl(student, teacher, 7, kind, detach_teacher=False).backward()
    assert teacher.grad.abs().max() > 1e-3
    # the same in mtp_loss, at the main head's hidden states
    model, tokens = make()

    def main_grad(**options):
        hidden = [h.detach().requires_grad_() for h in model(tokens[:, :-1])]
        options = dict(alpha=0, top_n=7, kl=kind, **options)
        mtp_loss(hidden, model.weight.detach(), tokens[:, 1:], **options)[0].backward()
        return hidden[0].grad

    assert torch.equal(main_grad(beta=2.0), main_grad(beta=1e-9))
    assert (main_grad(beta=2.0, detach_teacher=False) - main_grad(beta=1e-9)).abs().max() > 1e-3


def test_heads_of_weight_zero_leave_the_gradient_of_a_model_without_heads():
    model, tokens = make(K=2)
    plain = make(K=0)[0]
    plain.load_state_dict(
        {name: w for name, w in model.state_dict().items() if not name.startswith("heads.")}
    )
    args = plain(tokens[:, :-1]), plain.weight, tokens[:, 1:]
    want_loss, ce, divergence = mtp_loss(*args)
    assert (len(ce), len(divergence)) == (1, 0)
    loss, ce, divergence = mtp_loss(
        model(tokens[:, :-1]), model.weight, tokens[:, 1:], alpha=0, beta=0
    )
    assert not ce[1:].any() and not divergence.any()
    assert ce[0].item() == pytest.approx(loss.item(), abs=1e-13)
    close(loss, want_loss, 1e-12)
    got = gradients(model, loss)
    for name, want in gradients(plain, want_loss).items():
        close(got[name], want, 1e-12)


def test_backward_scales_and_a_frozen_output_head_is_left_out():
    model, tokens = make()

    def grads(scale, frozen):
        # extend.py trains new heads with all else frozen
        model.embed.weight.requires_grad_(not frozen)
        loss = scale * mtp_loss(model(tokens[:, :-1]), model.weight, tokens[:, 1:])[0]
        return gradients(model, loss)

    one, three, frozen = grads(1, False), grads(3, False), grads(1, True)
    for name in one:
        torch.testing.assert_close(three[name], 3 * one[name])
        torch.testing.assert_close(frozen[name], one[name] * (name != "embed.weight"))


# ---- alignment and denominators


def test_the_comparison_sees_labels_or_a_teacher_shifted_by_one():
    model, tokens = make(K=2)
    args = model(tokens[:, :-1]), model.weight, tokens[:, 1:]
    loss = mtp_loss(*args, alpha=0.3, beta=0.5, top_n=7)[0].item()

    def slow(**shift):
        return slow_loss(*args, alpha=[0.3] * 2, beta=[0.5] * 2, top_n=7, **shift)[0].item()

    assert abs(loss - slow()) < 1e-11
    for mistake in (
        {"shift_labels": 1}, {"shift_labels": -1}, {"shift_teacher": 1}, {"shift_teacher": -1}
    ):
        assert abs(loss - slow(**mistake)) > 1e-2, mistake


def test_a_head_that_predicts_what_the_main_head_predicts_has_no_divergence():
    # head k's row i and the main head's row i+k predict the same token: copied there, the KL is 0
    # and the CE the same
    K, T, d, targets = 3, 9, 8, torch.arange(18).view(2, 9)
    main, weight = rand(2, T, d, seed=3), rand(V, d, seed=4, scale=0.5)
    heads = [main[:, k:] for k in range(1, K + 1)]
    _, ce, divergence = mtp_loss([main, *heads], weight, targets, top_n=7)
    assert divergence.abs().max() < 1e-14
    want = F.cross_entropy((main @ weight.T)[:, K:].flatten(0, 1), targets[:, K:].flatten())
    close(ce[1:], want.expand(K), 1e-12)
    for off in (-1, 1):  # each head's rows one position off
        heads = [main.roll(off, 1)[:, k:] for k in range(1, K + 1)]
        _, _, divergence = mtp_loss([main, *heads], weight, targets, top_n=7)
        assert divergence.min() > 0.1


def test_everything_is_a_mean():
    model, tokens = make(B=2)
    one, two = (
        mtp_loss(model(t[:, :-1]), model.weight, t[:, 1:]) for t in (tokens, tokens.repeat(2, 1))
    )
    for a, b in zip(one, two, strict=True):  # the loss, the CE, the KL
        close(a, b, 1e-12)
    # a model that knows nothing: ln V from every head, and the sum of the weights times that
    hidden = [torch.zeros(2, 9 - k, 8) for k in range(3)]
    loss, ce, _ = mtp_loss(hidden, model.weight, tokens[:, 1:], alpha=[0.3, 0.1])
    torch.testing.assert_close(ce, torch.full((3,), math.log(V)))
    assert loss.item() == pytest.approx(1.4 * math.log(V))


# ---- chunks


def test_chunks_cover_all_targets_and_stay_small():
    sizes = [(1, 2, 7, 11, 12, 97, 1024), (1, 30, 1000), (1, 100, 5000, 2**27)]
    for targets, row, limit in itertools.product(*sizes):
        size = chunk_size(targets, row, limit)
        assert 1 <= size <= targets and (size == 1 or size * row <= limit), (targets, row, limit)
        # chunks of one size, the last maybe shorter
        assert size == targets or size == -(-targets // -(-targets // size))
        # and no smaller than need be
        assert size == targets or 2 * size * row > limit - row


def test_a_ragged_last_chunk_and_how_many_logits_are_alive():
    model, tokens = make(B=1, T=13)  # K = 2: 11 targets, a prime, have a row of each head
    sizes = []

    def watched(logits, *args):
        sizes.append(logits.size(1))
        return distill.loss_and_grad(logits, *args)

    for targets, want in ((11, [11]), (6, [6, 5]), (4, [3, 3, 3, 2]), (1, [1] * 11)):
        compare(model, tokens, [0.3, 0.2], [0.5, 0.7], chunk_logits=targets * 3 * V, top_n=2)
        sizes.clear()
        options = dict(chunk_logits=targets * 3 * V, grad_function=watched)
        mtp_loss(model(tokens[:, :-1]), model.weight, tokens[:, 1:], **options)
        assert sizes == want


def test_the_plain_loss_is_the_loss_of_logits_that_are_aligned():
    """mtp_d_loss, which a reader meets first, on the K+1 rows of logits that predict the same
    targets"""
    model, tokens = make(K=2, B=1, T=9)
    logits = model.all_logits(tokens[:, :-1])
    rows = torch.stack([x[0, 2 - k : 9 - k] for k, x in enumerate(logits)])           # (3, 7, V)
    alpha, beta = torch.tensor([1.0, 0.3, 0.2]), torch.tensor([0.5, 0.7])
    loss, ce, kl = mtp_d_loss(rows, tokens[0, 3:], alpha, beta, 7)
    options = dict(alpha=[0.3, 0.2], beta=[0.5, 0.7], top_n=7)
    hidden = model(tokens[:, :-1])
    _, want_ce, want_kl = mtp_loss(hidden, model.weight, tokens[:, 1:], **options)
    close(ce[1:], want_ce[1:], 1e-12)
    close(kl, want_kl, 1e-12)
    close(loss, ce[0] + alpha[1:] @ ce[1:] + beta @ kl, 1e-12)
    assert mtp_d_loss(rows, tokens[0, 3:], alpha, beta, 0)[2].eq(0).all()


def test_a_new_divergence_is_one_function_and_one_entry(monkeypatch):
    """added from outside, it trains through mtp_loss, with autograd's gradients of the undivided
    loss"""
    def js(log_p, log_q):
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (distill.forward_kl(log_m, log_p) + distill.forward_kl(log_m, log_q)) / 2

    monkeypatch.setitem(distill.DIVERGENCES, "js", js)
    for detach in (True, False):
        model, tokens = make(K=2)
        options = dict(kl="js", top_n=7, chunk_logits=500, detach_teacher=detach)
        hidden = model(tokens[:, :-1])
        loss, _, divergence = mtp_loss(hidden, model.weight, tokens[:, 1:], **options)
        got = gradients(model, loss)
        logits = model.all_logits(tokens[:, :-1])
        rows = torch.stack([x[:, 2 - k : 9 - k] for k, x in enumerate(logits)])    # (3, B, 7, V)
        main = rows[0].detach() if detach else rows[0]
        top = main.topk(7).indices
        p = rows[1:].gather(-1, top.expand(2, -1, -1, -1)).softmax(-1)
        q = main.gather(-1, top).softmax(-1)
        m = (p + q) / 2
        want_divergence = ((p * (p / m).log() + q * (q / m).log()) / 2).sum(-1).mean((1, 2))
        ce = [F.cross_entropy(x.flatten(0, 1), tokens[:, 3:].flatten()) for x in rows[1:]]
        main_ce = F.cross_entropy(logits[0].flatten(0, 1), tokens[:, 1:].flatten())
        want = gradients(model, main_ce + 0.3 * sum(ce) + 0.5 * want_divergence.sum())
        close(divergence, want_divergence.detach(), 1e-12)
        for name in want:
            close(got[name], want[name], 1e-10, name)


# ---- number formats


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_logits_are_reduced_in_float32(kind):
    student, teacher = rand(50, 4096, seed=1).bfloat16(), rand(50, 4096, seed=2).bfloat16()
    for n in (7, 4096):
        got = topn_kl(student, teacher, n, kind)
        want = topn_kl(student.float(), teacher.float(), n, kind)
        assert got.dtype == torch.float32
        # in bf16 the two are 1e-2 apart
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    # mtp_loss: small whole numbers and quarters, whose products are exact in bf16, so that the
    # logits are the same
    gen = torch.Generator().manual_seed(3)
    hidden = [torch.randint(-1, 2, (2, 9 - k, 8), generator=gen).bfloat16() for k in range(3)]
    weight = torch.randint(-4, 5, (512, 8), generator=gen).bfloat16() / 4
    targets = torch.randint(512, (2, 9), generator=gen)
    single = [h.float() for h in hidden]
    low = mtp_loss(hidden, weight, targets, kl=kind)
    for a, b in zip(low, mtp_loss(single, weight.float(), targets, kl=kind), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    # autocast: as if float32 states and weights had been rounded before, so that no float32 copy of
    # them is kept
    seen = []

    def watched(logits, *args):
        seen.append(logits.dtype)
        return distill.loss_and_grad(logits, *args)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = mtp_loss(
            single, weight.float() * (1 + 1e-4), targets, kl=kind, grad_function=watched
        )
    assert all(torch.equal(a, b) for a, b in zip(auto, low, strict=True))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: only there is it compiled"
)
def test_the_compiled_loss_equals_the_plain_one():
    hidden = [rand(2, 65 - k, 16, seed=k).float().cuda() for k in range(3)]
    weight = rand(1024, 16, seed=7, scale=0.5).float().cuda()
    targets = torch.arange(130).view(2, 65).cuda()

    def run(function):
        leaves = [h.clone().requires_grad_() for h in (weight, *hidden)]
        options = dict(top_n=32, detach_teacher=False, grad_function=function)
        loss, *parts = mtp_loss(leaves[1:], leaves[0], targets, **options)
        return [loss.detach(), *parts, *torch.autograd.grad(loss, leaves)]

    compiled = partial(distill.loss_and_grad, loss=torch.compile(mtp_d_loss, dynamic=False))
    for a, b in zip(run(compiled), run(distill.loss_and_grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- bad input


@pytest.mark.parametrize("options, found", [
    ({"top_n": 0}, "top_n is 0"),
    ({"top_n": -3}, "top_n is -3"),
    ({"top_n": 1.5}, "top_n is 1.5"),
    ({"top_n": -0.1}, "top_n is -0.1"),
    ({"top_n": float("nan")}, "top_n is nan"),
    ({"kl": "jeffreys"}, "'jeffreys'"),
    ({"alpha": [0.3]}, r"alpha is \[0.3\].* 2 heads"),
    ({"beta": [1, 2, 3]}, r"beta is \[1, 2, 3\].* 2 heads"),
    ({"alpha": -0.1}, "alpha is -0.1"),
    ({"beta": [0.5, -1]}, r"beta is \[0.5, -1\]"),
])
def test_bad_options_say_what_is_wrong(options, found):
    model, tokens = make()
    with pytest.raises(ValueError, match=found):
        mtp_loss(model(tokens[:, :-1]), model.weight, tokens[:, 1:], **options)
    if "top_n" in options:
        with pytest.raises(ValueError, match=found):
            topn_kl(rand(2, V), rand(2, V), options["top_n"])


def test_windows_too_short_for_the_heads_say_so():
    model, tokens = make(K=2, T=2)
    with pytest.raises(ValueError, match="got 2 tokens for 2 MTP heads; .* at least 3"):
        mtp_loss(model(tokens[:, :-1]), model.weight, tokens[:, 1:])
    model, tokens = make(K=2, T=3)  # the shortest: one target has a row of each head
    compare(model, tokens, [0.3, 0.2], [0.5, 0.7], top_n=7)
