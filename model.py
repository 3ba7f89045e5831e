"""
model.py: a small GPT with K cascaded multi-token-prediction (MTP) heads, in one file.

    tokens t_0 .. t_{T-1}  ->  trunk  ->  h^0  ->  main head: next token           (a plain GPT)
                                           |
                          Emb(t_{i+1})  ->  head 1  ->  h^1  ->  token after next
                                                         |
                                        Emb(t_{i+2})  ->  head 2  ->  h^2  ->  one further ... head K

Head k at position i (MTP-D, arXiv 2603.23911, section 2; the cascade is that of DeepSeek-V3):

    h'^k_i = M_k [ RMSNorm(h^{k-1}_i) ; RMSNorm(Emb(t_{i+k})) ]       hidden first, embedding second
    h^k    = TransformerBlock_k(h'^k)                                 causal over i
    P^k_i  = softmax(W RMSNorm_k(h^k_i))                              predicts t_{i+k+1}

The embedding and the output head W are one matrix, shared by the trunk and all heads. With n_mtp=0 this is a
plain GPT: pre-norm blocks, rotary positions (RoPE), squared ReLU, no biases.

Try it:  python model.py        prints the shapes and the parameter count of a small model

Shapes in comments: B batch, T time, d width, V vocabulary, H attention heads, hd = d/H, K MTP heads, S cache slots.
"""

import math
from dataclasses import dataclass

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
    embed_std: float = 0.02  # spread of the embedding's initial weights; GPT-2's 0.02 is for wide models, narrow ones like more

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_mtp < 0:
            raise ValueError(f"n_mtp is {self.n_mtp}; it must be 0 (a plain GPT) or more")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd is {self.n_embd} with n_head {self.n_head}; n_embd / n_head must be a whole "
                             "even number (rotary positions turn pairs): change one of the two")
        if self.n_mtp >= self.block_size:
            raise ValueError(f"n_mtp is {self.n_mtp} with block_size {self.block_size}; head k needs k more tokens "
                             "than the trunk, so n_mtp must be below block_size")
        if not self.embed_std > 0:
            raise ValueError(f"embed_std is {self.embed_std}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")


def rope_table(length, head_dim, dtype, device):
    """cos and sin of the rotary angles, (2, length, hd), both halves alike. Source: RoFormer, arXiv 2104.09864."""
    freq = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=dtype, device=device), freq).repeat(1, 2)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x, rope):
    """turn each pair (x_i, x_{i+hd/2}) by its position's angle; x (.., B, H, T, hd), rope (2, B or 1, 1, T, hd)"""
    a, b = x.chunk(2, dim=-1)
    cos, sin = rope
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).type_as(x)


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        # x / sqrt(mean(x^2)) * weight, the mean in float32 even for bf16; the fused kernel wants both of one type
        return F.rms_norm(x, x.shape[-1:], self.weight.type_as(x), 1e-5)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None, where=None):
        B, T, d = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)    # (3, B, H, T, hd)
        (q, k), v = rotate(qkv[:2], rope), qkv[2]
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout * self.training)
        else:
            # slot s holds position s. Write the T new rows where they belong, over whatever a rejected draft left
            # there; `where` lets the query at position p see slots 0..p, so that stale slots past p are never seen.
            # (is_causal=True would be wrong here: the queries are fewer than the keys.)
            (keys, values), (row, pos, bias, _) = cache, where                               # (B, H, S, hd) each
            keys[row, :, pos] = k.transpose(1, 2)                                            # (B, T, H, hd) goes in
            values[row, :, pos] = v.transpose(1, 2)
            # written out: for a few queries the compiler fuses this into less than a call of the attention kernel
            score = (q * (d // self.n_head) ** -0.5) @ keys.transpose(-2, -1) + bias         # (B, H, T, S)
            y = score.softmax(-1) @ values
        return self.proj(y.transpose(1, 2).reshape(B, T, d))


class Block(nn.Module):
    """pre-norm transformer block, (B, T, d) -> (B, T, d)"""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.attn = RMSNorm(config.n_embd), Attention(config)
        self.norm2 = RMSNorm(config.n_embd)
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache=None, where=None):
        x = x + self.drop(self.attn(self.norm1(x), rope, cache, where))
        return x + self.drop(self.proj(F.relu(self.fc(self.norm2(x))).square()))


class MTPHead(nn.Module):
    """head k: h^{k-1}_i and Emb(t_{i+k}) -> h^k_i (paper section 2). Its own projection, norms and block."""

    def __init__(self, config):
        super().__init__()
        self.norm_hidden, self.norm_embed = RMSNorm(config.n_embd), RMSNorm(config.n_embd)
        self.mix = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)  # M_k
        self.block = Block(config)
        self.norm_out = RMSNorm(config.n_embd)

    def forward(self, hidden, embed, rope, cache=None, where=None):
        x = self.mix(torch.cat((self.norm_hidden(hidden), self.norm_embed(embed)), dim=-1))  # [h ; emb], not [emb ; h]
        return self.block(x, rope, cache, where)


