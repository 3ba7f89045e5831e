"""
distill.py: the MTP-D loss (arXiv 2603.23911, section 3): multi-token prediction, self-distilled.

    L = CE_main + sum_k alpha_k CE(P^k, t) + sum_k beta_k KL( sg(Q~) || P~^k )

Everything is aligned by TARGET token. K+1 hidden states predict token t_{j+1}: the main head's
h^0_j, and head k's h^k_{j-k}. All of them have read the same tokens t_0..t_j, so the main head's
distribution Q can teach all K heads, and KL = 0 can be reached. As a table, one column per target
(K = 2):

    target        t_1     t_2     t_3     t_4   ..
    row 0 main    h0_0    h0_1    h0_2    h0_3        teacher Q
    row 1 head 1          h1_0    h1_1    h1_2        student P^1
    row 2 head 2                  h2_0    h2_1        student P^2

    sg    stop-gradient: the teacher's logits are detached, so that the KL moves the students
          towards the teacher and not the reverse (through the students it still reaches the trunk)
    ~     TopN: only the teacher's N largest logits count, and both distributions are renormalised
          over them

The first half of this file is the loss in plain PyTorch. To try another divergence, write one
function and enter it in DIVERGENCES. The second half computes the same in chunks of targets, so
that only one chunk's logits are in memory; tests/test_distill.py compares the two.

Shapes in comments: K MTP heads, C targets, V vocabulary, N logits of the TopN, d width. As in the
paper, Q is the main head and P an MTP head (decode.py has it the other way round).
"""

import math

import torch
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# the loss


def forward_kl(log_p, log_q):
    """KL(q || p) = sum_v q_v (log q_v - log p_v), the paper's"""
    log_ratio = log_q - log_p
    return (log_q.exp() * log_ratio).sum(-1)


def reverse_kl(log_p, log_q):
    """KL(p || q) = sum_v p_v (log p_v - log q_v)"""
    return forward_kl(log_q, log_p)


def hybrid_kl(log_p, log_q):
    """half of each. The paper's ablation has a hybrid KL and does not say in which shares"""
    return (forward_kl(log_p, log_q) + reverse_kl(log_p, log_q)) / 2


def total_variation(log_p, log_q):
    """1/2 sum_v |p_v - q_v|. With N = V: 1 minus the acceptance rate of drafts sampled at
    temperature 1 (decode.residual)"""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


# name -> function of log-probabilities, log_p the student's and log_q the teacher's:
# (.., N) and (.., N) -> (..). Its slope must be finite where the two are equal, as they are in the
# row that mtp_d_loss drops: a square root of a divergence has an infinite one, and 0 times that is
# nan in every gradient
DIVERGENCES = {
    "forward": forward_kl, "reverse": reverse_kl, "hybrid": hybrid_kl, "tv": total_variation,
}


def to_float32(logits):
    """to float32, where sums over a vocabulary keep their tail; float64 stays"""
    return logits if logits.dtype == torch.float64 else logits.float()


def topn_divergence(student, teacher, n, kl="forward", detach_teacher=True):
    """
    the self-distillation term: student (.., C, V) and teacher (C, V), both logits -> (.., C), nats

    n               how many of the teacher's largest logits count: 1 gives exactly 0, V all of
                    them; of several that equal the n-th largest, any
    kl              a name in DIVERGENCES
    detach_teacher  the stop-gradient sg(Q~); the paper's ablation turns it off
    """
    if detach_teacher:
        teacher = teacher.detach()
    if n < teacher.size(-1):
        teacher, top = teacher.topk(n, sorted=False)            # (C, N), the same ids for all heads
        top = top.expand(*student.shape[:-1], -1)               # (.., C, N)
        student = student.gather(-1, top)                       # (.., C, N)
    log_q = F.log_softmax(to_float32(teacher), dim=-1)          # Q~, renormalised over the N
    log_p = F.log_softmax(to_float32(student), dim=-1)          # P~
    return DIVERGENCES[kl](log_p, log_q)


