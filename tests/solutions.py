"""
Solutions of exercises 1 to 7 as students might write them, for test_lab.py: some unusual and right,
most wrong. A hand-out has none of them. SOLUTIONS: (exercise, file::function, is it right?, body).

The first half was written beside the tests. The second half is from a blind trial: by a language
model that did the exercises from a hand-out, and had seen of the tests no more than what check
printed where a try of its own failed. They are the bodies for which the tests had to be mended, and
a few more of each exercise, some shortened to fit a common base.
"""

SOLUTIONS = []


def add(exercise, function, is_right, body):
    SOLUTIONS.append((exercise, function, is_right, body))


def add_edits(exercise, function, base, edits):
    """the base, which is right, and what each edit (old, new) makes of it, which is wrong"""
    add(exercise, function, True, base)
    for old, new in edits:
        assert old in base
        add(exercise, function, False, base.replace(old, new))


# ---- 1

HEADS = """
B, T, d = x.shape
size = d // self.heads[0]
parts = self.qkv(x).split([n * size for n in self.heads], dim=-1)
q, k, v = [part.view(B, T, n, size).transpose(1, 2) for part, n in zip(parts, self.heads)]
q, k = rotate(q, positions.rope), rotate(k, positions.rope)
"""
CACHED = """
if cache is not None:
    y = self.attend_to_cache(q, k, v, positions, cache)
    return self.proj(y.transpose(1, 2).reshape(B, T, d))
"""
SHARED = """
k, v = [y.repeat_interleave(self.heads[0] // self.heads[1], dim=1) for y in (k, v)]
"""
SOFTMAX = """
mask = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
weights = (q @ k.transpose(-2, -1) / math.sqrt(size)).masked_fill(mask, -math.inf).softmax(-1)
"""
DROP = "if self.training and self.dropout:\n    weights = F.dropout(weights, self.dropout)\n"
OUT = """
return self.proj((weights @ v).transpose(1, 2).reshape(B, T, d))
"""
add_edits(1, "model.py::Attention.forward", HEADS + CACHED + SHARED + SOFTMAX + DROP + OUT, [
    # no mask; a mask one too far; one that hides the row itself
    ("triu(1)", "triu(T)"),
    ("triu(1)", "triu(2)"),
    ("triu(1)", "triu(0)"),
    # not scaled; v rotated, too; the cache forgotten
    (" / math.sqrt(size)", ""),
    (CACHED, "v = rotate(v, positions.rope)" + CACHED),
    (CACHED, ""),
    # dropout before the softmax; also in eval mode; without scaling; not at all; on the output; one
    # mask for the batch
    (SOFTMAX + DROP, """
scores = q @ k.transpose(-2, -1) / math.sqrt(size)
scores = F.dropout(scores, self.dropout, self.training)
mask = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
weights = scores.masked_fill(mask, -math.inf).softmax(-1)
"""),
    (DROP, "weights = F.dropout(weights, self.dropout)"),
    (DROP, """
if self.training:
    weights = weights * (torch.rand_like(weights) >= self.dropout)
"""),
    (DROP, ""),
    (DROP + OUT, """
y = (weights @ v).transpose(1, 2).reshape(B, T, d)
return self.proj(F.dropout(y, self.dropout, self.training))
"""),
    (DROP, """
weights = weights * F.dropout(torch.ones_like(weights[0, 0]), self.dropout, self.training)
"""),
])
add(1, "model.py::Attention.forward", True, HEADS + CACHED + SHARED + """
scores = torch.einsum("bhid,bhjd->bhij", q, k) * size**-0.5
scores = scores + torch.full((T, T), -math.inf).to(scores).triu(1)
weights = (scores - scores.logsumexp(-1, keepdim=True)).exp()
if self.training:
    weights = weights * (torch.rand_like(weights) >= self.dropout) / (1 - self.dropout)
out = self.proj.weight @ torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2).unsqueeze(-1)
return out.squeeze(-1)
""")

# ---- 2

