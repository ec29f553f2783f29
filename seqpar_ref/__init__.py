"""Sequence-parallel attention in plain torch.distributed code. See `DistributedAttention`."""

from .attention import DistributedAttention
from .block import UlyssesBlock
from .errors import SeqparError
from .exchange import (
    heads_to_sequence,
    qkv_to_heads,
    sequence_to_heads,
    start_heads_to_sequence,
    start_sequence_to_heads,
)
from .overlap import ChunkedAttention
from .plan import Plan, make_plan
from .rotary import apply_rotary, position_ids_of

__all__ = [
    "ChunkedAttention",
    "DistributedAttention",
    "Plan",
    "SeqparError",
    "UlyssesBlock",
    "apply_rotary",
    "heads_to_sequence",
    "make_plan",
    "position_ids_of",
    "qkv_to_heads",
    "sequence_to_heads",
    "start_heads_to_sequence",
    "start_sequence_to_heads",
]
