"""
kernels.py: the loss of distill.py and the decoding steps of decode.py for a CUDA GPU, in four Triton kernels. Optional: without
them, only the speed changes. Read those two files first; here is the same once more, and tests/test_kernels.py compares.

The loss (train.py uses it on CUDA, unless --compile off). Logits are large, 5 rows x 2,000 targets x 50,304 words are 1 GB in
bf16, and the arithmetic on them is little: the cost is the number of times they travel to and from memory. With torch's
operations, the TopN and its gathers and scatters cost more the larger N is. Here "among the N largest" is a comparison with
the N-th largest, whatever N is:

    teacher_sums  a program (Triton's word for a group of threads) per target: finds the teacher's N-th largest logit by false
                  position, a search that interpolates, and sums from there up
    loss_grad     a program per row: one pass for the sums (softmax on the fly), one for CE, KL and their gradient

Where several logits equal the N-th largest, all of them count; distill.py takes any N. A student that gives the teacher's N
less than e^-85 of its probability counts as giving them that much. Only the paper's loss is here: forward KL, detached teacher.

Decoding (decode.py --compile kernels). A few rows times a matrix costs the reading of the matrix, and a launch. So a block
is five launches, with the norms, the angles, the cache and the sums that belong to it inside:

    few_rows      rows times a matrix, RMSNorm before it, relu^2 or the residual after it
    attend        the new tokens' keys and values into the cache, then attention over it

Up to MANY rows, a row's result does not depend on the rows beside it, not even in the last bit: the check of K drafts rounds
as K plain steps would, and so in bf16, too, the text is that of plain decoding.

Symbols: R = K+1 rows of logits, C targets of a chunk, V vocabulary; B sequences, T new tokens of each, S cache slots.
"""

import functools
import os

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                                            # Windows, macOS, CPU builds of torch
    triton = None


# -----------------------------------------------------------------------------
# the loss

BLOCK = 4096                                                   # logits of a row that a program takes at a time, about


def usable(logits):
    """whether loss_and_grad takes these logits"""
    return version() >= (3, 3) and (logits.is_cuda or interpreted()) and logits.dtype == torch.bfloat16


def version():
    """Triton's, as (3, 5): what PyTorch 2.9 brings and few_rows needs. The loss needs (3, 3). Without Triton, ()"""
    return tuple(map(int, triton.__version__.split(".")[:2])) if triton else ()


