"""
The tests of the exercises of README.md: `python tests/lab.py check N` runs those named test_N_..,
and shows the docstring of the first that fails. They accept every right solution: numbers and
distributions are compared, not the way to them. None holds a solution, so that a hand-out keeps
this file.
"""

import inspect
import itertools
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

import decode
import distill
from model import GPT, Attention, Cache, GPTConfig, Positions

pytestmark = pytest.mark.usefixtures("float64")


def waves(*shape, start=0.0):
    """numbers between -1 and 1 that look random, the same on every computer"""
    n = math.prod(shape)
    return (torch.arange(n) * 12.9898 + start).sin().mul(43.7585).sin().reshape(shape)


def close(got, want, tolerance=1e-9):
    want = torch.as_tensor(want)
    assert tuple(got.shape) == tuple(want.shape), (
        f"shape {tuple(got.shape)}, not {tuple(want.shape)}")
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance)


def make_gpt(**changes):
    config = GPTConfig(
        **{**dict(vocab_size=11, block_size=12, n_layer=1, n_head=2, n_embd=8, n_mtp=0), **changes}
    )
    model = GPT(config).requires_grad_(False).eval()
    for i, weight in enumerate(model.parameters()):
        weight.copy_(waves(*weight.shape, start=i) + (weight.dim() == 1))
    return model


# ---- 1. the causal mask


def attend(attention, x, model=None):
    model = model or make_gpt()
    return attention(x, model.angles(x.size(1)))


def test_1_no_row_sees_a_later_token():
    """Row i of the output may depend on rows 0 .. i of x, and must depend on each of them: is the
    mask on the right side of the diagonal and before the softmax, the softmax over the keys, and
    are a row's heads, not its neighbours, put side by side?"""
    attention, x = make_gpt().blocks[0].attn, waves(1, 6, 8)
    before = attend(attention, x)
    assert before.isfinite().all(), "the output is not finite (0 times inf is nan)"
    for j in range(6):
        changed = x.clone()
        changed[:, j] += 1
        moved = (attend(attention, changed) - before).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [i >= j for i in range(6)], f"which rows see token {j}"


# of the original, which test_model.py compares with loops
WANT_ATTENTION_0 = [
    0.284682, -1.436288, 0.878684, 4.562278, 4.795001, 0.198868, -0.240271, -2.173648
]
WANT_ATTENTION_1 = [1.24668, 1.134382, 1.888008, 1.497136, 0.464638, -0.774961, -1.473743, 0.557055]


def test_1_the_numbers():
    """Are q and k rotated (not v), the scores divided by the root of hd, the softmax taken over the
    keys, the heads put side by side again, and the result sent through proj?"""
    attention, x = make_gpt().blocks[0].attn, waves(2, 3, 8)
    got = attend(attention, x)
    close(got[0, 2], WANT_ATTENTION_0, 1e-6)
    close(got[1, 1], WANT_ATTENTION_1, 1e-6)


WANT_GROUPED = [
    1.787899, -1.084741, 0.469194, 6.48499, 1.533821, 6.44435, 3.618924, -4.266092
]


def test_1_heads_that_share_keys():
    """self.heads holds H, G, G: with G < H, each head of k and v serves H/G heads of q in a row (0
    0 1 1, not 0 1 0 1)."""
    model = make_gpt(n_head=4, n_kv_head=2, n_embd=16)
    got = attend(model.blocks[0].attn, waves(1, 3, 16), model)
    close(got[0, 2, :8], WANT_GROUPED, 1e-6)


def test_1_no_positions():
    """T may be 0 (a text too short for an MTP head): name every size in view and reshape, for -1 is
    ambiguous in an empty tensor."""
    assert attend(make_gpt().blocks[0].attn, waves(2, 0, 8)).shape == (2, 0, 8)


def test_1_on_the_device_of_x():
    """What forward makes anew, the mask, must be on the device of x: device=x.device."""
    model = make_gpt()
    rope = model.angles(3).rope.to("meta")                # a device that computes shapes alone
    attention = model.blocks[0].attn.to("meta")
    got = attention(waves(2, 3, 8).to("meta"), Positions(None, None, None, rope))
    assert got.device.type == "meta" and got.shape == (2, 3, 8)


def assert_cached_steps_equal_the_full_forward():
    model = make_gpt()
    tokens = torch.tensor([[1, 5, 2, 2, 7, 9]])
    want, cache = model.trunk(model.embed(tokens), model.angles(6)), Cache(model, 1, 6, 0)

    def feed(tokens, part):
        positions = model.positions(cache, torch.tensor([part]))
        return model.trunk_step(tokens[:, part], cache, positions)

    for part in ([0, 1, 2], [3], [4, 5]):
        feed(tokens + 1, part)  # rejected drafts: the next step writes over them
        close(feed(tokens, part), want[:, part])


def test_1_with_a_cache_it_is_the_same():
    """Where a cache is given, forward leaves the attention itself to attend_to_cache(q, k, v,
    positions, cache)."""
    assert_cached_steps_equal_the_full_forward()


def test_1_dropout_keeps_the_mean():
    """Dropout acts in training only, on the attention's weights after the softmax, and scales what
    it keeps by 1 / (1 - p): the mean over many calls is what eval mode gives."""
    attention = make_gpt().blocks[0].attn
    attention.dropout = 0.5
    x = waves(1, 3, 8).expand(20_000, -1, -1)
    want = attend(attention, x[:1])
    close(attend(attention, x[:1]), want, 0)                      # eval mode: no dropout
    attention.train()
    torch.manual_seed(0)
    got = attend(attention, x)
    assert got.std(0).min() > 1e-3, "in training mode nothing is dropped"
    assert ((got.mean(0) - want[0]).abs() / (got.std(0) / len(x) ** 0.5)).max() < 6, (
        "the mean is another")


