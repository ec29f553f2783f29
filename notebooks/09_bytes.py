# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bytes, on paper and in the ledger
#
# Three ways to attend over a sequence that is split over $P$ ranks, and what each of them sends:
#
# - **Ulysses**: an all-to-all before attention and one after it. A rank attends with some heads over all tokens.
# - **Megatron-SP** (tensor parallelism with its sequence part): an all-gather of the tokens before attention and
#   before the MLP, a reduce-scatter behind each. Weights are split too.
# - **Ring attention**: queries stay, keys and values go round, one block at a time.
#
# The papers count elements with $N$ tokens, $h = H_q D$ the width of all query heads, $g = H_{kv} / H_q$, and one
# layer's forward pass. Counted exactly, a rank's own part left out, each rank sends
#
# | | elements |
# |---|---|
# | Ulysses | $(2 + 2 r g) \, \frac{N h}{P} \, \frac{P - 1}{P}$, with $r = \max(1, P / H_{kv})$ copies of a kv head |
# | Megatron-SP | $4 N h \, \frac{P - 1}{P}$ |
# | ring | $2 g \, \frac{N h}{P} \, (P - 1)$ |
#
# Formulas are easily believed. Here each method is a program of a few lines, checked against one device, and the
# ledger of the virtual ranks counts what it sends.

# %%
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from seqpar_ref import DistributedAttention, make_plan
from simulator import VirtualWorld
from simulator.draw import Picture


