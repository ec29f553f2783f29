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
# # Layouts and strides: a collective sends memory
#
# A tensor is two things: numbers that lie in memory in one order, and a *shape* with *strides* that says how to read
# them. PyTorch's operations go by the second. A collective goes by the first: it takes the memory from its first byte
# to its last, cuts it, and sends the pieces. Where the two disagree, nothing raises, and the numbers arrive in the
# wrong places. This notebook shows where they disagree.
#
# Three layouts are in use for attention; $d$, the vector of one head and token, comes last in all of them:
#
# | layout | used by | reads as |
# |---|---|---|
# | `b s h d` | most training code, flash kernels | batch, token, head |
# | `s b h d` | Megatron-LM | token, batch, head |
# | `b h s d` | PyTorch's `scaled_dot_product_attention` | batch, head, token |

# %%
import torch
import torch.distributed as dist
from einops import rearrange

from seqpar_ref import SeqparError, make_plan, sequence_to_heads
from simulator import BufferError, VirtualWorld
from simulator.draw_tiles import draw_tiles

batch, tokens, heads, ranks = 2, 3, 4, 2
numbers = [100 * b + 10 * s + h for b in range(batch) for s in range(tokens) for h in range(heads)]
shard = torch.tensor(numbers).view(batch, tokens, heads)  # 123 is batch row 1, token 2, head 3

# %% [markdown]
# ## The same numbers, three orders in memory
#
# Two ranks: heads 0 and 1 belong to rank 0, heads 2 and 3 to rank 1. The strips below are memory, from the first
# address to the last. All sizes differ, and there are two rows in the batch: with one row, or with as many tokens as
# heads, several of the mistakes below cannot be seen.
#
# **Question.** An all-to-all cuts the strip once, in the middle. In which layout does each rank get its own heads?

# %%
layouts = ("b s h d", "s b h d", "b h s d")
strips = {name: rearrange(shard, f"b s h -> {name[:5]}").flatten() for name in layouts}
owners = {name: strip % 10 // 2 for name, strip in strips.items()}  # the last digit is the head
panels = {name: (strips[name][None], owners[name][None]) for name in layouts}
draw_tiles(panels, row="", column="place in memory", owner="for rank", tile=0.33)

# %% [markdown]
# In none of them. With heads before tokens, `b h s d`, what goes to one rank lies in two pieces, one for each row of
# the batch; in the other two layouts in six. (With a batch of one row `b h s d` would do, which is why code that was
# tried with one row only can hide this for long.) So the numbers have to be moved before they are sent: that is the
# *pack* of the notebook before, and the reason why an exchange costs copies as well as bytes.
#
# ## A permute moves nothing
#
# `permute`, `transpose` and, where it can, einops return a *view*: the same memory, other strides. The stride of a dim
# says how many places further the next index lies.
#
# **Question.** The strides of `shard` are (12, 4, 1). What are they with heads first?

# %%
heads_first = rearrange(shard, "b s (to h) -> to h b s", to=ranks)
moved = heads_first.contiguous()
for name, tensor in {"shard": shard, "permuted": heads_first, "contiguous": moved}.items():
    print(f"{name:10}  shape {tuple(tensor.shape)!s:14} strides {tensor.stride()}")
print("same memory:", heads_first.data_ptr() == shard.data_ptr(), moved.data_ptr() == shard.data_ptr())

# %% [markdown]
# The permuted tensor *reads* as [receiver, head, batch, token], and its memory still is `b s h`. Only `contiguous()`
# has moved the numbers. This is the right thing to send:
#
# **Question.** Where do the two runs for the two receivers begin and end now?

# %%
memory = moved.flatten()
panel = memory[None], memory[None] % 10 // 2
draw_tiles({"packed": panel}, row="", column="place in memory", owner="for rank", tile=0.33)

# %% [markdown]
# ## The trap: `empty_like` keeps the strides
#
# The sender was careful. Now the receiver needs a buffer, and `torch.empty_like(x)` looks like the natural choice. But
# of a permuted tensor it makes a permuted buffer: the strides of `x`, not those of a contiguous tensor. The collective
# fills memory from the first byte to the last, and the strides read it in another order.
#
# Here is the real thing: PyTorch's gloo backend, with one process, which exchanges with itself. What arrives should
# be what was sent.
#
# **Question.** Will it raise, arrive in order, or arrive in another order?

# %%
sent = torch.tensor([[0, 10, 20, 30], [1, 11, 21, 31]]).T  # [token, head], a permuted view
buffer = torch.empty_like(sent)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_to_all_single(buffer, sent.contiguous())
dist.destroy_process_group()
panels = {"sent": (sent, sent % 10), "received": (buffer, buffer % 10)}
draw_tiles(panels, row="token", column="head", owner="head", columns=2)

# %% [markdown]
# No error, a right shape, all values present, and head 1 has moved into the tokens of head 0. Attention over such a
# tensor gives plausible numbers. `torch.empty(sent.shape)` would have been right.
#
# Virtual ranks refuse a strided buffer before anything is sent, in both roles.
#
# **Question.** What can the message say that helps: that something is wrong, or what to write instead?


# %%
def careless():
    rows = sent + 100 * dist.get_rank()
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows.contiguous())
    return received


