"""One exception class per mistake.

Every error carries two lines. The first says what is wrong, with the numbers; the second says what to change.
Each class also derives from the built-in exception that fits it, so `except ValueError` works as one expects.

Source: this package's own. docs/errors.md lists causes and mends.
"""


class SeqparError(Exception):
    """Base class of every error that `seqpar_ref` raises on purpose.

    Args:
        wrong: what is wrong, with the sizes that show it.
        change: what the caller can change to make it right.
    """

    def __init__(self, wrong: str, change: str) -> None:
        super().__init__(wrong, change)

    def __str__(self) -> str:
        return "\n  ".join(str(line) for line in self.args)


class PlanError(SeqparError, ValueError):
    """A plan that cannot exist: sizes that are no integers, heads that do not divide, an unknown rank."""


class LayoutError(SeqparError, ValueError):
    """A layout that is none of `"b s h d"`, `"s b h d"` and `"b h s d"`."""


class ShapeError(SeqparError, ValueError):
    """A tensor whose sizes do not fit the plan, the layout or the tensors beside it."""


class TensorError(SeqparError, TypeError):
    """Something that is no tensor, or a tensor of a dtype or device that cannot be exchanged."""


class ArgumentError(SeqparError, ValueError):
    """An argument whose value is none of the allowed ones, or that contradicts another argument."""


class GroupError(SeqparError, RuntimeError):
    """No process group, one that this rank is no member of, or one whose size is not the plan's."""


class RankMismatchError(SeqparError, RuntimeError):
    """The ranks of one group called with sizes that do not belong together. Raised on all of them alike."""


class OrderError(SeqparError, RuntimeError):
    """The two halves of an exchange, start and finish, called in another order than once each."""


class UnsupportedError(SeqparError, NotImplementedError):
    """Something that attention can mean and that this module does not do, such as cross attention."""


class MaskError(SeqparError, ValueError):
    """An attention mask that does not cover all tokens in global order, or not all query heads."""


class RotaryError(SeqparError, ValueError):
    """Positions, angles or dimensions that do not fit the tensor that is to be rotated."""


class LocalAttentionError(SeqparError, ValueError):
    """The local attention returned something that is not its rank's share of the output."""


class NoAcceleratorError(SeqparError, RuntimeError):
    """A backend for accelerators was asked for on a machine that has too few of them."""
