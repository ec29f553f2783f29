"""The explorer as a reader uses it: by mouse, by keyboard, by address, over http and from a file."""

import json
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from explorer.from_python import SHOWN, shown_lines
from seqpar_ref import make_plan
from seqpar_ref.errors import PlanError
from tests.explorer_numbers import check_frames, check_numbers

Open = Callable[..., Any]

STEPS = [
    "shards", "pack", "in flight", "arrived", "unpack",
    "attention", "pack output", "output in flight", "output arrived", "unpack output",
]  # fmt: skip


@pytest.fixture
def explorer(open_page: Open) -> Any:
    """The page, opened without a setting: 10 tokens, 9 query heads and 3 kv heads on 4 ranks, balanced."""
    return open_page("explorer.html")


def heading(page: Any) -> str:
    return page.locator(".stage h3").inner_text()


def fill(page: Any, **fields: str) -> None:
    for name, text in fields.items():
        page.locator(f"[name={name}]").fill(text)


def facts(page: Any) -> list[str]:
    return page.locator(".facts").inner_text().splitlines()


def printed_plan(page: Any) -> str:
    return page.locator(".plan").inner_text()


def tile(page: Any, name: str) -> Any:
    return page.locator(f'.tile[data-block="{name}"]').first


def test_numbers_and_tiles_are_those_of_the_packages(open_page: Open) -> None:
    page = open_page("explorer.html")

    def run(name: str, settings: list[Any]) -> list[Any]:
        call = f"settings => JSON.stringify(settings.map((setting) => seqparExplorer.{name}(setting)))"
        return json.loads(page.evaluate(call, settings))

    check_numbers(run)
    if not shutil.which("node"):  # with it, tests/test_explorer.py checks them in less time
        check_frames(run)


def test_every_control_changes_what_is_shown(explorer: Any) -> None:
    page = explorer
    plan = {"ranks": 4, "heads": 9, "kv_heads": 3, "tokens": 10, "policy": "balanced"}
    assert printed_plan(page) == str(make_plan(**plan))
    for name, value in {"ranks": 3, "heads": 8, "kv_heads": 4, "tokens": [5, 0, 2]}.items():
        plan[name] = value
        fill(page, **{name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)})
        if name not in ("heads", "tokens"):  # 8 query heads with 3 kv heads: refused
            assert printed_plan(page) == str(make_plan(**plan))
    assert printed_plan(page) == str(make_plan(**plan))
    for policy in ("auto", "groups", "balanced"):
        page.locator("[name=policy]").select_option(policy)
        assert printed_plan(page) == str(make_plan(**{**plan, "policy": policy}))
    shape = page.locator('[data-rank="0"] figcaption').first
    for layout, shown in (
        ("s b h d", "(5, 2, 8, 16)"),
        ("b h s d", "(2, 8, 5, 16)"),
        ("b s h d", "(2, 5, 8, 16)"),
    ):
        fill(page, batch="2", head_dim="16")
        page.locator("[name=layout]").select_option(layout)
        assert shape.inner_text() == f"query {shown}"
    total = page.locator(".bytes tr").last.locator("td").last
    page.locator("[name=dtype]").select_option("bfloat16")
    sent = make_plan(**plan).vectors("query").sum() * 2 + make_plan(**plan).vectors("kv").sum() * 2
    assert total.inner_text() == f"{sent * 2 * 16 * 2:,}"


def test_presets(explorer: Any) -> None:
    message = explorer.locator(".message")
    explorer.locator("[name=policy]").select_option("groups")
    for name, said in {
        "even": "even: query heads 2, 2, 2, 2; no kv head replicated",
        "uneven": "uneven: query heads 3, 2, 2, 2; kv heads replicated (2 copies more)",
        "replicated": "even: query heads 2, 2, 2, 2; kv heads replicated (2 copies more)",
        "fewer heads than ranks": "uneven: query heads 1, 1, 1, 0; no kv head replicated",
    }.items():
        explorer.get_by_role("button", name=name, exact=True).click()
        assert message.inner_text() == said


