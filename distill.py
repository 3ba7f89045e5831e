"""
distill.py: the MTP-D loss (arXiv 2603.23911, section 3): multi-token prediction, self-distilled from the main head.

    L = CE_main + sum_k alpha_k CE(P^k, t) + sum_k beta_k KL( sg(Q~) || P~^k )

Everything is aligned by TARGET token. K+1 hidden states predict token t_{j+1}: the main head's h^0_j, and head k's
h^k_{j-k}. They know the same tokens t_0..t_j, so the main head's distribution Q can teach all K heads, and KL = 0 can
be reached. Drawn as a table, a column per target (K = 2):

    target        t_1     t_2     t_3     t_4   ..
    row 0 main    h0_0    h0_1    h0_2    h0_3        teacher Q
    row 1 head 1          h1_0    h1_1    h1_2        student P^1
    row 2 head 2                  h2_0    h2_1        student P^2

    sg    stop-gradient: the teacher's logits are detached, so that the main head is not pulled towards its heads
    ~     TopN: only the teacher's N largest logits count, and both distributions are renormalised among them

Gradients with respect to logits are written out, for they are short (p - q) and let a chunk's logits be dropped at
once; tests/test_distill.py holds the slow, obvious loss and lets autograd and finite differences check every one.
To try another divergence, add its name to DIVERGENCES and three lines to divergence(); "tv" is there as the example.

Symbols in comments: R = K+1 rows, C targets of a chunk, V vocabulary, d width.
"""

import math

import torch
import torch.nn.functional as F

import kernels

DIVERGENCES = ("forward", "reverse", "tv")


def count_top_n(n, vocab_size):
    """N as a count (n >= 1) or as a fraction of the vocabulary (0 < n < 1) -> count; more than V means all of V"""
    if not 0 < n < math.inf or (n >= 1 and n != int(n)):
        raise ValueError(f"top_n is {n}; it must be a whole number of logits, or a fraction of the vocabulary below 1")
    return min(vocab_size, max(1, round(n * vocab_size)) if n < 1 else int(n))


