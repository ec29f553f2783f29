r"""An attention block over a split sequence: projections, rotary, attention, output projection.

    x  [B, S_P, width]  ->  q, k, v  [B, S_P, H, D]  ->  attention  ->  [B, S_P, H D]  ->  [B, S_P, width]

It shows what stands where when communication runs behind computation; see `overlap.py` for the two kinds.

Source: the block of Vaswani et al., 2017, arXiv:1706.03762; rotary as in Su et al., 2021, arXiv:2104.09864.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .agreement import Record, agree, gradients
from .attention import DistributedAttention
from .checks import DTYPES, check_choice, integers, needs_gradient, no_type_check
from .errors import PlanError, ShapeError, TensorError
from .graphs import outside_graphs
from .group import GroupLike, check_size, group_of
from .late_weight import LateLinear
from .overlap import behind_projections, in_chunks
from .plan import Plan, check_chunks
from .rotary import apply_rotary, position_ids_of
from .shapes import LAYOUTS
from .shards import check_shares

Overlap = Literal["none", "projections", "chunks"]


@no_type_check
class UlyssesBlock(nn.Module):
    """Self-attention with its projections. Whatever the overlap, the result is the same to the bit.

    Args:
        width: of a token's vector, before and behind.
        heads: query heads.
        kv_heads: kv heads, a divisor of `heads`; as many as query heads unless given.
        head_dim: elements of one head's vector; `width // heads` unless given.
        bias: the four projections have one.
        theta: base of the rotary angles (see `rotary.py`); None for no rotary.
        local_attention: as for `DistributedAttention`.
        group: process group or one-axis device mesh of the ranks that share the sequence; the world unless given.
        layout: of q, k and v: "b s h d", "s b h d" or "b h s d". With "s b h d" a token stands first in x, too.
        plan: who owns what. Without one the ranks exchange a record of 72 bytes in every call.
        overlap: "none"; "projections": each of q, k and v travels while the next one is projected, and the
            output's gradient while the output projection's weight gradient is computed; "chunks": heads travel
            in chunks behind the attention of other chunks.
        chunks: how many, for "chunks".
        device, dtype: of the parameters.

    The parameters are those of four `nn.Linear`: query [heads * head_dim, width], key and value
    [kv_heads * head_dim, width], output [width, heads * head_dim]. Each rank has all of them, and its
    gradients are those of its own tokens: sum them over the group, as data parallelism does.

    With an overlap the output projection's weight gradient is computed by `LateLinear`, where that projection is an
    `nn.Linear` without hooks. Anything else in its place (an adapter, a pruned layer) is called like the other three,
    and nothing runs while the output's gradient travels. Under autocast `LateLinear` sums the weight gradients of
    several calls in the parameters' dtype, not in the half type.

    Raises:
        PlanError, LayoutError, ArgumentError, GroupError: sizes that do not belong together, an unknown layout or
            overlap.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        theta: float | None = 10000.0,
        local_attention: Callable[..., Tensor] | None = None,
        group: GroupLike = None,
        layout: str = "b s h d",
        plan: Plan | None = None,
        overlap: Overlap = "none",
        chunks: int = 4,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        width, heads, kv_heads = integers("width, heads, kv_heads", (width, heads, kv_heads))
        if head_dim is None and width % max(heads, 1):
            raise PlanError(
                f"width {width} has no equal parts for {heads} heads.", "Give head_dim, or another width."
            )
        (head_dim,) = integers("head_dim", (width // max(heads, 1) if head_dim is None else head_dim,))
        Plan((0,), (heads,), kv_heads)  # refuses heads that do not belong together
        check_choice("overlap", overlap, get_args(Overlap))
        self.attention = DistributedAttention(local_attention, group, layout=layout, plan=plan)
        if plan is not None and (plan.heads, plan.kv_heads) != (heads, kv_heads):
            raise PlanError(
                f"the plan is for {plan.heads} and {plan.kv_heads} heads, the block has {heads} and {kv_heads}.",
                "Make the plan with the block's heads.",
            )
        self.heads, self.kv_heads, self.head_dim, self.theta = heads, kv_heads, head_dim, theta
        self.overlap, self.chunks = overlap, check_chunks(chunks)
        linear = partial(nn.Linear, bias=bias, device=device, dtype=dtype)
        self.query = linear(width, heads * head_dim)
        self.key = linear(width, kv_heads * head_dim)
        self.value = linear(width, kv_heads * head_dim)
        self.output = linear(heads * head_dim, width)

    @outside_graphs
    def forward(
        self,
        x: Float[Tensor, "_ _ width"],
        position_ids: Int[Tensor, "*batch seq_local"] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Float[Tensor, "_ _ width"]:
        """The block's output for this rank's tokens.

        Args:
            x: this rank's tokens, `[batch, seq_local, width]`; `[seq_local, batch, width]` with "s b h d".
            position_ids: their global positions; those of the plan unless given.
            args, kwargs: for the local attention, such as `is_causal=True`.

        Raises:
            SeqparError: one of its classes; what a rank can see alone before it communicates.
        """
        self._check(x)
        group = group_of(self.attention.group)
        query = self._projected(x, self.query)
        sources = (x, query, *self.key.parameters(), *self.value.parameters())
        attend = self.attention.own_attention(query, args, kwargs)
        plan = self.attention.plan
        if plan is None:
            layout, needed = LAYOUTS[self.attention.layout], gradients(sources, attend.others)
            plan = agree(group, Record.of(query, layout, self.kv_heads, self.head_dim, needed), x.device)
        check_size(group, plan.ranks)
        attend.check(plan)
        self._check_tokens(query, plan.tokens_by_rank[group.rank], group.rank)
        if self.theta is not None and position_ids is None:
            position_ids = position_ids_of(plan, group.rank, x.device)
        projections = (
            lambda: self._rotated(query, position_ids),
            lambda: self._rotated(self._projected(x, self.key), position_ids),
            lambda: self._projected(x, self.value),
        )
        if self.overlap == "projections":
            pending = behind_projections(projections, attend, plan, group, needs_gradient(*sources))
        else:
            query, key, value = (project() for project in projections)
            if self.overlap == "none":
                check_shares(query, key, value, plan, group, self.attention.layout)
                result = self.attention.exchange_and_attend(query, key, value, plan, group, attend)
                return self.output(self._merged(result))
            pending = in_chunks(query, key, value, attend, plan, group, self.chunks)
        late = _is_plain(self.output)
        output = LateLinear(*self._output_parameters(query.dtype)) if late else self.output
        return output(self._merged(pending.finish()))

    def _projected(self, x: Tensor, projection: nn.Linear) -> Tensor:
        """All heads of this rank's tokens, in the layout."""
        heads = projection(x).unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2) if self.attention.layout == "b h s d" else heads

    def _rotated(self, heads: Tensor, position_ids: Tensor | None) -> Tensor:
        if self.theta is None:
            return heads
        return apply_rotary(heads, position_ids, theta=self.theta, layout=self.attention.layout)

    def _merged(self, heads: Tensor) -> Tensor:
        """Heads and dim as one last dim, tokens where they are in x."""
        heads = heads.transpose(1, 2) if self.attention.layout == "b h s d" else heads
        return heads.flatten(2)

    def _output_parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the output projection, under autocast in the dtype of what comes."""
        weight, bias = self.output.weight, self.output.bias
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    @no_type_check
    def _check(self, x: Tensor) -> None:
        """Refuse an input that is none.

        Raises:
            TensorError, ShapeError: with what was found.
        """
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            found = f"a {x.dtype} tensor" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise TensorError(f"x is {found}.", "Pass a floating-point tensor, [batch, seq_local, width].")
        width = self.query.in_features
        if x.ndim != 3 or x.shape[2] != width:
            raise ShapeError(
                f"x is {tuple(x.shape)}; the block has width {width}.",
                f"Pass this rank's tokens, [batch, seq_local, {width}].",
            )

    def _check_tokens(self, query: Tensor, tokens: int, rank: int) -> None:
        found = query.shape[LAYOUTS[self.attention.layout].sequence]
        if found != tokens:
            raise ShapeError(
                f"x has {found} tokens on rank {rank}; the plan says {tokens}.",
                "Pass this rank's tokens of the plan, or a plan made for them.",
            )

    def extra_repr(self) -> str:
        """What print(module) shows beside the projections."""
        return f"overlap={self.overlap!r}" + (f", chunks={self.chunks}" if self.overlap == "chunks" else "")


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling it is the product with its weight, and its bias, and nothing else."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return type(layer) is nn.Linear and not any(hooks) and "forward" not in vars(layer)
