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
# # Unequal tokens and rotary positions
#
# Texts have the length that they have, and not every length divides by the ranks. And once a text is cut, token 0 of a
# rank is no longer token 0 of the text. Both are the same question, asked of different code: **where in the whole
# sequence is this token?** Whoever answers it with the number of the token on its own rank has one of the most common
# silent bugs of sequence parallelism.

# %%
import torch
import torch.distributed as dist

from seqpar_ref import DistributedAttention, SeqparError, apply_rotary, make_plan, position_ids_of
from seqpar_ref.local_attention import plain_attention
from simulator import VirtualWorld
from simulator.draw_tiles import draw_tiles

torch.manual_seed(0)
batch, heads, dim = 2, 3, 6
tokens_by_rank = (4, 1, 3)
ranks, tokens = len(tokens_by_rank), sum(tokens_by_rank)

# %% [markdown]
# ## Nothing to pad
#
# The usual way out is padding: add tokens until the length divides, and mask them everywhere. But an all-to-all with
# counts does not need equal shares, of tokens as little as of heads: the entry of the matrix of counts for sender $r$
# and receiver $s$ is (tokens of $r$) x (heads of $s$), whatever these are. Nor do the shares have to be nearly equal.
#
# **Question.** Eight tokens, three ranks. How are they divided if only the sum is given?

# %%
plan = make_plan(ranks=ranks, heads=heads, tokens=tokens_by_rank)
print("only the sum:", make_plan(ranks=ranks, heads=heads, tokens=tokens).tokens_by_rank)
print(plan)

# %% [markdown]
# ## Who works how much?
#
# Under the causal rule token $i$ looks at $i + 1$ tokens. A method that keeps the queries where they are (a ring, or
# gathering all keys) makes a rank work for its own tokens. After an all-to-all, a rank works for its own *heads*, each
# of them over the whole triangle.
#
# **Question.** Rank 1 has one token of eight. Which part of the pairs (query, key) does it compute, in each case?

# %%
by_tokens = [sum(i + 1 for i in plan.tokens_of(rank)) * heads for rank in range(ranks)]
by_heads = [sum(i + 1 for i in range(tokens)) * len(plan.query_heads(rank)) for rank in range(ranks)]
print("queries stay:    ", by_tokens)
print("heads are swapped:", by_heads)

# %% [markdown]
# The causal triangle is balanced by itself, however the tokens lie. What has to be even for attention is the heads;
# what has to be even for everything else is the tokens.
#
# ## A position is an angle
#
# Rotary embedding turns each pair of elements of a query or key by an angle that grows with its position $p$:
#
# $$(a, b) \to (a \cos\phi - b \sin\phi, \; b \cos\phi + a \sin\phi), \qquad \phi_{p,i} = p \, \theta^{-2i/D}$$
#
# Two vectors turned by $\phi_p$ and $\phi_q$ have a scalar product in which only $\phi_p - \phi_q$ is left: the score
# of two tokens depends on how far apart they are, and on nothing else about where they are.
#
# **Question.** All positions are raised by 100. Which scores change?


# %%
def scores(query, key, positions):
    """Of each pair of tokens, before the softmax: [batch, head, query token, key token]."""
    turned = [apply_rotary(tensor, positions) for tensor in (query, key)]
    return torch.einsum("bshd,bthd->bhst", *turned)


query, key, value = torch.randn(3, batch, tokens, heads, dim, dtype=torch.float64)
right = scores(query, key, torch.arange(tokens))
print("the same scores:", torch.allclose(right, scores(query, key, torch.arange(tokens) + 100), atol=1e-12))

# %% [markdown]
# ## Counting from 0 on every rank
#
# None. That is a pleasant property, and a treacherous one: on each rank by itself, positions that begin at 0 instead of
# 4 are just as good. It is the pairs *across* ranks that suffer. The pictures show the distance that a query token
# (row) believes a key token (column) to have; on the right, only distances that are true have a colour.
#
# **Question.** Each rank counts its own tokens from 0. Which tiles keep their colour?

