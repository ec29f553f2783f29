"""Sequence-parallel attention in plain torch.distributed code. See `DistributedAttention`."""

from .attention import DistributedAttention
from .errors import SeqparError
from .exchange import heads_to_sequence, qkv_to_heads, sequence_to_heads
from .plan import Plan, make_plan
from .rotary import apply_rotary, position_ids_of

__all__ = [
    "DistributedAttention",
    "Plan",
    "SeqparError",
    "apply_rotary",
    "heads_to_sequence",
    "make_plan",
    "position_ids_of",
    "qkv_to_heads",
    "sequence_to_heads",
]
