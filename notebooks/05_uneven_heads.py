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
# # Uneven heads, shared kv heads, and copies
#
# Most implementations ask for heads that divide by the ranks. Models do not always oblige: SmolLM2-135M has 9 query
# heads, which share 3 kv heads, and people have 4 devices, or 8. Nothing in the method needs equal shares. It needs a
# *plan*: who has which heads during attention, decided once, from sizes that every rank knows, so that all ranks agree
# on every count without asking each other.

# %%
import torch
import torch.distributed as dist

from seqpar_ref import DistributedAttention, SeqparError, make_plan, sequence_to_heads
from seqpar_ref.local_attention import plain_attention
from simulator import VirtualWorld
from simulator.draw import draw_exchange, draw_layouts
from simulator.draw_tiles import draw_tiles

torch.manual_seed(0)
ranks, heads, kv_heads, tokens = 4, 9, 3, 8

# %% [markdown]
# ## Dividing what does not divide
#
# Nine heads on four ranks: everybody gets two, and the one that is left over goes to the first rank. In integers that
# is one line. An implementation that remembers "59 heads on 2 ranks, so 29 on mine" as a ratio and multiplies later
# has a floating-point number in its way.
#
# **Question.** What is `int(29 * (59 / 29))`?

# %%
share, left_over = divmod(heads, ranks)
print("heads by rank:", [share + (rank < left_over) for rank in range(ranks)])
print("59 heads, by way of a ratio:", int(29 * (59 / 29)))

# %% [markdown]
# ## Query heads that share a kv head
#
# With grouped-query attention (GQA) there are fewer kv heads than query heads, and query head $i$ uses kv head
#
# $$\kappa(i) = \left\lfloor \frac{i}{H_q / H_{kv}} \right\rfloor.$$
#
# So kv heads are not divided for themselves. A rank gets query heads, a run of them, and *therefore* needs certain kv
# heads, which are a run again.
#
# **Question.** The four ranks have the query heads 0-2, 3-4, 5-6 and 7-8, and three query heads share each kv head.
# Which rank needs two kv heads?

# %%
plan = make_plan(ranks=ranks, heads=heads, kv_heads=kv_heads, tokens=tokens, policy="balanced")
print(plan)

# %% [markdown]
# Somebody who divides the kv heads for themselves, 1, 1, 1 and 0, leaves rank 3 with two query heads and nothing to
# attend to, and gives rank 2 the wrong one for its head 5.
#
# Here is the same plan as a picture, with the bytes that one attention moves (16 elements of 2 bytes in each vector).
#
# **Question.** Kv heads 1 and 2 are needed by two ranks each. How can one draw that? And what does it cost?


# %%
def drawn(plan):
    kinds = {
        "query heads": [plan.query_heads(rank) for rank in range(plan.ranks)],
        "kv heads": [plan.kv_heads_of(rank) for rank in range(plan.ranks)],
    }
    return [plan.tokens_of(rank) for rank in range(plan.ranks)], kinds


draw_exchange(*drawn(plan), plan.bytes(batch=1, head_dim=16, dtype=torch.bfloat16))

# %% [markdown]
# A head with two owners is drawn in two stripes, and its vectors go to both of them. That is *replication*.
#
# ## Fewer kv heads than ranks
#
# Replication is also the answer where there are fewer kv heads than ranks, which many implementations refuse. With
# $r = \max(1, P / H_{kv})$ copies of each kv head and $g = H_{kv} / H_q$, each rank sends
#
# $$(2 + 2 r g) \, \frac{N H_q D}{P} \, \frac{P - 1}{P}$$
#
# elements for each row of the batch, in one forward pass, if all shares are equal: query and output once, key and value
# $r$ times.
#
# **Question.** Eight query heads, two kv heads, four ranks: how many owners has each kv head?

# %%
few = make_plan(ranks=4, heads=8, kv_heads=2, tokens=tokens)
draw_layouts(*drawn(few))

# %% [markdown]
# ## The gradient of a copy
#
# If one head went to two ranks, both send a gradient back, and the rank whose tokens they are adds them up. A copy that
# is forgotten here, or an average in the place of the sum, would train a little worse and never raise.
#
# **Question.** The plan is the first one again. The loss of rank $s$ is $(s + 1)$ times the sum of the kv heads that it
# received. What is the gradient of each of the three kv heads?


# %%
def of_copies():
    key = torch.zeros(1, len(plan.tokens_of(dist.get_rank())), kv_heads, 1, requires_grad=True)
    received = sequence_to_heads(key, plan, heads="kv")
    ((dist.get_rank() + 1) * received).sum().backward()
    return key.grad[0, :, :, 0].int()


