"""
fast/loss.py: distill.loss_and_grad for the paper's loss in bf16, as two Triton kernels. Optional.

Logits are large, 5 rows x 2,000 targets x 50,304 ids are 1 GB in bf16, and there is little
arithmetic on them: the cost is how often they travel to and from memory. With torch's operations,
the TopN and its gathers and scatters cost more the larger N is. Here "among the N largest" is a
comparison with the N-th largest, whatever N is:

    teacher_kernel    one program (Triton's word for a group of threads) per target: the teacher's
                      N-th largest logit, and sums over the logits from there up
    loss_grad_kernel  one program per row: one pass for the sums (softmax on the fly), one for CE,
                      KL and their gradient

Where several logits equal the N-th largest, all of them count (common in bf16; with N = 1 it
makes a KL that is not 0); distill.py takes any N of them. A student that gives the teacher's N
less than e^-85 of its probability counts as giving them that much. Only the paper's loss is here:
forward KL, detached teacher.

Shapes in comments: R = K+1 rows of logits, C targets, V vocabulary. tests/test_fast.py compares
this file with distill.py.
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, CPU builds of torch
    triton = None

BLOCK = 4096  # logits of a row that a program takes at a time, about


def triton_version():
    """as (3, 5); () without Triton"""
    return tuple(map(int, triton.__version__.split(".")[:2])) if triton else ()


def interpreted():
    """whether Triton's interpreter runs the kernels on a CPU: for tests"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(kl, detach_teacher, device_type, dtype):
    """-> why loss_and_grad can't be used, in a few words, or None where it can"""
    if device_type != "cuda" and not interpreted():
        return "no CUDA GPU"
    if triton_version() < (3, 3):
        return "needs Triton 3.3 or later"
    if dtype != torch.bfloat16:
        return f"for bfloat16, not {str(dtype)[6:]}"
    if kl != "forward" or not detach_teacher:
        return "only for the forward KL with a detached teacher"
    return None


def loss_and_grad(logits, targets, alpha, beta, top_n, kl="forward", detach_teacher=True):
    """
    logits (R, C, V) bf16, row 0 the teacher; targets (C,); alpha (R,), beta (R-1,) float32;
    top_n = 0 leaves the KL out
    -> CE (R,), KL (R-1,), 0 where its beta is 0: means over the targets; d loss / d logits (R, C,
    V) bf16
    """
    assert logits.is_contiguous() and targets.is_contiguous()
    assert logits.dtype == torch.bfloat16 and targets.dtype == torch.int64
    assert kl == "forward" and detach_teacher
    R, C, V = logits.shape
    alpha = (alpha / C).float().contiguous()
    beta = (beta / C).float().contiguous()
    d_logits = torch.empty_like(logits)
    ce = logits.new_zeros(R, C, dtype=torch.float32)
    kl_rows = logits.new_zeros(R - 1, C, dtype=torch.float32)
    teacher = logits.new_zeros(3, C, dtype=torch.float32)
    with_kl = bool(top_n) and R > 1
    if with_kl:
        teacher_kernel[(C,)](logits, teacher, min(top_n, V), C, V, BLOCK, num_warps=16)
    # 8 logits per thread; as timed on an H100
    block = BLOCK if with_kl else 2 * BLOCK
    warps = 16 if with_kl else 32
    loss_grad_kernel[(C * R,)](
        logits, d_logits, targets, teacher, alpha, beta, ce, kl_rows, R, C, V, with_kl, block,
        num_warps=warps,
    )
    return ce.mean(1), kl_rows.mean(1), d_logits