class Cache:
    """
    static memory of a decoder, indexed by position: what was computed for position p lies in slot p.
    Rolling back is free: go on from an earlier position, and stale slots are overwritten before they are seen.

    kv      keys and values, (B, H, S, hd) each, of every block: the trunk's n_layer first, then one per MTP head
    hidden  one (B, S, d) tensor per MTP head: h^{k-1}, which head k reads
    """

    def __init__(self, config, batch, slots, device=None, dtype=None, heads=None):
        heads = config.n_mtp if heads is None else heads
        like = dict(device=device, dtype=dtype)
        shape = (batch, config.n_head, slots, config.n_embd // config.n_head)
        self.kv = [(torch.zeros(shape, **like), torch.zeros(shape, **like)) for _ in range(config.n_layer + heads)]
        self.hidden = [torch.zeros(batch, slots, config.n_embd, **like) for _ in range(heads)]
        self.row, self.slot = torch.arange(batch, device=device)[:, None], torch.arange(slots, device=device)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head W: see logits()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.heads = nn.ModuleList(MTPHead(config) for _ in range(config.n_mtp))  # K modules, not one module K times
        self.drop = nn.Dropout(config.dropout)
        self._set_rope()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.embed_std if module is self.embed else 0.02)
        for name, weight in self.named_parameters():
            if name.endswith("proj.weight"):  # what adds to the residual stream starts smaller, as in GPT-2
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def _set_rope(self):
        weight = self.embed.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        c = self.config  # n_mtp + 1 angles past block_size: a draft may overshoot the end before it is cut
        self.rope = rope_table(c.block_size + c.n_mtp + 1, c.n_embd // c.n_head, dtype, weight.device)

    def _apply(self, fn, recurse=True):
        # .to(), .cuda(), .double(), ... come through here. The angles follow the device, and never drop to bf16, whose
        # 8 bits can't tell position 256 from 257
        super()._apply(fn, recurse)
        self._set_rope()
        return self

    @property
    def weight(self):
        """the output head W, (V, d): the embedding's own matrix"""
        return self.embed.weight

    def angles(self, T):
        """rotary angles of positions 0..T-1: (2, 1, 1, T, hd)"""
        return self.rope[:, None, None, :T]

    def where(self, cache, pos):
        """positions (B, T) -> all that a step with a cache must know of them: batch row (B, 1), position (B, T), bias
        (B, 1, T, S): 0 for the slots up to the position and -inf past it, rotary angles (2, B, 1, T, hd)"""
        zero = torch.zeros((), dtype=self.weight.dtype, device=pos.device)
        return cache.row, pos, zero.masked_fill(cache.slot > pos[:, None, :, None], -torch.inf), self.rope[:, pos].unsqueeze(2)

    def trunk(self, embed, cache=None, where=None):
        """embeddings (B, T, d) -> h^0 (B, T, d), before the output norm. With a cache, `where` says which positions
        these T rows are."""
        x, rope = self.drop(embed), self.angles(embed.size(1)) if where is None else where[3]
        for i, block in enumerate(self.blocks):
            x = block(x, rope, cache and cache.kv[i], where)
        return x

    def cascade(self, h0, embed):
        """h^0 and the embeddings, both (B, T, d) -> [h^0, .., h^K], entry k (B, T-k, d), before the output norms.
        Row i of head k stands at position i and consumes Emb(t_{i+k}): head k has k rows fewer than the trunk."""
        states = [h0]
        for k, head in enumerate(self.heads, 1):
            T = h0.size(1) - k
            states.append(head(states[-1][:, :T], embed[:, k:], self.angles(T)) if T > 0 else h0[:, :0])
        return states

    def normed(self, k, hidden):
        """h^k -> RMSNorm_k(h^k), the row that W turns into logits; k = 0 is the main head"""
        return (self.norm if k == 0 else self.heads[k - 1].norm_out)(hidden)

    def logits(self, k, hidden, vocab=None):
        """h^k (..., d) -> logits of head k (..., V), or of the first `vocab` words only"""
        return F.linear(self.normed(k, hidden), self.weight[:vocab])

    def forward(self, tokens, cut_heads=False):
        """
        tokens (B, T) -> list of K+1 normed hidden states, entry k (B, T-k, d): what distill.py turns into a loss.
        No logits here: K+1 tensors of (B, T, V) would not fit (distill.py makes them chunk by chunk).

        cut_heads=True returns a second such list, the heads run on a detached trunk and embedding: the same values,
        but a gradient that enters there ends in the heads' own weights (distill.py, kl_grad="heads").
        """
        T = tokens.size(1)
        if not 0 < T <= self.config.block_size:
            raise ValueError(f"got {T} tokens; this model takes 1 to {self.config.block_size} (its block_size)")
        embed = self.embed(tokens)
        h0 = self.trunk(embed)
        normed = [self.normed(k, h) for k, h in enumerate(self.cascade(h0, embed))]
        if not cut_heads:
            return normed
        return normed, [self.normed(k, h) for k, h in enumerate(self.cascade(h0.detach(), embed.detach()))]

    def all_logits(self, tokens):
        """
        tokens (B, T) -> list of K+1 logit tensors; entry k is (B, T-k, V), its row i predicts token i+k+1.
        The slow, obvious path: no cache, no chunks. Everything clever is tested against it.
        """
        return [F.linear(hidden, self.weight) for hidden in self(tokens)]

    def trunk_step(self, tokens, cache, pos):
        """run the trunk on tokens (B, T) at positions pos (B, T), or what where() made of them; writes the cache rows.
        Returns h^0 (B, T, d)."""
        where = row, pos, _, _ = pos if isinstance(pos, tuple) else self.where(cache, pos)
        out = self.trunk(self.embed(tokens), cache, where)
        if cache.hidden:
            cache.hidden[0][row, pos] = out
        return out

    def head_step(self, k, tokens, cache, pos):
        """run head k (1..K) at positions pos (B, T), or what where() made of them, from the cached h^{k-1} of those
        positions and tokens (B, T), which are t_{pos+k}; writes the cache rows. Returns h^k (B, T, d)."""
        where = row, pos, _, rope = pos if isinstance(pos, tuple) else self.where(cache, pos)
        kv = cache.kv[self.config.n_layer + k - 1]
        out = self.heads[k - 1](cache.hidden[k - 1][row, pos], self.embed(tokens), rope, kv, where)
        if k < len(cache.hidden):
            cache.hidden[k][row, pos] = out
        return out

    def count_parameters(self):
        """parameters by part; the embedding counts once, for it is the output head too"""
        def count(modules):
            return sum(p.numel() for p in modules.parameters())
        parts = {"embedding": count(self.embed), "trunk": count(self.blocks) + count(self.norm), "heads": count(self.heads)}
        return {**parts, "total": sum(parts.values())}


if __name__ == "__main__":
    model = GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32, n_mtp=4))
    print("parameters:", model.count_parameters())
    for k, logits in enumerate(model.all_logits(torch.randint(257, (1, 16)))):
        print(f"{'main head' if k == 0 else f'head {k}':10s} logits {tuple(logits.shape)}: row i predicts token i+{k + 1}")