def top_n_indices(logits, n):
    """
    logits (..., V) -> indices (..., N) of the N largest, in no order; of equals at the border, any

    topk over 50,000 logits is the dearest part of the whole distillation. Cut the row into groups of g: the N largest
    logits lie in the N groups with the largest maxima (if one lay outside, N groups would each hold one that is no
    smaller). So take topk over V/g maxima, then over the N*g logits of the chosen groups: exact, and several times faster.
    """
    V = logits.size(-1)
    g = 1 << int(math.log2(max(1, V / n)) / 2)                               # near the best, sqrt(V / N); a power of 2
    if g < 4 or V % g:
        return logits.topk(n, dim=-1, sorted=False).indices
    groups = logits.unflatten(-1, (V // g, g))                               # (..., V/g, g)
    best = groups.amax(-1).topk(n, dim=-1, sorted=False).indices             # (..., N) groups
    inside = groups.gather(-2, best.unsqueeze(-1).expand(*best.shape, g)).flatten(-2)
    pick = inside.topk(n, dim=-1, sorted=False).indices                      # (..., N) among N*g
    return best.gather(-1, pick // g) * g + pick % g


def divergence(student, teacher, kind):
    """
    two sets of logits (..., N), each renormalised by its softmax to p (student) and q (teacher)
    -> how far p is from q (...), and its derivatives with respect to the student's and the teacher's logits (..., N)

    forward   KL(q || p) = sum_v q_v (log q_v - log p_v)     the paper's; its gradient is the famous p - q
    reverse   KL(p || q) = sum_v p_v (log p_v - log q_v)
    tv        1/2 sum_v |p_v - q_v|: 1 minus the rate at which a drawn draft is accepted (decode.py, "residual")
    """
    log_q, log_p = F.log_softmax(teacher, dim=-1), F.log_softmax(student, dim=-1)
    q, p, gap = log_q.exp(), log_p.exp(), log_q - log_p
    if kind == "forward":
        far = (q * gap).sum(-1)
        return far, p - q, q * (gap - far.unsqueeze(-1))
    if kind == "reverse":
        far = -(p * gap).sum(-1)
        return far, p * (-gap - far.unsqueeze(-1)), q - p
    if kind == "tv":
        sign = torch.sign(p - q) / 2
        d_student, d_teacher = (x * (sign - (x * sign).sum(-1, keepdim=True)) for x in (p, q))
        return (p - q).abs().sum(-1) / 2, d_student, -d_teacher
    raise ValueError(f"unknown divergence {kind!r}; choose one of {', '.join(DIVERGENCES)}")


def wide(x):
    """sums of bf16 logits would lose the tail: reduce in float32 or more"""
    return x if x.dtype == torch.float64 else x.float()


def topn_kl(student, teacher, n, direction="forward", detach_teacher=True):
    """
    the self-distillation term between two (..., V) logit tensors -> scalar, the mean over rows, in nats

    n  how many of the teacher's largest logits count, or which fraction of V; n = 1 gives exactly 0, n >= V the full KL
    direction  "forward", "reverse" or "tv" (see divergence)
    detach_teacher  eq. KL: sg(Q~); the paper's ablation turns it off
    """
    teacher = teacher.detach() if detach_teacher else teacher                # sg
    top = teacher.topk(count_top_n(n, teacher.size(-1)), dim=-1).indices     # the set, from the teacher alone
    return divergence(wide(student.gather(-1, top)), wide(teacher.gather(-1, top)), direction)[0].mean()


def cross_entropy_grad(logits, targets, alpha):
    """logits (R, C, V), targets (C,), alpha (R,) -> CE sums (R,) and d (alpha . CE) / d logits = alpha (P - onehot)"""
    p = F.log_softmax(wide(logits), dim=-1)                                  # (R, C, V)
    ce = -p.gather(-1, targets.expand(len(logits), -1).unsqueeze(-1)).sum((1, 2))
    onehot = (targets[:, None] == torch.arange(logits.size(-1), device=logits.device)).to(p.dtype)     # (C, V)
    return ce, p.exp_().sub_(onehot).mul_(alpha[:, None, None]).to(logits.dtype)    # in place: fresh memory is slow on a CPU


def add_divergence_grad(d_logits, student, teacher, top, beta, kind):
    """
    student (R-1, C, V), teacher (C, V), top (C, N) -> KL sums (R-1,), and d (beta . KL) / d teacher's top N (C, N);
    the students' gradient, which is 0 outside the top N, is added to d_logits (R-1, C, V) in place
    """
    index = (torch.arange(len(student), device=top.device)[:, None, None],
             torch.arange(len(top), device=top.device)[:, None], top)        # (R-1, C, N): entry n of row c is top[c, n]
    far, d_student, d_teacher = divergence(wide(student[index]), wide(teacher.gather(-1, top)), kind)
    beta = beta[:, None, None]
    d_logits[index] = d_logits[index] + (beta * d_student).to(d_logits.dtype)    # no index twice in a row: plain writes
    return far.sum(1), (beta * d_teacher).sum(0)


ROW_FUNCTIONS = {f.__name__: f for f in (top_n_indices, cross_entropy_grad, add_divergence_grad)}
fused = False                                                                # whether kernels.py may do the work


def compile_kernels(on=True):
    """fuse what touches whole rows of logits (train.py, on CUDA), several times faster there: kernels.py for the paper's
    loss in bf16, torch.compile of the three functions above for the rest"""
    globals().update(fused=on, **{name: torch.compile(f, dynamic=False) if on else f for name, f in ROW_FUNCTIONS.items()})


def chunk_loss(hidden, weight, targets, alpha, beta, top_n, kind, detach_teacher, weight_grad=True):
    """
    loss and gradient of one chunk of targets, all its logits alive at once; top_n = 0 leaves the KL out

    hidden (R, C, d): row 0 the main head's, then the heads'; or (2R-1, C, d), the heads' a second time, for the KL
    alone, whose gradient then stops short of the output head (kl_grad="heads")
    weight (V, d); targets (C,); alpha (R,); beta (R-1,)
    -> CE sums (R,), KL sums (R-1,), d loss / d hidden, d loss / d weight
    """
    R, shared = len(alpha), hidden[: len(alpha)]                             # shared: rows whose gradient goes everywhere
    logits = shared @ weight.T                                               # (R, C, V)
    if fused and kernels.usable(logits) and len(hidden) == R and (not top_n or kind == "forward" and detach_teacher):
        ce, kl, d_logits = kernels.loss_and_grad(logits, targets, alpha, beta, top_n if R > 1 else 0)
        return ce, kl, d_logits @ weight, d_logits.flatten(0, 1).T @ shared.flatten(0, 1) if weight_grad else None
    ce, d_logits = cross_entropy_grad(logits, targets, alpha)                # CE_main + sum_k alpha_k CE(P^k, t)
    kl, student, d_student = torch.zeros_like(beta), logits[1:], d_logits[1:]
    if len(hidden) > R:                                                      # kl_grad="heads": the KL has rows of its own
        student = hidden[R:] @ weight.T
        d_student = torch.zeros_like(student)
    if top_n and R > 1:
        top = top_n_indices(logits[0], top_n)                                # (C, N): one set, shared by all heads
        kl, d_teacher = add_divergence_grad(d_student, student, logits[0], top, beta, kind)
        if not detach_teacher:                                               # sg(Q~) is just this: no gradient for Q
            d_logits[0].scatter_add_(-1, top, d_teacher.to(logits.dtype))
    d_hidden = d_logits @ weight
    if len(hidden) > R:
        d_hidden = torch.cat((d_hidden, d_student @ weight))
    return ce, kl, d_hidden, d_logits.flatten(0, 1).T @ shared.flatten(0, 1) if weight_grad else None


class ChunkedLoss(torch.autograd.Function):
    """
    chunk_loss summed over chunks of targets. The loss is a scalar, so its gradient is ready as soon as a chunk's logits
    are: keep the small (.., d) gradients, drop the (.., V) logits, go on. Backward only scales what was kept. Memory
    grows with one chunk, not with K x V x T; and nothing is computed twice, as checkpointing would.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, alpha, beta, *options):
        ce, kl, d_hidden = torch.zeros_like(alpha), torch.zeros_like(beta), torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=alpha.dtype) if weight.requires_grad else None    # summed in float32
        for start in range(0, len(targets), chunk):
            cut = slice(start, start + chunk)
            ce_part, kl_part, d_hidden[:, cut], d_part = chunk_loss(hidden[:, cut], weight, targets[cut], alpha, beta,
                                                                    *options, weight_grad=weight.requires_grad)
            ce, kl = ce + ce_part, kl + kl_part
            if d_weight is not None:
                d_weight += d_part
        ctx.save_for_backward(d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(ce, kl)
        return (alpha * ce).sum() + (beta * kl).sum(), ce, kl

    @staticmethod
    def backward(ctx, grad, *_):
        d_hidden, d_weight = ctx.saved_tensors
        return grad * d_hidden, None if d_weight is None else grad * d_weight, *[None] * 7


def chunk_size(targets, row_logits, at_most):
    """how many targets a chunk takes, so that it has about `at_most` logits; equal chunks where that is near"""
    pieces = max(1, -(-targets * row_logits // at_most))
    even = next((p for p in range(pieces, 2 * pieces + 1) if targets % p == 0), pieces)
    return -(-targets // even)


def per_head(value, K, name):
    """a number, or a list of K numbers -> list of K"""
    values = [float(value)] * K if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != K or not all(0 <= v < math.inf for v in values):
        raise ValueError(f"{name} is {value}; give one number >= 0, or one for each of the {K} heads")
    return values


def mtp_loss(hidden, weight, targets, *, alpha=0.3, beta=0.5, ramp=1.0, top_n=0.1, kl="forward", detach_teacher=True,
             kl_hidden=None, chunk_logits=2**28):
    """
    the whole MTP-D loss, from hidden states (GPT.forward) to a scalar

    hidden   list of K+1, entry k (B, T-k, d), its row i predicting targets[:, i+k]; entry 0 is the teacher
    weight   the output head, (V, d);  targets (B, T): token t_{j+1} in column j
    alpha, beta   weight of each head's CE and KL: a number, or one a head; ramp (0..1) scales beta during training
    top_n    N, a count or a fraction of V;  kl "forward" | "reverse" | "tv";  detach_teacher: sg in eq. KL
    kl_hidden     the second list of GPT.forward(cut_heads=True): kl_grad="heads"
    chunk_logits  about how many logits may be alive at once
    -> (loss, CE per head (K+1,), KL per head (K,)), means in nats: CE_main over all B*T targets, the rest over the
    B*(T-K) targets that all K+1 rows predict. KL is 0 where it was not computed. Heads with alpha = beta = 0 cost nothing.
    """
    K, (B, T) = len(hidden) - 1, targets.shape
    if T <= K:
        raise ValueError(f"got windows of {T} tokens for {K} MTP heads; the loss takes at least {K + 1}")
    alpha, beta = per_head(alpha, K, "alpha"), per_head(beta, K, "beta")
    if kl not in DIVERGENCES:
        raise ValueError(f"unknown divergence {kl!r}; choose one of {', '.join(DIVERGENCES)}")
    device, with_kl, top_n = targets.device, ramp > 0 and any(beta), count_top_n(top_n, len(weight))
    if torch.is_autocast_enabled(device.type):                               # as nn.Linear would
        low = torch.get_autocast_dtype(device.type)
        hidden, weight = [h.to(low) for h in hidden], weight.to(low)
        kl_hidden = kl_hidden and [h.to(low) for h in kl_hidden]

    # column j of row k is h^k_{j-k}: all R rows predict target j. The first K columns lack a row; see below
    heads = [k for k in range(1, K + 1) if alpha[k - 1] or beta[k - 1]]
    rows = [hidden[k][:, K - k : T - k] for k in [0] + heads]
    if kl_hidden is not None and with_kl:
        rows += [kl_hidden[k][:, K - k : T - k] for k in heads]
    rows = torch.stack(rows).flatten(1, 2)                                   # (R, C, d)
    R, C, V, high = 1 + len(heads), B * (T - K), len(weight), torch.promote_types(rows.dtype, torch.float32)
    count = torch.tensor([B * T] + [C] * len(heads), dtype=high, device=device)
    loss, ce_sum, kl_sum = ChunkedLoss.apply(
        rows, weight, targets[:, K:].reshape(-1), chunk_size(C, R * V, chunk_logits),
        torch.tensor([1.0] + [alpha[k - 1] for k in heads], dtype=high, device=device) / count,
        torch.tensor([ramp * beta[k - 1] for k in heads], dtype=high, device=device) / count[1:],
        top_n if with_kl else 0, kl, detach_teacher)
    ce, kl_out = torch.zeros(K + 1, dtype=high, device=device), torch.zeros(K, dtype=high, device=device)
    ce[[0] + heads], kl_out[[k - 1 for k in heads]] = ce_sum / count, kl_sum / count[1:]

    if K:  # the first K targets have no row of head K: they teach the main head alone
        first = F.cross_entropy(wide(hidden[0][:, :K] @ weight.T).flatten(0, 1), targets[:, :K].reshape(-1), reduction="sum")
        loss, ce[0] = loss + first / (B * T), ce[0] + first.detach() / (B * T)
    return loss, ce, kl_out
