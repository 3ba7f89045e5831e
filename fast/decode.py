"""
fast/decode.py: the steps of decode.Decoder on two Triton kernels, as one CUDA graph. Optional.

At batch 1, decoding is bound by kernel launches and by reading the weights once per step. So a
block is five launches here, with the norms, the rotation, the cache and the sums inside:

    skinny_matmul_kernel  a few rows times a matrix; RMSNorm before it, an activation or a sum after
    attention_kernel      the new tokens' keys and values into the cache, then attention over it

and a whole round is recorded once as a CUDA graph, then replayed by one launch.

Up to MAX_ROWS rows, a row's result does not depend on the rows beside it, not even in the last bit:
verifying K drafts rounds as K ordinary steps would, so that in bf16, too, the text is that of
ordinary decoding.

FastModel repeats model.Block, MTPHead and the steps of model.GPT; it reads the model's weights and
changes nothing in it. tests/test_fast.py compares the two.

Shapes in comments: B sequences, T new tokens of each, S cache slots, M = B T rows.
"""

import functools
import gc
from functools import partial

import torch
import torch.nn.functional as F

from decode import PREFILL, Decoder
from fast.heads import HEAD_COUNTS
from fast.loss import interpreted, triton, triton_version
from model import Positions

if triton is not None:
    import triton.language as tl

MAX_ROWS = 128  # with more, a library's matrix product is used


def unsupported(model):
    """-> why FastModel can't run this model here, in a few words, or None where it can"""
    weight = model.weight
    head_dim = model.config.n_embd // model.config.n_head
    if not weight.is_cuda and not interpreted():
        return "no CUDA GPU"
    if triton_version() < (3, 5):
        found = f"Triton {triton.__version__}" if triton else "no Triton"
        return f"needs Triton 3.5 or later, found {found}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"for float32 and bfloat16, not {str(weight.dtype)[6:]}"
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"needs n_embd / n_head to be a power of two from 16 on, not {head_dim}"
    if weight.is_cuda and torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    return None


# -----------------------------------------------------------------------------
# the steps of a model


class FastModel:
    """the steps of a GPT for few tokens; more tokens (the prefill) go through the model itself"""

    def __init__(self, model):
        self.model = model
        self.config = model.config
        self.eps = model.config.norm_eps
        self.rope = model.rope  # recorded graphs read this one; model.to() makes another
        # new tokens that attention_kernel has room for: those of any round of this model, with
        # however many heads. One number per model: another tile may be summed in another order
        self.tile = 16
        while self.tile < model.config.n_mtp + 1:
            self.tile *= 2

    @property
    def weight(self):
        return self.model.weight

    def count_parameters(self):
        return self.model.count_parameters()

    def positions(self, cache, pos):
        """as GPT.positions; for few tokens without a mask, and with the angles of all positions"""
        if pos.size(1) > self.tile:
            return self.model.positions(cache, pos)
        return Positions(cache.seq, pos, None, self.rope)

    def block(self, block, x, kv, positions, copy=None):
        """model.Block.forward; the result also goes into `copy`, see linear()"""
        activation = "swiglu" if block.gated else "square_relu"
        qkv = linear(x, block.attn.qkv.weight, norm=block.norm1.weight, eps=self.eps)
        y = attention(qkv, positions.rope, kv, positions.pos, self.config.n_head, self.tile)
        x = linear(y, block.attn.proj.weight, residual=x)
        y = linear(
            x, block.fc.weight, norm=block.norm2.weight, activation=activation, eps=self.eps
        )
        return linear(y, block.proj.weight, residual=x, copy=copy)

    def trunk_step(self, tokens, cache, positions):
        """GPT.trunk_step; the last block writes h^0 into the cache"""
        if positions.mask is not None:
            return self.model.trunk_step(tokens, cache, positions)
        x = self.model.embed(tokens)
        last = len(self.model.blocks) - 1
        for i, block in enumerate(self.model.blocks):
            copy = None
            if cache.hidden and i == last:
                copy = (cache.hidden[0], positions.pos)
            x = self.block(block, x, cache.kv[i], positions, copy)
        return x

    def head_step(self, k, tokens, cache, positions):
        """GPT.head_step; the rows of the cache and of the embedding are fetched on the way"""
        if positions.mask is not None:
            return self.model.head_step(k, tokens, cache, positions)
        head = self.model.heads[k - 1]
        x = linear(
            cache.hidden[k - 1], head.mix.weight, norm=head.norm_hidden.weight, rows=positions.pos,
            second=(self.weight, head.norm_embed.weight, tokens), eps=self.eps,
        )
        copy = None
        if k < len(cache.hidden):
            copy = (cache.hidden[k], positions.pos)
        kv = cache.kv[self.config.n_layer + k - 1]
        return self.block(head.block, x, kv, positions, copy)

    def logits(self, k, hidden, vocab=None):
        """GPT.logits"""
        norm = self.model.norm if k == 0 else self.model.heads[k - 1].norm_out
        return linear(hidden, self.weight[:vocab], norm=norm.weight, eps=self.eps)