def test_1_dropout_drops_weights_of_the_attention():
    """Dropout drops whole weights of the attention: in row 0, whose only weight is 1, a head's
    output is either 0 or v / (1 - p), and each head and sequence has its own mask."""
    attention = make_gpt().blocks[0].attn
    attention.proj.weight.copy_(torch.eye(8))
    x = waves(1, 3, 8).expand(2000, -1, -1)
    v = attend(attention, x[:1])[0, 0]
    attention.dropout = 0.5
    attention.train()
    torch.manual_seed(0)
    ratio = (attend(attention, x)[:, 0] / v).view(2000, 2, 4)      # (B, H, hd)
    assert ((ratio - ratio[..., :1]).abs() < 1e-9).all(), "parts of a head's output are dropped"
    kinds = {tuple(row) for row in ratio[..., 0].round(decimals=6).tolist()}
    assert kinds == {(0.0, 0.0), (0.0, 2.0), (2.0, 0.0), (2.0, 2.0)}


# ---- 2. the cascade


class Digits(torch.nn.Module):
    """stands in for a head: appends the digit of the embedding to the number of the hidden state,
    so that the digits of a state say what it has read"""

    runs = 0

    def forward(self, hidden, embed, positions, cache=None):
        assert hidden.shape == embed.shape, (
            f"hidden {tuple(hidden.shape)}, embed {tuple(embed.shape)}")
        found, rows = positions.rope.shape[-2], hidden.shape[1]
        assert found == rows, f"angles of {found} positions for {rows} rows"
        self.runs += 1
        self.rope = positions.rope
        return 10 * hidden + embed


def cascade_of_digits(K, T):
    """-> model, states [h^0, .., h^K] of a text whose token i is the digit i + 1"""
    model = make_gpt(n_mtp=K)
    model.heads = torch.nn.ModuleList(Digits() for _ in range(K))
    digits = torch.arange(1.0, T + 1)[None, :, None].expand(2, T, 8).clone()
    h0 = digits.clone()
    states = model.cascade(h0, digits)
    assert torch.equal(h0, digits), "h0 was changed in place"
    runs = [head.runs for head in model.heads]
    assert max(runs, default=0) < 2, f"heads 1 .. {K} were run {runs} times: each once"
    assert len(states) == K + 1, f"{len(states)} states, not K+1 = {K + 1}"
    return model, states


def test_2_each_state_has_read_what_it_should():
    """Head k at position i reads h^{k-1}_i and the embedding of token i+k. Here the digits of a
    state are the tokens that it has read: h^2_0 is 123."""
    _, states = cascade_of_digits(K=3, T=6)
    want = [[1, 2, 3, 4, 5, 6], [12, 23, 34, 45, 56], [123, 234, 345, 456], [1234, 2345, 3456]]
    for k in range(4):
        assert states[k][0, :, 0].tolist() == want[k], f"h^{k}"
        assert (states[k] == states[k][:1, :, :1]).all(), (
            "sequences or columns of a batch are mixed")


def test_2_positions():
    """Row i of head k stands at position i, as in the trunk: the angles are those of positions 0 ..
    T-k-1."""
    model, _ = cascade_of_digits(K=3, T=6)
    for k, head in enumerate(model.heads, 1):            # rows beyond T-k may be cut afterwards
        rows = 6 - k
        assert torch.equal(head.rope[..., :rows, :], model.angles(rows).rope), f"head {k}"


class Unchanged(torch.nn.Module):
    """stands in for a head's block, so that attention (exercise 1) is not needed"""

    def forward(self, x, positions, cache=None):
        return x


WANT_MIXED = [
    0.419299, -3.576777, -0.964458, 1.992521, -3.978481, -0.907479, 1.727164, 1.042125
]


def test_2_the_numbers():
    """A head joins [hidden; embedding], in this order (MTPHead.forward, which is not emptied): are
    these two handed over in their places?"""
    model = make_gpt(n_mtp=2)
    for head in model.heads:
        head.block = Unchanged()
    states = model.cascade(waves(1, 4, 8), waves(1, 4, 8, start=3.0))
    close(states[2][0, 1], WANT_MIXED, 1e-6)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_2_texts_too_short_for_a_head(T):
    """Entry k is (B, T-k, d), and (B, 0, d) where the text has no more than k tokens: is T - k
    negative somewhere?"""
    _, states = cascade_of_digits(K=4, T=T)
    assert [tuple(h.shape) for h in states] == [(2, max(0, T - k), 8) for k in range(5)]


def test_2_no_heads():
    """With n_mtp = 0 the list holds h^0 alone."""
    _, states = cascade_of_digits(K=0, T=4)
    assert states[0][0, :, 0].tolist() == [1, 2, 3, 4]


def test_2_gradients_reach_the_trunk():
    """Nothing is detached here: the loss of the last head reaches h^0 and the embeddings."""
    model, _ = cascade_of_digits(K=2, T=4)
    h0, embed = waves(1, 4, 8).requires_grad_(), waves(1, 4, 8, start=1.0).requires_grad_()
    model.cascade(h0, embed)[2].sum().backward()
    assert h0.grad[0, :, 0].tolist() == [
        100, 100, 0, 0
    ] and embed.grad[0, :, 0].tolist() == [0, 10, 11, 1]


# ---- 3. the TopN divergence


def five_words():
    """(1, 5) each: the student's and the teacher's logits of the exercise on paper"""
    return torch.tensor([[9.0, 1, 1, 7, 6]]).log(), torch.tensor([[1.0, 4, 2, 1, 2]]).log()