def mtp_d_loss(logits, targets, alpha, beta, top_n, kl="forward", detach_teacher=True):
    """
    the whole loss, from logits that predict the same C targets

    logits   (K+1, C, V): row 0 the main head's, row k head k's;  targets (C,)
    alpha    (K+1,) weights of the cross-entropies, the main head's first (1 in the formula above;
             mtp_loss passes less, for it adds the first K targets itself)
    beta     (K,) weights of the KL terms; both may be a plain number, one for all
    top_n    N of the TopN, a count; 0 leaves the KL out (plain MTP)
    -> (loss, CE per head (K+1,), KL per head (K,)), means over the targets, in nats. CE and KL are
    detached, unweighted, and there whatever the weights are
    """
    K = len(logits) - 1
    rows = to_float32(logits).flatten(0, 1)                     # ((K+1) C, V)
    ce = F.cross_entropy(rows, targets.repeat(K + 1), reduction="none")
    ce = ce.view(K + 1, -1).mean(1)                             # (K+1,)
    loss = (alpha * ce).sum()                                   # CE_main + sum_k alpha_k CE_k
    kl_per_head = torch.zeros_like(ce[1:])
    if K and top_n:
        # the teacher is compared with itself, too: cheaper than the gradient of a slice of logits
        kl_rows = topn_divergence(logits, logits[0], top_n, kl, detach_teacher)     # (K+1, C)
        kl_per_head = kl_rows[1:].mean(1)                       # (K,)
        loss = loss + (beta * kl_per_head).sum()                # sum_k beta_k KL(sg(Q~) || P~_k)
    return loss, ce.detach(), kl_per_head.detach()


def count_top_n(n, vocab_size):
    """N as a count (n >= 1) or as a fraction of the vocabulary (n < 1) -> count, at most V. Note
    that 1.0 is a count: one logit, whose KL is always 0. For all of them, give V or more"""
    if not 0 < n < math.inf or n > 1 and n % 1:
        raise ValueError(
            f"top_n is {n}; it must be a whole number of logits, or a fraction of the vocabulary "
            "below 1"
        )
    if n < 1:
        n = max(2, round(n * vocab_size))      # one logit would have no KL
    return min(vocab_size, int(n))


# -----------------------------------------------------------------------------
# the same in chunks of targets. K+1 rows of 2,000 targets and 50,304 logits are 1 GB in bf16, and a
# training step has 16,000 targets. The loss is a scalar, so the gradient is known as soon as a
# chunk's logits are: keep the small (.., d) gradients, drop the (.., V) logits, continue.


