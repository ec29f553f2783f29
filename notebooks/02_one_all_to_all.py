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
# # What one all-to-all moves
#
# A text is too long for one device, so its tokens are split over several *ranks*. Norms, projections and MLPs look
# at one token at a time: a rank needs nothing from the others for them. Attention is different. It mixes all tokens,
# but it treats every *head* by itself (the notebook before this one shows both). So before attention the ranks swap:
# each gives up most of the heads of its tokens and receives all tokens of a few heads.
#
# $$A[B, S_P, H, D] \to A[B, S, H_P, D]$$
#
# The subscript $P$ marks the dimension that is split over the $P$ ranks. One collective does the swap: the
# *all-to-all*, in which every rank sends something else to every rank. This notebook takes it apart, first on plain
# tensors, then as a distributed program.

# %%
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from simulator import VirtualWorld, collectives
from simulator.draw import draw_bytes, draw_layouts
from simulator.draw_tiles import draw_tiles

tokens, heads, ranks = 6, 4, 3
token_ranges = [range(0, 3), range(3, 5), range(5, 6)]  # by rank, before
head_ranges = [range(0, 2), range(2, 3), range(3, 4)]  # by rank, after

# %% [markdown]
# ## Before
#
# Each value is its own address: the entry of token 4 and head 2 is 42. Batch and head dim are left out; they would
# only ride along.
#
# **Question.** Rank 1 holds tokens 3 and 4, with all four heads. Which numbers are those?

# %%
whole = 10 * torch.arange(tokens)[:, None] + torch.arange(heads)  # [token, head]
shards = [whole[held.start : held.stop] for held in token_ranges]
for rank, shard in enumerate(shards):
    print(f"rank {rank} holds {shard.tolist()}")

# %% [markdown]
# ## The whole change in one picture
#
# **Question.** The areas of the three ranks are 12, 8 and 4 tiles before. What are they after?

# %%
draw_layouts(token_ranges, {"heads": head_ranges})

# %% [markdown]
# ## Pack
#
# An all-to-all cuts each rank's rows into runs, one run for each receiver. So the rows for one receiver have to lie
# side by side, which means heads first. A matrix of counts says how long the runs are: rank $r$ sends
# (tokens of $r$) x (heads of $s$) rows to rank $s$.
#
# **Question.** Which of rank 0's twelve rows go to rank 1?

# %%
splits = [[len(held) * len(wanted) for wanted in head_ranges] for held in token_ranges]


def pack(shard):
    """[token, head] -> one row for each head and token, heads first."""
    return shard.T.reshape(-1, 1)


packed = [pack(shard).flatten().tolist() for shard in shards]
receivers = [[to for to in range(ranks) for _ in range(row[to])] for row in splits]
draw_tiles({"packed": (packed, receivers)}, row="rank", column="row of its buffer", owner="goes to rank")

# %% [markdown]
# ## Send
#
# `collectives.all_to_all` is the collective as a function of all ranks' tensors at once: no processes, nothing
# hidden. Receiver $s$ gets the chunks for $s$ in the order of their senders, $y_s = \Vert_r \, x_r[\text{chunk } s]$.
#
# **Question.** Rank 2 gets head 3 of all six tokens. From whom does it get three rows, from whom one?

# %%
received = collectives.all_to_all([pack(shard) for shard in shards], splits)
senders = [[sender for sender in range(ranks) for _ in range(splits[sender][rank])] for rank in range(ranks)]
values = [rows.flatten().tolist() for rows in received]
draw_tiles({"received": (values, senders)}, row="rank", column="row of its buffer", owner="came from rank")

# %% [markdown]
# ## Unpack
#
# Rank 0 has two heads, so each chunk that it received is a small [head, token] matrix of its own. The chunks have
# to be put side by side along the tokens; simply reshaping the received rows would mix heads and tokens.
#
# **Question.** What is the first row of rank 0's result, and what is its last?


# %%
def unpack(rows, rank):
    """The chunks of all senders -> [token, head of this rank], tokens in global order."""
    chunks = rows.flatten().split([splits[sender][rank] for sender in range(ranks)])
    return torch.cat([chunk.view(len(head_ranges[rank]), -1) for chunk in chunks], dim=1).T


swapped = [unpack(rows, rank) for rank, rows in enumerate(received)]
print(swapped[0].tolist())

# %% [markdown]
# ## What it costs
#
# A rank keeps its own chunk, so the diagonal is zero. An entry here takes 8 bytes.
#
# **Question.** Rank 0 has more tokens than rank 1, and yet they send the same. Why?

# %%
moved = torch.tensor(splits) * whole.element_size()
moved.fill_diagonal_(0)
draw_bytes(moved.numpy())

# %% [markdown]
# Rank 0 keeps two heads of its three tokens, rank 1 keeps one head of its two: each gives six entries away. With
# equal shares every rank sends $\frac{P-1}{P} \cdot \frac{S H D}{P}$ elements: the more ranks, the fewer on each,
# and of many ranks twice as many send half of it each. An all-gather, which would give every rank every token of every
# head, sends $(P-1) \frac{S H D}{P}$ from each rank: $P$ times as many.
#
# ## The same as a distributed program
#
# Now every rank runs a program of its own, and none sees another's tensors. This is ordinary `torch.distributed` code
# that runs as it is under torchrun; here a `VirtualWorld` runs it on three virtual ranks in this process.
#
# **Question.** Rank 2 sends 3 rows away. How many does it have to make room for?


