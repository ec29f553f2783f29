"""What sequence-parallel attention refuses to do for a Hugging Face model, and how it notices.

transformers tells an attention what a layer wants in two places: when it asks for a mask, once for each
forward pass (`check_mask`), and when it calls the attention in each layer (`check_call`, `first_position`).

Source: what transformers 5 passes to an attention (`masking_utils.py`, `AttentionInterface`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import no_type_check
from .errors import SeqparError, UnsupportedError

# What transformers passes along and attention need not know.
WITHOUT_EFFECT = {
    "use_cache",
    "cache_position",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",
    "shift_labels",
    "return_dict",
    "logits_to_keep",
}


class PaddingError(UnsupportedError):
    """A padding mask that hides tokens, or one that is not over the rank's own tokens."""


class PositionIdsError(SeqparError, ValueError):
    """Position ids that are not the global positions of the rank's tokens."""


class SlidingWindowError(UnsupportedError):
    """A layer that attends to a window or a chunk only."""


class SoftcapError(UnsupportedError):
    """A layer that caps its scores."""


class SinksError(UnsupportedError):
    """A layer with attention sinks."""


class FilledCacheError(UnsupportedError):
    """More keys than queries: keys of earlier calls are in a cache, on this rank only."""


class DropoutError(UnsupportedError):
    """Dropout in attention."""


class NotCausalError(UnsupportedError):
    """A layer whose tokens attend to later tokens."""


class CustomMaskError(UnsupportedError):
    """A ready-made mask, or a mask function other than the causal one."""


class UnknownArgumentError(UnsupportedError):
    """An argument of the attention call that this file does not know."""


class NoAttentionInterfaceError(UnsupportedError, AttributeError):
    """A model that computes attention by itself, so that what was registered is never called."""

    # An AttributeError, so that hasattr(marker, ...) is False and does not raise.


@dataclass(frozen=True)
class MaskMarker:
    """What layers get for a mask: causal attention, or, where `window` is given, a window or chunk.

    `check_call` knows it. An attention of the model's own would take the mask None for attention over the
    rank's tokens only; with this object PyTorch's functions raise, and so does any attribute but `window`.
    """

    window: int | None = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _no_attention_interface()

    def __getattr__(self, name: str) -> Any:
        raise _no_attention_interface()


def _no_attention_interface() -> NoAttentionInterfaceError:
    return NoAttentionInterfaceError(
        "the model uses its mask itself, not through transformers' AttentionInterface.",
        "Use a model whose attention is chosen by attn_implementation, such as Llama.",
    )


