"""
kernels.py: the loss of distill.py for a CUDA GPU, in two Triton kernels. Optional: where Triton is missing, nothing
changes but the speed. Read distill.py first; this file computes the same numbers, and tests/test_kernels.py compares.

Logits are large (5 rows x 2,000 targets x 50,304 words are 1 GB in bf16) and the arithmetic on them is little, so that the
cost is the number of times they travel to and from memory. Written with torch's operations, the TopN and its gathers and
scatters cost more the larger N is. Here nothing depends on N, for "among the N largest" is a comparison with the N-th largest:

    teacher_sums  a program per target: 16 rounds of bisection, a bit of bf16 each, find the teacher's N-th largest logit
    loss_grad     a program per row of logits: one pass for the sums (softmax on the fly), one for the gradient

On one H100 such a chunk, its three matrix products included, takes 3.3 ms without the KL and 4.8 ms with N = 4,096, against
3.6 and 6.5 ms with torch's operations; at N = 512 the two are alike (results/search/loss.jsonl; measured with an earlier form
of both kernels, which compared floats for the border and clamped the student's sum sooner).

Where several logits equal the N-th largest, all of them count; distill.py takes any N. A student that gives the teacher's N
less than e^-85 of its probability counts as giving them that much. Only the paper's loss is here: forward KL, detached teacher.
Symbols: R = K+1 rows, C targets of a chunk, V vocabulary.
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                                            # Windows, macOS, CPU builds of torch
    triton = None


BLOCK = 2048                                                   # logits that loss_grad takes at a time


def usable(logits):
    """whether loss_and_grad takes these logits"""
    there = triton is not None and (logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")        # or interpreted, for tests
    return there and logits.dtype == torch.bfloat16 and logits.size(-1) <= 2**17


def loss_and_grad(logits, targets, alpha, beta, top_n):
    """
    logits (R, C, V) bf16, row 0 the teacher; targets (C,); alpha (R,), beta (R-1,) float32; top_n = 0 leaves the KL out
    -> CE sums (R,), KL sums (R-1,), d (alpha . CE + beta . KL) / d logits (R, C, V) bf16
    """
    R, C, V = logits.shape
    d_logits = torch.empty_like(logits)
    teacher = logits.new_zeros(3, C, dtype=torch.float32)
    ce, kl = (logits.new_zeros(R, C, dtype=torch.float32) for _ in range(2))
    if top_n:
        teacher_sums[(C,)](logits, teacher, top_n, C, V, triton.next_power_of_2(V), num_warps=16 if V > 8192 else 4)
    loss_grad[(C * R,)](logits, d_logits, targets, teacher, alpha, torch.cat((torch.zeros_like(alpha[:1]), beta)), ce, kl,
                        R, C, V, WITH_KL=bool(top_n), BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=4)
    return ce.sum(1), kl[1:].sum(1), d_logits


if triton is not None:

    @triton.jit
    def teacher_sums(logits, out, n, C, V, BLOCK: tl.constexpr):
        """of the teacher's row c: out[0, c] its n-th largest logit, the border of Q~; out[1, c] = log sum exp over the
        logits from the border up; out[2, c] = sum Q~ log Q~"""
        c, v = tl.program_id(0), tl.arange(0, BLOCK)
        bits = tl.load(logits + c.to(tl.int64) * V + v, mask=v < V, other=-3e38).to(tl.int16, bitcast=True).to(tl.int32)
        order = tl.where(bits < 0, bits ^ 0x7FFF, bits)        # integers in the order of the numbers they stand for
        low = -32768                                           # the largest that n logits or more reach, bit by bit
        for i in range(16):
            high = low + (1 << (15 - i))
            low = tl.where(tl.sum((order >= high).to(tl.int32), 0) >= n, high, low)
        z, border = number(order), number(low)
        keep, top = z >= border, tl.max(z, 0)
        e = tl.where(keep, tl.exp(z - top), 0.0)
        total = tl.sum(e, 0)
        lse = top + tl.log(total)
        tl.store(out + c, border)
        tl.store(out + C + c, lse)
        tl.store(out + 2 * C + c, tl.sum(e * (z - lse), 0) / total)

    @triton.jit
    def number(order):
        """the way back, to float32: bf16 is its upper half"""
        return (tl.where(order < 0, order ^ 0x7FFF, order) << 16).to(tl.float32, bitcast=True)

    @triton.jit
    def loss_grad(logits, d_logits, targets, teacher, alpha, beta, ce, kl, R, C, V, WITH_KL: tl.constexpr, BLOCK: tl.constexpr):
        """one row of logits, of row r for target c: CE and KL, and their gradient; the R rows of a target run side by side,
        so that the teacher's logits come from the cache"""
        r, c = tl.program_id(0) % R, tl.program_id(0) // R
        row = (r.to(tl.int64) * C + c) * V
        a, b, target = tl.load(alpha + r), tl.load(beta + r), tl.load(targets + c)
        border, lse_q, h_q = tl.load(teacher + c), tl.load(teacher + C + c), tl.load(teacher + 2 * C + c)

        # first pass. m: largest logit so far; s: sum exp(z - m) over all, for P; s_n: over the teacher's N, for P~
        m, s, s_n = -float("inf"), 0.0, 0.0
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(logits + row + v, mask=v < V, other=-3e38).to(tl.float32)
            m_new = tl.maximum(m, tl.max(z, 0))
            e, old = tl.exp(z - m_new), tl.exp(m - m_new)
            s = s * old + tl.sum(e, 0)
            if WITH_KL:
                if b > 0:
                    q = tl.load(logits + c.to(tl.int64) * V + v, mask=v < V, other=-3e38).to(tl.float32)
                    s_n = s_n * old + tl.sum(tl.where(q >= border, e, 0.0), 0)
            m = m_new
        lse, lse_n = m + tl.log(s), m + tl.log(tl.maximum(s_n, 1e-37))
        tl.store(ce + r * C + c, lse - tl.load(logits + row + target).to(tl.float32))

        # second pass: the gradient, and x = sum Q~ z
        x = 0.0
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(logits + row + v, mask=v < V, other=-3e38).to(tl.float32)
            g = a * (tl.exp(z - lse) - tl.where(v == target, 1.0, 0.0))                       # alpha (P - onehot)
            if WITH_KL:
                if b > 0:
                    q = tl.load(logits + c.to(tl.int64) * V + v, mask=v < V, other=-3e38).to(tl.float32)
                    q_n = tl.where(q >= border, tl.exp(q - lse_q), 0.0)
                    g += b * (tl.where(q >= border, tl.exp(z - lse_n), 0.0) - q_n)            # beta (P~ - Q~)
                    x += tl.sum(q_n * z, 0)
            tl.store(d_logits + row + v, g.to(tl.bfloat16), mask=v < V)
        if WITH_KL:
            if b > 0:
                tl.store(kl + r * C + c, h_q - x + lse_n)                                     # sum Q~ (log Q~ - log P~)