add(2, "model.py::GPT.cascade", True, """
def rest(h, k):
    if k > len(self.heads):
        return []
    T = max(0, embed.shape[1] - k)
    if T == 0:
        h = h[:, :0]
    else:
        h = h.narrow(1, 0, T)
        h = self.heads[k - 1](embed=embed[:, k : k + T], hidden=h, positions=self.angles(T))
    return [h] + rest(h, k + 1)

return [h0] + rest(h0, 1)
""")
add(2, "model.py::GPT.cascade", False, """
out = [h0]
for k in range(1, len(self.heads) + 1):
    T = h0.size(1) - k
    out.append(self.heads[k - 1](out[-1][:, :T], embed[:, k:], self.angles(T)))
return out
""")
add(2, "model.py::GPT.cascade", False, """
out = [h0]
for head in self.heads:
    h = out[-1][:, :-1]
    out.append(head(h, embed[:, 1 : 1 + h.size(1)], self.angles(h.size(1))))
return out
""")
add(2, "model.py::GPT.cascade", False, """
out = [h0]
for k, head in enumerate(self.heads, 1):
    T = max(0, h0.size(1) - k)
    out.append(head(h0[:, :T], embed[:, k : k + T], self.angles(T)))
return out
""")
add(2, "model.py::GPT.cascade", False, """
out = [h0]
for k, head in enumerate(self.heads, 1):
    T = max(0, h0.size(1) - k)
    positions = self.angles(T + 1)
    positions = positions._replace(rope=positions.rope[..., 1:, :])
    out.append(head(out[-1][:, 1:][:, :T], embed[:, k : k + T], positions))
return out
""")
add(2, "model.py::GPT.cascade", False, """
out = [h0]
for k, head in enumerate(self.heads, 1):
    T = max(0, h0.size(1) - k)
    out.append(head(out[-1][:, :T].detach(), embed[:, k : k + T], self.angles(T)))
return out
""")

# ---- 3

add(3, "distill.py::topn_divergence", True, """
if detach_teacher:
    teacher = teacher.detach()
teacher, student = to_float32(teacher), to_float32(student)
smallest = teacher.sort(dim=-1, descending=True, stable=True).indices[..., :n]
pick = torch.zeros(teacher.shape, dtype=torch.bool).scatter(-1, smallest, True)
log_q = teacher[pick].view(*teacher.shape[:-1], n)
log_q = log_q - log_q.logsumexp(-1, keepdim=True)
log_p = student[pick.expand(student.shape)].view(*student.shape[:-1], n)
log_p = log_p - log_p.logsumexp(-1, keepdim=True)
return DIVERGENCES[kl](log_p, log_q.expand(log_p.shape))
""")
add_edits(3, "distill.py::topn_divergence", """
if detach_teacher: teacher = teacher.detach()
top = teacher.topk(n, dim=-1).indices
log_q = to_float32(teacher.gather(-1, top)).log_softmax(-1)
log_p = to_float32(student.gather(-1, top.expand(*student.shape[:-1], n))).log_softmax(-1)
return DIVERGENCES[kl](log_p, log_q)
""", [
    # no stop-gradient; the student's; p and q swapped; always forward; a mean; the student's tokens
    ("if detach_teacher: teacher = teacher.detach()", ""),
    ("if detach_teacher: teacher = teacher.detach()", "student = student.detach()"),
    ("(log_p, log_q)", "(log_q, log_p)"),
    ("DIVERGENCES[kl]", "forward_kl"),
    ("(log_p, log_q)", "(log_p, log_q).mean()"),
    ("teacher.topk", "(student if student.dim() == 2 else student[0]).topk"),
])
# not renormalised: softmax over all tokens, then the n of them
add(3, "distill.py::topn_divergence", False, """
if detach_teacher:
    teacher = teacher.detach()
top = teacher.topk(n, dim=-1).indices
log_q = F.log_softmax(teacher, -1).gather(-1, top)
log_p = F.log_softmax(student, -1).gather(-1, top.expand(*student.shape[:-1], -1))
return DIVERGENCES[kl](log_p, log_q)
""")
# the logarithm of a softmax
add(3, "distill.py::topn_divergence", False, """
if detach_teacher:
    teacher = teacher.detach()
top = teacher.topk(n, dim=-1).indices
q = to_float32(teacher.gather(-1, top)).softmax(-1)
p = to_float32(student.gather(-1, top.expand(*student.shape[:-1], -1))).softmax(-1)
return DIVERGENCES[kl](p.log(), q.log())
""")

# ---- 4