@no_type_check
def check_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **others: Any,
) -> MaskMarker:
    """The mask function to register: what the layers get for a mask.

    A model asks for a windowed mask as soon as some layer may use it, so that refusal is left to the layer.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: as transformers passes them, on this rank.
        mask_function: which keys a query may see; only transformers' causal function is accepted.
        attention_mask: the caller's padding mask, [batch, tokens], 1 or True for a token and 0 or False for padding.
        local_size: the length of a sliding window or chunk.

    Returns:
        A marker for causal attention, or one with a window, which `check_call` refuses.

    Raises:
        PaddingError, PositionIdsError, FilledCacheError, NotCausalError, CustomMaskError: the model asks for
            something else than causal attention over this call's tokens.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if attention_mask is not None:
        _check_padding(attention_mask, q_length)
    names = _names_inside(mask_function)
    if any("packed_sequence" in name for name in names):
        raise PositionIdsError(
            "position ids restart or jump inside this rank's shard: several documents are packed in a row.",
            "Give each row one document, and position_ids that count on over all ranks.",
        )
    if local_size is not None or any("sliding_window" in name or "chunk" in name for name in names):
        return MaskMarker(window=local_size or 0)
    if mask_function is bidirectional_mask_function:
        raise _not_causal()
    if mask_function is not None and mask_function is not causal_mask_function:
        raise _custom_mask(f"the mask function {getattr(mask_function, '__qualname__', mask_function)}")
    if kv_length != q_length or int(q_offset) or int(kv_offset):
        raise _filled_cache(kv_length, q_length)
    return MaskMarker()


def check_call(
    module: nn.Module,
    queries: int,
    keys: int,
    mask: MaskMarker | Tensor | None,
    is_causal: bool | None,
    dropout: float,
    others: dict[str, Any],
) -> None:
    """Refuse what a layer asks of its attention beyond plain causal attention over this call's tokens.

    Args:
        module: the layer's attention module; its `is_causal` counts where the argument is None.
        queries, keys: tokens of the query and of the key on this rank.
        mask: what became of the mask; a ready-made one, of any shape, comes through unchecked.
        is_causal, dropout: as transformers passes them.
        others: every further argument; None and False say that an option is not used.

    Raises:
        SoftcapError, SinksError, SlidingWindowError, UnknownArgumentError, CustomMaskError, NotCausalError,
            DropoutError, FilledCacheError: as their names say.
    """
    _check_others(others)
    if isinstance(mask, MaskMarker) and mask.window is not None:
        raise _sliding_window(mask.window)
    if mask is not None and not isinstance(mask, MaskMarker):
        raise _custom_mask(f"a mask of shape {tuple(mask.shape)}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _not_causal()
    if dropout:
        raise DropoutError(f"dropout in attention is {dropout}.", "Set the model's attention_dropout to 0.")
    if keys != queries:
        raise _filled_cache(keys, queries)


def _check_padding(attention_mask: Tensor, tokens: int) -> None:
    if attention_mask.ndim != 2 or attention_mask.shape[1] != tokens:
        raise PaddingError(
            f"attention_mask has shape {tuple(attention_mask.shape)} for {tokens} tokens of this rank.",
            "Leave attention_mask out: only texts without padding are supported.",
        )
    hidden = int(attention_mask.numel() - torch.count_nonzero(attention_mask))
    if hidden:
        raise PaddingError(
            f"attention_mask hides {hidden} of {attention_mask.numel()} tokens: padding is not supported.",
            "Run texts of one length together and leave attention_mask out.",
        )


def _check_others(others: dict[str, Any]) -> None:
    """Refuse every further argument that may change the result; None and False say that it is not used."""
    used = {name: value for name, value in others.items() if value is not None and value is not False}
    if "softcap" in used:
        raise SoftcapError(
            f"this layer caps its scores at {used['softcap']} (softcap), which is not supported.",
            "Use a model without softcap.",
        )
    for name in ("s_aux", "sinks"):
        if name in used:
            raise SinksError(f"this layer has attention sinks ({name}).", "Use a model without sinks.")
    if "sliding_window" in used:
        raise _sliding_window(used["sliding_window"])
    unknown = sorted(used.keys() - WITHOUT_EFFECT)
    if unknown:
        raise UnknownArgumentError(
            f"the model passes {', '.join(unknown)} to its attention, which is not supported.",
            "Leave the option that adds it out, or use another attention implementation.",
        )


def first_position(position_ids: Tensor | None, batch: int, tokens: int) -> int:
    """The first of the rank's positions (0 where it has no tokens), if they count on from it in every row.

    Args:
        position_ids: [batch, tokens] or [1, tokens].
        batch: rows of the batch.
        tokens: of this rank.

    Raises:
        PositionIdsError: none were passed, of another shape, or they do not count on.
    """
    if position_ids is None:
        raise PositionIdsError(
            "the model gives its attention no position ids, so nothing shows that they are the global ones.",
            "Use a model whose layers pass position_ids on to their attention, as Llama's do.",
        )
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
        raise PositionIdsError(
            f"position_ids have shape {tuple(position_ids.shape)} for {batch} rows of {tokens} tokens.",
            f"Give a tensor of shape (1, {tokens}) or ({batch}, {tokens}) with each token's global position.",
        )
    if tokens == 0:
        return 0
    first = int(position_ids[0, 0])
    counting = torch.arange(first, first + tokens, device=position_ids.device)
    if not bool((position_ids == counting).all()):
        raise PositionIdsError(
            f"position_ids restart or jump inside this rank's {tokens} tokens, or differ between rows.",
            f"Give every row one text: here {first}, {first + 1}, ... up to {first + tokens - 1}.",
        )
    return first


def not_global(firsts: dict[int, int], expected: dict[int, int]) -> PositionIdsError:
    """The error for position ids that begin elsewhere than they should: first positions by rank, found and expected."""
    wrong = [rank for rank, first in firsts.items() if first != expected[rank]]
    found = ", ".join(f"rank {rank} starts at {firsts[rank]}" for rank in wrong[:8])
    right = ", ".join(f"{expected[rank]} on rank {rank}" for rank in wrong[:8])
    local = (
        "they count from 0 on each rank"
        if not any(firsts.values())
        else "they do not count on from rank to rank"
    )
    return PositionIdsError(
        f"position_ids are not the global ones, {local}: {found}.",
        f"Pass position_ids to the model that start at {right}.",
    )


def _names_inside(function: Callable[..., Any] | None) -> set[str]:
    """Qualified names of a function and of the functions that it closes over, however deep."""
    names: set[str] = set()
    open_functions: list[Any] = [function]
    while open_functions:
        current = open_functions.pop()
        if isinstance(current, tuple | list):
            open_functions.extend(current)
        elif hasattr(current, "__qualname__"):
            names.add(current.__qualname__)
            open_functions.extend(cell.cell_contents for cell in getattr(current, "__closure__", None) or ())
    return names


def _sliding_window(size: Any) -> SlidingWindowError:
    return SlidingWindowError(
        f"this layer attends to a window or chunk of {size} tokens, which is not supported.",
        "Use a model, or a configuration, whose layers attend to the whole sequence.",
    )


def _filled_cache(keys: int, queries: int) -> FilledCacheError:
    return FilledCacheError(
        f"{keys} keys for {queries} queries: the cache holds tokens of earlier calls, on this rank only.",
        "Pass use_cache=False and the whole text.",
    )


def _not_causal() -> NotCausalError:
    return NotCausalError(
        "this layer's tokens attend to later tokens (is_causal is False).", "Use a causal language model."
    )


def _custom_mask(what: str) -> CustomMaskError:
    return CustomMaskError(
        f"{what} was given, which is not supported.", "Leave the mask out: attention is causal."
    )
