"""The figures: what they show is read back from the drawn objects, not compared with a stored picture."""

import io
import re
from itertools import product

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image

from simulator.draw import DrawingError, draw_bytes, draw_exchange, draw_layouts
from simulator.draw_motion import GAP, MOVES, MOVING, STANDING, animate_exchange, draw_blocks
from simulator.draw_runs import draw_timeline
from simulator.draw_tiles import draw_tiles
from simulator.pictures import colours_of

TOKENS = [range(0, 5), range(5, 5), range(5, 12)]
QUERY_HEADS = [range(0, 2), range(2, 4), range(4, 4)]
KV_HEADS = [range(0, 1), range(0, 1), range(1, 1)]  # one kv head that two ranks hold
SENT = np.array([[0, 3, 500], [7, 0, 0], [11, 13, 0]])


def tiles(panel):
    """(left, top, width, height, colour) of every tile."""
    patches = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
    return [(*p.get_xy(), p.get_width(), p.get_height(), p.get_facecolor()) for p in patches]


def words(panel):
    return [text.get_text() for text in panel.texts]


def test_layouts_show_who_holds_what():
    before, query, kv = draw_layouts(TOKENS, {"query heads": QUERY_HEADS, "kv heads": KV_HEADS}).axes
    assert [tile[:4] for tile in tiles(before)] == [(-0.5, 0, 4, 5), (-0.5, 5, 4, 7)]
    assert words(before) == ["rank 0", "rank 2"]
    assert [tile[:4] for tile in tiles(query)] == [(-0.5, 0, 2, 12), (1.5, 0, 2, 12)]
    assert words(query) == ["0", "1"]
    assert [tile[:4] for tile in tiles(kv)] == [(-0.5, 0, 0.5, 12), (0, 0, 0.5, 12)]
    assert words(kv) == ["0", "1"]
    assert tiles(before)[0][4] == tiles(query)[0][4] == tiles(kv)[0][4]
    for panel in (before, query, kv):
        assert panel.get_xlabel() and panel.get_ylabel() and panel.get_title()


def test_bytes_show_every_entry_with_its_unit():
    (panel, bar) = draw_bytes(SENT * 1024).axes
    (image,) = (child for child in panel.get_children() if isinstance(child, AxesImage))
    assert np.array_equal(image.get_array(), SENT)
    assert [word for word in words(panel) if word] == [str(entry) for entry in SENT.flatten()]
    assert panel.get_ylabel() == "sending rank" and panel.get_xlabel() == "receiving rank"
    assert "KiB" in bar.get_ylabel()
    assert "534 KiB in all" in panel.get_title()


@pytest.mark.parametrize("ranks", [1, 2, 8, 9, 16, 40])
def test_neighbours_differ_in_colour_and_text_is_readable(ranks):
    tokens = [range(3 * rank, 3 * rank + 3) for rank in range(ranks)]
    heads = [range(rank, rank + 1) for rank in range(ranks)]
    picture = draw_exchange(tokens, {"query heads": heads}, np.ones((ranks, ranks), dtype=int))
    panel = picture.axes[0]
    colours = [tile[4] for tile in tiles(panel)]
    assert len(set(colours)) == ranks
    for text, colour in zip(panel.texts, colours, strict=True):
        luminance = [np.dot((0.2126, 0.7152, 0.0722), to_rgb(c)) for c in (text.get_color(), colour)]
        assert abs(luminance[0] - luminance[1]) > 0.3
    picture.draw_without_rendering()


def test_svg_is_the_same_for_the_same_data():
    first, second = (draw_bytes(SENT)._repr_svg_() for _ in range(2))
    assert first == second and "<svg" in first
    assert draw_bytes(SENT + 1)._repr_svg_() != first


@pytest.mark.parametrize(
    ("tokens", "heads", "sent", "message"),
    [
        ([], {"query heads": []}, SENT, "0 ranks"),
        (TOKENS, {}, SENT, "0 kinds of head"),
        (TOKENS, {"kv heads": KV_HEADS[:2]}, SENT, "kv heads are given for 2 ranks, tokens for 3"),
        (TOKENS, {"kv heads": KV_HEADS}, SENT[:2, :2], "for 2 ranks"),
        (TOKENS, {"kv heads": KV_HEADS}, SENT[:2], r"shape \(2, 3\)"),
        (TOKENS, {"kv heads": KV_HEADS}, -SENT, "holds -500"),
        (TOKENS, {"kv heads": KV_HEADS}, [], "shape"),
    ],
)
def test_refusals(tokens, heads, sent, message):
    with pytest.raises(DrawingError, match=message):
        draw_exchange(tokens, heads, sent)


def test_a_timeline_has_a_row_for_each_lane_and_a_bar_for_each_span():
    spans = [
        (rank, lane, "aten.mm", 1e-3 * rank, 2e-3) for rank in (0, 3) for lane in ("compute", "communication")
    ]
    picture = draw_timeline([*spans, (0, "stream 1", "aten.add", 0.0, 1e-3)])
    panel = picture.axes[0]
    assert sum(len(bars.get_paths()) for bars in panel.collections[:-1]) == 5
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "3"]
    assert panel.get_xlabel() == "virtual time (ms)"
    assert panel.get_xlim() == (0.0, 5.0)
    assert [text.get_text() for text in picture.legends[0].get_texts()] == [
        "compute",
        "stream 1",
        "communication",
    ]