# %%
everywhere = torch.arange(tokens)
local = torch.cat([torch.arange(count) for count in tokens_by_rank])
rank_of = torch.arange(ranks).repeat_interleave(torch.tensor(tokens_by_rank)).tolist()
panels = {}
for title, positions in {"global positions": everywhere, "positions by rank": local}.items():
    believed = [[int(positions[i] - positions[j]) for j in range(i + 1)] for i in range(tokens)]
    true = [[rank_of[i] if believed[i][j] == i - j else None for j in range(i + 1)] for i in range(tokens)]
    panels[title] = believed, true
draw_tiles(panels, row="query token", column="key token", owner="query on rank", columns=2)

# %% [markdown]
# Where both tokens lie on one rank the distance is true. All others are wrong, some of them negative: tokens that look
# into what they take for the future.
#
# Now with attention. Each rank turns its own tokens **before** the exchange; it needs their positions and no others.


# %%
def program(plan, query, key, value, count_from_0):
    rank = dist.get_rank()
    own = plan.tokens_of(rank)
    query, key, value = (tensor[:, own.start : own.stop] for tensor in (query, key, value))
    positions = torch.arange(len(own)) if count_from_0 else position_ids_of(plan, rank)
    query, key = apply_rotary(query, positions), apply_rotary(key, positions)
    return DistributedAttention(plan=plan)(query, key, value, is_causal=True)


# %% [markdown]
# **Question.** Which of the eight outputs does the bug leave right?

# %%
turned = [apply_rotary(tensor, everywhere) for tensor in (query, key)]
whole = plain_attention(*turned, value, is_causal=True)
outputs = [
    torch.cat(VirtualWorld(ranks).run(program, plan, query, key, value, bug), 1) for bug in (False, True)
]
for name, output in zip(("global positions", "positions by rank"), outputs, strict=True):
    print(f"{name:17}", ((output - whole).abs().amax(dim=(0, 2, 3)) < 1e-12).int().tolist())

# %% [markdown]
# Those of rank 0, which are the first four. A test that looks at rank 0 only, or that has one rank, sees nothing. And a
# model fine-tuned with this bug learns to live with it, until it meets another number of ranks.
#
# ## Before or after?
#
# After the exchange a rank has all tokens, so it could as well turn them then, with all positions.


# %%
def turn_inside(query, key, value, **options):
    """A local attention that turns what it gets: all tokens in global order, and this rank's heads."""
    positions = torch.arange(query.shape[1])
    return plain_attention(apply_rotary(query, positions), apply_rotary(key, positions), value, **options)


# %% [markdown]
# **Question.** Is the result another one? And which way is cheaper, if a kv head goes to several ranks?


# %%
def after():
    own = plan.tokens_of(dist.get_rank())
    qkv = [tensor[:, own.start : own.stop] for tensor in (query, key, value)]
    return DistributedAttention(turn_inside, plan=plan)(*qkv, is_causal=True)


inside = torch.cat(VirtualWorld(ranks).run(after), dim=1)
print("the same result:", torch.allclose(inside, whole, rtol=0, atol=1e-12))

# %% [markdown]
# Before is cheaper: a rank turns its own tokens, each head once, and needs the angles of no others. After the exchange
# the work is the same in sum for query heads, but every copy of a kv head is turned again, and every rank needs the
# angles of the whole sequence.
#
# ## Which two elements are a pair?
#
# Elements $i$ and $i + D/2$ (half-split: GPT-NeoX, Llama in transformers), or elements $2i$ and $2i + 1$ (interleaved:
# the paper, GPT-J). Weights are trained for one of them.
#
# **Question.** Code and weights disagree about the convention. Does the length of the turned vectors tell? Do the
# scores?

