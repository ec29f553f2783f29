"""What one device computes: attention and the block in plain torch, without anything of the code that is checked.

Twice: in the dtype of the case with PyTorch's own attention, as a program on one device would, and in float64 as the
formulas say. How far the first is from the second is what rounding alone does.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .validate_cases import AUTOCAST, SCALE, THETA, Case, Sequence


def one_device(case: Case, sequence: Sequence, device: torch.device, *, exact: bool) -> dict[str, Tensor]:
    """Output and the gradient of each input and weight that is not frozen, on the CPU, by name.

    Where there are two calls, those of the second as well; the gradients of the weights are sums of both.

    Args:
        sequence: the whole one of a group.
        exact: in float64 by the formula; otherwise in the case's dtype by scaled_dot_product_attention.
    """
    dtype = torch.float64 if exact else case.dtype
    leaves = {
        name: tensor.to(device, dtype).clone().requires_grad_(name not in case.frozen)
        for name, tensor in (sequence.inputs | sequence.weights).items()
    }
    mask = None if sequence.mask is None else sequence.mask.to(device)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    positions = sequence.positions.to(device, torch.float64)
    attend: Callable[..., Tensor] = _by_formula if exact else _by_torch
    compute = _block if case.kind == "block" else _attention
    results = {}
    for sign, prefix in zip((1, -1), case.calls, strict=False):
        inputs = {
            name: (sign * leaves[name].detach()).requires_grad_(name not in case.frozen)
            for name in sequence.inputs
        }
        with torch.autocast(device.type, AUTOCAST, enabled=case.call == "autocast" and not exact):
            output = compute(case, leaves | inputs, positions, lambda *qkv: attend(*qkv, case, mask))
        output.backward(sequence.gradient.to(output))
        results[f"{prefix}output"] = output.detach()
        results |= {f"{prefix}{name}": _gradient(leaf) for name, leaf in inputs.items() if leaf.requires_grad}
    weights = {name: leaves[name] for name in sequence.weights}
    results |= {name: _gradient(leaf) for name, leaf in weights.items() if leaf.requires_grad}
    return {name: tensor.cpu() for name, tensor in results.items()}


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _attention(
    case: Case, leaves: dict[str, Tensor], positions: Tensor, attend: Callable[..., Tensor]
) -> Tensor:
    query, key = (_rotary(case, leaves[name], positions) for name in ("query", "key"))
    return attend(query, key, leaves["value"])


def _block(case: Case, leaves: dict[str, Tensor], positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    def project(name: str, x: Tensor) -> Tensor:
        return F.linear(x, leaves[f"{name}.weight"], leaves.get(f"{name}.bias"))

    query, key, value = (
        project(name, leaves["x"]).unflatten(-1, (-1, case.head_dim)) for name in ("query", "key", "value")
    )
    output = attend(_rotary(case, query, positions), _rotary(case, key, positions), value)
    return project("output", output.flatten(2))


def _by_torch(query: Tensor, key: Tensor, value: Tensor, case: Case, mask: Tensor | None) -> Tensor:
    """Attention of [batch, seq, heads, dim] tensors as everyone calls it."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    result = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=case.causal, scale=_scale(case, query), enable_gqa=gqa
    )
    return result.transpose(1, 2)


def _by_formula(query: Tensor, key: Tensor, value: Tensor, case: Case, mask: Tensor | None) -> Tensor:
    """Attention of [batch, seq, heads, dim] tensors; query head i uses kv head i // ratio."""
    ratio = query.shape[2] // key.shape[2]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(ratio, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * _scale(case, query)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if case.causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return (scores.softmax(dim=3) @ value).transpose(1, 2)


def _scale(case: Case, query: Tensor) -> float:
    return SCALE if case.call == "mask and scale" else query.shape[3] ** -0.5


def _rotary(case: Case, heads: Tensor, positions: Tensor) -> Tensor:
    """Each pair of elements as a complex number, times exp(i position THETA^(-2 pair / dim)).

    Half types turn in float32 and are rounded once.
    """
    if case.rotary == "none":
        return heads
    wide = heads if heads.dtype == torch.float64 else heads.float()
    half = heads.shape[3] // 2
    interleaved = case.rotary == "interleaved"
    pairs = wide.unflatten(3, (half, 2)) if interleaved else wide.unflatten(3, (2, half)).transpose(3, 4)
    pair = torch.arange(half, dtype=torch.float64, device=heads.device)
    angle = positions[:, None] * THETA ** (-pair / half)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.view_as_complex(pairs.contiguous()).dtype)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn[:, None])
    turned = turned if interleaved else turned.transpose(3, 4)
    return turned.flatten(3).to(heads.dtype)
