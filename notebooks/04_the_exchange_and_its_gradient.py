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
# # The exchange and its gradient
#
# The forward pass of an exchange is easy to test: look where the values are. Its backward pass is where the silent
# bugs live, since a wrong gradient still trains, a little worse. The rule itself is short. Let $x_r$ be the rows of
# rank $r$, cut into a chunk for each receiver, and $L$ the loss:
#
# $$y_s = \big\Vert_r \; x_r[\text{chunk } s] \qquad\Longrightarrow\qquad
# \frac{\partial L}{\partial x_r[\text{chunk } s]} = \frac{\partial L}{\partial y_s}[\text{chunk } r]$$
#
# Nothing is computed: what came from rank $r$ has a gradient that goes back to rank $r$. This notebook writes that
# down by hand, and then lets something else judge it.

# %%
import torch
import torch.distributed as dist

from seqpar_ref import DistributedAttention, heads_to_sequence, make_plan, sequence_to_heads
from seqpar_ref.local_attention import plain_attention
from simulator import VirtualWorld, collectives
from simulator.draw_tiles import draw_tiles

torch.manual_seed(0)
tokens, heads, ranks = (3, 2, 1), (2, 1, 1), 3  # tokens by rank before, heads by rank after
splits = [[t * h for h in heads] for t in tokens]  # rows from rank to rank
rows = [torch.randn(sum(row), dtype=torch.float64) for row in splits]

# %% [markdown]
# ## A collective has no gradient
#
# `dist.all_to_all_single` fills a buffer that is already there. Autograd sees a buffer that nothing was computed for.
#
# **Question.** Every rank's rows require a gradient. Does what it receives, and does anybody complain?


# %%
def plain(rank_rows):
    rank = dist.get_rank()
    receive = [row[rank] for row in splits]
    result = torch.empty(sum(receive), dtype=torch.float64)
    dist.all_to_all_single(result, rank_rows[rank], receive, splits[rank])
    return result.requires_grad


print(VirtualWorld(ranks).run(plain, [x.clone().requires_grad_() for x in rows]))

# %% [markdown]
# It does not, and nobody does. Everything before the exchange would stay untrained. Real backends behave in the same
# way, so a backward pass has to be written: it is the same collective, with the two lists of counts exchanged. (It
# calls `AllToAll` again instead of the bare collective, so that second derivatives work as well.)


# %%
class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mine, send, receive):
        ctx.counts = send, receive
        result = mine.new_empty(sum(receive))
        dist.all_to_all_single(result, mine.contiguous(), receive, send)
        return result

    @staticmethod
    def backward(ctx, gradient):
        send, receive = ctx.counts
        return AllToAll.apply(gradient, receive, send), None, None


# %% [markdown]
# ## Whose loss?
#
# On hardware every rank has an autograd graph of its own, and calls `backward()` on a loss of its own. Let the loss of
# rank $s$ be $(s + 1)$ times the sum of what it received.
#
# **Question.** Rank 0 keeps two heads of its three tokens and sends one head to each other rank. What are the
# gradients of its twelve rows, given that it never sees the other ranks' losses?


# %%
def step():
    rank = dist.get_rank()
    mine = rows[rank].clone().requires_grad_()
    result = AllToAll.apply(mine, splits[rank], [row[rank] for row in splits])
    ((rank + 1) * result).sum().backward()
    return mine.grad.int().tolist()


gradients = VirtualWorld(ranks).run(step)
owners = [[value - 1 for value in own] for own in gradients]
draw_tiles({"gradients": (gradients, owners)}, row="rank", column="row", owner="from the loss of rank")

# %% [markdown]
# Each row has the gradient of the loss of the rank that it went to. So what the ranks differentiate together is the
# **sum of all ranks' losses**, whether anybody has added them up or not. And since the way back is a collective, all
# ranks have to walk it: one rank that skips its `backward()` leaves the others waiting (notebook 08).
#
# ## The judge
#
# Is the hand-written pass right? Not because its author says so. In a *joint* world, what `run` returns is tied
# together by one autograd node, and the whole program of all ranks becomes one function of ordinary tensors. Its
# backward pass runs each rank's own backward, collectives included. `gradcheck` then moves every input a little, runs
# all ranks, and compares the change of every output with what the backward pass says.
#
# To see that the judge can say no, it gets a wrong one too: it divides by the number of ranks, as averaging does in
# data-parallel training. (The sine is there so that the function is not linear, and not all second derivatives are
# zero.)


# %%
class Averaging(AllToAll):
    @staticmethod
    def backward(ctx, gradient):
        return AllToAll.backward(ctx, gradient)[0] / ranks, None, None


def program(function, *all_rows):
    rank = dist.get_rank()
    return function.apply(all_rows[rank].sin(), splits[rank], [row[rank] for row in splits])


# %% [markdown]
# **Question.** Both run, and both give gradients of the right shape. Which one passes? And does `AllToAll` pass
# `gradgradcheck`, which judges the second derivatives in the same way?


# %%
def joint(function):
    """All ranks' results as one function of all ranks' rows."""
    return lambda *all_rows: tuple(VirtualWorld(ranks, autograd="joint").run(program, function, *all_rows))


inputs = [x.clone().requires_grad_() for x in rows]
verdicts = {
    "by hand": torch.autograd.gradcheck(joint(AllToAll), inputs, raise_exception=False),
    "averaging": torch.autograd.gradcheck(joint(Averaging), inputs, raise_exception=False),
    "by hand, second": torch.autograd.gradgradcheck(joint(AllToAll), inputs, raise_exception=False),
}
print(verdicts)