class FastDecoder(Decoder):
    """decode.Decoder on a FastModel: the small operations around the kernels are compiled, and a
    round is replayed as a CUDA graph, one for each number of heads; so is the reading of a prompt,
    one for each part of the model. The random numbers are drawn outside of a round: one seed gives
    the same ones as in the plain Decoder, while as many heads run"""

    why = "the fast path (Triton kernels in a CUDA graph)"

    def __init__(self, model, *args, **options):
        super().__init__(FastModel(model), *args, **options)
        # 16 rows in all cost as much as one: heads rarely lack more when another k is used
        self.least_width = 16 // len(self.n)
        counts = {self.heads}
        if self.auto:
            counts.update(k for k in HEAD_COUNTS if k < self.heads)
            for k in set(range(self.heads)) - counts:
                self.auto.costs[k] = float("inf")
        self.graphs = {}
        self.rebuilds = {}
        if not self.n.is_cuda:                            # in tests
            return
        # every Decoder is another function to torch.compile
        torch._dynamo.config.recompile_limit = 4096
        torch._dynamo.config.accumulated_recompile_limit = 4096
        self.window = torch.compile(self.window, dynamic=False)
        self.propose = torch.compile(self.propose, dynamic=False)
        self.accept = torch.compile(self.accept, dynamic=False)
        pool = torch.cuda.graph_pool_handle()             # one memory: the graphs run in turns
        # a capture runs rounds, so all of them precede the prefill
        self.k = -1
        for k in sorted(counts):
            self.use(k)
            replay = capture(super().advance, pool)
            self.graphs[k] = (replay, self.noise, self.drafts)
        if len(self.n) <= 16:  # with more, the work outweighs the launches
            for j in range(self.heads + 1):
                self.rebuilds[j] = capture(partial(super().rebuild, [j], PREFILL), pool)

    def use(self, k):
        super().use(k)
        if k in self.graphs:                              # it reads the numbers of its capture
            self.noise = self.graphs[k][1]

    def rebuild(self, parts, rows):
        """Decoder.rebuild; where PREFILL rows are enough, a graph of them for each part"""
        if rows > PREFILL or not self.rebuilds.keys() >= set(parts):
            return super().rebuild(parts, rows)
        for j in parts:
            hidden = self.rebuilds[j]()
        return hidden

    def advance(self):
        if not self.graphs:
            return super().advance()
        replay, _, self.drafts = self.graphs[self.k]
        replay()


@functools.cache
def recording_stream(device):
    """one for all recordings: PyTorch keeps memory for each stream"""
    return torch.cuda.Stream(device)


@torch.no_grad()
def capture(function, pool=None):
    """record the kernels of one call -> a function that replays them by one launch, and returns the
    same tensors. Recordings may share a memory pool if they never run at the same time; what one
    returns is then to be used before another one runs"""
    stream = recording_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):                                # compile, and allocate what stays
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()                     # to free an earlier Decoder's graphs would spoil the recording
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = function()
    finally:
        if collecting:
            gc.enable()

    def replay():
        graph.replay()
        return result

    return replay


# -----------------------------------------------------------------------------
# launching the kernels


