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
# # Communication behind computation
#
# An exchange takes time in which a device could compute. So an exchange comes in two halves: *start* packs the
# tensor and issues the collective, *finish* waits for it and unpacks. What stands between the two is computed while
# the bytes travel.
#
# This notebook looks at timelines. They are not measured: a `VirtualWorld` with a *cluster* keeps virtual time on a
# model of the hardware, here two devices on PCIe. Every operation and every transfer gets the time that the model
# says, so the same program gives the same timeline on any machine.

# %%
import torch
import torch.distributed as dist

from seqpar_ref import UlyssesBlock, make_plan, sequence_to_heads, start_sequence_to_heads
from seqpar_ref.group import TorchGroup, group_of
from simulator import VirtualWorld

plan = make_plan(ranks=2, heads=16, tokens=1024)
world = VirtualWorld(2, cluster="pcie-node")

# %% [markdown]
# ## Start and finish
#
# Two programs. Both exchange a shard and multiply two matrices that have nothing to do with it. In the first the
# product comes after the exchange, in the second between its halves.


# %%
def operands():
    torch.manual_seed(dist.get_rank())
    return torch.randn(1, 512, 16, 64), torch.randn(512, 1024), torch.randn(1024, 1024)


def one_after_the_other():
    shard, x, weight = operands()
    return sequence_to_heads(shard, plan), x @ weight


# %%
def one_behind_the_other():
    shard, x, weight = operands()
    pending = start_sequence_to_heads(shard, plan)
    product = x @ weight
    return pending.finish(), product


# %% [markdown]
# **Question.** In the model the collective takes 51 µs and the product 71 µs. How much sooner is the second program
# over?

# %%
apart = world.run(one_after_the_other)
microseconds_apart = world.trace.seconds * 1e6
together = world.run(one_behind_the_other)
microseconds_together = world.trace.seconds * 1e6
print(f"{microseconds_apart:.0f} µs and {microseconds_together:.0f} µs")

# %% [markdown]
# By 47 µs. The remaining 4 µs are hidden in the first program as well: a rank's own chunk does not travel, it is
# copied while the others do.
#
# **Question.** In the timeline of the second program, which blue bar lies above the orange one?

# %%
world.trace.draw()

# %% [markdown]
# ## The gradient travels the same way
#
# The gradient of an exchange is the exchange the other way. Autograd runs the nodes of the backward pass in the
# reverse order of their creation; the backward of finish is a start, and the backward of start is a finish. So what
# stood between the halves in the forward pass has its own backward pass between the halves of the gradient's
# exchange. Nothing has to be asked for.
#
# `UlyssesBlock(..., overlap="projections")` is attention with its four linear layers, in this order:
#
# ```text
# project q | start q | project k | start k | project v | start v | finish q k v | attention | start o | finish o
# ```
#
# To see the order in which things happen, the block gets a group that takes notes. A group is no more than a rank,
# a size and two collectives.

# %%
notes = []


def note(text):
    """Only rank 0 takes notes; the other one does the same."""
    if dist.get_rank() == 0:
        notes.append(text)


# %%
class NotedWork:
    def __init__(self, work, number):
        self.work, self.number = work, number

    def wait(self):
        note(f"finish {self.number}")
        return self.work.wait()


# %%
class NotingGroup(TorchGroup):
    def all_to_all_single(self, *buffers, async_op=False):
        number = sum(text.startswith("start") for text in notes)
        note(f"start {number}")
        return NotedWork(super().all_to_all_single(*buffers, async_op=async_op), number)


# %% [markdown]
# The weights take notes too, when their gradients are there: `dWo` is that of the output projection's weight.


# %%
def noted_step():
    small, mine = make_plan(ranks=2, heads=4, tokens=8), group_of(None)
    group = NotingGroup(mine.process_group, mine.rank, mine.size)
    block = UlyssesBlock(64, 4, plan=small, overlap="projections", group=group)
    for name, weight in block.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: note(f"dW{name[0]}"))
    output = block(torch.ones(1, 4, 64))
    note("backward:")
    output.sum().backward()


# %% [markdown]
# Exchanges 0 to 3 are q, k, v and the output. Exchanges 4 to 7 belong to the backward pass.
#
# **Question.** The gradient of the output leaves first, as number 4. What can be computed before it has arrived,
# and what can be computed behind the gradients of v, k and q?

# %%
VirtualWorld(2).run(noted_step)
forward, backward = ", ".join(notes).split(", backward:, ")
print(forward, backward, sep="\n")