def test_3_five_words():
    """Which tokens count is the teacher's choice; both distributions are softmaxes over these
    tokens alone; DIVERGENCES[kl] takes the student's log-probabilities first."""
    ln2, ln3 = math.log(2), math.log(3)
    student, teacher = five_words()
    for kl, want in (
        ("forward", 5 / 4 * ln2 - ln3 / 4), ("reverse", 3 / 4 * ln3 - 3 / 8 * ln2), ("tv", 0.5)
    ):
        got = distill.topn_divergence(student, teacher, 3, kl, True)
        assert got.tolist() == pytest.approx([want], abs=1e-12), kl


def test_3_one_number_for_each_row():
    """student (K, C, V) and teacher (C, V) give (K, C), no mean: all heads are compared on the
    teacher's tokens."""
    student, teacher = 3 * waves(2, 4, 7), 3 * waves(4, 7, start=2.0)
    got = distill.topn_divergence(student, teacher, 3)
    assert tuple(got.shape) == (2, 4)
    for k, c in itertools.product(range(2), range(4)):
        alone = distill.topn_divergence(student[k, c : c + 1], teacher[c : c + 1], 3)
        close(got[k, c : c + 1], alone)


def test_3_all_tokens_and_one_token():
    """With n = V it is torch's own KL over the whole vocabulary; with n = 1 it is exactly 0."""
    student, teacher = 3 * waves(4, 7), 3 * waves(4, 7, start=2.0)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    close(
        distill.topn_divergence(student, teacher, 7),
        F.kl_div(p, q, log_target=True, reduction="none").sum(-1),
    )
    assert distill.topn_divergence(student, teacher, 1).tolist() == [0, 0, 0, 0]


def test_3_the_stop_gradient():
    """detach_teacher=True: no gradient may reach the teacher's logits; False: it must."""
    for detach in (True, False):
        student, teacher = (3 * waves(2, 4, 7)).requires_grad_(), (
            3 * waves(4, 7, start=2.0)
        ).requires_grad_()
        distill.topn_divergence(student, teacher, 3, "forward", detach).sum().backward()
        reached = teacher.grad is not None and bool(teacher.grad.abs().max() > 1e-3)
        assert reached is not detach
    # where student and teacher come from one tensor, as in mtp_d_loss
    logits = (3 * waves(3, 4, 7)).requires_grad_()
    distill.topn_divergence(logits, logits[0], 3).sum().backward()
    assert logits.grad[0].abs().max() < 1e-12 and logits.grad[1:].abs().amax((1, 2)).min() > 1e-3


def test_3_the_students_gradient():
    """The gradient of the forward KL is p - q on the n tokens, and 0 on all others: is the student
    detached, or taken over all tokens?"""
    student, teacher = five_words()
    student.requires_grad_()
    distill.topn_divergence(student, teacher, 3).sum().backward()
    close(student.grad, [[0, 1 / 8 - 1 / 2, 1 / 8 - 1 / 4, 0, 6 / 8 - 1 / 4]])