add(4, "distill.py::aligned", True, """
K, (B, T) = len(hidden) - 1, targets.shape
if T <= K:
    raise ValueError("too short")
columns = [[hidden[k][b, j - k] for k in heads] for b in range(B) for j in range(K, T)]
labels = [targets[b, j] for b in range(B) for j in range(K, T)]
return torch.stack([torch.stack(c) for c in columns], 1), torch.stack(labels)
""")
add(4, "distill.py::aligned", True, """
K = len(hidden) - 1
if targets.size(1) <= K:
    raise ValueError(f"{K + 1} tokens at least")
n = targets.size(1) - K
rows = [hidden[k].narrow(1, K - k, n).reshape(-1, hidden[k].size(-1)) for k in heads]
return torch.stack(rows), targets[:, K:].reshape(-1)
""")
add_edits(4, "distill.py::aligned", """
K, T = len(hidden) - 1, targets.size(1)
if T <= K:
    raise ValueError(f"{T} targets for {K} heads")
rows = torch.stack([hidden[k][:, K - k : T - k] for k in heads])
return rows.flatten(1, 2), targets[:, K:].flatten()
""", [
    # the same rows of each head, not the same targets; all heads whatever is wanted; labels one
    # off; targets before windows; the first heads
    ("K - k : T - k", ": T - K"),
    ("in heads", "in range(K + 1)"),
    ("targets[:, K:]", "targets[:, : T - K]"),
    ("return rows", "return rows.transpose(1, 2)"),
    ("in heads", "in range(len(heads))"),
])
add(4, "distill.py::mtp_d_loss", True, """
logits = to_float32(logits)
K = logits.shape[0] - 1
chosen = logits[:, torch.arange(len(targets)), targets]
ce = (logits.logsumexp(-1) - chosen).sum(-1) / len(targets)
kl_per_head = logits.new_zeros(K)
if top_n > 0 and K > 0:
    terms = [topn_divergence(row, logits[0], top_n, kl, detach_teacher) for row in logits[1:]]
    kl_per_head = torch.stack([term.sum() / len(targets) for term in terms])
loss = torch.sum(alpha * ce) + torch.sum(beta * kl_per_head)
return loss, ce.detach(), kl_per_head.detach()
""")
add_edits(4, "distill.py::mtp_d_loss", """
K = len(logits) - 1
ce = torch.stack([F.cross_entropy(to_float32(row), targets) for row in logits])
divergence = torch.zeros(K).to(ce)
if K and top_n:
    options = top_n, kl, detach_teacher
    divergence = [topn_divergence(logits[k], logits[0], *options) for k in range(1, K + 1)]
    divergence = torch.stack([rows.mean() for rows in divergence])
loss = (alpha * ce).sum() + (beta * divergence).sum()
return loss, ce.detach(), divergence.detach()
""", [
    # sums; options that do not arrive; each head taught by the one before; no weights; a mean over
    # the heads; a divergence that teaches nothing
    ("row), targets)", "row), targets, reduction='sum')"),
    ("top_n, kl, detach_teacher", "top_n, kl"),
    ("top_n, kl, detach_teacher", "top_n, 'forward', detach_teacher"),
    ("logits[0]", "logits[k - 1]"),
    ("(alpha * ce).sum() + (beta * divergence).sum()", "ce.sum() + divergence.sum()"),
    ("(alpha * ce).sum()", "(alpha * ce).mean()"),
    ("(beta * divergence)", "(beta * divergence.detach())"),
])

# ---- 5

add(5, "decode.py::accepted_lengths", True, """
K, T = len(choices) - 1, choices[0].shape[1]
lengths = []
for b in range(len(choices[0])):
    row = []
    for i in range(T - K):
        k = 1
        while k <= K and choices[k][b, i] == choices[0][b, i + k]:
            k += 1
        row.append(k - 1)
    lengths.append(row)
return torch.tensor(lengths).view(-1, T - K)
""")
add(5, "decode.py::rates", True, """
K, total = len(histogram) - 1, sum(histogram)
car = [sum(histogram[k:]) / max(total, 1) for k in range(1, K + 1)]
ar = [b / a if a else 0.0 for a, b in zip([1.0, *car], car)]
return ar, car
""")
add_edits(5, "decode.py::accepted_lengths", """
K, T = len(choices) - 1, choices[0].size(1)
rows = T - K
length = torch.zeros_like(choices[0][:, :rows])
ok = torch.ones_like(length)
for k in range(1, K + 1):
    same = (choices[k][:, :rows] == choices[0][:, k : k + rows]).long()
    ok = ok * same
    length += ok
return length
""", [
    # each head alone; the main head's choice of the same row, of the next row; one row too few
    ("ok * same", "same"),
    ("k : k + rows", "0 : 0 + rows"),
    ("k : k + rows", "1 : 1 + rows"),
    ("rows = T - K", "rows = T - K - 1"),
])
add_edits(5, "decode.py::rates", """
reached = [sum(histogram[k:]) for k in range(len(histogram))]
ar = [b / a if a else 0.0 for a, b in zip(reached, reached[1:])]
car = [b / max(1, reached[0]) for b in reached[1:]]
return ar, car
""", [
    # 0/0; 1 for it; swapped; divided by the number of heads
    (" if a else 0.0", ""),
    ("if a else 0.0", "if a else 1.0"),
    ("return ar, car", "return car, ar"),
    ("max(1, reached[0])", "max(1, len(histogram))"),
])