gradient = torch.cat(VirtualWorld(ranks).run(of_copies))
owner = torch.arange(ranks).repeat_interleave(tokens // ranks)[:, None].expand(tokens, kv_heads)
draw_tiles({"gradient": (gradient, owner)}, row="token", column="kv head", owner="on rank")

# %% [markdown]
# Head 0 was on rank 0 only: 1. Head 1 was on ranks 1 and 2: 2 + 3. Head 2 was on ranks 2 and 3: 3 + 4. Every rank finds
# these sums for its own tokens.
#
# ## Which division?
#
# There is a choice: divide query heads as evenly as can be ("balanced"), or whole groups that share a kv head
# ("groups"), so that no kv head travels twice. The first is good for computing, since all wait for the rank with most
# heads; the second for sending. "auto" takes the one whose fullest rank has fewer heads, and among equals the one whose
# busiest rank sends less.
#
# **Question.** For 9 query heads "auto" takes the groups, for 12 the balanced division, both with 3 kv heads on 4
# ranks. Why?

# %%
print("heads  policy    query heads  owners of kv heads  bytes")
for count in (9, 12):
    for policy in ("balanced", "groups"):
        option = make_plan(ranks=4, heads=count, kv_heads=3, tokens=tokens, policy=policy)
        copies = sum(len(option.kv_heads_of(rank)) for rank in range(4))
        sent = option.bytes(batch=1, head_dim=16, dtype=torch.bfloat16).sum()
        print(f"{count:5}  {policy:8}  {option.heads_by_rank!s:11}  {copies:18}  {sent:5}")

# %% [markdown]
# With 9 heads, both have three heads on the fullest rank, and groups send less. With 12 heads groups would put four on
# three ranks, and nothing on the last: a third more time for attention.
#
# A rank without heads is not idle all the time. It has its tokens, for which it does everything else, and it takes part
# in every exchange, forward and backward: if it did not, the others would wait for it.
#
# ## Is it right?
#
# Three plans with different shares, one of them with a rank without heads, another with two copies of each kv head.
# Each result and each gradient is compared with the formula in float64, and the bytes with those of the plan.


# %%
def attention(plan, query, key, value):
    own = plan.tokens_of(dist.get_rank())
    query, key, value = (tensor[:, own.start : own.stop] for tensor in (query, key, value))
    return DistributedAttention(plan=plan)(query, key, value, is_causal=True)


def on_ranks(plan, *qkv):
    """The output of all ranks, and the bytes that they sent."""
    world = VirtualWorld(plan.ranks, autograd="joint")
    return torch.cat(world.run(attention, plan, *qkv), dim=1), world.bytes


# %% [markdown]
# **Question.** Which bound would you ask for, if every rank computes whole heads, from the same numbers as one device?

# %%
groups = make_plan(ranks=4, heads=9, kv_heads=3, tokens=tokens, policy="groups")
worst = {}
for name, chosen in {"balanced": plan, "groups": groups, "two copies": few}.items():
    sizes = (chosen.heads, chosen.kv_heads, chosen.kv_heads)
    qkv = [torch.randn(2, tokens, count, 16, dtype=torch.float64, requires_grad=True) for count in sizes]
    (output, sent), whole = on_ranks(chosen, *qkv), plain_attention(*qkv, is_causal=True)
    assert (sent == chosen.bytes(batch=2, head_dim=16, dtype=torch.float64)).all()
    ours, expected = ([x, *torch.autograd.grad(x.square().sum(), qkv)] for x in (output, whole))
    worst[name] = max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))
print({name: distance < 1e-12 for name, distance in worst.items()})

# %% [markdown]
# ## What cannot be divided
#
# Query heads that share kv heads unequally have no meaning that everybody agrees on.
#
# **Question.** Nine query heads and four kv heads: what could one change?

# %%
try:
    make_plan(ranks=4, heads=9, kv_heads=4, tokens=tokens)
except SeqparError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## What this notebook claims, checked

# %%
assert int(29 * (59 / 29)) == 58 and plan.heads_by_rank == (3, 2, 2, 2)
assert [list(plan.kv_heads_of(rank)) for rank in range(ranks)] == [[0], [1], [1, 2], [2]]
assert [list(few.kv_heads_of(rank)) for rank in range(4)] == [[0], [0], [1], [1]]
elements = few.bytes(batch=1, head_dim=16, dtype=torch.bfloat16).sum(axis=1) // 2
assert (elements == (2 + 2 * 2 * (2 / 8)) * (tokens * 8 * 16 / 4) * (3 / 4)).all()
assert gradient.tolist() == [[1, 5, 7]] * tokens
for count, shares in {9: (3, 3, 3, 0), 12: (3, 3, 3, 3)}.items():
    assert make_plan(ranks=4, heads=count, kv_heads=3, tokens=tokens).heads_by_rank == shares
assert max(worst.values()) < 1e-12

# %% [markdown]
# ## Two puzzles
#
# **1.** Fourteen query heads, two kv heads, four ranks, balanced: 4, 4, 3, 3. Which rank needs both kv heads, and what
# would go wrong if it handed its four query heads and two kv heads to a GQA kernel?
#
# <details><summary>Answer</summary>
#
# Seven query heads share a kv head. Rank 1 has the heads 4 to 7: three of them use kv head 0 and one uses kv head 1. A
# kernel that gets four query heads and two kv heads takes two and two, and gives head 6 the wrong one, without a word.
# So on such a rank each query head first gets a kv head of its own, a copy in its memory that does not travel.
#
# </details>
#
# **2.** Three query heads on four ranks. Is the fourth rank of any use?
#
# <details><summary>Answer</summary>
#
# Not for attention: no plan can give it a head. But the sequence is split over four ranks and not three, so that
# everything outside of attention, activations and memory above all, is a quarter on each. If attention is most of the
# work, it is better to split each head's sequence as well (a ring between groups of ranks), or to use three ranks.
#
# </details>
