"""Two figures of an exchange: who holds what before and after it, and the bytes each rank sent to each other.

Everything comes in as plain ranges and arrays, so that any plan, ledger or notebook can be drawn::

    picture = draw_exchange(
        token_ranges=[range(0, 6), range(6, 10)],
        head_ranges={"query heads": [range(0, 2), range(2, 3)]},
        sent=[[0, 640], [960, 0]],
    )
    picture.savefig("exchange.png")

A picture is a matplotlib figure that a notebook shows as SVG.  Colour is never the only sign: every area
carries the number of its rank, and neighbours are parted by a line.

Source: this package's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .pictures import (
    LABEL,
    PANEL,
    DrawingError,
    Picture,
    byte_unit,
    colours_of,
    hex_of,
    readable_on,
    three_digits,
)


def draw_layouts(token_ranges: Sequence[range], head_ranges: Mapping[str, Sequence[range]]) -> Picture:
    """Draw who holds which (token, head) tiles: split by tokens, then, for each kind of head, by heads.

    Args:
        token_ranges: by rank, the global tokens that it holds before the exchange.
        head_ranges: for each kind of head ("query heads", "kv heads"), by rank, the heads that it holds
            after the exchange. A head that several ranks hold is drawn in as many stripes.

    Raises:
        DrawingError: no kind of head is given, or the kinds are not given for as many ranks as the tokens.
    """
    _check_ranges(token_ranges, head_ranges)
    picture = Picture(columns=1 + len(head_ranges))
    _draw_layout_panels(
        [picture.add_subplot(1, 1 + len(head_ranges), i + 1) for i in range(1 + len(head_ranges))],
        token_ranges,
        head_ranges,
    )
    return picture


def draw_bytes(sent: np.ndarray | Sequence[Sequence[int]], title: str = "bytes sent") -> Picture:
    """Draw a ranks x ranks matrix of bytes: row = the rank that sends, column = the rank that receives.

    Args:
        sent: bytes, [sender, receiver].
        title: above the matrix.

    Raises:
        DrawingError: the matrix is not square, or holds a negative number.
    """
    matrix = _checked_matrix(sent)
    picture = Picture(columns=1, side=max(PANEL, 0.42 * len(matrix)))
    draw_bytes_panel(picture.add_subplot(), matrix, title)
    return picture


def draw_exchange(
    token_ranges: Sequence[range],
    head_ranges: Mapping[str, Sequence[range]],
    sent: np.ndarray | Sequence[Sequence[int]],
    title: str | None = None,
) -> Picture:
    """Draw both in one picture: the layouts of :func:`draw_layouts` and the matrix of :func:`draw_bytes`.

    Args:
        token_ranges, head_ranges: as for `draw_layouts`.
        sent: bytes, [sender, receiver].
        title: above the picture.

    Raises:
        DrawingError: see the two functions; also when ranges and matrix are for different numbers of ranks.
    """
    _check_ranges(token_ranges, head_ranges)
    matrix = _checked_matrix(sent)
    if len(matrix) != len(token_ranges):
        raise DrawingError(
            f"the matrix of bytes is for {len(matrix)} ranks, the token ranges are for {len(token_ranges)}.\n"
            f"  Give a {len(token_ranges)} x {len(token_ranges)} matrix."
        )
    panels = 2 + len(head_ranges)
    columns = 2 if panels > 3 else panels
    rows = -(-panels // columns)
    picture = Picture(columns, rows, side=max(PANEL, 0.36 * len(matrix)))
    axes = [picture.add_subplot(rows, columns, i + 1) for i in range(panels)]
    _draw_layout_panels(axes[:-1], token_ranges, head_ranges)
    draw_bytes_panel(axes[-1], matrix, "bytes sent")
    if title:
        picture.suptitle(title)
    return picture


def _draw_layout_panels(
    panels: Sequence[Axes], token_ranges: Sequence[range], head_ranges: Mapping[str, Sequence[range]]
) -> None:
    tokens = _count(token_ranges)
    _draw_before(panels[0], token_ranges, max(_count(ranges) for ranges in head_ranges.values()))
    for panel, (kind, ranges) in zip(panels[1:], head_ranges.items(), strict=True):
        _draw_after(panel, kind, ranges, tokens)


def _draw_before(panel: Axes, token_ranges: Sequence[range], heads: int) -> None:
    """One band of tokens for each rank, over all heads."""
    colours, tokens = colours_of(len(token_ranges)), _count(token_ranges)
    for rank, held in enumerate(token_ranges):
        if len(held):
            _tile(panel, colours[rank], left=-0.5, width=heads, top=held.start, height=len(held))
            size = max(4, LABEL * min(1.0, 18 * len(held) / tokens))  # 18 lines of print fit into the panel
            _print(panel, colours[rank], f"rank {rank}", heads / 2 - 0.5, held.start + len(held) / 2, size)
    _label_axes(panel, "before: each rank holds some tokens, all heads", "head", heads, tokens)
    if len(token_ranges) <= 8:
        panel.set_yticks(sorted({0, *(held.stop for held in token_ranges)}))


def _draw_after(panel: Axes, kind: str, ranges: Sequence[range], tokens: int) -> None:
    """One column of heads for each rank, over all tokens; a head with several owners is split in stripes."""
    colours, heads = colours_of(len(ranges)), _count(ranges)
    for rank, left, right in _stripes(ranges, heads):
        _tile(panel, colours[rank], left, right - left, top=0, height=tokens)
        _print(panel, colours[rank], str(rank), (left + right) / 2, tokens / 2, LABEL)
    panel.vlines(np.arange(1, heads) - 0.5, 0, tokens, color="white", linewidth=0.5)  # between heads
    title = f"after: each rank holds all tokens, some {kind}"
    if idle := [str(rank) for rank, held in enumerate(ranges) if not held]:
        shown = ", ".join(idle[:4]) + (", ..." if len(idle) > 4 else "")
        title = f"after: all tokens, some {kind} (rank{'s' * (len(idle) > 1)} {shown}: none)"
    _label_axes(panel, title, kind.removesuffix("s"), heads, tokens)


def _count(ranges: Sequence[range]) -> int:
    """How many items the ranges reach over, from 0."""
    return max((held.stop for held in ranges if len(held)), default=0)


def _stripes(ranges: Sequence[range], heads: int) -> list[tuple[int, float, float]]:
    """(rank, left, right) of each run of one rank's stripes; a head has one stripe for each of its owners."""
    runs: list[tuple[int, float, float]] = []
    for head in range(heads):
        owners = [rank for rank, held in enumerate(ranges) if head in held]
        for position, rank in enumerate(owners):
            left, right = head - 0.5 + position / len(owners), head - 0.5 + (position + 1) / len(owners)
            if runs and runs[-1][0] == rank and abs(runs[-1][2] - left) < 1e-9:
                runs[-1] = (rank, runs[-1][1], right)
            else:
                runs.append((rank, left, right))
    return runs