# ---- 6

add(6, "decode.py::match", True, """
K = drafts.shape[1]
accepted = torch.zeros(len(drafts), dtype=torch.long)
emit = noise.numbers.view(target_probs.shape)
token = sample(target_probs[:, 0], emit[:, 0])
for k in range(K):
    on = (accepted == k) & (token == drafts[:, k])
    token = torch.where(on, sample(target_probs[:, k + 1], emit[:, k + 1]), token)
    accepted = accepted + on.long()
return accepted, token
""")
add(6, "decode.py::point", True, """
K, V = drafts.size(1), target_probs.size(-1)
accepted = torch.zeros(len(drafts), dtype=torch.long)
for k in range(K):
    p = target_probs[torch.arange(len(drafts)), k, drafts[:, k]]
    uniform = torch.exp(-noise.accept[:, k])
    accepted += (accepted == k) & (uniform < p)
probs = select_row(target_probs, accepted).clone()
for b in torch.nonzero(accepted < K).flatten().tolist():
    if probs[b].max() < 1:
        probs[b, drafts[b, accepted[b]]] = 0
return accepted, sample(probs, noise.emit)
""")
add_edits(6, "decode.py::match", """
tokens = sample(target_probs, noise.numbers.view_as(target_probs))
accepted = num_accepted(tokens[:, :-1] == drafts)
return accepted, select_row(tokens, accepted)
""", [
    # the same random numbers at each row; the token of row 0, of row K; one draft at most
    ("view_as(target_probs)", "view_as(target_probs)[:, :1]"),
    ("select_row(tokens, accepted)", "tokens[:, 0]"),
    ("select_row(tokens, accepted)", "tokens[:, -1]"),
    ("== drafts)", "== drafts).clamp(max=1)"),
])
add(6, "decode.py::match", False, """
tokens = target_probs.argmax(-1)
accepted = num_accepted(tokens[:, :-1] == drafts)
return accepted, select_row(tokens, accepted)
""")
# emits from p after a rejection; goes on after one; no guard for a draft that is certain
add(6, "decode.py::point", False, """
p = of_drafts(target_probs[:, :-1], drafts)
accepted = num_accepted(bernoulli(p, noise.accept))
return accepted, sample(select_row(target_probs, accepted), noise.emit)
""")
add(6, "decode.py::point", False, """
p = of_drafts(target_probs[:, :-1], drafts)
accepted = bernoulli(p, noise.accept).sum(1)
hot = F.one_hot(drafts, target_probs.size(-1)).to(p.dtype)
probs = torch.cat((residual_probs(target_probs[:, :-1], hot), target_probs[:, -1:]), 1)
return accepted, sample(select_row(probs, accepted), noise.emit)
""")
add(6, "decode.py::point", False, """
p = of_drafts(target_probs[:, :-1], drafts)
accepted = num_accepted(bernoulli(p, noise.accept))
rest = target_probs[:, :-1].scatter(-1, drafts.unsqueeze(-1), 0.0)
probs = torch.cat((rest, target_probs[:, -1:]), 1)
return accepted, sample(select_row(probs, accepted), noise.emit)
""")

# ---- 7