if triton is not None:
    # stands past the end of the vocabulary. A power of two: LOWEST - LOWEST is 0 in exp_diff, too
    LOWEST = tl.constexpr(-(2.0**126))

    @triton.jit
    def bf16_rank(z):
        """numbers, rounded to bf16 -> integers in the same order"""
        bits = z.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        return tl.where(bits < 0, bits ^ 0x7FFF, bits)

    @triton.jit
    def bf16_value(rank):
        """the inverse of bf16_rank, in float32: bf16 is its upper half"""
        bits = tl.where(rank < 0, rank ^ 0x7FFF, rank)
        return (bits << 16).to(tl.float32, bitcast=True)

    @triton.jit
    def exp_diff(z, y):
        """exp(z - y): a multiply-add and a power of two"""
        return tl.exp2(tl.fma(z, 1.4426950408889634, -(y * 1.4426950408889634)))

    # in plain PyTorch:
    #     border = teacher.topk(n).values.min()
    #     top = teacher[teacher >= border]
    #     return border, top.logsumexp(0), (top.softmax(0) * top.log_softmax(0)).sum()
    @triton.jit
    def teacher_kernel(logits_ptr, out_ptr, n, C, V, BLOCK: tl.constexpr):
        """of target c: out[0, c] the border of Q~, its n-th largest logit (or a number a little
        below); out[1, c] = log sum exp of the logits from there up; out[2, c] = sum Q~ log Q~"""
        c = tl.program_id(0)
        row_ptr = logits_ptr + c.to(tl.int64) * V
        top = tl.full((BLOCK,), -3e38, tl.float32)
        bottom = tl.full((BLOCK,), 3e38, tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(row_ptr + v, mask=v < V, other=-3e38).to(tl.float32)
            top = tl.maximum(top, z)
            z = tl.load(row_ptr + v, mask=v < V, other=3e38).to(tl.float32)
            bottom = tl.minimum(bottom, z)
        top = tl.max(top, 0)
        bottom = tl.min(bottom, 0)

        # false position on f(z) = log #(logits >= z) - log n, which is nearly straight where the
        # border lies; an end that stays twice has its f halved (the Illinois rule). 5 to 10 steps,
        # where bisection takes 16. Many equals at 0, where bf16 is finest, would take it a hundred:
        # after 12 steps, bisect. The bounds are ranks: f(low) >= 0 > f(high)
        low = bf16_rank(bottom)
        high = bf16_rank(top) + 1
        f_low = tl.log(V / n)
        f_high = -tl.log(n * 2.0)
        side = 0
        steps = 0
        while high - low > 1:
            z_low = bf16_value(low)
            z_high = bf16_value(high)
            middle = bf16_rank(z_low + (z_high - z_low) * f_low / (f_low - f_high))
            middle = tl.where(steps < 12, middle, (low + high) // 2)
            middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
            steps += 1
            border = bf16_value(middle)
            count = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, V, BLOCK):
                v = start + tl.arange(0, BLOCK)
                z = tl.load(row_ptr + v, mask=v < V, other=-3e38).to(tl.float32)
                count += (z >= border).to(tl.int32)
            reached = tl.sum(count, 0)
            f = tl.log(tl.maximum(reached.to(tl.float32), 0.5) / n)
            if reached >= n:
                f_high = tl.where(side == 1, f_high / 2, f_high)
                f_low = f
                low = middle
                side = 1
                high = tl.where(reached == n, middle + 1, high)                # found
            else:
                f_low = tl.where(side == -1, f_low / 2, f_low)
                f_high = f
                high = middle
                side = -1

        border = bf16_value(low)
        total = tl.zeros((BLOCK,), tl.float32)
        mean = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(row_ptr + v, mask=v < V, other=-3e38).to(tl.float32)
            e = tl.where(z >= border, tl.exp(z - top), 0.0)
            total += e
            mean += e * (z - top)
        total_sum = tl.sum(total, 0)
        tl.store(out_ptr + c, border)
        tl.store(out_ptr + C + c, top + tl.log(total_sum))
        tl.store(out_ptr + 2 * C + c, tl.sum(mean, 0) / total_sum - tl.log(total_sum))

    # in plain PyTorch: distill.mtp_d_loss, with the gradients written out,
    #     d_logits = alpha * (P - onehot) + beta * (P~ - Q~)
    @triton.jit
    def loss_grad_kernel(
        logits_ptr, d_logits_ptr, targets_ptr, teacher_ptr, alpha_ptr, beta_ptr, ce_ptr, kl_ptr,
        R, C, V, KL: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """the logits of row r for target c: CE, KL and their gradient"""
        # the rows of one target run side by side, and read row 0 from a cache
        r = tl.program_id(0) % R
        c = tl.program_id(0) // R
        row_ptr = logits_ptr + (r.to(tl.int64) * C + c) * V
        main_ptr = logits_ptr + c.to(tl.int64) * V
        alpha = tl.load(alpha_ptr + r)
        beta = tl.load(beta_ptr + r - 1, mask=r > 0, other=0.0)
        target = tl.load(targets_ptr + c)
        if KL:
            border = tl.load(teacher_ptr + c)
            lse_q = tl.load(teacher_ptr + C + c)
            sum_q_log_q = tl.load(teacher_ptr + 2 * C + c)

        # first pass: m the largest logit so far, s = sum exp(z - m), s_n the same over the
        # teacher's N. A thread takes 8 neighbours and keeps an m and sums of its own: threads that
        # wait for one another at every step are slow
        lane = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        m = tl.full((BLOCK // 8,), LOWEST, tl.float32)
        s = tl.zeros((BLOCK // 8,), tl.float32)
        s_n = s
        sum_q_z = s
        for start in range(0, V, BLOCK):
            v = start + lane
            z = tl.load(row_ptr + v, mask=v < V, other=LOWEST).to(tl.float32)
            m_new = tl.maximum(m, tl.max(z, 1))
            e = exp_diff(z, m_new[:, None])
            scale = tl.exp(m - m_new)
            s = s * scale + tl.sum(e, 1)
            m = m_new
            if KL:
                q_z = tl.load(main_ptr + v, mask=v < V, other=LOWEST).to(tl.float32)
                s_n = s_n * scale + tl.sum(tl.where(q_z >= border, e, 0.0), 1)
        top = tl.max(m, 0)
        scale = tl.exp(m - top)
        total = tl.sum(s * scale, 0)
        lse = top + tl.log(total)
        inside = alpha
        if KL:  # P~ is a multiple of P inside the N, and 0 outside
            total_n = tl.maximum(tl.sum(s_n * scale, 0), total * 1e-37)
            inside = alpha + beta * total / total_n
        tl.store(ce_ptr + r * C + c, lse - tl.load(row_ptr + target).to(tl.float32))

        # second pass: the gradient, and sum_q_z = sum Q~ z
        for start in range(0, V, BLOCK):
            v = start + lane
            z = tl.load(row_ptr + v, mask=v < V, other=LOWEST).to(tl.float32)
            g = tl.where(v == target, -alpha, 0.0)
            if KL:
                q_z = tl.load(main_ptr + v, mask=v < V, other=LOWEST).to(tl.float32)
                q_n = tl.where(q_z >= border, exp_diff(q_z, lse_q), 0.0)
                sum_q_z += tl.sum(q_n * z, 1)
                g += exp_diff(z, lse) * tl.where(q_z >= border, inside, alpha) - beta * q_n
            else:
                g += exp_diff(z, lse) * alpha
            out_ptr = d_logits_ptr + (r.to(tl.int64) * C + c) * V + v
            tl.store(out_ptr, g.to(tl.bfloat16), mask=v < V)
        if KL:  # sum Q~ (log Q~ - log P~)
            kl = sum_q_log_q - tl.sum(sum_q_z, 0) + top + tl.log(total_n)
            tl.store(kl_ptr + (r - 1) * C + c, tl.where(beta > 0, kl, 0.0), mask=r > 0)
