"""Every page in a browser: no error, nothing from elsewhere, links that lead somewhere, search, the first page."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

Open = Callable[..., Any]

KINDS = {  # a page of each kind
    "start": "index.html",
    "learn": "idea.html",
    "explorer": "explorer.html",
    "notebook": "notebooks/05_uneven_heads.html",
    "how-to": "model.html",
    "wide tables": "deepspeed.html",
    "figures": "overlap.html",
    "api": "api/seqpar_ref.html",
    "errors": "errors.html",
    "results": "benchmarks.html",
}
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}


class Anchors(HTMLParser):
    """The ids of a page, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids |= {value for name in ("id", "name") if (value := found.get(name))}
        link = found.get("href")
        if tag == "a" and link and not re.match(r"[a-z]+:", link):
            self.links.append(link)


def pages_of(site: Path) -> list[str]:
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html"))
    return [page for page in pages if page != "404.html"]


@pytest.mark.parametrize(("root", "scheme"), [("http", "light"), ("file", "dark")], indirect=["root"])
def test_every_page_loads_and_fits(scheme: str, site: Path, open_page: Open, tmp_path: Path) -> None:
    """What goes wrong on a page is collected by `open_page`, and fails the test when it is over.

    No page moves sideways on a phone: wide tables, figures and code move within themselves. A screenshot of each kind
    of page, in each size, is left in the folder of the test.
    """
    shown = {path: kind for kind, path in KINDS.items()}
    pages = pages_of(site)
    page = open_page(pages[0], color_scheme=scheme, viewport=SIZES["phone"])
    for path in pages:
        page.goto(f"{open_page.root}/{path}")  # type: ignore[attr-defined]
        assert page.locator("h1").first.is_visible(), path
        wanted = {"light": "default", "dark": "slate"}[scheme]
        assert page.evaluate("document.body.getAttribute('data-md-color-scheme')") == wanted
        for size in ("desktop", "phone") if path in shown else ():
            page.set_viewport_size(SIZES[size])
            picture = tmp_path / f"{shown[path]}-{size}-{scheme}.png"
            page.screenshot(path=picture)
            assert picture.stat().st_size > 10_000
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES["phone"]["width"], path
    page.wait_for_load_state("networkidle")
    assert len(pages) >= 35
    assert len(list(tmp_path.iterdir())) == 2 * len(KINDS)


def test_every_link_and_anchor_leads_somewhere(site: Path) -> None:
    anchors = {path: Anchors((site / path).read_text(encoding="utf-8")) for path in pages_of(site)}
    checked = 0
    for path, page in anchors.items():
        for link in page.links:
            target, fragment = urldefrag(link)
            place = ((site / path).parent / unquote(target)).resolve() if target else site.resolve() / path
            assert place.exists(), f"{path} links to {link}"
            name = str(place.relative_to(site.resolve()))
            if fragment and name in anchors:
                assert unquote(fragment) in anchors[name].ids, f"{path} links to {link}"
                checked += 1
    assert checked > 500


@pytest.mark.parametrize("root", ["http", "file"], indirect=True)
def test_search_finds_a_term(open_page: Open) -> None:
    page = open_page("index.html", viewport=SIZES["desktop"])
    page.locator("input[name=query]").fill("zigzag")
    page.locator(".md-search-result__item").first.wait_for()
    found = page.locator(".md-search-result__item a").evaluate_all("links => links.map(link => link.href)")
    assert any("choose.html" in link for link in found)


def test_the_switch_between_light_and_dark(open_page: Open) -> None:
    page = open_page("index.html", viewport=SIZES["phone"], color_scheme="light")
    for name, scheme in (("Dark", "slate"), ("Light", "default")):
        page.get_by_title(name, exact=True).click()
        page.wait_for_function(
            "name => document.body.getAttribute('data-md-color-scheme') === name", arg=scheme
        )


def test_picture_and_commands_are_above_the_fold(open_page: Open) -> None:
    page = open_page("index.html", viewport=SIZES["desktop"])
    picture = page.locator("article img").first
    picture.evaluate("image => image.complete || new Promise((done) => (image.onload = done))")
    commands = page.locator("article pre", has_text="make demo").first
    assert "make test" in commands.inner_text()
    for box in (picture.bounding_box(), commands.bounding_box()):
        assert box["width"] > 200 and box["height"] > 30
        assert box["y"] >= 0 and box["y"] + box["height"] <= 800
