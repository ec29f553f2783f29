r"""A linear layer that computes its weight gradient later than its input gradient.

For $Y = X W^T + b$ the backward pass needs $dX = dY \, W$ and $dW = dY^T X$. `torch.nn.functional.linear` computes
both before anything else goes on. Here dX comes first, so that its exchange can start, and dW is computed where
`LateLinear` was made: autograd runs its nodes in the reverse order of their creation. In the output projection
of attention, made between the start and the finish of the output's exchange:

    forward    start O    LateLinear made    finish O    Y
    backward   dX -> start dO    dW, db    finish dO

Source: two gradients at two times are those of Qi et al., 2024, arXiv:2401.10241 (zero bubble pipelines).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .errors import UnsupportedError


class LateLinear:
    """One call of a linear layer, whose weight and bias get their gradients where this is made.

    Args:
        weight: [out, in].
        bias: [out], or None.
    """

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None) -> None:
        self._left = _Left()
        self._weight, self._bias = _Parameters.apply(self._left, weight, bias)

    def __call__(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """`F.linear(x, weight, bias)`, to be called once. Values and gradients equal its own to the bit.

        Raises:
            UnsupportedError: in the backward pass, where a second derivative is asked for (`create_graph`).
        """
        result: Tensor = _InputGradient.apply(self._left, x, self._weight, self._bias)
        return result


class _Left:
    """What the input gradient leaves for the weight gradient: x and dY, as matrices."""

    operands: tuple[Tensor, Tensor] | None = None


class _Parameters(torch.autograd.Function):
    """Weight and bias as they are. Their gradients are computed here, from what `_InputGradient` left."""

    @staticmethod
    def forward(ctx: Any, left: _Left, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ctx.left = left
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gradient = ctx.left.operands
        ctx.left.operands = None
        _, needs_weight, needs_bias = ctx.needs_input_grad
        weight = gradient.t() @ x if needs_weight else None
        return None, weight, gradient.sum(0) if needs_bias else None


class _InputGradient(torch.autograd.Function):
    """The linear map. Its backward computes the input's gradient alone."""

    @staticmethod
    def forward(ctx: Any, left: _Left, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.left = left
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "a second derivative through a late weight gradient is asked for.",
                'Use the block with overlap="none" where create_graph=True is needed.',
            )
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        ctx.left.operands = x.reshape(-1, x.shape[-1]), rows
        return None, (rows @ weight).view(x.shape), None, None