def linear(
    x, weight, norm=None, activation=None, residual=None, rows=None, second=None, copy=None,
    eps=1e-5,
):
    """
    x (B, T, in) -> x @ weight.T (B, T, out), weight (out, in). Before it RMSNorm with the weights
    `norm`, after it an activation, or the sum with `residual` (B, T, out). Up to MAX_ROWS rows in
    all, a row's result is the same to the last bit whatever rows are beside it

    activation  None | "square_relu" | "swiglu": weight (2 out, in) is [gate; value], and the result
            silu(x @ gate.T) * (x @ value.T)
    rows    (B, T): take those rows of x, which is a cache (B, S, in) or a table (S, in)
    second  (x, norm, rows) like these three; then [x ; its x] @ weight.T, weight (out, 2 in)
    copy    (cache (B, S, out), rows (B, T)): write the result there, too
    """
    shape = x.shape[:-1] if rows is None else rows.shape  # (B, T)
    M = shape.numel()
    N = len(weight)
    K = x.size(-1)
    if M > MAX_ROWS:
        return linear_by_torch(x, weight, norm, activation, residual, rows, second, copy, eps)
    if activation == "swiglu":
        N //= 2
        second = (x, norm, rows)
    x2, norm2, rows2 = second or (None, None, None)
    copy_to, copy_rows = copy or (None, None)
    tensors = []
    for tensor in (x, norm, rows, x2, norm2, rows2, weight, residual):
        tensors.append(None if tensor is None else tensor.contiguous())
    if copy_rows is not None:
        copy_rows = copy_rows.contiguous()
        assert copy_to.is_contiguous()
    check_types(x.dtype, (x2, weight, residual, copy_to), (rows, rows2, copy_rows))
    strides = [slots_of(x, rows), slots_of(x2, rows2), slots_of(copy_to, copy_rows)]
    out = x.new_empty(*shape, N)
    BN, BK, warps, stages = tiles(N, K, second is not None)
    # programs that read the same weights are neighbours: these travel once
    skinny_matmul_kernel[(triton.cdiv(M, 16), triton.cdiv(N, BN))](
        *tensors, out, copy_to, copy_rows, M, N, shape[-1], *strides,
        K=K, ACTIVATION=activation, EPS=eps, BN=BN, BK=min(BK, triton.next_power_of_2(K)),
        num_warps=warps, num_stages=stages if x.element_size() == 2 else 2, **pdl_options(),
    )
    return out


def check_types(dtype, matrices, indices):
    assert all(x is None or x.dtype == dtype for x in matrices)
    assert all(x is None or x.dtype == torch.int64 for x in indices)


def slots_of(x, rows):
    """rows of x per sequence of the batch: S of a cache (B, S, in), 0 for a table or no rows"""
    return 0 if rows is None or x.dim() == 2 else x.size(1)


def tiles(N, K, two):
    """columns and depth of a program's tile, warps and stages, as timed on an H100. They fit the
    99 KB of shared memory of a consumer GPU: (stages - 1) (BN + 16) BK numbers, twice as many with
    `second`"""
    if two:
        return 8, 128, 2, 3
    if N > 8192:
        return 64, 64, 2, 3
    if K > 1024:
        return 8, 512, 2, 3
    if N > 1024:
        return 32, 128, 2, 3
    return 8, 128, 2, 5


def linear_by_torch(x, weight, norm, activation, residual, rows, second, copy, eps):
    """the same in plain PyTorch: for many rows, and the twin of skinny_matmul_kernel"""
    inputs = [normed_rows(x, norm, rows, eps)]
    if second is not None:
        inputs.append(normed_rows(*second, eps))
    y = F.linear(torch.cat(inputs, dim=-1), weight)
    if activation == "square_relu":
        y = F.relu(y).square()
    if activation == "swiglu":
        gate, y = y.chunk(2, dim=-1)
        y = F.silu(gate) * y
    if residual is not None:
        y = y + residual
    if copy is not None:
        copy_to, copy_rows = copy
        copy_to[torch.arange(len(y), device=y.device)[:, None], copy_rows] = y
    return y


def normed_rows(x, norm, rows, eps):
    if rows is not None and x.dim() == 2:
        x = x[rows]
    elif rows is not None:
        x = x[torch.arange(len(x), device=x.device)[:, None], rows]
    return x if norm is None else F.rms_norm(x, x.shape[-1:], norm, eps)