# %% [markdown]
# Between `start 4` and `finish 4` stands `dWo`, the weight gradient of the output projection. `nn.Linear` computes
# its input gradient and its weight gradient in one step, and then nothing would be left to hide exchange 4; the
# block uses a linear layer that returns the input gradient first. Then the gradients of v, k and q leave, and the
# weight gradient of v is computed while those of k and q are still under way.
#
# ## What can be hidden at most
#
# Count the exchanges that have something behind them. In the forward pass q travels behind the projection of k, and
# k behind that of v; v and the output have nothing: 2 of 4. In the backward pass only the gradient of v, which
# comes first, has nothing: 3 of 4.
#
# There is a second way, which needs no projections. *Chunks* cut each rank's heads into C parts: while a rank attends
# with one, the next one comes and the one before returns. Only the first chunk's coming and the last one's return have
# nothing behind them: (C - 1)/C of the communication can be hidden.

# %%
ways = {"none": ("none", 1), "projections": ("projections", 1)}
ways |= {f"{chunks} chunks": ("chunks", chunks) for chunks in (2, 4, 8)}


def step(overlap, chunks):
    torch.manual_seed(0)
    block = UlyssesBlock(1024, 16, theta=None, plan=plan, overlap=overlap, chunks=chunks)
    x = torch.randn(1, 512, 1024, requires_grad=True)
    output = block(x, is_causal=True)
    output.sum().backward()
    return [output.detach(), x.grad, *(weight.grad for weight in block.parameters())]


# %% [markdown]
# *Exposed* is the time in which a rank communicates and computes nothing.
#
# **Question.** Eight chunks hide more than two. Which of them is over sooner?

# %%
results, traces = {}, {}
for name, way in ways.items():
    results[name] = world.run(step, *way)
    traces[name] = world.trace
    exposed = max(times.exposed for times in world.trace.by_rank())
    print(f"{name:>11}: {world.trace.seconds * 1e6:5.0f} µs, exposed {exposed * 1e6:3.0f} µs")

# %% [markdown]
# Each chunk needs collectives and attention calls of its own, and these have a cost however little they carry. More
# chunks hide more and cost more, so what is best depends on the sizes and the hardware. And these are times of a
# model: no GPU has confirmed them, and on processes that share two CPU cores with gloo far less was hidden (the
# page "Benchmarks" of the docs). `seqpar validate` measures it on the devices that you have.
#
# **Question.** Here is the plain order. In how many places does the blue lane of a rank stand still?

# %%
traces["none"].draw()

# %% [markdown]
# Twice in the forward pass, while q, k, v come and the output returns, and twice in the backward pass.
#
# **Question.** And with the projections? Two waits are left in the forward pass. Whose are they?

# %%
traces["projections"].draw()

# %% [markdown]
# Those of v and of the output, as counted above. The backward pass waits once, for the gradient of v.
#
# **Question.** In four chunks there are 16 exchanges. Which of them can still be seen to hold up a rank?

# %%
traces["4 chunks"].draw()

# %% [markdown]
# The last chunk's return, forward and backward. The first chunk's coming can be seen in the forward pass alone, and not
# all of it: the next chunk is packed meanwhile.
#
# ## The same bits
#
# An order of calls changes no value. In every way above, output and gradients are those of the plain order to the
# last bit.
#
# ## What this notebook claims, checked


# %%
def same(one, other):
    return all(torch.equal(a, b) for rank in (0, 1) for a, b in zip(one[rank], other[rank], strict=True))


def exposed(name):
    return max(times.exposed for times in traces[name].by_rank())


assert same(apart, together) and 46 < microseconds_apart - microseconds_together < 48
assert all(same(results["none"], result) for result in results.values())

# %%
assert forward == "start 0, start 1, start 2, finish 0, finish 1, finish 2, start 3, finish 3"
order = "start 4, dWo, finish 4, start 5, start 6, start 7, finish 5, dWv, finish 6, dWk, finish 7, dWq"
assert backward == order
assert exposed("none") > exposed("projections") > exposed("4 chunks") > exposed("8 chunks")
assert traces["2 chunks"].seconds < traces["8 chunks"].seconds
assert traces["projections"].seconds < traces["none"].seconds

# %% [markdown]
# ## Two puzzles
#
# **1.** A model computes q, k and v with one fused linear layer. What can `overlap="projections"` hide in its
# forward pass, and what can chunks?
#
# <details><summary>Answer</summary>
#
# All three are ready at the same moment, so there is no projection left to hide q and k behind: they can only
# travel while the next one is packed. Chunks do not need the projections; with C of them (C - 1)/C of the
# communication can still be hidden behind attention. That is why Hugging Face models, which hand over q, k and v
# together, take `register(chunks=...)`.
#
# </details>
#
# **2.** Eight query heads share 4 kv heads, on 4 ranks, and somebody asks for `chunks=4`. How much is hidden?
#
# <details><summary>Answer</summary>
#
# Nothing. A chunk holds whole groups of query heads that share a kv head, so that no sum is cut in two. Each rank
# has one kv head, which makes one chunk: `make_plan(ranks=4, heads=8, kv_heads=4, tokens=64).most_chunks` is 1, and
# (C - 1)/C is 0.
#
# </details>