@pytest.mark.parametrize("root", ["http", "file"], indirect=True)
def test_steps_by_mouse(explorer: Any) -> None:
    back, forth = (explorer.get_by_role("button", name=name, exact=True) for name in ("Back", "Next"))
    assert back.is_disabled()
    seen = []
    for step in STEPS:
        seen.append(heading(explorer))
        assert explorer.get_by_role("tab", selected=True).get_attribute("aria-label") == seen[-1].replace(
            ".", ""
        )
        if step != STEPS[-1]:
            forth.click()
    assert seen == [f"{number}. {step}" for number, step in enumerate(STEPS, 1)]
    assert forth.is_disabled()
    back.click()
    assert heading(explorer) == "9. output arrived"
    explorer.get_by_role("tab", name="3 in flight").click()
    assert heading(explorer) == "3. in flight"


def test_steps_and_blocks_by_keyboard(explorer: Any) -> None:
    explorer.locator("[name=dtype]").focus()
    for _ in range(5):  # over four presets to the steps; Back is off
        explorer.keyboard.press("Tab")
    for key, step in (
        ("ArrowRight", "2. pack"),
        ("End", "10. unpack output"),
        ("ArrowRight", "10. unpack output"),
        ("ArrowLeft", "9. output arrived"),
        ("Home", "1. shards"),
        ("ArrowLeft", "1. shards"),
    ):
        explorer.keyboard.press(key)
        assert heading(explorer) == step
    explorer.keyboard.press("Tab")  # Next
    explorer.keyboard.press("Enter")
    assert heading(explorer) == "2. pack"
    for _ in range(3):  # the line of code, which scrolls where it is too long, may be a stop on the way
        explorer.keyboard.press("Tab")
        if facts(explorer)[0].startswith("block"):
            break
    blocks = [facts(explorer)[0]]
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"):
        explorer.keyboard.press(key)
        blocks.append(facts(explorer)[0])
    assert blocks[:4] == [
        "block query, tokens 0-2, query heads 0-2",
        "block key, tokens 0-2, kv heads 0",
        "block value, tokens 0-2, kv heads 0",
        "block key, tokens 0-2, kv heads 0",
    ]
    assert re.match(r"block \w+, tokens 6-7, ", blocks[4])  # rank 2, below rank 0
    assert re.match(r"block \w+, tokens 0-2, ", blocks[5])


def test_hover_tells_owner_slice_and_bytes(explorer: Any) -> None:
    assert facts(explorer)[0].startswith("Point at a block")
    tile(explorer, "query 0 2").hover()
    assert facts(explorer) == [
        "block query, tokens 0-2, query heads 5-6",
        "owner rank 0 of the tokens, rank 2 of the heads",
        "slice query[:, :, 5:7, :] on rank 0",
        "bytes 192 bytes, sent from rank 0 to rank 2",
    ]
    tile(explorer, "key 1 1").hover()
    assert facts(explorer) == [
        "block key, tokens 3-5, kv heads 1",
        "owner rank 1 of the tokens, rank 1 of the heads; rank 2 gets copies of them",
        "slice key[:, :, 1:2, :] on rank 1",
        "bytes 96 bytes, stays on rank 1, none are sent",
    ]
    explorer.get_by_role("tab", name="3 in flight").click()
    tile(explorer, "value 3 2").hover()
    assert facts(explorer) == [
        "block value, tokens 8-9, kv heads 1-2",
        "owner rank 3 of the tokens, rank 2 of the heads; ranks 1 and 3 get copies of them",
        "slice in the message from rank 3 to rank 2",
        "bytes 128 bytes, sent from rank 3 to rank 2",
    ]
    explorer.get_by_role("tab", name="9 output arrived").click()
    tile(explorer, "output 1 3").hover()
    assert facts(explorer) == [
        "block output, tokens 3-5, query heads 7-8",
        "owner rank 1 of the tokens, rank 3 of the heads",
        "slice receive buffer[168:216] on rank 1",
        "bytes 192 bytes, sent from rank 3 to rank 1",
    ]


def test_a_block_is_named_for_readers_of_the_screen(explorer: Any) -> None:
    label = tile(explorer, "query 0 2").get_attribute("aria-label")
    assert label.startswith("block: query, tokens 0-2, query heads 5-6. owner: rank 0")