def test_3_numbers_that_break_a_careless_softmax():
    """Logits of 2,000 give finite values and gradients (log_softmax, not the logarithm of a
    softmax); bf16 logits, of both, go to float32 before the softmax; float64 stays float64."""
    student = torch.tensor([[2000.0, 0, -2000, 5]]).requires_grad_()
    got = distill.topn_divergence(student, torch.tensor([[0.0, 2000, -2000, 5]]), 3)
    got.sum().backward()
    assert got.isfinite().all() and student.grad.isfinite().all() and got.dtype == torch.float64
    low = waves(4, 7).bfloat16(), waves(4, 7, start=2.0).bfloat16()
    got = distill.topn_divergence(*low, 3)
    assert got.dtype == torch.float32
    close(got, distill.topn_divergence(low[0].float(), low[1].float(), 3), 1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_3_the_logits_stay_as_they_are(detach):
    """topn_divergence changes none of its inputs (detach() shares memory: an operation in place, as
    masked_fill_, overwrites the caller's logits)."""
    logits = 3 * waves(4, 7), 3 * waves(4, 7, start=2.0)
    before = [x.clone() for x in logits]
    distill.topn_divergence(*logits, 3, "forward", detach)
    assert all(map(torch.equal, logits, before))


# ---- 4. alignment, and the loss


@pytest.mark.parametrize("heads", [[0, 1, 2], [0, 2], [0]], ids=str)
def test_4_every_column_has_one_target(heads):
    """hidden[k][:, i] predicts targets[:, i+k]. A column of the result holds what the wanted heads
    say of one target, window after window, and only targets that all K+1 rows predict. Here each
    state is the number of its target."""
    B, T, K = 2, 5, 2
    # 10 .. 14 and 20 .. 24
    targets = 10 * torch.arange(1, B + 1)[:, None] + torch.arange(T)
    hidden = [targets[:, k:, None].expand(B, T - k, 3).double() for k in range(K + 1)]
    rows, labels = distill.aligned(hidden, targets, heads)
    assert labels.tolist() == [12, 13, 14, 22, 23, 24], "targets K .. T-1 of each window"
    assert tuple(rows.shape) == (len(heads), 6, 3), f"shape {tuple(rows.shape)}"
    for row, k in zip(rows, heads):
        assert row[:, 0].tolist() == row[:, 2].tolist() == labels.tolist(), f"head {k}"


def test_4_the_rows_are_those_of_the_wanted_heads():
    """`heads` are numbers of rows of the table, 0 the main head: is row r taken from
    hidden[heads[r]]?"""
    hidden = [torch.full((1, 5 - k, 1), float(k)) for k in range(3)]
    for heads in ([0, 1, 2], [0, 2], [1, 2], [2, 0]):
        rows, _ = distill.aligned(hidden, torch.zeros(1, 5, dtype=torch.long), heads)
        assert rows[:, 0, 0].tolist() == heads


def test_4_gradients_and_short_windows():
    """Nothing is detached: each of the rows hands its gradient on; T = K + 1 leaves one target, T =
    K is a ValueError."""
    hidden = [waves(1, 3 - k, 2).requires_grad_() for k in range(3)]
    rows, labels = distill.aligned(hidden, torch.tensor([[7, 8, 9]]), [0, 1, 2])
    assert labels.tolist() == [9]
    rows.sum().backward()
    assert [h.grad[0, :, 0].tolist() for h in hidden] == [[0, 0, 1], [0, 1], [1]]
    with pytest.raises(ValueError):
        distill.aligned([h[:, :-1] for h in hidden], torch.tensor([[7, 8]]), [0, 1, 2])


def some_logits():
    """logits (K+1, C, V), targets, alpha, beta for K = 2, C = 3, V = 7"""
    logits = (3 * waves(3, 3, 7)).requires_grad_()
    alpha, beta = torch.tensor([0.8, 0.3, 0.2]), torch.tensor([0.5, 0.7])
    return logits, torch.tensor([1, 0, 4]), alpha, beta


def test_4_a_model_that_knows_nothing():
    """All logits equal: the cross-entropy is ln V for each head, a mean over targets and not a sum,
    the KL is 0, and the loss is ln V times the sum of alpha."""
    _, targets, alpha, beta = some_logits()
    loss, ce, kl = distill.mtp_d_loss(torch.zeros(3, 3, 7), targets, alpha, beta, 3)
    close(ce, [math.log(7)] * 3)
    close(kl, [0, 0])
    close(loss, 1.3 * math.log(7))


def test_4_the_cross_entropies():
    """ce[k] is the mean over targets of minus the log-probability that row k gives to the
    target."""
    logits, targets, alpha, beta = some_logits()
    _, ce, _ = distill.mtp_d_loss(logits, targets, alpha, beta, 3)
    log_p = logits.detach().log_softmax(-1)
    for k in range(3):
        close(ce[k], -sum(log_p[k, c, t] for c, t in enumerate(targets.tolist())) / 3)


@pytest.mark.parametrize("kl_name", ["forward", "reverse"])
def test_4_the_divergences(kl_name):
    """kl[k-1] is the mean over targets of topn_divergence between row k, the student, and row 0,
    the teacher, with the options that were given."""
    logits, targets, alpha, beta = some_logits()
    _, _, kl = distill.mtp_d_loss(logits, targets, alpha, beta, 3, kl_name)
    for k in (1, 2):
        close(kl[k - 1], distill.topn_divergence(logits[k], logits[0], 3, kl_name).mean().detach())


def test_4_the_sum():
    """The loss is the sum of alpha[k] CE_k over all rows, and of beta[k-1] KL_k over the heads; the
    parts that are returned beside it carry no gradient."""
    logits, targets, alpha, beta = some_logits()
    loss, ce, kl = distill.mtp_d_loss(logits, targets, alpha, beta, 3)
    close(loss.detach(), alpha @ ce + beta @ kl)
    assert loss.requires_grad and not ce.requires_grad and not kl.requires_grad


@pytest.mark.parametrize("weights", [(0.5, 0.25), (1.0, 1.0)])
def test_4_one_number_for_all_weights(weights):
    """alpha and beta may be plain numbers, one for all heads, as train.evaluate gives them."""
    logits, targets, _, _ = some_logits()
    loss, ce, kl = distill.mtp_d_loss(logits, targets, *weights, 3)
    close(loss.detach(), weights[0] * ce.sum() + weights[1] * kl.sum())
    loss, ce, kl = distill.mtp_d_loss(logits[:1], targets, *weights, 3)
    close(loss.detach(), weights[0] * ce[0])


def test_4_a_weight_of_zero():
    """A weight of 0 takes a term out of the loss; the term is reported all the same."""
    logits, targets, alpha, beta = some_logits()
    _, want_ce, want_kl = distill.mtp_d_loss(logits, targets, alpha, beta, 3)
    alpha, beta = torch.tensor([0.8, 0.0, 0.2]), torch.tensor([0.5, 0.0])
    loss, ce, kl = distill.mtp_d_loss(logits, targets, alpha, beta, 3)
    close(ce, want_ce)
    close(kl, want_kl)
    close(loss.detach(), 0.8 * ce[0] + 0.2 * ce[2] + 0.5 * kl[0])


@pytest.mark.parametrize("detach", [True, False])
def test_4_who_gets_which_gradient(detach):
    """With the stop-gradient, the main head's logits get the gradient of their own cross-entropy
    alone; without it, detach_teacher=False must arrive."""
    logits, targets, alpha, beta = some_logits()
    distill.mtp_d_loss(logits, targets, alpha, beta, 3, "forward", detach)[0].backward()
    own = 0.8 * (logits.detach()[0].softmax(-1) - F.one_hot(targets, 7)) / 3
    same = (logits.grad[0] - own).abs().max() < 1e-9
    assert bool(same) is detach
    ce_alone = (logits.detach()[2].softmax(-1) - F.one_hot(targets, 7)) / 3
    assert (logits.grad[2] - 0.2 * ce_alone).abs().max() > 1e-3, "the KL does not move head 2"


def test_4_without_distillation_and_without_heads():
    """top_n = 0 leaves the KL out (kl is 0, and topn_divergence is not called); K = 0 is a plain
    GPT's loss."""
    logits, targets, alpha, beta = some_logits()
    loss, ce, kl = distill.mtp_d_loss(logits, targets, alpha, beta, 0)
    close(loss.detach(), alpha @ ce)
    assert kl.tolist() == [0, 0]
    loss, ce, kl = distill.mtp_d_loss(logits[:1], targets, alpha[:1], beta[:0], 3)
    close(loss.detach(), 0.8 * ce[0])
    assert tuple(kl.shape) == (0,)


def test_4_bf16_logits_are_summed_in_float32():
    """Cross-entropies of bf16 logits are computed in float32 (to_float32)."""
    logits, targets, alpha, beta = some_logits()
    low = logits.detach().bfloat16()
    weights = alpha.float(), beta.float()
    got = distill.mtp_d_loss(low, targets, *weights, 3)[0]
    want = distill.mtp_d_loss(low.float(), targets, *weights, 3)[0]
    assert got.dtype == torch.float32
    close(got, want, 1e-6)


# ---- 5. acceptance


@pytest.mark.parametrize("choices, want", [
    ([[5, 6, 7, 8, 9], [6, 7, 0, 9], [7, 0, 9]], [2, 1, 0]),
    ([[5, 6, 7, 8, 9], [0, 7, 8, 9], [7, 8, 9]], [0, 2, 2]),
    ([[1, 2, 3, 4], [2, 3, 4]], [1, 1, 1]),
    ([[1, 2, 3, 4], [1, 2, 3]], [0, 0, 0]),
    ([[7, 7, 7, 7, 7], [7, 7, 7, 7], [7, 7, 7], [7, 7]], [3, 3]),
    ([[1, 2, 3, 4, 5], [2, 0, 4, 5], [3, 4, 0], [0, 5]], [2, 0]),
    ([[3, 1, 2]], [0, 0, 0])])
def test_5_how_many_drafts_are_accepted(choices, want):
    """Head k's choice in row i is compared with the main head's in row i+k, the same target; it
    counts only if heads 1 .. k-1 count too; rows 0 .. T-K-1 have all K drafts. Without heads (K =
    0) all lengths are 0."""
    # a second text: all the same
    other = [torch.tensor([row, [8] * len(row)]) for row in choices]
    got = decode.accepted_lengths(other)
    assert tuple(got.shape) == (2, len(want)), f"shape {tuple(got.shape)}, not (B, T-K)"
    assert got[0].tolist() == want and got[1].tolist() == [len(choices) - 1] * len(want)


def test_5_the_choices_stay_as_they_are():
    """accepted_lengths changes none of its inputs."""
    choices = [torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[6, 7, 0, 9]])]
    before = [c.clone() for c in choices]
    decode.accepted_lengths(choices)
    assert all(map(torch.equal, choices, before))


