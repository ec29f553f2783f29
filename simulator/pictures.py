"""What all figures share: the picture that a notebook shows, colours that everybody can tell apart, units."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any of the usual colour-vision deficiencies tell apart, grey
# in the place of black.  More ranks than colours take steps of cividis instead.
OKABE_ITO = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00", "#BBBBBB")
PANEL = 3.6  # side of a square panel, inches
LABEL = 8  # size of the printed numbers, points


class DrawingError(ValueError):
    """The ranges or the matrix do not describe an exchange between one set of ranks."""


class Picture(Figure):
    """A matplotlib figure, made without pyplot, that notebooks show as SVG: the same data, the same bytes."""

    def __init__(self, columns: int, rows: int = 1, side: float = PANEL):
        super().__init__(figsize=(columns * side + 0.6, rows * side), layout="constrained", dpi=130)
        FigureCanvasAgg(self)

    def _repr_svg_(self) -> str:
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": "seqpar", "svg.fonttype": "path"}):
            self.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()


def byte_unit(largest: int) -> tuple[int, str]:
    """The divisor and name of the unit in which the largest entry is at least 1."""
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest >= 1024**power:
            return 1024**power, name
    return 1, "B"


def three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def colours_of(ranks: int) -> list[str]:
    if ranks <= len(OKABE_ITO):
        return list(OKABE_ITO[:ranks])
    return [hex_of(matplotlib.colormaps["cividis"], rank / (ranks - 1)) for rank in range(ranks)]


def hex_of(colormap: Colormap, position: float) -> str:
    return matplotlib.colors.to_hex(colormap(float(position)))


def readable_on(colour: str) -> str:
    """Black or white, whichever is easier to read on the colour (luminance of ITU-R BT.709)."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "white"