add_edits(7, "decode.py::residual", """
batch, K = drafts.shape
rows = torch.arange(batch)
accepted, alive = torch.zeros(batch, dtype=torch.long), torch.ones(batch, dtype=torch.bool)
for k in range(K):
    p, q = target_probs[rows, k, drafts[:, k]], draft_probs[rows, k, drafts[:, k]]
    alive = alive & bernoulli(p / q, noise.accept[:, k])
    accepted = accepted + alive.long()

token = torch.empty(batch, dtype=torch.long)
for b, a in enumerate(accepted.tolist()):
    probs = target_probs[b, a]
    if a < K:
        probs = residual_probs(probs, draft_probs[b, a])
    token[b] = sample(probs, noise.emit[b])
return accepted, token
""", [
    # p and q swapped; accepted as a fixed draft; emits from p; |p - q|; the drafts' noise again;
    # goes on after a rejection; no guard where p = q; one number for all drafts; row K-1 for row K
    ("bernoulli(p / q", "bernoulli(q / p"),
    ("bernoulli(p / q", "bernoulli(p"),
    ("if a < K", "if False"),
    ("residual_probs(probs, draft_probs[b, a])", "(probs - draft_probs[b, a]).abs()"),
    ("noise.emit[b]", "noise.draft[b, min(a, K - 1)]"),
    ("alive & ", ""),
    ("residual_probs(probs, draft_probs[b, a])", "(probs - draft_probs[b, a]).clamp(min=0)"),
    ("noise.accept[:, k]", "noise.accept[:, 0]"),
    ("target_probs[b, a]", "target_probs[b, min(a, K - 1)]"),
])
add(7, "decode.py::residual", True, """
batch, K = drafts.shape
everything = []
for k in range(K + 1):
    probs = target_probs[:, k] if k == K else residual_probs(target_probs[:, k], draft_probs[:, k])
    everything.append(sample(probs, noise.emit))
uniform = (-noise.accept).exp()
ok = uniform * of_drafts(draft_probs, drafts) < of_drafts(target_probs[:, :K], drafts)
accepted = (ok.long().cumsum(1) == torch.arange(1, K + 1)).sum(1)
return accepted, torch.stack(everything, 1)[torch.arange(batch), accepted]
""")
add(7, "decode.py::residual", True, """
K = drafts.size(1)
probs = target_probs[:, K]
accepted = torch.full_like(drafts[:, 0], K)
for k in reversed(range(K)):
    p, q = target_probs[:, k], draft_probs[:, k]
    x = drafts[:, k : k + 1]
    ok = bernoulli((p.gather(1, x) / q.gather(1, x))[:, 0], noise.accept[:, k])
    accepted = torch.where(ok, accepted, k)
    probs = torch.where(ok[:, None], probs, residual_probs(p, q))
return accepted, sample(probs, noise.emit)
""")

# -----------------------------------------------------------------------------
# of the blind trial

# ---- 1

ROWS = """
B, T, d = x.shape
hd = d // self.heads[0]
qkv = self.qkv(x).split([n * hd for n in self.heads], dim=-1)
q, k, v = (y.view(B, T, n, hd).transpose(1, 2) for y, n in zip(qkv, self.heads))
q, k = rotate(q, positions.rope), rotate(k, positions.rope)
if cache is not None:
    y = self.attend_to_cache(q, k, v, positions, cache)
else:
    group = self.heads[0] // self.heads[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    score = q @ k.transpose(-2, -1) / hd**0.5
    mask = torch.ones(T, T, device=x.device).triu(1).bool()
    share = score.masked_fill(mask, -math.inf).softmax(-1)
    share = F.dropout(share, self.dropout, self.training)
    y = share @ v
return self.proj(y.transpose(1, 2).reshape(B, T, d))
"""
add_edits(1, "model.py::Attention.forward", ROWS, [
    # shared heads 0 1 0 1; ambiguous at T = 0; a mask on the CPU whatever the device; a mask that
    # leaks a little; q scaled before the cache, which scales, too; heads put together interleaved
    ("k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)",
     "k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)"),
    ("y.view(B, T, n, hd)", "y.view(B, T, -1, hd)"),
    ("torch.ones(T, T, device=x.device)", "torch.ones(T, T)"),
    ("score.masked_fill(mask, -math.inf)", "(score - 10 * mask)"),
    ("self.attend_to_cache(q,", "self.attend_to_cache(q * hd**-0.5,"),
    ("y.transpose(1, 2).reshape(B, T, d)", "y.permute(0, 2, 3, 1).reshape(B, T, d)"),
])
# row by row, over the keys seen so far alone
add(1, "model.py::Attention.forward", True, ROWS.split("    score = ")[0] + """
    rows = [v[:, :, :0]]
    for t in range(T):
        share = (q[:, :, t : t + 1] @ k[:, :, : t + 1].transpose(-2, -1) * hd**-0.5).softmax(-1)
        rows.append(F.dropout(share, self.dropout, self.training) @ v[:, :, : t + 1])
    y = torch.cat(rows, dim=2)
return self.proj(y.transpose(1, 2).reshape(B, T, d))
""")

# ---- 2