@pytest.mark.parametrize("histogram, ar, car", [
    ([1, 1, 1], [2 / 3, 1 / 2], [2 / 3, 1 / 3]), (
        [10, 0, 20, 10], [3 / 4, 1, 1 / 3], [3 / 4, 3 / 4, 1 / 4]
    ),
    ([0, 0, 5], [1, 1], [1, 1]), ([4, 0, 0], [0, 0], [0, 0]), ([0, 0], [0], [0]), ([3], [], [])])
def test_5_rates(histogram, ar, car):
    """AR_k divides the rounds that accepted head k's draft by those that accepted heads 1 .. k-1's,
    CAR_k by all rounds; 0 where there are none (0/0)."""
    got_ar, got_car = decode.rates(histogram)
    assert list(got_ar) == pytest.approx(ar, rel=0, abs=1e-12)
    assert list(got_car) == pytest.approx(car, rel=0, abs=1e-12)


# ---- 6 and 7. accept rules. All randomness of a rule is in `noise`; sample and bernoulli read it

# row 0, then after d_1 = 0, 1, 2
P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.4, 0.0], [0.25, 0.25, 0.5]])
Q = torch.tensor([[0.2, 0.2, 0.6], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])
# after d_2 = 0, 1, 2
BONUS = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
ROUNDS = 20_000


def some_noise(rule, B, K, V):
    """the random numbers of a round"""
    noise = decode.make_noise(rule, B, K, torch.zeros(V, 1))
    noise.numbers.exponential_(generator=torch.Generator().manual_seed(1))
    return noise


def play(rule):
    """many rounds with K = 2, V = 3 -> accepted (R,), the block of three tokens (R, 3), as far as
    it was emitted"""
    noise = some_noise(rule, ROUNDS, 2, 3)
    if rule == "residual":
        d1 = decode.sample(Q[:1].expand(ROUNDS, 3), noise.draft[:, 0])
        d2 = decode.sample(Q[1 + d1], noise.draft[:, 1])
    else:                                          # any fixed draft: here every pair of tokens
        d1, d2 = torch.arange(ROUNDS) % 3, torch.arange(ROUNDS) // 3 % 3
    drafts = torch.stack((d1, d2), 1)
    draft_probs = torch.stack((Q[0].expand(ROUNDS, 3), Q[1 + d1]), 1)
    target_probs = torch.stack((P[0].expand(ROUNDS, 3), P[1 + d1], BONUS[d2]), 1)
    arguments = target_probs, draft_probs if rule == "residual" else None, drafts, noise
    inputs = target_probs, draft_probs, drafts, noise.numbers
    kept = [x.clone() for x in inputs]
    accepted, token = decode.RULES[rule](*arguments)
    for x, before in zip(inputs, kept):
        assert torch.equal(x, before), "a rule must not change its inputs"
    assert tuple(accepted.shape) == tuple(token.shape) == (ROUNDS,), (
        "accepted and token are (B,) each")
    again = decode.RULES[rule](*arguments)
    assert torch.equal(accepted, again[0]) and torch.equal(token, again[1]), (
        "the only random numbers are those in noise")
    block = torch.cat((drafts, token[:, None]), 1)
    block[torch.arange(ROUNDS), accepted] = token
    return accepted, block, drafts


