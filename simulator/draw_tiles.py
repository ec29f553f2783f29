"""A figure of tensors and buffers: every entry a tile with its value, in the colour of what it belongs to.

Tile by tile it shows what a figure of ranges cannot: where in memory something lies, and in which order::

    picture = draw_tiles({"sent": ([[0, 1, 2], [10, 11]], [[0, 0, 1], [0, 1]])}, row="rank", owner="to rank")
    picture.savefig("buffers.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from .pictures import LABEL, DrawingError, Picture, colours_of, readable_on

Rows = Sequence[Sequence[Any]]
TILE = 0.3  # side of a tile, inches
NOTHING = "#FFFFFF"  # belongs to nobody


def draw_tiles(
    panels: Mapping[str, tuple[Rows, Rows]],
    *,
    row: str = "row",
    column: str = "column",
    owner: str = "rank",
    columns: int = 1,
    tile: float = TILE,
) -> Picture:
    """Draw tables of values, each entry in the colour of its owner.

    Args:
        panels: by title, the rows of values, which are printed, and rows of owners, 0, 1, ..., or None for nobody's.
            Rows may differ in length; lists, arrays and integer tensors will do.
        row, column: names of the axes.
        owner: the word before an owner's number in the legend, such as "rank" or "head".
        columns: panels beside each other.
        tile: side of a tile in inches.

    Raises:
        DrawingError: there is no panel or no tile, values and owners differ in shape, or an owner is no number from 0.
    """
    tables = {title: _table(title, *panel) for title, panel in panels.items()}
    if not tables:
        raise DrawingError("there is no panel.\n  Give at least one, such as {'sent': (values, owners)}.")
    sizes = [(max(map(len, values)), len(values)) for values, _ in tables.values()]
    owners = sorted({x for _, own in tables.values() for line in own for x in line if x is not None})
    colours = colours_of(max(owners, default=0) + 1)
    widths = [max(width for width, _ in sizes[place::columns]) for place in range(min(columns, len(sizes)))]
    heights = [max(height for _, height in sizes[i : i + columns]) for i in range(0, len(sizes), columns)]
    picture = Picture(columns=1)
    picture.set_layout_engine("compressed", h_pad=0.09)  # for panels that keep their aspect
    entries = min(len(owners), 8)  # of the legend, beside each other
    width = max(3.0, tile * sum(widths) + 0.7 * len(widths), entries * (0.5 + 0.07 * len(f"{owner} 0")))
    picture.set_size_inches(width, tile * sum(heights) + 0.8 * len(heights) + 0.5)
    grid = picture.add_gridspec(len(heights), len(widths), width_ratios=widths, height_ratios=heights)
    for place, (title, (values, own)) in enumerate(tables.items()):
        panel = picture.add_subplot(grid[divmod(place, columns)])
        _draw_table(panel, values, own, colours)
        _label(panel, title, row if place % columns == 0 else "", column, *sizes[place])
    if owners:
        handles = [Patch(facecolor=colours[x], label=f"{owner} {x}") for x in owners]
        picture.legend(
            handles=handles,
            loc="outside lower center",
            ncols=entries,
            fontsize=LABEL,
            frameon=False,
            columnspacing=1.2,
            handlelength=1.5,
        )
    return picture


def _draw_table(panel: Axes, values: Rows, owners: Rows, colours: Sequence[str]) -> None:
    for y, (line, own) in enumerate(zip(values, owners, strict=True)):
        for x, (value, owner) in enumerate(zip(line, own, strict=True)):
            colour = NOTHING if owner is None else colours[owner]
            edge = "#CCCCCC" if owner is None else "white"
            panel.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor=edge, linewidth=1)
            )
            if value is not None:
                panel.text(
                    x, y, str(value), ha="center", va="center", fontsize=LABEL - 1, color=readable_on(colour)
                )


def _label(panel: Axes, title: str, row: str, column: str, width: int, height: int) -> None:
    panel.set_xlim(-0.55, width - 0.45)
    panel.set_ylim(height - 0.45, -0.55)
    panel.set_aspect("equal")
    panel.set_xlabel(column, fontsize=LABEL)
    panel.set_ylabel(row, fontsize=LABEL)
    panel.tick_params(labelsize=LABEL - 1, length=2)
    panel.set_xticks(range(0, width, -(-width // 12)))
    panel.set_yticks(range(0, height, -(-height // 12)) if height > 1 else [])
    panel.set_title(title, fontsize=LABEL + 1)
    for side in panel.spines.values():
        side.set_visible(False)


def _table(title: str, values: Any, owners: Any) -> tuple[Rows, Rows]:
    """Values and owners as lists of lists, checked."""
    values, owners = (
        x.tolist() if hasattr(x, "tolist") else [list(line) for line in x] for x in (values, owners)
    )
    lengths = [[len(line) for line in table] for table in (values, owners)]
    if lengths[0] != lengths[1] or not sum(lengths[0]):
        raise DrawingError(
            f"panel {title!r} has rows of {lengths[0]} values and of {lengths[1]} owners.\n"
            "  Give each value one owner, None for nobody, and at least one value."
        )
    for owner in (owner for line in owners for owner in line):
        if owner is not None and (isinstance(owner, bool) or not isinstance(owner, int) or owner < 0):
            raise DrawingError(
                f"panel {title!r} has the owner {owner!r}.\n  Number the owners from 0; None is for nobody."
            )
    return values, owners