def interpreted():
    """whether Triton's interpreter runs the kernels, on a CPU: for tests"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def loss_and_grad(logits, targets, alpha, beta, top_n):
    """
    logits (R, C, V) bf16, row 0 the teacher; targets (C,); alpha (R,), beta (R-1,) float32; top_n = 0 leaves the KL out
    -> CE sums (R,), KL sums (R-1,), d (alpha . CE + beta . KL) / d logits (R, C, V) bf16
    """
    R, C, V = logits.shape
    d_logits = torch.empty_like(logits)
    ce, kl, teacher = (logits.new_zeros(n, C, dtype=torch.float32) for n in (R, R - 1, 3))
    with_kl = bool(top_n) and R > 1
    if with_kl:
        teacher_sums[(C,)](logits, teacher, min(top_n, V), C, V, BLOCK, num_warps=16)
    block, warps = (BLOCK, 16) if with_kl else (2 * BLOCK, 32)               # 8 logits a thread; as timed on an H100
    loss_grad[(C * R,)](logits, d_logits, targets, teacher, alpha, beta, ce, kl, R, C, V, with_kl, block, num_warps=warps)
    return ce.sum(1), kl.sum(1), d_logits


if triton is not None:
    # stands where the vocabulary has ended. A power of two, so that LOWEST - LOWEST is 0 in exp_of_difference, too
    LOWEST = tl.constexpr(-(2.0**126))

    @triton.jit
    def order_of(z):
        """numbers, rounded to bf16 -> integers in the same order"""
        bits = z.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        return tl.where(bits < 0, bits ^ 0x7FFF, bits)

    @triton.jit
    def number(order):
        """the way back, to float32: bf16 is its upper half"""
        return (tl.where(order < 0, order ^ 0x7FFF, order) << 16).to(tl.float32, bitcast=True)

    @triton.jit
    def teacher_sums(logits, out, n, C, V, BLOCK: tl.constexpr):
        """of the teacher's row c: out[0, c] the border of Q~, its n-th largest logit or a number under which that is the next;
        out[1, c] = log sum exp over the logits from the border up; out[2, c] = sum Q~ log Q~"""
        c = tl.program_id(0)
        row = logits + c.to(tl.int64) * V
        top, bottom = tl.full((BLOCK,), -3e38, tl.float32), tl.full((BLOCK,), 3e38, tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            top = tl.maximum(top, tl.load(row + v, mask=v < V, other=-3e38).to(tl.float32))
            bottom = tl.minimum(bottom, tl.load(row + v, mask=v < V, other=3e38).to(tl.float32))
        top, bottom = tl.max(top, 0), tl.min(bottom, 0)

        # false position on f(z) = log #(logits >= z) - log n, which is nearly straight where the border lies; an end that
        # stays twice has its f halved (the Illinois rule). 5 to 10 rounds, where halving the interval takes 16. Equals at 0,
        # where bf16 is finest, would take it a hundred: after 12 rounds, halve
        low, high = order_of(bottom), order_of(top) + 1        # f(low) >= 0 > f(high), in the integers' order
        f_low, f_high, side, rounds = tl.log(V / n), -tl.log(n * 2.0), 0, 0
        while high - low > 1:
            z_low, z_high = number(low), number(high)
            guess = order_of(z_low + (z_high - z_low) * f_low / (f_low - f_high))
            guess = tl.minimum(tl.maximum(tl.where(rounds < 12, guess, (low + high) // 2), low + 1), high - 1)
            rounds += 1
            border, count = number(guess), tl.zeros((BLOCK,), tl.int32)
            for start in range(0, V, BLOCK):
                v = start + tl.arange(0, BLOCK)
                count += (tl.load(row + v, mask=v < V, other=-3e38).to(tl.float32) >= border).to(tl.int32)
            reached = tl.sum(count, 0)
            f = tl.log(tl.maximum(reached.to(tl.float32), 0.5) / n)
            if reached >= n:
                low, f_low, f_high, side = guess, f, tl.where(side == 1, f_high / 2, f_high), 1
                high = tl.where(reached == n, guess + 1, high)                # found
            else:
                high, f_high, f_low, side = guess, f, tl.where(side == -1, f_low / 2, f_low), -1

        border, total, mean = number(low), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(row + v, mask=v < V, other=-3e38).to(tl.float32)
            e = tl.where(z >= border, tl.exp(z - top), 0.0)
            total, mean = total + e, mean + e * (z - top)
        s = tl.sum(total, 0)
        tl.store(out + c, border)
        tl.store(out + C + c, top + tl.log(s))
        tl.store(out + 2 * C + c, tl.sum(mean, 0) / s - tl.log(s))

    @triton.jit
    def exp_of_difference(z, y):
        """exp(z - y): a multiply-add and a power of two"""
        return tl.exp2(tl.fma(z, 1.4426950408889634, -(y * 1.4426950408889634)))

    @triton.jit
    def loss_grad(logits, d_logits, targets, teacher, alpha, beta, ce, kl, R, C, V, KL: tl.constexpr, BLOCK: tl.constexpr):
        """the logits of row r for target c: CE, and its gradient alpha (P - onehot); with the KL to row 0, and beta (P~ - Q~)"""
        r, c = tl.program_id(0) % R, tl.program_id(0) // R     # rows of one target run side by side, and read row 0 from a cache
        row, main = logits + (r.to(tl.int64) * C + c) * V, logits + c.to(tl.int64) * V
        a, b, target = tl.load(alpha + r), tl.load(beta + r - 1, mask=r > 0, other=0.0), tl.load(targets + c)
        if KL:
            border, lse_q, h_q = tl.load(teacher + c), tl.load(teacher + C + c), tl.load(teacher + 2 * C + c)

        # first pass. m the largest logit so far, s sum exp(z - m), s_n the same over the teacher's N. A thread takes 8
        # neighbours and keeps an m and sums of its own: threads that wait for one another at every step are slow
        lane = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        m, s = tl.full((BLOCK // 8,), LOWEST, tl.float32), tl.zeros((BLOCK // 8,), tl.float32)
        s_n, x = s, s
        for start in range(0, V, BLOCK):
            v = start + lane
            z = tl.load(row + v, mask=v < V, other=LOWEST).to(tl.float32)
            m_new = tl.maximum(m, tl.max(z, 1))
            e, old = exp_of_difference(z, m_new[:, None]), tl.exp(m - m_new)
            s, m = s * old + tl.sum(e, 1), m_new
            if KL:
                keep = tl.load(main + v, mask=v < V, other=LOWEST).to(tl.float32) >= border
                s_n = s_n * old + tl.sum(tl.where(keep, e, 0.0), 1)
        top = tl.max(m, 0)
        old = tl.exp(m - top)
        total = tl.sum(s * old, 0)
        lse, inside = top + tl.log(total), a
        if KL:                                                 # P~ is a multiple of P inside, and 0 outside
            total_n = tl.maximum(tl.sum(s_n * old, 0), total * 1e-37)
            inside = a + b * total / total_n
        tl.store(ce + r * C + c, lse - tl.load(row + target).to(tl.float32))

        # second pass: the gradient, and x = sum Q~ z
        for start in range(0, V, BLOCK):
            v = start + lane
            z = tl.load(row + v, mask=v < V, other=LOWEST).to(tl.float32)
            g = tl.where(v == target, -a, 0.0)
            if KL:
                q = tl.load(main + v, mask=v < V, other=LOWEST).to(tl.float32)
                q_n = tl.where(q >= border, exp_of_difference(q, lse_q), 0.0)
                x += tl.sum(q_n * z, 1)
                g += exp_of_difference(z, lse) * tl.where(q >= border, inside, a) - b * q_n
            else:
                g += exp_of_difference(z, lse) * a
            tl.store(d_logits + (r.to(tl.int64) * C + c) * V + v, g.to(tl.bfloat16), mask=v < V)
        if KL:
            kl_c = h_q - tl.sum(x, 0) + top + tl.log(total_n)                 # sum Q~ (log Q~ - log P~)
            tl.store(kl + (r - 1) * C + c, tl.where(b > 0, kl_c, 0.0), mask=r > 0)


# -----------------------------------------------------------------------------
# decoding

MANY = 32                                                      # rows from which a library's matrix product is the faster one


def linear(x, weight, norm=None, square_relu=False, residual=None, rows=None, second=None, copy=None):
    """
    x (B, T, in) -> x @ weight.T (B, T, out), weight (out, in). Before it RMSNorm with the weights `norm`, after it relu^2, or
    the sum with `residual` (B, T, out). Up to MANY rows in all, a row's result is the same to the last bit whatever rows are
    beside it

    rows    (B, T): take those of x, which is a cache (B, S, in) or a table (S, in)
    second  (x, norm, rows) like these three; [x ; its x] @ weight.T then, weight (out, 2 in)
    copy    (cache (B, S, out), rows (B, T)): write the result there, too
    """
    shape, N, K = (x if rows is None else rows.unsqueeze(-1)).shape[:-1], len(weight), x.size(-1)
    if shape.numel() > MANY:
        parts = [linear_input(*part) for part in ((x, norm, rows), second or ()) if part]
        y = F.linear(torch.cat(parts, -1), weight)
        y = F.relu(y).square() if square_relu else y if residual is None else y + residual
        if copy is not None:
            copy[0][torch.arange(len(y), device=y.device)[:, None], copy[1]] = y
        return y
    x2, norm2, rows2 = second or (None, None, None)
    into, at = copy or (None, None)
    apart = [0 if r is None or t.dim() == 2 else t.size(1) for t, r in ((x, rows), (x2, rows2), (into, at))]    # S of each
    rows, rows2, at = (r if r is None else r.contiguous() for r in (rows, rows2, at))
    out = x.new_empty(*shape, N)
    BN, BK, warps, stages = tiles(N, K, second is not None)
    few_rows[(triton.cdiv(N, BN), triton.cdiv(shape.numel(), 16))](
        x.contiguous(), norm, rows, x2, norm2, rows2, weight, residual, out, into, at, shape.numel(), N, shape[-1], *apart, K=K,
        SQUARE_RELU=square_relu, BN=BN, BK=min(BK, triton.next_power_of_2(K)), num_warps=warps,
        num_stages=stages if x.element_size() == 2 else 2, **early())
    return out


def tiles(N, K, two):
    """columns and depth of a program's tile, warps and stages, as timed on an H100. Within the 99 KB of shared memory of a
    consumer GPU: (stages - 1) (BN + 16) BK numbers, twice as many with `second`"""
    return ((8, 128, 2, 3) if two else (64, 64, 2, 3) if N > 8192 else (8, 512, 2, 3) if K > 1024 else (32, 128, 2, 3) if N > 1024
            else (8, 128, 2, 5))


def linear_input(x, norm, rows):
    if rows is not None:
        x = x[rows] if x.dim() == 2 else x[torch.arange(len(x), device=x.device)[:, None], rows]
    return x if norm is None else F.rms_norm(x, x.shape[-1:], norm, 1e-5)


def attention(qkv, rope, cache, pos, n_head, tile=16):
    """qkv (B, T, 3 d) of T <= tile new tokens at positions pos (B, T) -> (B, T, d); writes their keys and values into the
    cache, (B, H, S, hd) each. rope: the angles of all positions, (2, length, hd)"""
    B, T, d = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    keys, values = cache
    out = qkv.new_empty(B, T, d)
    slots = max(16, min(128, 2**14 * n_head // (d * qkv.element_size())))          # at a time: what fits into shared memory
    attend[(B * n_head,)](qkv, keys, values, pos.contiguous(), rope, out, T, keys.size(2), rope.size(1), H=n_head, HD=d // n_head,
                          ROWS=tile, BS=slots, num_warps=4, **early())
    return out


@functools.cache
def early():
    """whether a kernel may be started while the one before it still runs, and wait inside (Hopper and later)"""
    there = torch.cuda.is_available() and torch.version.cuda and torch.cuda.get_device_capability() >= (9, 0)
    return dict(PDL=True, launch_pdl=True) if there and hasattr(tl.extra.cuda, "gdc_wait") else dict(PDL=False)


def block(self, tile, x, rope, cache=None, where=None, copy=None):
    """model.Block.forward, for new tokens whose `where` was made by the function below"""
    if where is None or where[2] is not None:
        return type(self).forward(self, x, rope, cache, where)
    qkv = linear(x, self.attn.qkv.weight, norm=self.norm1.weight)
    x = linear(attention(qkv, rope, cache, where[1], self.attn.n_head, tile), self.attn.proj.weight, residual=x)
    return linear(linear(x, self.fc.weight, norm=self.norm2.weight, square_relu=True), self.proj.weight, residual=x, copy=copy)


def trunk_step(self, tokens, cache, pos):
    """GPT.trunk_step; the last block writes h^0 into its cache"""
    where = pos if isinstance(pos, tuple) else self.where(cache, pos)
    if where[2] is not None:
        return type(self).trunk_step(self, tokens, cache, where)
    x, last = self.embed(tokens), len(self.blocks) - 1
    for i, part in enumerate(self.blocks):
        x = part(x, where[3], cache.kv[i], where, copy=(cache.hidden[0], where[1]) if cache.hidden and i == last else None)
    return x


def head_step(self, k, tokens, cache, pos):
    """GPT.head_step; the rows of the cache and of the embedding are fetched, and h^k written back, on the way"""
    where = pos if isinstance(pos, tuple) else self.where(cache, pos)
    if where[2] is not None:
        return type(self).head_step(self, k, tokens, cache, where)
    part, pos = self.heads[k - 1], where[1]
    x = linear(cache.hidden[k - 1], part.mix.weight, norm=part.norm_hidden.weight, rows=pos,
               second=(self.weight, part.norm_embed.weight, tokens))
    return part.block(x, where[3], cache.kv[self.config.n_layer + k - 1], where,
                      copy=(cache.hidden[k], pos) if k < len(cache.hidden) else None)


def where(self, cache, pos):
    """GPT.where: no mask, and the angles of all positions, for a few new tokens"""
    return type(self).where(self, cache, pos) if pos.size(1) > tile_of(self) else (cache.row, pos, None, self.rope)


def tile_of(model):
    """new tokens that attend() has room for: those of any round of this model, with however many heads. One number a model,
    for another tile may be summed in another order"""
    return max(16, triton.next_power_of_2(model.config.n_mtp + 1))


def logits(self, k, hidden, vocab=None):
    """GPT.logits"""
    return linear(hidden, self.weight[:vocab], norm=(self.norm if k == 0 else self.heads[k - 1].norm_out).weight)


def install(model):
    """let this model run on these kernels from now on, wherever it takes a few tokens with a cache"""
    weight, hd = model.weight, model.config.n_embd // model.config.n_head
    if version() < (3, 5) or not (weight.is_cuda or interpreted()) or weight.dtype == torch.float64 or hd < 16 or hd & (hd - 1):
        found = f"Triton {triton.__version__}" if triton else "no Triton"
        raise ValueError("the kernels need Triton 3.5 or later, a CUDA GPU, a type of 32 bits or fewer and n_embd / n_head a power of "
                         f"two from 16 on; found {found}, {weight.device.type}, {str(weight.dtype)[6:]} and {hd}: decode without "
                         "(--compile off)")
    for part in [*model.blocks, *(head.block for head in model.heads)]:
        part.forward = functools.partial(block, part, tile_of(model))
    for function in (where, logits, trunk_step, head_step):
        setattr(model, function.__name__, functools.partial(function, model))


if triton is not None:

    @triton.jit
    def place_of(rows, m, M, T, S):
        """which row of a cache or a table row m of the batch means; without rows, row m"""
        if rows is None:
            place = m
        else:                                                  # no `return` in the middle: Triton compiles what follows it
            place = tl.load(rows + m, mask=m < M, other=0) + m // T * S
        return place

    @triton.jit
    def add_product(y, square, x, norm, source, weight, n, m, k, M, N, stride, K: tl.constexpr):
        """y (16, BN) and the sums of squares, BK columns further on"""
        w = tl.load(weight + n[None, :].to(tl.int64) * stride + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        a = tl.load(x + source[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        if norm is not None:
            wide = a.to(tl.float32)
            square += wide * wide
            a = (wide * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[None, :]).to(a.dtype)
        return tl.dot(a, w, y, input_precision="ieee"), square

    @triton.jit
    def few_rows(x, norm, rows, x2, norm2, rows2, weight, residual, out, copy, at, M, N, T, S, S2, S3, K: tl.constexpr,
                 SQUARE_RELU: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
        """BN columns of the output for 16 rows, as many as a tensor core takes. What it costs is the weights' one journey"""
        if PDL:
            tl.extra.cuda.gdc_wait()
        n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * 16 + tl.arange(0, 16)
        there = (m < M)[:, None] & (n < N)[None, :]
        y, square = tl.zeros((16, BN), tl.float32), tl.zeros((16, BK), tl.float32)
        y2, square2, source = y, square, place_of(rows, m, M, T, S)
        if x2 is None:
            for start in range(0, K, BK):
                y, square = add_product(y, square, x, norm, source, weight, n, m, start + tl.arange(0, BK), M, N, K, K)
        else:                                                  # both in one loop: their weights travel at the same time
            source2 = place_of(rows2, m, M, T, S2)
            for start in range(0, K, BK):
                k = start + tl.arange(0, BK)
                y, square = add_product(y, square, x, norm, source, weight, n, m, k, M, N, 2 * K, K)
                y2, square2 = add_product(y2, square2, x2, norm2, source2, weight + K, n, m, k, M, N, 2 * K, K)
        if norm is not None:                                   # the root mean square belongs to the row: divide at the end
            y *= tl.rsqrt(tl.sum(square, 1) / K + 1e-5)[:, None]
        if x2 is not None:
            if norm2 is not None:
                y2 *= tl.rsqrt(tl.sum(square2, 1) / K + 1e-5)[:, None]
            y += y2
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        if SQUARE_RELU:
            y = tl.maximum(y, 0.0)
            y *= y
        if residual is not None:
            y += tl.load(residual + m[:, None] * N + n[None, :], mask=there, other=0.0).to(tl.float32)
        y = y.to(out.dtype.element_ty)
        tl.store(out + m[:, None] * N + n[None, :], y, mask=there)
        if copy is not None:
            tl.store(copy + place_of(at, m, M, T, S3)[:, None] * N + n[None, :], y, mask=there)

    @triton.jit
    def turned(x, row, rope, p, length, HD: tl.constexpr):
        """model.rotate of the rows x[row : row + HD] at positions p"""
        i = tl.arange(0, HD)
        other = tl.load(x + row[:, None] + (i + HD // 2)[None, :] % HD).to(tl.float32) * tl.where(i < HD // 2, -1.0, 1.0)[None, :]
        cos, sin = tl.load(rope + p[:, None] * HD + i[None, :]), tl.load(rope + (length + p)[:, None] * HD + i[None, :])
        return tl.load(x + row[:, None] + i[None, :]).to(tl.float32) * cos + other * sin

    @triton.jit
    def attend(qkv, keys, values, pos, rope, out, T, S, length, H: tl.constexpr, HD: tl.constexpr, ROWS: tl.constexpr, BS: tl.constexpr,
               PDL: tl.constexpr):
        """one attention head of one sequence: turn q and k, write k and v, then softmax(q k) v over the cache, BS slots at a time"""
        if PDL:
            tl.extra.cuda.gdc_wait()
        b, h = tl.program_id(0) // H, tl.program_id(0) % H
        t, i = tl.arange(0, ROWS), tl.arange(0, HD)
        there = (t < T)[:, None]
        t = tl.minimum(t, T - 1)                               # rows past the last repeat it
        p = tl.load(pos + b * T + t).to(tl.int32)
        row = (b * T + t) * 3 * H * HD + h * HD
        kind = keys.dtype.element_ty
        q = (turned(qkv, row, rope, p, length, HD) * HD ** -0.5).to(kind)
        own = tl.program_id(0).to(tl.int64) * S * HD
        slot = own + p[:, None] * HD + i[None, :]
        tl.store(keys + slot, turned(qkv, row + H * HD, rope, p, length, HD).to(kind), mask=there)
        tl.store(values + slot, tl.load(qkv + (row + 2 * H * HD)[:, None] + i[None, :]), mask=there)
        tl.debug_barrier()                                     # what one thread wrote, others read below
        m, total, y = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, HD), tl.float32)
        for start in range(0, tl.max(p, 0) + 1, BS):           # slots past a row's position change nothing, not even a bit
            s = start + tl.arange(0, BS)
            place = own + s[:, None] * HD + i[None, :]
            k, v = tl.load(keys + place, mask=(s < S)[:, None], other=0.0), tl.load(values + place, mask=(s < S)[:, None], other=0.0)
            score = tl.where(s[None, :] <= p[:, None], tl.dot(q, tl.trans(k), input_precision="ieee"), -float("inf"))
            top = tl.maximum(m, tl.max(score, 1))
            e, old = tl.exp(score - top[:, None]), tl.exp(m - top)
            total, y, m = total * old + tl.sum(e, 1), y * old[:, None] + tl.dot(e.to(kind), v, input_precision="ieee"), top
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        place = (b * T + t)[:, None] * H * HD + h * HD + i[None, :]
        tl.store(out + place, (y / total[:, None]).to(kind), mask=there)
