"""The axis words and the layouts.

| word | is |
|---|---|
| `b`, batch | rows of the batch, whole on every rank |
| `s`, sequence | tokens: `seq_local` of them on a rank, `seq` on all ranks together |
| `h`, heads | query heads or kv heads: `heads` in all, `heads_local` on a rank |
| `d`, dim | the vector of one token and one head |

A layout is the order of these words in a tensor. `dim` always comes last.

Source: axis words in the place of numbers are those of einops (Rogozhnikov, 2022).
"""

from dataclasses import dataclass

from .errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """Where each axis word stands: `name`, and the tensor dims of batch, sequence and heads."""

    name: str
    batch: int
    sequence: int
    heads: int

    def shape(self, batch: int, tokens: int, heads: int, dim: int) -> tuple[int, int, int, int]:
        """The shape of a tensor of these sizes in this layout.

        Args:
            batch, tokens, heads: rows, tokens and heads of the tensor.
            dim: elements of one vector.
        """
        sizes = {self.batch: batch, self.sequence: tokens, self.heads: heads}
        return sizes[0], sizes[1], sizes[2], dim


LAYOUTS = {
    "b s h d": Layout("b s h d", batch=0, sequence=1, heads=2),
    "s b h d": Layout("s b h d", batch=1, sequence=0, heads=2),
    "b h s d": Layout("b h s d", batch=0, sequence=2, heads=1),
}


def layout_of(name: object) -> Layout:
    """The layout of that name.

    Raises:
        LayoutError: there is none of that name.
    """
    if not isinstance(name, str) or name not in LAYOUTS:
        known = ", ".join(repr(known) for known in LAYOUTS)
        raise LayoutError(f"{name!r} is no layout.", f"Use one of {known}.")
    return LAYOUTS[name]