def assert_frequencies(tokens, probs, what):
    """tokens (n,) against their distribution, six standard deviations wide"""
    for v in range(3):
        p = float(probs[v])
        sigma = (p * (1 - p) / len(tokens)) ** 0.5
        found = float((tokens == v).double().mean())
        assert abs(found - p) <= 6 * sigma + 1e-12, (
            f"{what}: token {v} has {found:.3f}, should be {p:.3f}")


def assert_emits_the_target(rule):
    accepted, block, drafts = play(rule)
    assert_frequencies(block[:, 0], P[0], "the first token")
    if rule != "residual":
        for d in range(3):
            assert_frequencies(
                block[drafts[:, 0] == d, 0], P[0], f"the first token, where the draft was {d}"
            )
    for first in range(3):
        on = (accepted >= 1) & (block[:, 0] == first)
        assert_frequencies(
            block[on, 1], P[1 + first], f"the second token, after an accepted {first}"
        )
        for second in range(3):
            both = (accepted == 2) & (block[:, 0] == first) & (block[:, 1] == second)
            if both.any():
                assert_frequencies(
                    block[both, 2], BONUS[second], f"the bonus token, after {second}"
                )


def assert_accepts(rule, want_first, want_second):
    """how often the first draft is accepted, and the second after it, by first draft"""
    accepted, _, drafts = play(rule)
    for d1 in range(3):
        at = drafts[:, 0] == d1
        rate = float((accepted[at] >= 1).double().mean())
        assert rate == pytest.approx(want_first[d1], abs=3 / int(at.sum()) ** 0.5), (
            f"draft {d1} is accepted")
        for d2 in range(3):
            at = (drafts[:, 0] == d1) & (drafts[:, 1] == d2) & (accepted >= 1)
            if at.any():
                rate = float((accepted[at] == 2).double().mean())
                assert rate == pytest.approx(want_second[d1][d2], abs=3 / int(at.sum()) ** 0.5), (
                    f"draft {d2} after {d1} is accepted")


def assert_certain_token(rule):
    p = F.one_hot(torch.tensor([[3, 3]]), 5).double()
    for value in (0.0, 1e-9, 1.0, 50.0):
        noise = some_noise(rule, 1, 1, 5)
        noise.numbers.fill_(value + 0.1)
        noise.accept.fill_(value)
        _, token = decode.RULES[rule](p, p[:, :1], torch.tensor([[3]]), noise)
        assert token.tolist() == [3]


@pytest.mark.parametrize("rule", ["match", "point"])
def test_6_the_target_distribution(rule):
    """Whatever the drafts are, each emitted token has the distribution of its row of target_probs:
    row a after a accepted drafts; after a rejection `point` may not emit the rejected draft."""
    assert_emits_the_target(rule)


@pytest.mark.parametrize("rule", ["match", "point"])
def test_6_how_often_a_draft_is_accepted(rule):
    """A fixed draft is accepted with its probability under the target, and only if all before it
    were."""
    assert_accepts(rule, P[0].tolist(), P[1:].tolist())


@pytest.mark.parametrize("rule", ["match", "point"])
def test_6_no_drafts(rule):
    """K = 0, a round without drafts, emits a token of row 0 (`decode.py --heads 0` runs match)."""
    noise = some_noise(rule, ROUNDS, 0, 3)
    drafts = torch.zeros(ROUNDS, 0, dtype=torch.long)
    accepted, token = decode.RULES[rule](P[:1].expand(ROUNDS, 1, 3), None, drafts, noise)
    assert not accepted.any()
    assert_frequencies(token, P[0], "the token")


@pytest.mark.parametrize("rule", ["match", "point"])
def test_6_a_certain_token(rule):
    """A token of probability 1 is emitted whatever the random numbers are, even where rounding
    rejects it: residual_probs has the guard for an empty rest."""
    assert_certain_token(rule)


def test_7_the_target_distribution():
    """Each emitted token has the distribution of its row of target_probs: from (p - q)+ after a
    rejection, at the row of the first rejected draft; from row K after none. And the noise that
    sampled the drafts must not serve again."""
    assert_emits_the_target("residual")


def test_7_how_often_a_draft_is_accepted():
    """Draft x is accepted with probability min(1, p(x) / q(x)), and only if all before it were."""
    want = (P / Q).clamp(max=1)
    assert_accepts("residual", want[0].tolist(), want[1:].tolist())


def test_7_where_p_and_q_are_equal():
    """p = q leaves no residual; a rejection by rounding must still emit a possible token:
    residual_probs has the guard."""
    assert_certain_token("residual")
    p = torch.tensor([0.0, 0.5, 0.5, 0.0]).expand(500, 2, 4)
    noise = some_noise("residual", 500, 1, 4)
    # a uniform number of exactly 1: for those who take exp(-noise), and 1 minus it
    for value in (0.0, 1000.0):
        noise.accept.fill_(value)
        _, token = decode.residual(p, p[:, :1], torch.ones(500, 1, dtype=torch.long), noise)
        assert set(token.tolist()) <= {1, 2}


# ---- 8. a whole round


