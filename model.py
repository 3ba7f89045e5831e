"""
model.py: a small GPT with K cascaded multi-token-prediction (MTP) heads, in one file.

    tokens t_0 .. t_{T-1}  ->  trunk  ->  h^0  ->  main head: next token           (a plain GPT)
                                           |
                          Emb(t_{i+1})  ->  head 1  ->  h^1  ->  token after next
                                                         |
                                        Emb(t_{i+2})  ->  head 2  ->  h^2  ->  the one after ..

Head k at position i (MTP-D, arXiv 2603.23911, section 2; the cascade is that of DeepSeek-V3):

    h'^k_i = M_k [ RMSNorm(h^{k-1}_i) ; RMSNorm(Emb(t_{i+k})) ]       hidden first, embedding second
    h^k    = TransformerBlock_k(h'^k)                                 causal over i
    P^k_i  = softmax(W RMSNorm_k(h^k_i))                              predicts t_{i+k+1}

The embedding and the output head W are one matrix, shared by the trunk and all heads. With n_mtp=0
this is a plain GPT: pre-norm blocks, rotary positions (RoPE), squared ReLU, no biases. With the
last options of GPTConfig it is a Llama: data/pretrained.py loads one.

Try it:  python model.py        what each head of a small model predicts, and the shapes

Shapes in comments: B batch, T time, d width, V vocabulary, H attention heads, hd = d/H, G key-value
heads, F feed-forward width, K MTP heads, S cache slots.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # V; GPT-2's 50257 rounded up to a multiple of 64, which GPUs prefer
    block_size: int = 256    # longest context, in tokens
    n_layer: int = 6         # transformer blocks in the trunk; every MTP head adds one more
    n_head: int = 6
    n_embd: int = 384        # d
    n_mtp: int = 4           # K; 0 is a plain GPT
    dropout: float = 0.0
    embed_std: float = 0.02  # std of the embedding's initial weights; more for narrow models
    n_kv_head: int = 0       # G key-value heads, each shared by H/G attention heads; 0: n_head
    swiglu: int = 0          # width F of a gated SiLU feed-forward; 0: squared ReLU, F = 4 d
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name, value in vars(self).items():
            if name not in ("n_mtp", "dropout", "swiglu") and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd is {self.n_embd} with n_head {self.n_head}; n_embd / n_head must be a "
                "whole even number (RoPE rotates pairs): change one of the two"
            )
        if not 0 <= self.n_mtp < self.block_size:
            raise ValueError(
                f"n_mtp is {self.n_mtp} with block_size {self.block_size}; it must be from 0 (a "
                "plain GPT) to block_size - 1, for head k needs k more tokens than the trunk"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head is {self.n_kv_head}; it must divide n_head {self.n_head}")
        if self.swiglu < 0:
            raise ValueError(f"swiglu is {self.swiglu}; it must be a width, or 0 for squared ReLU")


# -----------------------------------------------------------------------------
# positions


class Positions(NamedTuple):
    """where the T new tokens of a step with a cache stand, for each of B sequences. Without a cache
    the first three are None, and rope is that of positions 0 .. T-1, (2, 1, 1, T, hd)"""

    seq: torch.Tensor   # (B, 1) number of the sequence, to index the cache together with pos
    pos: torch.Tensor   # (B, T) position of each token, which is also its slot in the cache
    mask: torch.Tensor  # (B, 1, T, S) added to the scores: 0 up to the position, then -inf
    rope: torch.Tensor  # (2, B, 1, T, hd) cos and sin of the position


def rope_table(length, head_dim, base, like):
    """cos and sin of the rotary angles, (2, length, hd); the two halves of hd are identical.
    Source: RoFormer, arXiv 2104.09864, section 3.2."""
    # bf16 with its 8 bits could not tell position 256 from 257
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=like.device) / head_dim
    position = torch.arange(length, dtype=dtype, device=like.device)
    angle = torch.outer(position, base**-exponent)     # (length, hd/2)
    angle = angle.repeat(1, 2)                         # (length, hd)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x, rope):
    """rotate each pair (x_i, x_{i+hd/2}) by the angle of its position

    x (.., B, H, T, hd), rope (2, B or 1, 1, T, hd) -> like x"""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).type_as(x)


# -----------------------------------------------------------------------------
# layers. fast/decode.py repeats Block and MTPHead for decoding on a GPU: change both


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x):
        # x / sqrt(mean(x^2)) * weight, the mean in float32 even for bf16.
        # torch's fused version wants the weight in the type of x
        return F.rms_norm(x, x.shape[-1:], self.weight.type_as(x), eps=self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]    # of q, k, v
        self.dropout = config.dropout
        head_dim = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * head_dim, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, positions, cache=None):
        B, T, d = x.shape
        qkv = self.qkv(x).view(B, T, sum(self.heads), d // self.heads[0])
        q, k, v = qkv.transpose(1, 2).split(self.heads, dim=1)      # (B, H or G, T, hd) each
        q = rotate(q, positions.rope)
        k = rotate(k, positions.rope)
        if cache is None:
            p = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=p, enable_gqa=k.size(1) < q.size(1)
            )
        else:
            y = self.attend_to_cache(q, k, v, positions, cache)
        y = y.transpose(1, 2).reshape(B, T, d)                      # (B, T, d)
        return self.proj(y)

    def attend_to_cache(self, q, k, v, positions, cache):
        # slot s holds position s. Write the T new rows into their slots, over whatever a rejected
        # draft left there. The mask lets the query at position p see slots 0..p, so that stale
        # slots past p are never seen. (is_causal=True would be wrong: fewer queries than keys.)
        keys, values = cache                                        # (B, G, S, hd) each
        seq, pos, mask, _ = positions
        keys[seq, :, pos] = k.transpose(1, 2)                       # (B, T, G, hd) goes in
        values[seq, :, pos] = v.transpose(1, 2)
        # written out: the mask, one for each row of the batch, is an addition
        group = q.reshape(*k.shape[:2], -1, q.size(-1))             # (B, G, H/G T, hd)
        score = (group * q.size(-1) ** -0.5) @ keys.transpose(-2, -1)
        score = score.view(*q.shape[:3], -1) + mask                 # (B, H, T, S)
        share = score.softmax(-1).view(*group.shape[:3], -1)        # (B, G, H/G T, S)
        return (share @ values).view_as(q)                          # (B, H, T, hd)


class Block(nn.Module):
    """pre-norm transformer block, (B, T, d) -> (B, T, d)"""

    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config)
        self.gated = config.swiglu > 0
        width = config.swiglu or 4 * config.n_embd                  # F
        self.fc = nn.Linear(config.n_embd, (1 + self.gated) * width, bias=False)
        self.proj = nn.Linear(width, config.n_embd, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, positions, cache=None):
        x = x + self.drop(self.attn(self.norm1(x), positions, cache))
        y = self.fc(self.norm2(x))                                  # (B, T, F), gated: (B, T, 2 F)
        if self.gated:
            gate, y = y.chunk(2, dim=-1)
            y = F.silu(gate) * y                                    # arXiv 2002.05202
        else:
            y = F.relu(y).square()
        return x + self.drop(self.proj(y))


class MTPHead(nn.Module):
    """head k: h^{k-1}_i and Emb(t_{i+k}) -> h^k_i, (B, T, d) each. It has a projection, norms and
    a block of its own (paper, section 2)"""

    def __init__(self, config):
        super().__init__()
        self.norm_hidden = RMSNorm(config)
        self.norm_embed = RMSNorm(config)
        self.mix = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)  # M_k
        self.block = Block(config)
        self.norm_out = RMSNorm(config)

    def forward(self, hidden, embed, positions, cache=None):
        hidden = self.norm_hidden(hidden)
        embed = self.norm_embed(embed)
        x = self.mix(torch.cat((hidden, embed), dim=-1))            # [h ; emb], not [emb ; h]
        return self.block(x, positions, cache)


# -----------------------------------------------------------------------------
# the model


class Cache:
    """
    preallocated cache of a decoder, indexed by position: slot p holds the values for position p.
    Rollback is free: continue from an earlier position, and stale slots are overwritten before
    they are seen.

    kv      keys and values, (B, G, S, hd) each, of the trunk's n_layer blocks, then of the heads
    hidden  one (B, S, d) tensor per MTP head: h^{k-1}, which head k reads
    """

    def __init__(self, model, batch, slots, heads):
        config = model.config
        zeros = model.weight.new_zeros
        shape = (2, batch, config.n_kv_head, slots, config.n_embd // config.n_head)
        self.kv = [zeros(shape).unbind(0) for _ in range(config.n_layer + heads)]
        self.hidden = [zeros(batch, slots, config.n_embd) for _ in range(heads)]
        self.seq = torch.arange(batch, device=model.weight.device)[:, None]
        self.slot = torch.arange(slots, device=model.weight.device)


class GPT(nn.Module):
    """a GPT with config.n_mtp MTP heads; see the top of this file"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # also the output head W: see weight
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config)
        # K modules, not one module K times
        self.heads = nn.ModuleList(MTPHead(config) for _ in range(config.n_mtp))
        self.drop = nn.Dropout(config.dropout)
        self._set_rope()
        self._init_weights()

    def _init_weights(self):
        for name, weight in self.named_parameters():
            if weight.dim() > 1:               # all but the norms' vectors
                std = self.config.embed_std if name == "embed.weight" else 0.02
                nn.init.normal_(weight, std=std)
        # what is added to the residual stream starts smaller, as in GPT-2
        std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, weight in self.named_parameters():
            if name.endswith("proj.weight"):
                nn.init.normal_(weight, std=std)

    def _set_rope(self):
        if self.weight.is_meta:      # load_checkpoint moves it later
            return
        # n_mtp + 1 positions past block_size: a draft may overshoot the end before it is cut
        config = self.config
        length = config.block_size + config.n_mtp + 1
        head_dim = config.n_embd // config.n_head
        self.rope = rope_table(length, head_dim, config.rope_base, self.weight)

    def _apply(self, fn, recurse=True):
        # .to(), .cuda(), .double(), .. come through here: the angles follow the device
        super()._apply(fn, recurse)
        self._set_rope()
        return self

    @property
    def weight(self):
        """the output head W, (V, d): the embedding's own matrix"""
        return self.embed.weight

    # ---- the whole sequence at once: training, evaluation, and the reference for decoding

    def angles(self, T):
        """Positions 0..T-1 of every sequence, for a step without a cache"""
        return Positions(None, None, None, self.rope[:, None, None, :T])

    def trunk(self, embed, positions, cache=None):
        """embeddings (B, T, d) -> h^0 (B, T, d), before the output norm"""
        x = self.drop(embed)
        for i, block in enumerate(self.blocks):
            x = block(x, positions, cache and cache.kv[i])
        return x

    def cascade(self, h0, embed):
        """h^0 and the embeddings, both (B, T, d) -> [h^0, .., h^K], before the output norms

        Entry k is (B, T-k, d): row i of head k stands at position i and reads Emb(t_{i+k})."""
        states = [h0]
        for k, head in enumerate(self.heads, 1):
            next_embed = embed[:, k:]
            T = next_embed.size(1)
            states.append(head(states[-1][:, :T], next_embed, self.angles(T)))
        return states

    def normed(self, k, hidden):
        """h^k -> RMSNorm_k(h^k), the row that W turns into logits; k = 0 is the main head"""
        norm = self.norm if k == 0 else self.heads[k - 1].norm_out
        return norm(hidden)

    def forward(self, tokens):
        """tokens (B, T) -> list of K+1 normed hidden states, entry k (B, T-k, d)

        No logits here: K+1 tensors of (B, T, V) would not fit, distill.py makes them in chunks."""
        T = tokens.size(1)
        if not 0 < T <= self.config.block_size:
            raise ValueError(f"got {T} tokens; block_size allows 1 to {self.config.block_size}")
        embed = self.embed(tokens)
        h0 = self.trunk(embed, self.angles(T))
        return [self.normed(k, hidden) for k, hidden in enumerate(self.cascade(h0, embed))]

    def all_logits(self, tokens):
        """tokens (B, T) -> list of K+1 logit tensors; entry k is (B, T-k, V), its row i predicts
        token i+k+1. The slow, obvious path: no cache, no chunks. All else is tested against it."""
        return [F.linear(hidden, self.weight) for hidden in self(tokens)]

    # ---- a few new tokens with a cache: what decode.py is made of

    def positions(self, cache, pos):
        """pos (B, T) -> Positions"""
        unseen = cache.slot > pos[:, None, :, None]                             # (B, 1, T, S)
        mask = torch.where(unseen, -torch.inf, 0.0).to(self.weight.dtype)
        return Positions(cache.seq, pos, mask, self.rope[:, pos].unsqueeze(2))

    def trunk_step(self, tokens, cache, positions):
        """run the trunk on tokens (B, T) at these Positions, write the cache -> h^0 (B, T, d)"""
        hidden = self.trunk(self.embed(tokens), positions, cache)
        if cache.hidden:
            cache.hidden[0][positions.seq, positions.pos] = hidden
        return hidden

    def head_step(self, k, tokens, cache, positions):
        """run head k (1..K) at these Positions, write the cache -> h^k (B, T, d)

        It reads the cached h^{k-1} of these positions, and tokens (B, T), which are t_{pos+k}."""
        seq, pos, _, _ = positions
        hidden = cache.hidden[k - 1][seq, pos]
        kv = cache.kv[self.config.n_layer + k - 1]
        hidden = self.heads[k - 1](hidden, self.embed(tokens), positions, kv)
        if k < len(cache.hidden):
            cache.hidden[k][seq, pos] = hidden
        return hidden

    def logits(self, k, hidden, vocab=None):
        """h^k (.., d) -> logits of head k, (.., V), or of the first `vocab` ids only"""
        return F.linear(self.normed(k, hidden), self.weight[:vocab])

    def count_parameters(self):
        """parameters by part; the embedding is counted once, for it is tied to the output head"""
        trunk = nn.ModuleList([self.blocks, self.norm])
        parts = dict(embedding=self.embed, trunk=trunk, heads=self.heads, total=self)
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


if __name__ == "__main__":
    tokens = torch.zeros(1, 16, dtype=torch.long)
    for k, logits in enumerate(GPT(GPTConfig()).all_logits(tokens)):
        print(f"head {k}: logits {tuple(logits.shape)}, row i predicts token i+{k + 1}")
