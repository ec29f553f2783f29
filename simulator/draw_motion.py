"""A moving picture of one exchange, as a GIF that a code host shows: blocks go from rank to rank, and back.

Each rank has a panel with the places of all tokens and heads. A block, some tokens of some heads, has the
same place in
every panel, so that it only moves sideways::

    gif = animate_exchange([range(0, 6), range(6, 10)], [range(0, 2), range(2, 3)])
    Path("exchange.gif").write_bytes(gif)

A block has the colour of the rank that owns its tokens, and at its left edge that of the rank that owns its heads.

Source: this package's own.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from PIL import Image

from .pictures import LABEL, DrawingError, Picture, colours_of, readable_on

MOVES = 14  # frames of one way
MOVING, STANDING = 60, 1800  # milliseconds that a frame is shown
WIDTH, HEIGHT = 9.2, 3.0  # inches
GAP = 0.25  # between panels, of the width of one
COLOURS = 32  # of the GIF


def animate_exchange(token_ranges: Sequence[range], head_ranges: Sequence[range]) -> bytes:
    """Draw an exchange there and back: from all heads of some tokens to all tokens of some heads.

    Args:
        token_ranges: by rank, the global tokens that it holds before the exchange.
        head_ranges: by rank, the heads that it holds after the exchange; each head on one rank.

    Returns:
        A GIF that runs for ever. The same versions of matplotlib and Pillow make the same bytes.

    Raises:
        DrawingError: no rank, or not one range of tokens and one of heads for each.
    """
    if not token_ranges or len(token_ranges) != len(head_ranges):
        raise DrawingError(
            f"got ranges of tokens for {len(token_ranges)} ranks and of heads for {len(head_ranges)}.\n"
            "  Give one of each for every rank, and at least one rank; an empty range where it has none."
        )
    standing = [
        _frame(token_ranges, head_ranges, 0.0, "each rank holds all heads of its own tokens"),
        _frame(token_ranges, head_ranges, 1.0, "each rank attends over all tokens, with its own heads"),
    ]
    there = [
        _frame(token_ranges, head_ranges, _eased(move / (MOVES + 1)), "one all-to-all there, and one back")
        for move in range(1, MOVES + 1)
    ]
    frames = [standing[0], *there, standing[1], *reversed(there)]
    durations = [STANDING, *[MOVING] * MOVES, STANDING, *[MOVING] * MOVES]
    palette = there[MOVES // 2].quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return buffer.getvalue()


def _eased(time: float) -> float:
    """Slow at both ends."""
    return time * time * (3 - 2 * time)


def _frame(
    token_ranges: Sequence[range], head_ranges: Sequence[range], moved: float, title: str
) -> Image.Image:
    """One frame: each block `moved` of the way, from 0 to 1, from its tokens' rank to its heads' rank."""
    picture = draw_blocks(token_ranges, head_ranges, moved, title)
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def draw_blocks(
    token_ranges: Sequence[range], head_ranges: Sequence[range], moved: float, title: str
) -> Picture:
    """Draw one frame of `animate_exchange`.

    Args:
        token_ranges, head_ranges: as for `animate_exchange`.
        moved: the part of the way that each block has gone, from 0 to 1.
        title: above the picture.
    """
    picture = Picture(columns=1)
    picture.set_layout_engine("none")
    picture.set_size_inches(WIDTH, HEIGHT)
    panel = picture.add_axes((0.04, 0.09, 0.95, 0.74))
    tokens = max(1, *(held.stop for held in token_ranges))
    heads = max(1, *(held.stop for held in head_ranges))
    step = heads * (1 + GAP)
    for rank in range(len(token_ranges)):
        left = rank * step
        panel.add_patch(Rectangle((left, 0), heads, tokens, facecolor="white", edgecolor="#AAAAAA"))
        panel.text(left + heads / 2, tokens * 1.05, f"rank {rank}", ha="center", va="top", fontsize=LABEL + 1)
    colours = colours_of(len(token_ranges))
    for (source, held), (target, owned) in itertools.product(enumerate(token_ranges), enumerate(head_ranges)):
        if held and owned:
            shift = step * (source + moved * (target - source))
            place = (owned.start + shift, held.start, len(owned), len(held))
            name = str(source) if source == target else f"{source}→{target}"
            _draw_block(panel, place, colours[source], colours[target], name)
    panel.set_xlim(-0.1, step * (len(token_ranges) - 1) + heads + 0.1)
    panel.set_ylim(tokens + 0.1, -0.1)
    panel.axis("off")
    panel.text(-0.02 * step, tokens / 2, "tokens", rotation=90, ha="right", va="center", fontsize=LABEL)
    panel.text(0, -0.03 * tokens, "heads", ha="left", va="bottom", fontsize=LABEL)
    picture.suptitle(title, fontsize=LABEL + 3, y=0.98)
    return picture


def _draw_block(
    panel: Axes, place: tuple[float, float, float, float], colour: str, band: str, name: str
) -> None:
    left, top, width, height = place
    panel.add_patch(Rectangle((left, top), width, height, facecolor=colour, edgecolor="white", linewidth=1.5))
    panel.add_patch(Rectangle((left, top), min(0.35, width / 4), height, facecolor=band, edgecolor="white"))
    panel.text(
        left + width / 2 + 0.15, top + height / 2, name,
        ha="center", va="center", fontsize=LABEL, color=readable_on(colour),
    )  # fmt: skip