def test_the_lines_beside_each_step_are_in_the_sources(explorer: Any) -> None:
    known = [shown_lines(*where) for where in SHOWN.values()]
    shown = []
    for step in STEPS:
        explorer.get_by_role("tab", name=step, exact=False).last.click()
        figures = explorer.locator(".code figure")
        assert figures.count() >= 1
        for figure in figures.all():
            file, name = figure.locator("figcaption").inner_text().split()[:2]
            lines = figure.locator("pre").inner_text().splitlines()
            shown.append({"file": file, "function": name, "lines": lines})
    assert all(entry in known for entry in shown)


def test_a_setting_that_python_refuses_shows_what_python_says(explorer: Any) -> None:
    for fields in ({"kv_heads": "4"}, {"kv_heads": "3", "ranks": "0"}, {"ranks": "4", "tokens": "1, 2"}):
        fill(explorer, **fields)
        request = {"ranks": 4, "heads": 9, "kv_heads": 3, "tokens": 10}
        request |= {name: [1, 2] if name == "tokens" else int(value) for name, value in fields.items()}
        with pytest.raises(PlanError) as refused:
            make_plan(**request)
        assert explorer.get_by_role("alert").inner_text() == f"PlanError: {refused.value}"
        assert not explorer.locator(".stage").is_visible() and not explorer.locator(".plan").is_visible()
    fill(explorer, tokens="10")
    assert explorer.get_by_role("alert").count() == 0
    assert explorer.locator(".stage").is_visible()


@pytest.mark.parametrize("root", ["http", "file"], indirect=True)
def test_the_address_holds_the_setting(explorer: Any, open_page: Open) -> None:
    fill(explorer, ranks="3", tokens="4, 0, 9", heads="6", kv_heads="2", batch="2", head_dim="5")
    explorer.locator("[name=layout]").select_option("s b h d")
    explorer.locator("[name=policy]").select_option("groups")
    explorer.locator("[name=dtype]").select_option("float16")
    explorer.get_by_role("tab", name="5 unpack").click()
    fragment = explorer.url.split("#")[1]
    other = open_page(f"explorer.html#{fragment}")
    assert other.locator(".stage").inner_html() == explorer.locator(".stage").inner_html()
    assert heading(other) == "5. unpack"
    for name in ("ranks", "tokens", "heads", "kv_heads", "policy", "layout", "batch", "head_dim", "dtype"):
        field = f"[name={name}]"
        assert other.locator(field).input_value() == explorer.locator(field).input_value()
    other.evaluate("location.hash = 'ranks=2&tokens=6&heads=4&kv_heads=4'")
    other.locator(".stage [data-rank='2']").wait_for(state="detached")
    assert printed_plan(other) == str(make_plan(ranks=2, tokens=6, heads=4))
    other.evaluate("location.hash = 'how-to-read-it'")  # a heading: the setting stays
    assert printed_plan(other) == str(make_plan(ranks=2, tokens=6, heads=4))


def test_a_large_plan_is_printed_and_not_drawn(explorer: Any) -> None:
    fill(explorer, ranks="1024", heads="4096", kv_heads="", tokens="1000000")
    assert printed_plan(explorer) == str(make_plan(ranks=1024, heads=4096, tokens=10**6, policy="balanced"))
    assert explorer.locator(".message").inner_text().startswith("Pictures are drawn for up to 16 ranks.")
    assert explorer.locator(".tile").count() == 0 or not explorer.locator(".stage").is_visible()


# However slow the machine is, what begins to move is still there to be counted.
PAUSED = """() => {
  const animate = Element.prototype.animate
  Element.prototype.animate = function (...how) {
    const animation = animate.apply(this, how)
    animation.pause()
    return animation
  }
}"""
ANIMATIONS = "document.querySelector('seqpar-explorer').shadowRoot.getAnimations()"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_moves(open_page: Open, scheme: str) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": scheme}
    page = open_page("explorer.html", reduced_motion="no-preference", **phone)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    page.evaluate(PAUSED)
    for step in STEPS:
        assert heading(page).endswith(step)
        if step == "pack":  # blocks are on their way from the tensors, where they lay
            moving = page.evaluate(f"{ANIMATIONS}.length")
            assert moving == page.locator(".tile").count()
        page.evaluate(f"{ANIMATIONS}.forEach((animation) => animation.finish())")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        if step != STEPS[-1]:
            page.get_by_role("button", name="Next", exact=True).tap()
    tile(page, "output 2 0").tap()
    assert facts(page)[0] == "block output, tokens 6-7, query heads 0-2"