# %%
half, pairs = (apply_rotary(query, everywhere, interleaved=flag) for flag in (False, True))
other = torch.einsum("bshd,bthd->bhst", pairs, apply_rotary(key, everywhere, interleaved=True))
lengths = [torch.allclose(turned.norm(dim=3), query.norm(dim=3)) for turned in (half, pairs)]
print("lengths agree:", all(lengths))
print("scores agree: ", torch.allclose(other, right))

# %% [markdown]
# Turning never changes a length, in either convention, so only the scores tell. And on the token at position 0 they
# agree, since nothing is turned there: a test with one token cannot fail.
#
# ## What can be refused
#
# A tensor in the layout `s b h d`, with one row in the batch, read as `b s h d`, looks like four texts of one token
# each. Rotary code that lets shapes broadcast then makes a larger tensor of it, without a word.
#
# **Question.** What is there to compare here, so that it can be refused?

# %%
megatron = torch.zeros(4, 1, heads, dim)  # s b h d
try:
    apply_rotary(megatron, position_ids_of(plan, rank=0))
except SeqparError as error:
    print(f"{type(error).__name__}: {error}")
print(tuple(apply_rotary(megatron, position_ids_of(plan, rank=0), layout="s b h d").shape))

# %% [markdown]
# ## What this notebook claims, checked

# %%
assert make_plan(ranks=3, heads=heads, tokens=8).tokens_by_rank == (3, 3, 2)
assert by_tokens == [30, 15, 63] and by_heads == [36, 36, 36]
for i in range(tokens):
    for j in range(i + 1):
        assert (local[i] - local[j] == i - j) == (rank_of[i] == rank_of[j])
distances = [(output - whole).abs().amax(dim=(0, 2, 3)) for output in outputs]
assert distances[0].max() < 1e-12 and ((distances[1] < 1e-12) == (everywhere < 4)).all()
assert (inside - whole).abs().max() < 1e-12
assert torch.equal(half[:, 0], pairs[:, 0]) and not torch.allclose(other, right)

# %%
nobody = make_plan(ranks=3, heads=heads, tokens=(5, 0, 3))  # a rank without tokens
qkv = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
output = torch.cat(VirtualWorld(3, autograd="joint").run(program, nobody, *qkv, False), dim=1)
expected = plain_attention(*(apply_rotary(tensor, everywhere) for tensor in qkv[:2]), qkv[2], is_causal=True)
for ours, single in zip(
    [output, *torch.autograd.grad(output.square().sum(), qkv)],
    [expected, *torch.autograd.grad(expected.square().sum(), qkv)],
    strict=True,
):
    assert torch.allclose(ours, single, rtol=0, atol=1e-12)
assert nobody.tokens_by_rank == (5, 0, 3)

# %% [markdown]
# ## Two puzzles
#
# **1.** Two documents of 5 and 3 tokens are packed into one sequence, on the ranks of this notebook. Positions begin
# at 0 in each document. What are the position ids of each rank, and what does the mask have to say?
#
# <details><summary>Answer</summary>
#
# Rank 0 has 0, 1, 2, 3; rank 1 has 4, the last token of the first document; rank 2 has 0, 1, 2, the second document.
# (Counting from 0 on every rank would be right on rank 2, by accident, and wrong on rank 1.) The causal rule alone
# would let the second document see the first, so a mask over all 8 x 8 tokens is needed, the same on every rank: after
# the exchange tokens are in global order, and it means what it means on one device.
#
# </details>
#
# **2.** Somebody's positions begin at 1 instead of 0, on all ranks alike. Which comparison with one device finds it?
#
# <details><summary>Answer</summary>
#
# None that looks at the output of attention: all distances are what they were. It is no error of the result, and may
# become one elsewhere: the last position reads past the end of a table of cosines with as many rows as tokens, and keys
# from a cache that another program has filled, counting from 0, are all one step further away.
#
# </details>
