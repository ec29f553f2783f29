"""Figures of a run: its timeline, and its ledger.

Source: this package's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .draw import draw_bytes_panel
from .pictures import LABEL, OKABE_ITO, DrawingError, Picture, byte_unit, readable_on

COMPUTE, COMMUNICATION = OKABE_ITO[0], OKABE_ITO[1]
OTHER_STREAMS = (OKABE_ITO[2], OKABE_ITO[4], OKABE_ITO[5])
_COMMUNICATION_LANES = ("communication", "send", "receive")
_MOST_PARTED = 100  # bars of a lane that are parted by a white line; of more, the lines would hide the bars
_NAMED_PART = 0.05  # of the time that is shown: shorter spans carry no name


def draw_timeline(spans: Sequence[tuple[int, str, str, float, float]], title: str | None = None) -> Picture:
    """Draw what each rank's lanes do over virtual time: a row for each lane, a bar for each span.

    Args:
        spans: (global rank, lane, name, start in seconds, duration in seconds).
        title: above the figure.

    Raises:
        DrawingError: there is no span, or one has a negative duration.
    """
    if not spans:
        raise DrawingError(
            "a timeline without a span.\n  Draw the trace of a run that has computed something."
        )
    if min(duration for *_, duration in spans) < 0:
        raise DrawingError("a span has a negative duration.\n  Give durations in seconds, zero or more.")
    rows = sorted(
        {(rank, lane) for rank, lane, *_ in spans}, key=lambda row: (row[0], _order(row[1]), row[1])
    )
    end = max(start + duration for *_, start, duration in spans)
    divisor, unit = _time_unit(end)
    picture = Picture(columns=2)
    picture.set_size_inches(9, 1.4 + len(rows) * (0.26 if len(rows) <= 16 else 0.14))
    panel = picture.add_subplot()
    lanes = sorted({lane for _, lane in rows}, key=lambda lane: (_order(lane), lane))
    for place, row in enumerate(rows):
        _draw_lane(
            panel, place, [span for span in spans if span[:2] == row], end, divisor, _colour(row[1], lanes)
        )
    for lane in lanes:
        panel.bar(0, 0, color=_colour(lane, lanes), label=lane)
    picture.legend(loc="outside lower center", ncols=6, fontsize=LABEL, frameon=False)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(0, max(end / divisor, 1e-12))
    _label_ranks(panel, rows)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8))
    panel.set_xlabel(f"virtual time ({unit})")
    panel.set_ylabel("rank")
    panel.set_title(title or f"what each rank does, {end / divisor:.4g} {unit} in all", fontsize=LABEL + 1)
    return picture


def _draw_lane(
    panel: Axes,
    place: int,
    spans: Sequence[tuple[int, str, str, float, float]],
    end: float,
    divisor: float,
    colour: str,
) -> None:
    bars = [(start / divisor, duration / divisor) for *_, start, duration in spans]
    line = 0.3 if len(spans) <= _MOST_PARTED else 0.0
    panel.broken_barh(bars, (place - 0.42, 0.84), facecolor=colour, edgecolor="white", linewidth=line)
    for *_, name, start, duration in spans:
        shown = name.removeprefix("aten.").removesuffix(".default")
        if duration > _NAMED_PART * end and len(shown) < 110 * duration / end:
            middle = (start + duration / 2) / divisor
            panel.text(
                middle,
                place,
                shown,
                ha="center",
                va="center",
                fontsize=LABEL - 2,
                color=readable_on(colour),
                clip_on=True,
            )


def _label_ranks(panel: Axes, rows: Sequence[tuple[int, str]]) -> None:
    """One label for each rank, in the middle of its lanes, and a line between ranks."""
    places: dict[int, list[int]] = {}
    for place, (rank, _) in enumerate(rows):
        places.setdefault(rank, []).append(place)
    every = -(-len(places) // 32)
    labelled = {rank: own for index, (rank, own) in enumerate(places.items()) if index % every == 0}
    panel.set_yticks([sum(own) / len(own) for own in labelled.values()], [str(rank) for rank in labelled])
    panel.hlines(
        [own[0] - 0.5 for own in list(places.values())[1:]],
        0,
        1,
        transform=panel.get_yaxis_transform(),
        color="#888888",
        linewidth=0.4,
    )


def _order(lane: str) -> int:
    return 0 if lane == "compute" else 2 if lane in _COMMUNICATION_LANES else 1


def _colour(lane: str, lanes: Sequence[str]) -> str:
    if _order(lane) == 0:
        return COMPUTE
    if _order(lane) == 2:
        return {"communication": COMMUNICATION, "send": OKABE_ITO[3], "receive": OKABE_ITO[6]}[lane]
    others = [x for x in lanes if _order(x) == 1]
    return OTHER_STREAMS[others.index(lane) % len(OTHER_STREAMS)]


def _time_unit(longest: float) -> tuple[float, str]:
    """The divisor and name of the unit in which the longest time is at least 1."""
    for seconds, name in ((1.0, "s"), (1e-3, "ms")):
        if longest >= seconds:
            return seconds, name
    return 1e-6, "µs"


def draw_ledger(
    pairs: np.ndarray, kinds: Mapping[str, tuple[int, int]], lines: Mapping[str, tuple[int, int]]
) -> Picture:
    """Draw the bytes from rank to rank, and beside them how many each kind of collective and each source line sent.

    Args:
        pairs: bytes [sender, receiver].
        kinds, lines: (calls, bytes) by name; of the lines the eight largest are drawn.
    """
    side = max(3.6, 0.3 * min(len(pairs), 16))
    picture = Picture(columns=2, side=side)
    picture.set_size_inches(side + 6.2, side)
    grid = picture.add_gridspec(2, 2, width_ratios=[side, 6.2])
    draw_bytes_panel(picture.add_subplot(grid[:, 0]), pairs, "bytes sent")
    shorter = {_short(line): total for line, total in list(lines.items())[:8]}
    for row, (title, totals) in enumerate(
        (("by kind", dict(kinds)), ("by source line, the largest", shorter))
    ):
        _draw_bars(picture.add_subplot(grid[row, 1]), title, totals, COMMUNICATION)
    return picture


def _draw_bars(panel: Axes, title: str, totals: Mapping[str, tuple[int, int]], colour: str) -> None:
    divisor, unit = byte_unit(max((sent for _, sent in totals.values()), default=0))
    names = [f"{name} ({calls}x)" for name, (calls, _) in totals.items()]
    panel.barh(range(len(names)), [sent / divisor for _, sent in totals.values()], color=colour, height=0.7)
    panel.set_yticks(range(len(names)), names, fontsize=LABEL - 1)
    panel.invert_yaxis()
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6))
    panel.set_xlabel(f"sent ({unit})", fontsize=LABEL)
    panel.set_title(title, fontsize=LABEL + 1)


def _short(line: str) -> str:
    """`/a/long/path/file.py:12 in step` without the folders."""
    place, _, function = line.partition(" in ")
    return f"{place.rsplit('/', 1)[-1]} in {function}" if function else place