def attention(qkv, rope, cache, pos, n_head, tile=16):
    """qkv (B, T, (H + 2 G) hd) of T <= tile new tokens at positions pos (B, T) -> (B, T, d); writes
    their keys and values into the cache, (B, G, S, hd) each. rope: all positions', (2, length, hd)
    """
    B, T, _ = qkv.shape
    keys, values = cache
    groups, S, head_dim = keys.shape[1:]
    assert T <= tile and qkv.is_contiguous() and rope.is_contiguous()
    assert keys.is_contiguous() and values.is_contiguous()
    assert keys.dtype == values.dtype == qkv.dtype and rope.dtype == torch.float32
    out = qkv.new_empty(B, T, n_head * head_dim)
    # slots at a time: what fits into shared memory
    slots = max(16, min(128, 2**14 // (head_dim * qkv.element_size())))
    attention_kernel[(B * n_head,)](
        qkv, keys, values, pos.contiguous(), rope, out, T, S, rope.size(1), H=n_head, G=groups,
        HD=head_dim, ROWS=tile, BS=slots, num_warps=4, **pdl_options(),
    )
    return out


@functools.cache
def pdl_options():
    """programmatic dependent launch (Hopper and later): a kernel may be started while the one
    before it still runs, and waits inside"""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return dict(PDL=False)
    if torch.cuda.get_device_capability() < (9, 0) or not hasattr(tl.extra.cuda, "gdc_wait"):
        return dict(PDL=False)
    return dict(PDL=True, launch_pdl=True)


# -----------------------------------------------------------------------------
# the kernels


if triton is not None:

    @triton.jit
    def row_index(rows_ptr, m, M, T, S):
        """which row of a cache or a table row m of the batch means; without rows, row m"""
        if rows_ptr is None:
            index = m
        else:  # no `return` in the middle: Triton compiles what follows it
            index = tl.load(rows_ptr + m, mask=m < M, other=0) + m // T * S
        return index

    @triton.jit
    def add_product(
        y, square, x_ptr, norm_ptr, source, weight_ptr, n, m, k, M, N, stride, K: tl.constexpr
    ):
        """add the product of BK columns to y (16, BN), and their squares to `square` (16, BK)"""
        w_ptr = weight_ptr + n[None, :].to(tl.int64) * stride + k[:, None]
        w_mask = (n < N)[None, :] & (k < K)[:, None]
        w = tl.load(w_ptr, mask=w_mask, other=0.0)
        a_ptr = x_ptr + source[:, None] * K + k[None, :]
        a_mask = (m < M)[:, None] & (k < K)[None, :]
        a = tl.load(a_ptr, mask=a_mask, other=0.0)
        if norm_ptr is not None:
            a_32 = a.to(tl.float32)
            square += a_32 * a_32
            gain = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            a = (a_32 * gain[None, :]).to(a.dtype)
        return tl.dot(a, w, y, input_precision="ieee"), square

    @triton.jit
    def prefetch(weight_ptr, n, N, stride, K: tl.constexpr):
        """bring K columns of the rows n of a weight into the L2 cache, 128 bytes at a time"""
        LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        lines: tl.constexpr = triton.next_power_of_2(triton.cdiv(K, LINE))
        k = tl.minimum(tl.arange(0, lines) * LINE, K - 1)
        n = tl.minimum(n, N - 1).to(tl.int64)
        line_ptr = weight_ptr + n[:, None] * stride + k[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [line_ptr], dtype=tl.int32,
            is_pure=False, pack=1,
        )

    # in plain PyTorch: linear_by_torch
    @triton.jit
    def skinny_matmul_kernel(
        x_ptr, norm_ptr, rows_ptr, x2_ptr, norm2_ptr, rows2_ptr, weight_ptr, residual_ptr, out_ptr,
        copy_ptr, copy_rows_ptr, M, N, T, S, S2, S3, K: tl.constexpr, ACTIVATION: tl.constexpr,
        EPS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
    ):
        """BN columns of the output for 16 rows, as many as a tensor core takes. Its cost is reading
        the weights once"""
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        stride = K
        weight2_ptr = weight_ptr
        if ACTIVATION == "swiglu":   # the second half of the weight's rows
            weight2_ptr += N * K
        elif x2_ptr is not None:     # of its columns
            weight2_ptr += K
            stride = 2 * K
        if PDL:
            # the next kernel may start at once, and fetches its weights while this one runs. With
            # more rows, or weights larger than the cache, that was slower
            if (M <= 16) & (N <= 8192):
                prefetch(weight_ptr, n, N, stride, K)
                if x2_ptr is not None:
                    prefetch(weight2_ptr, n, N, stride, K)
            tl.extra.cuda.gdc_wait()
            if M <= 16:
                tl.extra.cuda.gdc_launch_dependents()
        m = tl.program_id(0) * 16 + tl.arange(0, 16)
        valid = (m < M)[:, None] & (n < N)[None, :]
        y = tl.zeros((16, BN), tl.float32)
        square = tl.zeros((16, BK), tl.float32)
        y2 = y
        square2 = square
        source = row_index(rows_ptr, m, M, T, S)
        if x2_ptr is None:
            for start in range(0, K, BK):
                k = start + tl.arange(0, BK)
                y, square = add_product(
                    y, square, x_ptr, norm_ptr, source, weight_ptr, n, m, k, M, N, stride, K
                )
        else:  # both in one loop: their weights travel at the same time
            source2 = row_index(rows2_ptr, m, M, T, S2)
            for start in range(0, K, BK):
                k = start + tl.arange(0, BK)
                y, square = add_product(
                    y, square, x_ptr, norm_ptr, source, weight_ptr, n, m, k, M, N, stride, K
                )
                y2, square2 = add_product(
                    y2, square2, x2_ptr, norm2_ptr, source2, weight2_ptr, n, m, k, M, N, stride, K
                )
        if norm_ptr is not None:  # the root mean square belongs to the row: divide at the end
            y *= tl.rsqrt(tl.sum(square, 1) / K + EPS)[:, None]
        if x2_ptr is not None:
            if norm2_ptr is not None:
                y2 *= tl.rsqrt(tl.sum(square2, 1) / K + EPS)[:, None]
            if ACTIVATION == "swiglu":
                y = y / (1 + tl.exp(-y)) * y2
            else:
                y += y2
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        if ACTIVATION == "square_relu":
            y = tl.maximum(y, 0.0)
            y *= y
        place = m[:, None] * N + n[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + place, mask=valid, other=0.0).to(tl.float32)
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, y, mask=valid)
        if copy_ptr is not None:
            copy_row = row_index(copy_rows_ptr, m, M, T, S3)
            tl.store(copy_ptr + copy_row[:, None] * N + n[None, :], y, mask=valid)

    # in plain PyTorch: model.rotate
    @triton.jit
    def load_rotated(x_ptr, row, rope_ptr, p, length, HD: tl.constexpr):
        """the rows x[row : row + HD], rotated to positions p"""
        i = tl.arange(0, HD)
        sign = tl.where(i < HD // 2, -1.0, 1.0)
        x = tl.load(x_ptr + row[:, None] + i[None, :]).to(tl.float32)
        opposite = (i + HD // 2) % HD
        other = tl.load(x_ptr + row[:, None] + opposite[None, :]).to(tl.float32)
        cos = tl.load(rope_ptr + p[:, None] * HD + i[None, :])
        sin = tl.load(rope_ptr + (length + p)[:, None] * HD + i[None, :])
        return x * cos + other * sign[None, :] * sin

    # in plain PyTorch: model.Attention.attend_to_cache
    @triton.jit
    def attention_kernel(
        qkv_ptr, keys_ptr, values_ptr, pos_ptr, rope_ptr, out_ptr, T, S, length, H: tl.constexpr,
        G: tl.constexpr, HD: tl.constexpr, ROWS: tl.constexpr, BS: tl.constexpr, PDL: tl.constexpr,
    ):
        """one attention head of one sequence: rotate q and k, write k and v, then softmax(q k) v
        over the cache, BS slots at a time. Heads that share keys all write them, the same ones"""
        if PDL:
            tl.extra.cuda.gdc_wait()
            if tl.num_programs(0) // H * T <= 16:
                tl.extra.cuda.gdc_launch_dependents()
        b = tl.program_id(0) // H
        h = tl.program_id(0) % H
        g = h // (H // G)
        t = tl.arange(0, ROWS)
        i = tl.arange(0, HD)
        valid = (t < T)[:, None]
        t = tl.minimum(t, T - 1)  # rows past the last repeat it
        p = tl.load(pos_ptr + b * T + t).to(tl.int32)
        row = (b * T + t) * (H + 2 * G) * HD
        dtype = keys_ptr.dtype.element_ty
        q = load_rotated(qkv_ptr, row + h * HD, rope_ptr, p, length, HD)
        q = (q * HD**-0.5).to(dtype)
        k_new = load_rotated(qkv_ptr, row + (H + g) * HD, rope_ptr, p, length, HD).to(dtype)
        v_new = tl.load(qkv_ptr + (row + (H + G + g) * HD)[:, None] + i[None, :])
        own = (b * G + g).to(tl.int64) * S * HD
        slot = own + p[:, None] * HD + i[None, :]
        tl.store(keys_ptr + slot, k_new, mask=valid)
        tl.store(values_ptr + slot, v_new, mask=valid)
        tl.debug_barrier()  # what one thread wrote, others read below
        m = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        y = tl.zeros((ROWS, HD), tl.float32)
        # slots past a row's position change nothing, not even a bit
        for start in range(0, tl.max(p, 0) + 1, BS):
            s = start + tl.arange(0, BS)
            place = own + s[:, None] * HD + i[None, :]
            k = tl.load(keys_ptr + place, mask=(s < S)[:, None], other=0.0)
            v = tl.load(values_ptr + place, mask=(s < S)[:, None], other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            score = tl.where(s[None, :] <= p[:, None], score, -float("inf"))
            top = tl.maximum(m, tl.max(score, 1))
            e = tl.exp(score - top[:, None])
            scale = tl.exp(m - top)
            total = total * scale + tl.sum(e, 1)
            y = y * scale[:, None] + tl.dot(e.to(dtype), v, input_precision="ieee")
            m = top
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        place = (b * T + t)[:, None] * H * HD + h * HD + i[None, :]
        tl.store(out_ptr + place, (y / total[:, None]).to(dtype), mask=valid)