add_edits(2, "model.py::GPT.cascade", """
hidden = [h0]
for k, head in enumerate(self.heads, 1):
    rows = max(embed.size(1) - k, 0)
    hidden.append(head(hidden[-1][:, :rows], embed[:, k:], self.angles(rows)))
return hidden
""", [
    # parallel heads; [embedding; hidden]; a short text reads its last token again; head K first
    ("hidden[-1][:, :rows]", "h0[:, :rows]"),
    ("head(hidden[-1][:, :rows], embed[:, k:],", "head(embed[:, k:], hidden[-1][:, :rows],"),
    ("embed.size(1) - k, 0)", "embed.size(1) - k, 1)"),
    ("self.heads, 1)", "reversed(self.heads), 1)"),
])
# all T rows, with zeros for the missing tokens, cut at the end: right, for the heads are causal
add(2, "model.py::GPT.cascade", True, """
T = embed.size(1)
hidden = [h0]
for head in self.heads:
    embed = torch.cat((embed[:, 1:], torch.zeros_like(embed[:, :1])), dim=1)
    hidden.append(head(hidden[-1], embed, self.angles(T)))
return [h[:, : max(T - k, 0)] for k, h in enumerate(hidden)]
""")
# the same numbers, for RoPE sees differences alone; but the docstring says position i
add(2, "model.py::GPT.cascade", False, """
hidden = [h0]
for k, head in enumerate(self.heads, 1):
    rows = max(embed.size(1) - k, 0)
    positions = Positions(None, None, None, self.rope[:, None, None, k : k + rows])
    hidden.append(head(hidden[-1][:, :rows], embed[:, k:], positions))
return hidden
""")

# ---- 3

TOPN = """
student, teacher = to_float32(student), to_float32(teacher)
if detach_teacher:
    teacher = teacher.detach()
top = teacher.topk(n, dim=-1).indices
log_q = teacher.gather(-1, top).log_softmax(-1)
log_p = student.gather(-1, top.expand(*student.shape[:-1], -1)).log_softmax(-1)
return DIVERGENCES[kl](log_p, log_q)
"""
add_edits(3, "distill.py::topn_divergence", TOPN, [
    # only the student in float32; float64 to float32; the teacher detached for the choice alone;
    # detached always; the student's own tokens; the first target's tokens for all
    ("to_float32(student), to_float32(teacher)", "to_float32(student), teacher"),
    ("to_float32(student), to_float32(teacher)", "student.float(), teacher.float()"),
    ("    teacher = teacher.detach()\ntop = teacher", "    pass\ntop = teacher.detach()"),
    ("if detach_teacher:", "if True:"),
    ("student.gather(-1, top.expand(*student.shape[:-1], -1))", "student.topk(n, dim=-1).values"),
    ("dim=-1).indices", "dim=-1).indices[..., :1, :].expand(*teacher.shape[:-1], n)"),
])
# float32 after a log-softmax in bf16
add(3, "distill.py::topn_divergence", False, TOPN.replace(
    "student, teacher = to_float32(student), to_float32(teacher)\n", "").replace(
    "(log_p, log_q)", "(to_float32(log_p), to_float32(log_q))"))
MASKED = """
student, teacher = to_float32(student), to_float32(teacher)
if detach_teacher:
    teacher = teacher.detach()
out = torch.ones_like(teacher, dtype=torch.bool)
out = out.scatter(-1, teacher.topk(n, dim=-1).indices, False)
log_q = teacher.masked_fill(out, -1e30).log_softmax(-1)
log_p = student.masked_fill(out, -1e30).log_softmax(-1)
return DIVERGENCES[kl](log_p, log_q)
"""
# the mask written into the caller's logits; of equals at the n-th place all, as in fast/loss.py
add_edits(3, "distill.py::topn_divergence", MASKED, [
    ("teacher.masked_fill(", "(teacher if detach_teacher else teacher.clone()).masked_fill_(")])
add(3, "distill.py::topn_divergence", True, MASKED.replace(
    "out = out.scatter(-1, teacher.topk(n, dim=-1).indices, False)",
    "out = teacher < teacher.topk(n, dim=-1).values[..., -1:]"))

# ---- 4