# %%
def exchange():
    rank = dist.get_rank()
    receive_splits = [splits[sender][rank] for sender in range(ranks)]
    rows = torch.empty(sum(receive_splits), 1, dtype=whole.dtype)
    dist.all_to_all_single(rows, pack(shards[rank]), receive_splits, splits[rank])
    return unpack(rows, rank)


world = VirtualWorld(ranks)
results = world.run(exchange)
print("rows received, the own ones included:", [result.numel() for result in results])

# %% [markdown]
# The world has counted what was sent.
#
# **Question.** Does its count agree with the picture above?

# %%
print(world.bytes)

# %% [markdown]
# ## Who makes the group
#
# A launcher starts the processes and tells each its rank; torchrun does it with environment variables. Then every
# process calls `dist.init_process_group(backend)` once, and all of them are the default group. (A `VirtualWorld` has
# done both when the program begins.) Where the ranks that share a sequence are only some of all, a program makes groups
# of them, and **every** rank takes part in making them: `dist.new_group`, or a device mesh, which makes all at once.
# A collective then names its group, and ranks are counted inside it.
#
# **Question.** Six ranks, two texts at a time, each text split over three. With whom does rank 4 exchange?


# %%
def two_texts():
    mesh = init_device_mesh("cpu", (2, ranks), mesh_dim_names=("data", "sequence"))
    group = mesh["sequence"].get_group()
    mine, own = torch.zeros(ranks), torch.empty(ranks)
    dist.all_to_all_single(own, mine, group=group)
    return dist.get_process_group_ranks(group)


two = VirtualWorld(2 * ranks)
groups = two.run(two_texts)
print(groups[4])
print(two.bytes)

# %% [markdown]
# ## Backward
#
# Gradients go back the way the values came: rank $s$ returns to rank $r$ what it got from it, so the backward pass of
# an all-to-all is the all-to-all of the transposed counts. The function of all ranks' tensors is differentiable by
# plain autograd, which makes it the judge of any backward pass written by hand (notebook 04 does that).
#
# **Question.** The loss below weights every entry of rank 1's result with 5 and no other. Where is the gradient?

# %%
inputs = [pack(shard).double().requires_grad_() for shard in shards]
outputs = collectives.all_to_all(inputs, splits)
(5 * outputs[1].sum()).backward()
for rank, rows in enumerate(inputs):
    print(f"rank {rank}:", rows.grad.flatten().tolist())

# %% [markdown]
# ## What this notebook claims, checked

# %%
for rank, held in enumerate(head_ranges):
    assert torch.equal(swapped[rank], whole[:, held.start : held.stop])
    assert torch.equal(results[rank], swapped[rank])
assert [swapped[rank].numel() for rank in range(ranks)] == [12, 6, 6]
assert (world.bytes == moved.numpy()).all()
assert packed[0][6:9] == [2, 12, 22] and receivers[0][6:9] == [1, 1, 1] and senders[2] == [0, 0, 0, 1, 1, 2]
assert groups == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
assert not two.bytes[:3, 3:].any() and not two.bytes[3:, :3].any()
assert moved.sum(dim=1).tolist() == [48, 48, 24] and moved.sum(dim=0).tolist() == [48, 32, 40]
for rank, rows in enumerate(inputs):
    goes_to_rank_1 = 2 * len(token_ranges[rank]) + torch.arange(len(token_ranges[rank]))
    assert rows.grad.flatten().nonzero().flatten().tolist() == goes_to_rank_1.tolist()

# %% [markdown]
# ## Two puzzles
#
# **1.** Eight tokens on 4 ranks, two each, and 9 heads, owned 3, 2, 2, 2 during attention. Who sends the fewest
# elements, and who receives the most?
#
# <details><summary>Answer</summary>
#
# Every rank holds 2 tokens of 9 heads and keeps its own heads of them. Rank 0 keeps 2 x 3 and sends 12; the others
# keep 2 x 2 and send 14: rank 0 sends the fewest. It also receives the most, 6 tokens of 3 heads, 18, where the
# others receive 12.
#
# </details>
#
# **2.** Somebody packs with `shard.reshape(-1, 1)`, tokens first, and changes nothing else. No count changes, so
# nothing raises. Two tokens on 2 ranks, one each, and 2 heads, one each: what goes wrong? And with two tokens on
# each rank?
#
# <details><summary>Answer</summary>
#
# With one token on each rank nothing goes wrong, since tokens first and heads first are then the same order: a test
# with such sizes cannot fail. With two tokens each, rank 0's rows are 0, 1, 10, 11 instead of 0, 10, 1, 11. The first
# two go to rank 0 and the others to rank 1, which gets 10 and 11: token 1 with both heads, where it should have got
# head 1 of both tokens. The shapes fit, and all values are legal.
#
# </details>