try:
    VirtualWorld(ranks).run(careless)
except BufferError as error:
    print(f"BufferError: {error}")

# %% [markdown]
# ## Name the layout, and let one place do the moving
#
# `seqpar_ref` takes the layout as a name, packs from whatever strides the tensor has, and makes its buffers itself. So
# there is nothing to permute before, and nothing to make contiguous. Below, each rank passes its tokens three times: in
# three layouts, two of them as views.

# %%
plan = make_plan(ranks=ranks, heads=heads, tokens=ranks * tokens)


def three_ways():
    mine = (shard + 10 * tokens * dist.get_rank())[..., None].double()  # b s h d
    results = {}
    for name in layouts:
        view = rearrange(mine, f"b s h d -> {name}")
        results[name] = rearrange(sequence_to_heads(view, plan, layout=name), f"{name} -> b s h d")
    return results


# %% [markdown]
# **Question.** Which of the three results differ, once they are read in one order? And what does rank 1 have in row 1
# of the batch?

# %%
results = VirtualWorld(ranks).run(three_ways)
print([torch.equal(results[1][name], results[1]["b s h d"]) for name in layouts])
print(results[1]["b s h d"][1, :, :, 0].int().tolist())

# %% [markdown]
# Rank 1 has all six tokens of heads 2 and 3, in order. What if the name is wrong? The plan knows how many tokens and
# heads a rank has, so it can tell, as long as the numbers differ.
#
# **Question.** The tensor is `b s h d`, the caller says `b h s d`. What is there to compare?


# %%
def misread():
    return sequence_to_heads(torch.zeros(batch, tokens, heads, 1), plan, layout="b h s d")


try:
    VirtualWorld(ranks).run(misread)
except SeqparError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## What this notebook claims, checked

# %%
pieces = {name: int((owner.diff() == 1).sum()) + int(owner[0]) for name, owner in owners.items()}
assert pieces == {"b s h d": 6, "s b h d": 6, "b h s d": 2}  # of rank 1
assert shard.stride() == (12, 4, 1) and heads_first.stride() == (2, 1, 12, 4)
assert memory.tolist()[:12] == [h + 10 * s + 100 * b for h in (0, 1) for b in (0, 1) for s in (0, 1, 2)]
assert buffer.shape == sent.shape and not torch.equal(buffer, sent)
assert buffer.tolist() == [[0, 20], [1, 21], [10, 30], [11, 31]]
assert sorted(buffer.flatten().tolist()) == sorted(sent.flatten().tolist())
whole = 10 * torch.arange(ranks * tokens)[:, None] + torch.arange(heads)
for rank, by_layout in enumerate(results):
    for result in by_layout.values():
        assert torch.equal(result[1, :, :, 0], 100.0 + whole[:, 2 * rank : 2 * rank + 2])

# %% [markdown]
# ## Two puzzles
#
# **1.** Four tokens on each rank and four heads. The tensor is `b s h d`, the caller says `b h s d`, and no check can
# tell. What does rank 1 of 2 get?
#
# <details><summary>Answer</summary>
#
# What it takes for heads are tokens. It gets tokens 2 and 3 of every rank, each with all four heads, and calls them
# heads 2 and 3 of eight tokens. The shape is right, and so are all values; only a comparison with one device shows it.
# That is why every test here has sizes that differ pairwise.
#
# </details>
#
# **2.** The buffer is made with `torch.empty_like(sent, memory_format=torch.contiguous_format)`. Right or wrong? And
# with `torch.zeros_like(sent)`, or `sent.clone()`?
#
# <details><summary>Answer</summary>
#
# The first is right: it says that the strides are not to be kept. The other two are the same trap again; all functions
# named `..._like`, and `clone`, keep the strides of a dense permuted tensor unless told otherwise.
# `sent.new_empty(sent.shape)` is right as well, because it is given a shape and nothing else.
#
# </details>