add_edits(4, "distill.py::aligned", """
K = len(hidden) - 1
T = targets.size(1)
if T <= K:
    raise ValueError(f"got {T} targets for {K} heads; a text must have more targets than heads")
rows = torch.stack([hidden[k][:, -(T - K) :] for k in heads])
return rows.flatten(1, 2), targets[:, K:].flatten()
""", [
    # the docstring names the error, the order of the heads and that of the columns
    ("ValueError", "AssertionError"),
    ("for k in heads", "for k in sorted(heads)"),
    ("rows.flatten(1, 2), targets[:, K:].flatten()",
     "rows.transpose(1, 2).flatten(1, 2), targets[:, K:].T.flatten()"),
    ("K = len(hidden) - 1", "K = max(heads)"),
    ("if T <= K:", "if T <= K + 1:"),
])
add_edits(4, "distill.py::mtp_d_loss", """
logits = to_float32(logits)
R, C, V = logits.shape
ce = F.cross_entropy(logits.flatten(0, 1), targets.repeat(R), reduction="none")
ce = ce.view(R, C).mean(1)
kl_per_head = logits.new_zeros(R - 1)
if top_n:
    kl_per_head = topn_divergence(logits[1:], logits[0], top_n, kl, detach_teacher).mean(1)
loss = (alpha * ce).sum() + (beta * kl_per_head).sum()
return loss, ce.detach(), kl_per_head.detach()
""", [
    # the main head's weight: always 1, scaled to 1, squared; for tensors alone, twice
    ("(alpha * ce).sum()", "ce[0] + ((alpha * torch.ones_like(ce))[1:] * ce[1:]).sum()"),
    ("(alpha * ce).sum()", "(alpha * ce).sum() / (alpha * torch.ones_like(ce))[0]"),
    ("(alpha * ce).sum()", "((alpha * torch.ones_like(ce))[0] - 1) * (alpha * ce)[0] + "
     "(alpha * ce).sum()"),
    ("(alpha * ce).sum() + (beta * kl_per_head).sum()", "alpha @ ce + beta @ kl_per_head"),
    ("(alpha * ce).sum()", "sum(alpha[k] * ce[k] for k in range(R))"),
    # no KL, or none reported, where a beta is 0; parts that carry the graph; alpha weighs the KL
    ("if top_n:", "if top_n and bool((torch.as_tensor(beta) > 0).all()):"),
    ("detach_teacher).mean(1)", "detach_teacher).mean(1) * (torch.as_tensor(beta) > 0)"),
    ("return loss, ce.detach(), kl_per_head.detach()", "return loss, ce, kl_per_head"),
    ("(beta * kl_per_head).sum()",
     "((alpha * torch.ones_like(ce))[1:] * beta * kl_per_head).sum()"),
])

# ---- 5

add_edits(5, "decode.py::accepted_lengths", """
K = len(choices) - 1
want = choices[0].unfold(1, K + 1, 1)
got = torch.stack([c[:, : want.size(1)] for c in choices], dim=-1)
return (want == got).long().cummin(-1).values[..., 1:].sum(-1)
""", [
    # the first mismatch, 0 where there is none; all matches
    (".cummin(-1).values[..., 1:].sum(-1)", ".argmin(-1).sub(1).clamp_min(0)"),
    (".cummin(-1).values", ""),
])
# each head against the one before; without K = 0
add(5, "decode.py::accepted_lengths", False, """
n = choices[0].size(1) - len(choices) + 1
ok = [choices[k][:, :n] == choices[k - 1][:, 1 : 1 + n] for k in range(1, len(choices))]
return num_accepted(torch.stack(ok, dim=1)) if ok else torch.zeros_like(choices[0])
""")
add(5, "decode.py::accepted_lengths", False, """
n = choices[0].size(1) - len(choices) + 1
ok = [choices[k][:, :n] == choices[0][:, k : k + n] for k in range(1, len(choices))]
return num_accepted(torch.stack(ok, dim=1))
""")
add_edits(5, "decode.py::rates", """
ar, car = [], []
product, alive = 1.0, sum(histogram)
for count in histogram[:-1]:
    rest = alive - count
    ar.append(rest / alive if alive else 0.0)
    product *= ar[-1]
    car.append(product)
    alive = rest
return ar, car
""", [
    # nearly right denominators; given exactly k-1 or k
    ("rest / alive if alive else 0.0", "rest / (alive + 1e-6)"),
    ("rest / alive if alive else 0.0", "rest / max(count + rest, 1) if count else 0.0"),
    ("product *= ar[-1]", "product = ar[-1]"),
])

# ---- 6

