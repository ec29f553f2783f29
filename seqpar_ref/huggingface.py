"""Sequence-parallel attention for Hugging Face models, registered with transformers in two lines:

```python
from seqpar_ref.huggingface import register
register()

model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="seqpar")
logits = model(token_ids[:, mine], position_ids=positions[:, mine], use_cache=False).logits
```

Each rank gives the model its own tokens and their *global* position ids; the model stays as it was. The same
lines run under torchrun and on virtual ranks, forward and backward.

transformers hands an attention that registered no mask function the mask None, also where the caller passed
padding. So a mask function is registered too, and whatever would change the result is refused by name
(`huggingface_refusals.py`):

| refused | error |
|---|---|
| padding | `PaddingError` |
| restarted, packed or local position ids | `PositionIdsError` |
| a sliding window, chunks | `SlidingWindowError` |
| softcap | `SoftcapError` |
| sinks | `SinksError` |
| a filled cache | `FilledCacheError` |
| dropout | `DropoutError` |
| attention that is not causal | `NotCausalError` |
| a mask or mask function of one's own | `CustomMaskError` |
| whatever else transformers may pass | `UnknownArgumentError` |
| a model that computes attention by itself | `NoAttentionInterfaceError` |

The last row is what `register` cannot reach: models that do not use transformers' AttentionInterface, such as
Bloom, Falcon, GPT-J and MPT. They fail where they use the mask.

Two things an attention cannot see. A model that is given `labels` shifts them inside its shard and loses the
target of the shard's last token: shift them over all tokens first and pass `shift_labels` as well. And the
loss that a model returns is the mean over the rank's own tokens.

Source: `AttentionInterface` and `AttentionMaskInterface` of transformers.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from .attention import DistributedAttention
from .checks import no_type_check
from .errors import ArgumentError, SeqparError
from .group import GroupLike, group_of
from .huggingface_refusals import MaskMarker, check_call, check_mask, first_position, not_global
from .overlap import ChunkedAttention
from .plan import Plan, check_chunks


class TransformersMissingError(SeqparError, ImportError):
    """transformers is not installed."""


@no_type_check
def register(
    group: GroupLike = None, plan: Plan | None = None, *, chunks: int = 1, name: str = "seqpar"
) -> None:
    """Make `attn_implementation=name` mean sequence-parallel attention in every transformers model.

    Without a plan each attention call first exchanges the ranks' positions, two integers (16 bytes) to each
    other rank, beside the record that `DistributedAttention` exchanges. With a plan every rank checks its
    positions alone, and nothing but the plan's bytes is sent.

    Args:
        group: the ranks that share the sequence; None for all of them.
        plan: who owns which tokens and heads; with it, models of other head counts are refused.
        chunks: heads travel in that many chunks, behind the attention of other chunks (see `overlap.py`).
        name: the name to register. A second call with the same name replaces the first.

    Raises:
        TransformersMissingError: transformers is not installed.
        ArgumentError: the name is no string, is empty, or is one of transformers' own; no plan.
        PlanError: `chunks` is no integer of at least 1.
        GroupError: the group is neither a process group nor a device mesh.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise TransformersMissingError(
            "transformers is not installed.", "Install it with: pip install -e '.[hf]'   (in seqpar's folder)"
        ) from error
    if not isinstance(name, str) or not name or "|" in name:
        raise ArgumentError(f"name is {name!r}.", 'Use a name such as "seqpar".')
    present = AttentionInterface().get(name)
    if name == "eager" or not (present is None or isinstance(present, _RegisteredAttention)):
        raise ArgumentError(
            f"{name!r} is a name of transformers' own attention.", 'Use another, such as "seqpar".'
        )
    AttentionInterface.register(name, _RegisteredAttention(group, plan, chunks))
    AttentionMaskInterface.register(name, check_mask)


class _RegisteredAttention:
    """The function that transformers calls in every layer; it keeps nothing between calls."""

    def __init__(self, group: GroupLike, plan: Plan | None, chunks: int) -> None:
        self.group = group
        self.plan = plan
        self.attention = (
            DistributedAttention(group=group, layout="b h s d", plan=plan)
            if check_chunks(chunks) == 1
            else ChunkedAttention(group=group, layout="b h s d", plan=plan, chunks=chunks)
        )

    @no_type_check
    def __call__(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch heads seq_local dim"],
        key: Float[Tensor, "batch kv_heads seq_local dim"],
        value: Float[Tensor, "batch kv_heads seq_local value_dim"],
        attention_mask: MaskMarker | Tensor | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> tuple[Float[Tensor, "batch seq_local heads value_dim"], None]:
        check_call(module, query.shape[2], key.shape[2], attention_mask, is_causal, dropout, others)
        self._check_positions(position_ids, query)
        output = self.attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2), None

    def _check_positions(self, position_ids: Tensor | None, query: Tensor) -> None:
        """The rank's first token must follow the last one of the ranks before it."""
        tokens = query.shape[2]
        first = first_position(position_ids, query.shape[0], tokens)
        group = group_of(self.group)
        if self.plan is not None:
            mine = self.plan.tokens_of(group.rank) if group.rank < self.plan.ranks else range(0)
            if tokens and len(mine) == tokens and first != mine.start:
                raise not_global({group.rank: first}, {group.rank: mine.start})
            return
        records = group.all_gather_integers([first, tokens], query.device)
        firsts = {rank: record[0] for rank, record in enumerate(records) if record[1]}
        expected = {rank: sum(record[1] for record in records[:rank]) for rank in firsts}
        if firsts != expected:
            raise not_global(firsts, expected)