# %% [markdown]
# There is a second judge that needs no finite differences: `collectives.all_to_all`, the collective as a function of
# all ranks' tensors, which plain autograd differentiates. It has to agree to the last bit, since no sum is rounded.
#
# ## What goes back
#
# **Question.** On the way there rank 0 sends 3 rows of 8 bytes to rank 1 and gets 4 rows from it. And on the way back?

# %%
world = VirtualWorld(ranks, autograd="joint")
results = world.run(program, AllToAll, *inputs)
forward = world.bytes
by_hand = torch.autograd.grad([2 * y.sum() for y in results], inputs)
backward = world.bytes - forward  # a joint backward adds to the run that it belongs to
print("forward\n", forward, "\nbackward\n", backward, sep="")

# %% [markdown]
# The transpose. With equal shares the matrix is its own transpose, so nobody notices when the two lists of counts are
# not exchanged: see the second puzzle.
#
# ## The exchange of the package
#
# `sequence_to_heads` packs, exchanges and unpacks, `heads_to_sequence` does the opposite:
#
# $$A[B, S_P, H, D] \leftrightarrow A[B, S, H_P, D]$$
#
# Moving values without computing is a permutation, and the transpose of a permutation is its inverse.
#
# **Question.** So what should be the gradient of `sequence_to_heads`, and how equal will it be?

# %%
plan = make_plan(ranks=ranks, heads=sum(heads), tokens=tokens)


def inverse():
    shard = torch.randn(2, tokens[dist.get_rank()], sum(heads), 5, requires_grad=True)
    result = sequence_to_heads(shard, plan)
    upstream = torch.randn_like(result)
    (gradient,) = torch.autograd.grad(result, shard, upstream)
    return torch.equal(gradient, heads_to_sequence(upstream, plan))


print(VirtualWorld(ranks).run(inverse))

# %% [markdown]
# ## All of attention
#
# In a joint world the ranks' attention and one device's are two functions of the same three tensors. Each rank takes
# its tokens, the outputs are put together, and the backward pass starts from one gradient outside.


# %%
def attention(query, key, value):
    mine = slice(plan.tokens_of(dist.get_rank()).start, plan.tokens_of(dist.get_rank()).stop)
    return DistributedAttention(plan=plan)(query[:, mine], key[:, mine], value[:, mine], is_causal=True)


def on_ranks(*qkv):
    return torch.cat(VirtualWorld(ranks, autograd="joint").run(attention, *qkv), dim=1)


qkv = [torch.randn(2, sum(tokens), sum(heads), 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
split, whole = on_ranks(*qkv), plain_attention(*qkv, is_causal=True)

# %% [markdown]
# **Question.** The ranks compute in float64, and so does the single device, with the formula of the first notebook. How
# far apart may the output and the three gradients be? And if they are further apart: how would you find out whether
# the exchange or the attention in the middle is to blame?

# %%
upstream = torch.randn_like(whole)
ours = [split, *torch.autograd.grad(split, qkv, upstream)]
expected = [whole, *torch.autograd.grad(whole, qkv, upstream)]
distances = [(a - b).abs().max().item() for a, b in zip(ours, expected, strict=True)]
print("less than 1e-13 apart:", [distance < 1e-13 for distance in distances])

# %% [markdown]
# The exchange moves values and rounds nothing, so it can be judged by itself and exactly, as above. Only what is
# computed in the middle may differ, by rounding.
#
# ## What this notebook claims, checked

# %%
assert gradients == [[1] * 6 + [2] * 3 + [3] * 3, [1] * 4 + [2] * 2 + [3] * 2, [1, 1, 2, 3]]
assert verdicts == {"by hand": True, "averaging": False, "by hand, second": True}
pure = [2 * y.sum() for y in collectives.all_to_all([x.sin() for x in inputs], splits)]
for mine, judged in zip(by_hand, torch.autograd.grad(pure, inputs), strict=True):
    assert torch.equal(mine, judged)
assert (backward == forward.T).all() and (forward[0, 1], backward[0, 1]) == (24, 32)
assert all(VirtualWorld(ranks).run(inverse))
assert max(distances) < 1e-13
small = [x[:1, :, :, :2].detach().clone().requires_grad_() for x in qkv]
assert torch.autograd.gradcheck(on_ranks, small, fast_mode=True)

# %% [markdown]
# ## Two puzzles
#
# **1.** Three ranks hold 3, 2 and 1 tokens of one text. Each computes the mean of its own tokens' losses, calls
# `backward()`, and the weights' gradients are then averaged over the ranks, as data-parallel training does. Is that the
# gradient of the mean over all six tokens?
#
# <details><summary>Answer</summary>
#
# No. The average of the three means gives each token of rank 2 a weight of 1/3 and each of rank 0 a weight of 1/9;
# right would be 1/6 each. With equal shares it happens to be right, so once more equal sizes hide the mistake. What is
# always right: each rank divides the *sum* of its losses by the number of *all* tokens, and the weights' gradients are
# *summed* over the ranks.
#
# </details>
#
# **2.** In `backward` somebody writes `AllToAll.apply(gradient, send, receive)`, without exchanging the lists. All
# tests pass, with 8 heads on 4 ranks and 16 tokens. Why, and what happens on the sizes of this notebook?
#
# <details><summary>Answer</summary>
#
# With equal shares every entry of the matrix of counts is the same, and the two lists are equal: the mistake changes
# nothing. Here rank 1 has received 6 rows and so has 6 gradients, but its list of what to send sums to 8. The
# collective refuses, in the first backward pass. That is the good case: a mistake in *which* chunk goes where, with
# counts that fit, raises nothing, and needs the judge.
#
# </details>