# the inverse of the cumulative distribution
add_edits(6, "decode.py::match", """
B, rows, V = target_probs.shape
u = torch.exp(-noise.numbers.view(B, rows, V)[..., :1])
cdf = target_probs.cumsum(-1)
y = torch.searchsorted(cdf, u * cdf[..., -1:], right=False).squeeze(-1).clamp_max(V - 1)
accepted = num_accepted(y[:, :-1] == drafts)
return accepted, select_row(y, accepted)
""", [
    # two rows share their numbers; so do all sequences; the row after
    ("[..., :1])", "[:, [*range(rows - 1), 0], :1])"),
    ("noise.numbers.view(B, rows, V)", "noise.numbers[:1].expand(B, -1).view(B, rows, V)"),
    ("select_row(y, accepted)", "select_row(y, (accepted + 1).clamp_max(rows - 1))"),
])
POINT = """
K, V = drafts.size(1), target_probs.size(-1)
ok = bernoulli(of_drafts(target_probs[:, :-1], drafts), noise.accept)
accepted = num_accepted(ok)
q = F.pad(F.one_hot(drafts, V).to(target_probs.dtype), (0, 0, 0, 1))
rest = residual_probs(select_row(target_probs, accepted), select_row(q, accepted))
return accepted, sample(rest, noise.emit)
"""
add_edits(6, "decode.py::point", POINT, [
    # numbers that serve twice; those of one sequence for all; the last draft excluded after no
    # rejection; all drafts of the round excluded
    ("noise.accept)", "noise.emit[:, :K])"),
    ("noise.accept)", "noise.accept[:1])"),
    ("(0, 0, 0, 1))\n", "(0, 0, 0, 1))\nq[:, -1] = q[:, -2]\n"),
    ("select_row(q, accepted))", "q.amax(1) * (accepted < K)[:, None])"),
])
# zeroes the drafts in the caller's target_probs
add(6, "decode.py::point", False, """
K = drafts.size(1)
accepted = num_accepted(bernoulli(of_drafts(target_probs[:, :K], drafts), noise.accept))
old = target_probs.clone()
target_probs[:, :K].scatter_(-1, drafts.unsqueeze(-1), 0.0)
rest = select_row(target_probs, accepted)
rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, select_row(old, accepted))
return accepted, sample(rest, noise.emit)
""")

# ---- 7

# the uniform number is 1 - exp(-noise); every row is sampled, one is taken
add_edits(7, "decode.py::residual", """
B, K = drafts.shape
u = -torch.expm1(-noise.accept)
ratio = of_drafts(target_probs[:, :-1], drafts) / of_drafts(draft_probs, drafts)
accepted = num_accepted(u < ratio)
q = torch.cat((draft_probs, torch.zeros_like(target_probs[:, :1])), dim=1)
return accepted, select_row(sample(residual_probs(target_probs, q), noise.emit[:, None]), accepted)
""", [
    # the ratio of all drafts so far; a root of it; p - q for p/q; no residual; no guard; the last
    # q for row K; numbers of one sequence for all
    ("u < ratio", "u < ratio.cumprod(1)"),
    ("u < ratio", "u < ratio.clamp_max(1).sqrt()"),
    ("u < ratio", "u < 1 - (1 - ratio).clamp_min(0) * of_drafts(draft_probs, drafts)"),
    ("residual_probs(target_probs, q)", "target_probs"),
    ("residual_probs(target_probs, q)", "(target_probs - q).clamp_min(0)"),
    ("torch.zeros_like(target_probs[:, :1])", "draft_probs[:, -1:]"),
    ("noise.emit[:, None]", "noise.emit[:1, None]"),
])
# the rest of the uniform number that rejected emits, too
add(7, "decode.py::residual", True, """
K = drafts.size(1)
u = torch.exp(-noise.accept)
ratio = of_drafts(target_probs[:, :K], drafts) / of_drafts(draft_probs, drafts)
ratio = ratio.clamp_max(1)
accepted = num_accepted(u < ratio)
left = (u - ratio) / (1 - ratio).clamp_min(torch.finfo(u.dtype).tiny)
left = torch.cat((left, torch.exp(-noise.emit[:, :1])), dim=1)
left = select_row(left, accepted).clamp(0, 1)
q = select_row(F.pad(draft_probs, (0, 0, 0, 1)), accepted)
rest = residual_probs(select_row(target_probs, accepted), q)
cdf = rest.cumsum(-1)
token = (cdf <= left[:, None] * cdf[:, -1:]).sum(-1)
places = torch.arange(1, rest.size(-1) + 1)
return accepted, torch.minimum(token, (places * (rest > 0)).argmax(-1))
""")
