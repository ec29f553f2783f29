"""A small model, its data, and what one device makes of them: the answers of the training tests."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LEARNING_RATE = 0.1
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}
"""float64: sums over ranks are taken in another order than on one device."""


class Block(nn.Module):
    """A residual layer; the sizes differ pairwise."""

    def __init__(self, width: int = 6, hidden: int = 9) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width] -> [batch, width]"""
        return x + self.second(torch.tanh(self.first(x)))


def build_model() -> nn.Sequential:
    """The same values on every rank."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), Block(), Block(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of the whole world. 12 rows, so that 2, 3 and 4 ranks get the same number."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        inputs, targets = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (5, 4))
        yield inputs, targets


def train_on_one_device(steps: int) -> list[Tensor]:
    """The parameters after that many steps with the whole batch."""
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    for inputs, targets in batches(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return [x.detach() for x in model.parameters()]


def same_bits(one: Any, other: Any) -> bool:
    """Whether two structures of tensors are equal to the last bit."""
    leaves, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(leaves) == len(others) and all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))