@pytest.mark.parametrize("spans", [[], [(0, "compute", "x", 0.0, -1.0)]])
def test_a_timeline_of_nothing_is_refused(spans):
    with pytest.raises(DrawingError):
        draw_timeline(spans)


def test_tiles_show_every_value_in_the_colour_of_its_owner():
    ragged = [[0, 10, 20], [30]], [[0, 1, None], [1]]
    square = torch.tensor([[5, 6], [7, 8]]), np.array([[2, 2], [0, 0]])
    picture = draw_tiles(
        {"ragged": ragged, "square": square}, row="rank", column="place", owner="to rank", columns=2
    )
    first, second = picture.axes
    assert words(first) == ["0", "10", "20", "30"] and words(second) == ["5", "6", "7", "8"]
    assert [tile[:2] for tile in tiles(first)] == [(-0.5, -0.5), (0.5, -0.5), (1.5, -0.5), (-0.5, 0.5)]
    (legend,) = picture.legends
    names = {x.get_label(): x.get_facecolor() for x in legend.get_patches()}
    assert list(names) == ["to rank 0", "to rank 1", "to rank 2"] and len(set(names.values())) == 3
    zero, one, two = names.values()
    assert [tile[4] for tile in tiles(first)] == [zero, one, (1, 1, 1, 1), one]
    assert [tile[4] for tile in tiles(second)] == [two, two, zero, zero]
    assert (first.get_title(), first.get_xlabel(), first.get_ylabel()) == ("ragged", "place", "rank")
    assert (
        picture._repr_svg_()
        == draw_tiles(
            {"ragged": ragged, "square": square}, row="rank", column="place", owner="to rank", columns=2
        )._repr_svg_()
    )


@pytest.mark.parametrize(
    ("panels", "says"),
    [
        ({}, "there is no panel"),
        ({"a": ([[1, 2]], [[0]])}, "rows of [2] values and of [1] owners"),
        ({"a": ([[]], [[]])}, "at least one value"),
        ({"a": ([[1]], [[-1]])}, "the owner -1"),
        ({"a": ([[1]], [["x"]])}, "the owner 'x'"),
    ],
)
def test_tiles_that_cannot_be_drawn(panels, says):
    with pytest.raises(DrawingError, match=re.escape(says)):
        draw_tiles(panels)


@pytest.mark.parametrize("moved", [0.0, 0.25, 1.0])
def test_a_block_moves_sideways_from_its_tokens_rank_to_its_heads_rank(moved):
    (panel,) = draw_blocks(TOKENS, QUERY_HEADS, moved, "title").axes
    ranks, heads, tokens = 3, 4, 12
    step = heads * (1 + GAP)
    panels = tiles(panel)[:ranks]
    assert [tile[:4] for tile in panels] == [(rank * step, 0, heads, tokens) for rank in range(ranks)]
    blocks, bands = tiles(panel)[ranks::2], tiles(panel)[ranks + 1 :: 2]
    held = [(i, j) for i, j in product(range(ranks), range(ranks)) if TOKENS[i] and QUERY_HEADS[j]]
    assert held == [(0, 0), (0, 1), (2, 0), (2, 1)]
    for (i, j), block, band in zip(held, blocks, bands, strict=True):
        left = QUERY_HEADS[j].start + step * (i + moved * (j - i))
        expected = (left, TOKENS[i].start, len(QUERY_HEADS[j]), len(TOKENS[i]))
        assert block[:4] == pytest.approx(expected) and band[:2] == block[:2]
        assert block[4] == (*to_rgb(colours_of(ranks)[i]), 1) and band[4] == (
            *to_rgb(colours_of(ranks)[j]),
            1,
        )
    assert words(panel)[3:7] == ["0", "0→1", "2→0", "2→1"]


def test_the_animation_goes_there_and_back():
    with Image.open(io.BytesIO(animate_exchange(TOKENS, QUERY_HEADS))) as gif:
        frames, durations = [], []
        for place in range(gif.n_frames):
            gif.seek(place)
            frames.append(gif.convert("RGB").tobytes())
            durations.append(gif.info["duration"])
    assert durations == [STANDING, *[MOVING] * MOVES, STANDING, *[MOVING] * MOVES]
    there, back = frames[1 : MOVES + 1], frames[MOVES + 2 :]
    assert back == there[::-1]
    assert len({*frames}) == MOVES + 2


@pytest.mark.parametrize(("tokens", "heads"), [([], []), (TOKENS, QUERY_HEADS[:2])])
def test_an_animation_needs_both_ranges_of_every_rank(tokens, heads):
    with pytest.raises(DrawingError, match=f"tokens for {len(tokens)} ranks and of heads for {len(heads)}"):
        animate_exchange(tokens, heads)