# %%
def make_qkv(tokens, heads, kv_heads, dim=4):
    torch.manual_seed(0)
    shapes = [(tokens, count, dim) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def attention(query, key, value):
    """On one device, [token, head, dim]; not causal, so that all ranks have equally much to do."""
    heads_first = (x.transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(0, 1)


# %%
def mine(x):
    """This rank's part."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


# %% [markdown]
# ## Ulysses


# %%
def ulysses(query, key, value):
    ranks = dist.get_world_size()
    plan = make_plan(ranks=ranks, heads=query.shape[1], kv_heads=key.shape[1], tokens=len(query))
    shards = (mine(x)[None] for x in (query, key, value))  # with a batch of one
    return DistributedAttention(plan=plan)(*shards)[0]


# %% [markdown]
# **Question.** 16 tokens, 8 heads of dim 4 and as many kv heads, on 4 ranks: $N h = 512$. How many elements does
# each rank send?

# %%
qkv = make_qkv(tokens=16, heads=8, kv_heads=8)
world = VirtualWorld(4)
output = torch.cat(world.run(ulysses, *qkv))
print("right:", torch.allclose(output, attention(*qkv)))
print("elements sent by each rank:", (world.ledger.by_rank()[:, 0] // 8).tolist())
print("by kind:", {kind: total.calls for kind, total in world.ledger.by_kind().items()})

# %% [markdown]
# $4 \cdot \frac{512}{4} \cdot \frac{3}{4} = 384$. `plan.bytes(...)` says the same before anything runs, rank by
# rank, for uneven heads and tokens too.
#
# ## Ring attention
#
# Each rank attends with its queries to the block of keys that it has at the moment, and hands the block on. Two
# parts of a softmax are put together by the logarithms of their sums, with `logaddexp`, which cannot overflow.


# %%
def part(query, key, value):
    """Attention to some of the keys, and the logarithm of the sum of its weights, [head, token, 1]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
    return scores.softmax(-1) @ value.transpose(0, 1), scores.logsumexp(-1, keepdim=True)


def put_together(output, weight, more, its_weight):
    total = torch.logaddexp(weight, its_weight)
    return output * (weight - total).exp() + more * (its_weight - total).exp(), total


# %%
def hand_on(block):
    """Start sending a block to the next rank, and receiving another from the one before."""
    rank, ranks, coming = dist.get_rank(), dist.get_world_size(), torch.empty_like(block)
    sending = dist.P2POp(dist.isend, block, (rank + 1) % ranks)
    receiving = dist.P2POp(dist.irecv, coming, (rank - 1) % ranks)
    return dist.batch_isend_irecv([sending, receiving]), coming


# %%
def ring(query, key, value):
    query, block = mine(query), torch.stack([mine(key), mine(value)])
    result = None
    for left in reversed(range(dist.get_world_size())):
        works, coming = hand_on(block) if left else ([], None)  # travels while this block is attended to
        found = part(query, *block)
        result = found if result is None else put_together(*result, *found)
        for work in works:
            work.wait()
        block = coming
    return result[0].transpose(0, 1)


# %% [markdown]
# **Question.** The same sizes. Does the ring send more or fewer elements than 384?

# %%
output = torch.cat(world.run(ring, *qkv))
print("right:", torch.allclose(output, attention(*qkv)))
print("elements sent by each rank:", (world.ledger.by_rank()[:, 0] // 8).tolist())
print("by kind:", {kind: total.calls for kind, total in world.ledger.by_kind().items()})

# %% [markdown]
# Twice as many, in 3 messages of each rank. Keys and values visit every rank; that is
# $2 \cdot \frac{512}{4} \cdot 3 = 768$.
#
# ## Megatron-SP
#
# A layer of it, attention and MLP, without norms and residuals. A rank has columns of the first weight of each pair
# and rows of the second, so its result is one of $P$ terms of a sum over all tokens: the reduce-scatter adds them
# up and leaves each rank its own tokens. Attention in between is that of the rank's own heads.


# %%
def gathered(x):
    whole = x.new_empty(len(x) * dist.get_world_size(), *x.shape[1:])
    dist.all_gather_single(whole, x.contiguous())
    return whole


def summed(terms):
    own = torch.empty_like(mine(terms))
    dist.reduce_scatter_single(own, terms)
    return own


# %%
def layer(x, w_query, w_key, w_value, w_output, w_up, w_down, gather=lambda x: x, add=lambda x: x):
    whole = gather(x)
    heads = [(whole @ w).unflatten(1, (-1, 4)) for w in (w_query, w_key, w_value)]
    x = add(attention(*heads).flatten(1) @ w_output)
    return add(F.gelu(gather(x) @ w_up) @ w_down)


def megatron_sp(x, *weights):
    *columns, rows_of_output, columns_of_up, rows_of_down = weights
    own = [mine(w.T).T for w in columns]
    own += [mine(rows_of_output), mine(columns_of_up.T).T, mine(rows_of_down)]
    return layer(mine(x), *own, gathered, summed)


# %% [markdown]
# **Question.** Width 32, so that $N h$ is 512 again. How many elements per rank?

# %%
torch.manual_seed(0)
x = torch.randn(16, 32, dtype=torch.float64)
shapes = [(32, 32)] * 4 + [(32, 128), (128, 32)]
weights = [torch.randn(shape, dtype=torch.float64) / 6 for shape in shapes]
output = torch.cat(world.run(megatron_sp, x, *weights))
print("right:", torch.allclose(output, layer(x, *weights)))
print("elements sent by each rank:", (world.ledger.by_rank()[:, 0] // 8).tolist())
print("by kind:", {kind: total.calls for kind, total in world.ledger.by_kind().items()})

# %% [markdown]
# $4 \cdot 512 \cdot \frac{3}{4} = 1536$: $P$ times what Ulysses sends. Half of it belongs to the MLP, for which the
# other two send nothing, because each rank has the whole weights. That is the other side: Megatron-SP keeps a
# $P$-th of the weights on each rank, and with Ulysses or a ring something else (ZeRO, FSDP) has to split them.
#
# ## Many sizes
#
# The formulas, and what the ledger counts when a program runs.


# %%
def on_paper(ranks, tokens, heads, kv_heads, dim=4):
    share, g, r = tokens * heads * dim / ranks, kv_heads / heads, max(1, ranks / kv_heads)
    return (2 + 2 * r * g) * share * (ranks - 1) / ranks, 2 * g * share * (ranks - 1)


def in_ledger(program, ranks, *inputs):
    world = VirtualWorld(ranks)
    world.run(program, *inputs)
    (sent,) = {*world.ledger.by_rank()[:, 0].tolist()}  # every rank sends the same
    return sent / inputs[0].itemsize


# %% [markdown]
# **Question.** 16 query heads; 16 and then 4 kv heads. On which number of ranks does Ulysses gain least from having
# fewer of them, and why?

# %%
sizes = [(ranks, 32, 16, kv_heads) for ranks in (2, 4, 8) for kv_heads in (16, 4)]
sizes += [(8, 72, 64, 8), (9, 72, 72, 9), (12, 72, 96, 12)]  # 8 query heads for each kv head
counted = {}
print("ranks  heads  kv heads  Ulysses   ring")
for size in sizes:
    qkv = make_qkv(*size[1:])
    counted[size] = [in_ledger(program, size[0], *qkv) for program in (ulysses, ring)]
    print(f"{size[0]:5} {size[2]:6} {size[3]:9} {counted[size][0]:8.0f} {counted[size][1]:6.0f}")

# %% [markdown]
# On 8 ranks: with 4 kv heads each of them goes to two ranks, $r = 2$, and Ulysses sends as much as with 8 kv heads.
#
# The last three rows have 8 query heads for each kv head. On 8 ranks the ring sends less, on 9 both send the same,
# and on 12 the ring sends more. In general
#
# $$\frac{\text{ring}}{\text{Ulysses}} = \frac{g P}{1 + g} \quad (r = 1),$$
#
# which is $P / 2$ without grouped heads, and 1 at $P = 1 + 1/g$.
#
# ## At the size of a model
#
# 131,072 tokens in bfloat16, 64 query heads of dim 128: $N h$ elements are 2 GiB.

# %%
ranks = np.array([2, 4, 8, 16, 32, 64])
lines = {"Megatron-SP": 4 * 2**17 * 64 * 128 * (ranks - 1) / ranks}
for kind, kv_heads in (("64 kv heads", 64), ("8 kv heads", 8)):
    both = np.array([on_paper(int(P), 2**17, 64, kv_heads, 128) for P in ranks]).T
    lines |= {f"ring, {kind}": both[1], f"Ulysses, {kind}": both[0]}

styles = dict(zip(lines, ("C7s-", "C1o--", "C0^--", "C1o-", "C0^-"), strict=True))


# %%
def draw(lines):
    picture = Picture(columns=2)
    panel = picture.add_subplot(xlabel="ranks", ylabel="GiB sent by each rank", title="one layer, forward")
    panel.set_xscale("log", base=2), panel.set_yscale("log", base=2)
    for name, elements in lines.items():
        panel.plot(ranks, 2 * elements / 2**30, styles[name], label=name)
    panel.set_xticks(ranks, map(str, ranks))
    panel.set_yticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    picture.legend(loc="outside right center", fontsize=8, frameon=False)
    return picture


# %% [markdown]
# **Question.** With twice the ranks each has half of the work. For which methods do the bytes that a rank sends fall
# as well?

# %%
draw(lines)

# %% [markdown]
# For Ulysses only. What Megatron-SP and the ring send tends to a constant, $4 N h$ and $2 g N h$ elements. With 8
# kv heads the ring sends less on up to 8 ranks, and more from 16 on. On 64 ranks both lines of Ulysses meet: a rank
# needs one kv head, whatever there are in all.
#
# Those are the bytes of the forward pass. Ulysses sends as many again in the backward pass: the gradients of the
# same tensors, the other way. A ring sends keys and values round once more then, and their gradients with them.
#
# ## Bytes are not time
#
# How long a byte takes depends on the links, and what a device has to compute meanwhile decides whether anybody
# waits. A ring's messages go to a neighbour and can hide behind the attention to a block; an all-to-all uses all
# links at a time. And with a causal mask a ring has a trouble of its own: who holds the first tokens has little to
# attend to, and all wait for the slowest in every step.
#
# Let the work be the pairs of a query and a key that the mask allows. In each step a rank has the block of another.


# %%
def work(queries, keys):
    """Pairs of tokens that the mask allows; a token and itself count as half a pair."""
    behind, same = queries[:, None] > keys, queries[:, None] == keys
    return (behind.sum() + same.sum() / 2).item()


def efficiency(pieces_of, ranks=8, tokens=64):
    pieces = torch.arange(tokens).chunk(2 * ranks)
    own = [torch.cat([pieces[piece] for piece in pieces_of(rank)]) for rank in range(ranks)]
    steps = [[work(own[rank], own[rank - step]) for rank in range(ranks)] for step in range(ranks)]
    return sum(map(sum, steps)) / ranks / sum(map(max, steps))


# %% [markdown]
# **Question.** 8 ranks with neighbouring tokens each: what part of the time is useful work? And if rank $r$ holds
# the pieces $r$ and $15 - r$ of 16 ("zigzag")?

# %%
contiguous = efficiency(lambda rank: (2 * rank, 2 * rank + 1))
zigzag = efficiency(lambda rank: (rank, 15 - rank))
print(f"contiguous {contiguous:.1%}, zigzag {zigzag:.0%}")

# %% [markdown]
# On paper it is $\frac{P / 2}{P - 1/2}$. With Ulysses every rank has all tokens, so the mask costs nothing there.
#
# ## Beside published numbers
#
# **ring-flash-attention**, [its README](https://github.com/zhuzilin/ring-flash-attention), Llama-3.1-8B's attention on
# 8 H800 and on 8 A100: the ring reaches 51.4 to 53.9 % of the ideal speed, zigzag 81.7 to 90.2 %. The count above says
# 53.3 % and 100 % for 8 ranks: the mask explains the ring's loss, and zigzag's has other reasons.
#
# **fast-ulysses**, [its page on PyPI](https://pypi.org/project/fast-ulysses/), 8 H200, 75,600 tokens, 40 heads of dim
# 128, bfloat16: one all-to-all sends 84.7 MB from each rank, and NCCL takes about 0.417 ms for it (203 GB/s).
#
# **Question.** A rank sends one of q, k and v in an all-to-all. Which three numbers give 84.7 MB?

# %%
published = make_plan(ranks=8, heads=40, tokens=75_600)
megabytes = published.vectors("query").sum(axis=1) * 128 * 2 / 1e6
print(megabytes[0], "MB,", f"{megabytes[0] / 203:.3f} ms at 203 GB/s")

# %% [markdown]
# 9,450 tokens of a rank, 35 heads of the other ranks, 256 bytes a vector.
#
# **prime-rl**, [its pull request 2418](https://github.com/PrimeIntellect-ai/prime-rl/pull/2418), GLM-4.5-Air (96 query
# heads, 8 kv heads), 8 H200, 64k tokens: 84 thousand tokens a second without sequence parallelism; with Ulysses on 2
# and 4 ranks 77 and 85 thousand, with a ring 60 and 57 thousand.
#
# **Question.** How many times the bytes of Ulysses does the ring send there?

# %%
for P in (2, 4):
    both = on_paper(P, 2**16, 96, 8, 128)
    print(f"{P} ranks: {both[1] / both[0]:.2f}")

# %% [markdown]
# Less than a third, and it was slower all the same. Bytes say what a network has to move, not how fast a step is.
#
# **DeepSpeed-Ulysses**, [its blog](https://github.com/deepspeedai/DeepSpeed/tree/master/blogs/deepspeed-ulysses): up
# to 2.5 times the throughput of Megatron-SP, and sequences 4 times as long. The count says a $P$-th of the bytes;
# throughput has the computation in it, and length is a matter of memory. The same goes for the longest sequences (3.7
# million tokens on 8 GPUs in [the ALST paper](https://arxiv.org/abs/2506.13996), 4 million and a model of 70B on 32 in
# [the FPDT blog](https://github.com/deepspeedai/DeepSpeed/tree/master/blogs/ulysses-offload)): they come from
# recomputation, offload and tiling beside the exchange.
#
# None of these was measured here; this project has had no GPU so far.
#
# ## Which method when
#
# - **Ulysses** where there are at least as many query heads as ranks: its bytes fall with the ranks, and any mask
#   and any attention kernel will do. With more ranks than query heads some have none, and wait.
# - **A ring** where there are more ranks than that, mostly over groups of Ulysses ranks, as a second dimension; or
#   where kv heads are few, ranks fewer than $1 + 1/g$, and links slow. If causal, with zigzag.
# - **Megatron's tensor parallelism** where weights do not fit on a device otherwise. Its bytes do not fall with the
#   ranks, so keep it inside a node. ZeRO-3 or FSDP beside Ulysses split the weights too.
#
# This package implements Ulysses. The ring above is there to be counted, not to be used.
#
# ## What this notebook claims, checked


# %%
def forward_and_backward(*qkv):
    query, key, value = (x.clone().requires_grad_() for x in qkv)
    ulysses(query, key, value).sum().backward()


qkv = make_qkv(32, 16, 16)
assert in_ledger(forward_and_backward, 4, *qkv) == 2 * in_ledger(ulysses, 4, *qkv)

# %%
for size, found in counted.items():
    assert np.allclose(found, on_paper(*size), rtol=1e-12)
assert world.ledger.by_rank()[:, 0].tolist() == [4 * 16 * 32 * 3 // 4 * 8] * 4  # Megatron-SP, in bytes
assert counted[8, 32, 16, 4][0] == on_paper(8, 32, 16, 8)[0] == 672
ratio = {size: found[1] / found[0] for size, found in counted.items()}
assert ratio[8, 72, 64, 8] < ratio[9, 72, 72, 9] == 1 < ratio[12, 72, 96, 12]
assert ratio[8, 32, 16, 16] == 8 / 2 and ratio[4, 32, 16, 16] == 4 / 2 and ratio[2, 32, 16, 16] == 2 / 2

# %%
falls = {name: elements[-1] < elements[0] for name, elements in lines.items()}
assert [name.split(",")[0] for name, fell in falls.items() if fell] == ["Ulysses", "Ulysses"]
few = lines["ring, 8 kv heads"] < lines["Ulysses, 8 kv heads"]
assert few.tolist() == [True, True, True, False, False, False]
assert lines["Ulysses, 64 kv heads"][-1] == lines["Ulysses, 8 kv heads"][-1]
assert abs(contiguous - 4 / 7.5) < 1e-12 and zigzag == 1
assert megabytes.tolist() == [84.672] * 8 and 75_600 // 8 == 9_450
assert np.isclose(both[1] / both[0], 4 / 13) and both[1] / both[0] < 1 / 3

# %% [markdown]
# ## Two puzzles
#
# **1.** 14 query heads share 2 kv heads, on 4 ranks. What do $r$ and the formula say, and what does the plan?
#
# <details><summary>Answer</summary>
#
# $r = 4 / 2 = 2$, and $(2 + 2 \cdot 2 \cdot \frac{1}{7}) \frac{N h}{P} \cdot \frac{3}{4}$. But 14 heads do not
# divide by 4: ranks own 4, 4, 3 and 3 of them, so that ranks send different amounts, and rank 1's heads 4 to 7 need
# both kv heads. The formula holds where the ranks divide the heads; `make_plan(...).bytes(...)` counts every case.
#
# </details>
#
# **2.** Without grouped heads, on how many ranks does a ring send less than Ulysses?
#
# <details><summary>Answer</summary>
#
# On none: the ratio is $P / 2$, which is 1 on two ranks. On one rank nobody sends anything.
#
# </details>