def every_outcome(monkeypatch, function):
    """{result: its probability}, over all outcomes of decode.sample and decode.bernoulli, however
    often they are called"""
    found, waiting = defaultdict(float), [[]]
    while waiting:
        path = waiting.pop()
        taken, weight = [], [1.0]

        def choose(probs, path=path, taken=taken, weight=weight):
            probs = [float(p) for p in probs.flatten()]
            possible = [v for v, p in enumerate(probs) if p > 0]
            if len(taken) == len(path):
                waiting.extend([*taken, other] for other in possible[1:])
                path.append(possible[0])
            taken.append(path[len(taken)])
            weight[0] *= probs[taken[-1]] / sum(probs)
            return torch.tensor(taken[-1])

        def bernoulli(p, noise=None, choose=choose):
            p = torch.as_tensor(p).clamp(0, 1)
            yes = [choose(torch.stack((1 - y, y))) for y in p.flatten()]
            return torch.tensor(yes).bool().view(p.shape)

        with monkeypatch.context() as patch:
            patch.setattr(
                decode, "sample", lambda probs, noise=None: choose(probs).expand(probs.shape[:-1])
            )
            patch.setattr(decode, "bernoulli", bernoulli)
            result = function()
        found[tuple(int(token) for token in result)] += weight[0]
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return found


@pytest.mark.parametrize("length, heads", [(4, 0), (4, 1), (4, 2), (1, 2), (10, 2), (11, 2)])
def test_8_the_next_token_has_the_main_heads_distribution(monkeypatch, length, heads):
    """Whatever a round emitted before, its next token has the distribution of the main head.
    Prompts of 1 token (no h^0 for head 1 to read yet) and contexts (12 here) that are nearly
    full have rounds with fewer drafts, or none. Each choice is made by sample or bernoulli."""
    model = make_gpt(vocab_size=3, n_mtp=2)
    tokens = [1, 0, 2, 2, 0, 1, 1, 2, 0, 0, 1][:length]
    found = every_outcome(monkeypatch, lambda: decode.speculative_round(model, tokens, heads, 3.0))
    assert max(map(len, found)) <= min(heads + 1, 12 - length)
    for i in range(max(map(len, found))):
        for start in {block[:i] for block in found if len(block) > i}:
            logits = model.all_logits(torch.tensor([[*tokens, *start]]))[0][0, -1]
            reached = sum(w for block, w in found.items() if len(block) > i and block[:i] == start)
            for v, p in enumerate((logits / 3).softmax(-1).tolist()):
                begins = sum(w for block, w in found.items() if block[: i + 1] == (*start, v))
                assert begins == pytest.approx(reached * p, abs=1e-10), (
                    f"token {v} after {[*tokens, *start]}")


def test_8_drafts_are_accepted(monkeypatch):
    """Draft k comes from head k, which has read the drafts before it, and is accepted with
    min(1, p/q): a round that drafts less, or from another head, is exact, too, and slower."""
    model = make_gpt(vocab_size=3, n_mtp=2)
    tokens = [1, 0, 2, 2]
    found = every_outcome(monkeypatch, lambda: decode.speculative_round(model, tokens, 2, 3.0))

    def accepted(k, known):  # (V,) how probable it is that head k drafts this token, and is right
        logits = model.all_logits(torch.tensor([known]))
        return torch.minimum(*[(logits[j][0, -1] / 3).softmax(-1) for j in (0, k)])

    first = accepted(1, tokens)
    second = [float(accepted(2, [*tokens, d]).sum()) for d in range(3)]
    both = sum(float(first[d]) * second[d] for d in range(3))
    for n, want in ((1, float(first.sum())), (2, both)):
        assert sum(w for block, w in found.items() if len(block) > n) == pytest.approx(want)


def test_8_the_random_numbers():
    """`noise` is drawn anew in each round, from the generator and by exponential_; each of its
    numbers serves once; and temperature 0, which `probabilities` knows, is greedy."""
    model, known = make_gpt(vocab_size=3, n_mtp=2), {}
    all_logits = model.all_logits

    def remembered(ids):
        key = tuple(ids.flatten().tolist())
        if key not in known:
            known[key] = all_logits(ids)
        return known[key]
    model.all_logits = remembered
    tokens = [1, 0, 2, 2]

    def blocks(seed, rounds):
        generator = torch.Generator().manual_seed(seed)
        return [decode.speculative_round(model, tokens, 2, 3.0, generator) for _ in range(rounds)]

    def probs(known):
        return (model.all_logits(torch.tensor([known]))[0][0, -1] / 3).softmax(-1)
    assert blocks(1, 50) == blocks(1, 50) != blocks(2, 50), "same seed, same text"
    found = blocks(1, 2000)
    assert_frequencies(torch.tensor([b[0] for b in found]), probs(tokens), "the first token")
    for first in range(3):
        second = torch.tensor([b[1] for b in found if b[0] == first and len(b) > 1])
        if len(second):
            assert_frequencies(second, probs([*tokens, first]), f"the second token, after {first}")
    for prompt in ([1, 0, 2, 2], [1, 1], [0, 2, 1], [2, 2]):
        block = decode.speculative_round(model, prompt, 2, 0.0)
        for i, token in enumerate(block):
            assert token == probs([*prompt, *block[:i]]).argmax(), "temperature 0"


# ---- 9. positions


def test_9_a_pair_is_rotated_by_its_angle():
    """Dimension i and dimension i + hd/2 make a pair (x, y), which becomes (x cos - y sin, y cos +
    x sin)."""
    from model import rotate
    # of two pairs, for each half of hd = 4
    angle = torch.tensor([0.3, 1.1]).repeat(2)
    rope = torch.stack((angle.cos(), angle.sin()))[:, None, None, None]
    got = rotate(torch.tensor([[[[1.0, 0.0, 0.0, 2.0]]]]), rope)   # pairs (1, 0) and (0, 2)
    close(got[0, 0, 0], [math.cos(0.3), -2 * math.sin(1.1), math.sin(0.3), 2 * math.cos(1.1)])
    assert rotate(torch.ones(1, 1, 1, 4).bfloat16(), rope).dtype == torch.bfloat16