def loss_and_grad(logits, targets, alpha, beta, top_n, kl, detach_teacher, loss=mtp_d_loss):
    """mtp_d_loss and its gradient, by autograd -> (CE (K+1,), KL (K,), d loss / d logits)

    fast/loss.py has a Triton version with the same arguments, for the paper's loss in bf16."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        total, ce, kl_per_head = loss(logits, targets, alpha, beta, top_n, kl, detach_teacher)
        (d_logits,) = torch.autograd.grad(total, logits)
    return ce, kl_per_head, d_logits


class KnownGradient(torch.autograd.Function):
    """returns the loss as it is; backward hands on the gradients, which are known already"""

    @staticmethod
    def forward(ctx, loss, rows, weight, d_rows, d_weight):
        ctx.save_for_backward(d_rows, d_weight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        d_rows, d_weight = ctx.saved_tensors
        return None, grad * d_rows, grad * d_weight, None, None


def per_head(value, K, name):
    """one number, or K numbers -> list of K"""
    values = [value] * K if isinstance(value, (int, float)) else list(value)
    if len(values) != K or not all(0 <= v < math.inf for v in values):
        raise ValueError(f"{name} is {value}; give one number >= 0, or one for each of {K} heads")
    return values


def autocast_inputs(rows, weight):
    """under autocast, both in its dtype, as nn.Linear would cast them"""
    device = weight.device.type
    if not torch.is_autocast_enabled(device):
        return rows, weight
    dtype = torch.get_autocast_dtype(device)
    return rows.to(dtype), weight.to(dtype)


def chunk_size(targets, logits_per_target, at_most):
    """how many targets make a chunk. Halving keeps the chunks equal where it can: a compiled loss
    then sees one shape"""
    size = targets
    while size > 1 and size * logits_per_target > at_most:
        size = math.ceil(size / 2)
    return size


def aligned(hidden, targets, heads):
    """the rows of the table above for R of the heads, in the order of `heads`, without its first K
    columns, which have gaps: column j of row k is h^k_{j-k} -> hidden states (R, C, d), their
    targets (C,). The columns of one window (T targets) follow those of the window before, so that C
    = B (T-K); a ValueError if T <= K"""
    K = len(hidden) - 1
    T = targets.size(1)
    if T <= K:
        raise ValueError(f"got {T} tokens for {K} MTP heads; the loss takes at least {K + 1}")
    rows = torch.stack([hidden[k][:, K - k : T - k] for k in heads])           # (R, B, T-K, d)
    return rows.flatten(1, 2), targets[:, K:].flatten()


def mtp_loss(
    hidden, weight, targets, *, alpha=0.3, beta=0.5, ramp=1.0, top_n=0.1, kl="forward",
    detach_teacher=True, chunk_logits=2**28, grad_function=loss_and_grad,
):
    """
    the whole MTP-D loss, from hidden states (GPT.forward) to a scalar

    hidden   list of K+1, entry k (B, T-k, d), its row i predicting targets[:, i+k]
    weight   the output head, (V, d);  targets (B, T): token t_{j+1} in column j
    alpha, beta    weight of each head's CE and KL: a number, or one per head
    ramp           0..1, scales beta during training
    top_n          N, a count or a fraction of V;  kl  a name in DIVERGENCES
    chunk_logits   about how many logits may be in memory at once
    grad_function  loss_and_grad, or fast.loss.loss_and_grad
    -> (loss, CE per head (K+1,), KL per head (K,)), means in nats: CE_main over all B*T targets,
    the rest over the B*(T-K) targets that all K+1 rows predict. KL is 0 where it was not computed.
    A head with alpha = beta = 0 (after the ramp) is left out, costs nothing here and reports 0.
    """
    K = len(hidden) - 1
    if kl not in DIVERGENCES:
        raise ValueError(f"unknown divergence {kl!r}; choose one of {', '.join(DIVERGENCES)}")
    main_share = 1 - K / targets.size(1)                        # columns without gaps
    alpha = [main_share, *per_head(alpha, K, "alpha")]
    beta = [0.0] + [ramp * b for b in per_head(beta, K, "beta")]
    top_n = count_top_n(top_n, len(weight)) if any(beta) else 0
    used = [k for k in range(K + 1) if alpha[k] or beta[k]]
    rows, labels = aligned(hidden, targets, used)               # (R, C, d), (C,)
    rows, weight = autocast_inputs(rows, weight)
    sum_type = torch.promote_types(weight.dtype, torch.float32)
    head_weights = torch.tensor([alpha, beta], dtype=sum_type)[:, used]
    head_weights = head_weights.to(weight.device, non_blocking=True)         # (2, R)
    means = torch.zeros_like(head_weights)                      # CE and KL of each row
    d_rows = []
    d_weight = torch.zeros_like(weight, dtype=sum_type)
    chunk = chunk_size(len(labels), len(used) * len(weight), chunk_logits)
    with torch.no_grad():
        for part, label in zip(rows.split(chunk, dim=1), labels.split(chunk)):
            share = len(label) / len(labels)                    # of this chunk in the mean
            alpha, beta = share * head_weights
            logits = part @ weight.T                            # (R, C', V)
            ce, kl_of_heads, d_logits = grad_function(
                logits, label, alpha, beta[1:], top_n, kl, detach_teacher
            )
            means[0] += share * ce
            means[1, 1:] += share * kl_of_heads
            d_rows.append(d_logits @ weight)
            if weight.requires_grad:                            # extend.py freezes it
                d_weight += d_logits.flatten(0, 1).T @ part.flatten(0, 1)
            del logits, d_logits                                # before the next chunk's are made
    loss = (head_weights * means).sum()
    d_rows = torch.cat(d_rows, dim=1)
    loss = KnownGradient.apply(loss, rows, weight, d_rows, d_weight.to(weight.dtype))
    result = means.new_zeros(2, K + 1)                          # 0 for the heads left out
    result[:, used] = means
    if K:  # the first K targets lack rows: they teach the main head alone
        logits = to_float32(hidden[0][:, :K] @ weight.T)        # (B, K, V)
        first = F.cross_entropy(logits.flatten(0, 1), targets[:, :K].flatten())
        loss = loss + (1 - main_share) * first
        result[0, 0] = main_share * result[0, 0] + (1 - main_share) * first.detach()
    return loss, result[0], result[1, 1:]
