"""Sequence-parallel attention in plain torch.distributed code. See `DistributedAttention`."""

from .attention import DistributedAttention
from .errors import SeqparError
from .exchange import heads_to_sequence, qkv_to_heads, sequence_to_heads
from .plan import Plan, make_plan
from .rotary import apply_rotary

__all__ = [
    "DistributedAttention",
    "Plan",
    "SeqparError",
    "apply_rotary",
    "heads_to_sequence",
    "make_plan",
    "qkv_to_heads",
    "sequence_to_heads",
]