def test_9_only_distances_count():
    """The product of a query at position p and a key at s depends on p - s alone, and position 0 is
    not rotated."""
    from model import rotate
    model = make_gpt()
    x, y = waves(1, 1, 1, 4), waves(1, 1, 1, 4, start=5.0)
    def at(v, p):
        return rotate(v, model.rope[:, None, None, p : p + 1])
    close(at(x, 0), x)
    close((at(x, 2) * at(y, 5)).sum(), (at(x, 6) * at(y, 9)).sum())
    assert (at(x, 2) * at(y, 5)).sum() - (at(x, 2) * at(y, 6)).sum() != 0


def test_9_each_row_has_its_own_position():
    """x is (B, H, T, hd) and rope (2, B, 1, T, hd): row t of sequence b is rotated by the angles of
    its own position, the same in all heads."""
    from model import rotate
    x, rope = waves(2, 2, 3, 4), make_gpt().rope[:, [[0, 1, 2], [5, 3, 7]]].unsqueeze(2)
    got = rotate(x, rope)
    for b, h, t in itertools.product(range(2), range(2), range(3)):
        close(got[b, h, t], rotate(x[b, h, t], rope[:, b, 0, t]))


def test_9_cached_steps_equal_the_full_forward():
    """Queries and keys of a cached step are rotated by their positions in the text: does it matter
    how many rows there are?"""
    assert_cached_steps_equal_the_full_forward()


# ---- 10. divergences


def test_10_every_divergence():
    """Each entry of DIVERGENCES is 0 for equal distributions and never negative, works on (.., N),
    has the gradient that finite differences find, in both arguments, and is finite where
    probabilities are near 0."""
    log_p, log_q = (3 * waves(4, 6)).log_softmax(-1), (3 * waves(4, 6, start=2.0)).log_softmax(-1)
    for name, divergence in distill.DIVERGENCES.items():
        def of_logits(x, y, divergence=divergence):
            return divergence(x.log_softmax(-1), y.log_softmax(-1))
        assert divergence(log_p, log_q).shape == (4,), name
        assert divergence(log_p, log_q).min() > 0.01, name
        assert divergence(log_p, log_p).abs().max() < 1e-12, name
        leaves = log_p.clone().requires_grad_(), log_q.clone().requires_grad_()
        assert torch.autograd.gradcheck(of_logits, leaves), name
        far = torch.tensor([[0.0, -200.0, -900.0]]).log_softmax(-1).requires_grad_()
        value = divergence(far, torch.tensor([[-300.0, 0.0, -900.0]]).log_softmax(-1))
        value.sum().backward()
        assert value.isfinite().all() and far.grad.isfinite().all(), name


def test_10_two_of_the_papers():
    """Reverse KL and total variation of four tokens, by hand: log_p is the student's, log_q the
    teacher's. And the squared Hellinger distance, once it is there."""
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), torch.tensor([0.3, 0.3, 0.2, 0.2]).log()
    assert distill.DIVERGENCES["reverse"](p, q).item() == pytest.approx(
        0.1 * math.log(1 / 3) + 0.2 * math.log(2 / 3) + 0.3 * math.log(1.5) + 0.4 * math.log(2)
    )
    assert distill.DIVERGENCES["tv"](p, q).item() == pytest.approx(0.3)
    if "hellinger" in distill.DIVERGENCES:
        assert distill.DIVERGENCES["hellinger"](p, q).item() == pytest.approx(0.0540543, abs=1e-6)


# ---- 13. looped heads


@pytest.mark.parametrize("m, n", [(1, 3), (2, 5), (3, 4)])
def test_13_which_head_is_copied(m, n):
    """Head m+j is a copy of head j, the last round maybe cut short; all logits that the model has
    stay as they are."""
    from extend import loop_heads
    model, tokens = make_gpt(n_mtp=m), torch.tensor([[1, 5, 2, 2, 7, 9]])
    new = loop_heads(model, n)
    assert new.config.n_mtp == len(new.heads) == n
    for k, head in enumerate(new.heads):
        for got, want in zip(head.parameters(), model.heads[k % m].parameters()):
            close(got, want, 0)
    for got, want in zip(new.all_logits(tokens), model.all_logits(tokens)):
        close(got, want, 0)


def test_13_weights_are_copied_and_not_shared():
    """Training one head must move no other head, nor the model that was copied: is a module or a
    weight used twice?"""
    from extend import loop_heads
    model = make_gpt(n_mtp=2)
    heads = [*model.heads, *loop_heads(model, 5).heads]
    places = [weight.data_ptr() for head in heads for weight in head.parameters()]
    assert len(set(places)) == len(places)


def test_13_what_the_docstring_promises():
    """No more heads than the model has: a UserError. Without heads to copy, the new ones are
    random. The model that was copied stays as it is, and the new one can decode to the end of its
    context (its table of angles grows with n_mtp)."""
    from common import UserError
    from extend import loop_heads
    model = make_gpt(n_mtp=2)
    for n in (1, 2):
        with pytest.raises(UserError):
            loop_heads(model, n)
    assert len(loop_heads(make_gpt(), 3).heads) == 3
    (ids,), _ = decode.generate(loop_heads(model, 6).eval(), [1, 2], 99)
    assert len(ids) == 10 and model.config.n_mtp == len(model.heads) == 2


def test_the_signatures_are_those_of_the_exercises():
    """start and solve keep a function's signature, so the tests above may rely on it."""
    assert list(
        inspect.signature(Attention.forward).parameters
    ) == ["self", "x", "positions", "cache"]
    assert list(inspect.signature(decode.residual).parameters) == [
        "target_probs", "draft_probs", "drafts", "noise"
    ]