def _tile(panel: Axes, colour: str, left: float, width: float, top: float, height: float) -> None:
    panel.add_patch(Rectangle((left, top), width, height, facecolor=colour, edgecolor="white", linewidth=2))


def _print(panel: Axes, colour: str, text: str, x: float, y: float, size: float) -> None:
    behind = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
    panel.text(x, y, text, ha="center", va="center", fontsize=size, color=readable_on(colour), bbox=behind)


def _label_axes(panel: Axes, title: str, head_name: str, heads: int, tokens: int) -> None:
    panel.set_xlim(-0.5, max(heads, 1) - 0.5)
    panel.set_ylim(max(tokens, 1), 0)
    panel.set_xlabel(f"{head_name} (index)")
    panel.set_ylabel("token (position in the sequence)")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panel.set_title(title, fontsize=LABEL + 1)


def draw_bytes_panel(panel: Axes, matrix: np.ndarray, title: str) -> None:
    """Draw the matrix of :func:`draw_bytes`, bytes [sender, receiver], into a panel of another figure."""
    divisor, unit = byte_unit(int(matrix.max()))
    largest = max(float(matrix.max() / divisor), 1e-12)
    scaled = (matrix / divisor).tolist()
    colormap = matplotlib.colormaps["cividis"]
    image = panel.imshow(scaled, cmap=colormap, vmin=0, vmax=largest)
    panel.set_xlabel("receiving rank")
    panel.set_ylabel("sending rank")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    panel.set_title(f"{title} ({int(matrix.sum()) / divisor:,.5g} {unit} in all)", fontsize=LABEL + 1)
    panel.figure.colorbar(image, ax=panel, shrink=0.8).set_label(
        f"{unit} from the row's rank to the column's"
    )
    if len(matrix) > 16:
        return  # the numbers would be smaller than print; the colour bar gives them
    for sender, receiver in np.ndindex(*matrix.shape):
        panel.text(
            receiver,
            sender,
            three_digits(scaled[sender][receiver]),
            ha="center",
            va="center",
            fontsize=LABEL if len(matrix) <= 6 else LABEL - 2,
            color=readable_on(hex_of(colormap, scaled[sender][receiver] / largest)),
        )


def _check_ranges(token_ranges: Sequence[range], head_ranges: Mapping[str, Sequence[range]]) -> None:
    if not token_ranges or not head_ranges:
        raise DrawingError(
            f"got token ranges for {len(token_ranges)} ranks and {len(head_ranges)} kinds of head.\n"
            "  Give at least one of each, such as head_ranges={'query heads': [range(0, 2), range(2, 4)]}."
        )
    for kind, ranges in head_ranges.items():
        if len(ranges) != len(token_ranges):
            raise DrawingError(
                f"{kind} are given for {len(ranges)} ranks, tokens for {len(token_ranges)}.\n"
                f"  Give {len(token_ranges)} ranges of {kind}; an empty range for a rank without any."
            )


def _checked_matrix(sent: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
    matrix = np.asarray(sent)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise DrawingError(
            f"the matrix of bytes has shape {matrix.shape}.\n"
            "  Give one row for each sending rank and one column for each receiving rank."
        )
    if matrix.min() < 0:
        raise DrawingError(
            f"the matrix of bytes holds {matrix.min()}.\n  Give counts of bytes: zero or more."
        )
    return matrix
